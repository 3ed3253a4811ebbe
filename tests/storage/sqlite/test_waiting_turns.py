"""Turns that wait for the index: the steps of callers add few terms or none, and the housekeeping adds the others."""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import apsw
import msgspec
import pytest
import trio

from service.errors import TurnNotFoundError
from service.storage import terms
from service.storage.records import Item
from service.storage.sqlite import (
    SqliteStore,
    database,
    documents,
    indexing,
    maintenance,
    open_sqlite_store,
    recovery,
    search,
    writer,
)
from service.storage.sqlite.writer import Writer
from service.storage.terms import TERMS_MAX
from tests.storage.rows import T0, a_session, a_turn, ended, said
from tests.storage.sqlite.test_indexing import index_whole
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_search import add_session, add_turn, found, index_at_once, matches

LENGTH = 256 * 1024 // 3
"""The characters of a long input: each has three bytes."""


def random_text(length: int, seed: int) -> str:
    chosen = random.Random(seed)
    return "".join(chr(chosen.randrange(0x4E00, 0x9FFF)) for _ in range(length))


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], list[int]]]:
    """The terms that each transaction adds: those of callers' steps, and those of the housekeeping."""
    by_callers: list[int] = []
    by_housekeeping: list[int] = []
    counts = by_callers
    transact, housekeep, insert = Writer._transact, Writer.run_housekeeping, documents._insert

    def counting_transact(writer: Writer, call: Callable[[Any], Any]) -> Any:
        counts.append(0)
        return transact(writer, call)

    def counting_housekeep(writer: Writer, *, idle: bool) -> float | None:
        nonlocal counts
        counts = by_housekeeping
        try:
            return housekeep(writer, idle=idle)
        finally:
            counts = by_callers

    def counting_insert(db: Any, number: int, session: int, terms: Collection[str]) -> None:
        counts[-1] += len(terms)
        insert(db, number, session, terms)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_transact", counting_transact)
        patched.setattr(Writer, "run_housekeeping", counting_housekeep)
        patched.setattr(documents, "_insert", counting_insert)
        yield by_callers, by_housekeeping


@contextmanager
def no_housekeeping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as paused:
        paused.setattr(Writer, "run_housekeeping", lambda _, *, idle: None)  # noqa: ARG005
        yield


