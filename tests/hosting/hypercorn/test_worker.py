"""hypercorn's private variables have the expected names. These tests fail first when a new version moves them."""

import inspect
import multiprocessing
import socket
from multiprocessing.process import BaseProcess
from types import CoroutineType
from typing import Any

import hypercorn.run
import hypercorn.trio.run
import pytest
import trio
import trio.lowlevel
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import Scope
from quart_trio import QuartTrio

from service.errors import StartupError
from service.hosting.hypercorn import worker
from service.hosting.hypercorn.worker import Worker, find_worker
from tests.hosting.conftest import Serve


@pytest.mark.parametrize("name", ["app", "config", "context", "server_nursery"])
def test_worker_serve_has_the_variables_that_we_need(name: str) -> None:
    assert (
        name
        in hypercorn.trio.run.worker_serve.__code__.co_varnames + hypercorn.trio.run.worker_serve.__code__.co_cellvars
    )


def test_a_worker_gets_the_masters_event_as_a_keyword() -> None:
    assert '"shutdown_event": shutdown_event' in inspect.getsource(hypercorn.run._populate)
    assert "self._kwargs" in inspect.getsource(BaseProcess.run)


def test_the_masters_event_shows_its_value_without_its_locks() -> None:
    event = multiprocessing.get_context("fork").Event()  # as hypercorn's, without a process to track it
    value = event._flag.get_value  # type: ignore[attr-defined]
    assert value() == 0
    event.set()
    assert value() == 1
    event.clear()
    assert value() == 0


async def test_another_hypercorn_is_refused() -> None:
    async def worker_serve() -> None:
        context = "something else"
        await trio.lowlevel.checkpoint()
        assert context

    coroutine: CoroutineType[Any, Any, None] = worker_serve()  # type: ignore[assignment]
    try:
        coroutine.send(None)
    except StopIteration:
        pytest.fail("it should wait")
    assert coroutine.cr_frame is not None
    with pytest.raises(StartupError, match="worker_serve has no"):
        Worker(trio.lowlevel.current_task(), coroutine.cr_frame)
    coroutine.close()


async def test_hypercorn_inside_another_program_has_no_worker(serve: Serve) -> None:
    """The service leaves the signals and the exit code of another program alone."""
    found: list[Worker | None] = []

    class Lifespan:
        def __init__(self, app: QuartTrio, scope: Scope) -> None: ...

        async def __call__(self, receive, send) -> None:  # type: ignore[no-untyped-def]
            await receive()
            found.append(find_worker())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    app = QuartTrio("guest")
    app.asgi_lifespan_class = Lifespan  # type: ignore[assignment]
    async with serve(app):
        assert found == [None]


def test_a_connection_sees_the_context_that_hypercorn_knows() -> None:
    """ConnectionContext stands in for hypercorn's context, so it must have all of the attributes."""
    assert set(vars(WorkerContext(None))) == {"max_requests", "requests", "terminate", "terminated"}


def test_each_form_of_a_bind_has_an_address() -> None:
    """``check_stand_in`` relies on the address, also where bare hypercorn's ``--bind`` differs from the settings."""
    assert worker._address_of_bind("0.0.0.0") == "0.0.0.0:8000"
    assert worker._address_of_bind("[::]:80") == "[::]:80"
    assert worker._address_of_bind("unix:/run/a.sock") == "unix:/run/a.sock"
    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
        assert worker._address_of_bind(f"fd://{given.fileno()}") == f"127.0.0.1:{port}"
        given.getsockname()  # the socket is still open
