"""The load client: a process that opens streams, behaves well or badly, and reports what it saw on the wire.

It is a separate process, so the server and the harness share no interpreter with the code that judges them.
``python -m bench.load`` reads a :class:`~bench.plan.Plan` (one line of JSON) from its standard input, opens the plan's
connections and prints ``ready`` once all are open; then it only watches. A line ``probes`` is answered with the number
of probes that were answered so far. Any other line, or the end of input, stops it:
connections that are still open are recorded as open, and its last output is one line of JSON, a
:class:`~bench.plan.LoadResult`.
"""

import itertools
import json
import resource
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from string import Template

import msgspec
import trio

from bench.plan import (
    Calls,
    CallsResult,
    Http2Streams,
    Idle,
    LoadResult,
    Plan,
    Prober,
    ProbeResult,
    Request,
    RudeResult,
    Streams,
    Unfinished,
)
from bench.poller import Poller, connect, receive_some, send_all
from bench.wire import ResponseParser, StreamEnd, StreamJudge, StreamResult, WireError

_OPENING_AT_ONCE_MAX = 64
"""Connections that are opened at once: below every server's backlog, because the scenarios measure the stop."""
_PROBE_AGE_MIN_S = 0.1
_STALLED_LOOKS_MAX = 10


class _RefusedError(Exception):
    """A preparing request was not answered with success."""


class _Client:
    """One client's connection, its variables, and its requests."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._address = (plan.host, plan.port)
        self._values = {"n": str(number)}

    async def connect(self, *, small_buffers: bool = False) -> socket.socket:
        return await connect(self._address, small_buffers=small_buffers)

    def encode(self, request: Request) -> bytes:
        body = self.body(request)
        headers = {"Host": f"{self._address[0]}:{self._address[1]}", **request.headers}
        if body:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{request.method} {self.path(request)} HTTP/1.1\r\n{lines}\r\n".encode() + body

    def body(self, request: Request) -> bytes:
        return Template(request.body).safe_substitute(self._values).encode()

    def path(self, request: Request) -> str:
        return Template(request.path).safe_substitute(self._values)

    async def exchange(self, sock: socket.socket, request: Request) -> ResponseParser:
        """Send a request, read its response, and capture the values that the request names.

        Raises:
            OSError, WireError: The connection failed.
            _RefusedError: The answer is not a success.
        """
        await send_all(sock, self.encode(request))
        response, body = await read_response(sock)
        if response.status is None or response.status >= 300:
            raise _RefusedError(f"{response.status} {body[:300].decode(errors='replace')}")
        for name, key in request.capture.items():
            self._values[name] = str(json.loads(body)[key])
        return response


async def read_response(sock: socket.socket) -> tuple[ResponseParser, bytes]:
    """Read one response to its end, or up to the peer's close (then it is not ``complete``)."""
    response = ResponseParser()
    body = b""
    while not response.complete:
        if not (data := await receive_some(sock)):
            response.end_of_input()
            break
        body += response.feed(data)
    return response, body


class _WatchedStream:
    """An event stream that the poller reads until it ends or its client leaves."""

    def __init__(self, sock: socket.socket, judge: StreamJudge, group: Streams, poller: Poller) -> None:
        self.group = group
        self.result = judge.result
        self.ready = trio.Event()
        self.cancel_due = trio.Event()
        self.ended = trio.Event()
        self._sock = sock
        self._judge = judge
        self._poller = poller
        poller.add(sock, self._on_readable)

    @property
    def location(self) -> str:
        """The path of the turn."""
        return self._judge.headers["location"]

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(262144)
        except BlockingIOError:
            return
        except OSError:
            self._judge.reset(time.monotonic())
        else:
            now = time.monotonic()
            if data:
                self._judge.feed(data, now)
            else:
                self._judge.end_of_input(now)
        self._look()

    def _look(self) -> None:
        tokens = self.result.tokens
        if 0 < self.group.leave_after_tokens <= tokens and not self._judge.ended:
            self.result.ended_at, self.result.note = time.monotonic(), "left"
        if self._judge.ended:
            self._poller.remove(self._sock)
            self._sock.close()
            self.ended.set()
            self.cancel_due.set()
        if (
            self._judge.ended
            or self.result.first_at
            or (self.group.ready_at == "head" and self.result.status is not None)
        ):
            self.ready.set()
        if 0 < self.group.cancel_after_tokens <= tokens:
            self.cancel_due.set()


