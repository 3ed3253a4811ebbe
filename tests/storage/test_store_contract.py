"""The contract of every store: each sentence of :class:`service.storage.store.Store` as a test."""

import base64
import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import get_args

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    HeadMovedError,
    InvalidRequestError,
    PreconditionFailedError,
    SessionExistsError,
    SessionNotFoundError,
    TurnNotFoundError,
)
from service.models.client import NO_OPTIONS, FunctionTool, NamedFunction, Options, TextFormat, Tools, Usage
from service.storage import rules
from service.storage.page_cursor import (
    SessionPosition,
    TurnPosition,
    decode_session_cursor,
    decode_turn_cursor,
    encode_cursor,
)
from service.storage.pieces import CALL, QUEUED, STARTED, Run, count
from service.storage.records import (
    BegunTurn,
    EndResult,
    EndState,
    Failure,
    Item,
    LeftOut,
    SessionPatch,
    SessionRecord,
    TitleSource,
    TurnRecord,
)
from service.storage.rules import TURN_BYTES
from service.storage.store import PAGE_LENGTH_MAX, Store
from service.store_capabilities import BY_SCHEME
from tests.storage.conftest import OpenStore
from tests.storage.rows import (
    IDLE_TIMEOUT_S,
    T0,
    a_session,
    a_turn,
    all_sessions,
    all_turns,
    at,
    contents,
    ended,
    said,
    told,
)

UNICODE = "\x00 NUL, é e\u0301, שלום, 日本語, \U0001f468\u200d\U0001f469\u200d\U0001f467, \u2028, \ufeff, ';--"


async def test_a_store_can_do_what_its_kind_in_store_url_says(store: Store) -> None:
    assert store.capabilities == BY_SCHEME[store.name.partition(":")[0]]
    assert store.capabilities.durable or not store.capabilities.shared, "processes share what outlives each of them"


async def test_a_store_has_every_method_of_the_protocol_with_its_signature(open_store: OpenStore) -> None:
    methods = [name for name, _ in inspect.getmembers(Store, inspect.iscoroutinefunction)]
    assert "end_turn" in methods
    async with open_store() as store:
        for name in methods:
            assert inspect.signature(getattr(type(store), name)) == inspect.signature(getattr(Store, name)), name


# Sessions: create, get, update


async def test_a_session_is_read_as_it_was_created(store: Store) -> None:
    session = SessionRecord(
        id="A-z_0.9" * 18,
        created_at=at(0.000001),
        last_accessed_at=at(1),
        expires_at=at(86400 * 30),
        idle_timeout_s=0.1,
        title=UNICODE,
        model="a/model:7b",
        system_message=UNICODE * 1000,
        temperature=0.7,
        max_output_tokens=1 << 40,
        metadata={UNICODE[:64]: UNICODE, "": ""},
    )
    await store.create_session(session, now=T0)
    assert await store.get_session(session.id, now=T0) == session
    assert await all_sessions(store, now=T0) == [session]


async def test_an_idle_timeout_reads_the_same_however_its_number_was_written(store: Store) -> None:
    session = a_session(idle_timeout_s=60)
    await store.create_session(session, now=T0)
    patched = await store.update_session("s", SessionPatch(idle_timeout_s=90), now=T0)
    kept = await store.get_session("s", now=T0)
    told = [repr(it.idle_timeout_s) for it in (session, patched, kept)]
    assert told == ["60.0", "90.0", "90.0"]


