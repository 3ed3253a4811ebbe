"""The calls about sessions and turns of this process. Each part of the work is in a module of its own.

::

    Sessions            the calls about sessions and turns
    ├── active          the sessions with work           active/active_sessions.py, active/session.py
    ├── keyed_calls     calls that may be repeated       active/keyed_calls.py
    ├── acceptance      a turn's acceptance              active/acceptance.py, commands.py, turns/turn_task.py
    ├── deletions       a session's deletion             active/deletion.py
    ├── pending_writes  writes that the store refused    active/pending_writes.py
    ├── titles          titles that a model writes       titles.py
    ├── replays         the logs of ended turns          events/replay.py
    ├── streams         open event streams               events/streams.py
    ├── suspensions     turns that go on elsewhere       active/suspensions.py
    └── drain           no more work, then no more turns active/drain.py
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog
import trio

from service.clock import Clock
from service.cluster.peer_transport import PeerTransport
from service.cluster.proxied_requests import ProxiedRequests
from service.errors import (
    InvalidRequestError,
    ItemNotFoundError,
    OwnedElsewhereError,
    RepeatedError,
    ResumeConflictError,
    SessionNotFoundError,
    ShuttingDownError,
    StoreError,
    TurnEndingError,
    TurnInProgressError,
    TurnLimitError,
    TurnMovedError,
    TurnNotFoundError,
    TurnsSuspendedError,
)
from service.freezes import ScopeDeadline, move_on_after
from service.ids import new_session_id, owner_of, scoped
from service.models.client import ModelClient
from service.sessions.active.acceptance import Acceptance
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.active.deletion import Deletions
from service.sessions.active.drain import Drain
from service.sessions.active.keyed_calls import KeyedCalls, gone_if_not_found
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.active.suspensions import Suspensions
from service.sessions.active.sweep import Sweep
from service.sessions.commands import ADDED_ITEMS_MAX, NewItems, NewSession, NewTurn, is_same_input
from service.sessions.events import outcome
from service.sessions.events.event_log import Events
from service.sessions.events.replay import Replays
from service.sessions.events.streams import Streams
from service.sessions.items import ItemsPage, PlacedItem, items_down, items_up
from service.sessions.messages import MessageRecord, Position, page_of_messages, turns_needed
from service.sessions.statistics import SessionsStatistics, TurnsMeasured
from service.sessions.titles import Titles
from service.sessions.tree_notes import note_streams, note_turns
from service.sessions.turns.turn import CLIENT_RETURNS_S, Turn, Watch
from service.sessions.turns.turn_metrics import count_recovered
from service.settings import Settings
from service.steps import Steps
from service.stop_state import Phase, StopState
from service.storage.records import (
    IdempotencyKey,
    Item,
    Match,
    Page,
    Places,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    TreeNode,
    TurnRecord,
)
from service.storage.rules import INSTEAD_OF_DELETING, awaits_client, has_settings, revision_of, with_added
from service.storage.store import Store
from service.storage.store_deadline import answered_in_turn, answered_within
from service.telemetry.log_context import add_to_log_context
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.tree_nodes import Node, Notes

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

logger = structlog.get_logger("lastcall.sessions")

T = TypeVar("T")

_ADOPTIONS_MAX = 3
"""How often a call looks for a suspended turn. Another process, or another call here, may adopt it meanwhile."""
_ADOPTED_AT_ONCE = 100
"""The turns of so many sessions are adopted side by side, where no client asks for them."""
_MEASURED_A_STEP = 100
_NEW_SUSPENDED_MAX = 1000
"""How many sessions with suspended turns one run of the recovery finds beside those that it knows."""
ADOPTION_PAUSE_S = 60.0
"""How long the recovery leaves a session alone whose adoption failed by a fault of this service."""
PLACES_MAX_S = 1.0
"""How long an answer waits for the places of its turns, which the store knows."""
FORKS_WAITING_MAX = 100
"""Bound on callers that wait for other forks; beyond it a fork is refused at once."""


class Sessions:
    """The sessions of this process. Opened by :func:`open_sessions`.

    Every call that reaches the store raises :class:`~service.errors.StoreError` if the store
    refuses, or does not answer within ``store_timeout_s``.

    Attributes:
        pending_writes: Writes that the store refused, and whether the store takes writes now.
        deletions: Deletions under way, and deletions whose outcome is unknown.
        streams: Open event streams.
        drain: The calls for the shutdown.
        suspensions: Turns that are left to another process.
    """

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        store: Store,
        client_for: Callable[[str], ModelClient],
        clock: Clock,
        settings: Settings,
        stop: StopState,
        transport: PeerTransport,
        metrics: Metrics,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._nursery = nursery
        self._metrics = metrics
        self._store = store
        self._client_for = client_for
        self._clock = clock
        self._settings = settings
        self._active = ActiveSessions(metrics)
        self.pending_writes = PendingWrites(store, clock=clock, store_timeout_s=settings.store_timeout_s)
        self.streams = Streams(
            streams_max=settings.streams_max,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            stop=stop,
            metrics=metrics,
        )
        self.proxied_requests = ProxiedRequests(
            nursery,
            cleanup_timeout_s=settings.cleanup_timeout_s,
            secret=lambda: store.peer_secret,
            stop=stop,
            transport=transport,
        )
        self.drain = Drain(self._active, self.proxied_requests, stop)
        self.suspensions = Suspensions(store, clock=clock)
        self._stop = stop
        self._replays = Replays(store, store_timeout_s=settings.store_timeout_s)
        self._sweep = Sweep()
        self._forking = trio.Lock()
        self._keyed_calls = KeyedCalls(store, clock=clock, store_timeout_s=settings.store_timeout_s)
        self._titles = Titles(
            nursery, store=store, client_for=client_for, clock=clock, settings=settings, stop=stop, metrics=metrics
        )
        self.deletions = Deletions(
            nursery,
            self._active,
            self.pending_writes,
            self._titles,
            store=store,
            clock=clock,
            store_timeout_s=settings.store_timeout_s,
        )
        self._acceptance = Acceptance(
            nursery,
            self._active,
            self.pending_writes,
            self._titles,
            self.drain,
            suspensions=self.suspensions,
            stop=stop,
            store=store,
            client_for=client_for,
            clock=clock,
            settings=settings,
            metrics=metrics,
            tracing=tracing,
        )

    # Sessions

    async def create_session(
        self, new: NewSession, *, beginning: NewItems | None = None, key: IdempotencyKey | None = None
    ) -> SessionRecord:
        """Create a session; with a key that an earlier call had, return the session which that call has created.

        Args:
            beginning: Items that the session has from its beginning on: all of them, or there is no session.

        Raises:
            KeyReusedError, MadeIsGoneError
            SessionExistsError: The chosen id is taken.
            InvalidRequestError: The model is unknown.
            SessionLimitError, ShuttingDownError
        """
        try:
            return await self._keyed_calls.once(key, partial(self._create_session, new, beginning, key))
        except RepeatedError as error:
            return await self._session_made_before(error)

    async def _create_session(
        self, new: NewSession, beginning: NewItems | None, key: IdempotencyKey | None, within_s: float
    ) -> SessionRecord:
        self.drain.check_accepting()
        now = self._clock()
        session = new.record(now=now, settings=self._settings)
        if session.model is not None:
            self._client_for(session.model)  # an unknown model is refused now, not at the first turn
        turns: Sequence[TurnRecord] = ()
        if beginning is not None:
            turns = beginning.records(session, now=now, settings=self._settings)
            session = with_added(session, turns, now)
        has_all = within_s >= self._settings.store_timeout_s
        with self.pending_writes.writing(within_s=within_s, late_is_refused=has_all):
            await self._store.create_session(session, now=now, key=key, added=turns)
        return session

    async def fork_session(
        self,
        session_id: str,
        *,
        at: str | None = None,
        copy_id: str | None = None,
        for_peer: bool = False,
        key: IdempotencyKey | None = None,
    ) -> SessionRecord:
        """Create a session of the same owner with a copy of the path from the root to ``at``, or to the head.

        The answer comes within ``store_timeout_s``; at most half of it is the wait for other forks. With a key that an
        earlier call had, the copy is the one which that call has made.

        Args:
            copy_id: The new session's public id.
            for_peer: Another process asks because this one has open turns of the session; it is answered also in a
                drain, in which other processes serve.

        Raises:
            KeyReusedError, MadeIsGoneError
            SessionNotFoundError
            TurnNotFoundError: ``at`` is not a turn of this session.
            TurnInProgressError: A turn on that path is open.
            OwnedElsewhereError: A turn on that path is open in another process.
            SessionExistsError: The chosen id is taken.
            InvalidRequestError: The path is too large to copy.
            SessionLimitError, ShuttingDownError
        """
        fork = partial(self._fork_session, session_id, at=at, copy_id=copy_id, for_peer=for_peer, key=key)
        try:
            return await self._keyed_calls.once(key, fork)
        except RepeatedError as error:
            return await self._session_made_before(error)

    async def _fork_session(
        self,
        session_id: str,
        within_s: float,
        *,
        at: str | None,
        copy_id: str | None,
        for_peer: bool,
        key: IdempotencyKey | None,
    ) -> SessionRecord:
        if not (for_peer and self._active.has_turns(session_id)):
            self.drain.check_accepting()
        self._check_not_deleted(session_id)
        if self._forking.statistics().tasks_waiting >= FORKS_WAITING_MAX:
            raise StoreError(f"{FORKS_WAITING_MAX} other forks wait already; try again later.")
        asked_at = trio.current_time()
        waits = self._forking.locked() or within_s < self._settings.store_timeout_s
        try:
            # One fork at a time, because forks are large. The wait for other forks is not a fault of the store.
            async with answered_in_turn(self._forking, within_s / 2):
                # A freeze makes the wait longer. The fork itself has half of the time in any case.
                left_s = max(asked_at + within_s - trio.current_time(), within_s / 2)
                with self.pending_writes.writing(within_s=left_s, late_is_refused=not waits):
                    return await self._store.fork_session(
                        session_id,
                        at=at,
                        copy_id=scoped(owner_of(session_id), copy_id or new_session_id()),
                        now=self._clock(),
                        key=key,
                    )
        except TurnInProgressError as error:
            if self.pending_writes.has_end_of(error.turn_id):
                raise StoreError(f"The end of turn {error.turn_id!r} could not be stored yet.") from None
            raise

    async def get_session(self, session_id: str) -> SessionRecord:
        """Raises: SessionNotFoundError."""
        self._check_not_deleted(session_id)
        with self._answered_within():
            return await self._store.get_session(session_id, now=self._clock())

    async def list_sessions(
        self,
        *,
        limit: int,
        after: str | None = None,
        status: SessionStatus | None = None,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        bytes_max: int | None = None,
    ) -> Page[SessionRecord]:
        """A page of sessions, newest first. A page cursor of another listing raises InvalidRequestError.

        Args:
            owner: Only the sessions of this owner; with an empty text those without an owner.
            metadata: Only the sessions that have all of these pairs.
        """
        with self._answered_within():
            return await self._store.list_sessions(
                limit=limit,
                after=after,
                status=status,
                now=self._clock(),
                owner=owner,
                metadata=metadata,
                bytes_max=bytes_max,
            )

    async def search_sessions(
        self,
        query: str,
        *,
        limit: int,
        after: str | None = None,
        status: SessionStatus | None = None,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        bytes_max: int | None = None,
    ) -> Page[Match]:
        """A page of the sessions that have all words of a query in their title, or in the messages of one ended turn.

        Filtered and paged as :meth:`list_sessions`.
        """
        with self._answered_within():
            return await self._store.search_sessions(
                query,
                limit=limit,
                after=after,
                status=status,
                now=self._clock(),
                owner=owner,
                metadata=metadata,
                bytes_max=bytes_max,
            )

    async def count_sessions(self, *, status: SessionStatus | None = None, owner: str | None = None) -> int:
        with self._answered_within():
            return await self._store.count_sessions(status=status, now=self._clock(), owner=owner)

    async def update_session(
        self, session_id: str, patch: SessionPatch, *, revisions: Collection[str] | None = None
    ) -> SessionRecord:
        """Change a session and move its deadline.

        Args:
            revisions: Change the session only if it has one of these revisions; None stands for all.

        Raises:
            SessionNotFoundError
            PreconditionFailedError: The session has another revision.
            InvalidRequestError: The model is unknown.
            HeadMovedError, TurnNotFoundError, TurnInProgressError, OwnedElsewhereError: The head does not move, as
                :meth:`~service.storage.store.Store.update_session` says.
        """
        self._check_not_deleted(session_id)
        if isinstance(patch.model, str):
            self._client_for(patch.model)
        within_s = self._settings.store_timeout_s
        if patch.head is not msgspec.UNSET:  # a turn whose end is not stored would be in the way
            with self._answered_within() as deadline:
                await self.pending_writes.retry_ends_of(session_id)
                within_s = deadline.left_s
        with self.pending_writes.writing(within_s=within_s):
            return await self._store.update_session(session_id, patch, now=self._clock(), revisions=revisions)

    async def delete_session(self, session_id: str, *, revisions: Collection[str] | None = None) -> None:
        """Delete a session: no caller finds the session from now on; then its turns end, then its rows are removed.

        The deletion continues if the caller is cancelled. A second call meanwhile waits for the same deletion, whatever
        revision it takes the session for, because the session is gone already.

        Args:
            revisions: Delete the session only if it has one of these revisions; None stands for all.

        Raises:
            SessionNotFoundError
            PreconditionFailedError: The session has another revision.
            OwnedElsewhereError: Another process runs turns of this session; that process must delete it.
            StoreError: Also if the deletion takes longer than :attr:`deletion_timeout_s`; it goes on then.
            ShuttingDownError: The service ended before the deletion did.
        """
        await self.deletions.delete(session_id, revisions=revisions, within_s=self.deletion_timeout_s)

    @property
    def deletion_timeout_s(self) -> float:
        """How long a caller waits for a deletion: two writes to the store, and the ends of the turns between them."""
        return 2 * self._settings.store_timeout_s + self._settings.cleanup_timeout_s

    async def list_messages(
        self, session_id: str, *, limit: int, after: str | None = None, bytes_max: int | None = None
    ) -> Page[MessageRecord]:
        """A page of the messages from the root to the head, oldest first. It may have no message and a ``next``.

        Raises:
            SessionNotFoundError
            InvalidRequestError: ``after`` is not a page cursor of this listing, or names a turn of another path.
        """
        start = None if after is None else Position.parse(after)
        session = await self.get_session(session_id)
        path: Sequence[TurnRecord] = ()
        asked = ""
        while not path and session.head not in (None, asked):  # again if the head was deleted between the two reads
            asked = session.head or ""
            with self._answered_within():
                path = await self._store.list_path(
                    session_id,
                    asked,
                    limit=turns_needed(limit),
                    first=start.turn_id if start else None,
                    bytes_max=bytes_max,
                )
            if not path:
                session = await self.get_session(session_id)
        if start is not None and not path:
            raise InvalidRequestError("after is not on the path to this session's head.", field="after")
        return page_of_messages(path, head=session.head, limit=limit, skip=start.count if start else 0)

    async def add_items(self, session_id: str, new: NewItems) -> Sequence[TurnRecord]:
        """Add items of a conversation as turns that are complete at once; the last one is the head. Returns the turns.

        All of them are added, or none. The answer comes within ``store_timeout_s``, as that of :meth:`start_turn`. With
        a key that an earlier call had, the turns are those which that call has added.

        Raises:
            KeyReusedError, MadeIsGoneError
            SessionNotFoundError
            OwnedElsewhereError: Another process runs turns of this session.
            TurnNotFoundError: ``parent`` is not a turn of this session.
            TurnInProgressError: ``parent`` is open; or, without ``parent``, a turn of the session is.
            ShuttingDownError
        """
        try:
            return await self._keyed_calls.once(new.key, partial(self._acceptance.add, session_id, new))
        except RepeatedError as error:
            return await self._turns_added_before(error)

    async def find_item(self, session_id: str, item_id: str) -> PlacedItem:
        """An item of a session, also on another branch; an open turn has those of its input.

        Raises:
            SessionNotFoundError, ItemNotFoundError
        """
        self._check_not_deleted(session_id)
        with self._answered_within():
            turn = await self._store.find_item(session_id, item_id, now=self._clock())
        item = turn.find_item(item_id)
        if item is None or turn.ephemeral:
            raise ItemNotFoundError(item_id)
        return PlacedItem(item, turn)

    async def list_items(
        self, session_id: str, *, limit: int, after: str | None, newest_first: bool, bytes_max: int
    ) -> ItemsPage:
        """A page of the items from the root to the head, reasoning included; an open turn has those of its input.

        Args:
            after: The id of the item after which the page begins. Newest first, the page goes on towards the root, also
                if the head has moved to another branch since.
            bytes_max: About the most bytes of texts that are read.

        Raises:
            SessionNotFoundError
            InvalidRequestError: ``after`` is no item of the session; or, oldest first, not on the path to the head.
        """
        session = await self.get_session(session_id)
        at: str | None = None
        if after is not None:
            try:
                at = (await self.find_item(session_id, after)).turn.id
            except ItemNotFoundError:
                raise InvalidRequestError("This is no item of the conversation.", field="after") from None
        read = items_down if newest_first else items_up
        asked: str | None = None
        while at or session.head not in (None, asked):  # again if the head was deleted between the two reads
            asked = session.head
            with self._answered_within():
                page = await read(self._store, session, at=at, after=after, limit=limit, bytes_max=bytes_max)
            if page is not None:
                return page
            session = await self.get_session(session_id)
        return ItemsPage((), has_more=False)

    async def delete_item(self, session_id: str, item_id: str) -> None:
        """Delete an item of a conversation; the outputs of a call are deleted with the call.

        The answer comes within ``store_timeout_s``, as that of :meth:`start_turn`.

        Raises:
            SessionNotFoundError, ItemNotFoundError
            OwnedElsewhereError: Another process runs turns of this session.
            TurnInProgressError: The item's turn, or a turn that follows it, is open.
        """
        for turn in self._active.open_turns_of(session_id):
            if turn.record().find_item(item_id) is not None:
                raise TurnInProgressError(turn.id, instead=INSTEAD_OF_DELETING)
        await self._acceptance.delete(
            session_id, lambda: self._store.delete_item(session_id, item_id, now=self._clock())
        )

    # Turns

    async def delete_turn(self, session_id: str, turn_id: str) -> None:
        """Delete a turn and all turns that follow it. If the head is among them, the turn's parent is the head.

        The answer comes within ``store_timeout_s``, as that of :meth:`start_turn`.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            OwnedElsewhereError: Another process runs turns of this session.
            TurnInProgressError: One of these turns is open.
        """
        await self._acceptance.delete(
            session_id, lambda: self._store.delete_turns(session_id, turn_id, now=self._clock())
        )

    async def delete_turn_alone(self, session_id: str, turn_id: str, *, with_session: bool) -> None:
        """Delete a turn, and none that follows it: such turns stay as they are, below a turn that says nothing.

        It is whole or not done, as :meth:`~service.storage.store.Store.delete_turn` says. The answer comes within
        ``store_timeout_s``, as that of :meth:`start_turn`.

        Args:
            with_session: Whether the session goes with its last turn, unless it was given a title, metadata or other
                settings of its own.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            OwnedElsewhereError: Another process runs turns of this session.
            TurnInProgressError: The turn, or one that follows it, is open.
        """

        async def write() -> None:
            revisions: Sequence[str] = ()
            if with_session:
                session = await self._store.get_session(session_id, now=self._clock())
                revisions = () if has_settings(session) else (revision_of(session),)
            await self._store.delete_turn(session_id, turn_id, now=self._clock(), session_revisions=revisions)

        await self._acceptance.delete(session_id, write)

    async def start_turn(self, session_id: str, new: NewTurn) -> tuple[Turn, Watch]:
        """Accept a turn. When this call returns, the input is kept, and the turn runs or is queued.

        There is no checkpoint between the acceptance and the return, so the watch is never lost; the caller must
        release the watch. Cancellation before the acceptance leaves nothing behind, not even a created session.
        The answer comes within ``store_timeout_s``; at most half of it is the wait for other callers of this session.
        Callers that wait count as open turns. With a key that an earlier call had, no turn is accepted: the turn is the
        one which that call has started, if it is open here.

        Raises:
            RepeatedError: An earlier call with the key has started a turn, which has ended or is open elsewhere.
            KeyReusedError, MadeIsGoneError
            SessionNotFoundError
            OwnedElsewhereError: Another process runs turns of this session.
            TurnNotFoundError: ``parent`` is not a turn of this session.
            TurnInProgressError, QueueFullError: By ``on_conflict``, if the turn follows the head or an open turn.
            BranchLimitError: ``parent`` is another turn or None, and ``branches_max`` turns of the session run.
            TurnLimitError, SessionLimitError, ShuttingDownError
            InvalidRequestError: The model is unknown.
            NothingAskedError: The turn has no input, and its path ends with nothing to answer.
        """

        async def start(within_s: float) -> tuple[Turn, Watch]:
            turn = await self._acceptance.accept(session_id, new, within_s)
            return turn, turn.watch()

        try:
            turn, watch = await self._keyed_calls.once(
                new.key,
                start,
                take_share=lambda started: (started[0], started[0].watch()),
                give_back=lambda started: started[1].release(),
            )
        except RepeatedError as error:
            found = self._find_turn(error.session_id, error.turn_id or "")
            if found is None or self.deletions.is_under_way(error.session_id):
                raise
            turn, watch = found, found.watch()
        add_to_log_context(session_id=turn.session_id, turn_id=turn.id)  # of the caller's lines from now on
        return turn, watch

    async def check_key(self, key: IdempotencyKey) -> None:
        """Check that no earlier call with a key has made anything.

        Raises:
            RepeatedError: It says what was made.
            KeyReusedError, MadeIsGoneError
        """
        await self._keyed_calls.check(key)

    async def _session_made_before(self, error: RepeatedError) -> SessionRecord:
        """The session that an earlier call has made, as it is now. Raises: MadeIsGoneError."""
        with gone_if_not_found(error):
            return await self.get_session(error.session_id)

    async def _turns_added_before(self, error: RepeatedError) -> Sequence[TurnRecord]:
        """The turns that an earlier call has added. Raises: MadeIsGoneError."""
        assert error.turn_id is not None, "the same request has added turns"
        with gone_if_not_found(error):
            await self.get_session(error.session_id)
            with self._answered_within():
                turns = await self._store.list_path(
                    error.session_id, error.turn_id, limit=ADDED_ITEMS_MAX, first=error.first_turn_id
                )
            if not turns:
                raise TurnNotFoundError(error.turn_id)
        return turns

    async def make_way(self, session_id: str, new: NewTurn) -> None:
        """Let the turns of a session end, because this process stops and another one is to accept the next turn.

        ``queue`` waits until they have ended, ``supersede`` cancels them and waits. A turn that branches waits, because
        all open turns of a session have one owner. The wait is short: if a turn is
        still open then, call this again. Callers that wait count as open turns.

        Raises:
            SessionNotFoundError: It is being deleted.
            TurnInProgressError, QueueFullError: By ``on_conflict``.
            BranchLimitError, TurnLimitError
            StoreError: The store does not take the ends of earlier turns, within ``store_timeout_s`` in all.
        """
        await self._acceptance.make_way(session_id, new)

    async def get_turn(
        self, session_id: str, turn_id: str, *, with_texts: bool = True, is_client: bool = False
    ) -> TurnRecord:
        """A turn with its text so far. Without ``with_texts`` the texts of a long output may be empty.

        Args:
            is_client: Whether the caller may be a client of the turn: if it was adopted, it waits some seconds for the
                caller's next call. A suspended turn that waits for its client is adopted.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            OwnedElsewhereError: The turn is open in another process, which has the text so far.
        """
        self._check_not_deleted(session_id)
        turn = self._find_turn(session_id, turn_id)
        if turn is None:
            with self._answered_within():
                record = await self._read_turn(session_id, turn_id, with_texts=with_texts)
            if not (is_client and awaits_client(record)):
                return record
            with suppress(TurnLimitError, ShuttingDownError):  # another process goes on with it, or this one later
                await self._acceptance.adopt(session_id)
            turn = self._find_turn(session_id, turn_id)
            if turn is None:
                return record
        if is_client:
            turn.watch_as_asking().release(client_returns=True)
        return turn.record()

    async def get_reply(self, session_id: str, turn_id: str) -> TurnRecord:
        """A turn without its input, which is not read.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
        """
        self._check_not_deleted(session_id)
        turn = self._find_turn(session_id, turn_id)
        if turn is not None:
            return msgspec.structs.replace(turn.record(), input=())
        with self._answered_within():
            return await self._ended_by_now(
                session_id, lambda: self._store.get_reply(session_id, turn_id, now=self._clock())
            )

    async def find_session_of(self, turn_id: str) -> str:
        """The id of a turn's session, of any owner.

        Raises:
            TurnNotFoundError: There is no such turn. (If its session has expired, a later call says so.)
        """
        with self._answered_within():
            session_id = await self._store.find_session_of(turn_id)
        if session_id is None:
            raise TurnNotFoundError(turn_id)
        return session_id

    async def wait_turn(self, session_id: str, turn_id: str, *, is_client: bool = False) -> TurnRecord:
        """Wait for the end of a turn; returns the turn. Cancellation affects the caller only.

        A turn that this process leaves, because it stops, is returned as it stands then.

        A look, and no interest: the caller holds no watch, so that its leave does not end the turn, and the turn ends
        for lack of clients while such a caller waits. A turn that was adopted is different: its clients were sent
        away, and wait like this.

        Args:
            is_client: Whether the caller may be a client of the turn: if it was adopted, it does not end for lack of
                clients during this call, and some seconds after it.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            OwnedElsewhereError: The turn is open in another process.
        """
        self._check_not_deleted(session_id)
        turn = await self._find_or_adopt(session_id, turn_id, partial(self._read_ended, session_id, turn_id))
        if isinstance(turn, TurnRecord):
            return turn
        watch = turn.watch_as_asking() if is_client else Watch(None)
        try:
            return await turn.wait_ended()
        except TurnMovedError:
            return turn.record()
        finally:
            watch.release(client_returns=True)

    async def list_turns(
        self,
        session_id: str,
        *,
        limit: int,
        after: str | None = None,
        bytes_max: int | None = None,
        parent: str | None | msgspec.UnsetType = msgspec.UNSET,
    ) -> Page[TurnRecord]:
        """A page of all turns of a session, or of those with one parent, oldest first.

        Raises:
            SessionNotFoundError
            TurnNotFoundError: ``parent`` is not a turn of this session.
            OwnedElsewhereError: Some of these turns are open in another process, which has their texts so far.
        """
        self._check_not_deleted(session_id)
        with self._answered_within():
            page = await self._store.list_turns(
                session_id, limit=limit, after=after, now=self._clock(), bytes_max=bytes_max, parent=parent
            )
            if any(record.is_open for record in page.data) and not self._active.has_turns(session_id):
                await self._refuse_if_elsewhere(session_id)
        live = [self._find_turn(session_id, record.id) for record in page.data]
        data = (turn.record() if turn else record for turn, record in zip(live, page.data, strict=True))
        return msgspec.structs.replace(page, data=tuple(data))

    async def list_tree(self, session_id: str, *, limit: int, after: str | None = None) -> Page[TreeNode]:
        """A page of the tree of a session's turns, in the order of their acceptance.

        Raises:
            SessionNotFoundError
        """
        self._check_not_deleted(session_id)
        with self._answered_within():
            page = await self._store.list_tree(session_id, limit=limit, after=after, now=self._clock())
        live = [self._find_turn(session_id, node.id) for node in page.data]
        data = (TreeNode.of(turn.record()) if turn else node for turn, node in zip(live, page.data, strict=True))
        return msgspec.structs.replace(page, data=tuple(data))

    async def find_on_path(self, session_id: str, turn_id: str, *, among: Collection[str]) -> set[str]:
        """Those of some turns that are on the path to a turn of their session, which is not read further than to them.

        Raises:
            SessionNotFoundError: It is being deleted.
        """
        self._check_not_deleted(session_id)
        with self._answered_within():
            return await self._store.find_on_path(session_id, turn_id, among=among)

    async def find_places(self, session_id: str, turn_ids: Collection[str]) -> Places | None:
        """The places of turns in their session's tree; None if the store does not answer within a moment.

        They are shown beside turns that this process may have in memory: these are shown also while the store hangs.
        """
        try:
            with answered_within(min(PLACES_MAX_S, self._settings.store_timeout_s)):
                return await self._store.find_places(session_id, turn_ids)
        except StoreError:
            return None

    async def cancel_turn(self, session_id: str, turn_id: str) -> TurnRecord:
        """End a turn as ``cancelled`` (``requested``) and wait for its end; idempotent.

        An earlier end stands. The turn ends also if the caller is cancelled.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
            TurnEndingError: The end takes longer than :attr:`cancel_timeout_s`; it comes later.
            TurnMovedError, TurnLimitError, ShuttingDownError: The turn goes on in another process, or is suspended and
                cannot be adopted here.
        """
        self._check_not_deleted(session_id)
        turn = await self._find_or_adopt(session_id, turn_id, partial(self._read_ended, session_id, turn_id))
        if isinstance(turn, TurnRecord):
            return turn
        turn.cut_short(outcome.Cancelled("requested"))
        with move_on_after(self.cancel_timeout_s):
            return await turn.wait_ended()
        raise TurnEndingError(session_id=session_id, turn_id=turn_id)

    @property
    def cancel_timeout_s(self) -> float:
        """How long a caller waits for the end of a turn that it cancels: the model client closes, the end is stored."""
        return self._settings.store_timeout_s + self._settings.cleanup_timeout_s

    async def open_events(
        self, session_id: str, turn_id: str, *, after: int = 0, watches: bool = True
    ) -> tuple[Events, Watch]:
        """The events of a turn: its live log, or a replay from the store.

        The watch counts while the turn is open; the caller must release it. There is no checkpoint between taking the
        watch and the return.

        Args:
            watches: Whether the caller is a client of the turn. Without it the watch does not keep the turn running.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
            EventsLostError: Not all events after ``after`` are in the store. (If a crash lost only the last events, a
                reader of the stored events still goes on to the terminal event.)
            TurnLimitError, ShuttingDownError: The turn is suspended, and cannot be adopted here.
        """
        self._check_not_deleted(session_id)
        read = partial(self._read_ended, session_id, turn_id)
        found = await self._find_or_adopt(
            session_id, turn_id, partial(self._replays.open, session_id, turn_id, after=after, read_turn=read)
        )
        if isinstance(found, Turn):
            return found.log, found.watch() if watches else found.watch_as_reader()
        return found, Watch(None)

    async def _find_or_adopt(self, session_id: str, turn_id: str, read: Callable[[], Awaitable[T]]) -> Turn | T:
        """The turn, if it is open here; adopted first if it is suspended. What ``read`` returns, if it has ended.

        Args:
            read: Reads what is stored of the turn, by way of :meth:`_read_ended`.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError, TurnLimitError, ShuttingDownError
        """
        for _ in range(_ADOPTIONS_MAX):
            turn = self._find_turn(session_id, turn_id)
            if turn is not None:
                return turn
            try:
                with self._answered_within():
                    await self._refuse_if_open(session_id, turn_id)
                    return await read()
            except TurnsSuspendedError:
                await self._acceptance.adopt(session_id)
        raise StoreError(f"Turn {turn_id!r} passes from process to process; try again.")

    async def _refuse_if_open(self, session_id: str, turn_id: str) -> None:
        """Find out by a short read whether a turn that is not open here is open at all.

        After a stop hundreds of callers ask for such turns at once.

        Raises:
            OwnedElsewhereError, TurnsSuspendedError
        """
        found = await self._store.find_open_turn(session_id, turn_id)
        if found is None:
            return
        if found.owner is not None:
            raise OwnedElsewhereError(session_id, fence=found.owner.fence, address=found.owner.address)
        if found.is_suspended:
            raise TurnsSuspendedError(turn_id)

    async def _read_ended(self, session_id: str, turn_id: str, with_texts: bool = True) -> TurnRecord:
        """Read a turn that does not run in this process and has ended.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
            TurnsSuspendedError: It has not ended, and no process runs it.
        """
        record = await self._read_turn(session_id, turn_id, with_texts=with_texts)
        if record.is_open and record.on_interrupt != "fail":
            raise TurnsSuspendedError(turn_id)
        return record

    def find_live_turn(self, session_id: str, turn_id: str) -> Turn | None:
        """The turn, if this process runs it, or ran it and its end is not in the store yet."""
        return self._find_turn(session_id, turn_id)

    async def resume_newest(
        self,
        session_id: str,
        *,
        said: Sequence[Item],
        after: int,
        parent: str | None | msgspec.UnsetType = msgspec.UNSET,
        besides: str | None = None,
    ) -> tuple[str, Events, Watch]:
        """The events of the session's newest turn, for a client that started this turn and reconnects.

        The client has seen the events up to ``after`` and repeats the input. Other parameters of the turn were decided
        at its acceptance and are not compared. The turn is the head if that has this input; else, because branches may
        have been started since, the newest open turn that has it. Starts no turn. Returns the turn's id, its log and a
        watch, as :meth:`open_events` does.

        Args:
            parent: Of several turns with this input one with this parent is taken, if there is one.
            besides: A turn that is not meant: the one that the turn is a retry of.

        Raises:
            SessionNotFoundError, OwnedElsewhereError, EventsLostError
            ResumeConflictError: There is no such turn, or it has fewer events.
        """
        session = await self.get_session(session_id)
        if session.open_turns and not self._active.has_turns(session_id):
            with self._answered_within():
                is_elsewhere = await self._store.find_owner(session_id) is not None
            if not is_elsewhere:
                await self._acceptance.adopt(session_id)  # one of these turns may be the one that is meant
        head = session.head
        newest = None if head is None else await self.get_turn(session_id, head)
        open_here = [turn.record() for turn in reversed(self._active.turns_of(session_id))]
        fitting = [
            turn
            for turn in (newest, *open_here)
            if turn is not None and turn.id != besides and is_same_input(turn.input, said)
        ]
        found = min(fitting, key=lambda turn: parent not in (msgspec.UNSET, turn.parent), default=None)
        if found is None and not open_here:
            with self._answered_within():
                await self._refuse_if_elsewhere(session_id)
        if newest is None and found is None:
            raise ResumeConflictError("This session has no turn to resume.", field="Last-Event-ID")
        shown = found or newest
        assert shown is not None
        refuse = partial(ResumeConflictError, session_id=session_id, turn_id=shown.id)
        if found is None:
            raise refuse(f"The newest turn of this session, {shown.id!r}, has another input.", field="input")
        log, watch = await self.open_events(session_id, found.id, after=after)
        if after > log.last_seq:
            watch.release()
            raise refuse(
                f"The newest turn of this session, {found.id!r}, has {log.last_seq} events so far, and not {after}.",
                field="Last-Event-ID",
            )
        return found.id, log, watch

    # All of them

    def open_turns(self) -> list[Turn]:
        """The turns that are queued or running."""
        return self._active.open_turns()

    def measure_turns(self) -> Steps[TurnsMeasured]:
        """Measure the open turns, in steps: with thousands of them the event loop would stand still."""
        running = log_bytes = 0
        for count, turn in enumerate(self._active.each_open_turn(), 1):
            running += turn.running
            log_bytes += turn.log.size
            if not count % _MEASURED_A_STEP:
                yield
        queued = max(self._active.turns_open - running, 0)  # others have begun and ended since the first step
        return TurnsMeasured(running=running, queued=queued, log_bytes=log_bytes)

    async def recover(self) -> int:
        """End the turns of processes that have died. Returns their number.

        The store begins a write even if there is no such turn, so that a store that refuses writes is noticed.
        """
        try:
            with self._answered_within() as deadline:
                recovered = await self._store.recover(now=self._clock(), after_step=deadline.restart)
        except StoreError as error:
            self.pending_writes.refusal = error
            raise
        count_recovered(self._metrics, recovered)
        return recovered

    async def adopt_waiting(self) -> float | None:
        """Adopt the suspended turns whose clients have not come back here or elsewhere.

        A turn waits for :data:`SUSPENDED_S`, and a turn that is cancelled without clients for
        :data:`~service.sessions.turns.turn.CLIENT_RETURNS_S`, or ``disconnect_grace_s`` if that is longer; then it is
        cancelled. Both count from the moment at which this process sees the turn: no two clocks are compared, and a
        client is not expected while no process serves.

        Adopts none in a stop, and none beyond ``live_turns_max``. A session whose adoption fails is set aside for
        :data:`ADOPTION_PAUSE_S`, and takes no other one's place meanwhile.

        Returns when the next turn has waited for long enough, on Trio's clock; None if none waits.

        Raises:
            StoreError: The last refusal, if there was one.
        """
        if self._stop.phase is not Phase.SERVING:
            return None
        with self._answered_within():
            found = await self._store.list_suspended(limit=_NEW_SUSPENDED_MAX + self._sweep.known)
        returns_within_s = max(self._settings.disconnect_grace_s, CLIENT_RETURNS_S)
        due = self._sweep.due(found, now=trio.current_time(), returns_within_s=returns_within_s)
        due = dict.fromkeys(self._acceptance.adoptions.unresolved, False) | due
        refusals: list[StoreError] = []
        for start in range(0, len(due), _ADOPTED_AT_ONCE):
            async with trio.open_nursery() as nursery:  # for callers that wait, and not for work
                for session_id, has_no_client in list(due.items())[start : start + _ADOPTED_AT_ONCE]:
                    nursery.start_soon(partial(self._adopt_one, session_id, refusals, has_no_client=has_no_client))
        if refusals:
            raise refusals[-1]
        return self._sweep.next_due_at

    async def _adopt_one(self, session_id: str, refusals: list[StoreError], *, has_no_client: bool) -> None:
        """Adopt the turns of a session, unless something is in the way that may pass."""
        if self._sweep.is_set_aside(session_id):
            return
        try:
            await self._acceptance.adopt(session_id, has_no_client=has_no_client)
        except (OwnedElsewhereError, SessionNotFoundError, TurnLimitError, ShuttingDownError):
            pass  # another process was first, or it is deleted; or this process takes no more
        except StoreError as error:
            refusals.append(error)
        except Exception:
            self._sweep.set_aside(session_id, until=trio.current_time() + ADOPTION_PAUSE_S)
            logger.exception(
                "the turns of a session were not adopted; the recovery tries again later",
                session_id=session_id,
                pause_s=ADOPTION_PAUSE_S,
            )

    def lose_turns(self) -> None:
        """Stop the work of all open turns, which are not this process's any more. No end of them is told."""
        for turn in self._active.open_turns():
            turn.cut_short(outcome.Interrupted("crash"))

    async def end_hung(self, *, within_s: float) -> None:
        """End the open turns whose tasks hang. Called by the shutdown when it does not wait for these tasks any more.

        Args:
            within_s: How long the store may take for each turn.
        """
        await self._acceptance.end_hung(within_s=within_s)

    def statistics(self) -> SessionsStatistics:
        callers_waiting = (
            self._active.turns_arriving + self.deletions.callers_waiting + self._forking.statistics().tasks_waiting
        )
        return SessionsStatistics.of(self._active, self.pending_writes, self.streams, callers_waiting=callers_waiting)

    def describe(self, notes: Notes) -> Steps[None]:
        """Tell the live tree of the open turns and streams."""
        notes.name(self._nursery, Node(parent=None, kind="nursery", name="sessions"))
        yield from note_turns(self._active.each_open_turn(), notes)
        yield from note_streams(self.streams, notes)

    # Steps of the calls

    def _check_not_deleted(self, session_id: str) -> None:
        if self.deletions.is_under_way(session_id):
            raise SessionNotFoundError(session_id)

    async def _read_turn(self, session_id: str, turn_id: str, *, with_texts: bool = True) -> TurnRecord:
        """Read a turn that does not run in this process, perhaps without the texts of a long output.

        Raises:
            SessionNotFoundError, TurnNotFoundError, OwnedElsewhereError
        """
        return await self._ended_by_now(
            session_id,
            lambda: self._store.get_turn(session_id, turn_id, now=self._clock(), with_texts=with_texts),
        )

    async def _ended_by_now(self, session_id: str, read: Callable[[], Awaitable[TurnRecord]]) -> TurnRecord:
        """What is read of a turn that does not run in this process. Raises: OwnedElsewhereError."""
        record = await read()
        if record.is_open:
            await self._refuse_if_elsewhere(session_id)
            record = await read()  # the turn has no owner, so it ended between the two reads, or it is suspended
        return record

    async def _refuse_if_elsewhere(self, session_id: str) -> None:
        """Raises: OwnedElsewhereError, if another process runs the session's open turns."""
        owner = await self._store.find_owner(session_id)
        if owner is not None:
            raise OwnedElsewhereError(session_id, fence=owner.fence, address=owner.address)

    def _find_turn(self, session_id: str, turn_id: str) -> Turn | None:
        """The turn, if it is open here or its end could not be stored."""
        return self._active.find_turn(session_id, turn_id) or self.pending_writes.find_turn(session_id, turn_id)

    def _answered_within(self) -> AbstractContextManager[ScopeDeadline]:
        return answered_within(self._settings.store_timeout_s)


@asynccontextmanager
async def open_sessions(
    *,
    store: Store,
    client_for: Callable[[str], ModelClient],
    clock: Clock,
    settings: Settings,
    stop: StopState,
    transport: PeerTransport | None = None,
    metrics: Metrics | None = None,
    tracing: "Tracing | None" = None,
) -> AsyncIterator[Sessions]:
    """Open the sessions supervisor. On exit all session tasks are cancelled: their turns end as ``interrupted``.

    A failure of one session never reaches this nursery.

    Args:
        stop: The phase of the stop, which says when new work is refused.
        transport: How other processes are reached; only through Unix sockets unless given.
        metrics: Counts what happens.
        tracing: Makes the spans of turns; there are none unless given.
    """
    async with trio.open_nursery() as nursery:
        yield Sessions(
            nursery=nursery,
            store=store,
            client_for=client_for,
            clock=clock,
            settings=settings,
            stop=stop,
            transport=transport or PeerTransport(),
            metrics=metrics or Metrics(),
            tracing=tracing,
        )
        nursery.cancel_scope.cancel()
