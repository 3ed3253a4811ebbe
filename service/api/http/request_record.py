"""The record of a request: what its line in the access log says of it.

A request has a record only where the access log is on. The record is filled in by the code that answers the request,
and used once, when the request is over: for a stream at its end. It has no part of what caller or model said; of the
request's target it has the route, and not the path, in which a caller may write anything.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import structlog
import trio

from service.api_keys import Caller

if TYPE_CHECKING:
    from service.api.http.event_stream import PieceWriter

logger = structlog.get_logger("lastcall.access")

_RECORD = "lastcall.record"
_NO_RECORD: AbstractContextManager[None] = nullcontext()

End = Literal["whole", "left", "cut", "moved"]
"""How a response ended: it was sent whole; its client left before; the service ended it before; or, a stream, its turn
goes on in another process, where the client resumes."""


class RequestRecord:
    """What is known of one request.

    Attributes:
        status: The status of the answer; None if none was begun.
        route: The pattern of the path that was found for the request; None if there is none.
        caller: Who sent it; None before the access rule has let it pass.
        bytes: The bytes of the answer's body so far, before a transfer coding.
        is_whole: Whether the answer was sent whole.
        has_left: Whether the client left before.
        stream_end: How an event stream ended before its terminal event; None if it did not.
    """

    __slots__ = ("began_at", "bytes", "caller", "has_left", "is_whole", "route", "status", "stream_end")

    def __init__(self) -> None:
        self.began_at = trio.current_time()
        self.status: int | None = None
        self.route: str | None = None
        self.caller: Caller | None = None
        self.bytes = 0
        self.is_whole = self.has_left = False
        self.stream_end: Literal["cut", "moved"] | None = None

    @property
    def end(self) -> End:
        """How the response ended."""
        if self.is_whole:
            return self.stream_end or "whole"
        return "left" if self.has_left else "cut"


class RequestRecords:
    """Makes the records of an application's requests.

    Args:
        access_log: Whether each request has a line in the log.
    """

    def __init__(self, *, access_log: bool) -> None:
        self._access_log = access_log

    def of(self, scope: MutableMapping[str, Any]) -> AbstractContextManager[None]:
        """Record the request of this ASGI scope until the context is left; nothing where no record is needed."""
        if scope["type"] != "http" or not self._access_log:
            return _NO_RECORD
        return self._recording(scope)

    @contextmanager
    def _recording(self, scope: MutableMapping[str, Any]) -> Iterator[None]:
        record = scope[_RECORD] = RequestRecord()
        try:
            yield
        finally:
            del scope[_RECORD]
            if self._access_log:
                _log(record, scope)


def record_of(scope: Any) -> RequestRecord | None:
    """The record of the request of this ASGI scope; None if it needs none."""
    record: RequestRecord | None = scope.get(_RECORD)
    return record


def _log(record: RequestRecord, scope: MutableMapping[str, Any]) -> None:
    """Write the line of the access log. The ids of the request and of its work are on it as on each of its lines."""
    client = scope.get("client")
    logger.info(
        "request",
        method=scope["method"],
        route=record.route,
        status=record.status,
        duration_s=round(trio.current_time() - record.began_at, 4),
        bytes=0 if scope["method"] == "HEAD" else record.bytes,
        end=record.end,
        **({"caller": record.caller.name} if record.caller is not None and record.caller.name else {}),
        **({"client": client[0]} if client else {}),
    )


class CountedPieces:
    """A writer of pieces whose bytes count in a request's record. Meets :class:`PieceWriter`."""

    __slots__ = ("_record", "_writer")

    def __init__(self, writer: "PieceWriter", record: RequestRecord) -> None:
        self._writer = writer
        self._record = record

    @property
    def has_rest(self) -> bool:
        return self._writer.has_rest

    def write_now(self, piece: bytes) -> bool:
        if not self._writer.write_now(piece):
            return False
        self._record.bytes += len(piece)
        return True
