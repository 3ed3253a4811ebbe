"""A link to PostgreSQL or to another replica that can be cut, stalled and slow, as a network can."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import trio

LinkState = Literal["up", "refused", "silent", "slow"]
DELAY_S = 0.2
"""What a slow link adds to each piece, each way."""
_PIECE_BYTES = 65536


class Link:
    """Made by :func:`open_link`.

    Attributes:
        port: Where the process connects.
        connections: How many it has passed on.
        server: Where new connections lead to: a Unix socket, or a host and a port.
    """

    def __init__(self, server: Path | tuple[str, int]) -> None:
        self.port = 0
        self.connections = 0
        self.server = server
        self._state: LinkState = "up"
        self._changed = trio.Event()
        self._open: set[trio.SocketStream] = set()
        self._held: bytes | None = None
        self._released = trio.Event()

    @property
    def store_url(self) -> str:
        """The database by way of this link."""
        return f"postgresql://lastcall@127.0.0.1:{self.port}/postgres?sslmode=disable&gssencmode=disable"

    @property
    def state(self) -> LinkState:
        return self._state

    async def set(self, state: LinkState) -> None:
        """``refused`` closes what is open, ``silent`` loses nothing but passes nothing on: a half-open network."""
        self._state = state
        self._changed.set()
        self._changed = trio.Event()
        if state == "refused":
            await self.cut()

    def hold(self, words: bytes) -> None:
        """Keep back each piece to the server that has these words, and what follows on its connection."""
        self._held = words
        self._released = trio.Event()

    def release(self) -> None:
        """Pass on what was kept back."""
        self._held = None
        self._released.set()

    async def cut(self) -> None:
        """Close all connections."""
        opened, self._open = self._open, set()
        for stream in opened:
            await trio.aclose_forcefully(stream)

    async def serve(self, client: trio.SocketStream) -> None:
        if self._state == "refused":
            await trio.aclose_forcefully(client)
            return
        try:
            if isinstance(self.server, Path):
                server = await trio.open_unix_socket(str(self.server))
            else:
                server = await trio.open_tcp_stream(*self.server)
        except OSError:
            await trio.aclose_forcefully(client)
            return
        self.connections += 1
        self._open |= {client, server}
        try:
            async with client, server, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, server, client, nursery.cancel_scope)
                await self._pass_on(client, server, nursery.cancel_scope, holds=True)
        finally:
            self._open -= {client, server}

    async def _pass_on(
        self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope, *, holds: bool = False
    ) -> None:
        try:
            while data := await source.receive_some(_PIECE_BYTES):
                if holds and self._held is not None and self._held in data:
                    await self._released.wait()
                if self._state == "slow":
                    await trio.sleep(DELAY_S)
                while self._state == "silent":
                    await self._changed.wait()
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        while self._state == "silent":  # the end of a connection does not get through, either
            await self._changed.wait()
        both.cancel()


@asynccontextmanager
async def open_link(server: Path | tuple[str, int]) -> AsyncIterator[Link]:
    link = Link(server)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, link.serve, 0, host="127.0.0.1")
        [listener] = await nursery.start(serve)
        link.port = listener.socket.getsockname()[1]
        try:
            yield link
        finally:
            nursery.cancel_scope.cancel()
