"""The body of an event stream: reads an event log from a seq on."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import structlog
import trio
from msgspec import Meta
from quart import Request, request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from service.api.http.event_frames import EncodeFrame, read_frames
from service.api.http.face_frames import BEGINNING, Face, FaceEncoder, Place, encoder_of
from service.api.http.held_bytes import bytes_of
from service.api.http.long_frames import LongFrames
from service.api.http.query_params import read_query
from service.api.http.request_record import record_of
from service.api.http.request_resources import release_after_request
from service.api.http.strict_json import shown
from service.api.http.wire_types import SEQ_PATTERN, Query
from service.errors import EventsDeletedError, InvalidRequestError, SessionNotFoundError, StoreError
from service.freezes import current_watch
from service.sessions.events.event_log import Events
from service.sessions.events.streams import StreamSlot

logger = structlog.get_logger("lastcall.stream")

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
"""Keep proxies from storing, compressing or buffering a stream: Express' ``compression`` reads the first, nginx the
second."""
RETRY_MS = 1000
_RETRY = b"retry: %d\n" % RETRY_MS
_HEARTBEAT = b": heartbeat\n"
"""``retry:`` and heartbeat do not end with a blank line: they are part of the next event's block. Decoders that keep
the last id, such as httpx-sse 0.4.3, would take a blank line for an empty event."""
_HEARTBEAT_BLOCK = b": heartbeat\n\n"
"""The comment of streams without ids, for decoders that read blocks and look only at the first line of each."""
MOVED = b": moved\n"
"""What a stream says before it ends without a terminal event, because its turn goes on in another process: the client
resumes it there."""
MOVED_BLOCK = b": moved\n\n"
_WRITE_BYTES_MAX = 64 * 1024
_BUSY_S = 0.02
"""A write that takes longer is followed by a pause. It takes less than a millisecond if the event loop is not busy."""
_PAUSE_MAX_S = 0.1
_INLINE_BYTES_MAX = 4096
"""A piece that is larger is left to the stream's task, after which others get their turn."""
PIECE_WRITER = "lastcall.piece_writer"
"""Key in the ASGI scope of the host's :class:`PieceWriter`, once the head of an event stream was sent."""
ENDS_UNREAD = "lastcall.ends_unread"
"""Key in the ASGI scope of a request whose event stream loses nothing by its end. So it does not wait for a client that
does not read: it ends after ``unread_timeout_s``, as an answer does."""
_SEQ_DIGITS_MAX = 15
_ACCEPT_LENGTH_MAX = 2048


