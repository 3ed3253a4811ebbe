"""A thread that cuts the connections whose server does not answer in time.

The bounds inside of the server do not help where its answers do not arrive: its machine has vanished behind a pooler,
or hangs as a whole. The thread that waits for the answer finds its connection lost, and makes another one.
"""

import threading
import time
from collections.abc import Sequence

import structlog

from service.storage.postgres.connections import Line

logger = structlog.get_logger("lastcall.store")

LOOK_S = 0.5
"""The pause between two looks. It is never long, because the threads that wait do not wake this one."""
GAP_S = 1.0
"""After a longer pause this process was held up itself, and the answers may be there."""


class LateAnswers:
    """The lines of a store, and the thread that looks at them."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="postgres late answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Look no more, and cut the connections that are still open. Idempotent."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        for line in self._lines:
            line.cut()

    def _work(self) -> None:
        looked_at = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = time.monotonic()
            if now - looked_at < LOOK_S + GAP_S:
                self._cut_late(now)
            looked_at = now

    def _cut_late(self, now: float) -> None:
        late = sum(line.cut(late_at=now) for line in self._lines)
        if late:
            logger.warning("the database did not answer in time: its connections were cut", connections=late)
