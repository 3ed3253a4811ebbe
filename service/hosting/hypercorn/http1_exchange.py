"""One request on HTTP/1.1 and the response to it, between the connection and the application.

The head of a response whose length is known is sent together with the body, and the end of a stream with its last
piece. Nothing here waits for a task. Proven by ``tests/hosting/hypercorn/test_http1_exchange.py``.
"""

from enum import Enum, auto
from time import time
from typing import Any, Protocol, cast
from urllib.parse import unquote

import h11
import trio
from hypercorn.config import Config
from hypercorn.trio.task_group import _handle
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ConnectionState, Scope
from hypercorn.utils import UnexpectedMessageError

from service.api.http.end_of_input import LEAVES_AT_END
from service.hosting.hypercorn.asgi_receive import ReceiveQueue
from service.hosting.hypercorn.chunked_response import ChunkConnection, ChunkedResponse
from service.hosting.hypercorn.response_head import Fields, Framing, ResponseHead, encode_head

Address = tuple[str, int] | None
_DISCONNECT = cast("ASGIReceiveEvent", {"type": "http.disconnect"})


class ResponseState(Enum):
    """How far a response is."""

    REQUEST = auto()
    RESPONSE = auto()
    CLOSED = auto()


class ExchangeConnection(ChunkConnection, Protocol):
    """The connection of an exchange."""

    config: Config
    is_closed: bool

    @property
    def socket(self) -> trio.socket.SocketType: ...

    def server_fields(self) -> Fields: ...

    async def write(self, data: bytes) -> None:
        """Send bytes. Those to a client that has left are dropped."""

    async def write_in_time(self, data: bytes) -> None:
        """Send bytes that no request waits for."""

    async def note_answered(self, exchange: "Http1Exchange") -> None:
        """Go on after the end of a response, or after an application that has ended without one."""

    def abort(self) -> None: ...


