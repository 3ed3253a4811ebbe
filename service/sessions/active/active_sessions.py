"""The active sessions: sessions that have work, their open turns, and counts of ended turns since the start.

All methods except :meth:`ActiveSessions.wait_idle` are synchronous: a caller reads the state and changes it in one
step, without a checkpoint in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from service.sessions.active.session import ActiveSession
from service.sessions.turns.turn import Turn
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics


class ActiveSessions:
    """The active sessions of this process, by id.

    Attributes:
        ends: How many turns have ended, by their last state.
        turns_suspended: How many turns have left this process without an end: they go on elsewhere.
        turns_lost: How many turns were left because another process has taken them over.
        turns_crashed: How many turns a fault of this service has ended.
        turns_arriving: How many turns are being accepted, those among them whose callers wait for other callers.
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self.ends = {"completed": 0, "failed": 0, "cancelled": 0, "interrupted": 0}
        self.turns_suspended = 0
        self.turns_lost = 0
        self.turns_crashed = 0
        self._sessions: dict[str, ActiveSession] = {}
        self.turns_arriving = 0
        self._turns_open = 0
        self._changes = trio.lowlevel.ParkingLot()

    # Sessions

    def find(self, session_id: str) -> ActiveSession | None:
        """The session, if it is active."""
        return self._sessions.get(session_id)

    @contextmanager
    def holding(self, session_id: str) -> Iterator[ActiveSession]:
        """The active session, made if necessary, and kept active while the caller decides about it."""
        session = self._sessions.setdefault(session_id, ActiveSession(session_id))
        session.holders += 1
        try:
            yield session
        finally:
            session.holders -= 1
            self.forget_without_work(session)

    def forget_without_work(self, session: ActiveSession) -> None:
        """Remove a session if it has no work any more. Called when some work ended. May end :meth:`wait_idle`."""
        if not session.has_work and self._sessions.get(session.id) is session:
            del self._sessions[session.id]
        self._changes.unpark_all()

    @property
    def sessions_with_turns(self) -> int:
        """How many sessions have an open turn."""
        return sum(1 for session in self._sessions.values() if session.turns)

    # Turns

    @property
    def turns_open(self) -> int:
        """How many turns run, are queued or are being accepted."""
        return self._turns_open + self.turns_arriving

    def open_turns(self) -> list[Turn]:
        """The turns that run or are queued."""
        return [turn for _, turn in self.open_turns_by_session()]

    def each_open_turn(self) -> Iterator[Turn]:
        """The same turns, one by one: for a caller that lets other tasks run meanwhile. Some may have ended by then."""
        for session in tuple(self._sessions.values()):
            yield from session.turns.copy()

    def open_turns_by_session(self) -> list[tuple[ActiveSession, Turn]]:
        """The turns that run or are queued, each with its session."""
        return [(session, turn) for session in self._sessions.values() for turn in session.turns]

    def turns_of(self, session_id: str) -> list[Turn]:
        """The open turns of a session, in the order of their acceptance."""
        session = self._sessions.get(session_id)
        return [] if session is None else session.turns.copy()

    def has_turns(self, session_id: str) -> bool:
        """Whether a session has an open turn."""
        session = self._sessions.get(session_id)
        return session is not None and bool(session.turns)

    def open_turns_of(self, session_id: str) -> list[Turn]:
        """The open turns of a session."""
        session = self._sessions.get(session_id)
        return list(session.turns) if session is not None else []

    def find_turn(self, session_id: str, turn_id: str) -> Turn | None:
        """The turn, if it is open."""
        session = self._sessions.get(session_id)
        return session.find(turn_id) if session is not None else None

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Count a turn as open while it is being accepted, whether the acceptance succeeds or not."""
        self.turns_arriving += 1
        try:
            yield
        finally:
            self.turns_arriving -= 1
            self._changes.unpark_all()

    def add(self, session: ActiveSession, turn: Turn) -> None:
        """Add an accepted turn. The caller holds the session and the session's acceptance lock."""
        session.add(turn)
        self._turns_open += 1
        turn.note_accepted()
        self._metrics.add(families.TURNS_ACCEPTED, "adopted" if turn.was_adopted else "new")

    def note_ended(self, turn: Turn) -> None:
        """Count a turn that has left its session."""
        if turn.is_suspended and turn.is_lost:
            self.turns_lost += 1
        elif turn.untold is not None:
            self.ends[turn.untold.state] += 1
        elif turn.is_suspended:
            self.turns_suspended += 1
        else:
            self.ends[turn.state] += 1
        self.turns_crashed += turn.crashed
        if not turn.ended.is_set():
            self._metrics.add(families.TURNS_UNTOLD)
        self._turns_open -= 1
        self._changes.unpark_all()

    # All of it

    @property
    def is_idle(self) -> bool:
        """Whether no turn is open, no end is being stored and no deletion is under way."""
        return not self.turns_open and not any(session.deletion for session in self._sessions.values())

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`. Returns without a checkpoint if that is true already."""
        while not self.is_idle:
            await self._changes.park()
