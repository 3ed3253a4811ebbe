"""hypercorn's master, mended: it returns what its workers return, and replaces one that was killed.

hypercorn 0.18 returns 0 whatever its workers do, because it joins an emptied list, and stops everything when one
worker of several is killed. Source: pgjones/hypercorn#269. Proven by ``tests/hosting/test_master.py``.

It runs where hypercorn's command line reads our configuration (:mod:`service.hosting.hypercorn_config`), which is
in the master and nowhere else.
"""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import hypercorn.__main__
import hypercorn.run
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.exit import ExitCode
from service.hosting.serve import check_certificate, take_addresses

REPLACEMENTS_MAX = 5
REPLACEMENTS_WITHIN_S = 60
"""A worker is replaced so often in so long; whoever dies faster will not be mended by another start."""
STOP_SLACK_S = 2
"""What workers may take beyond their own bound on a shutdown, before they are killed."""


class Workers:
    """Judges the workers that have ended, in place of hypercorn's ``_join_exited``."""

    def __init__(self, *, stop_timeout_s: float) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._killed_at: deque[float] = deque(maxlen=REPLACEMENTS_MAX)
        self._stopping = False
        self.code = 0

    def join_exited(self, processes: list[BaseProcess]) -> int:
        """Take the workers that have ended off the list. Not 0 where all are to be stopped.

        Once the service stops, it waits for the others as well: their codes count too.
        """
        for process in [it for it in processes if it.exitcode is not None]:
            processes.remove(process)
            self._judge(process)
        if self._stopping or self.code:
            self._join_all(processes)
        return self.code

    def _judge(self, process: BaseProcess) -> None:
        code = process.exitcode or 0
        process.join()
        stop_event = process._kwargs["shutdown_event"]  # type: ignore[attr-defined]
        self._stopping |= stop_event.is_set()
        if code >= 0 or self._stopping:
            self.code = self.code or _as_exit_code(code)
        elif self._may_replace():
            _say(f"worker {process.pid} was ended by {signal.Signals(-code).name}; another one takes its place")
        else:
            _say(f"{REPLACEMENTS_MAX} workers were killed within {REPLACEMENTS_WITHIN_S} s; giving up")
            self.code = _as_exit_code(code)

    def _may_replace(self) -> bool:
        now = time.monotonic()
        often = len(self._killed_at) == REPLACEMENTS_MAX and now - self._killed_at[0] < REPLACEMENTS_WITHIN_S
        self._killed_at.append(now)
        return not often

    def _join_all(self, processes: list[BaseProcess]) -> None:
        deadline = time.monotonic() + self._stop_timeout_s
        for process in processes:
            process._kwargs["shutdown_event"].set()  # type: ignore[attr-defined]
        while processes:
            if not wait([process.sentinel for process in processes], max(deadline - time.monotonic(), 0)):
                for process in processes:
                    process.kill()
                    process.join()
                self.code = self.code or ExitCode.WATCHDOG
            for process in [it for it in processes if it.exitcode is not None]:
                processes.remove(process)
                self.code = self.code or _as_exit_code(process.exitcode or 0)


def _as_exit_code(code: int) -> int:
    """What a shell would say: 128 and the signal for one that was killed."""
    return 128 - code if code < 0 else code


def _say(text: str) -> None:
    try:
        os.write(2, f"lastcall: {text}\n".encode())
    except OSError:
        pass