async def test_a_taken_id_is_refused_and_nothing_changes(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    before = await contents(store, now=T0)
    with pytest.raises(SessionExistsError):
        await store.create_session(a_session(created=5, idle_timeout_s=7), now=at(5))
    assert await contents(store, now=T0) == before


async def test_ids_differ_by_case_and_by_every_character(store: Store) -> None:
    names = ["a", "A", "a.", "a-", "a_", "%", "_"]
    for name in names:
        await store.create_session(a_session(name), now=T0)
    assert {session.id for session in await all_sessions(store, now=T0)} == set(names)


async def test_an_expired_session_of_the_same_id_is_replaced_with_all_that_belongs_to_it(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    later = at(IDLE_TIMEOUT_S)
    fresh = a_session(created=IDLE_TIMEOUT_S)
    await store.create_session(fresh, now=later)
    assert await contents(store, now=later) == {"s": (fresh, [])}
    assert await told(store, "s", "t") == []
    assert list(await store.read_path("s", "t", bytes_max=None)) == []
    with pytest.raises(TurnNotFoundError):
        await store.get_turn("s", "t", now=later)
    assert await store.delete_expired(now=later, limit=10) == 0


async def test_a_session_with_an_open_turn_is_not_replaced_past_its_deadline(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    with pytest.raises(SessionExistsError):
        await store.create_session(a_session(), now=at(10 * IDLE_TIMEOUT_S))


async def test_an_id_whose_deletion_is_not_finished_is_taken_even_past_its_deadline(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.mark_deleted("s", now=T0)
    for now in (T0, at(10 * IDLE_TIMEOUT_S)):
        with pytest.raises(SessionExistsError):
            await store.create_session(a_session(), now=now)


async def test_a_patch_changes_what_it_names_and_moves_the_deadline(store: Store) -> None:
    session = msgspec.structs.replace(a_session(), title="old", model="m", system_message="s", metadata={"a": "b"})
    await store.create_session(session, now=T0)
    patched = await store.update_session("s", SessionPatch(title=UNICODE, metadata={"c": UNICODE}), now=at(10))
    assert patched == msgspec.structs.replace(
        session,
        title=UNICODE,
        metadata={"c": UNICODE},
        last_accessed_at=at(10),
        expires_at=at(10 + IDLE_TIMEOUT_S),
    )
    assert await store.get_session("s", now=at(10)) == patched


async def test_a_patch_sets_and_unsets_each_option_by_itself(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    for patch, temperature, max_output_tokens in (
        (SessionPatch(temperature=1), 1.0, None),
        (SessionPatch(max_output_tokens=5), 1.0, 5),
        (SessionPatch(title="x"), 1.0, 5),
        (SessionPatch(temperature=None), None, 5),
        (SessionPatch(max_output_tokens=None), None, None),
    ):
        patched = await store.update_session("s", patch, now=T0)
        assert (repr(patched.temperature), patched.max_output_tokens) == (repr(temperature), max_output_tokens)
        assert await store.get_session("s", now=T0) == patched
    assert (await store.fork_session("s", at=None, copy_id="copy", now=T0)).temperature is None


async def test_a_patch_can_unset_and_an_empty_one_only_moves_the_deadline(store: Store) -> None:
    session = msgspec.structs.replace(a_session(), title="old", model="m", system_message="s", metadata={"a": "b"})
    await store.create_session(session, now=T0)
    unset = await store.update_session(
        "s", SessionPatch(title=None, model=None, system_message=None, metadata={}), now=T0
    )
    assert unset == a_session()
    used = await store.update_session("s", SessionPatch(), now=at(59))
    assert used == msgspec.structs.replace(unset, last_accessed_at=at(59), expires_at=at(59 + IDLE_TIMEOUT_S))


@pytest.mark.parametrize("idle_timeout_s", [0.25, 5.0, 31_536_000.0])
async def test_a_new_idle_timeout_holds_at_once(store: Store, idle_timeout_s: float) -> None:
    await store.create_session(a_session(), now=T0)
    patched = await store.update_session("s", SessionPatch(idle_timeout_s=idle_timeout_s), now=at(10))
    assert patched.idle_timeout_s == idle_timeout_s
    assert patched.expires_at == at(10 + idle_timeout_s)


async def test_a_patch_for_another_revision_changes_nothing_and_tells_the_revision(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    seen = rules.revision_of(a_session())
    first = await store.update_session("s", SessionPatch(title="first"), now=at(1), revisions=["older", seen])
    with pytest.raises(PreconditionFailedError) as refused:
        await store.update_session("s", SessionPatch(title="second"), now=at(2), revisions=[seen])
    assert refused.value.revision == rules.revision_of(first)
    with pytest.raises(PreconditionFailedError):
        await store.update_session("s", SessionPatch(), now=at(2), revisions=[])
    assert await store.get_session("s", now=at(2)) == first


async def test_a_deletion_for_another_revision_deletes_nothing(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    seen = rules.revision_of(a_session())
    patched = await store.update_session("s", SessionPatch(metadata={"a": "b"}), now=T0)
    with pytest.raises(PreconditionFailedError) as refused:
        await store.mark_deleted("s", now=T0, revisions=[seen])
    assert refused.value.revision == rules.revision_of(patched)
    assert not await store.is_marked("s")
    assert await store.get_session("s", now=T0) == patched
    await store.mark_deleted("s", now=T0, revisions=[refused.value.revision])
    assert await store.is_marked("s")


TITLE_USAGE = Usage(input_tokens=5, output_tokens=3, reasoning_tokens=2, cached_tokens=1)


async def test_a_title_is_given_to_a_session_without_one_and_is_no_use(store: Store) -> None:
    session = msgspec.structs.replace(a_session(), input_tokens=10)
    await store.create_session(session, now=T0)
    assert await store.keep_title(session, UNICODE[1:], usage=TITLE_USAGE, now=at(7))
    titled = msgspec.structs.replace(
        session,
        title=UNICODE[1:],
        titled_at=at(7),
        input_tokens=15,
        output_tokens=3,
        reasoning_tokens=2,
        cached_tokens=1,
    )
    assert await store.get_session("s", now=at(7)) == titled
    assert (titled.updated_at, titled.last_accessed_at) == (at(7), T0)
    patched = await store.update_session("s", SessionPatch(metadata={"a": "b"}), now=at(9))
    assert (patched.updated_at, patched.titled_at) == (at(9), at(7))
    assert await store.get_session("s", now=at(9)) == patched
    assert [it.titled_at for it in await all_sessions(store, now=at(9))] == [at(7)]


async def test_a_title_that_a_session_has_stays_and_the_cost_of_another_counts(store: Store) -> None:
    session = msgspec.structs.replace(a_session(), title="Mine")
    await store.create_session(session, now=T0)
    assert not await store.keep_title(session, "Another", usage=TITLE_USAGE, now=at(7))
    kept = await store.get_session("s", now=at(7))
    assert (kept.title, kept.titled_at, kept.input_tokens, kept.updated_at) == ("Mine", None, 5, T0)
    assert not await store.keep_title(session, None, usage=TITLE_USAGE, now=at(7))
    assert not await store.keep_title(session, "Another", usage=None, now=at(7))
    assert await store.get_session("s", now=at(7)) == msgspec.structs.replace(
        kept, input_tokens=10, output_tokens=6, reasoning_tokens=4, cached_tokens=2
    )


async def test_a_title_is_for_one_session_and_for_no_later_one_of_its_id(store: Store) -> None:
    earlier = a_session()
    assert not await store.keep_title(earlier, "Title", usage=TITLE_USAGE, now=T0)
    later = a_session(created=1)
    await store.create_session(later, now=at(1))
    assert not await store.keep_title(earlier, "Title", usage=TITLE_USAGE, now=at(1))
    assert not await store.keep_title(later, "Title", usage=TITLE_USAGE, now=at(1 + IDLE_TIMEOUT_S)), "it has expired"
    assert await store.get_session("s", now=at(1)) == later
    await store.mark_deleted("s", now=at(1))
    assert not await store.keep_title(later, "Title", usage=TITLE_USAGE, now=at(1))


@pytest.mark.parametrize("deleted", ["nothing", "t-in-0", "t-out", "the turn"])
async def test_a_title_tells_of_nothing_that_was_deleted(store: Store, deleted: str) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    turn = ended(a_turn(), text="Hi")
    await store.end_turn(turn, runs=said("Hi"), now=T0)
    if deleted == "the turn":
        await store.delete_turns("s", "t", now=T0)
    elif deleted != "nothing":
        await store.delete_item("s", deleted, now=T0)
    source = TitleSource.of(turn)
    kept = await store.keep_title(a_session(), "Title", usage=TITLE_USAGE, now=at(7), source=source)
    assert kept == (deleted == "nothing")
    session = await store.get_session("s", now=at(7))
    assert (session.title, session.input_tokens) == ("Title" if kept else None, 5)


async def test_a_title_that_was_given_is_found_and_copied(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    assert await store.keep_title(a_session(), "Kombucha", usage=None, now=T0)
    copy = await store.fork_session("s", at=None, copy_id="copy", now=at(1))
    assert (copy.title, copy.updated_at) == ("Kombucha", at(1))
    search = partial(store.search_sessions, "kombucha", limit=9, after=None, status=None, now=at(1))
    assert {it.session.id for it in (await search()).data} == {"s", "copy"}
    await store.update_session("s", SessionPatch(title=None), now=at(1))
    assert {it.session.id for it in (await search()).data} == {"copy"}


# Sessions and turns that do not exist


async def _unknown(store: Store) -> None:
    pass


async def _expired(store: Store) -> None:
    await store.create_session(a_session(created=-IDLE_TIMEOUT_S), now=at(-IDLE_TIMEOUT_S))


async def _marked(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.mark_deleted("s", now=T0)


async def _removed(store: Store) -> None:
    await _marked(store)
    await store.remove_deleted("s")


GONE = [_unknown, _expired, _marked, _removed]
NEEDS_A_SESSION: dict[str, Callable[[Store], Awaitable[object]]] = {
    "fork": lambda store: store.fork_session("s", at=None, copy_id="copy", now=T0),
    "get": lambda store: store.get_session("s", now=T0),
    "update": lambda store: store.update_session("s", SessionPatch(title="x"), now=T0),
    "mark_deleted": lambda store: store.mark_deleted("s", now=T0),
    "begin_turn": lambda store: store.begin_turn(a_turn(), now=T0),
    "get_turn": lambda store: store.get_turn("s", "t", now=T0),
    "get_reply": lambda store: store.get_reply("s", "t", now=T0),
    "list_turns": lambda store: store.list_turns("s", limit=1, after=None, now=T0),
}


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("method", NEEDS_A_SESSION)
async def test_a_session_that_is_gone_is_not_there_for_any_method(
    store: Store, gone: Callable[[Store], Awaitable[None]], method: str
) -> None:
    await gone(store)
    with pytest.raises(SessionNotFoundError):
        await NEEDS_A_SESSION[method](store)
    assert await contents(store, now=T0) == {}
    assert [await store.count_sessions(status=status, now=T0) for status in (None, "idle", "running")] == [0, 0, 0]


async def test_a_session_is_there_until_the_very_moment_of_its_deadline(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    deadline = at(IDLE_TIMEOUT_S)
    just_before = deadline - timedelta(microseconds=1)
    assert (await store.get_session("s", now=just_before)).id == "s"
    assert await store.count_sessions(status="idle", now=just_before) == 1
    with pytest.raises(SessionNotFoundError):
        await store.get_session("s", now=deadline)
    assert await store.count_sessions(status="idle", now=deadline) == 0
    assert await all_sessions(store, now=deadline) == []


async def test_a_session_with_an_open_turn_is_there_past_its_deadline(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    late = at(100 * IDLE_TIMEOUT_S)
    assert (await store.get_session("s", now=late)).status == "running"
    assert await store.count_sessions(status="running", now=late) == 1
    assert [session.id for session in await all_sessions(store, now=late)] == ["s"]
    assert await store.delete_expired(now=late, limit=10) == 0
    assert (await store.begin_turn(a_turn("t2", parent="t"), now=late)).session.open_turns == 2


async def test_reads_do_not_move_the_deadline(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    before = await store.get_session("s", now=T0)
    await contents(store, now=at(30))
    await store.get_turn("s", "t", now=at(30))
    await store.read_path("s", "t", bytes_max=None)
    await store.count_sessions(status=None, now=at(30))
    assert await store.get_session("s", now=at(30)) == before


# Listing and counting sessions


async def test_sessions_are_listed_newest_first_and_then_by_id(store: Store) -> None:
    for name, created in [("b", 1), ("c", 3), ("a", 1), ("d", 2), ("e", 1.000001)]:
        await store.create_session(a_session(name, created=created), now=at(3))
    assert [session.id for session in await all_sessions(store, now=at(3))] == ["c", "d", "e", "b", "a"]
    assert [session.id for session in await all_sessions(store, now=at(3), limit=1)] == ["c", "d", "e", "b", "a"]


async def test_the_last_page_says_so_and_no_page_is_empty_but_the_first(store: Store) -> None:
    first = await store.list_sessions(limit=2, after=None, status=None, now=T0)
    assert (first.data, first.next) == ((), None)
    for n in range(4):
        await store.create_session(a_session(f"s{n}"), now=T0)
    first = await store.list_sessions(limit=2, after=None, status=None, now=T0)
    assert first.next is not None
    second = await store.list_sessions(limit=2, after=first.next, status=None, now=T0)
    assert (len(first.data), len(second.data), second.next) == (2, 2, None)


async def test_a_status_selects_and_counts(store: Store) -> None:
    for name in "abcd":
        await store.create_session(a_session(name), now=T0)
    for name in "bd":
        await store.begin_turn(a_turn(f"t-{name}", name), now=T0)
    running = await store.list_sessions(limit=1, after=None, status="running", now=T0)
    assert [session.id for session in running.data] == ["d"]
    running = await store.list_sessions(limit=1, after=running.next, status="running", now=T0)
    assert ([session.id for session in running.data], running.next) == (["b"], None)
    idle = await store.list_sessions(limit=10, after=None, status="idle", now=T0)
    assert ([session.id for session in idle.data], idle.next) == (["c", "a"], None)
    assert [await store.count_sessions(status=status, now=T0) for status in (None, "idle", "running")] == [4, 2, 2]
    past_the_idle_ones = at(IDLE_TIMEOUT_S)
    counts = [await store.count_sessions(status=status, now=past_the_idle_ones) for status in (None, "idle", "running")]
    assert counts == [2, 0, 2]


async def test_a_cursor_stays_good_when_the_sessions_around_it_are_gone(store: Store) -> None:
    for n in range(5):
        await store.create_session(a_session(f"s{n}"), now=T0)
    page = await store.list_sessions(limit=2, after=None, status=None, now=T0)
    for name in ("s4", "s3", "s2"):
        await store.mark_deleted(name, now=T0)
        await store.remove_deleted(name)
    page = await store.list_sessions(limit=2, after=page.next, status=None, now=T0)
    assert ([session.id for session in page.data], page.next) == (["s1", "s0"], None)


def _json_cursor(json: bytes) -> str:
    return base64.urlsafe_b64encode(json).rstrip(b"=").decode()


NOT_CURSORS = [
    "",
    "x",
    "s0",
    "!!!!",
    "é",
    "\x00",
    "\ud800",
    "A" * 100_000,
    _json_cursor(b"[" * 300),
    _json_cursor(b"null"),
    _json_cursor(b'["2026-03-01T12:00:00","naive"]'),
    _json_cursor(b'["2026-03-01T12:00:00+00:00","another form"]'),
    _json_cursor(b'["2026-03-01T12:00:00+01:00","another zone"]'),
    _json_cursor(b'["0001-01-01T00:00:00+01:00","before all time"]'),
    _json_cursor(b'["2026-03-01T12:00:00Z","x","y"]'),
    _json_cursor(b"[-1]"),
    _json_cursor(b"[99999999999999999999999]"),
    _json_cursor(b"[1.5]"),
    encode_cursor(TurnPosition(0)) + "=",
    " " + encode_cursor(SessionPosition(T0, "s")),
]


@pytest.mark.parametrize("cursor", NOT_CURSORS, ids=range(len(NOT_CURSORS)))
async def test_an_invalid_cursor_is_refused(store: Store, cursor: str) -> None:
    await store.create_session(a_session(), now=T0)
    with pytest.raises(InvalidRequestError) as refused:
        await store.list_sessions(limit=1, after=cursor, status=None, now=T0)
    assert refused.value.field == "after"
    with pytest.raises(InvalidRequestError) as refused:
        await store.list_turns("s", limit=1, after=cursor, now=T0)
    assert refused.value.field == "after"


async def test_a_cursor_of_one_listing_is_none_of_the_other(store: Store) -> None:
    for n in range(2):
        await store.create_session(a_session(f"s{n}"), now=T0)
        await store.begin_turn(a_turn(f"t{n}", "s0"), now=T0)
    sessions = await store.list_sessions(limit=1, after=None, status=None, now=T0)
    turns = await store.list_turns("s0", limit=1, after=None, now=T0)
    assert sessions.next is not None
    assert turns.next is not None
    with pytest.raises(InvalidRequestError):
        await store.list_sessions(limit=1, after=turns.next, status=None, now=T0)
    with pytest.raises(InvalidRequestError):
        await store.list_turns("s0", limit=1, after=sessions.next, now=T0)


@given(st.text())
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    for decode in (decode_session_cursor, decode_turn_cursor):
        with pytest.raises(InvalidRequestError):
            decode(text)


@given(st.datetimes(timezones=st.just(UTC)), st.text("AZaz09_.-", min_size=1, max_size=128))
def test_a_cursor_is_its_position(created_at: datetime, session_id: str) -> None:
    position = SessionPosition(created_at, session_id)
    assert decode_session_cursor(encode_cursor(position)) == position


# Deletion


async def test_a_marked_session_is_hidden_while_its_turns_go_on(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    await store.mark_deleted("s", now=T0)
    assert await contents(store, now=T0) == {}
    assert [kept.id for kept in await store.read_path("s", "t", bytes_max=None)] == ["t"]
    assert await store.end_turn(ended(turn, "cancelled"), runs=said("H", "i"), now=T0) is EndResult.KEPT
    assert await store.end_turn(ended(turn), runs=(), now=T0) is EndResult.LOST
    assert await told(store, "s", "t") == ["H", "i"]
    assert await contents(store, now=T0) == {}
    assert await store.count_sessions(status=None, now=T0) == 0


async def test_a_removed_session_leaves_nothing_and_its_id_is_free(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    await store.mark_deleted("s", now=T0)
    await store.remove_deleted("s")
    assert await told(store, "s", "t") == []
    assert list(await store.read_path("s", "t", bytes_max=None)) == []
    fresh = a_session(created=1)
    await store.create_session(fresh, now=at(1))
    assert await contents(store, now=at(1)) == {"s": (fresh, [])}


async def test_removing_takes_marked_sessions_only_and_may_be_repeated(store: Store) -> None:
    await store.remove_deleted("never")
    await store.create_session(a_session("other"), now=T0)
    await store.create_session(a_session(), now=T0)
    await store.remove_deleted("s")
    assert await store.count_sessions(status=None, now=T0) == 2
    await store.mark_deleted("s", now=T0)
    await store.remove_deleted("s")
    await store.create_session(a_session(), now=T0)
    await store.remove_deleted("s")  # a late removal: the id belongs to a new session
    assert await store.count_sessions(status=None, now=T0) == 2


async def test_a_session_is_marked_from_its_mark_to_its_removal(store: Store) -> None:
    assert not await store.is_marked("s")
    await store.create_session(a_session(), now=T0)
    assert not await store.is_marked("s")
    await store.mark_deleted("s", now=T0)
    assert await store.is_marked("s")
    await store.remove_deleted("s")
    assert not await store.is_marked("s")
    await store.create_session(a_session(), now=T0)
    assert not await store.is_marked("s"), "the id has a new owner"


async def test_an_end_after_the_removal_is_no_end(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    await store.mark_deleted("s", now=T0)
    await store.remove_deleted("s")
    await store.create_session(a_session(created=1), now=at(1))
    before = await contents(store, now=at(1))
    assert await store.end_turn(ended(turn), runs=said("Hi"), now=at(1)) is EndResult.LOST
    await store.start_turn("t", now=at(1))
    assert await contents(store, now=at(1)) == before
    assert await told(store, "s", "t") == []


# Expiry


async def test_the_longest_expired_go_first_and_at_most_as_many_as_allowed(store: Store) -> None:
    for n, idle_timeout_s in enumerate([50, 10, 40, 20, 30]):
        await store.create_session(a_session(f"s{n}", idle_timeout_s=idle_timeout_s), now=T0)
    assert await store.delete_expired(now=at(9), limit=10) == 0
    assert await store.delete_expired(now=at(40), limit=2) == 2
    # At T0, in the past: 10 and 20 are gone, 30 and 40 wait for the next sweep.
    assert [session.id for session in await all_sessions(store, now=T0)] == ["s4", "s2", "s0"]
    assert await store.delete_expired(now=at(40), limit=2) == 2
    assert await store.delete_expired(now=at(40), limit=2) == 0
    assert [session.id for session in await all_sessions(store, now=T0)] == ["s0"]


async def test_expiry_takes_turns_and_events_and_frees_the_id(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    assert await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=1) == 1
    assert await told(store, "s", "t") == []
    assert list(await store.read_path("s", "t", bytes_max=None)) == []
    await store.create_session(a_session(), now=T0)
    assert await all_turns(store, "s", now=T0) == []


async def test_expiry_leaves_marked_sessions_to_their_deletion(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.mark_deleted("s", now=T0)
    assert await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=1) == 0


async def _use_by_patch(store: Store) -> None:
    await store.update_session("s", SessionPatch(), now=at(50))


async def _use_by_begin(store: Store) -> None:
    await store.begin_turn(a_turn(), now=at(50))


async def _use_by_end(store: Store) -> None:
    await store.begin_turn(a_turn(), now=T0)
    await store.end_turn(ended(a_turn()), runs=(), now=at(50))


@pytest.mark.parametrize("use", [_use_by_patch, _use_by_begin, _use_by_end])
async def test_a_use_moves_the_deadline(store: Store, use: Callable[[Store], Awaitable[None]]) -> None:
    await store.create_session(a_session(), now=T0)
    await use(store)
    session = await store.get_session("s", now=at(50))
    assert (session.last_accessed_at, session.expires_at) == (at(50), at(50 + IDLE_TIMEOUT_S))
    # The old deadline has no effect any more ...
    assert await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=10) == 0
    if session.open_turns:
        await store.end_turn(ended(a_turn()), runs=(), now=at(50))
    # ... and the new one removes the session, once.
    assert await store.delete_expired(now=at(49 + IDLE_TIMEOUT_S), limit=10) == 0
    assert await store.delete_expired(now=at(50 + IDLE_TIMEOUT_S), limit=10) == 1
    assert await store.delete_expired(now=at(500), limit=10) == 0


async def test_a_deadline_can_move_to_an_earlier_moment(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.update_session("s", SessionPatch(idle_timeout_s=1), now=T0)
    assert await store.delete_expired(now=at(1), limit=10) == 1
    assert await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=10) == 0


# Turns


async def test_an_accepted_turn_is_kept_and_is_the_head(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = msgspec.structs.replace(
        a_turn(texts=["first", UNICODE]), temperature=0.7, max_output_tokens=5, background=True, created_at=at(1)
    )
    session = (await store.begin_turn(turn, now=at(2))).session
    assert session == msgspec.structs.replace(
        a_session(),
        head="t",
        open_turns=1,
        message_count=2,
        last_accessed_at=at(2),
        expires_at=at(2 + IDLE_TIMEOUT_S),
    )
    assert session.status == "running"
    assert await store.get_session("s", now=at(2)) == session
    assert await store.get_turn("s", "t", now=at(2)) == turn
    assert await store.get_reply("s", "t", now=at(2)) == msgspec.structs.replace(turn, input=())
    assert await told(store, "s", "t") == []


async def test_the_newest_turn_is_the_head_for_any_parent(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    for name, parent in [("a", None), ("b", "a"), ("c", "a"), ("d", None)]:
        await store.begin_turn(a_turn(name, parent=parent, state="queued"), now=T0)
        assert (await store.get_session("s", now=T0)).head == name
    session = await store.get_session("s", now=T0)
    assert (session.open_turns, session.message_count) == (4, 4)


async def test_a_parent_of_nowhere_or_of_another_session_is_refused_and_nothing_changes(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.create_session(a_session("other"), now=T0)
    await store.begin_turn(a_turn("theirs", "other"), now=T0)
    before = await contents(store, now=T0)
    for parent in ("nowhere", "theirs", ""):
        with pytest.raises(TurnNotFoundError):
            await store.begin_turn(a_turn(parent=parent), now=at(1))
    assert await contents(store, now=T0) == before


async def test_a_turn_that_follows_on_the_head_is_refused_where_that_has_moved(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    assert (await store.begin_turn(a_turn(), now=T0, head=None)).session.head == "t"
    before = await contents(store, now=T0)
    for head in (None, "another"):
        with pytest.raises(HeadMovedError):
            await store.begin_turn(a_turn("t2", parent=head and "t"), now=at(1), head=head)
    assert await contents(store, now=T0) == before
    assert (await store.begin_turn(a_turn("t2", parent="t"), now=at(1), head="t")).session.head == "t2"
    assert (await store.begin_turn(a_turn("branch", parent="t"), now=at(1))).session.head == "branch", (
        "no head required"
    )


async def test_a_turn_is_accepted_together_with_its_session(store: Store) -> None:
    new = a_session(created=1)
    begun = await store.begin_turn(a_turn(texts=["a", "b"]), now=at(2), head=None, creates=new)
    assert begun.session == msgspec.structs.replace(
        new, head="t", open_turns=1, message_count=2, last_accessed_at=at(2), expires_at=at(2 + IDLE_TIMEOUT_S)
    )
    assert await contents(store, now=T0) == {"s": (begun.session, [(a_turn(texts=["a", "b"]), [])])}
    await store.end_turn(ended(a_turn(texts=["a", "b"])), runs=said("Hi"), now=at(3))
    assert (await store.begin_turn(a_turn("t2", parent="t"), now=at(4), head="t")).session.message_count == 4


async def test_a_turn_whose_session_is_there_already_is_refused_and_nothing_changes(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn("first"), now=T0)
    await store.create_session(a_session("marked"), now=T0)
    await store.mark_deleted("marked", now=T0)
    before = await contents(store, now=T0)
    for session_id in ("s", "marked"):
        with pytest.raises(SessionExistsError):
            await store.begin_turn(a_turn("t", session_id), now=at(1), creates=a_session(session_id, created=1))
    assert await contents(store, now=T0) == before
    assert await store.is_marked("marked")


async def test_a_turn_with_its_session_replaces_an_expired_session(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn("old"), now=T0)
    await store.end_turn(ended(a_turn("old")), runs=said("Hi"), now=T0)
    later = at(IDLE_TIMEOUT_S)
    begun = await store.begin_turn(a_turn(), now=later, creates=a_session(created=IDLE_TIMEOUT_S))
    assert await contents(store, now=later) == {"s": (begun.session, [(a_turn(), [])])}


@pytest.mark.parametrize(
    ("parent", "head", "refusal"), [("old", msgspec.UNSET, TurnNotFoundError), (None, "old", HeadMovedError)]
)
async def test_a_turn_that_cannot_be_the_first_one_creates_no_session_and_replaces_none(
    store: Store, parent: str | None, head: str | msgspec.UnsetType, refusal: type[Exception]
) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn("old"), now=T0)
    await store.end_turn(ended(a_turn("old")), runs=said("Hi"), now=T0)
    before = await contents(store, now=T0)
    later = at(IDLE_TIMEOUT_S)
    for session_id in ("s", "fresh"):
        with pytest.raises(refusal):
            await store.begin_turn(
                a_turn("t", session_id, parent=parent),
                now=later,
                head=head,
                creates=a_session(session_id, created=IDLE_TIMEOUT_S),
            )
    assert await contents(store, now=T0) == before


async def test_an_acceptance_returns_the_path_that_a_read_finds(store: Store) -> None:
    begun = await store.begin_turn(a_turn("a", texts=["x" * 5]), now=T0, creates=a_session(), path_bytes_max=0)
    assert begun.path == [a_turn("a", texts=["x" * 5])], "the last turn is always there"
    await store.end_turn(ended(a_turn("a", texts=["x" * 5])), runs=said("Hello"), now=T0)
    for name, parent in (("b", "a"), ("c", "a"), ("d", "b")):
        turn = msgspec.structs.replace(a_turn(name, parent=parent, texts=["x" * 5]))
        for bytes_max in (None, 10_000, 2 * (10 + TURN_BYTES), 0):
            named = msgspec.structs.replace(turn, id=f"{name}-{bytes_max}")
            begun = await store.begin_turn(named, now=T0, path_bytes_max=bytes_max)
            assert begun.path == await store.read_path("s", named.id, bytes_max=bytes_max)
            await store.end_turn(ended(named), runs=said("Hello"), now=T0)
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn), runs=said("Hello"), now=T0)
    assert [turn.id for turn in begun.path or ()] == ["d-0"]


async def test_an_acceptance_returns_no_path_unless_asked_to(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    assert (await store.begin_turn(a_turn(), now=T0)).path is None


async def test_an_acceptance_leaves_out_a_path_that_is_too_long_to_be_read_with_a_write(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create_session(a_session(), now=T0)
    parent = None
    accepted = 0

    async def is_read(*, turns_max: int, bytes_max: int, of: int | None = None) -> bool:
        nonlocal parent, accepted
        monkeypatch.setattr(rules, "SHORT_PATH_TURNS", turns_max)
        monkeypatch.setattr(rules, "SHORT_PATH_BYTES", bytes_max)
        turn = a_turn(f"t{accepted}", parent=parent, texts=["x" * 10])
        begun = await store.begin_turn(turn, now=T0, path_bytes_max=of)
        parent, accepted = turn.id, accepted + 1
        assert begun.path in (None, await store.read_path("s", turn.id, bytes_max=of))
        return begun.path is not None

    assert await is_read(turns_max=1, bytes_max=0), "its own messages do not count"
    assert not await is_read(turns_max=1, bytes_max=1000)
    assert not await is_read(turns_max=100, bytes_max=19)
    assert await is_read(turns_max=100, bytes_max=30)
    assert await is_read(turns_max=100, bytes_max=10, of=2 * (10 + TURN_BYTES)), "only one more turn fits"


async def test_an_input_without_messages_counts_none(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = msgspec.structs.replace(
        a_turn(texts=[]), input=(Item(id="r", type="reasoning", role="assistant", text="hm"),)
    )
    assert (await store.begin_turn(turn, now=T0)).session.message_count == 0


@pytest.mark.parametrize("said_text", ["Hi", "x" * 300_000], ids=["short", "paged"])
async def test_a_reply_is_read_without_its_input(store: Store, said_text: str) -> None:
    await store.create_session(a_session(), now=T0)
    await store.create_session(a_session("other"), now=T0)
    turn = a_turn(texts=["x" * 100_000, UNICODE])
    await store.begin_turn(turn, now=T0)
    end = ended(turn, text=said_text)
    await store.end_turn(end, runs=said(said_text), now=T0)
    assert await store.get_reply("s", "t", now=T0) == msgspec.structs.replace(
        await store.get_turn("s", "t", now=T0), input=()
    )
    assert (await store.get_reply("s", "t", now=T0)).text == said_text
    for session_id, turn_id in (("s", "none"), ("other", "t")):
        with pytest.raises(TurnNotFoundError):
            await store.get_reply(session_id, turn_id, now=T0)


async def test_a_queued_turn_starts_once(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn(state="queued")
    await store.begin_turn(turn, now=T0)
    session = await store.get_session("s", now=T0)
    assert await store.start_turn("t", now=at(3))
    started = msgspec.structs.replace(turn, state="running", started_at=at(3))
    assert await store.get_turn("s", "t", now=T0) == started
    assert await store.start_turn("t", now=at(4)), "the turn runs, and is this owner's"
    assert await store.get_turn("s", "t", now=T0) == started
    assert await store.get_session("s", now=T0) == session, "a start is no use of the session"


async def test_only_a_queued_turn_starts(store: Store) -> None:
    assert not await store.start_turn("never", now=T0)
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn("running"), now=T0)
    await store.begin_turn(a_turn("ended", state="queued"), now=T0)
    await store.end_turn(ended(a_turn("ended", state="queued"), "cancelled"), runs=(), now=T0)
    before = await contents(store, now=T0)
    assert await store.start_turn("running", now=at(9))
    assert not await store.start_turn("ended", now=at(9)), "an ended turn must not run"
    assert await contents(store, now=T0) == before


@pytest.mark.parametrize("state", get_args(EndState))
@pytest.mark.parametrize("begun_as", ["queued", "running"])
async def test_an_end_is_kept_whole(store: Store, state: EndState, begun_as: str) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn(state="queued" if begun_as == "queued" else "running")
    await store.begin_turn(turn, now=T0)
    end = msgspec.structs.replace(
        ended(turn, state, text=UNICODE, reasoning=UNICODE * 2, now=at(7)),
        usage=Usage(input_tokens=10, output_tokens=20, reasoning_tokens=5, cached_tokens=3),
        error=Failure("a_code", UNICODE) if state == "failed" else None,
        last_seq=4711,
    )
    runs = (Run(QUEUED), Run(STARTED), *said(UNICODE), *said(UNICODE[:1], "", UNICODE[1:], item=1), *said(UNICODE))
    assert await store.end_turn(end, runs=runs, now=at(8)) is EndResult.KEPT
    assert await store.get_turn("s", "t", now=at(8)) == end
    assert await told(store, "s", "t") == [UNICODE, UNICODE[:1], "", UNICODE[1:], UNICODE]
    page = await store.read_events("s", "t")
    assert (page.runs, page.kept, page.text_length) == (runs, 7, len(UNICODE))
    session = await store.get_session("s", now=at(8))
    assert session == msgspec.structs.replace(
        a_session(),
        head="t",
        open_turns=0,
        message_count=2,
        input_tokens=10,
        output_tokens=20,
        reasoning_tokens=5,
        cached_tokens=3,
        last_accessed_at=at(8),
        expires_at=at(8 + IDLE_TIMEOUT_S),
    )
    assert session.status == "idle"


@pytest.mark.parametrize("cached", [msgspec.UNSET, 0, 7])
async def test_a_count_that_an_upstream_does_not_tell_is_not_kept_as_zero(
    store: Store, cached: int | msgspec.UnsetType
) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    end = ended(a_turn(), usage=Usage(input_tokens=9, output_tokens=1, cached_tokens=cached))
    await store.end_turn(end, runs=said("Hi"), now=T0)
    assert await store.get_turn("s", "t", now=T0) == end
    copy = await store.fork_session("s", at=None, copy_id="copy", now=T0)
    assert copy.cached_tokens == (cached or 0)
    (copied,) = await all_turns(store, "copy", now=T0)
    assert copied.usage == end.usage


async def test_tools_calls_and_outputs_are_kept_whole(store: Store) -> None:
    schema = {"type": "object", "n": [10**300, 1.5, None, {"\0": True}]}
    tools = Tools(functions=(FunctionTool(name="f", parameters=schema, strict=True),), choice=NamedFunction("f"))
    output = Item(id="fco_1", type="function_call_output", role="user", text="", call_id="call_0")
    reasoning = Item(id="msg_1", type="reasoning", role="assistant", text="", encrypted="gAAA", upstream='{"n":1.0}')
    call = Item(id="fc_1", type="function_call", role="assistant", text=UNICODE, call_id="call_1", name="f")
    cut = msgspec.structs.replace(call, id="fc_2", text="", complete=False, upstream="{}")
    await store.create_session(a_session(), now=T0)
    turn = msgspec.structs.replace(a_turn(), tools=tools, system_message=UNICODE)
    turn = msgspec.structs.replace(turn, input=(*turn.input, output))
    await store.begin_turn(turn, now=T0)
    assert await store.get_turn("s", "t", now=T0) == turn
    assert (await store.list_turns("s", limit=1, after=None, now=T0)).data == (turn,)
    end = msgspec.structs.replace(ended(turn), output=(reasoning, call, cut), last_seq=5)
    runs = (Run(STARTED), Run(CALL - 1), *said(UNICODE, item=1), Run(CALL - 2))
    assert await store.end_turn(end, runs=runs, now=T0) is EndResult.KEPT
    assert await store.end_turn(end, runs=runs, now=T0) is EndResult.ALREADY_KEPT
    assert await store.get_turn("s", "t", now=T0) == end
    page = await store.read_events("s", "t")
    assert (page.runs, page.text, page.text_length) == (runs, UNICODE, 0)
    assert (await store.get_session("s", now=T0)).message_count == 4
    assert await store.measure_path("s", "t") == end.in_prompts
    copy = await store.fork_session("s", at=None, copy_id="copy", now=T0)
    assert copy.head is not None
    copied = await store.get_turn("copy", copy.head, now=T0)
    assert copied.tools == tools
    assert [msgspec.structs.replace(item, id="") for item in (*copied.input, *copied.output)] == [
        msgspec.structs.replace(item, id="") for item in (*end.input, *end.output)
    ]
    assert [item.id.partition("_")[0] for item in (*copied.input, *copied.output)] == ["msg", "fco", "msg", "fc", "fc"]
    assert copy.message_count == 4


async def test_options_and_what_a_face_keeps_are_kept_whole(store: Store) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {"enum": [10**300, 1.5, None, "\0"]}}}
    options = Options(
        top_p=0.1,
        text_format=TextFormat(type="json_schema", name="x", schema=schema, description=UNICODE, strict=False),
        reasoning_effort="low",
        verbosity="high",
        presence_penalty=-0.5,
        frequency_penalty=0,
        stop=("", UNICODE),
        seed=-(1 << 62),
    )
    face = {
        "metadata": msgspec.Raw(msgspec.json.encode({UNICODE: [UNICODE]})),
        "n": msgspec.Raw(b"1e2"),
        "": msgspec.Raw(b"null"),
    }
    await store.create_session(a_session(), now=T0)
    turns = [
        msgspec.structs.replace(a_turn("all"), options=options, face=face),
        msgspec.structs.replace(a_turn("empty", parent="all"), face={}),
        a_turn("none", parent="empty"),
    ]
    for turn in turns:
        await store.begin_turn(turn, now=T0)
        assert await store.get_turn("s", turn.id, now=T0) == turn
        end = ended(turn)
        assert await store.end_turn(end, runs=said("Hi"), now=T0) is EndResult.KEPT
        assert await store.end_turn(end, runs=said("Hi"), now=T0) is EndResult.ALREADY_KEPT
        assert await store.get_turn("s", turn.id, now=T0) == end
    assert (await store.get_turn("s", "none", now=T0)).face is msgspec.UNSET
    await store.delete_item("s", "all-out", now=T0)
    await store.fork_session("s", at=None, copy_id="copy", now=T0)
    for session_id in ("s", "copy"):
        kept = await all_turns(store, session_id, now=T0)
        assert [turn.options for turn in kept] == [options, NO_OPTIONS, NO_OPTIONS]
        assert [turn.face for turn in kept] == [face, {}, msgspec.UNSET]


async def test_a_page_of_events_tells_whether_its_turn_had_ended(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    assert not (await store.read_events("s", "t")).ended, "there is no turn"
    for turn in (a_turn(), a_turn("queued", state="queued"), a_turn("silent")):
        await store.begin_turn(turn, now=T0)
        assert not (await store.read_events("s", turn.id)).ended
        runs = () if turn.id == "silent" else said("H", "i")
        await store.end_turn(ended(turn, text="Hi" if runs else ""), runs=runs, now=T0)
        for after in (0, 1, 2, 99):
            assert (await store.read_events("s", turn.id, after=after)).ended


async def test_a_page_of_events_has_few_runs_however_short_they_are(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    pairs = 20_000
    end = ended(a_turn(), reasoning="r" * pairs, text="t" * pairs)
    runs = [run for _ in range(pairs) for run in (*said("r"), *said("t", item=1))]
    await store.end_turn(msgspec.structs.replace(end, last_seq=2 * pairs + 1), runs=runs, now=T0)
    seq = 0
    while (page := await store.read_events("s", "t", after=seq)).runs:
        assert len(page.runs) <= PAGE_LENGTH_MAX // 16
        assert page.text == "rt" * (len(page.runs) // 2)
        seq += count(page.runs)
    assert seq == page.kept == 2 * pairs


async def test_the_first_end_wins_and_the_second_changes_nothing(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    assert await store.end_turn(ended(turn, "cancelled"), runs=said("Hi"), now=at(1)) is EndResult.KEPT
    before = await contents(store, now=at(1))
    usage = Usage(input_tokens=1, output_tokens=1)
    assert await store.end_turn(ended(turn, usage=usage), runs=said("Hi"), now=at(2)) is EndResult.LOST
    assert await contents(store, now=at(1)) == before


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_repeated_end_is_kept_already_and_another_end_is_lost(store: Store, *, is_deleted: bool) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    end = ended(a_turn(), now=at(1))
    assert await store.end_turn(end, runs=said("Hi"), now=at(1)) is EndResult.KEPT
    before = await contents(store, now=at(1))
    if is_deleted:
        await store.mark_deleted("s", now=at(1))
    assert await store.end_turn(end, runs=said("H", "i"), now=at(2), after=0) is EndResult.ALREADY_KEPT
    for other in (
        ended(a_turn(), now=at(2)),
        ended(a_turn(), "cancelled", now=at(1)),
        ended(a_turn(), text="Another", now=at(1)),
        msgspec.structs.replace(end, last_seq=99),
    ):
        assert await store.end_turn(other, runs=(), now=at(2)) is EndResult.LOST
    if is_deleted:
        await store.remove_deleted("s")
        assert await store.end_turn(end, runs=said("Hi"), now=at(2)) is EndResult.LOST
    else:
        assert await contents(store, now=at(1)) == before


async def test_an_end_may_be_as_large_as_a_log_can_be(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn()
    await store.begin_turn(turn, now=T0)
    text = 1024 * "x"
    texts = [f"{number:06d}" for number in range(160 * 1024)] + [1024 * text] * 8
    end = ended(turn, text=1024 * text, reasoning="".join(texts))
    runs = (*said(*texts), *said(1024 * text, item=1))
    assert await store.end_turn(end, runs=runs, now=at(1)) is EndResult.KEPT
    assert await told(store, "s", "t") == [*texts, 1024 * text]
    assert len((await store.get_turn("s", "t", now=at(1))).text) == 1024 * 1024
    assert (await store.get_session("s", now=at(1))).message_count == 2


async def test_an_end_of_an_unknown_turn_is_none(store: Store) -> None:
    assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.LOST
    await store.create_session(a_session(), now=T0)
    before = await contents(store, now=T0)
    assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.LOST
    assert await contents(store, now=T0) == before


async def test_an_empty_reply_is_no_message_and_totals_add_up(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    cases = [
        ("reasoning only", ended(a_turn("a"), "failed", text="", reasoning="hm")),
        ("nothing", ended(a_turn("b"), "interrupted", text="")),
        ("an empty text", msgspec.structs.replace(
            ended(a_turn("c"), text=""), output=(Item(id="o", role="assistant", text=""),)
        )),
    ]  # fmt: skip
    for _, end in cases:
        await store.begin_turn(a_turn(end.id), now=T0)
        await store.end_turn(end, runs=(), now=T0)
    session = await store.get_session("s", now=T0)
    assert (session.message_count, session.input_tokens, session.output_tokens) == (3, 0, 0)
    for name in "de":
        await store.begin_turn(a_turn(name), now=T0)
        usage = Usage(input_tokens=2**33, output_tokens=3, reasoning_tokens=2)
        await store.end_turn(ended(a_turn(name), usage=usage), runs=(), now=T0)
    session = await store.get_session("s", now=T0)
    assert (session.message_count, session.input_tokens, session.output_tokens) == (7, 2**34, 6)


async def test_a_turn_of_another_session_is_not_found(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.create_session(a_session("other"), now=T0)
    turn = a_turn("theirs", "other")
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    with pytest.raises(TurnNotFoundError):
        await store.get_turn("s", "theirs", now=T0)
    with pytest.raises(TurnNotFoundError):
        await store.get_turn("s", "nowhere", now=T0)
    assert await told(store, "s", "theirs") == []
    assert list(await store.read_path("s", "theirs", bytes_max=None)) == []


async def test_turns_are_listed_in_the_order_of_their_acceptance(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.create_session(a_session("other"), now=T0)
    names = ["b", "c", "a", "e", "d"]
    for n, name in enumerate(names):
        # Clocks may run backwards; the order stays.
        turn = msgspec.structs.replace(a_turn(name), created_at=at(-n))
        await store.begin_turn(turn, now=T0)
        await store.begin_turn(a_turn(f"other-{name}", "other"), now=T0)
    for limit in (1, 2, 3, 5, 100):
        assert [turn.id for turn in await all_turns(store, "s", now=T0, limit=limit)] == names
    page = await store.list_turns("s", limit=5, after=None, now=T0)
    assert page.next is None


async def test_a_page_of_turns_stays_where_it_is_while_turns_begin_and_end(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    for name in "abc":
        await store.begin_turn(a_turn(name), now=T0)
    page = await store.list_turns("s", limit=2, after=None, now=T0)
    await store.end_turn(ended(a_turn("a")), runs=(), now=T0)
    await store.begin_turn(a_turn("d"), now=T0)
    page = await store.list_turns("s", limit=2, after=page.next, now=T0)
    assert ([turn.id for turn in page.data], page.next) == (["c", "d"], None)


# The path


async def _grow(store: Store, *turns: TurnRecord) -> None:
    await store.create_session(a_session(), now=T0)
    for turn in turns:
        await store.begin_turn(turn, now=T0)


async def test_the_path_goes_from_the_root_to_the_turn(store: Store) -> None:
    tree = [("a", None), ("b", "a"), ("c", "b"), ("b2", "a"), ("c2", "b2"), ("root2", None)]
    await _grow(store, *(a_turn(name, parent=parent) for name, parent in tree))
    for name, expected in [("c", "a b c"), ("c2", "a b2 c2"), ("a", "a"), ("root2", "root2"), ("nowhere", "")]:
        path = await store.read_path("s", name, bytes_max=None)
        assert [turn.id for turn in path] == expected.split()
    await store.end_turn(ended(a_turn("b", parent="a"), text="reply"), runs=(), now=T0)
    path = await store.read_path("s", "c", bytes_max=None)
    assert path[1] == ended(a_turn("b", parent="a"), text="reply")


async def test_a_bounded_path_has_the_newest_turns_that_fit_but_always_the_last(store: Store) -> None:
    # Sizes in bytes: a 4 (two-byte characters), b 3 (an input of 1, a reply of 2, reasoning free), c 5.
    b = a_turn("b", parent="a", texts=["x"])
    await _grow(store, a_turn("a", texts=["éé"]), b, a_turn("c", parent="b", texts=["123", "45"]))
    await store.end_turn(ended(b, text="é", reasoning="not counted"), runs=(), now=T0)
    expected = {(0, 0): "c", (1, 4): "c", (1, 5): "c", (2, 7): "c", (2, 8): "b c", (3, 11): "b c", (3, 12): "a b c"}
    for (of_turns, of_texts), names in expected.items():
        bytes_max = of_turns * TURN_BYTES + of_texts
        path = await store.read_path("s", "c", bytes_max=bytes_max)
        assert [turn.id for turn in path] == names.split(), bytes_max


async def test_a_bounded_path_has_no_holes(store: Store) -> None:
    await _grow(store, a_turn("a", texts=["1"]), a_turn("b", parent="a", texts=["1234"]), a_turn("c", parent="b"))
    path = await store.read_path("s", "c", bytes_max=2 * TURN_BYTES + len("Hello") + 1)
    assert [turn.id for turn in path] == ["c"], "a would fit, but b before it does not"


async def test_a_long_path_is_whole(store: Store) -> None:
    names = [f"t{n}" for n in range(1500)]
    await _grow(store, *(a_turn(name, parent=names[n - 1] if n else None) for n, name in enumerate(names)))
    path = await store.read_path("s", names[-1], bytes_max=None)
    assert [turn.id for turn in path] == names
    sought = {names[0], names[700], names[-1]}
    assert await store.find_on_path("s", names[-1], among=sought) == sought
    assert len(await store.read_path("s", names[-1], bytes_max=10 * (5 + TURN_BYTES))) == 10


async def test_a_path_is_measured_by_what_it_brings_into_prompts(store: Store) -> None:
    error = Failure("context_too_long", "no")
    ends: list[tuple[str, EndState, str, dict[str, Failure | str], LeftOut]] = [
        ("a", "completed", "é", {}, LeftOut(3, 7)),
        ("b", "completed", "\n", {}, LeftOut(2, 5)),
        ("c", "failed", "half", {}, LeftOut(2, 5)),
        ("d", "failed", "", {"error": error}, LeftOut()),
        ("e", "completed", "", {"finish_reason": "content_filter"}, LeftOut()),
        ("f", "interrupted", "part", {}, LeftOut(3, 9)),
    ]
    await store.create_session(a_session(), now=T0)
    parent, brought = None, LeftOut()
    for name, state, text, changes, brings in ends:
        turn = a_turn(name, parent=parent, texts=["12", "345"])
        await store.begin_turn(turn, now=T0)
        end = ended(turn, state, text=text, reasoning="not counted")
        await store.end_turn(msgspec.structs.replace(end, **changes), runs=(), now=T0)
        parent, brought = name, brought + brings
        assert await store.measure_path("s", name) == brought
    await store.begin_turn(a_turn("beside", parent="a"), now=T0)
    assert await store.measure_path("s", "beside") == LeftOut(4, 12)
    await store.create_session(a_session("other"), now=T0)
    for session_id, turn_id in (("s", "nowhere"), ("other", "a"), ("nowhere", "a")):
        assert await store.measure_path(session_id, turn_id) == LeftOut()


async def test_left_out_is_stored_with_the_end(store: Store) -> None:
    await _grow(store, a_turn())
    end = msgspec.structs.replace(ended(a_turn()), left_out=LeftOut(2, 10**9))
    await store.end_turn(end, runs=(), now=T0)
    assert await store.get_turn("s", "t", now=T0) == end
    copy = await store.fork_session("s", at=None, copy_id="copy", now=T0)
    assert copy.head is not None
    assert (await store.get_turn("copy", copy.head, now=T0)).left_out == LeftOut(2, 10**9)


async def test_a_path_is_listed_in_pages_from_its_root(store: Store) -> None:
    tree = [("a", None), ("b", "a"), ("c", "b"), ("b2", "a"), ("d", "c"), ("e", "d")]
    await _grow(store, *(a_turn(name, parent=parent) for name, parent in tree))
    b = ended(a_turn("b", parent="a"), text="reply")
    await store.end_turn(b, runs=(), now=T0)
    cases = [
        ("e", None, 3, "a b c"),
        ("e", None, 5, "a b c d e"),
        ("e", None, 9, "a b c d e"),
        ("e", "a", 1, "a"),
        ("e", "c", 2, "c d"),
        ("e", "e", 2, "e"),
        ("b2", None, 2, "a b2"),
        ("b2", "b", 2, ""),
        ("c", "d", 2, ""),
        ("e", "nowhere", 2, ""),
        ("nowhere", None, 2, ""),
    ]
    for last, first, limit, names in cases:
        page = await store.list_path("s", last, limit=limit, first=first)
        assert [turn.id for turn in page] == names.split(), (last, first, limit)
    assert list(await store.list_path("s", "e", limit=1, first="b")) == [b]
    assert list(await store.list_path("other", "e", limit=1, first=None)) == []


# Sizes


async def test_large_texts_and_many_events_are_kept(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = a_turn(texts=["\U0001f600" * (64 * 1024)])
    await store.begin_turn(turn, now=T0)
    end = ended(turn, text="é" * (512 * 1024), reasoning="r" * 1024 * 1024)
    texts = ["é"] * 20_000 + ["é" * (512 * 1024 - 20_000)]
    await store.end_turn(end, runs=(*said("r" * 1024 * 1024), *said(*texts, item=1)), now=T0)
    assert await store.get_turn("s", "t", now=T0) == end
    assert await told(store, "s", "t") == ["r" * 1024 * 1024, *texts]


# Recovery and closing


async def test_recovery_leaves_the_turns_of_this_owner_alone(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn("running"), now=T0)
    await store.begin_turn(a_turn("queued", state="queued"), now=T0)
    before = await contents(store, now=T0)
    assert await store.recover(now=at(1)) == 0
    assert await contents(store, now=T0) == before


# Concurrency. Trio starts tasks in a random order, so some rounds see each order.

ROUNDS = 12


async def _both(first: Callable[[], Awaitable[object]], second: Callable[[], Awaitable[object]]) -> list[object]:
    """Run both calls at once; the result or the error of each."""
    results: list[object] = [None, None]

    async def run(n: int, call: Callable[[], Awaitable[object]]) -> None:
        try:
            results[n] = await call()
        except (SessionNotFoundError, SessionExistsError, PreconditionFailedError) as error:
            results[n] = type(error)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, 0, first)
            nursery.start_soon(run, 1, second)
    return results


async def test_one_of_two_creations_wins(store: Store) -> None:
    for n in range(ROUNDS):
        sessions = [a_session(f"s{n}", idle_timeout_s=timeout) for timeout in (60, 70)]
        results = await _both(
            partial(store.create_session, sessions[0], now=T0),
            partial(store.create_session, sessions[1], now=T0),
        )
        assert sorted(results, key=str) == [SessionExistsError, None]
        assert await store.get_session(f"s{n}", now=T0) == sessions[results.index(None)]


async def test_one_of_two_ends_wins(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    for n in range(ROUNDS):
        turn = a_turn(f"t{n}")
        await store.begin_turn(turn, now=T0)
        ends = [ended(turn, "completed"), ended(turn, "cancelled", text="Ho")]
        results = await _both(
            partial(store.end_turn, ends[0], runs=said("Hi"), now=T0),
            partial(store.end_turn, ends[1], runs=said("Ho"), now=T0),
        )
        assert set(results) == {EndResult.KEPT, EndResult.LOST}
        winner = results.index(EndResult.KEPT)
        assert await store.get_turn("s", turn.id, now=T0) == ends[winner]
        assert await told(store, "s", turn.id) == [("Hi", "Ho")[winner]]
    assert (await store.get_session("s", now=T0)).open_turns == 0


async def test_a_session_is_used_or_expires_but_never_both(store: Store) -> None:
    deadline = at(IDLE_TIMEOUT_S)
    for n in range(ROUNDS):
        # The user's clock is a moment behind the sweep's: by this clock the session still exists.
        await store.create_session(a_session(f"s{n}"), now=T0)
        turn = a_turn(f"t{n}", f"s{n}")
        used, removed = await _both(
            partial(store.begin_turn, turn, now=deadline - timedelta(microseconds=1)),
            partial(store.delete_expired, now=deadline, limit=10),
        )
        if removed:
            assert used is SessionNotFoundError
            assert list(await store.read_path(f"s{n}", turn.id, bytes_max=None)) == []
        else:
            assert BegunTurn(await store.get_session(f"s{n}", now=deadline)) == used
            assert await store.get_turn(f"s{n}", turn.id, now=deadline) == turn


async def test_a_session_takes_a_turn_or_is_deleted_first(store: Store) -> None:
    for n in range(ROUNDS):
        await store.create_session(a_session(f"s{n}"), now=T0)
        turn = a_turn(f"t{n}", f"s{n}")
        begun, marked = await _both(
            partial(store.begin_turn, turn, now=T0),
            partial(store.mark_deleted, f"s{n}", now=T0),
        )
        assert marked is None
        kept = list(await store.read_path(f"s{n}", turn.id, bytes_max=None))
        assert kept == ([] if begun is SessionNotFoundError else [turn])
        assert await contents(store, now=T0) == {}


async def test_one_of_two_changes_of_one_revision_happens(store: Store) -> None:
    for n in range(ROUNDS):
        await store.create_session(a_session(f"s{n}"), now=T0)
        seen = [rules.revision_of(a_session(f"s{n}"))]
        changed, deleted = await _both(
            partial(store.update_session, f"s{n}", SessionPatch(title="new"), now=T0, revisions=seen),
            partial(store.mark_deleted, f"s{n}", now=T0, revisions=seen),
        )
        if deleted is PreconditionFailedError:
            assert changed == await store.get_session(f"s{n}", now=T0)
        else:
            assert (changed, deleted) == (SessionNotFoundError, None)


async def test_one_of_two_deletions_marks(store: Store) -> None:
    for n in range(ROUNDS):
        await store.create_session(a_session(f"s{n}"), now=T0)
        results = await _both(*[partial(store.mark_deleted, f"s{n}", now=T0)] * 2)
        assert sorted(results, key=str) == [SessionNotFoundError, None]


async def test_many_at_once_lose_nothing(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    names = [f"t{n}" for n in range(50)]

    async def one(name: str) -> None:
        turn = a_turn(name, state="queued")
        await store.begin_turn(turn, now=T0)
        await store.start_turn(name, now=T0)
        usage = Usage(input_tokens=1, output_tokens=2, reasoning_tokens=1, cached_tokens=1)
        assert await store.end_turn(ended(turn, text=name, usage=usage), runs=said(name), now=T0) is EndResult.KEPT

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(one, name)
    session = await store.get_session("s", now=T0)
    assert (session.open_turns, session.message_count) == (0, 100)
    assert (session.input_tokens, session.output_tokens) == (50, 100)
    assert (session.reasoning_tokens, session.cached_tokens) == (50, 50)
    turns = await all_turns(store, "s", now=T0, limit=7)
    assert sorted(turn.id for turn in turns) == sorted(names)
    assert session.head == turns[-1].id, "the head is what was accepted last"
    for name in names:
        assert await told(store, "s", name) == [name]


async def test_the_session_of_a_turn_is_found_by_the_turn_alone(store: Store) -> None:
    for name in ("s", "blue/s"):
        await store.create_session(a_session(name), now=T0)
        await store.begin_turn(a_turn(f"turn of {name}", name), now=T0)
        await store.end_turn(ended(a_turn(f"turn of {name}", name)), runs=(), now=T0)
    copy = await store.fork_session("s", at=None, copy_id="copy", now=T0)
    assert copy.head is not None
    assert await store.find_session_of("turn of s") == "s"
    assert await store.find_session_of("turn of blue/s") == "blue/s"
    assert await store.find_session_of(copy.head) == "copy"
    assert await store.find_session_of("turn") is None
    await store.delete_turns("copy", copy.head, now=T0)
    assert await store.find_session_of(copy.head) is None
    await store.mark_deleted("blue/s", now=T0)
    await store.remove_deleted("blue/s")
    assert await store.find_session_of("turn of blue/s") is None
