"""The step that a thread runs, whose statement another thread cancels when its caller leaves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from service.storage.postgres.connections import Db, Line
from service.storage.sql_thread import Step

_AGAIN_S = 1.0
"""The pause before a further cancel: one that finds the thread between two statements hits none."""
CANCELS_MAX = 3
"""After so many cancels the server does not answer: the connection is cut."""


class RunningStep:
    """The step that runs on a connection, if any.

    The server cancels what the connection does when the cancel arrives. So the thread begins no further step before
    a cancel has been delivered; and a connection on which one may still arrive is not used again.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._step: Step[Db, Any] | None = None
        self._changed = threading.Condition()
        """Held while a cancel is being delivered; told of when the step has ended."""
        self._is_doubtful = False

    def has(self, step: Step[Db, Any]) -> bool:
        """Whether the step runs now. Called in any thread."""
        return self._step is step

    @contextmanager
    def set_to(self, step: Step[Db, Any]) -> Iterator[None]:
        """Name the step that runs in the body."""
        self._step = step
        try:
            yield
        finally:
            with self._changed:
                self._step = None
                self._changed.notify_all()
            if self._is_doubtful:
                self._is_doubtful = False
                self._line.drop()

    def cancel(self, step: Step[Db, Any]) -> None:
        """Cancel the statements of a step until it has ended. Called in a thread of its own."""
        with self._changed:
            cancels = 0
            while self._step is step:
                db = self._line.current
                if db is not None and not db.cancel():
                    self._is_doubtful = True
                self._changed.wait(_AGAIN_S)
                cancels += 1
                if cancels >= CANCELS_MAX and self._step is step:
                    self._line.cut()
