"""Deadlines that a freeze of the process does not break: SIGSTOP, a suspended machine, a starved process.

After a freeze, deadlines have passed while the data that would have moved them waits unread in the sockets. Trio
looks at its deadlines before any task runs, so Trio would cancel and the data would never be read. This module watches
the event loop. When the event loop is late, deadlines that were entered with :func:`extended_when_late` move, after the
wait for I/O and before Trio looks at them. After a freeze at least :data:`THAW_S` are left, or the whole timeout if
that is shorter. After any other lateness at least :data:`READING_S` are left, once. Deadlines that are further away
stay.

The bounds of a shutdown are not entered: they count real time. Model clients may use this module without Trio; their
deadlines do not move then. Proven by ``tests/test_freezes.py`` and ``tests/process/test_frozen.py``.
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
"""From this delay on an event loop counts as late."""
FROZEN_S = 1.0
"""An event loop whose thread did not run for this part of its delay was frozen; a busy machine makes shorter pauses."""
READING_S = 0.25
"""The time that a deadline leaves, after a busy event loop, to read the data that has arrived."""
THAW_S = 5.0
"""The same after a freeze: peers and the network need time to recover, too."""


_SAMPLE_S = 0.25
"""How often to read the CPU time of this thread: the reading costs as much as all other work of the watch."""


class Lateness(msgspec.Struct, frozen=True):
    """One delay of the event loop: the time now, and whether the process was frozen (True) or only busy (False)."""

    now: float
    was_frozen: bool


class Deadline:
    """A deadline that moves where the event loop was late.

    Attributes:
        at: The time of the deadline, on the event loop's clock.
        planned: The time to which it was set, before any move.
    """

    def __init__(self, at: float = inf, *, timeout_s: float = inf) -> None:
        self.set(at, timeout_s=timeout_s)

    def set(self, at: float, *, timeout_s: float = inf) -> None:
        """Set the deadline anew.

        Args:
            timeout_s: The whole timeout. A move never leaves more than this.
        """
        self.at = self.planned = at
        self._timeout_s = timeout_s
        self._extended = False

    def note_late(self, lateness: Lateness) -> None:
        """Move the deadline after a delay. A busy event loop moves it only once, because each round may be late."""
        if self._extended and not lateness.was_frozen:
            return
        reading_s = min(THAW_S if lateness.was_frozen else READING_S, self._timeout_s)
        if self.at < lateness.now + reading_s:
            self.at = lateness.now + reading_s
            self._extended = not lateness.was_frozen


OnLate = Callable[[Lateness], None]


class FreezeWatch(trio.abc.Instrument):
    """Watches the event loop in which it was made. See :func:`watch_for_freezes`.

    Args:
        counts_frozen_time: Whether frozen time counts now, as in a shutdown.
        clock: Real time, in seconds.
        cpu_clock: CPU time of this thread, in seconds.

    Attributes:
        steps_took_s: How long the steps of all tasks took in the last round of the event loop. Of work that takes
            several rounds, because a task gives others a turn in between: how long it has taken so far.
    """

    def __init__(
        self, *, counts_frozen_time: Callable[[], bool], clock: Callable[[], float], cpu_clock: Callable[[], float]
    ) -> None:
        self._counts_frozen_time = counts_frozen_time
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._seen_at = clock()
        self._ran_s = cpu_clock()
        self._sample_at = self._seen_at
        self._on_late: dict[OnLate, None] = {}
        self.steps_took_s = 0.0
        self._busy_since: float | None = None

    def add(self, on_late: OnLate) -> None:
        """Call ``on_late`` whenever the event loop was late, before Trio looks at deadlines, until :meth:`remove`."""
        self._on_late[on_late] = None

    def remove(self, on_late: OnLate) -> None:
        del self._on_late[on_late]

    def now(self) -> float:
        """The time on the watch's clock, for :meth:`note_busy`."""
        return self._clock()

    def note_busy(self, since: float) -> None:
        """Note in this round of the event loop that a task does work in it that began at ``since``."""
        self._busy_since = since

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002  the name is Trio's
        """Trio's hook between the steps of a round and the wait for I/O."""
        began = self._seen_at if self._busy_since is None else self._busy_since
        self._busy_since = None
        self.steps_took_s = self._clock() - began

    def after_io_wait(self, timeout: float) -> None:
        """Trio's hook between the wait for I/O, which was to take ``timeout`` seconds, and the look at deadlines."""
        now = self._clock()
        late_s = now - self._seen_at - timeout
        self._seen_at = now
        if late_s >= LATE_S:
            did_not_run_s = late_s - self._sample_cpu(now)
            if not self._counts_frozen_time():
                self._call_all(Lateness(trio.current_time(), did_not_run_s >= FROZEN_S))
                # The calls delay the event loop, too. If that counted, thousands of them would lead to the next ones.
                self._seen_at += self._sample_cpu(now)
        elif now >= self._sample_at:
            self._sample_cpu(now)

    def _sample_cpu(self, now: float) -> float:
        """Seconds that this thread ran since the last sample."""
        before, self._ran_s = self._ran_s, self._cpu_clock()
        self._sample_at = now + _SAMPLE_S
        return self._ran_s - before

    def _call_all(self, lateness: Lateness) -> None:
        for on_late in tuple(self._on_late):
            on_late(lateness)


