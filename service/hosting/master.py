"""The master: starts workers on shared sockets, replaces them without refusing a client, and returns their exit code.

It stands in for hypercorn's own master (``hypercorn.run.run``), which always returns 0, stops all workers when one of
them is killed, and in a reload ends the old workers before it starts new ones.
Source: https://github.com/pgjones/hypercorn/issues/269. Proven by ``tests/hosting/test_master.py``.

**A reload** (SIGHUP) starts new workers beside the old ones. Once all of the new ones serve, the old ones are told to
leave: they take no more clients and drain. If a new worker cannot start, the new ones end, and the old ones serve on.
A worker that has answered its ``--max-requests`` is replaced in the same way.

**A worker that ends by itself** is replaced. If a start is refused before any worker has served, the service ends: its
settings, its address or its store are wrong. Once a worker has served, the fault may pass (another process holds the
store's lock, the disk is full, the settings file is being edited): the start is tried again after a pause, and the
other workers serve on.
"""

import atexit
import math
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from types import FrameType
from typing import NoReturn

import hypercorn.run
import hypercorn.utils
from hypercorn.config import Config, Sockets

from service.errors import StartupError
from service.hosting.hypercorn.patches import install_in_command_line
from service.hosting.listeners.bind import bind_addresses
from service.hosting.listeners.peer_port import share_peer_port
from service.hosting.listeners.shared_port import METRICS_PORT
from service.hosting.peer_listener import check_sharing
from service.hosting.process.early_stop import deliver_hangups
from service.hosting.process.process_exit import ExitCode, leave, refuse_to_start, say
from service.hosting.start_pause import StartPause
from service.hosting.worker_main import SharedFile
from service.hosting.worker_process import WorkerProcess, start_worker
from service.setting_sources import load_settings
from service.settings import Settings
from service.telemetry.logging import configure_logging

REPLACEMENTS_MAX = 5
REPLACEMENTS_WITHIN_S = 60
"""Window of the count above: if workers die more often than this, another start will not help."""
STOP_SLACK_S = 1
"""Time that workers may take beyond their own bound on a shutdown, before they are killed."""
START_MAX_S = 60
"""How long a worker may take to start while others serve, from the moment at which one of them serves.

The first start has no bound: a recovery may be long."""
SETS_OF_WORKERS_MAX = 3
"""Bound on the processes, as a multiple of the workers: one set serves, one starts, and one drains."""
WAIT_MAX_S = 86_400
"""Bound on one wait: poll(2) takes milliseconds in 31 bits, which is 24 days, and settings allow a year."""
CODE_POLL_INTERVAL_S = 1.0
"""How often hypercorn's ``--reload`` looks at the files of the code."""
AT_ONCE_S = 10
AT_ONCE_MAX = 10
"""How many workers in a row may end with code 0 within ``AT_ONCE_S`` of their start without being told to: after so
many the next one would end too. A start alone takes seconds on a busy machine."""
DIED = (ExitCode.WATCHDOG, ExitCode.FAULTS)
"""Codes of a worker that has stopped with a fault. The other workers serve on, and the worker is replaced."""
ENDED_BY_SIGTERM = 128 + signal.SIGTERM


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
    """Stand in for hypercorn's ``run``, and end the process with the exit code of the workers."""
    configure_logging(settings)
    try:
        check_sharing(settings, workers=config.workers)
        if config.worker_class != "trio" and config.workers:
            raise StartupError("Lastcall runs on Trio: start hypercorn with --worker-class trio.")
        bind_addresses(config)
        if config.workers:
            share_peer_port(config, settings)
            METRICS_PORT.share(config, settings.metrics_bind)
    except StartupError as error:
        refuse_to_start(error)
    if config.workers == 0:
        deliver_hangups()
        code = hypercorn.run.run(config)
    else:
        if config.pid_path is not None:
            hypercorn.utils.write_pid_file(config.pid_path)
        code = Workers(config, config.create_sockets(), stop_timeout_s=settings.shutdown_total_s).run()
    atexit._run_exitfuncs()
    leave(code)


