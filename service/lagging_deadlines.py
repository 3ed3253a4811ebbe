"""Deadlines that move with each token and cost nothing but a look at the clock.

To move the deadline of a scope costs more than all other work on a token: Trio keeps deadlines in a heap. So the
deadline that Trio knows lags behind: it stays where it is while the true deadline moves away. Shortly before the
lagging deadline has come, it is moved to the true one, after the wait for I/O and before Trio looks at its deadlines.
Trio calls instruments at this moment, and then reads the clock again: so a deadline that is near never lags. Proven by
``tests/test_lagging_deadlines.py``.
"""

from math import inf
from typing import Protocol

import anyio.lowlevel
import trio

EXACT_S = 1.0
"""A deadline that is nearer than this does not lag: Trio may look at its deadlines so long after the mover has."""
_LOOK_AHEAD_S = 2.0
"""Deadlines that lag behind are moved so long before their time, so that one look a second at all of them is enough."""


class Lagging(Protocol):
    """A scope's deadline that may lag behind the true one, until the scope's is as near as :data:`EXACT_S`.

    Attributes:
        armed_at: The deadline of the scope. It is never later than the true one.
    """

    armed_at: float

    def catch_up(self) -> None:
        """Move the scope's deadline to the true one."""
        ...


class DeadlineMover(trio.abc.Instrument):
    """Moves the lagging deadlines of one event loop."""

    def __init__(self) -> None:
        self._lagging: dict[Lagging, None] = {}
        self._next_at = inf

    def __repr__(self) -> str:
        return f"<DeadlineMover: {len(self._lagging)} deadlines, next look at {self._next_at:.3f}>"

    def add(self, deadline: Lagging) -> None:
        """Add a deadline, until :meth:`discard`."""
        self._lagging[deadline] = None
        self.note_armed(deadline.armed_at)

    def discard(self, deadline: Lagging) -> None:
        """Forget a deadline."""
        del self._lagging[deadline]

    def note_armed(self, at: float) -> None:
        """Note the new deadline of a scope."""
        if at > trio.current_time() + EXACT_S:
            self._next_at = min(self._next_at, at)

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  the name is Trio's
        """Trio's hook between the wait for I/O and the look at deadlines."""
        if self._next_at <= trio.current_time() + EXACT_S:
            self._move()

    def _move(self) -> None:
        now = trio.current_time()
        for deadline in self._lagging:
            if deadline.armed_at <= now + _LOOK_AHEAD_S:
                deadline.catch_up()
        self._next_at = min((it.armed_at for it in self._lagging if it.armed_at > now + EXACT_S), default=inf)


_mover: anyio.lowlevel.RunVar[DeadlineMover] = anyio.lowlevel.RunVar("lastcall.lagging_deadlines")


class lagging:  # noqa: N801  used as a function
    """Let a deadline lag behind within the block. The mover has to hear of each new ``armed_at``.

    A class, because a generator would take several times the memory in each running turn.
    """

    __slots__ = ("_deadline", "_mover")

    def __init__(self, deadline: Lagging) -> None:
        self._deadline = deadline
        self._mover: DeadlineMover

    def __enter__(self) -> DeadlineMover:
        mover = _mover.get(None)
        if mover is None:
            mover = DeadlineMover()
            _mover.set(mover)
            trio.lowlevel.add_instrument(mover)  # until the end of the event loop: to add one takes 50 microseconds
        self._mover = mover
        mover.add(self._deadline)
        return mover

    def __exit__(self, *_: object) -> None:
        self._mover.discard(self._deadline)
