"""The moment when the listeners close, and the behaviour of hypercorn's own listeners."""

import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import hypercorn.trio.run
import hypercorn.utils
import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from quart_trio import QuartTrio

from service.hosting import lifespan
from service.hosting.hypercorn.worker import HypercornMaster
from service.hosting.lifespan import Hosting
from service.hosting.listeners.closing import DeferredTermination
from service.stop_state import Phase, StopState

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.mark.removal
async def test_hypercorn_lets_clients_that_connect_after_its_stop_hang_and_resets_them() -> None:
    """This test fails once hypercorn answers until the end; then ListenerShutdown is no longer needed."""
    app = QuartTrio("test")
    stop = trio.Event()
    with trio.fail_after(10), listening() as held_by_the_master:
        worker = held_by_the_master.dup()
        config = Config.from_mapping(bind=[f"fd://{worker.detach()}"], errorlog=None)
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  hypercorn does
                await hypercorn.trio.serve(app, config, shutdown_trigger=stop.wait, task_status=task_status)

            await nursery.start(serve)
            stop.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
        with socket.create_connection(held_by_the_master.getsockname()) as client:
            client.sendall(GET)
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)
            held_by_the_master.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_the_next_listen_opens_a_shut_listener_again() -> None:
    """After a reload that looked like a stop the next worker still serves: each hypercorn worker calls listen again."""
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        address = finder.getsockname()
    with socket.create_server(address) as listener:
        listener.setblocking(False)
        listener.shutdown(socket.SHUT_RD)
        listener.listen()
        socket.create_connection(address).close()
    assert "listen" in hypercorn.trio.run.trio_worker.__code__.co_names


async def test_hypercorn_s_stop_is_deferred_until_the_listeners_are_closed() -> None:
    wishes: list[None] = []
    stop = StopState()
    termination = DeferredTermination(stop, lambda: wishes.append(None))
    context = WorkerContext(max_requests=0)
    context.terminate = termination
    released = trio.Event()

    async def wait() -> None:
        with pytest.raises(hypercorn.utils.ShutdownError):
            await hypercorn.utils.raise_shutdown(context.terminate.wait)
        released.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await context.mark_request()
        await trio.testing.wait_all_tasks_blocked()
        assert len(wishes) == 1
        assert not released.is_set()
        assert not termination.is_set()
        stop.enter(Phase.CLOSING)
        await trio.testing.wait_all_tasks_blocked()
        assert not released.is_set()
        stop.enter(Phase.INTERRUPTING)
    assert termination.is_set()


def test_hypercorn_binds_its_trigger_only_after_the_start_of_the_lifespan() -> None:
    """The deferred termination is installed while the lifespan starts."""
    names = list(hypercorn.trio.run.worker_serve.__code__.co_names)
    assert names.index("wait_for_startup") < names.index("terminate")


POLL = "import select; select.poll().poll()"
WAIT = """
import os, sys
pid = os.fork()
if not pid:
    sys.stdin.read()
    os._exit(0)
os.waitpid(pid, 0)
"""


@pytest.mark.parametrize(("what", "program"), [("any worker", POLL), ("all workers", WAIT)])
async def test_a_master_shows_what_it_waits_for(what: str, program: str) -> None:
    """A stop and a reload set the same event; only the kernel can tell them apart."""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:  # noqa: ASYNC220
        master = HypercornMaster(process.pid, multiprocessing.get_context("fork").Event(), sentinel=-1)
        with trio.fail_after(10):
            while master.waits_for() != what:  # noqa: ASYNC110
                await trio.sleep(0.01)
        if program is POLL:
            process.terminate()


async def test_a_drain_without_turns_leaves_no_clients_to_others() -> None:
    """Otherwise the worker would show DRAINING after LEAVING, and the others would count on its answers."""
    left: list[None] = []

    async def leave_clients_to_others() -> None:
        left.append(None)
        await trio.sleep_forever()

    for phases in ([Phase.DRAINING], [Phase.DRAINING, Phase.CLOSING], [Phase.CLOSING]):
        stop = StopState()
        hosting = MagicMock(
            _shutdown=stop, _listener_shutdown=SimpleNamespace(leave_clients_to_others=leave_clients_to_others)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Hosting._leave_clients_to_others, cast("Hosting", hosting))
            await trio.testing.wait_all_tasks_blocked()
            for phase in phases:
                stop.enter(phase)
            await trio.testing.wait_all_tasks_blocked()
            assert bool(left) == (phases == [Phase.DRAINING])
            left.clear()
            stop.enter(Phase.CLOSING)


async def test_hypercorn_may_stop_after_any_end_of_the_hosting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifespan, "install_in_worker", lambda **_: nullcontext())
    stop, nothing = StopState(), MagicMock()
    hosting = MagicMock(_shutdown=stop, _worker=nothing, _connections=nothing, _listeners=nothing, _notice=nothing)
    with pytest.raises(RuntimeError), Hosting.install(cast("Hosting", hosting)):
        raise RuntimeError
    assert stop.phase is Phase.RELEASED
