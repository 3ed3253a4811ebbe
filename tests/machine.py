"""How much time a server had, where a test bounds what the server takes.

On a busy machine a process waits for a processor, or for the host of its virtual machine, and any of its steps may take
seconds more. That is no fault of the server, so such time does not count against its bounds. Its waits for the disk do:
a server that writes more than it has to would hide behind them. On a quiet machine nothing is left out.
"""

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

LOOK_INTERVAL_S = 0.02
_PRESSURE = Path("/proc/pressure/cpu")
_TICKS_A_SECOND = 100
"""Of /proc/stat; so on every Linux."""


def held_up_s() -> float:
    """For how long, since the machine was started, some process wanted to run and could not.

    Source: https://docs.kernel.org/accounting/psi.html ("some"), and "steal" of proc(5), which the pressure leaves out.
    """
    held_s = 0.0
    with suppress(OSError):  # a kernel without it: then all time counts
        held_s = int(_PRESSURE.read_bytes().partition(b"total=")[2].split(maxsplit=1)[0]) / 1e6
    stolen = int(Path("/proc/stat").read_bytes().split(maxsplit=9)[8])
    return held_s + stolen / _TICKS_A_SECOND


class Machine:
    """Watches the machine while a test runs. Times are ``time.monotonic()``, which all processes share."""

    def __init__(self) -> None:
        self._looked_at: list[float] = []
        self._held_up_s: list[float] = []
        self._over = threading.Event()
        self._looking = threading.Lock()
        self._look()
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)
        self._thread.start()

    def free_s(self, since: float, until: float) -> float:
        """The seconds of this time in which each process that wanted to run could run."""
        self._look()
        first = max(bisect_right(self._looked_at, since) - 1, 0)
        last = min(bisect_left(self._looked_at, until), len(self._looked_at) - 1)
        return max(until - since - (self._held_up_s[last] - self._held_up_s[first]), 0.0)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        with self._looking:
            self._held_up_s.append(held_up_s())
            self._looked_at.append(time.monotonic())


@pytest.fixture
def machine() -> Iterator[Machine]:
    """The machine, watched from the begin of the test on."""
    machine = Machine()
    yield machine
    machine.close()