async def test_no_step_of_a_caller_adds_many_terms(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting(monkeypatch) as (by_callers, by_housekeeping):
        async with open_sqlite_store(path) as store:
            text = random_text(LENGTH, 1000)
            added = [
                an_added_turn(f"n{n}", parent=f"n{n - 1}" if n else None, asked=random_text(1100, n), replied="")
                for n in range(100)
            ]
            with no_housekeeping(monkeypatch):
                await add_session(store, "a")
                await add_turn(store, "a", text, "ended", turn_id="t")
                await store.create_session(a_session(), now=T0)
                await store.add_turns(added, now=T0)
                page = await store.search_sessions("ended", limit=1, after=None, status=None, now=T0)
                assert page.partial
            await add_session(store, "b")  # the writer keeps house after a step
            await index_whole(store)
            assert await found(store, text[:9]) == ["a"]
            for n in (0, 50, 99):
                query = added[n].input[0].text[-9:]
                assert [(it.session.id, it.turn_id) for it in await matches(store, query)] == [("s", f"n{n}")]
            await store.delete_item("s", "n3-in", now=T0)
    assert documents.STEP_TERMS_MAX // 2 < max(by_callers) <= documents.STEP_TERMS_MAX
    assert sum(by_housekeeping) > 200_000
    assert max(by_housekeeping) <= TERMS_MAX
    assert maintenance.check(path) == []


async def test_a_recovery_leaves_long_turns_to_the_housekeeping(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_TURNS_MAX", 1000)
    lengths = (1000, 1000, 1000, 1000, 1000, 1000, LENGTH)
    texts = [random_text(length, n) for n, length in enumerate(lengths)]
    async with open_sqlite_store(path) as store:
        for n, text in enumerate(texts):
            await add_session(store, f"s{n}")
            await store.begin_turn(a_turn(f"t{n}", f"s{n}", texts=[text]), now=T0)
    with counting(monkeypatch) as (by_callers, _):
        async with open_sqlite_store(path) as store:
            assert await store.recover(now=T0) == len(texts)
            await index_whole(store)
            for n, text in enumerate(texts):
                assert await found(store, text[:9]) == [f"s{n}"]
    assert 1000 < max(by_callers) <= documents.STEP_TERMS_MAX
    assert maintenance.check(path) == []


async def test_pages_are_partial_while_a_long_turn_waits_and_a_process_that_dies_leaves_it_to_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LOOKED_AT_BYTES_MAX", 300)
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            for name in ("a", "b"):
                await add_session(store, name)
            waiting = await add_turn(store, "a", f"word one two three {'x' * 300}")
            await add_turn(store, "b", "word")
            page = await store.search_sessions("word", limit=9, after=None, status=None, now=T0)
            assert ([it.session.id for it in page.data], page.partial) == (["b"], True)
            assert maintenance.check(path) == [], "a turn that waits is not lost"
            copy = await store.fork_session("a", at=waiting, copy_id="copy", now=T0)
    async with open_sqlite_store(path) as store:
        await index_whole(store)
        assert [(it.session.id, it.turn_id) for it in await matches(store, "one three")] == [
            ("copy", copy.head),
            ("a", waiting),
        ]
        assert await found(store, "word") == ["copy", "b", "a"]
    assert maintenance.check(path) == []


async def test_what_is_deleted_while_it_waits_is_never_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "STEP_TERMS_MAX", 3)
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            for name in ("a", "b", "c", "d"):
                await add_session(store, name)
                turn = a_turn(f"t{name}", name, texts=["secret one two three", "word"])
                await store.begin_turn(turn, now=T0)
                await store.end_turn(ended(turn, text="four five six"), runs=said("four five six"), now=T0)
            await store.delete_turns("a", "ta", now=T0)
            await store.delete_item("b", a_turn("tb", "b", texts=["x", "y"]).input[0].id, now=T0)
            await store.mark_deleted("c", now=T0)
            await store.remove_deleted("c")
    async with open_sqlite_store(path) as store:
        await index_whole(store)
        assert await found(store, "secret") == ["d"]
        assert await found(store, "word five") == ["d", "b"]
        with trio.fail_after(60):
            while store.writer.removed:  # noqa: ASYNC110  no event tells the end
                await trio.sleep(0.001)
        [item, *_] = (await store.get_turn("b", "tb", now=T0)).input
        await store.delete_item("b", item.id, now=T0)
        assert await found(store, "word") == ["d"], "few terms are left, and they do not wait"
        with pytest.raises(TurnNotFoundError):
            await store.get_turn("a", "ta", now=T0)
    assert maintenance.check(path) == []


async def test_a_text_that_is_deleted_while_its_terms_are_cut_is_not_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "STEP_TERMS_MAX", 3)
    monkeypatch.setattr(indexing, "LONG_BYTES", 0)
    monkeypatch.setattr(indexing, "STEP_S", 0)
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            turn = a_turn("t", "a", texts=["secret", "word one two three"])
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn, text="end"), runs=said("end"), now=T0)
            work = indexing.Indexing()
            db = database.connect(path)

            def transact(step: Callable[[Any], Any]) -> Any:
                with database.transaction(db):
                    return step(db)

            try:
                work.run_step(transact)
                await store.delete_item("a", turn.input[0].id, now=T0)
                steps = 0
                while not work.is_done(db):
                    work.run_step(transact)
                    steps += 1
            finally:
                db.close()
            assert steps == 6, "the cutting of the old texts ends, and begins anew with those that are left"
            assert await found(store, "secret") == []
            assert await found(store, "word one end") == ["a"]


async def test_an_owner_is_not_told_of_the_turns_of_others_that_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LOOKED_AT_BYTES_MAX", 0)

    async def is_partial(store: SqliteStore, owner: str | None) -> bool:
        page = await store.search_sessions("word", limit=9, after=None, status=None, now=T0, owner=owner)
        return page.partial

    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "alice/a")
            await add_turn(store, "alice/a", "word one two three")
            assert [await is_partial(store, owner) for owner in ("alice", None, "bob", "")] == [
                True,
                True,
                False,
                False,
            ]


async def waiting_in(store: SqliteStore) -> int:
    query = "SELECT count(*) FROM unindexed WHERE kind = 'document'"
    return await store._writing.call(lambda db: db.execute(query).get)


