"""A fork in a file is built hidden and in steps: the promises beyond the contract."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from service.errors import SessionNotFoundError, StoreError, TurnNotFoundError
from service.steps import Steps
from service.storage import search, terms
from service.storage.event_rows import ROW_LENGTH_MAX
from service.storage.records import SessionPatch
from service.storage.sqlite import SqliteStore, documents, forks, open_sqlite_store
from service.storage.sqlite.reclaim import reclaim_some
from tests.storage.rows import T0, a_session, a_turn, at, contents, ended, said

TURNS = 100
NOW = at(1)


@pytest.fixture(autouse=True)
def _in_the_smallest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "STEP_S", 0)


async def _fill(store: SqliteStore) -> None:
    await store.create_session(a_session(), now=T0)
    for n in range(TURNS):
        turn = a_turn(f"t{n}", parent=f"t{n - 1}" if n else None)
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn), runs=said("H", "i"), now=T0)


async def _rows(store: SqliteStore) -> list[int]:
    """How many rows each table has, once there is nothing to reclaim."""

    def count(db: apsw.Connection) -> list[int]:
        while reclaim_some(db):
            pass
        return [db.execute(f"SELECT count(*) FROM {table}").get for table in ("sessions", "turns", "events")]

    return await store._writing.call(count)


async def _plan(store: SqliteStore) -> forks.Fork:
    plan = forks.Plan("s", None, copy_id="copy", fence=store.fence, now=NOW)
    while not plan.is_complete:
        await store._reading.call(plan.read_some)
    return plan.fork


async def test_others_write_between_the_steps_and_see_nothing_before_the_last(path: Path) -> None:
    async with open_sqlite_store(path) as store, open_sqlite_store(path) as other:
        await _fill(store)
        writes = 0
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: store.fork_session("s", at=None, copy_id="copy", now=NOW))
                while await other.count_sessions(status=None, now=NOW) == 1:
                    await other.update_session("s", SessionPatch(title=f"{writes}"), now=T0)
                    writes += 1
        assert writes > 2, "it was never seen half built"
        assert len((await contents(other, now=NOW))["copy"][1]) == TURNS


@pytest.mark.usefixtures("callers_wait")
async def test_the_unfinished_fork_of_a_caller_that_left_is_removed(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await _rows(store)
        for steps in range(1, TURNS, 20):
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    commits = store.writer.commits
                    nursery.start_soon(lambda: store.fork_session("s", at=None, copy_id="copy", now=NOW))
                    while store.writer.commits < commits + steps:
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            assert list(await contents(store, now=NOW)) == ["s"]
            assert await _rows(store) == before


@pytest.mark.usefixtures("callers_wait")
async def test_an_unfinished_fork_that_could_not_be_removed_at_once_is_removed_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: str) -> None:
        raise StoreError("The disk is full.")

    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await _rows(store)
        with monkeypatch.context() as patched, trio.fail_after(60):
            patched.setattr(store, "remove_deleted", refuse)
            async with trio.open_nursery() as nursery:
                commits = store.writer.commits
                nursery.start_soon(lambda: store.fork_session("s", at=None, copy_id="copy", now=NOW))
                while store.writer.commits < commits + 3:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert await _rows(store) != before
        assert await store.recover(now=NOW) == 0
        assert await _rows(store) == before


async def test_the_unfinished_fork_of_a_dead_process_is_removed(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await _rows(store)
        plan = await _plan(store)
        await store._writing.call(lambda db: forks.build(db, plan, None, fence=store.fence, now=NOW))
    async with open_sqlite_store(path) as store:
        assert await _rows(store) != before
        assert await store.recover(now=NOW) == 0
        assert await _rows(store) == before
        assert (await store.fork_session("s", at=None, copy_id="copy", now=NOW)).head is not None


async def test_a_source_that_goes_away_meanwhile_leaves_no_copy(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        plan = await _plan(store)
        progress = await store._writing.call(lambda db: forks.build(db, plan, None, fence=store.fence, now=NOW))
        assert progress is not None

        async def go_on() -> None:
            await store._writing.call(lambda db: forks.build(db, plan, progress, fence=store.fence, now=NOW))

        await store.mark_deleted("s", now=NOW)
        with pytest.raises(SessionNotFoundError):
            await go_on()
        await store.remove_deleted("s")
        with pytest.raises(SessionNotFoundError):
            await go_on()
        await store.create_session(a_session(), now=NOW)  # a new session with the same id is not the source
        with pytest.raises(TurnNotFoundError):
            await go_on()
        assert await contents(store, now=NOW) == {"s": (a_session(), [])}


async def test_a_log_of_many_rows_is_copied_row_by_row(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        texts = [f"{n}" * 500 for n in range(1500)]
        assert sum(map(len, texts)) > 10 * ROW_LENGTH_MAX
        for name, parent in (("a", None), ("b", "a")):
            await store.begin_turn(a_turn(name, parent=parent), now=T0)
            await store.end_turn(ended(a_turn(name, parent=parent), text="".join(texts)), runs=said(*texts), now=T0)
        before = store.writer.steps
        await store.fork_session("s", at=None, copy_id="copy", now=NOW)
        assert store.writer.steps - before > 20
        found = (await contents(store, now=NOW))["copy"][1]
        assert [kept for _, kept in found] == [texts, texts]


async def test_the_terms_of_a_copy_are_cut_between_the_steps_a_few_turns_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "STEP_S", 60)
    monkeypatch.setattr(forks, "_TURNS_AT_ONCE", 10)
    cut_in: set[threading.Thread] = set()
    held: list[int] = []

    def document_terms(texts: Iterable[str]) -> Steps[set[str]]:
        cut_in.add(threading.current_thread())
        return terms.document_terms(texts)

    def build(*args: Any, **more: Any) -> forks.Progress | None:
        held.append(len(more["fork"].terms))
        return build_before(*args, **more)

    build_before = forks.build
    async with open_sqlite_store(path) as store:
        await _fill(store)
        for module in (search, documents):
            monkeypatch.setattr(module, "document_terms", document_terms)
        monkeypatch.setattr(forks, "build", build)
        await store.fork_session("s", at=None, copy_id="copy", now=NOW)
        assert cut_in == {threading.current_thread()}
        assert held == [10] * 10
        found = await store.search_sessions("Hi", limit=9, after=None, status=None, now=NOW)
        assert ([match.session.id for match in found.data], found.partial) == (["copy", "s"], False)
