"""A model server for benchmarks and tests: OpenAI-compatible, and as fast, slow or faulty as a request asks.

The last user message sets the behaviour, in words such as ``rate=20 tokens=30`` (see :class:`Behaviour`), and is the
name under which the server records the request. So one process serves a load with any mix of behaviours. Each token
carries its number and the time of its send (``<17@8123456789>``), so a client can tell which tokens were lost and how
long the others took.

``python -m bench.upstream`` prints ``Running on http://127.0.0.1:PORT``; each line on its standard input
is answered with one line of JSON, a list of :class:`ReplyBook`; end of input ends it.
"""

import heapq
import json
import socket
import sys
import time

import msgspec
import trio

from bench.poller import Poller, receive_some, send_all

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_TAKEN = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n"
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
TRACES = "/v1/traces"
"""Where a service's traces are taken, and forgotten: a collector's place, so that a measurement needs none."""
_REQUEST_BYTES_MAX = 8 * 1024 * 1024


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """The behaviour of one reply, set by ``name=number`` words in the last user message."""

    rate: float = 20  # tokens a second; 0: as fast as the client reads
    tokens: int = 0  # the number of tokens; 0: endless
    pad: int = 0  # bytes of each token, at least; its mark takes some 20
    burst: int = 1  # tokens at a time, each a frame, all in one write; the rate is kept
    silent_after: int = 0  # the number of tokens before silence; the connection stays open
    mute: int = 0  # 1: takes the request and never answers
    deaf: int = 0  # 1: does not notice that the client has closed


class ReplyBook(msgspec.Struct, kw_only=True):
    """The record of one reply. Times are ``time.monotonic()``."""

    message: str
    tokens: int = 0  # tokens whose bytes the kernel has all taken
    asked_at: float = 0
    last_at: float | None = None  # the time of the last token's send
    closed_at: float | None = None  # the time of the client's close, or of the whole reply
    finished: bool = False


def parse_behaviour(message: str) -> Behaviour:
    """Read the words of a message; unknown words are names."""
    known = {field.name: field.type for field in msgspec.structs.fields(Behaviour)}
    words = (word.partition("=") for word in message.split())
    return msgspec.convert({n: float(v) if n == "rate" else int(v) for n, _, v in words if n in known}, Behaviour)


def encode_tokens(first: int, count: int, pad: int) -> bytes:
    """Return ``count`` chunks, each one frame with one token, numbered from ``first``."""
    chunks = []
    for number in range(first, first + count):
        token = f"<{number}@{time.monotonic_ns()}> ".ljust(pad)
        frame = (
            'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench",'
            f'"choices":[{{"index":0,"delta":{{"content":"{token}"}},"finish_reason":null}}]}}\n\n'
        )
        chunks.append(f"{len(frame):x}\r\n{frame}\r\n")
    return "".join(chunks).encode()


def encode_end(tokens: int) -> bytes:
    """Return the last frames of a whole reply, and the last chunk."""
    frames = (
        'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench",'
        '"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],'
        f'"usage":{{"prompt_tokens":1,"completion_tokens":{tokens},"total_tokens":{tokens + 1}}}}}\n\n'
        "data: [DONE]\n\n"
    )
    return f"{len(frames):x}\r\n{frames}\r\n0\r\n\r\n".encode()


class _Reply:
    """One reply on its way to one connection."""

    def __init__(self, sock: socket.socket, book: ReplyBook, behaviour: Behaviour) -> None:
        self.sock = sock
        self.book = book
        self.behaviour = behaviour
        self.over = trio.Event()  # set once the reply is whole, or the connection is unusable
        self._unsent = b""
        self._unsent_tokens = 0

    @property
    def is_whole(self) -> bool:
        """Whether all tokens of the reply are sent; never for an endless reply."""
        return 0 < self.behaviour.tokens == self.book.tokens

    @property
    def next_tokens(self) -> int:
        """Return the number of tokens to send now; 0: none, for ever."""
        limits = [self.behaviour.burst]
        if self.behaviour.tokens:
            limits.append(self.behaviour.tokens - self.book.tokens)
        if self.behaviour.silent_after:
            limits.append(self.behaviour.silent_after - self.book.tokens)
        return max(min(limits), 0)

    def send_due(self) -> None:
        """Send the tokens that are due now; a client that does not read makes the model wait."""
        if not self._unsent:
            self._unsent_tokens = self.next_tokens
            self._unsent = encode_tokens(self.book.tokens + 1, self._unsent_tokens, self.behaviour.pad)
        try:
            sent = self.sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.end()
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self.book.tokens += self._unsent_tokens
            self.book.last_at = time.monotonic()

    def end(self) -> None:
        if self.book.closed_at is None:
            self.book.closed_at = time.monotonic()
        self.over.set()


