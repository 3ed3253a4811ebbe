"""The promises of the memory store beyond the contract."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import assert_checkpoints

from service.errors import SessionExistsError, SessionLimitError, SessionNotFoundError
from service.steps import Steps, at_once
from service.storage import rules
from service.storage.memory import MemoryStore, deletions, open_memory_store
from service.storage.memory.documents import NOTED_MAX, Document, MemoryDocuments
from service.storage.memory.search import MemoryIndex
from service.storage.pieces import Run, unpack
from service.storage.records import EndResult, LeftOut, Match, Page, SessionPatch, SessionRecord, SessionStatus
from service.storage.search import SearchQuery, search_page
from service.storage.search_cursor import SearchCursors
from service.storage.store import PAGE_LENGTH_MAX
from service.store_capabilities import MEMORY
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, at, ended, said

STATUSES: tuple[SessionStatus | None, ...] = (None, "idle", "running")
METHODS: list[Callable[[MemoryStore], Awaitable[object]]] = [
    lambda store: store.create_session(a_session("new"), now=T0),
    lambda store: store.get_session("s", now=T0),
    lambda store: store.list_sessions(limit=1, after=None, status=None, now=T0),
    lambda store: store.count_sessions(status=None, now=T0),
    lambda store: store.search_sessions("hello", limit=1, after=None, status=None, now=T0),
    lambda store: store.update_session("s", SessionPatch(), now=T0),
    lambda store: store.mark_deleted("s", now=T0),
    lambda store: store.remove_deleted("s"),
    lambda store: store.delete_expired(now=T0, limit=1),
    lambda store: store.begin_turn(a_turn("new"), now=T0),
    lambda store: store.start_turn("t", now=T0),
    lambda store: store.get_turn("s", "t", now=T0),
    lambda store: store.list_turns("s", limit=1, after=None, now=T0),
    lambda store: store.read_path("s", "t", bytes_max=None),
    lambda store: store.measure_path("s", "t"),
    lambda store: store.list_path("s", "t", limit=1, first=None),
    lambda store: store.read_events("s", "t"),
    lambda store: store.recover(now=T0),
    lambda store: store.aclose(),
]


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_but_one_is_a_checkpoint(method: Callable[[MemoryStore], Awaitable[object]]) -> None:
    async with open_memory_store() as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        with assert_checkpoints():
            await method(store)


async def test_other_tasks_run_while_a_long_path_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.steps.STEP_S", 0)
    async with open_memory_store() as store:
        await store.create_session(a_session(), now=T0)
        for n in range(45):
            await store.begin_turn(a_turn(f"t{n}", parent=f"t{n - 1}" if n else None), now=T0)
        steps = 0

        async def count_steps() -> None:
            nonlocal steps
            while True:
                await trio.lowlevel.checkpoint()
                steps += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_steps)
            measured = await store.measure_path("s", "t44")
            nursery.cancel_scope.cancel()
        assert measured == LeftOut(45, 45 * len("Hello"))
        assert steps >= 4


@pytest.mark.parametrize("at_once", [1, 7, 1000])
async def test_a_listing_looks_at_a_few_sessions_in_each_step_and_misses_none_that_stays(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("service.steps.STEP_S", 0)
    monkeypatch.setattr("service.storage.memory.store._LISTED_AT_ONCE", at_once)
    async with open_memory_store() as store:
        for n in range(100):
            lives = n % 10 == 3
            session = a_session(f"s{n}", created=n / 100, idle_timeout_s=1000 if lives else 10)
            await store.create_session(session, now=T0)
        listed: list[str] = []

        async def remove_expired() -> None:
            while True:
                await store.delete_expired(now=at(100), limit=1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove_expired)
            after = None
            while True:
                page = await store.list_sessions(limit=3, after=after, status="idle", now=at(100))
                listed += [session.id for session in page.data]
                after = page.next
                if after is None:
                    break
            nursery.cancel_scope.cancel()
        assert listed == [f"s{n}" for n in range(93, 0, -10)]


async def test_a_page_of_events_costs_the_page_and_not_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_memory_store() as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        texts = [f"{number:04d}" for number in range(10_000)] * 10
        await store.end_turn(ended(a_turn(), text="".join(texts)), runs=said(*texts), now=T0)
        unpacked: list[bytes] = []

        def note(packed: bytes) -> list[Run]:
            unpacked.append(packed)
            return unpack(packed)

        monkeypatch.setattr("service.storage.memory.store.unpack", note)
        for seq in (0, 1, 54_321, len(texts) - 1):
            unpacked.clear()
            page = await store.read_events("s", "t", after=seq)
            assert page.text.startswith(texts[seq])
            assert (page.after, page.kept) == (seq, len(texts))
            assert sum(map(len, unpacked)) < len(texts) // 5
            assert len(page.text) <= PAGE_LENGTH_MAX
        unpacked.clear()
        assert not (await store.read_events("s", "t", after=len(texts))).runs
        assert not unpacked


async def test_the_end_of_a_turn_is_cancelled_at_once_or_not_at_all() -> None:
    async with open_memory_store() as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        others_ran = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set, others_ran)
            assert await store.end_turn(ended(a_turn()), runs=(), now=T0) is EndResult.KEPT
            assert not others_ran.is_set()
        await store.begin_turn(a_turn("next"), now=T0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.end_turn(ended(a_turn("next")), runs=(), now=T0)
        assert scope.cancelled_caught
        assert (await store.get_turn("s", "next", now=T0)).is_open


async def _set(event: trio.Event) -> None:
    event.set()


async def test_it_does_not_outlive_the_process() -> None:
    async with open_memory_store() as store:
        assert (store.name, store.capabilities) == ("memory", MEMORY)
        await store.create_session(a_session(), now=T0)
    async with open_memory_store() as another:
        assert await another.count_sessions(status=None, now=T0) == 0


async def test_sessions_are_bounded_and_those_that_have_expired_make_room() -> None:
    async with open_memory_store(sessions_max=2) as store:
        await store.create_session(a_session("old"), now=T0)
        await store.create_session(a_session("used"), now=T0)
        with pytest.raises(SessionLimitError):
            await store.create_session(a_session("new"), now=T0)
        with pytest.raises(SessionLimitError) as refused:
            await store.fork_session("used", at=None, copy_id="copy", now=T0)
        with pytest.raises(SessionExistsError):
            await store.create_session(a_session("used"), now=T0)
        assert refused.value.retry_after_s == 10
        await store.update_session("used", SessionPatch(title="x"), now=at(1))
        await store.fork_session("used", at=None, copy_id="copy", now=at(IDLE_TIMEOUT_S))
        with pytest.raises(SessionLimitError):
            await store.create_session(a_session("new"), now=at(IDLE_TIMEOUT_S))
        await store.mark_deleted("used", now=at(IDLE_TIMEOUT_S))
        await store.remove_deleted("used")
        await store.create_session(a_session("new"), now=at(IDLE_TIMEOUT_S))
        page = await store.list_sessions(limit=10, after=None, status=None, now=T0)
        assert sorted(session.id for session in page.data) == ["copy", "new"]


async def a_long_session(store: MemoryStore, turns: int) -> datetime:
    session = a_session("s")
    now = session.created_at
    await store.create_session(session, now=now)
    parent = None
    for number in range(turns):
        turn = a_turn(f"turn_{number}", parent=parent)
        await store.begin_turn(turn, now=now)
        await store.end_turn(msgspec.structs.replace(turn, state="completed"), runs=(), now=now)
        parent = turn.id
    return now


async def test_a_long_fork_lets_others_run() -> None:
    async with open_memory_store() as store, trio.open_nursery() as nursery:
        now = await a_long_session(store, turns=300)
        others = 0

        @nursery.start_soon
        async def run_beside() -> None:
            nonlocal others
            while True:
                others += 1
                await trio.lowlevel.checkpoint()

        copy = await store.fork_session("s", at=None, copy_id="copy", now=now)
        assert others >= 6
        assert copy.message_count == (await store.get_session("s", now=now)).message_count == 300
        nursery.cancel_scope.cancel()


async def test_a_long_fork_whose_source_goes_meanwhile_leaves_nothing() -> None:
    async with open_memory_store() as store, trio.open_nursery() as nursery:
        now = await a_long_session(store, turns=300)
        nursery.start_soon(partial(store.mark_deleted, "s", now=now))
        with pytest.raises(SessionNotFoundError):
            await store.fork_session("s", at=None, copy_id="copy", now=now)
        with pytest.raises(SessionNotFoundError):
            await store.get_session("copy", now=now)


HELLO = SearchQuery(
    cursors=SearchCursors(b"x" * 32),
    terms=("hello",),
    limit=9,
    after=None,
    status=None,
    owner=None,
    metadata={},
    now=T0,
    bytes_max=None,
)
Change = Callable[[MemoryStore], Awaitable[object]]
Shown = list[tuple[str | None, str | None]]


async def remove_b(store: MemoryStore) -> None:
    await store.mark_deleted("b", now=T0)
    await store.remove_deleted("b")


async def make_b_anew(store: MemoryStore) -> None:
    await remove_b(store)
    await store.create_session(msgspec.structs.replace(a_session("b"), title="Anew"), now=T0)


async def delete_the_turn_of_b(store: MemoryStore) -> None:
    await store.delete_turns("b", "of_b", now=T0)


@pytest.mark.parametrize("change", [remove_b, make_b_anew, delete_the_turn_of_b])
async def test_a_search_shows_no_document_that_goes_between_two_of_its_steps(change: Change) -> None:
    shown: list[Shown] = []
    is_done = False
    while not is_done:
        async with open_memory_store() as store:
            search = await a_search_for_hello(store)
            is_done = is_done_after(search, steps=len(shown))
            if not is_done:
                await change(store)
                shown.append([(match.turn_id, match.session.title) for match in at_once(search).data])
    without_b: Shown = [("of_c", None), ("of_a", None)]
    with_b: Shown = [("of_c", None), ("of_b", None), ("of_a", None)]
    assert shown == [without_b] * shown.count(without_b) + [with_b] * shown.count(with_b)
    assert shown.count(without_b) >= 8, "b was gone while its snippet was made"
    assert shown.count(with_b) >= 3


async def a_search_for_hello(store: MemoryStore) -> Steps[Page[Match]]:
    for name in ("a", "b", "c"):
        await store.create_session(a_session(name), now=T0)
        turn = a_turn(f"of_{name}", name, texts=["x " * 8000, "hello"])
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn), runs=(), now=T0)
    at_once(store._documents.prepare_noted(within_s=60))
    return search_page(MemoryIndex(store._documents, store._sessions, HELLO), HELLO)


def is_done_after(search: Steps[Page[Match]], *, steps: int) -> bool:
    return any(next(search, search) is search for _ in range(steps))


async def test_a_search_looks_at_a_few_documents_of_a_long_session_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = 0
    has_terms = MemoryDocuments.has_terms

    def count(documents: MemoryDocuments, number: int, terms: Sequence[str]) -> bool:
        nonlocal looked_at
        looked_at += 1
        return has_terms(documents, number, terms)

    monkeypatch.setattr(MemoryDocuments, "has_terms", count)
    async with open_memory_store() as store:
        await a_long_session(store, turns=1000)
        numbers = store._sessions["s"].documents
        assert len(numbers) == 1000
        await a_search_for_hello(store)
        query = msgspec.structs.replace(HELLO, terms=("missing",))
        steps = MemoryIndex(store._documents, store._sessions, query).is_in("s", first=numbers[50], last=numbers[949])
        counts: list[int] = []
        for _ in steps:
            counts.append(looked_at)
            looked_at = 0
        assert sum(counts) + looked_at == 900
        assert max(counts) <= 256


async def test_a_search_finds_the_first_of_thousands_of_turns_that_ended_without_one() -> None:
    async with open_memory_store() as store:
        await store.create_session(a_session("old"), now=T0)
        turn = a_turn("first", "old", texts=["farewell"])
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn), runs=(), now=T0)
        await a_long_session(store, turns=5000)
        assert len(store._documents._waiting) <= NOTED_MAX + 1, "what one search prepares"
        page = await store.search_sessions("farewell", limit=1, after=None, status=None, now=T0)
        assert [match.turn_id for match in page.data] == ["first"]


async def test_terms_that_a_document_has_lost_are_gone_at_once_and_taken_out_in_steps() -> None:
    documents = MemoryDocuments()
    texts = [" ".join(f"w{n}" for n in range(1000))]
    at_once(documents.prepare(1, "", lambda: texts))
    documents.publish(1, Document("s", "t", lambda: texts))
    documents.drop(1, {f"w{n}" for n in range(500)})
    documents.drop(1, {f"w{n}" for n in range(500, 999)})
    assert [documents.has_terms(1, [term]) for term in ("w0", "w998", "w999")] == [False, False, True]
    assert len(documents._numbers[""]) == 1000, "the lists are as they were"
    left = [len(documents._numbers[""]) for _ in documents.reclaim()]
    assert len(left) >= 4
    assert all(before - after <= 256 for before, after in pairwise(left))
    assert set(documents._numbers[""]) == {"w999"}
    assert documents._dropped == {}


async def test_the_search_index_keeps_nothing_of_sessions_that_are_gone() -> None:
    async with open_memory_store() as store:
        for n in range(3):
            session = msgspec.structs.replace(a_session(f"s{n}"), title=f"title {n}", metadata={"k": "v"})
            await store.create_session(session, now=T0)
            turn = a_turn(f"t{n}", f"s{n}")
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
        at_once(store._documents.prepare_noted(within_s=60))
        await store.mark_deleted("s0", now=T0)
        await store.remove_deleted("s0")
        assert set(store._documents._numbers[""]) == {"title", "1", "2", "hello", "hi"}
        await store.delete_expired(now=at(2 * IDLE_TIMEOUT_S), limit=10)
        left = store._documents
        assert (left._numbers, left._documents, left._owners, left._noted) == ({}, {}, {}, {})
        assert store._listings._by_pair == {}


async def test_a_listing_looks_at_its_owners_sessions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    is_listed = rules.is_listed

    def note(session: SessionRecord, *args: Any, **kwargs: Any) -> bool:
        looked.append(session.id)
        return is_listed(session, *args, **kwargs)

    monkeypatch.setattr(rules, "is_listed", note)
    pairs = {"team": "blue"}
    async with open_memory_store() as store:
        for name in (*(f"alice/{n}" for n in range(5)), "bob/s", "plain"):
            await store.create_session(msgspec.structs.replace(a_session(name), metadata=pairs), now=T0)
        for owner, own in {"": ["plain"], "bob": ["bob/s"], "eve": []}.items():
            for metadata in (None, pairs, {"team": "red"}):
                for status in STATUSES:
                    looked.clear()
                    page = await store.list_sessions(
                        limit=9, after=None, status=status, now=T0, owner=owner, metadata=metadata
                    )
                    found = [session.id for session in page.data]
                    assert found == ([] if status == "running" or metadata == {"team": "red"} else own)
                    assert set(looked) <= set(own)
        await store.begin_turn(a_turn(session_id="plain"), now=T0)
        for name in ("plain", "bob/s"):
            await store.mark_deleted(name, now=T0)
        assert [await store.count_sessions(status=None, now=T0, owner=owner) for owner in ("", "bob", "alice")] == [
            0,
            0,
            5,
        ]


@pytest.mark.parametrize("searches", [False, True])
async def test_nothing_is_left_of_a_turn_that_loses_an_item_and_then_its_session(
    monkeypatch: pytest.MonkeyPatch, searches: bool
) -> None:
    monkeypatch.setattr(deletions, "TERMS_MAX", 3)  # so that the turn has terms beside those that count
    async with open_memory_store() as store:
        await store.create_session(a_session(), now=T0)
        turn = a_turn(texts=["hello one two", "three four"])
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn, text="end"), runs=said("end"), now=T0)
        if searches:
            at_once(store._documents.prepare_noted(within_s=60))
            assert store._documents._numbers
        await store.delete_item("s", turn.input[1].id, now=T0)
        if searches:
            at_once(store._documents.prepare_noted(within_s=60))
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        at_once(store._documents.reclaim())
        assert (store._documents._numbers, store._documents._owners, store._documents._noted) == ({}, {}, {})
