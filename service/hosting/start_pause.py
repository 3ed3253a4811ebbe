"""The pause before the next start of a worker, after a start was refused."""

import time

FIRST_S = 1.0
MAX_S = 30.0
"""Each refused start in a row doubles the pause, up to this bound. A start takes a second of a core."""


class StartPause:
    """Tells whether the next start has to wait. Not running at first."""

    def __init__(self) -> None:
        self._length_s = 0.0
        self._until = 0.0

    @property
    def is_running(self) -> bool:
        return time.monotonic() < self._until

    @property
    def left_s(self) -> float:
        return max(self._until - time.monotonic(), 0)

    def begin(self) -> float:
        """Begin a pause after a refused start, twice as long as the last one. Returns its length in seconds."""
        self._length_s = min(2 * self._length_s, MAX_S) or FIRST_S
        self._until = time.monotonic() + self._length_s
        return self._length_s

    def forget_refusals(self) -> None:
        """Make the next pause a short one, after a start has succeeded. A pause that runs goes on."""
        self._length_s = 0.0

    def end(self) -> None:
        """End the pause, because an operator has asked for a start."""
        self._length_s = self._until = 0.0