async def test_searches_look_into_turns_that_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [f"word{n}" for n in range(100)]
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            for name in ("a", "b", "ann/c"):
                await add_session(store, name, "title")
            for round_ in range(3):
                for name in ("a", "b", "ann/c"):
                    await add_turn(store, name, f"Stra\u00dfe \u65e5\u672c\u8a9e {round_}", " ".join(many))
                if round_ == 0:
                    await store._writing.call(index_at_once)
            assert await waiting_in(store) == 6
            for query in ("strasse", "\uff53\uff54rasse \u65e5\u672c", " ".join(reversed(many)), "\u8a9e 2"):
                assert await found(store, query, limit=1) == ["ann/c", "b", "a"]
            assert await found(store, "strasse 0") == ["ann/c", "b", "a"], "these are in the index"
            assert await found(store, "strasse title") == await found(store, "strass") == []
            page = await store.search_sessions("word99", limit=9, after=None, status=None, now=T0, owner="ann")
            assert ([it.session.id for it in page.data], page.next, page.partial) == (["ann/c"], None, False)
            page = await store.search_sessions("word99 1", limit=9, after=None, status=None, now=T0, owner="bob")
            assert (page.data, page.next, page.partial) == ((), None, False)
            assert maintenance.check(path) == []


async def test_a_search_goes_on_page_by_page_while_turns_wait_and_are_indexed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            names = [f"s{n}" for n in range(6)]
            for name in names:
                await add_session(store, name)
                for _ in range(3):
                    await add_turn(store, name, "word")
            data: list[str] = []
            after = None
            for _ in names:
                page = await store.search_sessions("word", limit=1, after=after, status=None, now=T0)
                data += [it.session.id for it in page.data]
                after = page.next
                await store._writing.call(index_at_once)
                await add_turn(store, data[0], "word")
                await add_turn(store, data[-1], "word")
            assert (data, after) == (names[::-1], None)


async def test_few_turns_are_indexed_together_after_some_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_INDEX_AFTER_S", 0.1)
    with counting(monkeypatch) as (by_callers, by_housekeeping):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            for n in range(5):
                await add_turn(store, "a", f"word {n}", "a reply")
            await index_whole(store)
            assert await waiting_in(store) == 0
            assert await found(store, "word 3 reply") == ["a"]
    assert sum(by_callers) == 0
    assert sum(by_housekeeping) == 5 * len({"word", "n", "a", "reply"})


async def test_many_turns_are_indexed_at_once_and_no_search_looks_into_more(path: Path) -> None:
    now = 1000.0
    async with open_sqlite_store(path, monotonic=lambda: now) as store:
        await add_session(store, "a")
        await index_whole(store)
        turns = documents.WAITING_MAX + 1
        for n in range(turns):
            await add_turn(store, "a", f"word{n}")
            if n == turns - 3:
                assert await waiting_in(store) == turns - 2, "it is not time yet"
        with trio.fail_after(60):
            while await waiting_in(store) > 1:  # noqa: ASYNC110  no event tells the end
                await trio.sleep(0.001)
        assert [await found(store, f"word{n}") for n in (0, turns - 1)] == [["a"], ["a"]]


async def test_another_process_finds_and_indexes_the_turns_of_one_that_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(path) as other:
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            await add_turn(store, "a", "word")
            assert await found(other, "word") == ["a"]
        monkeypatch.setattr(writer, "_INDEX_AFTER_S", 0)
        assert await found(other, "word") == ["a"]
        await add_session(other, "b", "word")
        await index_whole(other)
        assert await waiting_in(other) == 0
        assert await found(other, "word") == ["b", "a"]


async def test_short_turns_do_not_wait_for_a_long_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "STEP_S", 0)
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            await add_turn(store, "a", random_text(LENGTH, 1), turn_id="long")
            work = indexing.Indexing()
            with closing(database.connect(path)) as db:

                def transact(step: Callable[[Any], Any]) -> Any:
                    with database.transaction(db):
                        return step(db)

                for n in range(3):
                    await add_turn(store, "a", f"word{n}")
                    assert await waiting_in(store) == 2
                    work.run_step(transact)
                    assert await waiting_in(store) == 1
                while not work.is_done(db):
                    work.run_step(transact)
            assert await found(store, random_text(LENGTH, 1)[:9]) == ["a"]


SLOW = "\ufdfa " * 2000
"""A short text whose terms take tens of milliseconds."""


@contextmanager
def cutting(monkeypatch: pytest.MonkeyPatch, work: indexing.Indexing, db: Any) -> Iterator[Callable[[], int]]:
    """Gives what does one step, and returns how many parts of texts its longest transaction cuts."""
    cut = terms.terms_of
    done = longest = 0

    def counting_cut(chunk: str) -> set[str]:
        nonlocal done
        done += 1
        return cut(chunk)

    def transact(step: Callable[[Any], Any]) -> Any:
        nonlocal done, longest
        with database.transaction(db):
            done = 0
            result = step(db)
            longest = max(longest, done)
            return result

    def run_step() -> int:
        nonlocal longest
        longest = 0
        work.run_step(transact)
        return longest

    with monkeypatch.context() as patched:
        patched.setattr(terms, "terms_of", counting_cut)
        patched.setattr(indexing, "STEP_S", 0)
        yield run_step


