"""How long one task holds the event loop: the processor time of its longest step, which others change little."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

STEP_MAX_S = 0.02
"""No request holds the event loop for longer, whatever its bytes are."""


class LongestStep(trio.abc.Instrument):
    """Watches all tasks but those that belong to the test.

    Attributes:
        seconds: The longest step since :meth:`reset`.
        task_name: Whose it was.
    """

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._ours: set[trio.lowlevel.Task] = set()
        self.reset()

    def reset(self) -> None:
        self.seconds = 0.0
        self.task_name = ""

    def leave_out(self) -> None:
        """The current task is the test's."""
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
    """Watch from now on, with what is in memory already left out of the garbage collection, as the server does it."""
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
