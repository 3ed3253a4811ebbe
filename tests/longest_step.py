"""How long one task blocks the event loop: its longest step in processor time, which other processes change little."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

STEP_MAX_S = 0.02
"""No request blocks the event loop for longer, for any bytes."""


class LongestStep(trio.abc.Instrument):
    """Watches all tasks but those that belong to the test.

    Attributes:
        seconds: The longest step since :meth:`reset`.
        task_name: The task of this step.
    """

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._ours: set[trio.lowlevel.Task] = set()
        self.reset()

    def reset(self) -> None:
        self.seconds = 0.0
        self.task_name = ""

    def leave_out(self) -> None:
        """Leave out the current task, which belongs to the test."""
        self._ours.add(trio.lowlevel.current_task())

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began_at = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._began_at is None or task in self._ours:
            return
        seconds = time.thread_time() - self._began_at
        if seconds > self.seconds:
            self.seconds, self.task_name = seconds, task.name


@contextmanager
def watching_steps() -> Iterator[LongestStep]:
    """Watch from now on. As in the server, objects that exist already are left out of the garbage collection."""
    longest = LongestStep()
    longest.leave_out()
    gc.collect()
    gc.freeze()
    trio.lowlevel.add_instrument(longest)
    try:
        yield longest
    finally:
        trio.lowlevel.remove_instrument(longest)
        gc.unfreeze()
