"""The notice: every way in which this process can learn that it is to stop, joined into one.

==================  ===============================================================================
SIGTERM, SIGINT     to this process, or to the whole group; from the master once another worker ends
SIGHUP              a terminal that was closed; with a master, a reload that went to the group
the master's event  the master was told to stop, or to reload
the master's death  nobody else would stop this worker
``terminate``       hypercorn's own wish, by ``--max-requests``
``terminated``      hypercorn has stopped serving for a reason of its own: the backup of all others
==================  ===============================================================================

The first counts. All of them start the watchdog where they are seen, which for a signal and for the master
is outside of the event loop: a loop that is blocked cannot keep the process alive.
"""

import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from types import FrameType

import trio
from hypercorn.trio.worker_context import WorkerContext

from service.hosting.hypercorn.worker import Master
from service.hosting.process.watchdog import Watchdog
from service.shutdown import Shutdown

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECOND_PRESS_S = 0.25
"""A terminal's Ctrl+C reaches a worker twice, as SIGINT and through its master: only a later SIGINT is a second one."""
MASTER_POLL_MS = 5
"""How often to look at the master's event: a blocking wait for it would need its locks, and a worker that is killed
in its sleep would leave them taken for good."""


class Notice:
    """Passes on what it is told to the shutdown and the watchdog. Made inside the event loop.

    Args:
        shutdown: Who learns of it, in the event loop.
        watchdog: Started at once.
    """

    def __init__(self, shutdown: Shutdown, watchdog: Watchdog) -> None:
        self._shutdown = shutdown
        self._watchdog = watchdog
        self._token = trio.lowlevel.current_trio_token()
        self._first_seen: float | None = None
        self._context = copy_context()

    def tell(self, reason: str) -> None:
        """A sign was seen. From any thread and from a signal handler."""
        now = time.monotonic()
        if self._first_seen is None:
            self._first_seen = now
        self._shutdown.expect_notice(partial(self._arrive_early, reason, now))
        with suppress(trio.RunFinishedError):  # too late: the process is on its way out already
            self._token.run_sync_soon(self._arrive, reason, now)
        self._watchdog.start()

    def _arrive(self, reason: str, seen_at: float) -> None:
        if self._shutdown.noticed.is_set():
            if reason == "SIGINT" and self._first_seen is not None and seen_at - self._first_seen > SECOND_PRESS_S:
                self._shutdown.hurry()
            return
        self._shutdown.notice(reason, age_s=time.monotonic() - seen_at)

    def _arrive_early(self, reason: str, seen_at: float) -> None:
        """For a task that comes first: what it starts is not to take the request's context for its own."""
        self._context.run(self._arrive, reason, seen_at)

    @contextmanager
    def from_signals(self) -> Iterator[None]:
        """Take the signals for good: from the end on they are ignored, because the process is leaving.

        Not :func:`trio.open_signal_receiver`: that hands unread signals back when it closes, which kills the process
        (its documentation says so), and its handler cannot start a watchdog while the event loop is blocked.
        """

        def handle(signum: int, _frame: FrameType | None) -> None:
            self.tell(signal.Signals(signum).name)

        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # nohup: it is to live on
                signal.signal(signum, handle)
        try:
            yield
        finally:
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)

    def watch(self, master: Master) -> None:
        """Look after the master from a thread of its own, at about a tenth of the cost of a poll in the event loop."""
        watch = threading.Thread(target=_watch_master, args=(master, self.tell), name="master watch", daemon=True)
        watch.start()

    async def watch_hypercorn(self, context: WorkerContext) -> None:
        """Hypercorn's listeners are closed, by us or for a reason of its own."""
        await context.terminated.wait()
        self.tell("hypercorn stops")


def _watch_master(master: Master, tell: Callable[[str], None]) -> None:
    death = select.poll()
    death.register(master.sentinel, select.POLLIN)
    while True:
        if death.poll(MASTER_POLL_MS):
            return tell("the master died")
        if master.wants_stop():
            return tell("the master stops or reloads")
