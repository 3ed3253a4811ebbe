"""hypercorn's master, corrected: it returns its workers' exit code, and one worker's end does not end the others.

hypercorn 0.18 always returns 0, because it joins an emptied list, and it stops all workers when one of them is
killed. Source: https://github.com/pgjones/hypercorn/issues/269. Proven by
``tests/hosting/test_master.py``.

A worker that was killed is replaced. If a start is refused before any worker has served, the service ends: its
settings, its address or its store are wrong. Once a worker has served, the fault may pass (another process holds the
store's lock, the disk is full, the settings file is being edited): the start is tried again after a pause, and the
other workers serve on.

This code runs only in the master, where hypercorn's command line reads :mod:`service.hosting.hypercorn_config`.
"""

import atexit
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event, Semaphore
from socket import socket
from typing import NoReturn

import hypercorn.run
from hypercorn.config import Config, Sockets
from hypercorn.typing import WorkerFunc

from service.errors import StartupError
from service.hosting.hypercorn.patches import (
    POPULATE,
    Undo,
    install_in_command_line,
    install_in_master,
    replace_clear,
    replace_join,
)
from service.hosting.hypercorn.worker import share_serving_count
from service.hosting.listeners.bind import bind_addresses
from service.hosting.listeners.worker_status import WorkerStatus, statuses_of_others
from service.hosting.peer_listener import check_sharing
from service.hosting.process.process_exit import ExitCode, leave, refuse_to_start, say
from service.hosting.start_pause import StartPause
from service.settings import Settings, load_settings
from service.telemetry.logging import configure_logging

REPLACEMENTS_MAX = 5
REPLACEMENTS_WITHIN_S = 60
"""Window of the count above: if workers die more often than this, another start will not help."""
STOP_SLACK_S = 1
"""Time that workers may take beyond their own bound on a shutdown, before they are killed."""
STOP_POLL_INTERVAL_S = 0.25
WAIT_MAX_S = 86_400
"""Bound on one wait: poll(2) takes milliseconds in 31 bits, which is 24 days, and settings allow a year."""
AT_ONCE_S = 10
AT_ONCE_MAX = 10
"""How many workers in a row may end with code 0 within ``AT_ONCE_S`` of their start, without a reload and without
``--max-requests``: after so many the next one would end too. A start alone takes seconds on a busy machine."""
DIED = (ExitCode.WATCHDOG, ExitCode.FAULTS)
"""Codes of a worker that has stopped with a fault. The other workers serve on, and the worker is replaced."""


def take_over(installed: ExitStack) -> Settings:
    """Make hypercorn's command line run its master through :func:`run`, until ``installed`` is closed.

    Ends the process if the settings cannot be used.
    """
    try:
        settings = load_settings()
        installed.enter_context(install_in_command_line(sys.modules["__main__"], partial(run, settings)))
    except Exception as error:  # noqa: BLE001  hypercorn would print only a traceback
        refuse_to_start(error)
    return settings


def run(settings: Settings, config: Config) -> NoReturn:
    """Run hypercorn's ``run``, and end the process with the exit code of the workers."""
    configure_logging(settings)
    with ExitStack() as installed:
        try:
            check_sharing(settings, workers=config.workers)
            workers = Workers(stop_timeout_s=settings.shutdown_total_s + STOP_SLACK_S)
            installed.enter_context(workers.install())
            bind_addresses(config)
        except StartupError as error:
            refuse_to_start(error)
        code = hypercorn.run.run(config)
    atexit._run_exitfuncs()  # multiprocessing's semaphores are named, and unlinked there
    leave(code)


