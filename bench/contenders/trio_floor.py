"""A floor: a bare Trio socket server that makes its own tokens and ends its streams on SIGTERM.

It does less than any contender: it has no framework, no model server and no store.
"""

import os
import re
import signal
import time
from contextlib import suppress
from functools import partial

import trio

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def chunk(event: str) -> bytes:
    data = f"data: {event}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


class Floor:
    """Run the server: when ``stopping`` is set, all streams end and idle connections are dropped."""

    def __init__(self) -> None:
        self.stopping = trio.Event()
        self.idle: set[trio.CancelScope] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while not self.stopping.is_set() and (request := await self.wait_request(stream)):
                    if request.startswith(b"POST"):
                        await self.send_reply(stream, request.decode())
                    else:
                        await stream.send_all(PLAIN)

    async def wait_request(self, stream: trio.SocketStream) -> bytes:
        request = b""
        with trio.CancelScope() as scope:
            self.idle.add(scope)
            request = await read_request(stream)
        self.idle.discard(scope)
        return request

    async def send_reply(self, stream: trio.SocketStream, request: str) -> None:
        words = dict(re.findall(r"(rate|tokens|silent_after)=(\d+)", request))
        rate, tokens = int(words.get("rate", 20)), int(words.get("tokens", 0))
        silent_after = int(words.get("silent_after", 0))
        await stream.send_all(HEAD)
        number = 0
        while (not tokens or number < tokens) and not self.stopping.is_set():
            number += 1
            text = f"<{number}@{time.monotonic_ns()}> "
            await stream.send_all(chunk(f'{{"type":"turn.delta","text":"{text}"}}'))
            with trio.move_on_after(float("inf") if number == silent_after else 1 / rate if rate else 0):
                await self.stopping.wait()
        terminal = "completed" if tokens and number == tokens else "interrupted"
        await stream.send_all(chunk(f'{{"type":"turn.{terminal}"}}') + b"0\r\n\r\n")

    async def run(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as streams:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(partial(trio.serve_listeners, self.serve, listeners, handler_nursery=streams))
                    print(f"Running on http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", flush=True)
                    await anext(aiter(signals))
                    accepting.cancel_scope.cancel()
            self.stopping.set()
            for scope in list(self.idle):
                scope.cancel()
            streams.cancel_scope.deadline = trio.current_time() + 2
        os._exit(0)


async def read_request(stream: trio.SocketStream) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        data = await stream.receive_some()
        if not data:
            return b""
        request += data
    length = int((re.findall(rb"(?i)content-length: (\d+)", request) or [b"0"])[0])
    while len(request.partition(b"\r\n\r\n")[2]) < length:
        request += await stream.receive_some()
    return request


if __name__ == "__main__":
    trio.run(Floor().run)
