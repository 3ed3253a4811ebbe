"""The pause before a worker is started in the place of one whose start was refused."""

import time

FIRST_S = 1.0
MAX_S = 30.0
"""Each refused start in a row doubles the pause, up to this. A start takes a second of a core."""


class StartPause:
    """Says when the next start may be tried. Not running at first."""

    def __init__(self) -> None:
        self._length_s = 0.0
        self._until = 0.0

    @property
    def is_running(self) -> bool:
        return time.monotonic() < self._until

    def begin(self) -> float:
        """A start was refused: begin a pause, twice as long as the last one. Returns its length in seconds."""
        self._length_s = min(2 * self._length_s, MAX_S) or FIRST_S
        self._until = time.monotonic() + self._length_s
        return self._length_s

    def forget_refusals(self) -> None:
        """A start has succeeded: the next pause is a short one. One that runs goes on."""
        self._length_s = 0.0

    def end(self) -> None:
        """Somebody has asked for a start now."""
        self._length_s = self._until = 0.0
