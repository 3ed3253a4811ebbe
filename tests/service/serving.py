"""The whole service in the test's own process, on a real port, with real model clients."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from service.api.app import attach, create_app, detach
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.settings import Settings
from service.supervisor import Service, open_service


class Serving:
    """A service that is served on a port."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        """One request on a connection of its own; the status and the JSON that came back."""
        async with await self.connect(method, path, body) as stream:
            head, _, rest = (await read_to_end(stream)).partition(b"\r\n\r\n")
            return int(head.split()[1]), json.loads(rest) if rest else {}

    async def connect(
        self, method: str, path: str, body: object = None, *, accept: str = "application/json"
    ) -> trio.SocketStream:
        """Send a request and leave the answer to the caller, who closes the stream."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        data = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "content-type: application/json\r\n"
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\naccept: {accept}\r\n{kind}"
            f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        await stream.send_all(head.encode() + data)
        return stream


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """All bytes until the peer closes."""
    received = bytearray()
    while data := await stream.receive_some():
        received += data
    return bytes(received)


@asynccontextmanager
async def serving(settings: Settings, **parts: Any) -> AsyncIterator[Serving]:
    """Serve with hypercorn, without the shutdown of our hosting; leaving stops at once.

    Args:
        parts: Of :func:`~service.supervisor.open_service`.
    """
    app = create_app()
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.graceful_timeout = 0
    async with open_service(settings, **parts) as service, trio.open_nursery() as nursery:
        attach(app, service)
        app.asgi_lifespan_class = _NoLifespan  # type: ignore[assignment]
        app.asgi_http_class = AsgiRequest
        binds = await nursery.start(partial(serve, app, config, shutdown_trigger=trio.sleep_forever))
        yield Serving(service, int(binds[0].rpartition(":")[2]))
        nursery.cancel_scope.cancel()
    detach(app)


class _NoLifespan:
    """The tree is the test's here."""

    def __init__(self, *_: object) -> None:
        pass

    async def __call__(self, receive: object, send: object) -> None:
        assert callable(receive)
        assert callable(send)
        while True:
            event = await receive()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return
