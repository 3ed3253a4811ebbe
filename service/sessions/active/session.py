"""A session with work: its open turns, in the order in which they run.

:meth:`ActiveSession.run` is the session's task, a child of the sessions supervisor. The turns run in this task or are
its children: turns that follow each other one after the other, branches of the conversation at once. The task lives
while turns are queued or running. A failure in it ends the turns of this session only.
"""

from collections.abc import Awaitable, Callable, Collection

import structlog
import trio

from service.errors import ShuttingDownError
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn

logger = structlog.get_logger("lastcall.session")


class ActiveSession:
    """The state of a session in memory, while the session has work or a caller decides about it.

    Attributes:
        turns: Open turns, in the order of their acceptance. A queued turn starts when it is the first one.
        acceptance: A lock, held from the check of ``turns`` until a new turn is among them.
        holders: How many callers are deciding about the session; the session stays active meanwhile.
        deletion: The deletion of the session while it is under way.
    """

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        self.turns: list[Turn] = []
        self.acceptance = trio.Lock()
        self.holders = 0
        self.deletion: Deletion | None = None
        self.has_task = False
        self._crashed = False
        self._unstarted: list[Turn] = []
        self._start: Callable[[Turn], None] | None = None
        self._changes = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        state = "being deleted" if self.deletion is not None else f"{len(self.turns)} open turns"
        return f"<ActiveSession {self.id}: {state}>"

    @property
    def is_deleted(self) -> bool:
        """Whether its deletion is under way and certain: callers do not find it, even if the store still has it."""
        return self.deletion is not None and self.deletion.is_certain

    @property
    def has_work(self) -> bool:
        return bool(self.turns or self.holders or self.deletion)

    def default_end(self, turn: Turn) -> outcome.Outcome | outcome.Suspended:
        """The end of a turn whose task is cancelled from above: by a crash of the session, or by the service."""
        if self._crashed:
            return outcome.internal_error()
        return turn.end_of_stop()

    def add(self, turn: Turn) -> None:
        """Add an accepted turn, and start it if the session's task runs; otherwise the task starts it."""
        self.turns.append(turn)
        if self._start is not None:
            self._start(turn)
        else:
            self._unstarted.append(turn)

    def find(self, turn_id: str | None) -> Turn | None:
        return next((turn for turn in self.turns if turn.id == turn_id), None)

    @property
    def turns_running(self) -> int:
        return sum(turn.running for turn in self.turns)

    @property
    def turns_waiting(self) -> int:
        """How many turns are queued behind another one; the first one is about to start if it is queued."""
        return sum(not turn.running for turn in self.turns[1:])

    async def wait_to_start(self, turn: Turn) -> None:
        """Return when a turn may start: at once if it was accepted as running, else when no earlier turn is open."""
        while not turn.running and self.turns[0] is not turn:
            await self._changes.park()

    def may_leave(self, turn: Turn) -> bool:
        """Whether a turn may leave the session for a while without its end: none waits for it, or is about to."""
        return self.turns == [turn] and not self.holders

    async def wait_left(self) -> None:
        """Return when no turn is about to leave the session without its end. No later turn may be accepted before."""
        while any(isinstance(turn.end, outcome.Suspended) for turn in self.turns):
            await self._changes.park()

    async def wait_without_turns(self) -> None:
        while self.turns:
            await self._changes.park()

    async def run(self, run_one: Callable[[Turn], Awaitable[None]], note_ended: Callable[[Turn], None]) -> None:
        """The session's task: run its turns as they are accepted, and return when none is open.

        The first turn runs in this task itself, which saves a task for most sessions; the others are child tasks. A
        failure in this task is logged and ends this session's turns; cancellation ends these turns as well.

        Args:
            run_one: Runs one turn to its end.
            note_ended: Called once for each turn that has left :attr:`turns`. Publishes the end of a turn that lost its
                task before the turn could do so.
        """

        async def run_turn(turn: Turn) -> None:
            try:
                await run_one(turn)
                if self.remove(turn):
                    note_ended(turn)
            except Exception:
                self._crashed = True
                raise

        finished = False
        try:
            async with trio.open_nursery() as nursery:
                try:
                    self._start = lambda turn: nursery.start_soon(run_turn, turn, name=f"turn {turn.id}")
                    first, *others = self._take_unstarted()
                    for turn in others:
                        self._start(turn)
                    await run_turn(first)
                    await self.wait_without_turns()
                    # No checkpoint since the check: a turn accepted from here on gets a new task.
                    self.has_task = False
                    finished = True
                finally:
                    self._start = None  # the nursery may be closed from here on
        except* Exception:
            logger.exception("session crashed", session_id=self.id)
        finally:
            if not finished:
                self.has_task = False
                self._unstarted.clear()
                for turn in self.turns.copy():
                    turn.crashed = self._crashed
                    turn.decide(self.default_end(turn))
                    self.remove(turn)
                    note_ended(turn)
                self._crashed = False

    def _take_unstarted(self) -> list[Turn]:
        turns, self._unstarted = self._unstarted, []
        return turns

    def remove(self, turn: Turn) -> bool:
        """Remove an ended turn. False if the turn was removed already, because its task was too late."""
        if turn not in self.turns:
            return False
        self.turns.remove(turn)
        self._changes.unpark_all()
        return True


class Deletion:
    """A deletion under way; all callers that delete the session wait for it.

    Attributes:
        revisions: The revisions of the session for which it was asked; None stands for all.
        is_certain: Whether the session is gone for its callers. A deletion that was asked for some revisions becomes
            certain when the store has checked the session's revision.
    """

    def __init__(self, revisions: Collection[str] | None = None) -> None:
        self.revisions = revisions
        self.is_certain = revisions is None
        self.ended = trio.Event()
        self.error: Exception | None = ShuttingDownError()  # until it has succeeded
