"""The hypercorn worker that this service runs in: the one place that names hypercorn's private variables.

All of them are looked up once, when the lifespan begins. If one is missing, the start is refused: a shutdown that only
seems to work is worse than none. ``tests/hosting/hypercorn/test_worker.py`` fails first.
"""

import multiprocessing
import os
import select
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.synchronize import Event as MasterEvent
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper
from hypercorn.utils import repr_socket_addr

from service.cluster.workers import KnownWorker
from service.errors import StartupError
from service.hosting.listeners.worker_status import Siblings, StatusBeacon, open_common_file

_MASTER = "lastcall_master"
MASTER_POLL_MS = 5
"""How often to look at the event of hypercorn's master. A blocking wait for the event would need the event's locks, and
a worker that is killed during the wait would leave the locks taken for ever."""
DEFAULT_PORT = 8000
"""Where hypercorn listens if a bind names no port."""


class Master(ABC):
    """The process that started this worker: what it tells the worker, and what the worker tells it.

    Attributes:
        pid: Its process id.
        stop_event: The event by which hypercorn's master tells its workers to stop; None with our own master.
        successors: The peer addresses of the workers that serve in this worker's place, once it knows them.
        workers: All workers of the service, as far as the master tells.
    """

    pid: int
    stop_event: MasterEvent | None = None
    successors: Sequence[str] = ()
    workers: Sequence[KnownWorker] = ()

    def is_alive(self) -> bool:
        return os.getppid() == self.pid

    @abstractmethod
    def watch(self, tell: Callable[[str], None]) -> None:
        """Give notice once the master wants this worker to stop, or has died. Runs in a thread of its own."""

    @abstractmethod
    def ask_stop(self, reason: str) -> None:
        """Ask the master to stop the whole service, as a signal would. Never waits."""

    @abstractmethod
    def wants_stop(self) -> bool:
        """Whether the master was told to stop the service; hypercorn's own master tells it of a reload, too."""

    @abstractmethod
    def worker_follows(self, sockets: Sequence[trio.socket.SocketType]) -> bool | None:
        """Whether the master has started another worker in this worker's place, or will do it.

        None while this is not known yet.
        """

    @abstractmethod
    def open_status_file(self) -> int | None:
        """Open the file on which the workers of this master show their status."""

    def open_metrics_file(self) -> int | None:
        """Open the file in which the workers of this master keep their metrics; None if each keeps them for itself."""
        return None

    @property
    def leaves(self) -> bool:
        """Whether this worker was told to leave, because others serve in its place: then its stop is in no hurry."""
        return False

    def another_starts(self, _beacon: StatusBeacon) -> bool:
        """Whether a worker starts that shows no status yet, and will answer clients."""
        return False

    def tell_begun(self, stop_within_s: float) -> None:  # noqa: B027  hypercorn's own master listens to no worker
        """Tell that this worker handles signals, and how long its stop may take."""

    def tell_serving(self, peer_address: str | None) -> None:  # noqa: B027
        """Tell that this worker serves. Never waits."""

    def ask_for_successor(self) -> bool:
        """Ask for a worker in this worker's place, before it stops. Returns whether the master will see to it."""
        return False


class HypercornMaster(Master):
    """hypercorn's own master: all it has for its workers is an event.

    Args:
        stop_event: Set for a stop and for a reload; all workers share it.
        sentinel: A descriptor that becomes readable when the master dies.
    """

    stop_event: MasterEvent

    def __init__(self, pid: int, stop_event: MasterEvent, sentinel: int) -> None:
        self.pid = pid
        self.stop_event = stop_event
        self._sentinel = sentinel
        self._siblings: Siblings | None = None

    def wants_stop(self) -> bool:
        """Whether the event is set, without the locks and the system calls of ``is_set``."""
        return self.stop_event._flag.get_value() > 0  # type: ignore[attr-defined, no-any-return]

    def ask_stop(self, reason: str) -> None:  # noqa: ARG002  it has no words
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def watch(self, tell: Callable[[str], None]) -> None:
        death = select.poll()
        death.register(self._sentinel, select.POLLIN)
        while True:
            if death.poll(MASTER_POLL_MS):
                return tell("the master died")
            if self.wants_stop():
                return tell("the master stops or reloads")

    def worker_follows(self, sockets: Sequence[trio.socket.SocketType]) -> bool | None:
        if not self.is_alive():
            return False
        if not self.wants_stop():
            return None
        # A stop or a reload. Only in a reload does the master wait for all of its workers with its sockets open.
        waits_for = self.waits_for()
        holds_sockets = _holds_socket(self.pid, sockets)
        if waits_for is None and holds_sockets:
            return None
        return waits_for == "all workers" and holds_sockets

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

    def open_status_file(self) -> int | None:
        """Open the file of the event's semaphore, which all workers know and which goes with the master."""
        self._siblings = Siblings(self.pid)
        name = self.stop_event._flag._semlock.name  # type: ignore[attr-defined]
        return open_common_file(f"/dev/shm/sem.{name.removeprefix('/')}")  # noqa: S108  sem_overview(7)

    def another_starts(self, beacon: StatusBeacon) -> bool:
        return self._siblings is not None and self._siblings.one_starts(beacon)


def _holds_socket(pid: int, sockets: Sequence[trio.socket.SocketType]) -> bool:
    """Whether a master holds one of these sockets. It has few files, unlike a worker."""
    wanted = {f"socket:[{os.fstat(it.fileno()).st_ino}]" for it in sockets}
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(entry.readlink()) in wanted:
                    return True
    return False


class Worker:
    """hypercorn's part of this process: its task, its objects and its master.

    Attributes:
        task: hypercorn's main task; all its other tasks are below it.
        app: The application, as hypercorn wraps it.
        config: hypercorn's configuration in this process.
        context: hypercorn's context; ``terminate`` starts its shutdown and ``terminated`` follows.
        master: None where hypercorn serves in one process only.
    """

    def __init__(self, task: trio.lowlevel.Task, frame: FrameType) -> None:
        self.task = task
        self._frame = frame
        self.app: AppWrapper = self._local("app", ASGIWrapper)
        self.config: Config = self._local("config", Config)
        self.context: WorkerContext = self._local("context", WorkerContext)
        self.master = _find_master(self.config)

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


def link_to_master(config: Config, master: Master) -> None:
    """Have :func:`find_worker` find this master in place of hypercorn's own."""
    setattr(config, _MASTER, master)


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
    return Worker(main, frame)


def _find_master(config: Config) -> Master | None:
    if (ours := getattr(config, _MASTER, None)) is not None:
        return cast("Master", ours)
    parent = multiprocessing.parent_process()
    if parent is None:
        return None
    stop_event = getattr(multiprocessing.current_process(), "_kwargs", {}).get("shutdown_event")
    if not isinstance(stop_event, MasterEvent) or not hasattr(stop_event, "_flag") or parent.pid is None:
        raise StartupError("This hypercorn is not the one that Lastcall knows: a worker has no shutdown_event.")
    return HypercornMaster(parent.pid, stop_event, parent.sentinel)
