"""A load for :mod:`bench.hot_path`: one process with the real server in it, fed in lock step, and counted.

The server is that of ``lastcall serve``, with its connections, its API, its model client over HTTP and its memory
store. Clients and model server are sockets that this module feeds while the event loop has nothing to do: an instrument
of Trio that is called before the loop sleeps. So each round of tokens is read, relayed and written before the next one
is sent, on any machine, however slow the counting makes it. Time stands still while the server works, for the same
reason: a service that believes itself late goes other ways.
"""

import ctypes
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, Protocol

import trio

from bench.watched_server import run_server

STREAMS = 10
ROUNDS = 20
STARTS = 10
WARM_UP_ROUNDS = 30  # by then the interpreter has specialized its code
WARM_UP_STARTS = 10
CALIBRATIONS = 200
PAD = 60
TICK_S = 0.005
_FED_MAX = 100_000  # steps of the script: a server that gives no answer ends the load


class Counter(Protocol):
    """Counts the work of this process between ``begin`` and ``end``."""

    counts: dict[str, int]  # by name, for each time; empty if the counts are elsewhere

    def begin(self) -> None: ...

    def end(self, name: str, times: int) -> None:
        """Note the count of something that was done so many times."""
        ...


class BytecodeCounter:
    """Counts the bytecode instructions of this thread, without those of the load. Blind to work in C and the kernel."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._count = 0

    def begin(self) -> None:
        self._count = 0
        sys.settrace(self._on_call)

    def end(self, name: str, times: int) -> None:
        sys.settrace(None)
        self.counts[name] = self._count // times

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:  # noqa: ARG002  what sys.settrace passes
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_opcode

    def _on_opcode(self, frame: FrameType, event: str, arg: Any) -> Any:  # noqa: ARG002  what sys.settrace passes
        if event == "opcode":
            self._count += 1
        return self._on_opcode


class CallgrindCounter:
    """Tells callgrind, under which this process runs, when to count, and to write each count to its file.

    A client request of valgrind is a sequence of machine code that does nothing by itself, and there is no other call.

    Source: https://valgrind.org/docs/manual/cl-manual.html#cl-manual.clientrequests and valgrind.h
    """

    _DUMP_AT, _START, _STOP = (0x43540000 + number for number in (3, 4, 5))
    _RUNNING_ON_VALGRIND = 0x1001
    # mov rax, rdi; xor edx, edx; four rotations of rdi, by 128 bits in all; xchg rbx, rbx; mov rax, rdx; ret
    _CODE = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # callgrind writes them into its files
        self._memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._memory.write(self._CODE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._call = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(address)
        if not self._request(self._RUNNING_ON_VALGRIND):
            sys.exit("callgrind does not run this process")

    def begin(self) -> None:
        self._request(self._START)

    def end(self, name: str, times: int) -> None:
        text = ctypes.create_string_buffer(f"{name} {times}".encode())
        self._request(self._DUMP_AT, ctypes.addressof(text))
        self._request(self._STOP)

    def _request(self, number: int, argument: int = 0) -> int:
        words = (ctypes.c_ulong * 6)(number, argument)
        return int(self._call(ctypes.addressof(words)))


class StandingClock(trio.abc.Clock):
    """Trio's clock, and the service's: it moves a tick whenever the event loop has nothing to do."""

    def __init__(self) -> None:
        self.now = 1000.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Return how long to wait for sockets and threads: a moment, so that the clock moves on."""
        return min(max(deadline - self.now, 0.0), 0.01)


