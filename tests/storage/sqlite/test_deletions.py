"""Deletions of turns and items in the file: what is left of them, and for how long a step holds the writer."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
import trio

from service.errors import ItemNotFoundError, StoreError, TurnInProgressError, TurnNotFoundError
from service.storage.pieces import STARTED, Run
from service.storage.records import EventsPage, IdempotencyKey, Siblings, TurnRecord
from service.storage.rules import revision_of
from service.storage.search import terms_at_once
from service.storage.sqlite import (
    SqliteStore,
    creations,
    deletions,
    documents,
    forks,
    maintenance,
    open_sqlite_store,
    reclaim,
    removals,
    sessions,
    tree_changes,
    turns,
    writer,
)
from service.storage.sqlite.reclaim import reclaim_some
from service.storage.sqlite.writer import Writer
from service.storage.store import Store
from tests.storage.rows import T0, a_session, a_turn, contents, ended, said
from tests.storage.test_store_added_turns import a_beginning, an_added_turn
from tests.storage.test_store_deletions import a_chain, a_tree, asks, brings, calls, found_by, says, with_items

LONG = "secret " * 50_000


def texts_in(path: Path) -> str:
    """All that the rows of a file have of texts."""
    db = apsw.Connection(str(path))
    columns = {"turns": "input || output", "event_pages": "CAST(text AS TEXT)", "outputs": "items"}
    rows = (row for table, column in columns.items() for row in db.execute(f"SELECT {column} FROM {table}"))
    found = "".join(str(text) for (text,) in rows)
    db.close()
    return found


async def test_deleted_texts_leave_the_rows_and_the_pages_of_long_turns_are_reclaimed(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        for name in ("long", "longer"):
            turn = a_turn(name, parent="b")
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn, text=LONG), runs=(Run(STARTED), *said(LONG)), now=T0)
        assert "secret" in texts_in(path)
        await store.delete_item("s", "long-out", now=T0)
        await store.delete_turns("s", "longer", now=T0)
        await store.delete_turns("s", "b2", now=T0)
        while await store._writing.call(reclaim_some):
            pass
        assert "secret" not in texts_in(path)
        assert "answer d" not in texts_in(path)
        assert "answer c" in texts_in(path)
        assert maintenance.check(path) == []
    with apsw.Connection(str(path)) as db:
        assert db.execute("SELECT count(*) FROM sessions").get == 1
        assert db.execute("SELECT count(*) FROM turns").get == 5
        assert db.execute("SELECT count(*) FROM documents WHERE turn NOT IN (SELECT key FROM turns)").get == 0


async def test_the_texts_of_a_deletion_leave_the_file_in_its_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "reclaim_some", lambda _: False)
    monkeypatch.setattr(deletions, "RECLAIM_S", 60)  # all of it, on a slow machine as well
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        await store.delete_turns("s", "b2", now=T0)
        assert "answer d" not in texts_in(path)
        assert "answer c" in texts_in(path)
        assert maintenance.check(path) == []
    with apsw.Connection(str(path)) as db:
        assert db.execute("SELECT count(*) FROM tree_changes").get == 0
        assert db.execute("SELECT count(*) FROM documents WHERE turn NOT IN (SELECT key FROM turns)").get == 0


async def reclaim_all(store: SqliteStore) -> None:
    while await store._writing.call(reclaim_some):
        pass


def rows_in(path: Path) -> dict[str, int]:
    """How many rows the tables have that a deletion writes to."""
    tables = ("turns", "siblings", "documents", "unindexed", "tree_changes", "changed_parts", "sessions")
    with closing(apsw.Connection(str(path))) as db:
        return {table: db.execute(f"SELECT count(*) FROM {table}").get for table in tables}


async def a_tree_with_calls(store: Store) -> None:
    await a_tree(store)
    await store.add_turns([with_items("call", asks("call"), calls("1"), parent="b")], now=T0)
    for n in range(6):
        answer = with_items(f"answer{n}", brings("1", f"answer{n}"), says(f"A{n}"), parent="call")
        await store.add_turns([answer], now=T0)


CHANGES = ("b", "c_1", "new")
"""A turn and a call that are deleted, and the beginning of the names of added turns."""
A_KEY = IdempotencyKey(caller="", key="k", fingerprint=b"f")


def added_turns() -> list[TurnRecord]:
    return a_chain("new", 7, below="b2")


async def change(store: Store, what: str) -> None:
    match what:
        case "b":
            await store.delete_turns("s", what, now=T0)
        case "c_1":
            await store.delete_item("s", what, now=T0)
        case _:
            await store.add_turns(added_turns(), now=T0, key=A_KEY)


class Steps:
    """A change step by step, by a process that may die after each of them."""

    def __init__(self, store: SqliteStore, what: str) -> None:
        self.progress = turns.Addition() if what == "new" else tree_changes.Progress()
        self._store = store
        self._key = tree_changes.new_key()
        self._read: deletions.FollowersRead | deletions.ItemSearch | None = None
        if what != "new":
            self._read = (deletions.ItemSearch if what == "c_1" else deletions.FollowersRead)("s", what, T0)

    async def read(self) -> None:
        while self._read is not None and not self._read.is_complete:
            await self._store._reading.call(self._read.read_some)

    async def do(self) -> None:
        more: dict[str, Any] = {"owners": self._store._ownership, "now": T0}
        more |= {"change": self._key, "progress": self.progress}
        step: Callable[[apsw.Connection], tree_changes.Progress]
        if isinstance(self._read, deletions.ItemSearch):
            step = partial(deletions.delete_item, search=self._read, terms=(), **more)
        elif self._read is not None:
            step = partial(deletions.delete_turns, read=self._read, **more)
        else:
            added = added_turns()
            terms = [terms_at_once(turn) for turn in added]
            step = partial(turns.add_some, added=added, terms=terms, key=A_KEY, **more)
        self.progress = await self._store._writing.call(step)


@pytest.fixture
def in_the_smallest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)
    monkeypatch.setattr(tree_changes, "STEP_S", 0)
    monkeypatch.setattr(tree_changes, "_AT_ONCE", 1)
    monkeypatch.setattr(reclaim, "STEP_S", 0.000001)
    monkeypatch.setattr(deletions, "RECLAIM_S", 0)
    monkeypatch.setattr(Writer, "run_housekeeping", lambda _, *, idle: False)  # noqa: ARG005


@pytest.mark.usefixtures("in_the_smallest_steps")
@pytest.mark.parametrize("what", CHANGES)
async def test_a_process_that_dies_at_any_step_leaves_all_of_a_change_or_nothing(path: Path, what: str) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree_with_calls(store)
        before = await contents(store, now=T0)
    original, whole = path.read_bytes(), rows_in(path)  # noqa: ASYNC240
    async with open_sqlite_store(path) as store:
        await change(store, what)
        after = await contents(store, now=T0)
        await reclaim_all(store)
        assert await contents(store, now=T0) == after
    assert maintenance.check(path) == []
    final = rows_in(path)
    assert (final["tree_changes"], final["changed_parts"]) == (0, 0)

    outcomes: list[bool] = []
    steps_max = 0
    while True:
        path.write_bytes(original)  # noqa: ASYNC240
        async with open_sqlite_store(path) as store:
            steps = Steps(store, what)
            await steps.read()
            for _ in range(steps_max):
                if steps.progress.is_done is None:
                    await steps.do()
                else:
                    await store._writing.call(reclaim_some)
            is_done = steps.progress.is_done is True
            outcomes.append(is_done)
            assert await contents(store, now=T0) == (after if is_done else before)
            assert maintenance.check(path) == [], "and a backup of this moment is one, too"
        is_over = is_done and rows_in(path) == final
        async with open_sqlite_store(path) as store:  # the next process
            assert await store.recover(now=T0) == 0
            assert await contents(store, now=T0) == (after if is_done else before)
            await reclaim_all(store)
            assert await contents(store, now=T0) == (after if is_done else before)
        assert rows_in(path) == (final if is_done else whole)
        assert maintenance.check(path) == []
        if is_over:
            break
        steps_max += 1
    assert outcomes.count(False) > 5
    assert outcomes.count(True) > 2
    assert sorted(outcomes) == outcomes


@pytest.mark.usefixtures("in_the_smallest_steps", "callers_wait")
@pytest.mark.parametrize("what", CHANGES)
async def test_the_unfinished_change_of_a_caller_that_left_is_undone(path: Path, what: str) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree_with_calls(store)
        before = await contents(store, now=T0)
        for steps in range(1, 4):
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    commits = store.writer.commits
                    nursery.start_soon(change, store, what)
                    while store.writer.commits < commits + steps:
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            assert await contents(store, now=T0) == before
            await reclaim_all(store)
            found = rows_in(path)
            assert (found["tree_changes"], found["changed_parts"], found["turns"]) == (0, 0, 13)


@pytest.mark.usefixtures("in_the_smallest_steps", "callers_wait")
async def test_what_could_not_be_undone_at_once_is_undone_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree_with_calls(store)

        def refuse(*_: object, **__: object) -> None:
            raise StoreError("The disk is full.")

        with monkeypatch.context() as patched, trio.fail_after(60):
            patched.setattr(tree_changes, "give_up", refuse)
            async with trio.open_nursery() as nursery:
                commits = store.writer.commits
                nursery.start_soon(partial(store.delete_turns, "s", "b", now=T0))
                while store.writer.commits < commits + 3:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        await reclaim_all(store)
        assert rows_in(path)["changed_parts"] > 0
        await store.recover(now=T0)
        await reclaim_all(store)
        assert rows_in(path)["changed_parts"] == 0
        assert len((await contents(store, now=T0))["s"][1]) == 13


@pytest.mark.usefixtures("in_the_smallest_steps")
@pytest.mark.parametrize("meanwhile", ["turn", "item", "deletion", "session", "addition"])
async def test_a_deletion_begins_anew_if_the_tree_changes_between_its_steps(path: Path, meanwhile: str) -> None:
    async with open_sqlite_store(path) as store, open_sqlite_store(path) as other:
        await a_tree_with_calls(store)
        addition = Steps(other, "new")
        if meanwhile == "addition":
            await addition.do()
        deletion = Steps(store, "b")
        await deletion.read()
        for _ in range(3):
            await deletion.do()
        match meanwhile:
            case "turn":
                await other.add_turns([an_added_turn("new", parent="answer5")], now=T0)
            case "item":
                await other.delete_item("s", "c_1", now=T0)
            case "deletion":
                await other.delete_turns("s", "call", now=T0)
            case "addition":  # it had begun before
                while addition.progress.is_done is None:
                    await addition.do()
            case "session":
                await other.mark_deleted("s", now=T0)
                await other.remove_deleted("s")
                await reclaim_all(other)
                await other.create_session(a_session(), now=T0)
        await deletion.do()
        assert deletion.progress == tree_changes.Progress(is_done=False)
        if meanwhile == "session":
            with pytest.raises(TurnNotFoundError):
                await store.delete_turns("s", "b", now=T0)
            return
        await store.delete_turns("s", "b", now=T0)
        found = (await contents(other, now=T0))["s"]
        added = [turn.id for turn in added_turns()] if meanwhile == "addition" else []
        assert [turn.id for turn, _ in found[1]] == ["a", "b2", "b3", "d", *added]
        head = added[-1] if added else "a"
        assert (found[0].head, found[0].message_count) == (head, 8 + 2 * len(added))
        await reclaim_all(store)
    assert maintenance.check(path) == []
    assert rows_in(path)["turns"] == 4 + len(added)


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_a_session_goes_with_what_a_deletion_has_left_of_it(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree_with_calls(store)
        deletion = Steps(store, "b2")
        await deletion.read()
        await deletion.do()  # and its process hangs
        await store.delete_item("s", "c_1", now=T0)
        await store.delete_turns("s", "call", now=T0)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        await reclaim_all(store)
        found = rows_in(path)
        assert found == dict.fromkeys(found, 0) | {"tree_changes": 1}
        await store.create_session(a_session(), now=T0)
        await store.add_turns([an_added_turn("t")], now=T0)  # with the key of a row that was deleted
        assert list(await contents(store, now=T0)) == ["s"]
        assert len((await contents(store, now=T0))["s"][1]) == 1


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_turns_that_begin_while_others_are_added_keep_their_order(path: Path) -> None:
    async with open_sqlite_store(path) as store, open_sqlite_store(path) as other:
        await a_tree_with_calls(store)
        addition = Steps(store, "new")
        await addition.do()
        for name, parent in (("beside", "b2"), ("beside2", "b2"), ("below", "d")):
            await other.add_turns([an_added_turn(name, parent=parent)], now=T0)
        assert (await other.find_places("s", ["beside2"])).siblings == {"beside2": Siblings(3, 3)}
        with pytest.raises(TurnNotFoundError):
            await other.add_turns([an_added_turn("x", parent="new0")], now=T0)
        while addition.progress.is_done is None:
            await addition.do()
        places = (await other.find_places("s", ["d", "new0", "beside", "beside2", "new1", "below"])).siblings
        assert places == {
            "d": Siblings(1, 4),
            "new0": Siblings(2, 4),
            "beside": Siblings(3, 4),
            "beside2": Siblings(4, 4),
            "new1": Siblings(1, 1),
            "below": Siblings(1, 1),
        }
        await reclaim_all(store)
        assert maintenance.check(path) == []
        assert (await other.get_session("s", now=T0)).head == "new6"
        await other.begin_turn(a_turn("next", parent="new6"), now=T0, head="new6")
        path_down = [turn.id for turn in await other.read_path("s", "next", bytes_max=None)]
        assert path_down == ["a", "b2", *(f"new{n}" for n in range(7)), "next"]
    assert maintenance.check(path) == []


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_an_addition_whose_parent_is_deleted_meanwhile_is_refused_as_a_whole(path: Path) -> None:
    async with open_sqlite_store(path) as store, open_sqlite_store(path) as other:
        await a_tree_with_calls(store)
        addition = Steps(store, "new")
        await addition.do()
        await other.delete_turns("s", "b2", now=T0)
        with pytest.raises(TurnNotFoundError):
            await addition.do()
        assert "new0" not in [turn.id for turn, _ in (await contents(store, now=T0))["s"][1]]
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        await reclaim_all(store)
    assert maintenance.check(path) == []
    assert rows_in(path)["turns"] == 11


async def a_long_turn(store: Store) -> None:
    """A turn with very many items and a long reply, and one that follows it."""
    await store.create_session(a_session(), now=T0)
    turn = a_turn("a", texts=[f"secret {n}" for n in range(3500)])
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, text=LONG), runs=(Run(STARTED), *said(LONG)), now=T0)
    await store.add_turns([an_added_turn("b", parent="a")], now=T0)


async def test_a_turn_of_very_many_items_is_emptied_by_one_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "run_housekeeping", lambda _, *, idle: False)  # noqa: ARG005
    monkeypatch.setattr(deletions, "RECLAIM_S", 60)  # all of its pages, on a slow machine as well
    async with open_sqlite_store(path) as store:
        await a_long_turn(store)
        commits = store.writer.commits
        await store.delete_turn("s", "a", now=T0)
        assert store.writer.commits == commits + 1
        assert (await store.get_session("s", now=T0)).message_count == 2
        assert await found_by(store, "secret") == []
        assert "secret" not in texts_in(path)
    assert maintenance.check(path) == []


async def read_turn_alone(store: SqliteStore, turn_id: str) -> deletions.EndOfBranchRead:
    read = deletions.EndOfBranchRead("s", turn_id, T0)
    while not read.is_complete:
        await store._reading.call(read.read_some)
    return read


async def delete_alone(store: SqliteStore, read: deletions.EndOfBranchRead) -> tree_changes.Progress:
    """Do one step of a deletion of one turn."""
    step = partial(deletions.delete_turn, read=read, owners=store._ownership, now=T0, session_revisions=())
    return await store._writing.call(partial(step, change=tree_changes.new_key(), progress=tree_changes.Progress()))


def pages_in(path: Path) -> int:
    with closing(apsw.Connection(str(path))) as db:
        return int(db.execute("SELECT count(*) FROM event_pages").get)


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_the_step_that_empties_a_turn_reads_no_item_and_leaves_its_pages_to_the_housekeeping(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the step of the writer reads items")

    async with open_sqlite_store(path) as store:
        await a_long_turn(store)
        pages = pages_in(path)
        read = await read_turn_alone(store, "a")
        with monkeypatch.context() as patched:
            patched.setattr(deletions, "items_of", refuse)
            patched.setattr(deletions, "input_of", refuse)
            assert (await delete_alone(store, read)).is_done
        assert pages_in(path) == pages > 1
        after = await contents(store, now=T0)
        assert after["s"][1][0][0].is_emptied
        assert (await store.get_session("s", now=T0)).message_count == 2
        assert await found_by(store, "secret") == []
        assert await store.read_events("s", "a") == EventsPage(after=0, ended=True, events_deleted=True)
        assert maintenance.check(path) == []
    left: list[int] = []
    async with open_sqlite_store(path) as store:  # the process has died
        await store.recover(now=T0)
        while await store._writing.call(reclaim_some):
            left.append(pages_in(path))
            assert await contents(store, now=T0) == after
        assert set(left) >= set(range(pages)), "one page in a step"
        assert "secret" not in texts_in(path)
        found = rows_in(path)
        assert (found["tree_changes"], found["changed_parts"], found["turns"]) == (0, 0, 2)
    assert maintenance.check(path) == []


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_a_fork_does_not_copy_the_pages_that_an_emptied_turn_has_still(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_long_turn(store)
        await store.delete_turn("s", "a", now=T0)
        pages = pages_in(path)
        await store.fork_session("s", at="b", copy_id="copy", now=T0)
        assert pages_in(path) == pages
        first, second = (await contents(store, now=T0))["copy"][1]
        assert (first[0].is_emptied, first[1], second[0].input_text) == (True, [], "Hi")
        await reclaim_all(store)
        assert pages_in(path) == 0
    assert maintenance.check(path) == []


@pytest.mark.usefixtures("in_the_smallest_steps")
@pytest.mark.parametrize("last", ["a turn alone", "a turn and all that follow", "the session"])
async def test_an_emptied_turn_with_pages_goes_like_any_other(path: Path, last: str) -> None:
    async with open_sqlite_store(path) as store:
        await a_long_turn(store)
        await store.delete_turn("s", "a", now=T0)
        await store.delete_turn("s", "a", now=T0)
        assert pages_in(path) > 0
        match last:
            case "a turn alone":
                await store.delete_turn("s", "b", now=T0)
            case "a turn and all that follow":
                await store.delete_turns("s", "a", now=T0)
            case _:
                await store.mark_deleted("s", now=T0)
                await store.remove_deleted("s")
        await reclaim_all(store)
        found = rows_in(path)
        assert (pages_in(path), found["turns"], found["tree_changes"], found["changed_parts"]) == (0, 0, 0, 0)
    assert maintenance.check(path) == []


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_a_turn_that_was_open_when_it_was_counted_is_counted_anew(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(turn := a_turn("a"), now=T0)
        await store.begin_turn(follower := a_turn("b", parent="a"), now=T0)
        read = await read_turn_alone(store, "a")
        with pytest.raises(TurnInProgressError):
            await delete_alone(store, read)
        for one in turn, follower:
            await store.end_turn(ended(one), runs=(Run(STARTED), *said("hello")), now=T0)
        assert await delete_alone(store, read) == tree_changes.Progress(is_done=False)
        before = (await store.get_session("s", now=T0)).message_count
        await store.delete_turn("s", "a", now=T0)
        assert (await store.get_session("s", now=T0)).message_count == before - 2
    assert maintenance.check(path) == []


@pytest.mark.parametrize("turn_id", ["a", "b"])
async def test_a_deletion_of_a_turn_alone_that_fails_in_its_midst_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, turn_id: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreError("The disk is full.")

    async with open_sqlite_store(path) as store:
        await a_long_turn(store)
        before = await contents(store, now=T0)
        revision = revision_of(await store.get_session("s", now=T0))
        delete = partial(store.delete_turn, "s", turn_id, now=T0, session_revisions=[revision])
        if turn_id == "b":
            await store.delete_turn("s", "a", now=T0)
            before = await contents(store, now=T0)
        last: tuple[Any, str] = (documents, "change_turn") if turn_id == "a" else (removals, "hide")
        for module, name in ((deletions, "_note"), last):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, fail)
                with pytest.raises(StoreError):
                    await delete()
            assert await contents(store, now=T0) == before
            await reclaim_all(store)
            assert await contents(store, now=T0) == before
        await delete()
        assert await contents(store, now=T0) != before
        await reclaim_all(store)
    assert maintenance.check(path) == []


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_a_turn_alone_is_looked_for_anew_if_its_follower_is_gone_meanwhile(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        turn = msgspec.structs.replace(a_turn("e", parent="d"), ephemeral=True)
        await store.begin_turn(turn, now=T0)
        read = await read_turn_alone(store, "d")
        assert read.is_followed
        await store.end_turn(ended(turn), runs=(), now=T0)
        assert await delete_alone(store, read) == tree_changes.Progress(is_done=False)
        await store.delete_turn("s", "d", now=T0)
        with pytest.raises(TurnNotFoundError):
            await store.get_turn("s", "d", now=T0)


async def test_an_export_has_no_deleted_turn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions, "RECLAIM_S", 0)
    monkeypatch.setattr(Writer, "run_housekeeping", lambda _, *, idle: False)  # noqa: ARG005
    async with open_sqlite_store(path) as store:
        await a_tree_with_calls(store)
        await store.delete_item("s", "c_1", now=T0)
        await store.delete_turns("s", "b2", now=T0)
        exported = maintenance.export_session(path, "s")
        shown = (await contents(store, now=T0))["s"]
        assert exported[0] == shown[0]
        assert [turn for turn, _ in exported[1]] == [turn for turn, _ in shown[1]]
        assert "secret" not in str(exported)
        assert "secret" in texts_in(path), "the rows are still there"
        maintenance.vacuum(path)
        assert "secret" not in texts_in(path)
        assert "answer d" not in texts_in(path)
        assert (await contents(store, now=T0))["s"] == shown


async def test_an_item_is_found_by_steps_however_old_its_turn_is(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        for first in range(0, 2000, 500):
            turns = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(first, first + 500)]
            await store.add_turns(turns, now=T0)
        search = deletions.ItemSearch("s", "t0-out", T0)
        while not search.is_complete:
            await store._reading.call(search.read_some)
        assert search.turn is not None
        assert search.turn.id == "t0"
        await store.delete_item("s", "t0-out", now=T0)
        assert (await store.get_turn("s", "t0", now=T0)).output == ()


async def test_an_item_that_is_deleted_twice_at_the_same_time_counts_once(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        missing: list[str] = []

        async def delete(item_id: str) -> None:
            try:
                await store.delete_item("s", item_id, now=T0)
            except ItemNotFoundError as error:
                missing.append(error.item_id)

        async with trio.open_nursery() as nursery:
            for item_id in ("c-out", "c-out", "c-in-0", "d-out"):
                nursery.start_soon(delete, item_id)
        assert missing == ["c-out"]
        assert (await store.get_session("s", now=T0)).message_count == 9


async def test_a_reply_that_ends_while_an_item_of_its_input_is_deleted_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(path) as owner, open_sqlite_store(path) as other:
        await owner.create_session(a_session(), now=T0)
        turn = a_turn("t", texts=["question"])
        await owner.begin_turn(turn, now=T0)
        write = other._writing.call
        ends = 0

        async def write_late(*args: Any, **more: Any) -> Any:
            nonlocal ends
            ends += 1
            if ends == 1:  # the search has found the turn open
                await owner.end_turn(ended(turn, text="answer"), runs=(Run(STARTED), *said("answer")), now=T0)
            return await write(*args, **more)

        monkeypatch.setattr(other._writing, "call", write_late)
        await other.delete_item("s", "t-in-0", now=T0)
        assert ends == 2, "the search began anew"
        kept = await other.get_turn("s", "t", now=T0)
        assert (kept.input, kept.text) == ((), "answer")
        assert await found_by(other, "answer") == ["t"]
        assert await found_by(other, "question") == []


@pytest.mark.parametrize("path_of", [turns.PathRead, turns.PathPage])
async def test_a_long_read_of_a_path_begins_anew_after_a_deletion(
    path: Path, monkeypatch: pytest.MonkeyPatch, path_of: type[turns.PathRead | turns.PathPage]
) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)  # one turn in each step

    def begin() -> turns.PathRead | turns.PathPage:
        if path_of is turns.PathRead:
            return turns.PathRead("s", "c", None)
        return turns.PathPage("s", "c", limit=9, first=None, bytes_max=None)

    async with open_sqlite_store(path) as store:
        await a_tree(store)
        edited, lost = begin(), begin()
        for walk in (edited, lost):
            await store._reading.call(walk.read_some)
            assert not walk.is_complete
        await store.delete_item("s", "c-out", now=T0)
        while not edited.is_complete:
            await store._reading.call(edited.read_some)
        assert [(turn.id, turn.text) for turn in edited.turns] == [("a", "answer a"), ("b", "answer b"), ("c", "")]
        await store.delete_turns("s", "b", now=T0)
        while not lost.is_complete:
            await store._reading.call(lost.read_some)
        assert list(lost.turns) == [], "and not a path without its end"


async def test_a_fork_of_what_was_deleted_meanwhile_is_refused_in_each_of_its_steps(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        plans = [forks.Plan("s", "c", copy_id="copy", fence=store.fence, now=T0) for _ in range(2)]
        await store._reading.call(plans[0].read_some)
        while not plans[1].is_complete:
            await store._reading.call(plans[1].read_some)
        await store.delete_item("s", "a-out", now=T0)
        with pytest.raises(StoreError, match="deleted while it was copied"):
            await store._reading.call(plans[0].read_some)
        build = partial(forks.build, fork=plans[1].fork, progress=None, fence=store.fence, now=T0)
        with pytest.raises(StoreError, match="deleted while it was copied"):
            await store._writing.call(build)
        copy = await store.fork_session("s", at="c", copy_id="copy", now=T0)
        assert copy.message_count == 5


@pytest.mark.usefixtures("in_the_smallest_steps")
async def test_a_process_that_dies_while_it_creates_a_session_with_turns_leaves_nothing(path: Path) -> None:
    session, added = a_beginning(*(an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(3)))
    async with open_sqlite_store(path) as store:
        creation = creations.Creation(
            session=session, added=added, terms=[()] * 3, hidden_id=sessions.hidden_id_for("s"), key=A_KEY
        )
        progress: creations.Progress | None = None
        step = partial(creations.build, creation=creation, fence=store.fence, now=T0)
        for _ in range(2):
            progress = await store._writing.call(partial(step, progress=progress))
            assert progress is not None
            assert await contents(store, now=T0) == {}
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        await reclaim_all(store)
        assert rows_in(path)["sessions"] == rows_in(path)["turns"] == 0
        await store.create_session(session, now=T0, key=A_KEY, added=added)
        assert (await store.get_session("s", now=T0)).message_count == 6
    assert maintenance.check(path) == []
