"""A request on its way through Quart-Trio, with two faults corrected and three additions.

* hypercorn tells the application of a disconnect when a response is complete; Quart-Trio then cancels the request
  while that last send is still inside hypercorn, which is about to make the connection ready for the next request.
  The connection's idle timer never starts: kept-alive connections live for ever, and a shutdown waits for each of
  them. So the last send is shielded, or the disconnect ignored. Source: hypercorn 0.18 ``H11Protocol._maybe_recycle``,
  quart-trio 0.12 and 0.13 ``TrioASGIHTTPConnection``. Proven by ``tests/hosting/hypercorn/test_asgi_request.py``.
* A client that is still sending its request when the work has ended gets an answer at once.
* From the end of the lame duck on, each response on HTTP/1 says that the connection closes.
* An answer that its client does not read is given up (``unread_answers``); so is an event stream that says so. It goes
  to hypercorn in pieces, because hypercorn copies what it cannot send at once.
* The server's messages go to the request without a task in between.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from math import inf
from typing import Any, cast

import trio
from quart import Quart
from quart.utils import encode_headers
from quart.wrappers import Request, Response
from quart.wrappers.response import DataBody
from quart_trio.asgi import TrioASGIHTTPConnection

from service.api.http.event_stream import ENDS_UNREAD, PIECE_WRITER, LastPiece, is_event_stream
from service.api.http.locations import path_template
from service.api.http.request_body import BoundedBody, drop_body
from service.api.http.request_record import RequestRecord, record_of
from service.errors import ShuttingDownError
from service.freezes import extended_when_late
from service.hosting.hypercorn.asgi_receive import ReceiveQueue
from service.hosting.hypercorn.chunked_response import ChunkedResponse
from service.hosting.hypercorn.http1_exchange import Http1Exchange
from service.hosting.hypercorn.unread_answers import Answer, unread_answers_of
from service.steps import Steps
from service.stop_state import Phase, StopState
from service.telemetry.tree_nodes import Node, Notes

LAST_SEND_TIMEOUT_S = 30
"""Bound on the shield around the last send: after it, the connection of a client that does not read is given up."""

PIECE_BYTES = 64 * 1024

_REQUESTS = "lastcall.requests"


class OpenRequests(dict[Request, trio.lowlevel.Task]):
    """The requests of an application that are open, each with its task: for the shutdown, and for those who look."""

    def __init__(self, stop: StopState) -> None:
        super().__init__()
        self.stop = stop

    def describe(self, notes: Notes) -> Steps[None]:
        """Tell the live tree which tasks answer requests. A path is told as its route: without ids."""
        for request in tuple(self):
            task = self.get(request)
            if task is None:
                continue  # it has ended since the last step
            rule = request.url_rule
            path = "" if rule is None else " " + path_template(rule)
            notes.name(task, Node(parent=None, kind="request", name=f"{request.method}{path}"))
            yield

    def refuse_uploads(self, *, older_than_s: float = 0) -> None:
        """Answer the requests that began so long ago and whose bodies are not complete with 503."""
        begun_until = trio.current_time() - older_than_s
        for request in self:
            if isinstance(request.body, BoundedBody) and request.body.began_at <= begun_until:
                request.body.refuse(ShuttingDownError())


def open_requests(app: Quart, stop: StopState) -> OpenRequests:
    """Attach the set of open requests to an application; its requests ask for the stop's phase through this set."""
    requests = app.extensions[_REQUESTS] = OpenRequests(stop)
    return requests


