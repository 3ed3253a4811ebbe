"""Long work of pure functions, in steps between which other tasks run.

Such a function is a generator: it yields after a step, which takes far less than :data:`STEP_S`, and returns its
result. It knows nothing of an event loop, and its caller decides whether other tasks run in between.
"""

import time
from collections.abc import Generator
from typing import TypeAlias, TypeVar

import anyio.lowlevel

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""A function's work in steps, and its result."""

STEP_S = 0.003
"""The approximate time after which other tasks run."""


async def in_steps(steps: Steps[T], *, step_s: float | None = None) -> T:
    """Do the work, and let other tasks run in between. After a cancellation the rest of the work is never done.

    Args:
        step_s: The approximate time after which other tasks run; :data:`STEP_S` if None.
    """
    step_max_s = STEP_S if step_s is None else step_s
    began_at = time.perf_counter()
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
        if time.perf_counter() - began_at >= step_max_s:
            await anyio.lowlevel.checkpoint()
            began_at = time.perf_counter()


class WorkTime:
    """The time that work in steps takes, without the waits between its steps."""

    def __init__(self) -> None:
        self._before_s = 0.0
        self._began_at = 0.0

    @property
    def elapsed_s(self) -> float:
        """The time of the steps so far. Asked within a step of :meth:`of`."""
        return self._before_s + time.monotonic() - self._began_at

    def of(self, steps: Steps[T]) -> Steps[T]:
        """The same steps, whose time counts."""
        while True:
            self._began_at = time.monotonic()
            try:
                next(steps)
            except StopIteration as done:
                result: T = done.value
                return result
            self._before_s = self.elapsed_s
            yield


def at_once(steps: Steps[T]) -> T:
    """Do the work at once: where it holds up no other task, as in a thread, or is short."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