class Workers:
    """Starts, replaces and ends the workers.

    Args:
        sockets: The sockets that the workers share. A client that the kernel has accepted waits there for any worker.
        stop_timeout_s: The bound on the stop of a worker that has not told its own.
        start: Starts a worker; as :func:`service.hosting.worker_process.start_worker`.
    """

    def __init__(
        self,
        config: Config,
        sockets: Sockets,
        *,
        stop_timeout_s: float,
        start: Callable[..., WorkerProcess] = start_worker,
    ) -> None:
        self._config = config
        self._sockets = sockets
        self._stop_timeout_s = stop_timeout_s
        self._start = start
        # What the workers share: their status in its locks, their metrics in its content.
        self._status_file = SharedFile(os.memfd_create("lastcall-workers"))
        self._workers: list[WorkerProcess] = []
        self._generation = 0
        self._failed_generation = -1
        self._reload_wanted = False
        self._stopping = False
        self._stop_reason = ""
        self._has_served = False
        self._pause = StartPause()
        self._died_at: deque[float] = deque(maxlen=REPLACEMENTS_MAX)
        self._ended_at_once = 0
        self._code = 0
        self._woken_by = -1

    # The loop

    def run(self) -> int:
        """Run the workers until a signal, or an end that no replacement would help. Returns the exit code."""
        code_changed = self._watch_code() if self._config.use_reloader else lambda: False
        with self._handling_signals():
            while not self._stopping:
                self.advance()
                if not self._stopping:
                    self._wait(self._next_look_s())
                    self._reload_wanted = self._reload_wanted or code_changed()
            self._stop()
        os.close(self._status_file.descriptor)
        for sock in (*self._sockets.secure_sockets, *self._sockets.insecure_sockets):
            sock.close()
        return self._code

    def advance(self) -> None:
        """Do all that is due now. Never waits."""
        self._take_messages()
        ended = self._take_ended()
        self._heed_operator([*ended, *self._workers])
        for worker in ended:
            if self._stopping:
                self._note_end(worker)
            else:
                self._judge(worker)
        if self._stopping:
            return
        self._kill_late()
        self._end_late_starts()
        self._begin_reload()
        self._start_missing()
        self._let_stale_leave()
        self._tell_workers()

    def _heed_operator(self, workers: Sequence[WorkerProcess]) -> None:
        """Begin the stop if a worker asks for it, or has asked and ended: an operator has asked the worker."""
        if reason := next((worker.asks_stop for worker in workers if worker.asks_stop), ""):
            self._stopping, self._stop_reason = True, reason

    def _tell_workers(self) -> None:
        """Tell the workers of each other, where one has begun, serves, drains or has ended."""
        known = [worker.known for worker in self._workers]
        for worker in self._workers:
            worker.tell_workers(known)

    def _wait(self, for_s: float) -> None:
        """Wait until a worker has ended or tells something, until a signal, or for this time."""
        waited_for: list[object] = [it for worker in self._workers for it in worker.waited_for]
        if self._woken_by >= 0:
            waited_for.append(self._woken_by)
        ready = wait(waited_for, min(for_s, WAIT_MAX_S))  # type: ignore[arg-type]
        if self._woken_by in ready:
            with suppress(BlockingIOError):
                os.read(self._woken_by, 1 << 16)

    def _next_look_s(self) -> float:
        """How long nothing is due, if nothing happens."""
        now = time.monotonic()
        due = [now + CODE_POLL_INTERVAL_S if self._config.use_reloader else now + WAIT_MAX_S]
        due += [worker.end_by for worker in self._workers if worker.end_by is not None]
        due += [late_at for late_at, _ in self._starts]
        if self._missing and self._pause.is_running:
            due.append(now + self._pause.left_s)
        if self._may_begin_reload:  # the one before it has just failed
            due.append(now)
        return max(min(due) - now, 0.001)

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Note signals, and wake the loop by them. At the end they are ignored: the process is exiting."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self._stopping = True

        def reload(_number: int, _frame: FrameType | None) -> None:
            self._reload_wanted = True

        self._woken_by, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGHUP, reload)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(before)
            os.close(waker)
            os.close(self._woken_by)
            self._woken_by = -1

    def _watch_code(self) -> Callable[[], bool]:
        """Return what tells whether the code has changed, as hypercorn's ``--reload`` does."""
        hypercorn.utils.load_application(self._config.application_path, self._config.wsgi_max_body_size)
        return partial(hypercorn.utils.check_for_updates, hypercorn.utils.files_to_watch())

    # Which workers there are

    @property
    def _active(self) -> list[WorkerProcess]:
        """The workers that are not told to end."""
        return [worker for worker in self._workers if worker.end_by is None]

    def _is_stale(self, worker: WorkerProcess) -> bool:
        """Whether another worker is to take this worker's place."""
        return worker.generation < self._generation or worker.wants_successor

    @property
    def _fresh(self) -> list[WorkerProcess]:
        return [worker for worker in self._active if not self._is_stale(worker)]

    @property
    def _missing(self) -> int:
        return self._config.workers - len(self._fresh)

    @property
    def _starts(self) -> list[tuple[float, WorkerProcess]]:
        """The workers that start and are to stay, each with the time from which it is late: never, if none serves.

        What keeps all of them (a recovery, a lock) may have ended when the first one serves, so the bound counts anew.
        """
        others_serve_since = min((it.serves_since for it in self._active), default=math.inf)
        starting = [it for it in self._active if not it.serves and it.generation == self._generation]
        return [(max(it.started_at, others_serve_since) + START_MAX_S, it) for it in starting]

    @property
    def _is_reloading(self) -> bool:
        return any(worker.generation < self._generation for worker in self._active)

    def _start_missing(self) -> None:
        """Start the workers that are missing, unless a pause runs or too many old ones still drain."""
        if self._missing <= 0 or self._pause.is_running:
            return
        room = SETS_OF_WORKERS_MAX * self._config.workers - len(self._workers)
        if any(self._is_stale(worker) and worker.serves for worker in self._active):
            # One after the other: a start takes a second of a core, which the workers that serve need too. And a fault
            # that all starts would have is seen by the first of them.
            room = min(room, 1 - sum(not worker.serves for worker in self._fresh))
        for _ in range(min(self._missing, room)):
            try:
                worker = self._start(
                    self._config,
                    self._sockets,
                    self._status_file,
                    generation=self._generation,
                    stop_within_s=self._stop_timeout_s,
                )
            except OSError as error:
                self._go_on_without(f"no process can be started for a worker ({error})")
                return
            self._workers.append(worker)

    def _go_on_without(self, why: str) -> None:
        """Decide what follows from a start for which the system lacks processes, memory or descriptors."""
        if self._is_reloading:
            self._fail_reload(why)
            if self._missing <= 0:
                return
        if self._has_served:
            self._try_again_later(why)
        else:
            say(f"{why}, giving up", level="error")
            self._give_up(ExitCode.REFUSED)

    def _take_messages(self) -> None:
        for worker in self._workers:
            served = worker.serves
            worker.take_messages()
            if worker.serves and not served:
                self._has_served = True
                self._pause.forget_refusals()

    def _take_ended(self) -> list[WorkerProcess]:
        """Remove the workers that have ended, and return them."""
        ended = [worker for worker in self._workers if worker.exit_code is not None]
        self._workers = [worker for worker in self._workers if worker not in ended]
        for worker in ended:
            worker.take_messages()
        return ended

    def _kill_late(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.end_by is not None and worker.end_by <= now:
                say(f"killing worker {worker.pid}, which did not stop in time", level="error")
                worker.process.kill()
                worker.end_by = now + STOP_SLACK_S

    # A reload

    @property
    def _may_begin_reload(self) -> bool:
        """Whether a reload is wanted, none is under way, and no more than one set of old workers still drains."""
        has_room = len(self._workers) <= (SETS_OF_WORKERS_MAX - 1) * self._config.workers
        return self._reload_wanted and not self._is_reloading and has_room

    def _begin_reload(self) -> None:
        """Begin the reload that an operator wants, once no other reload is under way."""
        if not self._may_begin_reload:
            return
        self._reload_wanted = False
        self._generation += 1
        self._pause.end()
        self._ended_at_once = 0

    def _let_stale_leave(self) -> None:
        """Tell the workers that are replaced to leave, once enough others serve: in a reload, a whole new set."""
        new = [worker for worker in self._active if worker.generation == self._generation]
        spare = sum(worker.serves for worker in new) - self._config.workers
        if spare < 0:
            return
        if self._is_reloading:
            old = [worker for worker in self._active if worker.generation < self._generation]
            say(f"reloaded: {self._config.workers + spare} new workers serve, {len(old)} old ones drain", level="info")
            self._end(old)
        self._end([worker for worker in new if worker.wants_successor and worker.serves][:spare])

    def _end(self, workers: Sequence[WorkerProcess]) -> None:
        """Have workers end while others serve."""
        addresses = [it.peer_address for it in self._active if it.serves and it not in workers]
        for worker in workers:
            worker.tell_leave(addresses, slack_s=STOP_SLACK_S)
            if not worker.has_begun:
                worker.process.terminate()

    def _fail_reload(self, why: str) -> None:
        """Give the reload up: its workers end, and the workers before it are to stay."""
        old = [worker for worker in self._active if worker.generation < self._generation]
        new = [worker for worker in self._active if worker.generation == self._generation]
        say(f"the reload failed, {len(old)} old workers serve on: {why}", level="error")
        self._end(new)
        self._failed_generation = self._generation
        self._generation += 1
        for worker in old:
            worker.generation = self._generation

    def _end_late_starts(self) -> None:
        """End the starts that take too long while others serve, as if they were refused."""
        now = time.monotonic()
        late = [worker for late_at, worker in self._starts if late_at <= now]
        if not late:
            return
        why = f"worker {late[0].pid} does not serve after {START_MAX_S} s"
        if self._is_reloading:
            self._fail_reload(why)
        else:
            self._try_again_later(why)
            self._end(late)

    # The end of a worker

    def _judge(self, worker: WorkerProcess) -> None:
        """Decide what the end of a worker means: nothing, another start, or the end of the service."""
        code, pid = worker.exit_code or 0, worker.pid
        worker.release()
        if worker.end_by is not None:
            if code and not (code == ENDED_BY_SIGTERM and not worker.has_begun):
                say(f"worker {pid} ended with code {code}, after it was told to end")
        elif worker.generation == self._failed_generation:
            pass  # another worker has failed their reload in the same moment
        elif not worker.serves and worker.generation < self._generation:
            pass  # a newer one starts in its place
        elif self._is_reloading and worker.generation == self._generation and (code or not worker.serves):
            self._fail_reload(_what_failed(worker, pid, code))
        elif self._may_try_again(code):
            self._try_again_later(_what_failed(worker, pid, code))
        elif not self._may_replace(pid, code):
            self._give_up(code)
        elif code == 0 and not self._stopping and self._ends_at_once(worker):
            what = f"workers end at once, {self._ended_at_once} times in a row"
            if self._has_served:
                self._try_again_later(what)
            else:
                say(f"{what}, giving up", level="error")
                self._give_up(ExitCode.REFUSED)

    def _may_try_again(self, code: int) -> bool:
        """Whether this exit code means a start that failed and may succeed later."""
        return self._has_served and code not in (0, ExitCode.CRASHED) and not _died(code)

    def _try_again_later(self, what: str) -> None:
        """Begin a pause and log it. Several workers that are refused together begin one pause."""
        if self._pause.is_running:
            return
        pause_s = self._pause.begin()
        serving = sum(worker.serves for worker in self._active)
        meanwhile = (
            f"{serving} of {self._config.workers} workers serve on"
            if serving
            else "no worker serves until then, and clients wait"
        )
        say(f"{what}; the next start is tried in {pause_s:g} s, {meanwhile}")

    def _may_replace(self, pid: int | None, code: int) -> bool:
        if code == 0:
            return True
        if not _died(code):
            return False
        now = time.monotonic()
        if len(self._died_at) == REPLACEMENTS_MAX and now - self._died_at[0] < REPLACEMENTS_WITHIN_S:
            say(f"{REPLACEMENTS_MAX} workers died within {REPLACEMENTS_WITHIN_S} s, giving up", level="error")
            return False
        self._died_at.append(now)
        say(f"worker {pid} ended {_how(code)}, another one takes its place")
        return True

    def _ends_at_once(self, worker: WorkerProcess) -> bool:
        """Whether so many workers have ended with code 0 right after their start that the next ones would too."""
        if time.monotonic() - worker.started_at > AT_ONCE_S:
            self._ended_at_once = 0
        else:
            self._ended_at_once += 1
        return self._ended_at_once > AT_ONCE_MAX

    # The end of the service

    def _give_up(self, code: int) -> None:
        """End the service with this code."""
        self._note_code(code)
        self._stopping = True

    def _note_end(self, worker: WorkerProcess) -> None:
        """Keep the exit code of a worker that has ended in the stop of the service."""
        code = worker.exit_code or 0
        worker.release()
        if not (code == ENDED_BY_SIGTERM and not worker.has_begun):
            self._note_code(code)

    def _note_code(self, code: int) -> None:
        """Keep this code as the exit code of the service, if it is the first that is not 0.

        Once a worker has served, a start that is refused during the stop does not count.
        """
        if not (self._has_served and code == ExitCode.REFUSED):
            self._code = self._code or code

    def _stop(self) -> None:
        """Tell all workers to stop, and wait for their ends; kill those that are late."""
        for worker in self._workers:
            worker.tell_stop(slack_s=STOP_SLACK_S, reason=self._stop_reason)
        self._tell_workers()
        self._take_messages()
        self._end_starts(hurry=not self._clients_wait())
        while self._workers:
            now = time.monotonic()
            if all(worker.end_by is not None and worker.end_by - STOP_SLACK_S <= now for worker in self._workers):
                self._end_starts(hurry=True)
            if late := [it for it in self._workers if it.end_by is not None and it.end_by <= now]:
                say(f"killing {len(late)} workers that did not stop in time", level="error")
                for worker in late:
                    worker.process.kill()
                    worker.process.join()
                self._note_code(ExitCode.WATCHDOG)
            self._take_messages()
            for worker in self._take_ended():
                if worker in late:
                    worker.release()
                else:
                    self._note_end(worker)
            if self._workers:
                ends = [worker.end_by for worker in self._workers if worker.end_by is not None]
                due = [*ends, *(end - STOP_SLACK_S for end in ends if end - STOP_SLACK_S > now)]
                self._wait(max(min(due) - now, 0.001))

    def _end_starts(self, *, hurry: bool) -> None:
        """End the workers that do not handle signals yet, which is at once.

        Without a hurry they go on if only they could answer the clients that wait.
        """
        if hurry or any(worker.has_begun for worker in self._workers):
            for worker in self._workers:
                if not worker.has_begun:
                    worker.process.terminate()

    def _clients_wait(self) -> bool:
        """Whether a client waits for a worker to accept it."""
        poll = select.poll()
        for sock in (*self._sockets.secure_sockets, *self._sockets.insecure_sockets):
            poll.register(sock.fileno(), select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))


def _died(code: int) -> bool:
    """Whether a worker with this exit code has died of a fault that another worker need not have.

    A code above those of the signals is the worker's own: 255 is a Python that could not be started.
    """
    return code in DIED or 128 < code < 128 + signal.NSIG


def _how(code: int) -> str:
    """Say how a worker died. Not every signal has a name: real-time signals have only numbers."""
    if code in DIED:
        return f"with code {code}"
    try:
        return f"by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"by signal {code - 128}"


def _what_failed(worker: WorkerProcess, pid: int | None, code: int) -> str:
    if worker.serves:
        return f"worker {pid} ended with code {code} after it had served"
    reason = f": {worker.refusal}" if worker.refusal else ""
    return f"worker {pid} could not start (code {code}{reason})"