class AsgiRequest(TrioASGIHTTPConnection):
    """One request of an application."""

    _request: Request | None = None
    _answer: Answer | None = None
    _record: RequestRecord | None = None
    _is_complete = False
    _is_on_http1 = False

    async def __call__(self, receive: Any, send: Any) -> None:
        request = self._request = self._create_request_from_scope(send)
        self._record = record_of(self.scope)
        requests: OpenRequests | None = self.app.extensions.get(_REQUESTS)
        if requests is not None:
            requests[request] = trio.lowlevel.current_task()
        try:
            if isinstance(receive, ReceiveQueue) and isinstance(request.body, BoundedBody):
                await self._answer_directly(request, receive, send)
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.handle_messages, nursery, request, partial(self._receive, receive))
                    await self.handle_request(nursery, request, partial(self._send_shielding_the_last, send))
        finally:
            # The scope must not keep it, because the exchange holds the scope: a circle.
            written: ChunkedResponse | None = cast("dict[str, Any]", self.scope).pop(PIECE_WRITER, None)
            if written is not None and self._record is not None:
                self._record.bytes += written.written_now
            if requests is not None:
                requests.pop(request, None)
            if self._answer is not None and (answers := unread_answers_of(self.app)) is not None:
                answers.discard(self._answer)

    async def _answer_directly(self, request: Request, receive_queue: ReceiveQueue, send: Any) -> None:
        """Answer as Quart-Trio does, without a nursery and two tasks for each request."""
        self._is_on_http1 = isinstance(getattr(send, "__self__", None), Http1Exchange)
        body = cast("BoundedBody", request.body)
        scope = trio.CancelScope()

        def take(message: dict[str, Any]) -> None:
            if message["type"] == "http.request":
                body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body.set_complete()
            elif not self._is_complete:
                self._note_left()
                scope.cancel()

        with scope:
            receive_queue.deliver_to(take)
            await self.handle_request(cast("trio.Nursery", _NO_NURSERY), request, partial(self._send, send))

    async def _receive(self, receive: Any) -> Any:
        message = await receive()
        if message["type"] != "http.request" and not self._is_complete:
            self._note_left()
        return message

    def _note_left(self) -> None:
        if self._record is not None:
            self._record.has_left = True

    async def _send_response(self, send: Any, response: Any) -> None:
        """Send a response as Quart does, but on HTTP/1.1 one whose body is known in two messages and not in three.

        On HTTP/2 the body stays apart from the end: a client that leaves in a last message is not told of.
        """
        body = response.response if self._is_on_http1 and isinstance(response, Response) else None
        if not isinstance(body, DataBody):
            await super()._send_response(send, response)
            return
        headers = encode_headers(response.headers)
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": body.data[body.begin : body.end], "more_body": False})

    async def _send_shielding_the_last(self, send: Any, message: dict[str, Any]) -> None:
        last = _is_last(message)
        deadline = trio.current_time() + LAST_SEND_TIMEOUT_S if last else inf
        with (
            trio.CancelScope(shield=last, deadline=deadline) as scope,
            extended_when_late(scope, timeout_s=LAST_SEND_TIMEOUT_S),
        ):
            await self._send(send, message)

    async def _send(self, send: Any, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await self._send_piece(send, message)
            return
        is_stream = False
        if message["type"] == "http.response.start":
            if self._closes():
                headers = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
                message["headers"] = [*headers, (b"connection", b"close")]
            self._drop_body()
            is_stream = is_event_stream(message["headers"])
            if not is_stream or ENDS_UNREAD in self.scope:
                self._watch_answer(send, is_endless=is_stream)
        with nullcontext() if self._answer is None else self._answer.waiting():
            await send(message)
        if is_stream and self._answer is None:
            self._offer_writer(send)

    def _offer_writer(self, send: Any) -> None:
        """Let the task that appends an event write it to this stream, where its connection can do so."""
        exchange = getattr(send, "__self__", None)
        chunks = exchange.chunks if isinstance(exchange, Http1Exchange) else None
        if chunks is not None and chunks.writes_now:
            cast("dict[str, Any]", self.scope)[PIECE_WRITER] = chunks

    def _drop_body(self) -> None:
        """Hold no body while the answer is sent: the handler is over, so the request is not sent to a peer again."""
        if self._request is not None and isinstance(self._request.body, BoundedBody):
            self._request.body.drop()
            drop_body(self._request)

    def _watch_answer(self, send: Any, *, is_endless: bool) -> None:
        """Let the answer be given up if its client does not read. Its head can block, too, after earlier answers."""
        answers = unread_answers_of(self.app)
        if answers is not None:
            self._answer = Answer.begun_by(send, is_endless=is_endless)
            if self._answer is not None:
                answers.add(self._answer)

    async def _send_piece(self, send: Any, message: dict[str, Any]) -> None:
        if self._is_complete:
            return  # Quart ends a response again that its last piece has ended
        self._is_complete = _is_last(message)
        if self._answer is None:
            await send(_body_message(message["body"], ends=self._is_complete))
        else:
            for piece, ends in _pieces(message["body"], ends=self._is_complete):
                with self._answer.waiting(len(piece)):
                    await send(_body_message(piece, ends=ends))
        if self._record is not None:
            self._record.bytes += len(message["body"])
            self._record.is_whole = self._is_complete

    def _closes(self) -> bool:
        requests: OpenRequests | None = self.app.extensions.get(_REQUESTS)
        return requests is not None and requests.stop.phase >= Phase.DRAINING and self.scope["http_version"] < "2"


def _is_last(message: dict[str, Any]) -> bool:
    return message["type"] == "http.response.body" and (
        not message.get("more_body", False) or isinstance(message["body"], LastPiece)
    )


def _body_message(piece: bytes, *, ends: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": piece, "more_body": not ends}


def _pieces(body: bytes, *, ends: bool) -> Iterator[tuple[bytes, bool]]:
    """A body in pieces, each with whether the response ends with it."""
    if len(body) <= PIECE_BYTES:
        yield body, ends
        return
    view = memoryview(body)
    for start in range(0, len(body), PIECE_BYTES):
        yield bytes(view[start : start + PIECE_BYTES]), ends and start + PIECE_BYTES >= len(body)


class _NoNursery:
    """Stands in for the nursery that Quart-Trio's ``handle_request`` cancels at its end; there are no tasks in it."""

    def __init__(self) -> None:
        self.cancel_scope = self

    def cancel(self) -> None:
        pass


_NO_NURSERY = _NoNursery()