class Upstream:
    """The model server. ``books`` has one record for each request, in the order of arrival."""

    def __init__(self) -> None:
        self.books: list[ReplyBook] = []
        self._poller = Poller()
        self._due: list[tuple[float, int, _Reply]] = []
        self._added = trio.Event()
        self._count = 0

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve on a free loopback port, given to ``task_status``, until cancelled."""
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            listener.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._poller.run)
                nursery.start_soon(self._run_pace)
                task_status.started(listener.getsockname()[1])
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        sock, _ = listener.accept()
                    except BlockingIOError:
                        continue
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    nursery.start_soon(self._serve_connection, sock)

    async def _serve_connection(self, sock: socket.socket) -> None:
        with sock:
            try:
                buffer = b""
                while request := await _read_request(sock, buffer):
                    path, body, buffer = request
                    if path.endswith("/chat/completions"):
                        await self._serve_reply(sock, body)
                    else:
                        await send_all(sock, _TAKEN if path == TRACES else _NOT_FOUND)
            except OSError:
                return

    async def _serve_reply(self, sock: socket.socket, body: bytes) -> None:
        """Raises OSError if the connection cannot be used any more."""
        messages = json.loads(body)["messages"]
        message = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        book = ReplyBook(message=message, asked_at=time.monotonic())
        self.books.append(book)
        reply = _Reply(sock, book, parse_behaviour(message))
        if not reply.behaviour.deaf:
            self._poller.add(sock, lambda: self._on_readable(reply))
        try:
            if not reply.behaviour.mute:
                await send_all(sock, _HEAD)
                await self._send_tokens(reply)
            if not reply.is_whole:
                await reply.over.wait()
            if book.closed_at is not None:
                raise ConnectionResetError("the client has closed")
            await send_all(sock, encode_end(book.tokens))
            book.finished = True
        finally:
            self._poller.remove(sock)
            reply.end()

    async def _send_tokens(self, reply: _Reply) -> None:
        """Return when all are sent, or the client has closed."""
        if reply.behaviour.rate:
            self._schedule(reply, time.monotonic())
            await reply.over.wait()
            return
        while (count := reply.next_tokens) and not reply.over.is_set():
            await send_all(reply.sock, encode_tokens(reply.book.tokens + 1, count, reply.behaviour.pad))
            reply.book.tokens += count
            await trio.lowlevel.checkpoint()

    def _on_readable(self, reply: _Reply) -> None:
        """Note that the client has closed: a client that waits for a reply sends nothing else."""
        self._poller.remove(reply.sock)
        reply.end()

    def _schedule(self, reply: _Reply, due: float) -> None:
        self._count += 1
        heapq.heappush(self._due, (due, self._count, reply))
        self._added.set()

    async def _run_pace(self) -> None:
        """Send each paced token when it is due: one task for all, in due order."""
        while True:
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                due, _, reply = heapq.heappop(self._due)
                if reply.over.is_set():
                    continue
                reply.send_due()
                if reply.next_tokens:
                    self._schedule(reply, due + reply.behaviour.burst / reply.behaviour.rate)
                elif reply.is_whole:
                    reply.over.set()
            self._added = trio.Event()
            with trio.move_on_after(max(self._due[0][0] - now, 0.001) if self._due else float("inf")):
                await self._added.wait()
            await trio.sleep(0.001)  # one wake-up for all tokens of a millisecond


async def _read_request(sock: socket.socket, buffer: bytes) -> tuple[str, bytes, bytes] | None:
    """Return the path, the body and the bytes after it; None if the client closed. Raises OSError."""
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        data = await receive_some(sock)
        if not data or len(buffer) > _REQUEST_BYTES_MAX:
            return None
        buffer += data
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", "0"))
    while len(buffer) < end + 4 + length:
        data = await receive_some(sock)
        if not data:
            return None
        buffer += data
    return first.split()[1], buffer[end + 4 : end + 4 + length], buffer[end + 4 + length :]


async def run_command() -> None:
    """Run the process: serve, and answer each line of the standard input with the books."""
    upstream = Upstream()
    async with trio.open_nursery() as nursery:
        port = await nursery.start(upstream.run)
        print(f"Running on http://127.0.0.1:{port}", flush=True)
        async for _ in trio.lowlevel.FdStream(0):
            print(msgspec.json.encode(upstream.books).decode(), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(trio.run(run_command))
