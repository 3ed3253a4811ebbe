"""All sessions of this process: what callers can ask, and the supervisor of the sessions' tasks.

What is stored is the store's; here is what is live. Whatever decides about a session looks at the
live state and changes it in one synchronous step.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Literal

import msgspec
import structlog
import trio

from service.clock import Clock
from service.errors import (
    EventsLostError,
    InvalidRequestError,
    LastcallError,
    OwnedElsewhereError,
    QueueFullError,
    SessionNotFoundError,
    ShuttingDownError,
    StoreError,
    TurnInProgressError,
    TurnLimitError,
)
from service.ids import new_message_id, new_session_id, new_turn_id
from service.models.client import ModelClient
from service.sessions import ends
from service.sessions.event_log import EventLog
from service.sessions.messages import MessageRecord, Position, page_of_messages, turns_needed
from service.sessions.replay import replay_kept
from service.sessions.session import Deletion, LiveSession
from service.sessions.store_deadline import answered_within
from service.sessions.streams import Forward, Streams, StreamSlot
from service.sessions.turn import OnDisconnect, Turn, Watch, run_turn
from service.settings import Settings
from service.storage.records import Item, Page, SessionPatch, SessionRecord, SessionStatus, TurnRecord
from service.storage.store import Store

logger = structlog.get_logger("lastcall.sessions")

OnConflict = Literal["reject", "queue", "supersede"]
_END_ON_ITS_WAY_S = 0.05
"""What the end of another process's turn may take beyond the time that the process has for it."""
_LEAVE_S = 0.04
"""Until an owner has seen that this process leaves. Together they are less than what the phase has left."""


class NewSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session to be created; what is left out has a default."""

    id: str | None = None
    title: str | None = None
    model: str | None = None
    system_message: str | None = None
    metadata: dict[str, str] = {}
    idle_timeout_s: float | None = None


class NewTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn to be started.

    Without ``parent`` it continues the session's head; None makes it a first turn.
    """

    text: str
    parent: str | None | msgspec.UnsetType = msgspec.UNSET
    model: str | None = None
    temperature: float | None = None
    max_output_tokens: int | None = None
    on_conflict: OnConflict = "reject"
    on_disconnect: OnDisconnect = "cancel"
    background: bool = False


class SessionsStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Ends and streams count since the start."""

    sessions_live: int
    turns_running: int
    turns_queued: int
    turns_completed: int
    turns_failed: int
    turns_cancelled: int
    turns_interrupted: int
    turns_unkept: int
    turns_crashed: int
    streams_open: int
    streams_ended: int
    streams_aborted: int


class Sessions:
    """The sessions of this process. Opened by :func:`open_sessions`.

    Every call that reaches the store raises :class:`~service.errors.StoreError` where the store
    refuses, or does not answer within ``store_timeout_s``.
    """

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        store: Store,
        client_for: Callable[[str], ModelClient],
        clock: Clock,
        settings: Settings,
    ) -> None:
        # The sessions supervisor's own nursery: session tasks and deletions are started in it here,
        # because the moment of acceptance is when a session begins to live.
        self._nursery = nursery
        self._store = store
        self._client_for = client_for
        self._clock = clock
        self._settings = settings
        self._live: dict[str, LiveSession] = {}
        self._open_turns = 0
        self._ends = {"completed": 0, "failed": 0, "cancelled": 0, "interrupted": 0}
        self._unkept: dict[str, Turn] = {}
        self._unremoved: set[str] = set()
        self._refusal: StoreError | None = None
        self._turns_crashed = 0
        self._streams = Streams(streams_max=settings.streams_max)
        self._forwards: set[Forward] = set()
        self._accepting = True
        self._stopping: Literal["no", "queued", "all"] = "no"
        self._changes = trio.lowlevel.ParkingLot()

    # Sessions

    async def create_session(self, new: NewSession) -> SessionRecord:
        """Create a session.

        Raises:
            SessionExistsError: The chosen id is taken.
            ShuttingDownError
        """
        self._check_accepting()
        now = self._clock()
        idle_timeout_s = self._settings.default_idle_timeout_s if new.idle_timeout_s is None else new.idle_timeout_s
        session = SessionRecord(
            id=new.id or new_session_id(),
            created_at=now,
            last_accessed_at=now,
            expires_at=now + timedelta(seconds=idle_timeout_s),
            idle_timeout_s=idle_timeout_s,
            title=new.title,
            model=new.model,
            system_message=new.system_message,
            metadata=new.metadata,
        )
        if session.model is not None:
            self._client_for(session.model)  # an unknown model is refused now, not at the first turn
        with self._writing():
            await self._store.create_session(session, now=now)
        return session

    async def fork_session(
        self, session_id: str, *, at: str | None = None, copy_id: str | None = None
    ) -> SessionRecord:
        """Create a session with a copy of the path from the root to ``at``, or to the head.

        Raises:
            SessionNotFoundError
            TurnNotFoundError: ``at`` is not a turn of this session.
            TurnInProgressError: A turn on that path is open.
            OwnedElsewhereError: It is open, in another process.
            SessionExistsError: The chosen id is taken.
            InvalidRequestError: It is too much to copy.
            ShuttingDownError
        """
        self._check_accepting()
        self._check_not_deleted(session_id)
        try:
            with self._writing():
                return await self._store.fork_session(
                    session_id, at=at, copy_id=copy_id or new_session_id(), now=self._clock()
                )
        except TurnInProgressError as error:
            if error.turn_id in self._unkept:
                raise StoreError(f"The end of turn {error.turn_id!r} could not be kept yet.") from None
            raise

    async def get_session(self, session_id: str) -> SessionRecord:
        """Raises: SessionNotFoundError."""
        self._check_not_deleted(session_id)
        with self._answered_within():
            return await self._store.get_session(session_id, now=self._clock())

    async def list_sessions(
        self, *, limit: int, after: str | None = None, status: SessionStatus | None = None
    ) -> Page[SessionRecord]:
        """A page of sessions, newest first. A cursor that is not ours raises InvalidRequestError."""
        with self._answered_within():
            return await self._store.list_sessions(limit=limit, after=after, status=status, now=self._clock())

    async def count_sessions(self, *, status: SessionStatus | None = None) -> int:
        with self._answered_within():
            return await self._store.count_sessions(status=status, now=self._clock())

    async def update_session(self, session_id: str, patch: SessionPatch) -> SessionRecord:
        """Change a session and move its deadline.

        Raises:
            SessionNotFoundError
            InvalidRequestError: The model is unknown.
        """
        self._check_not_deleted(session_id)
        if isinstance(patch.model, str):
            self._client_for(patch.model)
        with self._writing():
            return await self._store.update_session(session_id, patch, now=self._clock())

    async def delete_session(self, session_id: str) -> None:
        """Delete a session: it is gone for everybody at once, then its turns end, then its rows go.

        Goes on to its end if the caller is cancelled. A second call meanwhile waits for the first.

        Raises:
            SessionNotFoundError
            OwnedElsewhereError: Another process runs turns of this session, and deletes it.
        """
        with self._holding(session_id) as session:
            deletion = session.deletion
            if deletion is None:
                deletion = session.deletion = Deletion()
                self._nursery.start_soon(self._run_deletion, session, deletion, name=f"delete {session_id}")
        await deletion.ended.wait()
        if deletion.error is not None:
            raise deletion.error

    async def list_messages(self, session_id: str, *, limit: int, after: str | None = None) -> Page[MessageRecord]:
        """A page of the messages from the root to the head, oldest first.

        Raises:
            SessionNotFoundError
            InvalidRequestError: ``after`` is not a cursor of this listing, or of another path.
        """
        start = None if after is None else Position.parse(after)
        session = await self.get_session(session_id)
        path: Sequence[TurnRecord] = ()
        if session.head is not None:
            with self._answered_within():
                path = await self._store.list_path(
                    session_id, session.head, limit=turns_needed(limit), first=start.turn_id if start else None
                )
        if start is not None and not path:
            raise InvalidRequestError("after is not on the path to this session's head.", field="after")
        return page_of_messages(path, limit=limit, skip=start.count if start else 0)

    # Turns

    async def start_turn(self, session_id: str, new: NewTurn) -> tuple[Turn, Watch]:
        """Accept a turn: when this returns its input is kept, and it runs or is queued.

        There is no checkpoint between the acceptance and the return, so the watch is never lost.
        Cancellation before the acceptance leaves nothing behind.

        Raises:
            SessionNotFoundError
            OwnedElsewhereError: Another process runs turns of this session.
            TurnNotFoundError: ``parent`` is not a turn of this session.
            TurnInProgressError, QueueFullError: By ``on_conflict``.
            TurnLimitError, ShuttingDownError
            InvalidRequestError: The model is unknown.
        """
        self._check_accepting()
        with self._holding(session_id) as session:
            async with session.acceptance:
                self._check_accepting()
                self._check_conflict(session, new.on_conflict)
                if self._open_turns + len(self._unkept) >= self._settings.live_turns_max:
                    raise TurnLimitError(
                        f"{self._settings.live_turns_max} turns are running already (live_turns_max); try again later."
                    )
                self._open_turns += 1
                try:
                    turn = await self._accept(session, new)
                except BaseException:
                    self._note_turn_gone()
                    raise
                return turn, turn.watch()

    async def get_turn(self, session_id: str, turn_id: str) -> TurnRecord:
        """A turn with its text so far.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            OwnedElsewhereError: It is open in another process, which has its text so far.
        """
        self._check_not_deleted(session_id)
        turn = self._find_turn(session_id, turn_id)
        if turn is not None:
            return turn.record()
        with self._answered_within():
            record = await self._store.get_turn(session_id, turn_id, now=self._clock())
            if record.is_open:
                await self._refuse_if_elsewhere(session_id)
            return record

    async def list_turns(self, session_id: str, *, limit: int, after: str | None = None) -> Page[TurnRecord]:
        """A page of all turns of a session, oldest first.

        Raises:
            SessionNotFoundError
            OwnedElsewhereError: Open ones are among them, and their texts so far are in another process.
        """
        self._check_not_deleted(session_id)
        with self._answered_within():
            page = await self._store.list_turns(session_id, limit=limit, after=after, now=self._clock())
            if any(record.is_open for record in page.data) and session_id not in self._live:
                await self._refuse_if_elsewhere(session_id)
        live = [self._find_turn(session_id, record.id) for record in page.data]
        data = (turn.record() if turn else record for turn, record in zip(live, page.data, strict=True))
        return Page(data=tuple(data), next=page.next)

    async def cancel_turn(self, session_id: str, turn_id: str) -> TurnRecord:
        """End a turn as ``cancelled`` (``requested``) and wait for its end, whatever it is; idempotent.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
        """
        self._check_not_deleted(session_id)
        turn = self._find_turn(session_id, turn_id)
        if turn is None:
            return await self.get_turn(session_id, turn_id)
        turn.cut_short(ends.Cancelled("requested"))
        return await turn.wait_ended()

    async def open_events(self, session_id: str, turn_id: str, *, after: int = 0) -> tuple[EventLog, Watch]:
        """The events of a turn: its live log, or a closed one from the store.

        The watch counts while the turn is open. There is no checkpoint between taking it and the return.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
            EventsLostError: Not all events that follow ``after`` are in the store. (Where a crash took the last
                ones before anybody could keep them, a reader of those that are left goes on to the terminal event.)
        """
        self._check_not_deleted(session_id)
        turn = self._find_turn(session_id, turn_id)
        if turn is not None:
            return turn.log, turn.watch()
        with self._answered_within():
            frames = await self._store.read_events(session_id, turn_id)
            # Asked last, so that a session that went away meanwhile is not found.
            record = await self._store.get_turn(session_id, turn_id, now=self._clock())
            if record.is_open:
                await self._refuse_if_elsewhere(session_id)
        log = replay_kept(record, frames)
        if log is None or len(frames) < after < log.last_seq:
            raise EventsLostError(turn_id, after=len(frames), state=record.state, text=record.text)
        return log, Watch(None)

    def open_stream(self) -> StreamSlot:
        """Take a place for a stream; it is to be closed. Raises: StreamLimitError."""
        return self._streams.open_stream()

    def open_forward(self) -> Forward:
        """Count an answer that is passed on from another process; it is to be closed."""
        forward = Forward(self._note_forward_closed, self._start_leave)
        if self._stopping == "all":
            forward.end_by(self._last_end_by())
        self._forwards.add(forward)
        return forward

    # The shutdown's side

    def stop_accepting(self) -> None:
        """From now on new sessions and turns are refused with ShuttingDownError."""
        self._accepting = False

    def hold_streams(self) -> None:
        """All turns are about to be interrupted: streams write nothing more before their ends. From any thread."""
        self._streams.held = True

    def interrupt_queued(self) -> int:
        """End queued turns as ``interrupted``, and those that would be queued yet; how many there were."""
        if self._stopping == "no":
            self._stopping = "queued"
        return self._interrupt(running=False)

    def interrupt_all(self) -> int:
        """End all open turns as ``interrupted``, and those on their way; how many there were.

        Turns of other processes go on, but not through this one: their streams end with ``cleanup_timeout_s``, in which
        those see their terminal events whose process stops as well.
        """
        self._stopping = "all"
        for forward in self._forwards:
            forward.end_by(self._last_end_by())
        return self._interrupt(running=True)

    async def wait_idle(self) -> None:
        """Return once no turn is open, no end is being stored, no deletion is under way and nothing is passed on."""
        while self._open_turns or self._forwards or any(session.deletion for session in self._live.values()):
            await self._changes.park()

    async def settle(self) -> None:
        """Try once more what the store refused: ends of turns, and the last step of deletions.

        Tries everything; what is still refused stays for the next time. May run twice at once. Where the last write was
        refused it ends with one that says whether the store takes any.

        Raises:
            StoreError: The last refusal, if there was one.
        """
        refusal: StoreError | None = None
        for turn in list(self._unkept.values()):
            try:
                with self._writing():
                    events = turn.log.frames(after=turn.kept_seq)
                    await self._store.end_turn(turn.record(), events=events, now=self._clock(), after=turn.kept_seq)
                self._unkept.pop(turn.id, None)
            except StoreError as error:
                refusal = error
        for session_id in list(self._unremoved):
            try:
                with self._writing():
                    await self._store.remove_deleted(session_id)
                self._unremoved.discard(session_id)
            except StoreError as error:
                refusal = error
        if self._refusal is not None:
            await self._try_to_write()
        if refusal is not None:
            raise refusal

    @property
    def refusal(self) -> StoreError | None:
        """Why the store refused the last write; None where it took it. :meth:`settle` finds out when that is over."""
        return self._refusal

    async def recover(self) -> int:
        """End the turns of processes that have died. Returns how many. Raises: StoreError."""
        with self._answered_within():
            return await self._store.recover(now=self._clock())

    def open_turns(self) -> list[Turn]:
        """The turns that are queued or running."""
        return [turn for session in self._live.values() for turn in session.turns]

    def statistics(self) -> SessionsStatistics:
        running = sum(1 for session in self._live.values() for turn in session.turns if turn.running)
        return SessionsStatistics(
            sessions_live=sum(1 for session in self._live.values() if session.turns),
            turns_running=running,
            turns_queued=self._open_turns - running,
            turns_completed=self._ends["completed"],
            turns_failed=self._ends["failed"],
            turns_cancelled=self._ends["cancelled"],
            turns_interrupted=self._ends["interrupted"],
            turns_unkept=len(self._unkept),
            turns_crashed=self._turns_crashed,
            streams_open=self._streams.open,
            streams_ended=self._streams.ended,
            streams_aborted=self._streams.aborted,
        )

    # Accepting

    def _check_accepting(self) -> None:
        if not self._accepting:
            raise ShuttingDownError

    def _check_not_deleted(self, session_id: str) -> None:
        session = self._live.get(session_id)
        if session_id in self._unremoved or (session is not None and session.deletion is not None):
            raise SessionNotFoundError(session_id)

    async def _refuse_if_elsewhere(self, session_id: str) -> None:
        """Raises: OwnedElsewhereError, where another process runs the session's open turns."""
        owner = await self._store.find_owner(session_id)
        if owner is not None:
            raise OwnedElsewhereError(session_id, fence=owner.fence, address=owner.address)

    def _check_conflict(self, session: LiveSession, on_conflict: OnConflict) -> None:
        if session.deletion is not None:
            raise SessionNotFoundError(session.id)
        if not session.turns:
            return
        if on_conflict == "reject":
            raise TurnInProgressError(session.turns[0].id)
        if on_conflict == "queue" and len(session.turns) > self._settings.queued_turns_max:
            raise QueueFullError(
                f"{self._settings.queued_turns_max} turns are queued in this session already (queued_turns_max)."
            )

    async def _accept(self, session: LiveSession, new: NewTurn) -> Turn:
        """Commit a turn and make it live. The caller holds ``session.acceptance``."""
        now = self._clock()
        with self._answered_within():
            stored = await self._store.get_session(session.id, now=now)
        model = new.model or stored.model or self._settings.model
        client = self._client_for(model)
        record = TurnRecord(
            id=new_turn_id(),
            session_id=session.id,
            parent=stored.head if new.parent is msgspec.UNSET else new.parent,
            state="queued" if session.turns else "running",
            model=model,
            created_at=now,
            input=(Item(id=new_message_id(), role="user", text=new.text),),
            temperature=new.temperature,
            max_output_tokens=new.max_output_tokens,
            background=new.background,
        )
        turn = Turn(
            record,
            client=client,
            system_message=stored.system_message,
            on_disconnect="continue" if new.background else new.on_disconnect,
            settings=self._settings,
        )
        await self._commit_input(turn)
        if new.on_conflict == "supersede":
            for earlier in session.turns:
                earlier.cut_short(ends.Cancelled("superseded"))
        session.add(turn)
        if session.deletion is not None:
            turn.cut_short(ends.Cancelled("session_deleted"))
        if self._stopping == "all" or (self._stopping == "queued" and not turn.running):
            turn.cut_short(ends.Interrupted("shutdown"))
        if not session.has_task:
            session.has_task = True
            self._nursery.start_soon(self._run_session, session, name=f"session {session.id}")
        return turn

    async def _commit_input(self, turn: Turn) -> None:
        # Shielded: a caller that leaves in the middle of the commit would leave a turn without an owner.
        with trio.CancelScope(shield=True):
            try:
                with self._writing():
                    await self._store.begin_turn(turn.record(), now=self._clock())
            except StoreError as error:
                # Whether it is in the store is unknown; if it is, it must not stay open.
                turn.decide(ends.failed(error.code, str(error)))
                self._keep_later(turn)
                raise

    def _keep_later(self, turn: Turn) -> None:
        """Tell an end that is not in the store, and remember it for :meth:`settle`."""
        if not turn.ended.is_set():
            turn.conclude(turn.finish(self._clock()), stored=False)
        self._unkept[turn.id] = turn

    # Running

    async def _run_session(self, session: LiveSession) -> None:
        async def run_one(turn: Turn) -> None:
            await run_turn(
                turn,
                wait_for_others=lambda: session.wait_first(turn),
                default_end=session.default_end,
                store=self._store,
                clock=self._clock,
                settings=self._settings,
            )

        await session.run(run_one, self._note_ended)
        self._forget_without_work(session)

    def _note_ended(self, turn: Turn) -> None:
        if not turn.stored:
            self._refusal = self._refusal or StoreError("The store did not take the end of a turn.")
            self._keep_later(turn)
        self._ends[turn.record().state] += 1
        self._turns_crashed += turn.crashed
        self._note_turn_gone()

    async def _run_deletion(self, session: LiveSession, deletion: Deletion) -> None:
        try:
            async with session.acceptance:
                if session.id not in self._unremoved:
                    with self._writing():
                        await self._store.mark_deleted(session.id, now=self._clock())
                    self._unremoved.add(session.id)
            for turn in session.turns:
                turn.cut_short(ends.Cancelled("session_deleted"))
            await session.wait_without_turns()
            for turn_id in [turn.id for turn in self._unkept.values() if turn.session_id == session.id]:
                del self._unkept[turn_id]  # nobody asks for it any more
            with self._writing():
                await self._store.remove_deleted(session.id)
            self._unremoved.discard(session.id)
            deletion.error = None
        except LastcallError as error:
            deletion.error = error
        except Exception as error:
            logger.exception("deletion crashed", session_id=session.id)
            deletion.error = error
        finally:
            deletion.ended.set()
            session.deletion = None
            self._forget_without_work(session)
            self._changes.unpark_all()

    def _interrupt(self, *, running: bool) -> int:
        return sum(
            turn.cut_short(ends.Interrupted("shutdown"))
            for session in self._live.values()
            for turn in session.turns
            if running or not turn.running
        )

    def _last_end_by(self) -> float:
        """When an owner that stops as well has told its ends, and they have come here."""
        return trio.current_time() + self._settings.cleanup_timeout_s + _END_ON_ITS_WAY_S

    def _start_leave(self, forward: Forward, call: Callable[[], Awaitable[None]]) -> bool:
        try:
            self._nursery.start_soon(self._run_leave, forward, call, name="taking leave of an owner")
        except RuntimeError:  # it is closed: a request that outlives the service
            return False
        return True

    async def _run_leave(self, forward: Forward, call: Callable[[], Awaitable[None]]) -> None:
        with trio.move_on_after(_LEAVE_S):
            await call()
        forward.close()

    def _note_forward_closed(self, forward: Forward) -> None:
        self._forwards.discard(forward)
        self._changes.unpark_all()

    def _note_turn_gone(self) -> None:
        self._open_turns -= 1
        self._changes.unpark_all()

    # What is live

    def _find_turn(self, session_id: str, turn_id: str) -> Turn | None:
        """The turn, if it is open here or its end could not be stored."""
        session = self._live.get(session_id)
        turn = session.find(turn_id) if session is not None else None
        turn = turn or self._unkept.get(turn_id)
        return turn if turn is not None and turn.session_id == session_id else None

    @contextmanager
    def _holding(self, session_id: str) -> Iterator[LiveSession]:
        """The live session, made if need be, and kept while somebody decides about it."""
        session = self._live.setdefault(session_id, LiveSession(session_id))
        session.holders += 1
        try:
            yield session
        finally:
            session.holders -= 1
            self._forget_without_work(session)

    def _forget_without_work(self, session: LiveSession) -> None:
        if not session.has_work and self._live.get(session.id) is session:
            del self._live[session.id]

    def _answered_within(self) -> AbstractContextManager[None]:
        return answered_within(self._settings.store_timeout_s)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """As :meth:`_answered_within`, around one write: its outcome is :attr:`refusal`."""
        try:
            with self._answered_within():
                yield
        except StoreError as error:
            self._refusal = error
            raise
        self._refusal = None

    async def _try_to_write(self) -> None:
        """Write what nobody will ever see: a session that has expired already. Raises: StoreError."""
        now = self._clock()
        unseen = SessionRecord(
            id=new_session_id(), created_at=now, last_accessed_at=now, expires_at=now, idle_timeout_s=1
        )
        with self._writing():
            await self._store.create_session(unseen, now=now)


@asynccontextmanager
async def open_sessions(
    *, store: Store, client_for: Callable[[str], ModelClient], clock: Clock, settings: Settings
) -> AsyncIterator[Sessions]:
    """The sessions supervisor. On exit what still runs is cancelled: its turns end as ``interrupted``.

    A failure of one session never reaches here.
    """
    async with trio.open_nursery() as nursery:
        yield Sessions(nursery=nursery, store=store, client_for=client_for, clock=clock, settings=settings)
        nursery.cancel_scope.cancel()
