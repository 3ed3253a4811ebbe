"""The record of a request: what its line in the access log and its span of a trace say of it.

A request has a record only where one of the two is on. The record is filled in by the code that answers the request,
and used once, when the request is over: for a stream at its end. It has no part of what caller or model said; of the
request's target it has the route, and not the path, in which a caller may write anything.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import structlog
import trio

from service.api.http.request_id import request_id_of
from service.api_keys import Caller
from service.telemetry.log_context import add_to_log_context

if TYPE_CHECKING:
    from service.telemetry.tracing import TraceSpan, Tracing

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
        trace_fields: The fields that name its span to another process; empty without traces, and before the access rule
            has let it pass.
    """

    __slots__ = (
        "_span",
        "_tracing",
        "began_at",
        "bytes",
        "caller",
        "has_left",
        "is_whole",
        "route",
        "status",
        "stream_end",
        "trace_fields",
    )

    def __init__(self, tracing: "Tracing | None") -> None:
        self._tracing = tracing
        self._span: TraceSpan | None = None
        self.began_at = trio.current_time()
        self.status: int | None = None
        self.route: str | None = None
        self.caller: Caller | None = None
        self.bytes = 0
        self.is_whole = self.has_left = False
        self.stream_end: Literal["cut", "moved"] | None = None
        self.trace_fields: Mapping[str, str] = {}

    @property
    def end(self) -> End:
        """How the response ended."""
        if self.is_whole:
            return self.stream_end or "whole"
        return "left" if self.has_left else "cut"

    def begin_span(self, scope: dict[str, Any]) -> None:
        """Begin the span, a child of the caller's if the request's fields name one; nothing without traces.

        Called once the access rule has let the request pass. Until then the fields may be a stranger's, who could put
        spans into any trace of the operator's, and have them taken.
        """
        if self._tracing is None:
            return
        span = self._span = _begin_span(self._tracing, scope, self, parent=_parent_in(scope))
        self.trace_fields = span.fields
        add_to_log_context(trace_id=span.trace_id)
        span.enter()

    def end_span(self, scope: dict[str, Any]) -> None:
        """End the span. That of a request that was not let pass is begun here: it is in a trace of its own."""
        if self._tracing is None:
            return
        span = self._span
        if span is None:
            span = _begin_span(self._tracing, scope, self, parent={})
            add_to_log_context(trace_id=span.trace_id)
        else:
            span.leave()
        _end_span(span, self, scope)


class RequestRecords:
    """Makes the records of an application's requests.

    Args:
        access_log: Whether each request has a line in the log.
        tracing: Makes the spans of requests; None without traces.
    """

    def __init__(self, *, access_log: bool, tracing: "Tracing | None" = None) -> None:
        self._access_log = access_log
        self._tracing = tracing

    def of(self, scope: dict[str, Any]) -> AbstractContextManager[None]:
        """Record the request of this ASGI scope until the context is left; nothing where no record is needed."""
        if scope["type"] != "http" or not (self._access_log or self._tracing):
            return _NO_RECORD
        return self._recording(scope)

    @contextmanager
    def _recording(self, scope: dict[str, Any]) -> Iterator[None]:
        record = scope[_RECORD] = RequestRecord(self._tracing)
        try:
            yield
        finally:
            del scope[_RECORD]
            record.end_span(scope)
            if self._access_log:
                _log(record, scope)


def record_of(scope: Any) -> RequestRecord | None:
    """The record of the request of this ASGI scope; None if it needs none."""
    record: RequestRecord | None = scope.get(_RECORD)
    return record


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
TRACE_FIELDS = ("traceparent", "tracestate")
"""Source: https://www.w3.org/TR/trace-context/"""


def _parent_in(scope: dict[str, Any]) -> Mapping[str, str]:
    """The fields of a request that name the caller's span; empty if there are none."""
    parent: dict[str, str] = {}
    for name, value in scope["headers"]:
        field = name.decode("latin-1").lower()
        if field in TRACE_FIELDS:
            parent[field] = f"{parent[field]},{value.decode('latin-1')}" if field in parent else value.decode("latin-1")
    return parent


def _begin_span(
    tracing: "Tracing", scope: dict[str, Any], record: RequestRecord, *, parent: Mapping[str, str]
) -> "TraceSpan":
    """Begin the span of a request.

    Source: https://opentelemetry.io/docs/specs/semconv/http/http-spans/ (1.45)
    """
    method = _method_of(scope)
    server = scope.get("server")
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
        "lastcall.request.id": request_id_of(scope),
    }
    if server:
        attributes |= {"server.address": str(server[0])} | ({"server.port": server[1]} if server[1] else {})
    name = _span_name(method, None)
    return tracing.begin(name, "server", parent=parent, attributes=attributes, began_at=record.began_at)


def _end_span(span: "TraceSpan", record: RequestRecord, scope: dict[str, Any]) -> None:
    method = _method_of(scope)
    client = scope.get("client")
    span.rename(_span_name(method, record.route))
    span.note(
        {
            "http.route": record.route,
            # A path without a route is whatever a caller has written.
            "url.path": None if record.route is None else scope["path"],
            "http.response.status_code": record.status,
            "http.response.body.size": 0 if method == "HEAD" else record.bytes,
            "client.address": str(client[0]) if client else None,
            "lastcall.caller": None if record.caller is None else record.caller.name or None,
            "lastcall.response.end": record.end,
        }
    )
    if record.status is not None and record.status >= 500:
        span.note_error(str(record.status))
    elif record.end == "cut":
        span.note_error("cut")
    span.end()


def _method_of(scope: dict[str, Any]) -> str:
    """The request's method; one that is not of HTTP is whatever a caller has written."""
    method: str = scope["method"]
    return method if method in _METHODS else "_OTHER"


def _span_name(method: str, route: str | None) -> str:
    method = "HTTP" if method == "_OTHER" else method
    return method if route is None else f"{method} {route}"


def _log(record: RequestRecord, scope: dict[str, Any]) -> None:
    """Write the line of the access log. The ids of the request and of its work are on it as on each of its lines."""
    client = scope.get("client")
    logger.info(
        "request",
        method=_method_of(scope),
        route=record.route,
        status=record.status,
        duration_s=round(trio.current_time() - record.began_at, 4),
        bytes=0 if scope["method"] == "HEAD" else record.bytes,
        end=record.end,
        **({"caller": record.caller.name} if record.caller is not None and record.caller.name else {}),
        **({"client": client[0]} if client else {}),
    )
