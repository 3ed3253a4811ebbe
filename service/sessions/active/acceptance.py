"""The acceptance of a turn: the checks, the commit of its input, and the start of the task that runs it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog
import trio

from service.clock import Clock
from service.errors import (
    BranchLimitError,
    HeadMovedError,
    NothingAskedError,
    QueueFullError,
    SessionExistsError,
    SessionNotFoundError,
    StoreError,
    TurnInProgressError,
    TurnLimitError,
    TurnsSuspendedError,
)
from service.freezes import ScopeDeadline, move_on_after
from service.models.client import ModelClient
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.active.adoptions import Adoptions
from service.sessions.active.drain import Drain
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.active.session import ActiveSession
from service.sessions.active.suspensions import Suspensions
from service.sessions.commands import NewItems, NewSession, NewTurn, OnConflict
from service.sessions.events import outcome
from service.sessions.titles import Titles
from service.sessions.turns.prompt import PathEnd
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_log import turn_log_context
from service.sessions.turns.turn_task import end_turn, run_turn
from service.sessions.turns.turn_trace import TurnTrace
from service.settings import Settings
from service.stop_state import Phase, StopState
from service.storage.records import IdempotencyKey, SessionRecord, TurnRecord
from service.storage.store import Store
from service.storage.store_deadline import answered_in_turn, answered_within
from service.telemetry.log_context import log_context
from service.telemetry.metrics.metrics import Metrics

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

logger = structlog.get_logger("lastcall.acceptance")

T = TypeVar("T")

_PATH_END_BYTES = 16 * 1024
"""How much of a path is read at once for its last input. This is nearly always the input of its last turn."""
MAKE_WAY_MAX_S = 1.0
"""How long a process that stops holds a caller back while the turns of the session end. Then it is asked again."""


class Acceptance:
    """Accepts turns, one after the other in each session.

    A turn *follows* if its parent is the head, because none is named, or an open turn: ``on_conflict`` decides about it
    while any turn of the session is open. A turn *branches* if its named parent has ended, or is None: it runs at once
    beside the open turns, at most ``branches_max`` in all.

    Args:
        nursery: The nursery of the sessions supervisor. Acceptance starts the session tasks in it.
        metrics: Counts the turns.

    Attributes:
        adoptions: The adoption of suspended turns.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        active: ActiveSessions,
        pending_writes: PendingWrites,
        titles: Titles,
        drain: Drain,
        *,
        suspensions: Suspensions,
        stop: StopState,
        store: Store,
        client_for: Callable[[str], ModelClient],
        clock: Clock,
        settings: Settings,
        metrics: Metrics | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._tracing = tracing
        self._nursery = nursery
        self._active = active
        self._pending_writes = pending_writes
        self._titles = titles
        self._drain = drain
        self._store = store
        self._client_for = client_for
        self._clock = clock
        self._settings = settings
        self._suspensions = suspensions
        self._stop = stop
        self.adoptions = Adoptions(
            nursery,
            pending_writes,
            stop=stop,
            make_live=partial(self._make_live, supersedes=False),
            begin_trace=self._trace,
            store=store,
            client_for=client_for,
            clock=clock,
            settings=settings,
            metrics=self._metrics,
        )

    async def accept(self, session_id: str, new: NewTurn, within_s: float) -> Turn:
        """Accept a turn, as :meth:`~service.sessions.sessions.Sessions.start_turn` says.

        No checkpoint comes between the acceptance and the return. Cancellation before the first write leaves nothing
        behind; from the first write on the caller is shielded. All of it takes no longer than ``within_s``. At
        most half of this time is the wait for other callers of the session: a write that begins late would time out,
        with an unknown outcome, though the store may be well.
        """

        def check(session: ActiveSession) -> bool:
            self._drain.check_accepting()
            return self._check_place(session, new)

        async with self._deciding(session_id, check, within_s, adds_open_turn=True) as (session, found, deadline):
            branches = found
            await session.wait_left()
            if session_id in self.adoptions.unresolved:  # the new turn comes after those that no task runs
                await self._adopt(session, deadline)
                branches = self._check_place(session, new)
            while True:
                try:
                    return await self._accept(session, new, deadline, branches=branches)
                except SessionExistsError:  # another caller has just created the session
                    new = msgspec.structs.replace(new, creates_session=False, session_is_new=False)
                except HeadMovedError:
                    pass  # another process has just accepted a turn: follow that turn
                except TurnsSuspendedError:
                    await self._adopt(session, deadline)
                    branches = self._check_place(session, new)
                except TurnInProgressError:  # the parent ended before it started, and a turn above it is open
                    self._check_following(session, new.on_conflict)
                    branches = False

    async def add(self, session_id: str, new: NewItems, within_s: float) -> Sequence[TurnRecord]:
        """Add turns that are complete at once, as :meth:`~service.sessions.sessions.Sessions.add_items` says.

        The waits have the bounds of :meth:`accept`. A cancellation leaves all of the turns behind, or none.
        """

        def check(session: ActiveSession) -> None:
            self._drain.check_accepting()
            _check_adding(session, new)

        begun = trio.Event()
        try:
            async with self._deciding(session_id, check, within_s) as (_, _, deadline):
                while True:
                    try:
                        return await self._add(session_id, new, deadline, begun)
                    except HeadMovedError:
                        pass  # another process has just accepted a turn: follow that turn
        except StoreError as error:
            error.outcome_is_unknown = begun.is_set()
            raise

    async def _add(
        self, session_id: str, new: NewItems, deadline: ScopeDeadline, begun: trio.Event
    ) -> Sequence[TurnRecord]:
        now = self._clock()
        stored = await self._store.get_session(session_id, now=now)
        turns = new.records(stored, now=now, settings=self._settings)
        head = stored.head if new.parent is msgspec.UNSET else msgspec.UNSET
        await _refuse_if_late(deadline)
        begun.set()
        with self._pending_writes.writing(within_s=deadline.left_s):
            await self._store.add_turns(turns, now=now, head=head, key=new.key)
        return turns

    async def delete(self, session_id: str, write: Callable[[], Awaitable[None]]) -> None:
        """Delete a part of a conversation, between acceptances. The waits have the bounds of :meth:`accept`.

        Args:
            write: The call of the store. The deletion is whole or not done, also after a cancellation. In a long
                session it takes long; that says nothing of the store.
        """
        async with self._deciding(session_id, _check_not_deleted, self._settings.store_timeout_s) as (_, _, deadline):
            await _refuse_if_late(deadline)
            with self._pending_writes.writing(within_s=deadline.left_s, late_is_refused=False):
                await write()

    @asynccontextmanager
    async def _deciding(
        self, session_id: str, check: Callable[[ActiveSession], T], within_s: float, *, adds_open_turn: bool = False
    ) -> AsyncIterator[tuple[ActiveSession, T, ScopeDeadline]]:
        """Hold a session for a change of its tree, after other callers; at most half of the time is the wait for them.

        The ends of earlier turns are in the store then: a prompt contains them, and the store takes these turns for
        open until then.

        Args:
            check: Refuses the change: before the wait, and again after it. Its second result is a part of the value.
            adds_open_turn: Whether ``live_turns_max`` is checked, too.
        """
        with self._active.holding(session_id) as session:
            check(session)
            if adds_open_turn:
                self._check_turn_limit()
            with self._active.arriving(), answered_within(within_s) as deadline:
                async with answered_in_turn(session.acceptance, within_s / 2):
                    checked = check(session)
                    await self._pending_writes.retry_ends_of(session_id)
                    yield session, checked, deadline

    async def adopt(self, session_id: str, *, has_no_client: bool = False) -> None:
        """Take over the suspended turns of a session, if it has any, and run them. The waits are as in :meth:`accept`.

        Args:
            has_no_client: Whether turns that are cancelled without clients end at once.

        Cancellation leaves no turn behind that no process runs. Turns that the store may have given to this process in
        a call without an answer are run after the next call, also where ``live_turns_max`` is reached: they had their
        place before, and no other process can run them.

        Raises:
            SessionNotFoundError: It is being deleted.
            OwnedElsewhereError: Another process runs the session's turns.
            TurnLimitError, ShuttingDownError
        """

        def check(session: ActiveSession) -> None:
            self._drain.check_accepting()
            _check_not_deleted(session)

        within_s, is_new = self._settings.store_timeout_s, session_id not in self.adoptions.unresolved
        async with self._deciding(session_id, check, within_s, adds_open_turn=is_new) as (session, _, deadline):
            await self._adopt(session, deadline, has_no_client=has_no_client)

    async def _adopt(self, session: ActiveSession, deadline: ScopeDeadline, *, has_no_client: bool = False) -> None:
        """Adopt the turns of a session whose acceptance the caller holds."""
        await _refuse_if_late(deadline)
        await self.adoptions.adopt(session, within_s=deadline.left_s, has_no_client=has_no_client)

    def _trace(self, turn: Turn, record: TurnRecord) -> None:
        """Begin the turn's span where traces are on: a child of the current request's, or of the first process's."""
        if self._tracing is not None:
            upstream, began_at = turn.client.name, turn.accepted_at
            turn.take_trace(
                TurnTrace(self._tracing, record, upstream=upstream, request_id=turn.request_id, began_at=began_at)
            )

    async def make_way(self, session_id: str, new: NewTurn) -> None:
        """Let the session's turns end, as :meth:`~service.sessions.sessions.Sessions.make_way` says."""
        with self._active.holding(session_id) as session:
            branches = self._check_place(session, new, others=session.holders - 1)
            self._check_turn_limit()
            if new.on_conflict == "supersede" and not branches:
                for turn in session.turns:
                    turn.cut_short(outcome.Cancelled("superseded"))
            with self._active.arriving(), move_on_after(min(MAKE_WAY_MAX_S, self._settings.store_timeout_s)):
                await session.wait_without_turns()
            # Until their ends are stored, the session is this process's, and no other process may accept a turn.
            with answered_within(self._settings.store_timeout_s):  # for all of them: a process waits for the answer
                await self._pending_writes.retry_ends_of(session_id)

    def _check_place(self, session: ActiveSession, new: NewTurn, *, others: int = 0) -> bool:
        """Check that a session takes one more turn. Returns whether the turn branches.

        Args:
            others: How many callers wait with turns that are not among the session's turns yet.

        Raises:
            SessionNotFoundError: The session is being deleted.
            BranchLimitError: The turn branches, and too many turns run.
            TurnInProgressError, QueueFullError: The turn follows, by ``on_conflict``.
        """
        _check_not_deleted(session)
        if new.parent is msgspec.UNSET or session.find(new.parent) is not None:
            self._check_following(session, new.on_conflict, others=others)
            return False
        branches_max = self._settings.branches_max
        if session.turns_running + others >= branches_max:
            raise BranchLimitError(f"{branches_max} turns run in this session already (branches_max); try again later.")
        return True

    def _check_following(self, session: ActiveSession, on_conflict: OnConflict, *, others: int = 0) -> None:
        queued_turns_max = self._settings.queued_turns_max
        if not session.turns:
            return
        if on_conflict == "reject":
            raise TurnInProgressError(session.turns[0].id)
        if on_conflict == "queue" and session.turns_waiting + others >= queued_turns_max:
            raise QueueFullError(f"{queued_turns_max} turns are queued in this session already (queued_turns_max).")

    def _check_turn_limit(self) -> None:
        turns_max = self._settings.live_turns_max
        if self._active.turns_open + self._pending_writes.turns + self.adoptions.places >= turns_max:
            raise TurnLimitError(f"{turns_max} turns are running already (live_turns_max); try again later.")

    async def _accept(self, session: ActiveSession, new: NewTurn, deadline: ScopeDeadline, *, branches: bool) -> Turn:
        now = self._clock()
        stored, is_new = await self._find_session(session.id, new, now)
        queued = bool(session.turns) and not branches
        record = new.record(stored, queued=queued, now=now, settings=self._settings)
        turn = Turn(
            record,
            client=self._client_for(record.model),
            system_message=record.system_message or stored.system_message,
            on_disconnect=new.without_clients,
            settings=self._settings,
            may_title=new.may_title,
            may_leave_out=new.may_leave_out,
            request_id=new.request_id,
            metrics=self._metrics,
        )
        self._trace(turn, record)
        if new.answers_path:
            await self._check_answers_path(record)
        await _refuse_if_late(deadline)
        await self._commit_input(
            turn,
            head=stored.head if new.parent is msgspec.UNSET else msgspec.UNSET,
            creates=stored if is_new else None,
            branches=branches,
            key=new.key,
            within_s=deadline.left_s,
        )
        self._make_live(session, turn, supersedes=new.on_conflict == "supersede" and not branches)
        return turn

    async def _check_answers_path(self, turn: TurnRecord) -> None:
        """Check that the path to a turn without an input ends with something to answer. Raises: NothingAskedError."""
        end, above = PathEnd(), turn.parent
        while above is not None:
            path = await self._store.read_path(turn.session_id, above, bytes_max=_PATH_END_BYTES)
            if not path:
                return  # the parent is not there: the store says so
            for earlier in reversed(path):
                decided = end.decide(earlier)
                if decided is not None:
                    if decided:
                        return
                    raise NothingAskedError
            above = path[0].parent
        raise NothingAskedError

    async def _find_session(self, session_id: str, new: NewTurn, now: datetime) -> tuple[SessionRecord, bool]:
        """The session, and whether it must still be created."""
        if not new.session_is_new:
            try:
                return await self._store.get_session(session_id, now=now), False
            except SessionNotFoundError:
                if not new.creates_session:
                    raise
        session = NewSession(id=session_id).record(now=now, settings=self._settings)
        return msgspec.structs.replace(session, ephemeral=new.ephemeral), True

    async def _commit_input(
        self,
        turn: Turn,
        *,
        head: str | None | msgspec.UnsetType,
        creates: SessionRecord | None,
        branches: bool,
        key: IdempotencyKey | None,
        within_s: float,
    ) -> None:
        """Commit the input, and the session if it is new, in one step.

        A turn that starts at once gets its path by the same step. Shielded: a cancellation within the commit would
        leave a turn that no task runs.
        """
        path_bytes_max = self._settings.prompt_bytes_max_of(turn.model) if turn.running else msgspec.UNSET
        try:
            with self._pending_writes.writing(within_s=within_s, shield=True):
                begun = await self._store.begin_turn(
                    turn.record(),
                    now=self._clock(),
                    head=head,
                    creates=creates,
                    path_bytes_max=path_bytes_max,
                    branches=branches,
                    key=key,
                )
        except StoreError as error:
            # The store may have the turn or not. If the store has it, the turn must not stay open.
            error.outcome_is_unknown = True
            turn.decide(outcome.failed(error.code, str(error)))
            self._pending_writes.add_end(turn)
            raise
        turn.path = begun.path
        turn.siblings = begun.siblings

    def _make_live(self, session: ActiveSession, turn: Turn, *, supersedes: bool) -> None:
        if supersedes:
            for earlier in session.turns:
                earlier.cut_short(outcome.Cancelled("superseded"))
        self._active.add(session, turn)
        if session.is_deleted:
            turn.cut_short(outcome.Cancelled("session_deleted"))
        self._drain.interrupt_late(turn)
        if not session.has_task:
            session.has_task = True
            self._nursery.start_soon(self._run_session, session, name=f"session {session.id}")

    async def _run_session(self, session: ActiveSession) -> None:
        """The session's task: runs until the session has no turns. A failure ends the turns of this session only."""

        async def run_one(turn: Turn) -> None:
            with turn_log_context(turn), nullcontext() if turn.trace is None else turn.trace.current():
                await run_turn(
                    turn,
                    wait_to_start=lambda: session.wait_to_start(turn),
                    may_leave=lambda: session.may_leave(turn),
                    default_end=session.default_end,
                    suspend=self._suspensions.suspend,
                    store=self._store,
                    stop=self._stop,
                    clock=self._clock,
                    settings=self._settings,
                )

        with log_context(session_id=session.id):  # and not the request that had the task started
            await session.run(run_one, self._note_ended)
        self._active.forget_without_work(session)

    async def end_hung(self, *, within_s: float) -> None:
        """End the turns whose tasks hang, because a model client does not return from its close.

        These ends are stored and published like all ends. An end that the store does not take is left for the next
        start.
        """

        async def end(session: ActiveSession, turn: Turn) -> None:
            turn.decide(session.default_end(turn))
            ended = await end_turn(
                turn,
                suspend=self._suspensions.suspend,
                store=self._store,
                stop=self._stop,
                clock=self._clock,
                within_s=within_s,
            )
            if ended and session.remove(turn):
                self._note_ended(turn)

        async with trio.open_nursery() as nursery:
            for session, turn in self._active.open_turns_by_session():
                nursery.start_soon(end, session, turn)

    def _note_ended(self, turn: Turn) -> None:
        if isinstance(turn.end, outcome.Suspended):
            self._suspensions.leave_unkept(turn)  # has an effect only if the turn's task has not come so far
            if turn.is_unreleased and self._stop.phase < Phase.INTERRUPTING:
                self._suspensions.not_kept -= 1
                self.adoptions.note_unresolved(turn.session_id)  # no process but this one may go on with it
        elif not (turn.stored or turn.is_lost):
            self._pending_writes.add_end(turn)
        self._active.note_ended(turn)
        if not turn.is_suspended:
            self._titles.note_ended(turn)


async def _refuse_if_late(deadline: ScopeDeadline) -> None:
    """Raise once the time is over, because the outcome of a write that begins then would be unknown."""
    if not deadline.left_s:
        await trio.lowlevel.checkpoint()


def _check_not_deleted(session: ActiveSession) -> None:
    """Raises: SessionNotFoundError: The session is being deleted."""
    if session.is_deleted:
        raise SessionNotFoundError(session.id)


def _check_adding(session: ActiveSession, new: NewItems) -> None:
    """Check that a session takes added turns. Raises: SessionNotFoundError, TurnInProgressError."""
    _check_not_deleted(session)
    if new.parent is msgspec.UNSET and session.turns:
        raise TurnInProgressError(session.turns[0].id, instead="name an ended turn as the parent")