class Http1Exchange:
    """A request and its response.

    Attributes:
        connection: Its connection.
        queue: The application's ``receive``.
        is_whole: Whether the request has arrived whole.
        is_answered: Whether the response was sent whole, or given up.
        keeps_alive: Whether the connection stays open after the response, as client and application say.
        state: How far the response is.
        chunks: The body of a response that is sent in chunks, once it has begun.
    """

    def __init__(
        self,
        request: h11.Request,
        fields: Fields,
        connection: ExchangeConnection,
        *,
        scheme: str,
        client: Address,
        server: Address,
        state: ConnectionState,
        keeps_alive: bool,
    ) -> None:
        self.connection = connection
        self.is_whole = False
        self.is_answered = False
        self.keeps_alive = keeps_alive
        self.state = ResponseState.REQUEST
        config = connection.config
        self.queue = ReceiveQueue(kept_max=config.max_app_queue_size)
        self._config = config
        self._started_at = time()
        path, _, query = request.target.partition(b"?")
        self.scope: dict[str, Any] = {
            "type": "http",
            "http_version": request.http_version.decode(),
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": request.method.decode("ascii").upper(),
            "scheme": scheme,
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": config.root_path,
            "headers": fields,
            "client": client,
            "server": server,
            "state": state.copy(),
            "extensions": {},
            LEAVES_AT_END: self.queue.note_over,
        }
        self._response: dict[str, Any] | None = None
        self._head: ResponseHead | None = None
        self.chunks: ChunkedResponse | None = None
        self._unsent_head = b""
        self._left = 0
        self._has_left = False
        self._is_logged = False
        self._over: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<Http1Exchange {self.scope['method']} {self.scope['path']}: {self.state.name}>"

    async def run(self, app: AppWrapper) -> None:
        """Run the application for this request. A child of the connection; a failure of it ends this exchange."""
        try:
            await _handle(
                app,
                self._config,
                cast("Scope", self.scope),
                self.queue,
                cast("Any", self.send),
                trio.to_thread.run_sync,
                trio.from_thread.run,
            )
        finally:
            self.queue.note_over()
            self.queue.deliver_to(_drop)

    async def disconnect(self) -> None:
        """Tell the application that its client has left. What it sends from now on is dropped."""
        if self._has_left or self.is_answered:
            return
        self._has_left = True
        await self._log_access(None)
        self.queue.put_last(_DISCONNECT)
        self._note_over()

    async def wait_over(self) -> None:
        """Return once the exchange is answered, or its client is known to have left."""
        if not (self.is_answered or self._has_left):
            self._over = trio.Event()
            await self._over.wait()

    def _note_over(self) -> None:
        if self._over is not None:
            self._over.set()

    @property
    def has_begun(self) -> bool:
        """Whether the response, or a part of its head, may be on its way."""
        return self.state is not ResponseState.REQUEST and not self._unsent_head

    async def send(self, message: dict[str, Any] | None) -> None:
        """ASGI's ``send``; hypercorn sends None once the application has ended."""
        if message is None:
            await self._end_of_application()
        elif self._has_left:
            return
        elif message["type"] == "http.response.body" and self.state is ResponseState.RESPONSE:
            await self._send_body(message.get("body", b""), more=message.get("more_body", False))
        elif message["type"] == "http.response.start" and self.state is ResponseState.REQUEST:
            await self._begin(message)
        else:
            raise UnexpectedMessageError(self.state, message["type"])

    async def _begin(self, message: dict[str, Any]) -> None:
        head = self._head = encode_head(
            int(message["status"]),
            message.get("headers", ()),
            method=self.scope["method"],
            http_version=self.scope["http_version"],
            # The client may still be sending its body, which is not read any more, or not to its end.
            keeps_alive=self.keeps_alive and self.is_whole,
            server_fields=self.connection.server_fields(),
        )
        self._response = message
        self._left = head.length
        self.keeps_alive = not head.closes and head.framing is not Framing.CLOSE
        self.state = ResponseState.RESPONSE
        if head.framing is Framing.LENGTH:
            self._unsent_head = head.encoded  # the body follows: both are one write
            return
        if head.framing is Framing.CHUNKED:
            self.chunks = ChunkedResponse(self.connection)
        await self.connection.write(head.encoded)

    async def _send_body(self, given: bytes, *, more: bool) -> None:
        head = self._head
        assert head is not None
        body = bytes(given) if head.has_body else b""
        if head.framing is Framing.LENGTH:
            self._count(len(body), more=more)
        if not more:
            self.state = ResponseState.CLOSED
        if self.chunks is None:
            await self._send_plain(body)
        elif more:
            await self.chunks.write(body)
        else:
            await self.chunks.end(body)
        if not more:
            await self._log_access(self._response)
            await self._note_answered()

    def _count(self, size: int, *, more: bool) -> None:
        """Count the bytes of a body whose length the head has told."""
        self._left -= size
        if self._left < 0 or (self._left and not more):
            raise ValueError("The body of a response has not as many bytes as its Content-Length says.")

    async def _send_plain(self, body: bytes) -> None:
        data, self._unsent_head = self._unsent_head + body, b""
        if data:
            await self.connection.write(data)

    async def _end_of_application(self) -> None:
        if self._has_left or self.is_answered:
            return
        if not self.has_begun:
            await self.refuse(500)
            return
        self.keeps_alive = False
        self.state = ResponseState.CLOSED
        await self._log_access(None)
        await self._note_answered()

    async def refuse(self, status: int) -> None:
        """Answer in the place of the application, with a status alone. The connection closes."""
        self.state = ResponseState.CLOSED
        self.keeps_alive = False
        self._has_left = True
        self._unsent_head = b""
        await self.connection.write_in_time(encode_refusal(status, self.connection.server_fields()))
        await self._log_access({"status": status, "headers": []})
        await self._note_answered()

    async def _note_answered(self) -> None:
        if self.is_answered:
            return
        self.is_answered = True
        await self.connection.note_answered(self)
        self.queue.put_last(_DISCONNECT)  # ASGI: after the response ``receive`` returns this
        self._note_over()

    async def _log_access(self, response: dict[str, Any] | None) -> None:
        """Write the access line of this exchange, once. Without a response the exchange has ended before its end."""
        if self._is_logged:
            return
        self._is_logged = True
        await self._config.log.access(cast("Any", self.scope), cast("Any", response), time() - self._started_at)


def _drop(_message: object) -> None:
    """Take a message after the end of the application: so the connection does not wait for room for it."""


def encode_refusal(status: int, server_fields: Fields) -> bytes:
    """Encode a response without a body, after which the connection closes."""
    fields = [(b"content-length", b"0"), (b"connection", b"close")]
    return encode_head(
        status, fields, method="GET", http_version="1.1", keeps_alive=True, server_fields=server_fields
    ).encoded
