"""What the answers of all faces have in common: a turn is started, or found, and answered as a stream or at its end.

A face says how a turn looks (:class:`TurnFace`).
"""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from math import inf
from sys import getsizeof
from typing import NamedTuple, Protocol, cast

from msgspec import UNSET
from quart import Request, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, no_content
from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.held_bytes import RequestBytes, bytes_of
from service.api.http.locations import located, turn_path
from service.api.http.proxy import (
    SLOT,
    allow_longer_answer,
    is_from_peer,
    note_accepted,
    release_later,
    was_passed_to_owner,
)
from service.api.http.repeats import allow_repeat
from service.api.http.request_body import drop_body
from service.api.http.request_resources import release_after_request
from service.errors import (
    EventsDeletedError,
    EventsLostError,
    InvalidRequestError,
    MadeIsGoneError,
    RepeatedError,
    ResumeConflictError,
    ShuttingDownError,
    TurnMovedError,
    TurnNotFoundError,
)
from service.sessions.active.keyed_calls import gone_if_not_found
from service.sessions.commands import NewTurn
from service.sessions.events.event_log import Events
from service.sessions.events.streams import StreamSlot
from service.sessions.turns.turn import Turn, Watch
from service.settings import Settings
from service.storage.records import IdempotencyKey, Places, TurnRecord
from service.supervisor import Service

_FACES = ("chat_completions", "responses")
"""The faces beside the native one, by the names of their blueprints."""

Newest = Callable[[], Awaitable[tuple[str, Events, Watch]]]
"""Finds the turn of a client that has come back without a key."""


class FoundTurn(NamedTuple):
    """A turn with its events. There is no checkpoint between taking the watch and the return of this."""

    session_id: str
    turn_id: str
    log: Events
    watch: Watch


class TurnFace(Protocol):
    """How a face shows turns."""

    def path(self, session_id: str, turn_id: str) -> str:
        """The path of a turn, without the prefix."""
        ...

    def continue_streams(self) -> None:
        """Let a stream that answers the current request go on here if its owner dies.

        Called before the step that may find another process as the owner.
        """
        ...

    async def stream(self, opened: FoundTurn, slot: StreamSlot, *, after: int) -> TrioResponse:
        """The turn's events, after those that the client has seen. The watch is released with the request already."""
        ...

    async def show(
        self,
        service: Service,
        record: TurnRecord,
        status: int = 200,
        *,
        with_location: bool = False,
        places: Places | None = None,
    ) -> TrioResponse:
        """The turn. ``places`` has its place in the tree, if the caller knows this already."""
        ...


def take_slot(service: Service) -> StreamSlot:
    """Take the slot of the answer's stream, before any work for the request begins.

    A request has one slot, also if its handler runs again (see :mod:`service.api.http.proxy`).

    Raises:
        StreamLimitError
    """
    scope = cast("dict[str, StreamSlot]", request.scope)
    if SLOT not in scope:
        scope[SLOT] = service.sessions.streams.open_stream(_face_of(request))
        release_after_request(scope[SLOT].release_unused)  # has an effect only if the answer is no stream
    return scope[SLOT]


def _face_of(asked: Request) -> str:
    """The face of the API that a request uses, as the metrics call it.

    A stream for another process is ``forwarded``: there it has its face.
    """
    if is_from_peer():
        return "forwarded"
    return asked.blueprint if asked.blueprint in _FACES else "native"


async def answer_new(service: Service, session_id: str, new: NewTurn, face: TurnFace, *, streams: bool) -> TrioResponse:
    """Start a turn, and answer it: at once with ``background``, as a stream, or when it has ended.

    If an earlier request with the same key has started it, answer that turn.
    """
    if not new.background:
        leave_at_end_of_input()
    if streams:
        return await start_streaming(service, session_id, new, face)
    allow_longer_answer(by_s=acceptance_s(service, new) if new.background else inf)
    try:
        turn, watch = await start(service, session_id, new)
    except RepeatedError as repeated:
        return await answer_made(service, repeated, face, streams=False, background=new.background)
    if new.background:
        watch.release()
        accepted = Places(turn.id, {turn.id: turn.siblings})
        return await face.show(service, turn.record(), 202, with_location=True, places=accepted)
    release_later(watch)
    note_accepted(turn_path(turn.session_id, turn.id))
    return await face.show(service, await turn.wait_ended(), with_location=True)


