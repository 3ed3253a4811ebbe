"""Sessions and turns for a store, and functions that read all of its contents."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from service.errors import OwnedElsewhereError
from service.models.client import Usage
from service.storage.pieces import Run, last_seq, run_of
from service.storage.records import AdoptedTurn, EndState, Item, Page, SessionRecord, TurnRecord, TurnState
from service.storage.store import PAGE_LENGTH_MAX, Store

T0 = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
"""The first moment of the tests. With microseconds: a store that drops them fails."""

IDLE_TIMEOUT_S = 60.0
PAGES_MAX = 100

T = TypeVar("T")


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def a_session(session_id: str = "s", *, created: float = 0, idle_timeout_s: float = IDLE_TIMEOUT_S) -> SessionRecord:
    return SessionRecord(
        id=session_id,
        created_at=at(created),
        last_accessed_at=at(created),
        expires_at=at(created + idle_timeout_s),
        idle_timeout_s=idle_timeout_s,
    )


def a_turn(
    turn_id: str = "t",
    session_id: str = "s",
    *,
    parent: str | None = None,
    state: TurnState = "running",
    texts: Iterable[str] = ("Hello",),
) -> TurnRecord:
    return TurnRecord(
        id=turn_id,
        session_id=session_id,
        parent=parent,
        state=state,
        model="a-model",
        created_at=T0,
        started_at=T0 if state == "running" else None,
        input=tuple(Item(id=f"{turn_id}-in-{n}", role="user", text=text) for n, text in enumerate(texts)),
    )


def ended(
    turn: TurnRecord,
    state: EndState = "completed",
    *,
    text: str = "Hi",
    reasoning: str = "",
    usage: Usage | None = None,
    now: datetime = T0,
) -> TurnRecord:
    """The ended turn, as ``end_turn`` takes it."""
    output = []
    if reasoning:
        output.append(Item(id=f"{turn.id}-reasoning", type="reasoning", role="assistant", text=reasoning))
    if text:
        output.append(Item(id=f"{turn.id}-out", role="assistant", text=text))
    return msgspec.structs.replace(
        turn,
        state=state,
        ended_at=now,
        output=tuple(output),
        usage=usage,
        finish_reason="stop" if state == "completed" else None,
        reason="requested" if state == "cancelled" else None,
        last_seq=3,
    )


async def all_sessions(store: Store, *, now: datetime, limit: int = 100) -> list[SessionRecord]:
    return await _all_pages(lambda after: store.list_sessions(limit=limit, after=after, status=None, now=now))


async def all_turns(store: Store, session_id: str, *, now: datetime, limit: int = 100) -> list[TurnRecord]:
    return await _all_pages(lambda after: store.list_turns(session_id, limit=limit, after=after, now=now))


async def _all_pages(read: Callable[[str | None], Awaitable[Page[T]]]) -> list[T]:
    found: list[T] = []
    page = await read(None)
    for _ in range(PAGES_MAX):
        found += page.data
        if page.next is None:
            return found
        assert page.data, "an empty page is the last one"
        page = await read(page.next)
    raise AssertionError("a listing has no end")


def said(*texts: str, item: int = 0) -> tuple[Run, ...]:
    """The events of pieces of one item, with these texts."""
    return (run_of(item, list(map(len, texts))),) if texts else ()


async def told(store: Store, session_id: str, turn_id: str, *, length_max: int = PAGE_LENGTH_MAX) -> list[str]:
    """The texts of all events of a turn that are pieces, read page by page."""
    texts: list[str] = []
    after = 0
    while (page := await store.read_events(session_id, turn_id, after=after, length_max=length_max)).runs:
        assert page.after == after
        start = 0
        for length in (length for run in page.runs if run.item >= 0 for length in run.pieces()):
            texts.append(page.text[start : start + length])
            start += length
        assert start == len(page.text)
        after = last_seq(page.runs, after)
    assert page.kept == after
    return texts


Contents = dict[str, tuple[SessionRecord, list[tuple[TurnRecord, list[str]]]]]


async def contents(store: Store, *, now: datetime) -> Contents:
    """All that a reader can find at ``now``: each session with its turns and their events."""
    found: Contents = {}
    for session in await all_sessions(store, now=now):
        turns = await all_turns(store, session.id, now=now)
        found[session.id] = (
            session,
            [(turn, await told(store, session.id, turn.id)) for turn in turns],
        )
    return found


async def adopt(store: Store, session_id: str = "s", **options: Any) -> Sequence[AdoptedTurn]:
    """Adopt the turns of one session, whose model can continue. Raises: OwnedElsewhereError."""
    options = {"now": at(5), "continues": lambda _: True, **options}
    adoption = (await store.adopt_turns([session_id], **options))[session_id]
    if adoption.owner is not None:
        raise OwnedElsewhereError(session_id, fence=adoption.owner.fence, address=adoption.owner.address)
    return adoption.turns


async def suspended_in(store: Store, *, limit: int = 100) -> list[str]:
    """The sessions whose turns are suspended, in the order of their listing."""
    return [it.id for it in await store.list_suspended(limit=limit)]