_watch: anyio.lowlevel.RunVar[FreezeWatch | None] = anyio.lowlevel.RunVar("lastcall.freezes", None)


@contextmanager
def watch_for_freezes(
    *,
    counts_frozen_time: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.thread_time,
) -> Iterator[None]:
    """Watch this event loop, and move the deadlines that were entered with :func:`extended_when_late`.

    Args:
        counts_frozen_time: Called at each delay; while it returns True, no deadline moves.
    """
    watch = FreezeWatch(counts_frozen_time=counts_frozen_time, clock=clock, cpu_clock=cpu_clock)
    token = _watch.set(watch)
    trio.lowlevel.add_instrument(watch)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(watch)
        _watch.reset(token)


def current_watch() -> FreezeWatch | None:
    """Return the watch of this event loop, if it has one."""
    return _watch.get()


class calling_when_late:  # noqa: N801  used as a function
    """Call ``on_late`` whenever this event loop was late, before Trio looks at deadlines; no effect without a watch.

    A class, because a generator would take ten times the memory in each running turn, and several times the time in
    each step of the store.
    """

    __slots__ = ("_on_late", "_watch")

    def __init__(self, on_late: OnLate) -> None:
        self._on_late = on_late
        self._watch: FreezeWatch | None = None

    def __enter__(self) -> None:
        self._watch = _watch.get()
        if self._watch is not None:
            self._watch.add(self._on_late)

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.remove(self._on_late)


def check_for_freeze() -> None:
    """Check for a freeze within a round of the event loop.

    Code that compares a deadline with the time itself calls this first: the freeze may have been a moment ago.
    """
    watch = _watch.get()
    if watch is not None:
        watch.after_io_wait(0)


class _Scope(Protocol):
    deadline: float


class ScopeDeadline:
    """Moves the deadline of one scope, Trio's or AnyIO's.

    Args:
        timeout_s: The whole timeout, from the moment at which the deadline is set.
    """

    def __init__(self, scope: _Scope, *, timeout_s: float) -> None:
        self._scope = scope
        self._timeout_s = timeout_s
        self._deadline = Deadline(scope.deadline, timeout_s=timeout_s)

    def note_late(self, lateness: Lateness) -> None:
        """Move the deadline after a delay of the event loop."""
        self._deadline.note_late(lateness)
        self._scope.deadline = self._deadline.at

    @property
    def left_s(self) -> float:
        """How much of the time is left; 0 if it is over."""
        return max(0.0, self._scope.deadline - anyio.current_time())

    def restart(self) -> None:
        """Give the whole timeout again."""
        self._deadline.set(anyio.current_time() + self._timeout_s, timeout_s=self._timeout_s)
        self._scope.deadline = self._deadline.at


class extended_when_late:  # noqa: N801  used as a function
    """Move the deadline of a scope whenever the event loop was late. To be entered inside of the scope."""

    __slots__ = ("_calling", "_scope", "_timeout_s")

    def __init__(self, scope: _Scope, *, timeout_s: float) -> None:
        self._scope = scope
        self._timeout_s = timeout_s
        self._calling: calling_when_late

    def __enter__(self) -> ScopeDeadline:
        deadline = ScopeDeadline(self._scope, timeout_s=self._timeout_s)
        self._calling = calling_when_late(deadline.note_late)
        self._calling.__enter__()
        return deadline

    def __exit__(self, *_: object) -> None:
        self._calling.__exit__()


@contextmanager
def move_on_after(seconds: float) -> Iterator[anyio.CancelScope]:
    """AnyIO's ``move_on_after`` with a deadline that moves after a freeze."""
    with anyio.move_on_after(seconds) as scope, extended_when_late(scope, timeout_s=seconds):
        yield scope