class Load:
    """Carries out a plan."""

    def __init__(self, plan: Plan) -> None:
        self.result = LoadResult()
        self._plan = plan
        self._poller = Poller()
        self._opening = trio.CapacityLimiter(_OPENING_AT_ONCE_MAX)
        self._sockets: list[socket.socket] = []  # sockets of every group stay open until the end
        self._probing: list[ProbeResult] = []
        self._stalled: list[tuple[socket.socket, StreamJudge]] = []

    @property
    def probes_answered(self) -> int:
        return sum(probe.outcome == "answered" for probe in self.result.probes)

    async def run(self, *, on_ready: Callable[[], None], stop: trio.Event) -> None:
        """Open all connections, call ``on_ready``, and watch until ``stop``, which may come during the opening."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._poller.run)
            nursery.start_soon(self._run_sampling)
            nursery.start_soon(self._open_all, nursery, on_ready)
            await stop.wait()
            self._count_tokens()
            nursery.cancel_scope.cancel()
        # A probe that was sent just now has no result yet.
        young = time.monotonic() - _PROBE_AGE_MIN_S
        self.result.probes = [p for p in self.result.probes if p.outcome != "silent" or p.at < young]
        for sock, judge in self._stalled:
            _read_rest(sock, judge)
        for sock in self._sockets:
            sock.close()

    async def _open_all(self, nursery: trio.Nursery, on_ready: Callable[[], None]) -> None:
        """Start every client; call ``on_ready`` when each is ready or has failed."""
        async with trio.open_nursery() as opening:
            for group in self._plan.groups:
                match group:
                    case Streams():
                        for number in range(group.count):
                            settled = trio.Event()
                            opening.start_soon(settled.wait)
                            nursery.start_soon(self._run_stream, group, number, settled)
                    case Idle():
                        for number in range(group.count):
                            opening.start_soon(nursery.start, self._run_idle, group, number)
                    case Unfinished():
                        for number in range(group.count):
                            opening.start_soon(nursery.start, self._run_unfinished, group, number)
                    case Http2Streams():
                        opening.start_soon(nursery.start, self._run_http2, group)
                    case Calls():
                        for number in range(group.count):
                            settled = trio.Event()
                            opening.start_soon(settled.wait)
                            nursery.start_soon(self._run_calls, group, number, settled)
                    case Prober():
                        nursery.start_soon(self._run_prober, group)
        on_ready()

    # Event streams

    async def _run_stream(self, group: Streams, number: int, settled: trio.Event) -> None:
        """Run one client with its streams one after another. Calls ``settled`` once it is ready or has failed."""
        for _ in range(group.repeat):
            result = StreamResult(group=group.name, number=number, began_at=time.monotonic())
            self.result.streams.append(result)
            delays = self.result.delays_ns.setdefault(group.name, []) if group.keep_delays else None
            judge = StreamJudge(result, delays_ns=delays)
            try:
                async with nullcontext() if group.at_once else self._opening:
                    sock = await self._open_stream(group, number, result)
            except (_RefusedError, WireError) as error:
                result.end, result.note, result.ended_at = StreamEnd.REFUSED, str(error), time.monotonic()
            except OSError as error:
                result.end, result.note, result.ended_at = StreamEnd.UNREACHABLE, str(error), time.monotonic()
            else:
                if group.stalled:
                    self._stalled.append((sock, judge))
                    await self._wait_stalled(sock)
                else:
                    await self._watch(_WatchedStream(sock, judge, group, self._poller), settled)
                    self._sockets.remove(sock)
            if group.ready_at != "end":
                settled.set()
        settled.set()

    async def _open_stream(self, group: Streams, number: int, result: StreamResult) -> socket.socket:
        """Send everything up to the streaming request, on one connection."""
        client = _Client(self._plan, number)
        sock = await client.connect(small_buffers=group.stalled)
        self._sockets.append(sock)
        for request in group.before:
            await client.exchange(sock, request)
        result.sent_at = time.monotonic()
        await send_all(sock, client.encode(group.stream) * (1 + group.sends_ahead))
        if group.half_close:
            sock.shutdown(socket.SHUT_WR)
        return sock

    async def _watch(self, stream: _WatchedStream, settled: trio.Event) -> None:
        """Watch a stream until it has ended."""
        await stream.ready.wait()
        if stream.group.ready_at != "end":
            settled.set()
        if stream.group.cancel_after_tokens:
            await stream.cancel_due.wait()
            await self._cancel_turn(stream)
        await stream.ended.wait()

    async def _cancel_turn(self, stream: _WatchedStream) -> None:
        client = _Client(self._plan, stream.result.number)
        try:
            with await client.connect() as sock:
                stream.result.cancelled_at = time.monotonic()
                await client.exchange(sock, Request(path=f"{stream.location}/cancel"))
        except (OSError, WireError, _RefusedError) as error:
            stream.result.note = f"cancel: {error}"

    async def _wait_stalled(self, sock: socket.socket) -> None:
        """Wait until the server cannot send any more: its send queue has not changed for 300 ms.

        In this time other streams went on, if there are some: otherwise the server or the model may have been held up.
        """
        unchanged = 0
        while True:
            queued, tokens = _peer_send_queue_bytes(sock), self._tokens
            await trio.sleep(0.3)
            unchanged = unchanged + 1 if 0 < queued == _peer_send_queue_bytes(sock) else 0
            if unchanged and (self._tokens > tokens or not self._go_on or unchanged == _STALLED_LOOKS_MAX):
                return

    @property
    def _tokens(self) -> int:
        """The tokens that all streams have received."""
        return sum(stream.tokens for stream in self.result.streams)

    @property
    def _go_on(self) -> bool:
        """Whether there is a stream that has begun and is not over."""
        return any(stream.first_at is not None and stream.ended_at is None for stream in self.result.streams)

    async def _run_sampling(self) -> None:
        while True:
            self._count_tokens()
            await trio.sleep(0.5)

    def _count_tokens(self) -> None:
        self.result.tokens_by_second.append((time.monotonic(), self._tokens))

    # Connections that are no streams

    async def _run_idle(self, group: Idle, number: int, *, task_status: trio.TaskStatus[None]) -> None:
        result = RudeResult(group=group.name, number=number)
        self.result.rude.append(result)
        client = _Client(self._plan, number)
        try:
            async with self._opening:
                sock = await client.connect()
                self._sockets.append(sock)
                await client.exchange(sock, group.request)
        except (OSError, WireError, _RefusedError):
            result.state, result.ended_at = "unreachable", time.monotonic()
            task_status.started()
            return
        task_status.started()
        await self._watch_rude(sock, result)

    async def _run_unfinished(self, group: Unfinished, number: int, *, task_status: trio.TaskStatus[None]) -> None:
        result = RudeResult(group=group.name, number=number)
        self.result.rude.append(result)
        head = f"POST {group.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        first = {"head": head.encode(), "body": f"{head}Content-Length: 100000\r\n\r\n".encode(), "tls": b""}[
            group.kind
        ]
        try:
            async with self._opening:
                sock = await connect((self._plan.host, self._plan.port))
                self._sockets.append(sock)
                await send_all(sock, first or _client_hello())
        except OSError:
            result.state, result.ended_at = "unreachable", time.monotonic()
            task_status.started()
            return
        task_status.started()
        async with trio.open_nursery() as nursery:
            if group.kind == "body":
                nursery.start_soon(_send_slowly, sock)
            await self._watch_rude(sock, result)
            nursery.cancel_scope.cancel()

    async def _watch_rude(self, sock: socket.socket, result: RudeResult) -> None:
        """Wait until the server answers or closes the connection. Bytes of a TLS server do not count."""
        response = ResponseParser()
        try:
            while data := await receive_some(sock):
                try:
                    response.feed(data)
                except WireError:
                    continue
                if response.complete:
                    result.state, result.status = "answered", response.status
            result.state = "closed" if result.status is None else result.state
        except OSError:
            result.state = "reset"
        result.ended_at = time.monotonic()

    async def _run_calls(self, group: Calls, number: int, settled: trio.Event) -> None:
        """Run one client. Calls ``settled`` once it is ready or has failed."""
        result = CallsResult(group=group.name, number=number)
        self.result.calls.append(result)
        client = _Client(self._plan, number)
        requests = iter(group.requests * group.repeat)
        try:
            async with self._opening:
                while (request := next(requests, None)) is not None:
                    with await client.connect() as sock:
                        while request is not None:
                            response = await client.exchange(sock, request)
                            result.answered_at.append(time.monotonic())
                            if group.ready_at == "first":
                                settled.set()
                            if response.closes:
                                break  # as any client has to: the next request takes a new connection
                            request = next(requests, None)
        except (OSError, WireError, _RefusedError) as error:
            result.note = str(error)
        settled.set()

    # HTTP/2

    async def _run_http2(self, group: Http2Streams, *, task_status: trio.TaskStatus[None]) -> None:
        """Run all streams of the group in one connection."""
        from bench.http2 import Http2Judge  # noqa: PLC0415  nothing else needs the h2 package

        results = [StreamResult(group=group.name, number=number) for number in range(group.count)]
        self.result.streams.extend(results)
        client = _Client(self._plan, 0)
        try:
            sock = await client.connect()
        except OSError as error:
            for result in results:
                result.end, result.note, result.ended_at = StreamEnd.UNREACHABLE, str(error), time.monotonic()
            task_status.started()
            return
        self._sockets.append(sock)
        judge = Http2Judge(authority=f"{self._plan.host}:{self._plan.port}")
        for result in results:
            own = _Client(self._plan, result.number)
            result.sent_at = time.monotonic()
            judge.request(own.path(group.stream), group.stream.headers, own.body(group.stream), result)
        await judge.run(sock, on_ready=task_status.started)

    # Probes

    async def _run_prober(self, group: Prober) -> None:
        """Start probes at fixed moments, also while earlier ones are still open."""
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in itertools.count():
                await trio.sleep_until(begin + number * group.interval_s)
                late_s = trio.current_time() - begin - number * group.interval_s
                for probe in self._probing:
                    probe.late_s = max(probe.late_s, late_s)
                nursery.start_soon(self._run_probe, group, number)

    async def _run_probe(self, group: Prober, number: int) -> None:
        result = ProbeResult(group=group.name, at=time.monotonic())
        self.result.probes.append(result)
        self._probing.append(result)
        await self._probe(_Client(self._plan, number), group, result)
        self._probing.remove(result)

    async def _probe(self, client: _Client, group: Prober, result: ProbeResult) -> None:
        try:
            sock = await client.connect()
        except OSError:
            result.outcome, result.answered_at = "refused", time.monotonic()
            return
        with sock:
            try:
                await send_all(sock, client.encode(group.request))
                result.sent_at = time.monotonic()
                response, _ = await read_response(sock)
            except (OSError, WireError):
                result.outcome = "reset"
            else:
                result.status = response.status
                if response.complete:
                    result.outcome = "answered"
                else:
                    result.outcome = "closed" if response.status is None else "incomplete"
                result.retry_after = "retry-after" in response.headers
                result.connection_close = response.closes
            result.answered_at = time.monotonic()


async def _send_slowly(sock: socket.socket) -> None:
    try:
        while True:
            await send_all(sock, b" ")
            await trio.sleep(0.1)
    except OSError:
        return


def _client_hello() -> bytes:
    """Return a ClientHello, the first message of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def _peer_send_queue_bytes(sock: socket.socket) -> int:
    """Return the bytes in the send queue of the peer, which is on this machine; 0 if the peer is gone."""
    (own_host, own_port), (peer_host, peer_port) = sock.getsockname(), sock.getpeername()
    local, remote = (
        f"{struct.unpack('=I', socket.inet_aton(host))[0]:08X}:{port:04X}"
        for host, port in ((peer_host, peer_port), (own_host, own_port))
    )
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == local and fields[2] == remote:
            return int(fields[4].partition(":")[0], 16)
    return 0


