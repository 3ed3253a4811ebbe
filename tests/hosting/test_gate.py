"""The gate and its doors, and what happens at hypercorn's without them."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hypercorn.trio.run
import hypercorn.utils
import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from quart_trio import QuartTrio

from service.hosting.gate import HeldTermination
from service.hosting.siblings import holds, others_answer
from service.hosting.worker import Master

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


async def test_who_connects_after_hypercorn_was_told_to_stop_is_left_hanging_and_reset() -> None:
    """Fails when hypercorn answers until the end: then the gate can go."""
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


def test_the_next_listen_opens_a_door_again() -> None:
    """Where a reload is taken for a stop, the next worker serves all the same: hypercorn's workers listen anew."""
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        address = finder.getsockname()
    with socket.create_server(address) as listener:
        listener.setblocking(False)
        listener.shutdown(socket.SHUT_RD)
        listener.listen()
        socket.create_connection(address).close()
    assert "listen" in hypercorn.trio.run.trio_worker.__code__.co_names


HOLD = "import sys; sys.stdin.read()"
HOLD_MARKED = (
    "import sys; from service.hosting.siblings import mark_as_leaving; "
    "mark_as_leaving(); print('marked', flush=True); sys.stdin.read()"
)


@pytest.mark.parametrize(("held_by", "answers"), [(HOLD, True), (HOLD_MARKED, False)])
def test_another_process_answers_unless_it_says_that_it_leaves(held_by: str, answers: bool) -> None:
    with listening() as listener:
        command = [sys.executable, "-c", held_by]
        with subprocess.Popen(
            command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            if held_by is HOLD_MARKED:
                other.stdout.readline()
            try:
                assert holds(other.pid, [listener])
                assert others_answer([listener], parent=os.getpid()) is answers
                assert not others_answer([listener], parent=other.pid)
            finally:
                other.communicate()


async def test_hypercorn_is_held_until_it_is_released() -> None:
    wishes: list[None] = []
    held = HeldTermination(lambda: wishes.append(None))
    context = WorkerContext(max_requests=0)
    context.terminate = held
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
        assert not held.is_set()
        held.release()
    assert held.is_set()


def test_hypercorn_binds_its_trigger_only_after_the_start_of_the_lifespan() -> None:
    """The gate is put into its place while the lifespan starts."""
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
    """A stop and a reload set the same event; only the kernel tells the one from the other."""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:  # noqa: ASYNC220
        master = Master(process.pid, multiprocessing.get_context("fork").Event(), sentinel=-1)
        with trio.fail_after(10):
            while master.waits_for() != what:  # noqa: ASYNC110
                await trio.sleep(0.01)
        if program is POLL:
            process.terminate()