async def start_streaming(service: Service, session_id: str, new: NewTurn, face: TurnFace) -> TrioResponse:
    """Start a turn, and answer its events as a stream."""
    face.continue_streams()
    slot = take_slot(service)  # before any work
    allow_longer_answer(by_s=acceptance_s(service, new))
    try:
        turn, watch = await start(service, session_id, new)
    except RepeatedError as repeated:
        return await answer_made(service, repeated, face, streams=True, background=False)
    release_later(watch)
    opened = FoundTurn(turn.session_id, turn.id, turn.log, watch)
    response = await face.stream(opened, slot, after=0)
    response.headers["Location"] = located(face.path(turn.session_id, turn.id))
    return response


async def start(service: Service, session_id: str, new: NewTurn) -> tuple[Turn, Watch]:
    """Start a turn. There is no checkpoint after its acceptance, so the watch cannot get lost."""
    with ExitStack() as stack:
        held = stack.enter_context(_input_held(new, service.settings))
        try:
            turn, watch = await service.sessions.start_turn(session_id, new)
        except TurnNotFoundError as error:  # the missing turn is the body's ``parent``: 422, not 404
            raise InvalidRequestError(str(error), field="parent") from None
        except ShuttingDownError as error:
            if not (error.untouched and was_passed_to_owner()):
                raise  # the process that serves in this one's place looks at the request first
            refusal = error
        else:
            stack.pop_all()
            turn.when_over.append(held.release)
            drop_body(request)
            return turn, watch
    await service.sessions.make_way(session_id, new)
    raise refusal


