"""The deadlines of a turn: they stop its work, and the one that did so tells how the turn ends.

::

    run        the whole turn takes too long                  turn_timeout
    silence    the model server sends nothing for too long    first_token_timeout, next_token_timeout
    abandoned  no client has come back for the turn           cancelled (disconnected)

All of them move where the event loop was late, as :mod:`service.freezes` says. The silence's deadline moves with each
token, and Trio hears of that late, as :mod:`service.lagging_deadlines` says.
"""

from math import inf
from types import TracebackType
from typing import Literal

import trio

from service.freezes import THAW_S, Deadline, Lateness, calling_when_late, check_for_freeze
from service.lagging_deadlines import EXACT_S, DeadlineMover, lagging
from service.sessions.events import outcome

TokenTimeout = Literal["first_token_timeout", "next_token_timeout"]


class TurnDeadlines:
    """The deadlines of one turn. All methods are synchronous.

    A deadline that has passed ends the turn: from then on no deadline can be set.

    Attributes:
        scope: The cancel scope of the turn's work: cancelled by the first deadline that passes, or by :meth:`stop`.
        armed_at: The deadline of the scope, which may lag behind; -inf once the work was stopped.
    """

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self._run = Deadline()
        self._silence = Deadline()
        self._abandoned = Deadline()
        self.armed_at = inf
        self._first = self._abandoned
        """The deadline that passed first, or that passes first unless a token moves it."""
        self._mover: DeadlineMover | None = None
        self._run_s = inf
        self._silence_s = inf
        self._silence_code: TokenTimeout = "first_token_timeout"

    def __repr__(self) -> str:
        names = {id(self._run): "run", id(self._silence): "silence", id(self._abandoned): "abandoned"}
        return f"<TurnDeadlines: {names[id(self._first)]} at {self._first.at:.3f}>"

    def at_work(self) -> "_AtWork":
        """The block in which the turn's work is done. The deadlines stop it."""
        return _AtWork(self)

    def begin_to_lag(self, mover: DeadlineMover | None) -> None:
        """Let the mover move the deadline that Trio knows; without one, move it with each token."""
        self._mover = mover

    def start(self, turn_timeout_s: float, *, passed_s: float = 0) -> None:
        """The turn begins to run, and may take so many seconds, of which some have passed already."""
        if self._set(self._run, max(turn_timeout_s - passed_s, 0)):
            self._run_s = turn_timeout_s

    def expect_token(self, otherwise: TokenTimeout, *, within_s: float, now: float | None = None) -> None:
        """The model is to send something within so many seconds from now; the turn fails ``otherwise``.

        Args:
            now: The time, if the caller has just read it.
        """
        if now is None:
            now = trio.current_time()
        at = now + within_s
        if (
            self._mover is not None
            and now + EXACT_S < self.armed_at <= self._silence.at <= at
            and otherwise == self._silence_code
        ):
            self._silence.set(at, timeout_s=within_s)  # no deadline has passed, and none comes sooner now
        elif self._set(self._silence, within_s):
            self._silence_code = otherwise
        else:
            return
        self._silence_s = within_s

    def note_client(self) -> None:
        """A client watches the turn: it is not abandoned."""
        self._set(self._abandoned, inf)

    def note_no_client(self, *, returns_within_s: float) -> None:
        """No client watches the turn any more: a client is to come back within so many seconds from now."""
        self._set(self._abandoned, returns_within_s)

    def stop(self) -> None:
        """Stop the turn's work now, for another cause than a deadline."""
        self.armed_at = -inf
        self.scope.cancel()

    def have_stopped(self) -> bool:
        """Whether a deadline has passed, or the turn's work was stopped in another way."""
        if trio.current_time() + EXACT_S >= self.scope.deadline:
            self.catch_up()  # before Trio looks at the clock and the deadline, in `cancel_called`
        if trio.current_time() >= self.scope.deadline:
            check_for_freeze()  # after a freeze this moves the deadline
        return self.scope.cancel_called

    def end(self) -> outcome.Outcome:
        """How the turn ends by the deadline that has stopped its work."""
        if self._first is self._abandoned:
            return outcome.Cancelled("disconnected")
        if self._first is self._run:
            return outcome.failed("turn_timeout", f"The turn took longer than {self._run_s:g} s (turn_timeout_s).")
        code = self._silence_code
        return outcome.failed(code, f"The model server sent nothing for {self._silence_s:g} s ({code}_s).")

    def next_one(self) -> tuple[float, str] | None:
        """The deadline that passes first, as it is now, and its name; None if the turn has none. Changes nothing."""
        silence, run, abandoned = self._silence.at, self._run.at, self._abandoned.at
        at = min(silence, run, abandoned)
        if at == inf:
            return None
        return at, "disconnect_grace" if at == abandoned else "turn_timeout" if at == run else self._silence_code

    def catch_up(self) -> None:
        """Move the scope's deadline to the true one. No effect once the work was stopped."""
        if self.armed_at > -inf:
            self._arm()

    def note_late(self, lateness: Lateness) -> None:
        """Move the deadlines after a delay of the event loop, so that the model's data is read first."""
        if min(self._silence.at, self._run.at, self._abandoned.at) >= lateness.now + THAW_S:
            return  # none moves: with thousands of turns the rest would take so long that the event loop is late again
        before, self.scope.deadline = self.scope.deadline, inf
        # Read with the deadline at inf, because reading it after the deadline cancels the scope.
        if self.scope.cancel_called:
            self.scope.deadline = before
            return
        for deadline in (self._abandoned, self._run, self._silence):
            deadline.note_late(lateness)
        self._arm()

    def _set(self, deadline: Deadline, within_s: float) -> bool:
        """Set a deadline. Returns False, and changes nothing, if a deadline has passed."""
        if self.have_stopped():
            return False
        deadline.set(trio.current_time() + within_s, timeout_s=within_s)
        self._arm()
        return True

    def _arm(self) -> None:
        """Find the first deadline. Deadlines that a freeze has moved to one moment keep their order."""
        first = self._abandoned
        for deadline in (self._run, self._silence):
            if deadline.at < first.at or (deadline.at == first.at and deadline.planned < first.planned):
                first = deadline
        self._first = first
        self.armed_at = self.scope.deadline = first.at
        if self._mover is not None:
            self._mover.note_armed(first.at)


class _AtWork:
    """See :meth:`TurnDeadlines.at_work`. A class, because generators would take more memory in each running turn."""

    __slots__ = ("_calling", "_deadlines", "_lagging")

    def __init__(self, deadlines: TurnDeadlines) -> None:
        self._deadlines = deadlines
        self._calling = calling_when_late(deadlines.note_late)
        self._lagging = lagging(deadlines)

    def __enter__(self) -> trio.CancelScope:
        self._calling.__enter__()
        self._deadlines.begin_to_lag(self._lagging.__enter__())
        return self._deadlines.scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return self._deadlines.scope.__exit__(kind, error, traceback)
        finally:
            self._deadlines.begin_to_lag(None)
            self._lagging.__exit__()
            self._calling.__exit__()
