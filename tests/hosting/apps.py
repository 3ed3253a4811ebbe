"""Applications for the servers of these tests: Lastcall with one thing broken, and a plain one."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import trio
from quart_trio import QuartTrio

from service.clock import wall_clock
from service.errors import StartupError
from service.hosting import lifespan
from service.hosting.application import create_hosted_app
from service.hosting.hypercorn.worker import find_worker
from service.sessions import sessions
from service.setting_sources import load_settings
from service.settings import Settings
from service.stop_state import Phase
from service.supervisor import Service, open_service


@asynccontextmanager
async def refusing(*args: Any, **options: Any) -> AsyncIterator[Service]:
    raise StartupError("the store cannot be opened")
    yield


@asynccontextmanager
async def refusing_in_bytes(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """Refuses to start; the reason contains a file name that is not UTF-8."""
    raise StartupError(f"the store {os.fsdecode(bytes([0xFF]))} cannot be opened")
    yield


@asynccontextmanager
async def refusing_at_times(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """Refuses to start as long as the file named by REFUSE exists."""
    if await trio.Path(os.environ["REFUSE"]).exists():
        raise StartupError("the disk is full")
    async with open_service(*args, **options) as service:
        yield service


def faulty_as_told() -> Any:
    """To be called: what the file named by FAULT says goes wrong in this start."""
    fault = Path(os.environ["FAULT"]).read_text()
    if fault == "import":
        raise ImportError("no module of that name")
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return refusing if fault == "refuse" else open_service


def without_threads() -> Any:
    """To be called: afterwards no thread can be started, as when a limit on processes is reached."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    setattr(threading.Thread, "start", refuse)  # noqa: B010
    return open_service


def without_settings() -> Any:
    """To be called: afterwards reading the settings fails with an unexpected error."""

    def break_down() -> Settings:
        raise RuntimeError("not thought of")

    globals()["load_settings"] = break_down
    return open_service


def ending_at_once() -> Any:
    """To be called: the process ends before it serves, with code 0 and no error."""
    sys.exit(0)


@asynccontextmanager
async def crashing(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A supervisor that crashes as soon as the file named by CRASH exists."""

    async def crash() -> None:
        trigger = trio.Path(os.environ["CRASH"])
        while not await trigger.exists():  # noqa: ASYNC110
            await trio.sleep(0.02)
        raise RuntimeError("a supervisor broke")

    async with trio.open_nursery() as nursery, open_service(*args, **options) as service:
        nursery.start_soon(crash)
        yield service
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def slow_to_open(*args: Any, **options: Any) -> AsyncIterator[Service]:
    os.write(2, b"opening\n")
    await trio.sleep(60)
    async with open_service(*args, **options) as service:
        yield service


@asynccontextmanager
async def slow_to_open_again(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """As ``slow_to_open``, once the file named by SLOW exists."""
    opening = slow_to_open if await trio.Path(os.environ["SLOW"]).exists() else open_service
    async with opening(*args, **options) as service:
        yield service


@asynccontextmanager
async def slow_at_both_ends(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A service that takes a while to open, and to close once hypercorn has stopped."""
    await trio.sleep(0.3)
    async with open_service(*args, **options) as service:
        yield service
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 0.3):
        await trio.sleep_forever()


