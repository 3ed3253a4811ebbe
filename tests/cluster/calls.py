"""Calls over HTTP/1.1, one connection each. Independent of the service and of its client libraries."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
import trio

from bench.wire import ResponseParser, WireError
from tests.cluster.history import Event

CALL_S = 20
"""Bound on a call that waits for no turn. What the service promises is less."""
CONNECT_S = 3
_event = msgspec.json.Decoder(Event)


class Address(Protocol):
    """Where a server is."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


class NoAnswerError(Exception):
    """No connection, or no whole answer: it is not known what became of the call."""


class Answer(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Stream:
    """An answer whose body is still coming. Made by :func:`open_call`."""

    def __init__(self, connection: trio.SocketStream) -> None:
        self._connection = connection
        self._response = ResponseParser()
        self._early = b""

    @property
    def status(self) -> int:
        assert self._response.status is not None
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read_head(self) -> None:
        while self._response.status is None:
            self._early += await self._receive()

    async def whole(self) -> Answer:
        """Raises: NoAnswerError."""
        body = self._early
        while not self._response.complete:
            body += await self._receive()
        return Answer(self.status, self.headers, body)

    async def events(self, *, silence_s: float) -> AsyncGenerator[Event]:
        """The events up to the end of the body.

        Raises:
            NoAnswerError: The connection was cut, or was silent for too long.
        """
        rest = self._early
        while True:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    yield _event.decode(line[6:])
            if self._response.complete:
                return
            with trio.move_on_after(silence_s) as scope:
                rest += await self._receive()
            if scope.cancelled_caught:
                raise NoAnswerError("silent")

    async def _receive(self) -> bytes:
        try:
            data = await self._connection.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise NoAnswerError(repr(error)) from error
        if not data:
            self._response.end_of_input()
            if self._response.complete:
                return b""
            raise NoAnswerError("the connection was closed")
        try:
            return self._response.feed(data)
        except WireError as error:
            raise AssertionError(f"the server does not speak HTTP: {error}") from error


@asynccontextmanager
async def open_call(
    door: Address,
    method: str,
    path: str,
    headers: Mapping[str, str] = {},
    body: object = None,
    *,
    head_s: float = CALL_S,
) -> AsyncIterator[Stream]:
    """Send a request, and wait for the head of its answer.

    Raises:
        NoAnswerError
    """
    content = b"" if body is None else msgspec.json.encode(body)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {door.host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    request = "\r\n".join([*lines, "", ""]).encode() + content
    with trio.move_on_after(CONNECT_S) as connecting:
        try:
            connection = await trio.open_tcp_stream(door.host, door.port)
        except OSError as error:
            raise NoAnswerError(str(error)) from error
    if connecting.cancelled_caught:
        raise NoAnswerError("no connection in time")
    try:
        stream = Stream(connection)
        with trio.move_on_after(head_s) as waiting:
            try:
                await connection.send_all(request)
            except trio.BrokenResourceError:
                pass  # the answer may be there all the same
            await stream.read_head()
        if waiting.cancelled_caught:
            raise NoAnswerError("no answer in time")
        yield stream
    finally:
        await trio.aclose_forcefully(connection)


async def call(
    door: Address,
    method: str,
    path: str,
    headers: Mapping[str, str] = {},
    body: object = None,
    *,
    within_s: float = CALL_S,
) -> Answer:
    """Raises: NoAnswerError."""
    with trio.move_on_after(within_s):
        async with open_call(door, method, path, headers, body, head_s=within_s) as stream:
            return await stream.whole()
    raise NoAnswerError("no whole answer in time")
