"""A model server as a process of its own, whose reply to an input is fixed, and which notes each of its calls.

``python -m tests.cluster.upstream NOTES [PORT]`` prints its port and appends a line to the file NOTES at the end of
each call. An input has words: ``tokens=40 rate=20`` is a reply of 40 tokens, 20 a second. The reply is a function of
the input alone (:func:`reply_of`), so a text that belongs to another turn, lacks a token or has one twice is found.

``GET /calls`` tells how many calls are open, ``GET /pace/10`` makes all replies ten times slower.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import trio

from tests.cluster.history import Asked

_TOKENS = re.compile(r"\btokens=(\d+)")
_RATE = re.compile(r"\brate=([\d.]+)")
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\n\r\n"


def tokens_of(text: str) -> list[str]:
    """The tokens of the reply to an input. Some of their characters have several bytes."""
    name = text.partition(" ")[0]
    found = _TOKENS.search(text)
    return [f"{name}·{number} " for number in range(int(found[1]) if found else 1)]


def reply_of(text: str) -> str:
    """The whole reply to an input."""
    return "".join(tokens_of(text))


class Upstream:
    """Serves calls until the process is ended."""

    def __init__(self, notes: Path) -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._live = 0
        self._pace = 1.0

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._answer(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the service has closed the call

    async def _answer(self, stream: trio.SocketStream) -> None:
        target, body = await _read_request(stream)
        if target.startswith("/pace/"):
            self._pace = float(target.removeprefix("/pace/"))
        if not target.endswith("/chat/completions"):
            await stream.send_all(_HEAD % b"application/json" + b'{"live": %d}' % self._live)
            return
        messages = json.loads(body)["messages"]
        questions = next(it["content"] for it in reversed(messages) if it["role"] == "user")
        question = questions.rpartition("\n\n")[2]  # those before it had no answer
        said = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        call = _Call(question, after=said)
        self._live += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_at_end, stream, nursery.cancel_scope)
                await self._reply(stream, call)
                nursery.cancel_scope.cancel()
        finally:
            self._live -= 1
            os.write(self._notes, call.note())

    async def _reply(self, stream: trio.SocketStream, call: "_Call") -> None:
        await stream.send_all(_HEAD % b"text/event-stream")
        for token in call.tokens:
            await trio.sleep(self._pace / call.rate)
            await stream.send_all(_chunk({"delta": {"content": token}, "finish_reason": None}))
            call.sent += 1
        usage = {"prompt_tokens": 1, "completion_tokens": call.sent, "total_tokens": call.sent + 1}
        last = _chunk({"delta": {}, "finish_reason": "stop"}, usage=usage)
        await stream.send_all(last + b"data: [DONE]\n\n")


class _Call:
    """One call. ``after`` is the beginning of the reply, where the model is to go on with it."""

    def __init__(self, question: str, *, after: str) -> None:
        self.question = question
        self.opened_at = time.monotonic()
        self.sent = 0
        rate = _RATE.search(question)
        self.rate = float(rate[1]) if rate else 50.0
        whole = reply_of(question)
        rest = whole.removeprefix(after.rstrip()) if after and whole.startswith(after.rstrip()) else whole
        self.tokens = re.findall(r"\S*\s+", rest)

    def note(self) -> bytes:
        times = {"opened_at": self.opened_at, "closed_at": time.monotonic()}
        return msgspec.json.encode(Asked(at=self.opened_at, input=self.question, tokens=self.sent, **times)) + b"\n"


def _chunk(choice: dict[str, Any], **more: object) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "chaos"}
    return b"data: " + json.dumps(chunk | {"choices": [{"index": 0, **choice}], **more}).encode() + b"\n\n"


async def _read_request(stream: trio.SocketStream) -> tuple[str, bytes]:
    """The target and the body of a request."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = await stream.receive_some()
        if not part:
            raise trio.ClosedResourceError
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while len(body) < (int(length[1]) if length else 0):
        part = await stream.receive_some()
        if not part:
            raise trio.ClosedResourceError
        body += part
    return head.split(b" ", 2)[1].decode(), body


async def _cancel_at_end(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    scope.cancel()


async def main(notes: Path, port: int) -> None:
    upstream = Upstream(notes)
    [listener] = await trio.open_tcp_listeners(port, host="127.0.0.1", backlog=1000)
    sys.stdout.write(f"Running on http://127.0.0.1:{listener.socket.getsockname()[1]}\n")
    sys.stdout.flush()
    await trio.serve_listeners(upstream.serve, [listener])


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
