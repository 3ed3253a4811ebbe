"""The hypercorn worker that this service runs in: the one place that names hypercorn's private variables.

All of them are looked up once, when the lifespan begins. If one is missing, the start is refused: a shutdown that only
seems to work is worse than none. ``tests/hosting/hypercorn/test_worker.py`` fails first.
"""

import multiprocessing
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event as MasterEvent
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper
from hypercorn.utils import repr_socket_addr

from service.errors import StartupError

_SERVING_COUNT = "lastcall_serving_count"
DEFAULT_PORT = 8000
"""Where hypercorn listens if a bind names no port."""


@dataclass(frozen=True)
class Master:
    """The process that started this worker, and the ways in which it tells a worker to stop.

    Attributes:
        stop_event: Set for a stop and for a reload; all workers share it.
        sentinel: A descriptor that becomes readable when the master dies.
    """

    pid: int
    stop_event: MasterEvent
    sentinel: int

    def wants_stop(self) -> bool:
        """Whether the event is set, without the locks and the system calls of ``is_set``."""
        return self.stop_event._flag.get_value() > 0  # type: ignore[attr-defined, no-any-return]

    def is_alive(self) -> bool:
        return os.getppid() == self.pid

    def waits_for(self) -> Literal["any worker", "all workers", None]:
        """Return which wait the master is blocked in, as the kernel tells it.

        The master normally waits for any worker's end; in its SIGHUP handler and at its exit it waits for all workers.
        Only the kernel can tell the two apart. None while the master runs, or where the kernel does not tell.
        """
        with suppress(OSError):
            blocked_in = Path(f"/proc/{self.pid}/wchan").read_text()
            if "poll" in blocked_in or "select" in blocked_in:
                return "any worker"
            if "wait" in blocked_in:
                return "all workers"
        return None


class Worker:
    """hypercorn's part of this process: its task, its objects and its master.

    Attributes:
        task: hypercorn's main task; all its other tasks are below it.
        app: The application, as hypercorn wraps it.
        config: hypercorn's configuration in this process.
        context: hypercorn's context; ``terminate`` starts its shutdown and ``terminated`` follows.
        master: None where hypercorn serves in one process only.
    """

    def __init__(self, task: trio.lowlevel.Task, frame: FrameType, master: Master | None) -> None:
        self.task = task
        self._frame = frame
        self.app: AppWrapper = self._local("app", ASGIWrapper)
        self.config: Config = self._local("config", Config)
        self.context: WorkerContext = self._local("context", WorkerContext)
        self.master = master

    @property
    def server_nursery(self) -> trio.Nursery:
        """The nursery of the connections. It exists once hypercorn serves."""
        nursery: trio.Nursery = self._local("server_nursery", trio.Nursery)
        return nursery

    @property
    def sockets(self) -> Sockets | None:
        """The master's listening sockets. None without a master: hypercorn then listens after the lifespan's start."""
        return self._frame.f_locals.get("sockets") if self.master is not None else None

    @property
    def addresses(self) -> list[str]:
        """Where it listens, or will: ``host:port`` or ``unix:path``."""
        if (sockets := self.sockets) is not None:
            return [_address_of(it) for it in (*sockets.secure_sockets, *sockets.insecure_sockets)]
        return [_address_of_bind(it) for it in (*self.config.bind, *self.config.insecure_bind)]

    def count_serving(self) -> None:
        """Tell the master that this worker serves, if the master runs our code. Never waits."""
        count: Semaphore | None = getattr(self.config, _SERVING_COUNT, None)
        if count is not None:
            count.release()

    def _local(self, name: str, kind: type) -> Any:
        value = self._frame.f_locals.get(name)
        if not isinstance(value, kind):
            raise StartupError(f"This hypercorn is not the one that Lastcall knows: worker_serve has no {name}.")
        return value


def _address_of_bind(bind: str) -> str:
    if bind.startswith("fd://"):
        with socket.socket(fileno=os.dup(int(bind.removeprefix("fd://")))) as listening:
            return _address_of(listening)
    return bind if ":" in bind else f"{bind}:{DEFAULT_PORT}"


def _address_of(listening: socket.socket) -> str:
    return repr_socket_addr(listening.family, listening.getsockname())


def share_serving_count(config: Config, context: BaseContext) -> Semaphore:
    """Return the semaphore that :meth:`Worker.count_serving` counts up. The master calls this before it starts workers.

    It is a semaphore because a worker that is killed at any moment leaves it usable.
    """
    if not hasattr(config, _SERVING_COUNT):
        setattr(config, _SERVING_COUNT, context.Semaphore(0))
    count: Semaphore = getattr(config, _SERVING_COUNT)
    return count


def find_worker() -> Worker | None:
    """Return the worker whose lifespan the current task is; None where other code runs hypercorn, as in a test.

    A worker owns its process: hypercorn is the main task, in the main thread. Only then does the service handle signals
    and set the exit code.

    Raises:
        StartupError: This version of hypercorn is not supported: a variable that the worker needs is missing.
    """
    task = trio.lowlevel.current_task()
    main = task.parent_nursery.parent_task if task.parent_nursery else None
    if main is None or main.parent_nursery is None or threading.current_thread() is not threading.main_thread():
        return None
    if main.parent_nursery.parent_task is not trio.lowlevel.current_root_task():
        return None
    frames = [frame for frame, _ in main.iter_await_frames()]
    serving = [hypercorn.trio.run.worker_serve.__code__, hypercorn.trio.serve.__code__]
    if not frames or frames[0].f_code not in serving:
        return None
    frame = next(frame for frame in frames if frame.f_code is hypercorn.trio.run.worker_serve.__code__)
    return Worker(main, frame, _find_master())


def _find_master() -> Master | None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return None
    stop_event = getattr(multiprocessing.current_process(), "_kwargs", {}).get("shutdown_event")
    if not isinstance(stop_event, MasterEvent) or not hasattr(stop_event, "_flag") or parent.pid is None:
        raise StartupError("This hypercorn is not the one that Lastcall knows: a worker has no shutdown_event.")
    return Master(parent.pid, stop_event, parent.sentinel)