@asynccontextmanager
async def hanging(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A task tree that never ends."""
    async with open_service(*args, **options) as service:
        yield service
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


@asynccontextmanager
async def blocking(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """An event loop that is blocked from the notice on."""
    async with open_service(*args, **options) as service:
        yield service
    time.sleep(60)  # noqa: ASYNC251  this is the fault


@asynccontextmanager
async def blocking_without_threads(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """As ``blocking``, in a process that can start no thread."""
    async with open_service(*args, **options) as service:
        without_threads()
        yield service
    time.sleep(60)  # noqa: ASYNC251  this is the fault


@asynccontextmanager
async def blocked_before(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """An event loop that is blocked before the stop, as soon as the file named by BLOCK exists."""

    async def block() -> None:
        trigger = trio.Path(os.environ["BLOCK"])
        while not await trigger.exists():  # noqa: ASYNC110
            await trio.sleep(0.02)
        os.write(2, b"blocked\n")
        time.sleep(60)  # noqa: ASYNC251  this is the fault

    async with trio.open_nursery() as nursery, open_service(*args, **options) as service:
        nursery.start_soon(block)
        yield service


async def claim(path: str) -> bool:
    """Make this file. Returns False where another worker has made it."""
    try:
        await trio.Path(path).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@asynccontextmanager
async def holding_the_gil(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A call into C that does not release the GIL. In one worker: the stacks of two would be mixed in the log."""
    async with open_service(*args, **options) as service:
        yield service
    if await claim(os.environ["HELD"]):
        while True:
            ctypes.PyDLL(None).sleep(60)  # a signal ends it early


@asynccontextmanager
async def with_a_stuck_thread(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A thread that never returns and is no daemon: the interpreter waits for it at its end."""
    threading.Thread(target=threading.Event().wait, name="stuck").start()
    async with open_service(*args, **options) as service:
        yield service


@asynccontextmanager
async def waiting_for_a_stuck_thread(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A task that waits for a thread that never returns: no cancellation reaches the task there."""
    async with trio.open_nursery() as nursery, open_service(*args, **options) as service:
        nursery.start_soon(partial(trio.to_thread.run_sync, threading.Event().wait))
        yield service
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def on_a_hanging_disk(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """Once the file named by HANG exists, no sync of the disk returns; the log tells when the first one hangs."""
    from tests.storage.sqlite.faulty_disk import FaultyDisk

    async def hang() -> None:
        trigger = trio.Path(os.environ["HANG"])
        while not await trigger.exists():  # noqa: ASYNC110
            await trio.sleep(0.02)
        disk.running.clear()
        await trio.to_thread.run_sync(disk.hanging.wait, abandon_on_cancel=True)
        os.write(2, b"the disk hangs\n")

    disk = FaultyDisk()
    async with trio.open_nursery() as nursery, open_service(*args, **options) as service:
        nursery.start_soon(hang)
        yield service
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def with_listeners_that_do_not_close(*args: Any, **options: Any) -> AsyncIterator[Service]:
    async def stick(_: lifespan.Hosting) -> None:
        raise RuntimeError("they are stuck")

    setattr(lifespan.Hosting, "close_listeners", stick)  # noqa: B010
    async with open_service(*args, **options) as service:
        yield service


@asynccontextmanager
async def failing_beside(*args: Any, **options: Any) -> AsyncIterator[Service]:
    async def fail(_: lifespan.Hosting, _service: Service) -> None:
        raise RuntimeError("not thought of")

    setattr(lifespan.Hosting, "_announce", fail)  # noqa: B010
    async with open_service(*args, **options) as service:
        yield service


@asynccontextmanager
async def faulty(*args: Any, **options: Any) -> AsyncIterator[Service]:
    async with open_service(*args, **options) as service:
        yield service
        service.shutdown.note_fault("a fault on the way down")


@asynccontextmanager
async def telling_its_finalisation(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """Reports when the interpreter's finalisation begins, after all exit functions."""
    atexit.register(os.write, 2, b"finalised\n")
    async with open_service(*args, **options) as service:
        yield service


def broken(open_broken: Any) -> QuartTrio:
    """The application with one thing broken; hypercorn's command names it ``tests.hosting.apps:broken(crashing)``."""
    setattr(lifespan, "open_service", open_broken)  # noqa: B010
    return create_hosted_app(load_settings)


@asynccontextmanager
async def leaving_a_task(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A task below hypercorn that never ends and cannot be cancelled."""
    worker = find_worker()
    assert worker is not None

    async def stay() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()

    async def leave_it() -> None:
        await service.shutdown.reached(Phase.LAME_DUCK)
        worker.server_nursery.start_soon(stay)

    async with open_service(*args, **options) as service, trio.open_nursery() as nursery:
        nursery.start_soon(leave_it)
        yield service


@asynccontextmanager
async def under_a_server_that_stops(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """hypercorn closes its listeners by itself, without a notice."""
    worker = find_worker()
    assert worker is not None
    async with open_service(*args, **options) as service, trio.open_nursery() as nursery:

        async def stop() -> None:
            await trio.sleep(0.3)
            await worker.context.terminated.set()

        nursery.start_soon(stop)
        yield service


@asynccontextmanager
async def an_hour_later(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """The wall clock is an hour ahead of that of other processes."""
    async with open_service(*args, **options | {"clock": lambda: wall_clock() + timedelta(hours=1)}) as service:
        yield service


@asynccontextmanager
async def where_no_client_has_time_to_come_back(*args: Any, **options: Any) -> AsyncIterator[Service]:
    """A turn of an earlier process waits for its client only for a moment."""
    setattr(sessions, "CLIENT_RETURNS_S", 0.2)  # noqa: B010
    async with open_service(*args, **options) as service:
        yield service


plain = QuartTrio("plain")


@plain.get("/")
async def index() -> str:
    return "here"