class Feeder(trio.abc.Instrument):
    """The clients and the model server, and an instrument of Trio that feeds both while the event loop is idle."""

    def __init__(self, counter: Counter, clock: StandingClock) -> None:
        self.port = 0
        self._counter = counter
        self._clock = clock
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self._script = self._run()
        self._fed = 0

    @property
    def upstream_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def before_io_wait(self, timeout: float) -> None:
        """Trio's hook before it waits for sockets: the server has done all that it can for now."""
        if timeout <= 0 or not self.port:
            return
        self._clock.now += TICK_S
        self._fed += 1
        if self._fed > _FED_MAX:
            sys.stderr.write("the server gives no answer\n")
            os._exit(1)
        try:
            next(self._script)
        except StopIteration:
            sys.stdout.write(json.dumps(self._counter.counts) + "\n")
            sys.stdout.flush()
            os._exit(0)  # the stop of the service is not measured

    def _run(self) -> Generator[None, None, None]:
        """The load from its begin to its end. Each ``yield`` lets the server work until it is idle again."""
        for _ in range(WARM_UP_STARTS):
            yield from self._start()
        chats = []
        for _ in range(STREAMS):
            chats.append((yield from self._start()))  # noqa: PERF401  no generator can be left in a comprehension
        for number in range(WARM_UP_ROUNDS):
            yield from self._round(chats, number + 2)
        self._counter.begin()
        for number in range(ROUNDS):
            yield from self._round(chats, number + 2 + WARM_UP_ROUNDS)
        self._counter.end("token", ROUNDS * STREAMS)
        self._counter.begin()
        for _ in range(STARTS):
            yield from self._start()
        self._counter.end("start", STARTS)
        self._counter.begin()
        for number in range(CALIBRATIONS):
            calibrate(number)
        self._counter.end("calibration", CALIBRATIONS)

    def _start(self) -> Generator[None, None, "_Chat"]:
        """Begin a chat, on a new connection, until its first token has come."""
        chat = _Chat(self.port)
        while not chat.accept(self._listener):
            yield
        chat.send_token(1, head=True)
        yield from self._wait(chat, 1)
        return chat

    def _round(self, chats: list["_Chat"], number: int) -> Generator[None, None, None]:
        """Send one token on each stream, and wait until all have been relayed."""
        for chat in chats:
            chat.send_token(number)
        for chat in chats:
            yield from self._wait(chat, number)

    def _wait(self, chat: "_Chat", tokens: int) -> Generator[None, None, None]:
        while chat.received_tokens() < tokens:
            yield


class _Chat:
    """One client, and its model's connection."""

    def __init__(self, port: int) -> None:
        self._client = socket.create_connection(("127.0.0.1", port))
        self._client.setblocking(False)
        self._client.send(_REQUEST)
        self._model: socket.socket | None = None
        self._asked = b""
        self._received = b""
        self._tokens = 0

    def accept(self, listener: socket.socket) -> bool:
        """Take the server's connection and request; whether both have come."""
        try:
            if self._model is None:
                self._model, _ = listener.accept()
                self._model.setblocking(False)
                self._model.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._asked += self._model.recv(65536)
        except BlockingIOError:
            return False
        return self._asked.endswith(b"}")

    def send_token(self, number: int, *, head: bool = False) -> None:
        assert self._model is not None
        self._model.send((_HEAD if head else b"") + _TOKEN % number)

    def received_tokens(self) -> int:
        try:
            data = self._client.recv(65536)
        except BlockingIOError:
            return self._tokens
        if not data:
            sys.stderr.write(f"the server has closed a stream: {self._received!r}\n")
            os._exit(1)
        self._received = (self._received + data)[-4096:] if self._tokens == 0 else self._received
        self._tokens += data.count(b"turn.delta\ndata:") or data.count(b'"turn.delta"')
        return self._tokens


def calibrate(number: int) -> int:
    """Work of the kind that the hot path is made of: another build of Python takes another number of instructions."""
    words = {f"key{index}": str(index * number) for index in range(20)}
    text = json.dumps(words)
    return sum(len(value) for value in json.loads(text).values())


_BODY = b'{"message": "Hello"}'
_REQUEST = (
    b"POST /chat HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_FRAME = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":"%-60b"},"finish_reason":null}]}\n\n'
)
_TOKEN = b"%x\r\n%b\r\n" % (len(_FRAME % b""), _FRAME.replace(b"%-60b", b"%-60d"))


def serve(counter: Counter, *, telemetry: bool = False) -> None:
    """Serve as ``lastcall serve`` does, until the load is over; then the process ends with its counts on stdout.

    Args:
        telemetry: Whether access log and traces are on. No span is sent: that is another thread's work, which is not
            counted, and would begin at some moment of the load.
    """
    clock = StandingClock()
    feeder = Feeder(counter, clock)
    os.environ |= {
        "LASTCALL_BIND": "127.0.0.1:0",
        "LASTCALL_STORE_URL": "memory:",
        "LASTCALL_MODEL": "bench",
        "LASTCALL_MODEL_URL": feeder.upstream_url,
        "LASTCALL_LOG_LEVEL": "error",
    }
    if telemetry:
        os.environ |= {
            "LASTCALL_ACCESS_LOG": "on",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        }
    # The service measures its own delays and steps with these.
    time.perf_counter = time.thread_time = clock.current_time

    def feed(_app: Any, port: int) -> list[trio.abc.Instrument]:
        feeder.port = port
        return [feeder]

    run_server(feed, clock=clock)


COUNTERS: dict[str, Callable[[], Counter]] = {"bytecodes": BytecodeCounter, "instructions": CallgrindCounter}

if __name__ == "__main__":
    serve(COUNTERS[sys.argv[1]](), telemetry="telemetry" in sys.argv[2:])
