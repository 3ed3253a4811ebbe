"""hypercorn in this process, for tests that need no signal."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import hypercorn.trio
import pytest
import trio
from hypercorn.config import Config
from quart_trio import QuartTrio

from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.patches import install_connections
from service.stop_state import StopState

Serve = Callable[..., AbstractAsyncContextManager["Served"]]
PATIENT_S = 8.0
"""Bound of the wait for an end that must come. No statement about time: the machine may be busy."""
BRIEF_S = 1.0
"""How long a test watches that a connection or server does not end."""


class Served:
    """A hypercorn that serves in this process.

    Attributes:
        stop: The shutdown trigger.
        gone: Set when hypercorn has ended.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.stop = trio.Event()
        self.gone = trio.Event()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)


@pytest.fixture
def serve() -> Serve:
    @asynccontextmanager
    async def serving(app: QuartTrio, **configuration: Any) -> AsyncIterator[Served]:
        config = Config.from_mapping(bind=["127.0.0.1:0"], errorlog=None, **configuration)

        async def run(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  hypercorn does
            await hypercorn.trio.serve(app, config, shutdown_trigger=stop.wait, task_status=task_status)
            served.gone.set()

        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            [address] = await nursery.start(run)
            served = Served(int(address.rpartition(":")[2]))
            served.stop = stop
            yield served
            nursery.cancel_scope.cancel()

    return serving


@pytest.fixture
def connections() -> Iterator[Connections]:
    """Connections in the place of hypercorn's own until the test is over."""
    connections = Connections(StopState())
    with install_connections(connections.open):
        yield connections
