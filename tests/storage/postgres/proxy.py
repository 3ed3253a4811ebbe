"""A proxy between a store and its server: it can be away, cut connections, and hold back what a client or
the server has sent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from tests.postgres_server import CONNECT_S, PostgresServer


class Proxy:
    """Made by :func:`open_proxy`.

    Attributes:
        url: The server's URL by way of the proxy.
        is_away: Whether connections are refused.
        silences_new: Whether no answer of the server passes on new connections.
    """

    def __init__(self, entrance: Path, port: int) -> None:
        options = f"sslmode=disable&gssencmode=disable&connect_timeout={CONNECT_S}"
        self.url = f"postgresql://lastcall@127.0.0.1:{port}/postgres?{options}"
        self.is_away = False
        self.silences_new = False
        self.holding = trio.Event()
        self.released = trio.Event()
        self._holds: bytes | None = None
        self._socket = entrance / ".s.PGSQL.5432"
        self._open: list[trio.abc.AsyncResource] = []
        self._silent: set[trio.abc.AsyncResource] = set()

    def hold(self, mark: bytes) -> None:
        """Hold back the next message with this mark, and all after it on its connection. The client is cut off."""
        self._holds = mark

    def silence(self) -> None:
        """Let no answer of the server pass any more on the connections that are open, as a network that is cut."""
        self._silent.update(self._open)

    async def cut(self) -> None:
        """Cut all connections, on both sides."""
        opened, self._open = self._open, []
        self._silent.clear()
        for stream in opened:
            await trio.aclose_forcefully(stream)

    async def serve(self, client: trio.SocketStream) -> None:
        if self.is_away:
            await trio.aclose_forcefully(client)
            return
        server = await trio.open_unix_socket(str(self._socket))
        self._open += [client, server]
        if self.silences_new:
            self._silent.add(client)
        answered = trio.Event()
        """Set when the client cannot take an answer, or there is none any more."""
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._answers, server, client, answered)
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._requests(client, server, answered)
            nursery.cancel_scope.cancel()

    async def _requests(self, client: trio.SocketStream, server: trio.SocketStream, answered: trio.Event) -> None:
        while sent := await client.receive_some():
            if self._holds is not None and self._holds in sent:
                self._holds = None
                self.holding.set()
                await trio.aclose_forcefully(client)
                await self.released.wait()
                await server.send_all(sent)
                await answered.wait()
                return
            await server.send_all(sent)

    async def _answers(self, server: trio.SocketStream, client: trio.SocketStream, answered: trio.Event) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while part := await server.receive_some():
                if client not in self._silent:
                    await client.send_all(part)
        if client not in self._silent:
            await trio.aclose_forcefully(client)
        answered.set()


@asynccontextmanager
async def open_proxy(server: PostgresServer, *, entrance: Path | None = None) -> AsyncIterator[Proxy]:
    """Args: entrance: The folder of the socket to which the proxy leads, if it is not that of all stores."""
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = Proxy(entrance or server.entrance, listener.socket.getsockname()[1])
        await nursery.start(trio.serve_listeners, proxy.serve, [listener])
        yield proxy
        await proxy.cut()
        nursery.cancel_scope.cancel()
