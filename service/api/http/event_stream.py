"""The body of an event stream: a cursor on its way through an event log."""

from typing import NamedTuple

import trio
from quart import Request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from service.api.http.query_params import read_query
from service.api.http.request_resources import release_after_request
from service.api.http.strict_json import shown
from service.api.native.wire import EventsQuery
from service.errors import InvalidRequestError
from service.sessions.events.event_log import EventLog
from service.sessions.events.streams import StreamSlot

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
"""Proxies are to keep, compress and hold back nothing: Express' ``compression`` heeds the one, nginx the other."""
RETRY_MS = 1000
_RETRY = b"retry: %d\n" % RETRY_MS
_HEARTBEAT = b": heartbeat\n"
"""Neither ends with a blank line, which would be an empty event to decoders that remember the last id: httpx-sse 0.4.3.
Both are part of the block of the next event."""
_WRITE_BYTES_MAX = 64 * 1024
_BUSY_S = 0.02
"""Writing a piece takes a fraction of a millisecond, unless the event loop has many others to write."""
_PAUSE_MAX_S = 0.1
_SEQ_DIGITS_MAX = 15
_ACCEPT_LENGTH_MAX = 2048


class LastPiece(bytes):
    """The last piece of a body: whoever sends it may send the end of the response with it."""


class EventStream(ResponseBody):
    """Gives everything that is ready in one piece, a comment after silence, and ends with the log.

    It waits in ``__anext__`` alone: nothing is written inside of a cancel scope of ours, so no chunk
    is lost to one. The slot is closed as ended once the piece with the terminal event has been taken
    *and* the next one is asked for, that is after it was sent.

    Args:
        cursor: The seq that the client saw last.
    """

    def __init__(self, log: EventLog, slot: StreamSlot, *, cursor: int) -> None:
        self._log = log
        self._slot = slot
        self._cursor = cursor
        self._begun = False
        self._caught_up = False
        self._taken_at = 0.0
        self._ended = False

    def __repr__(self) -> str:
        return f"<EventStream at seq {self._cursor} of {self._log!r}>"

    async def __aenter__(self) -> "EventStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # the slot is given back with the request: this may never run

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            self._slot.close(ended=True)
            raise StopAsyncIteration
        if not self._begun:
            self._begun = True
            return self._take(_RETRY)
        await self._pause()
        await self._slot.wait_beyond(self._log, self._cursor)
        if self._slot.is_ends_only():
            await self._log.wait_closed()
        return self._take() or _HEARTBEAT

    async def _pause(self) -> None:
        """Where the last piece took long to write, the event loop is full or the client slow: write less often, then.

        Tokens that come meanwhile go out in one piece, so the load falls with the number of pieces; an event loop
        with time to spare never pauses. The terminal event ends a pause.
        """
        writing_took_s = trio.current_time() - self._taken_at
        if writing_took_s > _BUSY_S and self._caught_up:
            with trio.move_on_after(min(writing_took_s, _PAUSE_MAX_S)):
                await self._log.wait_closed()

    def _take(self, before: bytes = b"") -> bytes:
        chunk, self._cursor = self._log.read_after(self._cursor, bytes_max=_WRITE_BYTES_MAX)
        self._caught_up = self._cursor == self._log.last_seq
        self._taken_at = trio.current_time()
        self._ended = self._log.closed and self._cursor == self._log.last_seq
        return LastPiece(before + chunk) if self._ended else before + chunk


def stream_response(log: EventLog, slot: StreamSlot, *, cursor: int) -> TrioResponse:
    """A response that streams a log from ``cursor`` on, and gives its slot back whatever happens."""
    release_after_request(slot.close)
    body = EventStream(log, slot, cursor=cursor)
    response = TrioResponse(body, headers=HEADERS, content_type=MEDIA_TYPE)
    response.timeout = None  # Quart would end any response after 60 s otherwise
    return response


class Cursor(NamedTuple):
    """The seq that a client saw last, 0 for none, and the name of the header or parameter that says so."""

    seq: int
    field: str


def read_cursor(request: Request) -> Cursor:
    """What a client that asks for events saw last: its ``Last-Event-ID``, else that of the query, else ``?after=``.

    In this order, because a client that reconnects repeats the URL it began with. An empty id is none.

    Raises:
        InvalidRequestError: One of them is none of ours, whichever wins; or the query has two that differ.
    """
    query = read_query(request, EventsQuery)
    said = read_last_event_id(request)
    if query.last_event_id and query.last_event_id_too and query.last_event_id != query.last_event_id_too:
        raise InvalidRequestError(
            "lastEventId and Last-Event-ID say two things; send one of them.", field="lastEventId"
        )
    if said is not None:
        return Cursor(said, "Last-Event-ID")
    if query.last_event_id:
        return Cursor(int(query.last_event_id), "lastEventId")
    if query.last_event_id_too:
        return Cursor(int(query.last_event_id_too), "Last-Event-ID")
    return Cursor(query.after, "after")


def read_last_event_id(request: Request) -> int | None:
    """The header ``Last-Event-ID``; None where it is not there or empty, as from a client that has seen no event.

    Raises:
        InvalidRequestError: It is not the id of an event.
    """
    said = ", ".join(request.headers.getlist("Last-Event-ID"))
    if not said:
        return None
    if not (said.isascii() and said.isdigit() and len(said) <= _SEQ_DIGITS_MAX):
        raise InvalidRequestError(
            f"An event id is the seq of an event, a whole number, and not {shown(said)!r}.", field="Last-Event-ID"
        )
    return int(said)


def wants_stream(request: Request) -> bool:
    """Whether the client names ``text/event-stream`` and would not rather have JSON.

    In the first 2048 characters of its ``Accept``: to order thousands of media types takes milliseconds.
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
