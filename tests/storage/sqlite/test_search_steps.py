"""Searches and listings by metadata work in short steps: between two of them no snapshot of the file is held."""

import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import apsw
import msgspec
import pytest
import trio

from service.steps import Steps, WorkTime, at_once
from service.storage import search as any_search
from service.storage import terms
from service.storage.records import Match, Page, SessionPatch
from service.storage.sqlite import SqliteStore, database, metadata, open_sqlite_store, search, sessions
from service.storage.terms import query_terms
from tests.storage.memory.test_memory_store import HELLO
from tests.storage.rows import T0, a_session, a_turn, ended, said
from tests.storage.sqlite.many_documents import fill
from tests.storage.sqlite.test_waiting_turns import no_housekeeping
from tests.storage.test_store_search import add_session, add_turn, found, index_at_once

PAIRS = {"team": "blue"}
STEPS_MAX = 500


def a_search(query: str) -> search.Search:
    return search.Search(msgspec.structs.replace(HELLO, terms=at_once(query_terms(query))))


def a_listing() -> metadata.Listing:
    return sessions.listing_by_metadata(PAIRS, limit=9, after=None, status=None, now=T0, owner=None, bytes_max=None)


async def run_steps(store: SqliteStore, work: search.Search | metadata.Listing, *, steps: int = STEPS_MAX) -> int:
    """Do at most so many steps. Returns how many were done."""
    for done in range(steps):
        if work.page is not None:
            return done
        await store._searching.call(work.read_some)
    assert steps < STEPS_MAX, "the work has no end"
    return steps


@pytest.fixture
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (search, metadata):
        monkeypatch.setattr(module, "STEP_S", 0)


@pytest.mark.usefixtures("_short_steps")
@pytest.mark.parametrize("kind", ["a word", "two words", "a thousand words", "metadata"])
async def test_the_log_restarts_between_any_two_steps(path: Path, kind: str) -> None:
    many = " ".join(f"w{n}" for n in range(1000))
    words = {"a word": "one", "two words": "two one", "a thousand words": f"{many} one"}
    async with open_sqlite_store(path) as store:
        for n in range(20):
            await add_session(store, f"s{n}", f"one two {n}", **PAIRS)
        for n in range(3):
            await add_turn(store, f"s{n}", f"one {many}")
        work = a_listing() if kind == "metadata" else a_search(words[kind])
        steps = 0
        with closing(database.connect(path)) as db:
            while await run_steps(store, work, steps=1):
                steps += 1
                await store.update_session("s0", SessionPatch(metadata={"n": f"{steps}"}), now=T0)
                db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)  # raises BusyError if a reader does not let go
        assert steps >= (3 if kind == "a thousand words" else 9)
        assert work.page is not None
        assert len(work.page.data) == (3 if kind == "a thousand words" else 9)


Change = Callable[[SqliteStore], Awaitable[object]]
Shown = list[tuple[str | None, str | None]]


async def remove_b(store: SqliteStore) -> None:
    await store.mark_deleted("b", now=T0)
    await store.remove_deleted("b")


async def mark_b(store: SqliteStore) -> None:
    await store.mark_deleted("b", now=T0)


async def make_b_anew(store: SqliteStore) -> None:
    await remove_b(store)
    with trio.fail_after(60):
        while store.writer.removed:  # noqa: ASYNC110  no event tells the end
            await trio.sleep(0.001)
    await store.create_session(msgspec.structs.replace(a_session("b"), title="Anew"), now=T0)


async def delete_the_turn_of_b(store: SqliteStore) -> None:
    await store.delete_turns("b", "of_b", now=T0)


async def delete_the_word_of_b(store: SqliteStore) -> None:
    await store.delete_item("b", "of_b-in-1", now=T0)


@pytest.mark.usefixtures("_short_steps")
@pytest.mark.parametrize("change", [remove_b, mark_b, make_b_anew, delete_the_turn_of_b, delete_the_word_of_b])
async def test_a_search_shows_no_document_that_goes_between_two_of_its_steps(path: Path, change: Change) -> None:
    shown: list[Shown] = []
    is_done = False
    while not is_done:
        async with open_sqlite_store(path.with_name(f"{len(shown)}.db")) as store:
            for name in ("a", "b", "c"):
                await store.create_session(a_session(name), now=T0)
                turn = a_turn(f"of_{name}", name, texts=["x " * 8000, "hello"])
                await store.begin_turn(turn, now=T0)
                await store.end_turn(ended(turn, text="end"), runs=said("end"), now=T0)
            await store._writing.call(index_at_once)
            work = a_search("hello")
            is_done = await run_steps(store, work, steps=len(shown)) < len(shown)
            if not is_done:
                await change(store)
                await run_steps(store, work)
                assert work.page is not None
                shown.append([(match.turn_id, match.session.title) for match in work.page.data])
    without_b: Shown = [("of_c", None), ("of_a", None)]
    with_b: Shown = [("of_c", None), ("of_b", None), ("of_a", None)]
    assert shown == [without_b] * shown.count(without_b) + [with_b] * shown.count(with_b)
    assert shown.count(without_b) >= 8, "b was gone while its snippet was made"
    assert shown.count(with_b) >= 3


WIDE = "\u65e5\u672c\u8a9e " * 1000
"""A text that searches look into while it waits, in several parts."""


async def add_waiting(store: SqliteStore, session: str, *texts: str) -> None:
    await store.create_session(a_session(session), now=T0)
    turn = a_turn(f"of_{session}", session, texts=texts)
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, text="end"), runs=said("end"), now=T0)


