"""The listener of ``metrics_bind``: answers requests for the metrics, without a key, and no other ones.

A connection has one answer, so that no client keeps the places of others. On a loopback address the listener serves
this machine, so the host of a request is checked as elsewhere: else a web page whose name points to this machine reads
the metrics through the user's browser. Proven by ``tests/process/test_metrics.py``.
"""

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import structlog
import trio
from hypercorn.typing import AppWrapper, ConnectionState, Scope

from service.api.http.access import is_loopback
from service.api.http.app_state import LOOPBACK_HOST_ONLY, METRICS_ONLY
from service.cluster.peer_address import shown_host_port
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.http1_connection import Stream
from service.hosting.hypercorn.worker import Worker
from service.hosting.listeners.shared_port import METRICS_PORT
from service.settings import Settings

logger = structlog.get_logger("lastcall.metrics")

CONNECTIONS_MAX = 64
"""Bound on the connections of one worker: a monitor needs one."""
ACCEPT_PAUSE_S = 0.1


@asynccontextmanager
async def open_metrics_listener(
    worker: Worker, connections: Connections, *, serving: trio.Event, settings: Settings
) -> AsyncIterator[None]:
    """Listen until the context is left; without the setting nothing listens.

    The connections close together with hypercorn's other ones.

    Raises:
        StartupError: The port is taken, or the setting has changed since the master's start.
    """
    port = METRICS_PORT.open(worker.config, settings.metrics_bind)
    if port is None:
        yield
        return
    with trio.socket.from_stdlib_socket(port) as listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_Listener(listening, worker, connections).run, serving, name="metrics listener")
            yield
            nursery.cancel_scope.cancel()


class _Listener:
    def __init__(self, listening: trio.socket.SocketType, worker: Worker, connections: Connections) -> None:
        self._listening = listening
        self._worker = worker
        self._connections = connections
        self._places = trio.Semaphore(CONNECTIONS_MAX)
        self._marks = {METRICS_ONLY: True}
        if is_loopback(listening.getsockname()[0]):
            self._marks[LOOPBACK_HOST_ONLY] = True
        self._config = copy.copy(worker.config)
        self._config.keep_alive_max_requests = 1

    async def run(self, serving: trio.Event) -> None:
        await serving.wait()
        logger.info("metrics are served", bind=shown_host_port(*self._listening.getsockname()[:2]))
        while True:
            await self._places.acquire()
            try:
                accepted, _ = await self._listening.accept()
            except OSError as error:  # no descriptor is left, or the client has gone already
                self._places.release()
                logger.warning("a connection for the metrics could not be accepted", error=error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            try:
                self._worker.server_nursery.start_soon(self._serve, trio.SocketStream(accepted), name="metrics")
            except RuntimeError:  # hypercorn has stopped
                accepted.close()
                self._places.release()

    async def _serve(self, stream: trio.SocketStream) -> None:
        worker = self._worker
        app = cast("AppWrapper", _MetricsOnly(worker.app, self._marks))
        try:
            with stream.socket:
                connection = self._connections.open(
                    app, self._config, worker.context, ConnectionState({}), cast("Stream", stream)
                )
                await connection.run()
        finally:
            self._places.release()


class _MetricsOnly:
    """The application, with marks on each request: nothing but the metrics is answered."""

    def __init__(self, app: AppWrapper, marks: dict[str, bool]) -> None:
        self._app = app
        self._marks = marks

    async def __call__(self, scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        await self._app(cast("Scope", {**scope, **self._marks}), receive, send, *rest)