class Workers:
    """Starts, waits for and joins the workers. The methods stand in for hypercorn's functions with the same names.

    Args:
        stop_timeout_s: How long to wait for workers once the service stops; after that they are killed.
    """

    def __init__(self, *, stop_timeout_s: float) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._has_served = False
        self._pause = StartPause()
        self._start_is_due = False
        self._serving_count: Semaphore | None = None
        self._sockets: Sequence[socket] = ()
        self._workers_wanted = 0
        self._died_at: deque[float] = deque(maxlen=REPLACEMENTS_MAX)
        self._started_at: dict[int | None, float] = {}
        self._ended_at_once = 0
        self._few_requests = False
        self._reloaded = False
        self._joining_since: float | None = None
        self._code = 0
        self._start: Callable[..., None] = POPULATE.current
        self._stop_event: Event | None = None
        self._undo_clear: Undo = _nothing
        self._undo_joins: list[tuple[BaseProcess, Undo]] = []

    def populate(  # noqa: PLR0917  as hypercorn calls it
        self,
        processes: list[BaseProcess],
        config: Config,
        worker_func: WorkerFunc,
        sockets: Sockets,
        stop_event: Event,
        context: BaseContext,
    ) -> None:
        """Start the workers that are missing, unless a pause runs or the service stops."""
        self._stop_event = stop_event
        self._start_is_due = len(processes) < config.workers
        if self._start_is_due and (self._pause.is_running or stop_event.is_set()):
            return
        self._start_is_due = False
        self._serving_count = share_serving_count(config, context)
        self._workers_wanted = config.workers
        self._sockets = [*sockets.secure_sockets, *sockets.insecure_sockets]
        self._few_requests = config.max_requests is not None
        self._undo_clear()  # workers get a copy of the event, and the copy must have hypercorn's own methods
        self._undo_clear = _nothing
        self._start(processes, config, worker_func, sockets, stop_event, context)
        self._undo_clear = replace_clear(stop_event, self._note_reload)
        now = time.monotonic()
        self._joining_since = None
        for process in processes:
            self._started_at.setdefault(process.pid, now)
            if not any(process is it for it, _ in self._undo_joins):
                self._undo_joins.append((process, replace_join(process, partial(self._join, process))))

    def _join(self, process: BaseProcess, timeout: float | None = None) -> None:
        """Stand in for a process's ``join``, with a bound: hypercorn's reload calls ``join`` in a signal handler.

        During that call no other signal is handled, so a worker that hangs would keep the master for ever. The wait
        stays in waitpid(2), because workers tell a reload from a stop by it (``Master.waits_for``).
        """
        if timeout is not None:
            type(process).join(process, timeout)
            return

        def kill(*_: object) -> None:
            say(f"killing worker {process.pid}, which did not stop in time", level="error")
            process.kill()

        self._joining_since = self._joining_since or time.monotonic()
        left_s = self._joining_since + self._stop_timeout_s - time.monotonic()
        before = signal.signal(signal.SIGALRM, kill)
        signal.setitimer(signal.ITIMER_REAL, max(left_s, 0.001))
        try:
            type(process).join(process)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def wait(self, sentinels: Iterable[int], timeout: float | None = None) -> Sequence[object]:
        """Return when a worker has ended, or when all are to stop, also if a worker hangs.

        During a pause this returns from time to time, so that hypercorn sees that it is to stop. With ``--reload``
        hypercorn gives a timeout, and starts workers only once this returns a list that is not empty.
        """
        waited_for = list(sentinels)
        while True:
            ended = wait(waited_for, STOP_POLL_INTERVAL_S if timeout is None else timeout)
            if ended:
                return ended
            if self._start_is_due:
                return [] if self._pause.is_running else [self._pause]
            if timeout is not None or (self._stop_event is not None and self._stop_event.is_set()):
                return []

    def join_exited(self, processes: list[BaseProcess]) -> int:
        """Remove the workers that have ended from the list. The list is empty if this returns a code other than 0."""
        assert self._stop_event is not None
        self._count_serving()
        stopping = self._stop_event.is_set()
        exited = self._take_exited(processes)
        for process in exited:
            code = _exit_code(process)
            if not stopping and self._may_try_again(code):
                self._try_again_later(f"worker {process.pid} could not start (code {code})")
            elif stopping or not self._may_replace(process, code):
                self._note_code(code)
        if not stopping and self._end_at_once(exited):
            what = f"workers end at once, {self._ended_at_once} times in a row"
            if self._has_served:
                self._try_again_later(what)
            else:
                say(f"{what}, giving up", level="error")
                self._note_code(ExitCode.REFUSED)
        if stopping or self._code:
            self._stop_event.set()
            self._join_all(processes)
        return self._code

    def _count_serving(self) -> None:
        """Read from the shared count whether workers have begun to serve since the last call."""
        while self._serving_count is not None and self._serving_count.acquire(block=False):
            self._has_served = True
            self._pause.forget_refusals()

    def _may_try_again(self, code: int) -> bool:
        """Whether this exit code means a start that failed and may succeed later."""
        return self._has_served and 0 < code < 128 and code not in (*DIED, ExitCode.CRASHED)

    def _try_again_later(self, what: str) -> None:
        """Begin a pause and log it. Several workers that are refused together begin one pause."""
        if self._pause.is_running:
            return
        pause_s = self._pause.begin()
        serving = list(statuses_of_others(self._sockets, parent=os.getpid())).count(WorkerStatus.SERVING)
        meanwhile = (
            f"{serving} of {self._workers_wanted} workers serve on"
            if serving
            else "no worker serves until then, and clients wait"
        )
        say(f"{what}; the next start is tried in {pause_s:g} s, {meanwhile}")

    def _note_code(self, code: int) -> None:
        """Keep this code as the exit code of the service, if it is the first that is not 0.

        Once a worker has served, a start that is refused during the stop does not count.
        """
        if not (self._has_served and code == ExitCode.REFUSED):
            self._code = self._code or code

    def _may_replace(self, process: BaseProcess, code: int) -> bool:
        if code == 0:
            return True
        if code < 128 and code not in DIED:
            return False
        now = time.monotonic()
        if len(self._died_at) == REPLACEMENTS_MAX and now - self._died_at[0] < REPLACEMENTS_WITHIN_S:
            say(f"{REPLACEMENTS_MAX} workers died within {REPLACEMENTS_WITHIN_S} s, giving up", level="error")
            return False
        self._died_at.append(now)
        how = signal.Signals(code - 128).name if code > 128 else f"with code {code}"
        say(f"worker {process.pid} ended by {how}, another one takes its place")
        return True

    def _end_at_once(self, exited: list[BaseProcess]) -> bool:
        """Whether so many workers have ended with code 0 right after their start that the next ones would too."""
        now = time.monotonic()
        ages_s = [(_exit_code(process), now - self._started_at.pop(process.pid, 0)) for process in exited]
        lived_s = [age_s for code, age_s in ages_s if code == 0]
        if self._few_requests or self._reloaded or any(it > AT_ONCE_S for it in lived_s):
            self._ended_at_once, self._reloaded = 0, False
        elif lived_s:
            self._ended_at_once += 1
        return self._ended_at_once > AT_ONCE_MAX

    @contextmanager
    def install(self) -> Iterator[None]:
        """Put these methods in the place of hypercorn's functions until the context is left."""
        with install_in_master(populate=self.populate, wait=self.wait, join_exited=self.join_exited):
            try:
                yield
            finally:
                self._restore()

    def _restore(self) -> None:
        """Give the master's event and the remaining processes their own methods back."""
        self._undo_clear()
        self._undo_clear = _nothing
        for _, undo in self._undo_joins:
            undo()
        self._undo_joins.clear()

    def _take_exited(self, processes: list[BaseProcess]) -> list[BaseProcess]:
        exited = [process for process in processes if process.exitcode is not None]
        for process in exited:
            processes.remove(process)
        self._undo_joins = [it for it in self._undo_joins if all(it[0] is not process for process in exited)]
        return exited

    def _note_reload(self) -> None:
        """Stand in for the event's ``clear``, which hypercorn calls after a reload, when all workers have ended."""
        assert self._stop_event is not None
        type(self._stop_event).clear(self._stop_event)
        self._reloaded = True
        self._pause.end()

    def _join_all(self, processes: list[BaseProcess]) -> None:
        deadline = time.monotonic() + self._stop_timeout_s
        while processes:
            left_s = max(deadline - time.monotonic(), 0)
            wait([process.sentinel for process in processes], min(left_s, WAIT_MAX_S))
            late = time.monotonic() >= deadline
            if late:
                say(f"killing {len(processes)} workers that did not stop in time", level="error")
                for process in processes:
                    process.kill()
                    process.join()
            codes = [_exit_code(process) for process in self._take_exited(processes)]
            for code in [ExitCode.WATCHDOG] if late else codes:
                self._note_code(code)


def _nothing() -> None:
    """Stand in for an undo function where nothing is to be undone."""


def _exit_code(process: BaseProcess) -> int:
    """Return the exit code as a shell gives it: 128 plus the signal for a process that was killed."""
    code = process.exitcode or 0
    return 128 - code if code < 0 else code