@pytest.mark.usefixtures("_short_steps")
@pytest.mark.parametrize("query", ["hello end", "hello missing"])
async def test_a_step_looks_into_one_part_of_a_turn_that_waits(
    path: Path, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    cuts = 0
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_waiting(store, "a", WIDE, "hello")
            await add_waiting(store, "b", "hello", WIDE)
            without_case = terms._without_case

            def counting(chunk: str) -> str:
                nonlocal cuts
                cuts += 1
                return without_case(chunk)

            monkeypatch.setattr(terms, "_without_case", counting)
            work, longest, looked = a_search(query), 0, 0
            while await run_steps(store, work, steps=1):
                longest, looked, cuts = max(longest, cuts), looked + cuts, 0
    assert work.page is not None
    assert [it.session.id for it in work.page.data] == (["b", "a"] if query == "hello end" else [])
    assert longest == 1
    assert looked > 5


@pytest.mark.parametrize("change", [remove_b, delete_the_word_of_b])
async def test_a_search_shows_no_turn_that_waits_and_goes_while_a_search_looks_into_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    shown: list[list[str]] = []
    is_done = False
    with no_housekeeping(monkeypatch):
        while not is_done:
            async with open_sqlite_store(path.with_name(f"{len(shown)}.db")) as store:
                for name in ("a", "b", "c"):
                    await add_waiting(store, name, WIDE[:1200], "hello")
                monkeypatch.setattr(search, "STEP_S", 0)
                work = a_search("hello")
                is_done = await run_steps(store, work, steps=len(shown)) < len(shown)
                if not is_done:
                    await change(store)
                    monkeypatch.setattr(search, "STEP_S", 60)  # the step that finds the turn shows it, too
                    await run_steps(store, work)
                    assert work.page is not None
                    shown.append([it.session.id for it in work.page.data])
    without_b, with_b = shown.count(["c", "a"]), shown.count(["c", "b", "a"])
    assert shown == [["c", "a"]] * without_b + [["c", "b", "a"]] * with_b
    assert without_b >= 8
    assert with_b >= 3


async def test_a_page_whose_time_is_over_within_a_turn_that_waits_still_gets_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_search, "SEARCH_S", 0)
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            for name in ("a", "b", "c"):
                await add_waiting(store, name, WIDE, "hello" if name != "b" else "no word")
            data: list[str] = []
            pages, after = 0, None
            while pages == 0 or after is not None:
                page = await store.search_sessions("hello", limit=9, after=after, status=None, now=T0)
                data += [it.session.id for it in page.data]
                pages, after = pages + 1, page.next
                assert pages < 20
            assert data == ["c", "a"]


@pytest.mark.usefixtures("_short_steps")
async def test_documents_that_change_between_the_steps_are_neither_lost_nor_shown_twice(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        names = [f"s{n}" for n in range(8)]
        for name in names:
            await add_session(store, name, "one two")
        work = a_search("one two")
        done = 0
        while await run_steps(store, work, steps=1):
            await store.update_session(f"s{done % 3}", SessionPatch(title=f"one two {done}"), now=T0)
            await add_session(store, f"new{done}", "one two")
            done += 1
        assert work.page is not None
        shown = [match.session.id for match in work.page.data]
        assert len(shown) == len(set(shown))
        assert set(names[3:]) <= set(shown) <= set(names)
        assert set(await found(store, "one two")) == {*names, *(f"new{n}" for n in range(done))}


@pytest.mark.usefixtures("_short_steps")
async def test_documents_that_are_indexed_between_the_steps_are_neither_lost_nor_shown_twice(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        names = [f"s{n}" for n in range(9)]
        for name in names:
            await add_session(store, name)
        for n in range(18):
            await add_turn(store, names[n % 9], "one two", f"reply {n}")
        work = a_search("one two")
        shown = 0
        while await run_steps(store, work, steps=1):
            shown += 1
            if shown % 4 == 0:
                await store._writing.call(index_at_once)
            await add_turn(store, names[shown % 9], "one two")
        assert work.page is not None
        assert [match.session.id for match in work.page.data] == names[::-1]


async def test_a_search_does_not_count_its_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.steps.time.monotonic", lambda: now)
    monkeypatch.setattr(any_search, "SEARCH_S", 0.25)
    monkeypatch.setattr(search, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        for n in range(5):
            await add_session(store, f"s{n}", "word")
        work = a_search("word")
        while await run_steps(store, work, steps=1):
            now += 10 * any_search.SEARCH_S
        assert work.page is not None
        assert (len(work.page.data), work.page.partial) == (5, False)


def test_the_time_of_work_in_steps_is_that_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.steps.time.monotonic", lambda: now)
    work = WorkTime()
    seen: list[float] = []

    def steps() -> Steps[str]:
        nonlocal now
        for _ in range(3):
            now += 1
            seen.append(work.elapsed_s)
            yield
        return "done"

    counted = work.of(steps())
    for _ in counted:
        now += 100
    assert seen == [1, 2, 3]


async def test_the_pages_of_a_search_beside_others_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many searches take turns, and none of them is partial because of the others. By a clock on which each look takes
    a millisecond, so that a busy machine changes nothing."""
    looks = count()
    clock = SimpleNamespace(monotonic=lambda: next(looks) / 1000, perf_counter=time.perf_counter)
    monkeypatch.setattr("service.steps.time", clock)
    monkeypatch.setattr(any_search, "SEARCH_S", 1)
    pages: list[Page[Match]] = []
    async with open_sqlite_store(path) as store:
        await store._writing.call(lambda db: fill(db, 1, 40))

        async def look() -> None:
            pages.append(await store.search_sessions("every even", limit=50, after=None, status=None, now=T0))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(look)
    assert [len(page.data) for page in pages] == [40] * 20
    assert next(looks) > 2000, "all searches together take longer than one of them may"