def _read_rest(sock: socket.socket, judge: StreamJudge) -> None:
    """Read the rest of a stalled stream at the end, and judge how it ended."""
    try:
        while data := sock.recv(262144):
            judge.feed(data, time.monotonic())
        judge.end_of_input(time.monotonic())
    except BlockingIOError:
        return
    except OSError:
        judge.reset(time.monotonic())


async def run_command() -> None:
    """Run the process: read one plan, print one result."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lines = aiter(trio.lowlevel.FdStream(0))
    buffer = b""
    while b"\n" not in buffer:
        buffer += await anext(lines)
    plan, _, asked = buffer.partition(b"\n")  # a process that starts late finds more
    load = Load(msgspec.json.decode(plan, type=Plan))
    stop = trio.Event()

    async def answer_until_stop(asked: bytes) -> None:
        while True:
            while b"\n" not in asked:
                if not (data := await anext(lines, b"")):
                    stop.set()
                    return
                asked += data
            line, _, asked = asked.partition(b"\n")
            if line != b"probes":
                stop.set()
                return
            print(load.probes_answered, flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_until_stop, asked)
        await load.run(on_ready=lambda: print("ready", flush=True), stop=stop)
        nursery.cancel_scope.cancel()
    sys.stdout.buffer.write(msgspec.json.encode(load.result) + b"\n")


if __name__ == "__main__":
    trio.run(run_command)
