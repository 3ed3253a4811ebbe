"""A model server whose every byte a test decides: plain TCP or TLS on a loopback port, on Trio.

    async def replies(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(delta("Hello"))

    async with open_raw_server(replies) as server:
        ...  # server.url

A behaviour is called for each connection and the connection is closed when it returns. One that the
client ends first (a send fails) is simply over.
"""

import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

Behaviour = Callable[["Connection"], Awaitable[None]]

_ESTABLISHED = "01"


class Request:
    """A request as it came in."""

    def __init__(self, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = lines[0].split(" ")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self.body = body

    @property
    def json(self) -> dict[str, object]:
        """The body as a JSON object."""
        decoded = json.loads(self.body)
        assert isinstance(decoded, dict)
        return decoded


class Connection:
    """The server's side of one connection.

    Attributes:
        always: Headers of each response.
    """

    def __init__(self, stream: trio.abc.Stream, number: int) -> None:
        self.number = number
        self.always: dict[str, str] = {}
        self.stream = stream
        self._received = b""
        self._chunked = True

    async def receive_request(self) -> Request:
        """Read a request to the end of its body."""
        while b"\r\n\r\n" not in self._received:
            await self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        length = int(Request(head, b"").headers.get("content-length", "0"))
        while len(self._received) < length:
            await self._receive()
        body, self._received = self._received[:length], self._received[length:]
        return Request(head, body)

    async def _receive(self) -> None:
        data = await self.stream.receive_some(65536)
        if not data:
            raise trio.BrokenResourceError("the client has closed the connection")
        self._received += data

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    async def send_head(
        self, status: int = 200, headers: dict[str, str] | None = None, *, chunked: bool = True
    ) -> None:
        """Send a response's head; by default that of an event stream in HTTP chunks."""
        lines = {"content-type": "text/event-stream"} | ({"transfer-encoding": "chunked"} if chunked else {})
        lines |= {**(headers or {}), **self.always}
        self._chunked = chunked
        head = f"HTTP/1.1 {status} Status\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await self.send(head.encode() + b"\r\n")

    async def send_body(self, data: bytes) -> None:
        """Send a part of the body, as one HTTP chunk where they are used."""
        await self.send(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    async def send_event(self, payload: object) -> None:
        """Send one server-sent event; what is not bytes is encoded as JSON."""
        await self.send_body(_event(payload))

    async def send_last_events(self, *payloads: object) -> None:
        """Send events and the end of the chunked body in one piece: a client that leaves at the last event has all."""
        await self.send(self._framed(b"".join(_event(it) for it in payloads)) + b"0\r\n\r\n")

    async def end_body(self) -> None:
        """End the response, and keep the connection for another request."""
        if self._chunked:
            await self.send(b"0\r\n\r\n")

    async def send_response(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        """Send a whole response; what is not bytes is encoded as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"content-type": "application/json", "content-length": str(len(data))} | (headers or {})
        await self.send_head(status, lines, chunked=False)
        await self.send(data)

    def reset_when_closed(self) -> None:
        """Have the connection end with a reset, not with an end of its stream."""
        plain = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
        assert isinstance(plain, trio.SocketStream)
        plain.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def wait_closed(self) -> None:
        """Return once the client has closed the connection. Reads and forgets what it still sends."""
        try:
            while await self.stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass


def _event(payload: object) -> bytes:
    return b"data: %b\n\n" % (payload if isinstance(payload, bytes) else json.dumps(payload).encode())


class RawServer:
    """A server that is listening."""

    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.connections_made = 0
        self.connections_open = 0
        self._closed = trio.Condition()

    @property
    def established(self) -> int:
        """Connections that no side has closed, as the kernel sees it: exact, without a delay."""
        return established_to(self.port)

    async def wait_idle(self) -> None:
        """Return once every connection's behaviour has ended."""
        async with self._closed:
            while self.connections_open:
                await self._closed.wait()

    async def serve(self, stream: trio.abc.Stream, behave: Behaviour) -> None:
        """Serve one connection; what the client breaks ends it."""
        number = self.connections_made
        self.connections_made += 1
        self.connections_open += 1
        try:
            await behave(Connection(stream, number))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)
            self.connections_open -= 1
            with trio.CancelScope(shield=True):
                async with self._closed:
                    self._closed.notify_all()


@asynccontextmanager
async def open_raw_server(behave: Behaviour, *, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[RawServer]:
    """Serve a behaviour on a free loopback port; leaving drops every connection."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    server = RawServer(port, "http" if ssl_context is None else "https")

    async def handle(stream: trio.SocketStream) -> None:
        if ssl_context is None:
            await server.serve(stream, behave)
        else:
            await server.serve(trio.SSLStream(stream, ssl_context, server_side=True, https_compatible=True), behave)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handle, listeners)
        yield server
        nursery.cancel_scope.cancel()


@contextmanager
def unanswering_port() -> Iterator[int]:
    """A loopback port at which connecting hangs: the listener accepts no client, and its backlog is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        fillers: list[socket.socket] = []
        try:
            while len(fillers) < 8:
                filler = socket.socket()
                fillers.append(filler)
                filler.settimeout(0.1)
                try:
                    filler.connect(("127.0.0.1", port))
                except TimeoutError:
                    break
            yield port
        finally:
            for filler in fillers:
                filler.close()


def unused_port() -> int:
    """A loopback port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def established_to(port: int) -> int:
    """How many connections to a loopback port are open on the client's side, whichever process that is."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    columns = [row.split() for row in rows]
    return sum(remote.endswith(f":{port:04X}") and state == _ESTABLISHED for _, _, remote, state, *_ in columns)


def delta(text: str) -> dict[str, object]:
    """A chunk with a piece of the reply."""
    return _chunk({"content": text}, None)


def reasoning(text: str, field: str = "reasoning_content") -> dict[str, object]:
    """A chunk with a piece of reasoning; servers differ in the field's name."""
    return _chunk({"content": None, field: text}, None)


def finish(reason: str = "stop") -> dict[str, object]:
    """The chunk that ends the text."""
    return _chunk({}, reason)


def usage(input_tokens: int, output_tokens: int, reasoning_tokens: int | None = None) -> dict[str, object]:
    """The chunk without choices that tells the usage."""
    told: dict[str, object] = {"prompt_tokens": input_tokens, "completion_tokens": output_tokens}
    if reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return {"object": "chat.completion.chunk", "choices": [], "usage": told}


DONE = b"[DONE]"


def _chunk(delta: dict[str, object], finish_reason: str | None) -> dict[str, object]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "test",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }


def replying(*payloads: object) -> Behaviour:
    """Answer each request with these events and end the response, on a connection that is kept."""

    async def reply(connection: Connection) -> None:
        while True:
            await connection.receive_request()
            await connection.send_head()
            for payload in payloads:
                await connection.send_event(payload)
            await connection.end_body()

    return reply


def refusing(status: int, body: object, headers: dict[str, str] | None = None) -> Behaviour:
    """Answer each request with this response."""

    async def refuse(connection: Connection) -> None:
        while True:
            await connection.receive_request()
            await connection.send_response(status, body, headers)

    return refuse
