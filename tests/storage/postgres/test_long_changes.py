"""Long changes run beside the other writes: nothing waits for them but what must come after them."""

import random
import threading
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from service.errors import EditedMeanwhileError, ItemNotFoundError, SessionExistsError, TurnNotFoundError
from service.storage.postgres import additions, deletions, forks, sessions
from service.storage.postgres import store as postgres_store
from service.storage.postgres.store import PostgresStore
from service.storage.records import EndResult, Siblings
from tests.postgres_server import PostgresServer
from tests.storage.rows import T0, a_session, a_turn, all_turns, at, contents, ended, said
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_deletions import a_tree, found_by, names

WAIT_S = 60


class Held:
    """Holds a change in its transaction, before or after its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, *, before: bool = False) -> None:
        self._is_there = threading.Event()
        self._goes_on = threading.Event()
        change: Callable[..., Any] = getattr(module, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            result = None if before else change(*args, **kwargs)
            self._is_there.set()
            assert self._goes_on.wait(WAIT_S)
            return change(*args, **kwargs) if before else result

        monkeypatch.setattr(module, name, held)

    async def wait(self) -> None:
        """Wait until the change is held."""
        assert await trio.to_thread.run_sync(self._is_there.wait, WAIT_S)

    def release(self) -> None:
        self._goes_on.set()


async def a_turn_elsewhere(store: PostgresStore, name: str) -> None:
    """A whole turn of another session."""
    turn = a_turn(name, name)
    await store.begin_turn(turn, now=T0, creates=a_session(name))
    assert await store.end_turn(ended(turn), runs=said("Hi"), now=T0) is EndResult.KEPT


Change = Callable[[PostgresStore], Awaitable[object]]


async def test_readers_and_other_writes_go_on_while_turns_are_deleted(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a_tree(store)
    before = await contents(store, now=T0)
    held = Held(monkeypatch, deletions, "delete_turns")
    refused: list[TurnNotFoundError] = []

    async def follow() -> None:
        """A turn of the same session waits, and finds its parent deleted."""
        try:
            await store.begin_turn(a_turn("late", parent="c"), now=T0)
        except TurnNotFoundError as error:
            refused.append(error)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: store.delete_turns("s", "b", now=T0))
            await held.wait()
            nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked()
            await a_turn_elsewhere(store, "elsewhere")
            found = await contents(store, now=T0)
            assert {name: found[name] for name in before} == before
            assert await found_by(store, "answer c") == ["c"]
            held.release()
    assert [error.turn_id for error in refused] == ["c"]
    assert await names(store) == ["a", "b2", "b3", "d"]
    assert await found_by(store, "answer c") == []


async def test_a_session_may_take_the_id_of_a_fork_that_is_being_made(
    store: PostgresStore, postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a_tree(store)
    held = Held(monkeypatch, sessions, "insert")
    outcomes: list[str] = []

    async def fork() -> None:
        try:
            await store.fork_session("s", at="d", copy_id="copy", now=T0)
        except SessionExistsError as error:
            outcomes.append(error.session_id)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fork)
            await held.wait()
            monkeypatch.undo()
            await store.create_session(a_session("copy"), now=T0)
            held.release()
    assert outcomes == ["copy"]
    assert await all_turns(store, "copy", now=T0) == []
    assert postgres.run(f"SELECT count(*) FROM {schema}.sessions") == [(2,)]


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
async def test_a_fork_whose_source_loses_something_before_it_commits_is_refused_whole(
    store: PostgresStore, postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    await a_tree(store)
    held = Held(
        monkeypatch, *((forks, "build") if moment == "before" else (sessions, "insert")), before=moment == "before"
    )
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:

            async def fork() -> None:
                with pytest.raises(EditedMeanwhileError):
                    await store.fork_session("s", at="d", copy_id="copy", now=T0)

            nursery.start_soon(fork)
            await held.wait()
            monkeypatch.undo()
            # Beside the thread of the long changes, which is held.
            await store._write(lambda db: deletions.delete_turns(db, "s", "c", store.me, T0))
            held.release()
    counts = [postgres.run(f"SELECT count(*) FROM {schema}.{table}") for table in ("sessions", "turns", "documents")]
    assert counts == [[(1,)], [(5,)], [(5,)]]


@pytest.mark.parametrize("kind", ["fork", "delete turns", "delete an item", "add turns"])
async def test_a_long_change_whose_caller_leaves_before_the_commit_leaves_nothing(
    store: PostgresStore, postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(postgres_store, "ADDED_MAX", 1)
    await a_tree(store)
    added = [an_added_turn("x", parent="d"), an_added_turn("y", parent="x")]
    change: Change
    match kind:
        case "fork":
            held = Held(monkeypatch, forks, "build")
            change = lambda it: it.fork_session("s", at="d", copy_id="copy", now=T0)  # noqa: E731
        case "delete turns":
            held = Held(monkeypatch, deletions, "delete_turns")
            change = lambda it: it.delete_turns("s", "b", now=T0)  # noqa: E731
        case "delete an item":
            held = Held(monkeypatch, deletions, "delete_item")
            change = lambda it: it.delete_item("s", "b-out", now=T0)  # noqa: E731
        case _:
            held = Held(monkeypatch, additions, "add")
            change = lambda it: it.add_turns(added, now=T0)  # noqa: E731
    before = await contents(store, now=T0)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, store)
            await held.wait()
            nursery.cancel_scope.cancel()
        held.release()
        monkeypatch.undo()
        await store._changing.call(lambda _: None)
    assert await contents(store, now=T0) == before
    await change(store)
    assert await contents(store, now=T0) != before
    assert postgres.run(f"SELECT count(*) FROM {schema}.sessions WHERE id LIKE '%+%'") == [(0,)]


async def test_an_item_is_found_however_many_turns_are_looked_at_at_once_and_deleted_between(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create_session(a_session(), now=T0)
    for n in range(12):
        await store.add_turns([an_added_turn(f"t{n}")], now=T0)
    for name in ("t11", "t7", "t6", "t0"):
        await store.delete_turns("s", name, now=T0)
    monkeypatch.setattr(deletions, "STEP_S", 0)
    for at_once in (1, 2, 3, 100):
        monkeypatch.setattr(deletions, "_LOOKED_AT_ONCE", at_once)
        for name in ("t1", "t5", "t10"):
            assert (await store.find_item("s", f"{name}-out", now=T0)).id == name
        with pytest.raises(ItemNotFoundError):
            await store.find_item("s", "t7-out", now=T0)


@pytest.mark.parametrize("seed", range(4))
async def test_chains_follow_any_history_of_branches_and_deletions(store: PostgresStore, seed: int) -> None:
    chosen = random.Random(seed)
    await store.create_session(a_session(), now=T0)
    parents: dict[str, str | None] = {}

    def path_to(name: str | None) -> list[str]:
        return [] if name is None else [*path_to(parents[name]), name]

    for n in range(40):
        if parents and chosen.random() < 0.25:
            gone = chosen.choice(list(parents))
            await store.delete_turns("s", gone, now=T0)
            parents = {name: parent for name, parent in parents.items() if gone not in path_to(name)}
        else:
            parent = chosen.choice([None, *list(parents)[-4:]]) if parents else None
            parents[f"t{n}"] = parent
            await store.add_turns([an_added_turn(f"t{n}", parent=parent)], now=at(n))
        tree = (await store.list_tree("s", limit=99, after=None, now=T0)).data
        assert {node.id: node.parent for node in tree} == parents
    siblings = {name: [it for it in parents if parents[it] == parent] for name, parent in parents.items()}
    places = await store.find_places("s", list(parents))
    assert places.siblings == {
        name: Siblings(all_of_them.index(name) + 1, len(all_of_them)) for name, all_of_them in siblings.items()
    }
    for name in parents:
        assert [turn.id for turn in await store.read_path("s", name, bytes_max=None)] == path_to(name)
        copy = await store.fork_session("s", at=name, copy_id=f"copy-{name}", now=T0)
        assert copy.message_count == 2 * len(path_to(name))