def _input_held(new: NewTurn, settings: Settings) -> RequestBytes:
    """Count a large input until its turn has ended and the streams of the turn were read: the input, and the request to
    the model server with it.

    Smaller inputs are bounded by the number of turns. Of the largest ones no more than a half of the bound is counted,
    so that there is room for each of them.

    Raises:
        HeldBytesLimitError: There is no room for the input.
    """
    held = bytes_of(request.scope).beside()
    size = sum([getsizeof(part) for item in new.items for part in (item.text, item.encrypted, item.upstream)])
    if size > settings.input_bytes_max:
        held.take(min(2 * size, settings.held_bytes_max // 2))
    return held


def acceptance_s(service: Service, new: NewTurn) -> float:
    """Return how much longer than one step of the store an acceptance in another process may take.

    In one of an earlier version it takes three steps. In a reload a turn that queues or branches waits for the turns of
    a process that drains.
    """
    settings = service.settings
    waits = new.on_conflict == "queue" or new.parent is not UNSET
    draining_s = settings.drain_timeout_s + settings.cleanup_timeout_s if waits else 0
    return 2 * settings.store_timeout_s + draining_s


# Turns that earlier requests have started


async def resume_streaming(
    service: Service,
    session_id: str | None,
    newest: Newest,
    face: TurnFace,
    *,
    after: int,
    key: IdempotencyKey | None,
) -> TrioResponse:
    """Answer a turn's events after ``after``, for a client that has come back; 204 if none is left."""
    allow_repeat()
    face.continue_streams()
    slot = take_slot(service)
    opened = await resume(service, session_id, newest, after=after, key=key)
    return await stream_again(slot, opened, face, after=after)


async def resume(
    service: Service, session_id: str | None, newest: Newest, *, after: int, key: IdempotencyKey | None
) -> FoundTurn:
    """Find the turn of a client that has come back: the one with its key, else the session's newest one.

    Raises:
        ResumeConflictError: There is no such turn.
    """
    allow_repeat()
    if key is not None:
        try:
            await service.sessions.check_key(key)
        except RepeatedError as repeated:
            return await open_made(service, repeated, after=after)
    if session_id is None:
        raise ResumeConflictError(
            "Last-Event-ID asks for an earlier turn, and no session is named.", field="session_id"
        )
    return FoundTurn(session_id, *await newest())


async def open_made(service: Service, repeated: RepeatedError, *, after: int = 0) -> FoundTurn:
    """Open the turn that an earlier request with the same key has started.

    Raises:
        MadeIsGoneError
        EventsDeletedError: A part of the turn was deleted.
        ResumeConflictError: The turn has fewer events than ``after``.
    """
    session_id, turn_id = repeated.session_id, repeated.turn_id
    assert turn_id is not None, "the same request has started a turn"
    try:
        with gone_if_not_found(repeated):
            log, watch = await service.sessions.open_events(session_id, turn_id, after=after)
    except EventsDeletedError as error:
        refusal = error
    else:
        if after > log.last_seq:
            watch.release()
            raise ResumeConflictError(
                f"The turn with this Idempotency-Key, {turn_id!r}, has {log.last_seq} events so far, and not {after}.",
                field="Last-Event-ID",
                session_id=session_id,
                turn_id=turn_id,
            )
        return FoundTurn(session_id, turn_id, log, watch)
    await _read_made(service, repeated, turn_id, with_texts=False)
    raise refusal


async def _read_made(service: Service, repeated: RepeatedError, turn_id: str, *, with_texts: bool = True) -> TurnRecord:
    """Read the turn that an earlier request with the same key has started.

    Raises:
        MadeIsGoneError: Also if the turn is there, because others follow it, and all that it said was deleted: shown as
            it is, it would look like a whole reply without a text.
    """
    with gone_if_not_found(repeated):
        record = await service.sessions.get_turn(repeated.session_id, turn_id, with_texts=with_texts)
    if record.is_emptied:
        raise MadeIsGoneError(session_id=repeated.session_id, turn_id=turn_id)
    return record


async def answer_made(
    service: Service, repeated: RepeatedError, face: TurnFace, *, streams: bool, background: bool, after: int = 0
) -> TrioResponse:
    """Answer the turn that an earlier request with the same key has started."""
    find = partial(open_made, service, repeated, after=after)
    if streams:
        face.continue_streams()
        slot = take_slot(service)
        return await stream_again(slot, await find(), face, after=after)
    return await answer_again(find, partial(_read_made, service, repeated), face, background=background)


async def stream_again(slot: StreamSlot, opened: FoundTurn, face: TurnFace, *, after: int) -> TrioResponse:
    """Answer the events of a turn that was started before, after ``after``; 204 if none is left."""
    release_later(opened.watch)
    drop_body(request)
    if opened.log.has_ended and after == opened.log.last_seq:
        response = no_content()
    else:
        leave_at_end_of_input()
        response = await face.stream(opened, slot, after=after)
    response.headers["Location"] = located(face.path(opened.session_id, opened.turn_id))
    return response


async def answer_again(
    find: Callable[[], Awaitable[FoundTurn]],
    read: Callable[[str], Awaitable[TurnRecord]],
    face: TurnFace,
    *,
    background: bool,
) -> TrioResponse:
    """Answer a turn that was started before, without a stream: at once with ``background``, else when it has ended.

    Events that are gone are not missed: a turn without its events has ended.

    Args:
        read: Reads the record of the turn with this id.
    """
    service = current_service()
    allow_longer_answer(by_s=service.settings.store_timeout_s if background else inf)
    try:
        session_id, turn_id, log, watch = await find()
    except (EventsDeletedError, EventsLostError) as events_gone:
        turn_id = events_gone.turn_id
        drop_body(request)
    else:
        release_later(watch)
        drop_body(request)
        if not background:
            leave_at_end_of_input()
            note_accepted(turn_path(session_id, turn_id))
            await log.wait_closed()
            if log.is_moved:
                raise TurnMovedError(session_id=session_id, turn_id=turn_id)
    record = await read(turn_id)
    return await face.show(service, record, 202 if background else 200, with_location=True)