def is_event_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a response with these headers is an event stream."""
    return any(name.lower() == b"content-type" and value.startswith(MEDIA_TYPE.encode()) for name, value in headers)


class LastPiece(bytes):
    """The last piece of a body. Its sender may send the end of the response together with it."""


class PieceWriter(Protocol):
    """What a host offers to an event stream: writes pieces of its body without a wait.

    Attributes:
        has_rest: Whether a part of the last piece is not written. The next piece that the body yields comes after it,
            also an empty piece.
    """

    @property
    def has_rest(self) -> bool: ...

    def write_now(self, piece: bytes) -> bool:
        """Write a piece, which is not empty, as far as the client's connection takes it now. Raises nothing.

        Returns False if the connection took nothing: then nothing has happened.
        """
        ...


class EventStream(ResponseBody):
    """Yields all events that are ready as one piece, and a comment after silence. Ends with the log.

    If the turn goes on elsewhere, it ends after a comment that says so, without a terminal event.

    While it waits for an event and the host offers a :class:`PieceWriter`, the task that appends an event writes it:
    :meth:`take_appended`. The stream's own task goes on where the connection takes no more, where the event loop is
    busy, in a stop that writes only ends, and at the end.

    It waits only in ``__anext__``: no write happens inside of a cancel scope of this class, so no chunk is lost to a
    cancellation. The slot is closed as ended when the piece after the one with the terminal event is asked for: then
    the terminal event has been sent.

    Args:
        after: The last seq that the client has seen.
        encode: The face's frame of an event.
        opening: What the stream begins with, in one piece with the events that are ready.
        heartbeat: The comment after silence.
        moved: The comment before the end of a stream whose turn goes on elsewhere.
        cut: The last frame of a stream that ends early, for clients that would take its end for that of a whole stream.
        encoder: Opens the frames that ``encode`` leaves out because they are long.
        seen: If the first frames are long, the stream begins with those whose numbers are not below this one.
        scope: The ASGI scope of the request.
    """

    def __init__(
        self,
        log: Events,
        slot: StreamSlot,
        *,
        after: int,
        encode: EncodeFrame,
        opening: bytes = _RETRY,
        heartbeat: bytes = _HEARTBEAT,
        moved: bytes = MOVED,
        cut: bytes = b"",
        encoder: FaceEncoder | None = None,
        seen: int = 0,
        scope: Mapping[str, Any],
    ) -> None:
        self._encoder = encoder
        self._seen = seen
        self._long: LongFrames | None = None
        self._scope = scope
        self._cut = cut
        self._opening = opening
        self._heartbeat = heartbeat
        self._moved = moved + cut
        self._writer: PieceWriter | None = None
        self._watch = current_watch()
        self._log = log
        self._encode = encode
        self._slot = slot
        self._seq = after
        self._begun = False
        self._caught_up = False
        self._taken_at = 0.0
        self._held_bytes = 0
        self._ended = self._is_cut = False
        slot.progress = self

    @property
    def seq(self) -> int:
        """The last seq that was written."""
        return self._seq

    @property
    def turn_id(self) -> str:
        """Whose events they are; empty if that is not known."""
        return self._log.turn_id

    def __repr__(self) -> str:
        return f"<EventStream at seq {self._seq} of {self._log!r}>"

    async def __aenter__(self) -> "EventStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # this may never run: the request gives the slot back

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> bytes:
        if self._ended or self._is_cut:
            self._slot.close(ended=self._ended)
            raise StopAsyncIteration
        if self._long is not None:
            await trio.lowlevel.checkpoint()
            return self._take_long(self._long)
        if not self._begun:
            self._begun = True
            self._writer = self._scope.get(PIECE_WRITER)
            return self._take(self._opening) or self._heartbeat
        await self._pause()
        await self._slot.wait_beyond(self._log, self._seq, reader=self)
        if self._slot.is_ends_only():
            await self._log.wait_closed()
        if not await self._load():
            return self._end_early()
        return self._take() or (b"" if self._has_rest else self._heartbeat)

    @property
    def _has_rest(self) -> bool:
        return self._writer is not None and self._writer.has_rest

    def take_appended(self, now: float) -> bool:
        """Write the new events in the task that appended them. See :class:`~event_log.InlineReader`."""
        writer, log = self._writer, self._log
        if writer is None or not self._slot.may_write() or (self._watch and self._watch.steps_took_s > _BUSY_S):
            return False
        piece, seq = read_frames(log, self._seq, encode=self._encode, bytes_max=_INLINE_BYTES_MAX)
        if not piece:
            return seq == log.last_seq
        if seq != log.last_seq or len(piece) > _INLINE_BYTES_MAX or not writer.write_now(piece):
            return False
        self._seq = seq
        self._slot.silent_since = now
        return not writer.has_rest

    async def _load(self) -> bool:
        """Load the next events of a replay. Returns False if that fails: the stream was cut."""
        try:
            await self._log.load_after(self._seq)
        except (StoreError, SessionNotFoundError, EventsDeletedError) as error:
            logger.warning("a replay was cut", log=repr(self._log), seq=self._seq, error=str(error))
            return False
        return True

    def _end_early(self) -> bytes:
        """The last frame of a stream that was cut. It ends here if there is no such frame in its face."""
        self._is_cut = True
        self._note_end("cut")
        if self._cut:
            return LastPiece(self._cut)
        self._slot.close()
        raise StopAsyncIteration

    async def _pause(self) -> None:
        """Pause if the last piece took long to write, because the event loop is busy or the client slow.

        Tokens that arrive during the pause go out in one piece, so there are fewer pieces and less load. An event loop
        that is not busy never pauses. The terminal event ends a pause.
        """
        writing_took_s = trio.current_time() - self._taken_at
        if writing_took_s > _BUSY_S and self._caught_up:
            with trio.move_on_after(min(writing_took_s, _PAUSE_MAX_S)):
                await self._log.wait_closed()

    def _take(self, before: bytes = b"") -> bytes:
        chunk, self._seq = read_frames(self._log, self._seq, encode=self._encode, bytes_max=_WRITE_BYTES_MAX)
        if not chunk and self._encoder is not None and self._seq < self._log.last_seq:
            self._long = self._encoder.open_long(self._log, self._seq, seen=self._seen, held=bytes_of(self._scope))
            if self._long is not None:
                return before + self._take_long(self._long)
        chunk += self._note_taken()
        if self._held_bytes or len(chunk) > _WRITE_BYTES_MAX:
            self._hold(len(chunk))
        return LastPiece(before + chunk) if self._ended else before + chunk

    def _take_long(self, frames: LongFrames) -> bytes:
        """The next piece of long frames."""
        piece = frames.take()
        if not frames.is_over:
            return piece
        self.close_long()
        self._seq = self._log.read_after(self._seq)[0].seq
        self._seen = 0
        piece += self._note_taken()
        return LastPiece(piece) if self._ended else piece

    def _note_taken(self) -> bytes:
        """Note how far the stream has come. Returns what it says at its end, if its turn goes on elsewhere."""
        self._caught_up = self._seq == self._log.last_seq
        self._taken_at = trio.current_time()
        self._ended = self._log.closed and self._caught_up
        if self._ended and self._log.is_moved:
            self._note_end("moved")
            return self._moved
        return b""

    def _note_end(self, end: Literal["cut", "moved"]) -> None:
        if (record := record_of(self._scope)) is not None:
            record.stream_end = end

    def close_long(self) -> None:
        """Hold no long frames any more: they were read, or the request is over. Idempotent."""
        if self._long is not None:
            self._long.close()
            self._long = None

    def _hold(self, size: int) -> None:
        """Count a large piece until the next one is asked for: an event that repeats a whole text, in some faces."""
        size = size if size > _WRITE_BYTES_MAX else 0
        bytes_of(self._scope).add(size - self._held_bytes)
        self._held_bytes = size


def stream_response(
    log: Events, slot: StreamSlot, *, after: int, encode: EncodeFrame, cut: bytes = b""
) -> TrioResponse:
    """Return a response that streams a log from ``after`` on. The end of the request always gives the slot back.

    If the stream ends early, ``cut`` is its last frame.
    """
    release_after_request(slot.close)
    body = EventStream(log, slot, after=after, encode=encode, cut=cut, scope=request.scope)
    return TrioResponse(body, headers=HEADERS, content_type=MEDIA_TYPE)


def stream_face(
    log: Events, slot: StreamSlot, *, face: Face, place: Place = BEGINNING, cut: bytes = b""
) -> TrioResponse:
    """Return a response that streams a log in a face from a place on, as :func:`stream_response` does.

    See :mod:`service.api.http.face_frames`.
    """
    release_after_request(slot.close)
    body = face_stream(log, slot, face=face, place=place, cut=cut, scope=request.scope)
    release_after_request(body.close_long)
    return TrioResponse(body, headers=HEADERS, content_type=MEDIA_TYPE)


def face_stream(
    log: Events, slot: StreamSlot, *, face: Face, place: Place, cut: bytes, scope: Mapping[str, Any]
) -> EventStream:
    """Return the body of a stream in a face from a place on."""
    encoder = encoder_of(log, face)
    return EventStream(
        log,
        slot,
        after=place.seq,
        encode=encoder.encode,
        opening=place.rest,
        heartbeat=_HEARTBEAT_BLOCK,
        moved=MOVED_BLOCK,
        cut=cut,
        encoder=encoder,
        seen=place.seen,
        scope=scope,
    )


LastEventId = Annotated[
    str,
    Meta(pattern=SEQ_PATTERN, description="The id of the last event that was seen; wins over `after`. Empty: none."),
]


class EventsQuery(Query, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """``?after=12``: only the events with a larger seq. ``?lastEventId=12``: the same, in the form of a polyfill.

    The header ``Last-Event-ID`` wins over the parameters of that name, and they win over ``after``: a client that
    reconnects repeats its first URL, and adds the id that it has seen last. Other names are ignored,
    because clients add parameters of their own against caches.
    """

    after: Annotated[int, Meta(ge=0, le=10**15, description="The seq of the last event that was seen.")] = 0
    last_event_id: LastEventId = msgspec.field(default="", name="lastEventId")
    last_event_id_too: LastEventId = msgspec.field(default="", name="Last-Event-ID")


class Seen(NamedTuple):
    """The last seq that a client has seen, 0 for none, and the name of the header or parameter that it came in."""

    seq: int
    field: str


def read_seen(request: Request) -> Seen:
    """Read the last seq that a client has seen: from ``Last-Event-ID``, else the query's id, else ``?after=``.

    The order is this one because a client that reconnects repeats its first URL. An empty id counts as no id.

    Raises:
        InvalidRequestError: One of the three is not an event's id, also if another one wins; or the query has two ids
            that differ.
    """
    query = read_query(request, EventsQuery)
    said = read_last_event_id(request)
    if query.last_event_id and query.last_event_id_too and query.last_event_id != query.last_event_id_too:
        raise InvalidRequestError("lastEventId and Last-Event-ID differ; send one of them.", field="lastEventId")
    if said is not None:
        return Seen(said, "Last-Event-ID")
    if query.last_event_id:
        return Seen(int(query.last_event_id), "lastEventId")
    if query.last_event_id_too:
        return Seen(int(query.last_event_id_too), "Last-Event-ID")
    return Seen(query.after, "after")


def read_last_event_id(request: Request) -> int | None:
    """Read the header ``Last-Event-ID``; None if it is missing or empty, as from a client that has seen no event.

    Raises:
        InvalidRequestError: The header is not the id of an event.
    """
    said = ", ".join(request.headers.getlist("Last-Event-ID"))
    if not said:
        return None
    if not (said.isascii() and said.isdigit() and len(said) <= _SEQ_DIGITS_MAX):
        raise InvalidRequestError(
            f"The id of an event is its seq, a whole number; {shown(said)!r} is not one.", field="Last-Event-ID"
        )
    return int(said)


def wants_stream(request: Request) -> bool:
    """Whether the client accepts ``text/event-stream`` and does not prefer JSON.

    Only the first 2048 characters of its ``Accept`` are read: to order thousands of media types takes milliseconds.
    """
    accepted = request.headers.get("Accept", "")[:_ACCEPT_LENGTH_MAX]
    if MEDIA_TYPE not in accepted.lower():
        return False
    accept = parse_accept_header(accepted, MIMEAccept)
    named: dict[str, float] = {}
    for value, quality in accept:
        media_type = value.partition(";")[0].rstrip().lower()  # a parameter such as charset changes nothing
        named[media_type] = max(quality, named.get(media_type, 0))
    stream, json = named.get(MEDIA_TYPE, 0), "application/json"
    return stream > 0 and stream >= named.get(json, accept.quality(json))
