"""Deadlines that hold for a process that was frozen: stopped by SIGSTOP, in a suspended machine, starved.

Such a process goes on with deadlines that have passed and, unread in its sockets, what would have moved them. Trio
looks at its deadlines before any task runs, so that it would cancel first and never read. Here the event loop is
watched. Where it comes late, deadlines that were entered with :func:`forgiving` move, after the wait for I/O and before
Trio looks at them: at least :data:`THAW_S` are left after a freeze, or the whole timeout where that is shorter; after
another lateness, once, :data:`READING_S`. Deadlines that are further away stay.

What bounds a shutdown is not entered: it counts real time. Leaf adapters may use this without Trio: then nothing moves.
Proven by ``tests/test_freezes.py`` and ``tests/process/test_frozen.py``.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Protocol

import anyio
import anyio.lowlevel
import msgspec
import trio

LATE_S = 0.05
"""An event loop that comes so much later than it wanted to is late."""
FROZEN_S = 1.0
"""One that has not run for so long of that was frozen: shorter pauses are those of a busy machine."""
READING_S = 0.25
"""What a busy event loop leaves for reading what is there."""
THAW_S = 5.0
"""The same after a freeze, when peers and the network have to find their way, too."""


_SAMPLE_S = 0.25
"""How often to look at the time that this thread ran: it costs as much as all the rest here together."""


class Lateness(msgspec.Struct, frozen=True):
    """What a late event loop found: the time, and whether the process did not run meanwhile, or was only busy."""

    now: float
    was_frozen: bool


class Deadline:
    """A deadline that moves where the event loop was late.

    Attributes:
        at: When it passes, on the event loop's clock.
    """

    def __init__(self, at: float = inf, *, timeout_s: float = inf) -> None:
        self.set(at, timeout_s=timeout_s)

    def set(self, at: float, *, timeout_s: float = inf) -> None:
        """Begin anew.

        Args:
            timeout_s: What it gives at first. It never gives more when it moves.
        """
        self.at = at
        self._timeout_s = timeout_s
        self._forgiven = False

    def note_late(self, lateness: Lateness) -> None:
        """The event loop was late. For one that was only busy it moves once: such a one may be late in each round."""
        if self._forgiven and not lateness.was_frozen:
            return
        reading_s = min(THAW_S if lateness.was_frozen else READING_S, self._timeout_s)
        if self.at < lateness.now + reading_s:
            self.at = lateness.now + reading_s
            self._forgiven = not lateness.was_frozen


OnLate = Callable[[Lateness], None]


class FreezeWatch(trio.abc.Instrument):
    """Watches the event loop that it is made in. See :func:`watch_for_freezes`.

    Args:
        counts: Whether frozen time counts now, as in a shutdown.
        clock: Time as it passes.
        cpu_clock: Time in which this thread ran.
    """

    def __init__(
        self, *, counts: Callable[[], bool], clock: Callable[[], float], cpu_clock: Callable[[], float]
    ) -> None:
        self._counts = counts
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._seen_at = clock()
        self._ran_s = cpu_clock()
        self._sample_at = self._seen_at
        self._on_late: dict[OnLate, None] = {}

    @contextmanager
    def telling(self, on_late: OnLate) -> Iterator[None]:
        """Have ``on_late`` called whenever the event loop was late, before deadlines count."""
        self._on_late[on_late] = None
        try:
            yield
        finally:
            del self._on_late[on_late]

    def after_io_wait(self, timeout: float) -> None:
        """Trio's hook: called between the wait for I/O, which was to take ``timeout``, and the look at deadlines."""
        now = self._clock()
        late_s = now - self._seen_at - timeout
        self._seen_at = now
        if late_s >= LATE_S:
            did_not_run_s = late_s - self._sample_cpu(now)
            if not self._counts():
                self._tell(Lateness(trio.current_time(), did_not_run_s >= FROZEN_S))
        elif now >= self._sample_at:
            self._sample_cpu(now)

    def _sample_cpu(self, now: float) -> float:
        """How long this thread ran since the last sample."""
        before, self._ran_s = self._ran_s, self._cpu_clock()
        self._sample_at = now + _SAMPLE_S
        return self._ran_s - before

    def _tell(self, lateness: Lateness) -> None:
        for on_late in tuple(self._on_late):
            on_late(lateness)


_watch: anyio.lowlevel.RunVar[FreezeWatch | None] = anyio.lowlevel.RunVar("lastcall.freezes", None)


@contextmanager
def watch_for_freezes(
    *,
    counts: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.thread_time,
) -> Iterator[None]:
    """Watch this event loop: from here on deadlines that were entered with :func:`forgiving` are moved.

    Args:
        counts: Asked at each lateness; where it is True nothing moves.
    """
    watch = FreezeWatch(counts=counts, clock=clock, cpu_clock=cpu_clock)
    token = _watch.set(watch)
    trio.lowlevel.add_instrument(watch)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(watch)
        _watch.reset(token)


@contextmanager
def telling_lateness(on_late: OnLate) -> Iterator[None]:
    """Have ``on_late`` called whenever this event loop was late, before its deadlines count; if it is watched."""
    watch = _watch.get()
    if watch is None:
        yield
        return
    with watch.telling(on_late):
        yield


def look_for_freeze() -> None:
    """Before a deadline is found to have passed in the middle of a round of the event loop: look whether that is late.

    To be called where code compares a deadline with the time itself: the freeze may have been a moment ago.
    """
    watch = _watch.get()
    if watch is not None:
        watch.after_io_wait(0)


class _Scope(Protocol):
    deadline: float


class Forgiving:
    """Moves the deadline of one scope, Trio's or AnyIO's.

    Args:
        timeout_s: What the deadline gives from when it is set.
    """

    def __init__(self, scope: _Scope, *, timeout_s: float) -> None:
        self._scope = scope
        self._timeout_s = timeout_s
        self._deadline = Deadline(scope.deadline, timeout_s=timeout_s)

    def note_late(self, lateness: Lateness) -> None:
        """The event loop was late."""
        self._deadline.note_late(lateness)
        self._scope.deadline = self._deadline.at

    def begin_anew(self) -> None:
        """Give the whole timeout again."""
        self._deadline.set(anyio.current_time() + self._timeout_s, timeout_s=self._timeout_s)
        self._scope.deadline = self._deadline.at


@contextmanager
def forgiving(scope: _Scope, *, timeout_s: float) -> Iterator[Forgiving]:
    """Have the deadline of a scope move where the event loop was late. Entered inside of it."""
    forgiving = Forgiving(scope, timeout_s=timeout_s)
    with telling_lateness(forgiving.note_late):
        yield forgiving


@contextmanager
def move_on_after(seconds: float) -> Iterator[anyio.CancelScope]:
    """As AnyIO's, with a deadline that is forgiving."""
    with anyio.move_on_after(seconds) as scope, forgiving(scope, timeout_s=seconds):
        yield scope