@pytest.mark.parametrize("is_old", [False, True], ids=["waiting", "of an earlier version"])
async def test_no_transaction_of_the_housekeeping_cuts_on_once_its_time_is_over(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_old: bool,
) -> None:
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            for n in range(3):
                await add_turn(store, "a", f"word{n} {SLOW}", "a reply")
            with closing(database.connect(path)) as db:
                if is_old:
                    make_old(db)
                work = indexing.Indexing()
                with cutting(monkeypatch, work, db) as run_step:
                    while not work.is_done(db):
                        assert run_step() <= 1
            assert [await found(store, f"word{n} reply") for n in range(3)] == [["a"]] * 3
    assert maintenance.check(path) == []


def run_all(work: indexing.Indexing, db: Any, run_step: Callable[[], int]) -> None:
    while not work.is_done(db):
        run_step()


def make_old(db: Any) -> None:
    """Leave all turns to the indexing of an earlier version."""
    db.execute("DELETE FROM documents WHERE turn IS NOT NULL")
    db.execute("DELETE FROM unindexed")
    db.execute("INSERT INTO unindexed (kind, key) SELECT 'turns', max(key) FROM turns")


async def test_a_turn_whose_transaction_failed_is_cut_and_added_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            await add_turn(store, "a", f"word {SLOW}")
            with closing(database.connect(path)) as db:
                work = indexing.Indexing()
                with cutting(monkeypatch, work, db) as run_step, monkeypatch.context() as failing:
                    failing.setattr(indexing, "_index_long", Mock(side_effect=apsw.BusyError))
                    with pytest.raises(apsw.BusyError):
                        run_all(work, db, run_step)
                    failing.undo()
                    run_all(work, db, run_step)
            assert await found(store, "word") == ["a"]


async def test_rows_of_an_earlier_version_are_indexed_while_turns_keep_ending(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            for n in range(5):
                await add_turn(store, "a", f"old{n}")
            with closing(database.connect(path)) as db:
                make_old(db)
                work = indexing.Indexing()

                def transact(step: Callable[[Any], Any]) -> Any:
                    with database.transaction(db):
                        return step(db)

                monkeypatch.setattr(indexing, "STEP_S", 60)  # all that waits, on a machine that stands still as well
                await add_turn(store, "a", "first")
                work.run_step(transact, takes_old=False)
                assert work.count_waiting(db, at_most=9) == 0
                assert not work.is_done(db), "another process takes the old rows"
                for n in range(3):
                    await add_turn(store, "a", f"new{n}")
                    work.run_step(transact)
                assert work.is_done(db)
            for word in ("first", "old0", "old4", "new0", "new2"):
                assert await found(store, word) == ["a"]


@pytest.mark.parametrize(
    ("asked", "reasoning"),
    [
        (["word"], Item(id="r", type="reasoning", role="assistant", text="", encrypted="x" * 140_000)),
        (["word"], Item(id="r", type="reasoning", role="assistant", text="", upstream="\x01" * 30_000)),
        (["word", *["x"] * 3000], None),
    ],
    ids=["encrypted reasoning", "escaped characters", "many items"],
)
async def test_a_turn_of_few_words_is_found_with_its_end_however_long_its_row_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], reasoning: Item | None
) -> None:
    with no_housekeeping(monkeypatch):
        async with open_sqlite_store(path) as store:
            await add_session(store, "a")
            turn = a_turn("t", "a", texts=asked)
            await store.begin_turn(turn, now=T0)
            end = ended(turn, text="end")
            if reasoning is not None:
                end = msgspec.structs.replace(end, output=(reasoning, *end.output))
            await store.end_turn(end, runs=said("end", item=len(end.output) - 1), now=T0)
            page = await store.search_sessions("word end", limit=9, after=None, status=None, now=T0)
            assert ([it.session.id for it in page.data], page.partial) == (["a"], False)
            size = "SELECT octet_length(input) + octet_length(output) FROM turns"
            assert await store._looking.call(lambda db: db.execute(size).get) > documents.LOOKED_AT_BYTES_MAX
