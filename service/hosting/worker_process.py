"""A worker's process, as our master sees it. What the process runs: :mod:`service.hosting.worker_main`."""

import math
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import msgspec
from hypercorn.config import Config, Sockets

from service.cluster.workers import KnownWorker, WorkerPhase
from service.hosting.master_link import Message
from service.hosting.worker_main import HELD_BACK, SharedFile, run_worker

_SPAWN = get_context("spawn")


class WorkerProcess:
    """One worker, from its start to its end. Made by :func:`start_worker`.

    Args:
        generation: How many reloads came before its start.
        stop_within_s: The bound on its stop, until it tells the bound of its own settings.

    Attributes:
        started_at: On the clock of :func:`time.monotonic`.
        has_begun: Whether it handles signals by now.
        serves: Whether it takes clients, or has taken them.
        serves_since: On the same clock; infinite before it serves.
        wants_successor: Whether another worker is to take its place.
        peer_address: Where the service's other processes reach it; empty where they do not.
        asks_stop: Why it asks for a stop of the whole service; empty if it does not.
        refusal: Why its start was refused, in its own words.
        end_by: When it is killed; None while it is not told to end.
    """

    def __init__(self, process: SpawnProcess, connection: Connection, *, generation: int, stop_within_s: float) -> None:
        self.process = process
        self.generation = generation
        self.stop_within_s = stop_within_s
        self.started_at = time.monotonic()
        self.has_begun = self.serves = self.wants_successor = False
        self.serves_since = math.inf
        self.peer_address = self.refusal = self.asks_stop = ""
        self._begun_at = datetime.now(UTC)
        self._told: Sequence[KnownWorker] = ()
        self.end_by: float | None = None
        self._connection: Connection | None = connection

    def __repr__(self) -> str:
        state = "ends" if self.end_by is not None else "serves" if self.serves else "starts"
        return f"<WorkerProcess {self.pid}: {state}>"

    @property
    def pid(self) -> int | None:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code as a shell gives it, 128 plus the signal for a process that was killed; None while it runs."""
        code = self.process.exitcode
        return code if code is None or code >= 0 else 128 - code

    @property
    def waited_for(self) -> Iterable[int | Connection]:
        """What becomes readable when it has ended, or has told something."""
        return [self.process.sentinel, *([self._connection] if self._connection is not None else [])]

    def take_messages(self) -> None:
        """Note what it has told since the last call. Never waits.

        After an upgrade in place a worker may be newer than this master: words that are unknown here are passed over.
        """
        while self._connection is not None:
            try:
                if not self._connection.poll():
                    return
                word, _, rest = self._connection.recv_bytes().decode(errors="backslashreplace").partition(" ")
            except (EOFError, OSError):
                self._connection.close()
                self._connection = None
                return
            self._note(word, rest)

    def _note(self, word: str, rest: str) -> None:
        match word:
            case Message.BEGUN:
                self.has_begun, self.stop_within_s = True, _seconds(rest, default=self.stop_within_s)
            case Message.SERVING:
                self.serves_since = min(self.serves_since, time.monotonic())
                self.serves, self.peer_address = True, rest
            case Message.SUCCESSOR:
                self.wants_successor = True
            case Message.REFUSED:
                self.refusal = rest
            case Message.DRAIN:
                self.asks_stop = rest

    @property
    def known(self) -> KnownWorker:
        """What the other workers are told of it."""
        status: WorkerPhase = "draining" if self.end_by is not None else "serving" if self.serves else "starting"
        return KnownWorker(pid=self.pid or 0, status=status, started_at=self._begun_at, address=self.peer_address)

    def tell_workers(self, workers: Sequence[KnownWorker]) -> None:
        """Tell which workers there are, if it listens and does not know this already."""
        if self.has_begun and self._told != workers:
            self._told = workers
            self._tell(f"{Message.WORKERS} {msgspec.json.encode(workers).decode()}")

    def tell_leave(self, successors: Iterable[str], *, slack_s: float) -> None:
        """Have it drain and end, because other workers serve in its place."""
        self._tell(" ".join([Message.LEAVE, *filter(None, successors)]))
        self._end_within(slack_s)

    def tell_stop(self, *, slack_s: float, reason: str = "") -> None:
        """Have it stop, because the whole service stops."""
        self._tell(f"{Message.STOP} {reason}".rstrip())
        self._end_within(slack_s)

    def _end_within(self, slack_s: float) -> None:
        if self.end_by is None:
            self.end_by = time.monotonic() + self.stop_within_s + slack_s

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # it has ended
            if self._connection is not None:
                self._connection.send_bytes(text.encode())

    def release(self) -> None:
        """Give its descriptors back, once it has ended."""
        self.process.join()
        self.process.close()
        if self._connection is not None:
            self._connection.close()


def _seconds(text: str, *, default: float) -> float:
    """Return the number of seconds in a worker's message, or the default if there is none."""
    with suppress(ValueError):
        if math.isfinite(seconds := float(text)) and seconds >= 0:
            return seconds
    return default


def start_worker(
    config: Config, sockets: Sockets, status_file: SharedFile, *, generation: int, stop_within_s: float
) -> WorkerProcess:
    """Start a worker on the master's sockets.

    Raises:
        OSError: The system has no process, memory or descriptor left. Nothing has been started.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(
        target=run_worker,
        kwargs={"config": config, "sockets": sockets, "connection": theirs, "status_file": status_file},
    )
    process.daemon = config.daemon
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        process.start()
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
    return WorkerProcess(process, ours, generation=generation, stop_within_s=stop_within_s)
