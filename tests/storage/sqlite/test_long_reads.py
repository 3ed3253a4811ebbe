"""Long reads do not hold up short ones, and a reader holds one result."""

import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from service.errors import SessionNotFoundError
from service.storage.records import LeftOut, TurnRecord
from service.storage.rules import TURN_BYTES
from service.storage.sql_thread import SqlThread
from service.storage.sqlite import SqliteStore, forks, open_sqlite_store, turns
from service.storage.sqlite.reader import _SNAPSHOT_S
from tests.storage.rows import T0, a_session, a_turn, ended, said

TURNS = 60


async def _fill(store: SqliteStore) -> list[str]:
    """A path with jumps: each seventh turn has a sibling that was accepted before it."""
    await store.create_session(a_session(), now=T0)
    path: list[str] = []
    for n in range(TURNS):
        parent = path[-1] if path else None
        for name in (f"beside{n}", f"t{n}") if n % 7 == 3 else (f"t{n}",):
            turn = a_turn(name, parent=parent, texts=["x" * (n % 5)])
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn), runs=(), now=T0)
        path.append(f"t{n}")
    return path


@pytest.mark.parametrize("step_s", [0, 60])
async def test_a_path_is_the_same_in_one_step_and_in_many(
    path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    monkeypatch.setattr(turns, "STEP_S", step_s)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        whole = await store.read_path("s", names[-1], bytes_max=None)
        assert [turn.id for turn in whole] == names
        for bytes_max in (0, 1, 300, 1000, 5000):
            newest = await store.read_path("s", names[-1], bytes_max=bytes_max)
            assert newest == whole[len(whole) - len(newest) :]
            left = whole[: len(whole) - len(newest)]
            size = sum(turn.message_bytes + TURN_BYTES for turn in newest)
            assert len(newest) == 1 or size <= bytes_max
            assert not left or size + left[-1].message_bytes + TURN_BYTES > bytes_max
        assert await store.read_path("s", names[0], bytes_max=0) == whole[:1]
        assert await store.read_path("s", "nowhere", bytes_max=0) == []
        assert await store.read_path("nowhere", names[0], bytes_max=0) == []


async def test_an_acceptance_leaves_a_path_that_takes_long_to_the_threads_that_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(path) as store:
        await store.begin_turn(a_turn("t"), now=T0, creates=a_session())
        for name, seconds, is_read in (("a", 60, True), ("b", -1, False)):
            monkeypatch.setattr(turns, "SHORT_PATH_S", seconds)
            begun = await store.begin_turn(a_turn(name, parent="t"), now=T0, path_bytes_max=None)
            assert (begun.path is not None) == is_read


@pytest.mark.parametrize("has_events", [True, False], ids=["in pages", "in its row"])
async def test_an_acceptance_decodes_no_long_turn(
    path: Path, monkeypatch: pytest.MonkeyPatch, has_events: bool
) -> None:
    monkeypatch.setattr(turns, "SHORT_PATH_S", 60)
    reasoning = "x" * turns.SHORT_PATH_ROW_LENGTH
    runs = said(reasoning) if has_events else ()
    async with open_sqlite_store(path) as store:
        await store.begin_turn(a_turn("t"), now=T0, creates=a_session())
        await store.end_turn(ended(a_turn("t"), text="", reasoning=reasoning), runs=runs, now=T0)
        assert (await store.begin_turn(a_turn("a", parent="t"), now=T0, path_bytes_max=None)).path is None
        assert len(await store.read_path("s", "a", bytes_max=None)) == 2


@pytest.mark.parametrize("step_s", [0, 60])
async def test_a_path_is_measured_listed_and_forked_the_same_in_one_step_and_in_many(
    path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    monkeypatch.setattr(turns, "STEP_S", step_s)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        whole = await store.read_path("s", names[-1], bytes_max=None)
        measured = await store.measure_path("s", names[-1])
        assert measured == sum((turn.in_prompts for turn in whole), LeftOut())
        for first in (None, *names[::11], names[-1]):
            start = names.index(first) if first else 0
            assert await store.list_path("s", names[-1], limit=7, first=first) == whole[start : start + 7]
        assert await store.list_path("s", names[-1], limit=7, first="nowhere") == []
        assert await store.list_path("s", names[-1], limit=7, first=None, bytes_max=1) == whole[:2]
        copy = await store.fork_session("s", at=names[-1], copy_id="copy", now=T0)
        assert copy.head is not None
        copied = await store.read_path("copy", copy.head, bytes_max=None)
        assert [turn.input_text for turn in copied] == [turn.input_text for turn in whole]


@pytest.mark.parametrize("step_s", [0, 60])
async def test_a_path_that_a_broken_file_makes_a_circle_has_an_end(
    path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    monkeypatch.setattr(turns, "STEP_S", step_s)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        await store._writing.call(
            lambda db: db.execute("UPDATE turns SET parent = ? WHERE id = ?", (names[-1], names[0]))
        )
        with trio.fail_after(60):
            assert len(await store.read_path("s", names[-1], bytes_max=None)) == TURNS


async def test_short_reads_are_answered_while_a_path_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        found: list[TurnRecord] = []
        looks = pages = 0
        call = store._reading.call

        async def call_in_turn(step: Callable[[apsw.Connection], Any]) -> Any:
            """After a step of the path wait for another read: a busy machine may run all steps before that one."""
            result, before = await call(step), pages
            while isinstance(getattr(step, "__self__", None), turns.PathRead) and pages == before:  # noqa: ASYNC110
                await trio.sleep(0.001)
            return result

        async def read() -> None:
            found.extend(await store.read_path("s", names[-1], bytes_max=10**6))

        monkeypatch.setattr(store._reading, "call", call_in_turn)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                while not found:
                    await store.get_session("s", now=T0)
                    looks += 1
                    await store.list_turns("s", limit=2, after=None, now=T0)
                    pages += 1
        assert [turn.id for turn in found] == names
        assert min(looks, pages) > 5


@pytest.mark.parametrize("name", ["measure_path", "list_path", "fork_session"])
async def test_long_reads_are_answered_in_turn_with_other_reads_of_their_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        reads: dict[str, Callable[[], Awaitable[object]]] = {
            "measure_path": lambda: store.measure_path("s", names[-1]),
            "list_path": lambda: store.list_path("s", names[-1], limit=7, first=None),
            "fork_session": lambda: store.fork_session("s", at=names[-1], copy_id="copy", now=T0),
        }
        is_done = False
        pages = 0

        async def read() -> None:
            nonlocal is_done
            await reads[name]()
            is_done = True

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                while not is_done:
                    await store.list_turns("s", limit=2, after=None, now=T0)
                    pages += 1
        assert pages > TURNS / 2


async def test_a_path_of_a_session_that_is_removed_meanwhile_is_empty(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another session has taken the id, and turns of the same ids."""
    monkeypatch.setattr(turns, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        reads = [turns.PathRead("s", names[-1], None) for _ in range(2)]
        for read in reads:
            await store._reading.call(read.read_some)
            assert (len(read.turns), read.is_complete) == (1, False)
        await store.mark_deleted("s", now=T0)
        await store._reading.call(reads[0].read_some)
        assert (len(reads[0].turns), reads[0].is_complete) == (2, False), "a turn runs on while its session is deleted"
        await store.remove_deleted("s")
        await store._reading.call(reads[0].read_some)
        assert (reads[0].turns, reads[0].is_complete) == ([], True)
        await store.create_session(a_session(), now=T0)
        await store._reading.call(reads[1].read_some)
        assert (reads[1].turns, reads[1].is_complete) == ([], True)


async def test_a_session_that_is_removed_while_its_path_is_measured_listed_or_forked_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another session has taken the id, and turns of the same ids."""
    monkeypatch.setattr(turns, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        names = await _fill(store)
        measure = turns.PathMeasure("s", names[-1])
        page = turns.PathPage("s", names[-1], limit=7, first=None, bytes_max=None)
        plan = forks.Plan("s", names[-1], copy_id="copy", fence=store.fence, now=T0)
        walks: list[turns.PathWalk] = [measure, page, plan]
        for walk in walks:
            await store._reading.call(walk.read_some)
            assert not walk.is_complete
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        await store.create_session(a_session(created=1), now=T0)
        for walk in (measure, page):
            await store._reading.call(walk.read_some)
            assert walk.is_complete
        assert (measure.measured, page.turns) == (LeftOut(), [])
        with pytest.raises(SessionNotFoundError):
            await store._reading.call(plan.read_some)


class Result:
    """A result to which there can be weak references."""


@pytest.mark.parametrize("reader", ["_looking", "_reading"])
async def test_a_reader_hands_a_long_result_over_before_it_reads_the_next_and_keeps_nothing(
    path: Path, reader: str
) -> None:
    taken = threading.Event()
    results: list[weakref.ref[Result]] = []

    def read_long(_: object) -> Result:
        time.sleep(2 * _SNAPSHOT_S)
        return Result()

    def look(_: object) -> bool:
        assert taken.wait(10), "this step began before the first result was taken"
        gc.collect()
        return results[0]() is None

    async with open_sqlite_store(path) as store:
        thread: SqlThread[apsw.Connection] = getattr(store, reader)

        async def first() -> None:
            result = await thread.call(read_long)
            results.append(weakref.ref(result))
            del result
            taken.set()

        async def second() -> None:
            assert await thread.call(look), "the thread holds the result on"

        submitted = threading.Event()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(thread.call, lambda _: submitted.wait(10))
                for call in (first, second):
                    await wait_all_tasks_blocked()
                    nursery.start_soon(call)
                await wait_all_tasks_blocked()
                submitted.set()
