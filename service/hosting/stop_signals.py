"""The notice: joins all the ways in which this process can learn that it is to stop.

==================  ===============================================================================
SIGTERM, SIGINT     to this process, or to the whole group; from the master once another worker ends
SIGHUP              a terminal that was closed; with hypercorn's master, a reload that went to the group
the master          it stops the service, or other workers serve in this worker's place
the master's death  no other process would stop this worker
``terminate``       hypercorn's own wish, by ``--max-requests``, where its own master runs
``terminated``      hypercorn has stopped serving for a reason of its own: the backup of all others
==================  ===============================================================================

The first one counts. Each of them starts the watchdog where it is seen. Signals and the master's word are seen outside
of the event loop, so a blocked event loop cannot keep the process alive.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from types import FrameType

import structlog
import trio
from hypercorn.trio.worker_context import WorkerContext

from service.hosting.hypercorn.worker import Master
from service.hosting.process.watchdog import Watchdog
from service.shutdown import Shutdown
from service.stop_state import Phase

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECOND_PRESS_S = 0.25
"""A terminal's Ctrl+C reaches a worker twice, as SIGINT and by the master: only a later SIGINT is a second Ctrl+C."""


HANGUP_ENDS_IT = (
    "SIGHUP ends a process that serves alone: it cannot reload. To have SIGHUP start new workers first, serve with "
    "workers, one is enough: lastcall serve --workers 1"
)

logger = structlog.get_logger("lastcall.process")


def has_terminal() -> bool:
    """Whether this process has a controlling terminal, whose end would be told by SIGHUP. False after that end."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Notice:
    """Passes on a reason to stop to the shutdown and the watchdog. Made inside the event loop.

    Args:
        shutdown: Gets the notice, in the event loop.
        watchdog: Started at once, in the calling thread.
        is_replaced: Whether other processes serve in this one's place, as far as the master has said.
        explain_hangup: Whether to log why SIGHUP is no reload here.
    """

    def __init__(
        self,
        shutdown: Shutdown,
        watchdog: Watchdog,
        *,
        is_replaced: Callable[[], bool] = bool,
        explain_hangup: bool = False,
    ) -> None:
        self._shutdown = shutdown
        self._watchdog = watchdog
        self._is_replaced = is_replaced
        self._explain_hangup = explain_hangup
        self._token = trio.lowlevel.current_trio_token()
        self._first_seen: float | None = None
        self._context = copy_context()

    def tell(self, reason: str) -> None:
        """Give notice. May be called from any thread and from a signal handler."""
        now = time.monotonic()
        if self._first_seen is None:
            self._first_seen = now
        try:
            self._watchdog.start()  # first: what the event loop does from the notice on may hold the GIL
        finally:
            self._shutdown.expect_notice(partial(self._arrive_early, reason, now))
            with suppress(trio.RunFinishedError):  # the event loop has ended: the process is already exiting
                self._token.run_sync_soon(self._arrive, reason, now)

    def _arrive(self, reason: str, seen_at: float) -> None:
        is_late = self._first_seen is not None and seen_at - self._first_seen > SECOND_PRESS_S
        if self._shutdown.phase >= Phase.LAME_DUCK and reason == "SIGINT" and is_late:
            self._shutdown.hurry()
        if self._shutdown.phase < Phase.LAME_DUCK and reason == "SIGHUP" and self._explain_hangup:
            logger.warning(HANGUP_ENDS_IT)
        self._shutdown.notice(reason, age_s=time.monotonic() - seen_at, is_replaced=self._is_replaced())

    def _arrive_early(self, reason: str, seen_at: float) -> None:
        """Give the notice from the task that sees it first, without that task's context variables."""
        self._context.run(self._arrive, reason, seen_at)

    @contextmanager
    def from_signals(self) -> Iterator[None]:
        """Handle the stop signals inside of the context, and ignore them after it, because the process is exiting.

        :func:`trio.open_signal_receiver` does not fit: it delivers unread signals again when it closes, which kills the
        process (its documentation says so), and its handler cannot start a watchdog while the event loop is blocked.
        """

        def handle(signum: int, _frame: FrameType | None) -> None:
            self.tell(signal.Signals(signum).name)

        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(signum, handle)
        try:
            yield
        finally:
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)

    def watch(self, master: Master) -> None:
        """Watch the master in a thread: a blocked event loop does not delay the notice."""
        watch = threading.Thread(target=master.watch, args=(self.tell,), name="master watch", daemon=True)
        watch.start()

    async def watch_hypercorn(self, context: WorkerContext) -> None:
        """Give notice once hypercorn's listeners are closed, by this service or by hypercorn itself."""
        await context.terminated.wait()
        self.tell("hypercorn stops")
