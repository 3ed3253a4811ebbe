"""The state of the stop: one phase that only goes forward. All code that behaves differently in a stop asks for it.

The state is below all other parts, because sessions, faces and hosting ask for it. :mod:`service.shutdown` moves it
forward; the table there says what happens in each phase.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum, auto
from math import inf

import trio


class Phase(IntEnum):
    """The phases of a stop, in their order."""

    SERVING = auto()
    EXPECTED = auto()
    LAME_DUCK = auto()
    DRAINING = auto()
    CLOSING = auto()
    INTERRUPTING = auto()
    RELEASING = auto()
    RELEASED = auto()

    def __str__(self) -> str:
        return self.name.lower()


class StopState:
    """The phase of the stop, and the waits for later phases.

    Args:
        interrupts_at_once: Whether the notice itself interrupts all turns.

    Attributes:
        entered_at: The time at which each phase was entered, on the event loop's clock. A phase that was skipped has
            the time of the phase after it.
        is_replaced: Whether other processes serve in this one's place, as in a reload: then the stop is in no hurry.
    """

    def __init__(self, *, interrupts_at_once: bool = False) -> None:
        self.interrupts_at_once = interrupts_at_once
        self.entered_at: dict[Phase, float] = {}
        self.is_replaced = False
        self._entered = Phase.SERVING
        self._arrive: Callable[[], None] | None = None
        self._changes = trio.lowlevel.ParkingLot()
        self._scopes: dict[trio.CancelScope, Phase] = {}
        self._scopes_while_replaced: set[trio.CancelScope] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.phase}>"

    @property
    def phase(self) -> Phase:
        """The current phase. Any thread may read it.

        ``EXPECTED`` is the only phase that does not begin in the event loop. So it is no value of its own that two
        threads could write in the wrong order: it follows from a notice that is on its way and has not arrived.
        """
        if self._entered is Phase.SERVING and self._arrive is not None:
            return Phase.EXPECTED
        return self._entered

    def enter(self, phase: Phase) -> None:
        """Enter a phase, and with it the phases that are skipped. No effect if the stop has come as far already."""
        if phase <= self._entered:
            return
        now = trio.current_time()
        self.entered_at |= {skipped: now for skipped in Phase if self._entered < skipped <= phase}
        self._entered = phase
        for scope, end in self._scopes.items():
            if end <= phase:
                scope.cancel()
        self._changes.unpark_all()

    async def reached(self, phase: Phase) -> None:
        """Wait until a phase is entered. Returns without a checkpoint if that is true already."""
        while self._entered < phase:
            await self._changes.park()

    @contextmanager
    def until(self, phase: Phase, *, deadline: float = inf, shield: bool = False) -> Iterator[None]:
        """Cancel the body when a phase is entered, or at ``deadline``.

        Args:
            shield: Whether the body is shielded from cancellation from outside, until then.
        """
        with trio.CancelScope(deadline=deadline, shield=shield) as scope:
            if self._entered >= phase:
                scope.cancel()
            self._scopes[scope] = phase
            try:
                yield
            finally:
                del self._scopes[scope]

    def note_replaced(self, is_replaced: bool) -> None:
        """Note whether other processes serve in this one's place: no longer, once the whole service stops."""
        self.is_replaced = is_replaced
        if not is_replaced:
            for scope in self._scopes_while_replaced:
                scope.cancel()

    @contextmanager
    def while_replaced(self) -> Iterator[None]:
        """Cancel the body once no other process serves in this one's place."""
        with trio.CancelScope() as scope:
            if not self.is_replaced:
                scope.cancel()
            self._scopes_while_replaced.add(scope)
            try:
                yield
            finally:
                self._scopes_while_replaced.discard(scope)

    # A notice that is seen outside of the event loop

    def expect_notice(self, arrive: Callable[[], None]) -> None:
        """Note that a notice was seen outside of the event loop and will arrive soon.

        May be called from any thread and from a signal handler.

        Args:
            arrive: Gives the notice, within the event loop. May be called more than once.
        """
        if self._arrive is None:
            self._arrive = arrive

    @property
    def is_ends_only(self) -> bool:
        """As :meth:`ends_only`, for a caller that may not begin the stop: no notice arrives."""
        return self.interrupts_at_once and self.phase is not Phase.SERVING

    def ends_only(self) -> bool:
        """Whether streams may write only their ends, because all turns are interrupted now: other writes delay them.

        The first stream that asks after an expected notice has this notice arrive.
        """
        if not self.interrupts_at_once:
            return False
        if self._entered is Phase.SERVING:
            if self._arrive is None:
                return False
            self._arrive()
        return True
