"""The protocol that every store meets; ``tests/storage/test_store_contract.py`` is its definition.

Each method is one atomic step: a reader sees the whole step or nothing of it, and a cancelled call
leaves the whole step or nothing behind (the caller cannot know which). A return acknowledges the step:
its write is then as safe as the store ever makes it. A store decides how many steps share one commit.
A method that depends on a condition takes this condition as an argument and checks it in the same step
as the write, so that several processes may share a store.

An open store is one owner. The turns that an owner began belong to it until they end, the store closes or the
process dies; only then may :meth:`Store.recover` of another owner end these turns. All open turns of a session
have one owner. The store refuses a new turn of this session to any other owner, and names the first one.

A turn whose ``on_interrupt`` is not ``fail`` may outlive its owner: the owner *suspends* it, or the recovery releases
it. Then it is open and nobody's, until an owner *adopts* it. For all calls but these it is an open turn like others.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from service.models.client import Usage
from service.storage.pieces import Run
from service.storage.records import (
    Adoption,
    BegunTurn,
    Checkpoint,
    EndResult,
    EventsPage,
    IdempotencyKey,
    LeftOut,
    Match,
    OpenTurn,
    Owner,
    Page,
    Places,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    SuspendedSession,
    SuspendedTurn,
    TitleSource,
    TreeNode,
    TurnRecord,
)
from service.storage.standing import Standing
from service.store_capabilities import StoreCapabilities

Monotonic = Callable[[], float]
"""The time that passes for a store: seconds from any start, which never go back. It is given to a store whose intervals
or leases depend on it, when that is opened, so that a test moves it. ``now`` of the calls is the wall clock's time."""

PAGE_LENGTH_MAX = 64 * 1024
"""The code points of a page of events: what a replay holds in memory."""


class Store(Protocol):
    """Keeps sessions and turns.

    A session that is marked as deleted, or has expired at ``now``, does not exist for a method that
    takes ``now``, unless the method says otherwise. ``now`` is an aware datetime; stores have no clock of
    their own. Ids of turns are unique among all sessions. Ids of sessions are scoped ones
    (:mod:`service.ids`), so a session's owner is a part of its id. Every ``limit`` is at least 1.

    The acceptance of a turn, its end and a patch *use* a session at ``now``; a read does not: ``last_accessed_at``
    becomes ``now``, ``expires_at`` becomes ``now`` plus the session's idle timeout.

    The end of an *ephemeral* turn removes the turn, its texts and its events in the same step, and its session if that
    is ephemeral as well; what a kept session has used counts. Until then the turn is like others, but it is never the
    head, its messages do not count, no turn follows it, and an ephemeral session takes no other turn and is in no
    listing.

    A step that is given a ``key`` keeps the key together with what the step makes, for as long as this exists, and for
    :data:`~service.storage.rules.KEY_KEPT_S` at least from then on. Before all else the step raises
    :class:`~service.errors.RepeatedError` if the same caller's key is kept already, by any owner.

    Every method raises :class:`~service.errors.StoreError` if the store refuses or breaks. The outcome of
    such a step is unknown, as after a cancellation. The step may even happen later, but never after the
    next write of the same owner: the writes of an owner, :meth:`is_marked` and :meth:`check_key`, happen in the order
    of their calls, so that a later call finds the outcome of an earlier one.
    Callers bound their waits. ``aclose`` flushes and closes; no method may be called after it.
    """

    @property
    def name(self) -> str:
        """The kind and the place of the store, for the banner; without secrets."""
        ...

    @property
    def standing(self) -> Standing:
        """Whether this owner still owns its turns, as far as the store knows."""
        ...

    @property
    def capabilities(self) -> StoreCapabilities:
        """What the store can do, as its callers need to know it."""
        ...

    @property
    def peer_secret(self) -> bytes:
        """The secret of the processes that share this store. It is in no backup and no export."""
        ...

    @property
    def fence(self) -> int:
        """This owner's number among all owners that ever opened the store; 0 if there is only one."""
        ...

    # Sessions

    async def create_session(
        self,
        session: SessionRecord,
        *,
        now: datetime,
        key: IdempotencyKey | None = None,
        added: Sequence[TurnRecord] = (),
    ) -> None:
        """Add a session. An expired one of the same id is replaced, with all that belongs to it.

        Args:
            added: The session's turns, complete at once, as :meth:`add_turns` takes them; the first one has no parent.
                ``session`` counts them already (:func:`~service.storage.rules.with_added`). All appear together.

        Raises:
            RepeatedError
            SessionExistsError: The id is taken, or its deletion is not finished.
            SessionLimitError: The store keeps no more sessions; :meth:`fork_session` raises it, too.
        """
        ...

    async def fork_session(
        self, source_id: str, *, at: str | None, copy_id: str, now: datetime, key: IdempotencyKey | None = None
    ) -> SessionRecord:
        """Add a session with the settings of another one and copies of its turns from the root to ``at``.

        Without ``at`` the copies end at the source's head; a source without turns gives a copy without turns. The
        copies and their items have new ids. Their events are the same. The totals of
        the session are those of its turns. A fork does not use the source; an expired session of the new id is
        replaced. The copy and the key appear together. Returns the copy.

        Raises:
            RepeatedError
            SessionNotFoundError: The source does not exist, or is ephemeral.
            TurnNotFoundError: ``at`` is not a turn of the source.
            TurnInProgressError: A turn that would be copied is open.
            OwnedElsewhereError: Such a turn is open and belongs to another owner, alive or not.
            SessionExistsError: As :meth:`create_session`.
            InvalidRequestError: The path is larger than :mod:`service.storage.fork_path` allows (``field`` is ``at``).
        """
        ...

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        """Raises: SessionNotFoundError."""
        ...

    async def list_sessions(
        self,
        *,
        limit: int,
        after: str | None,
        status: SessionStatus | None,
        now: datetime,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        bytes_max: int | None = None,
    ) -> Page[SessionRecord]:
        """A page of sessions, newest first (by ``created_at``, then ``id``).

        With ``owner`` only the sessions of this owner; with an empty text those without an owner. The cost of the
        listing and the places that its page cursors name depend on these sessions only. The cursor of another owner's
        listing is a place in the order of all sessions, and tells nothing of them.

        The listing is stable while sessions come and go: a session that exists from the first page to the last is on
        exactly one page. ``after`` is the ``next`` of the page before, and stays valid when the
        sessions around it are gone.

        With ``metadata`` only the sessions that have all of these pairs. Such a page may be ``partial``, as those of
        :meth:`search_sessions` are.

        With ``bytes_max`` a page ends before the row with which the ``text_bytes`` of its rows would be more than that;
        it has at least one row. The store does not read the texts of the rows that are not on the page.

        Raises:
            InvalidRequestError: ``after`` is not a page cursor of this listing (``field`` is ``after``).
        """
        ...

    async def search_sessions(
        self,
        query: str,
        *,
        limit: int,
        after: str | None,
        status: SessionStatus | None,
        now: datetime,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        bytes_max: int | None = None,
    ) -> Page[Match]:
        """A page of the sessions that have a document with all terms of a query (:mod:`service.storage.terms`).

        A document is the title, or the messages of an ended turn. Each session comes once, with its document that
        became what it is last; the newest of these documents first. A query without terms finds nothing.

        A search works for :data:`~service.storage.search.SEARCH_S` at most, in short steps, each of which sees the
        store of its own moment; then its page is ``partial``, and ``next`` leads on from where it was. A page is
        partial, too, while documents of an earlier version are not in the index yet. Paged as :meth:`list_sessions`: a
        session that is found from the first page to the last is on exactly one page. Documents that are newer than the
        first page are not in this search. A shared database may give a document a place among the first page's that
        becomes visible only after that page: the search then may miss a session that another process wrote meanwhile.

        Raises:
            InvalidRequestError: ``after`` is not a page cursor of a search (``field`` is ``after``).
        """
        ...

    async def count_sessions(self, *, status: SessionStatus | None, now: datetime, owner: str | None = None) -> int:
        """The number of sessions that a complete listing would have."""
        ...

    async def update_session(
        self, session_id: str, patch: SessionPatch, *, now: datetime, revisions: Collection[str] | None = None
    ) -> SessionRecord:
        """Apply a patch and count it as a use; a new idle timeout holds at once. Returns the session after it.

        Args:
            revisions: The session must have one of these revisions (:func:`~service.storage.rules.revision_of`).

        Raises:
            SessionNotFoundError
            PreconditionFailedError: The session has another revision.
            HeadMovedError: The session has another head than ``patch.seen_head``.
            TurnNotFoundError: ``patch.head`` is not a turn of this session.
            TurnInProgressError: With ``patch.head``, a turn on the path to it, or to the head before, is open.
            OwnedElsewhereError: Such a turn is open, and belongs to another owner, which lives. (Turns of an owner that
                is gone are recovered in the same step.)
        """
        ...

    async def keep_title(
        self,
        session: SessionRecord,
        title: str | None,
        *,
        usage: Usage | None,
        now: datetime,
        source: TitleSource | None = None,
    ) -> bool:
        """Give a session a title, if it has none, and add what it cost to the totals. It is not a use of the session.

        Does nothing if the session does not exist, or is another one of the same id. Returns whether the session has
        this title now. ``title`` is None if only the cost is to be kept.

        Args:
            source: The title is not kept if this turn, or an item of it, was deleted since: the title tells its texts.
        """
        ...

    async def mark_deleted(self, session_id: str, *, now: datetime, revisions: Collection[str] | None = None) -> None:
        """Hide a session from every reader, for good, before its turns are ended.

        Args:
            revisions: As for :meth:`update_session`.

        Raises:
            SessionNotFoundError
            PreconditionFailedError: The session has another revision.
            OwnedElsewhereError: Another owner, which lives, has open turns of the session and must delete it.
        """
        ...

    async def is_marked(self, session_id: str) -> bool:
        """Whether this owner has marked a session as deleted and not removed it yet.

        Answered in the order of this owner's writes: an earlier :meth:`mark_deleted` or :meth:`remove_deleted` with an
        unknown outcome has happened by then, or never will.
        """
        ...

    async def remove_deleted(self, session_id: str) -> None:
        """Remove a marked session, its turns and their events; then the id is free.

        Idempotent: does nothing to a session that is not marked. Open turns are removed as well.
        """
        ...

    async def delete_expired(self, *, now: datetime, limit: int) -> int:
        """Remove at most ``limit`` sessions that have expired at ``now``. Returns how many were removed.

        The check and the removal are one step, so a session that was just used stays. The sessions that expired first
        go first. The cost depends on the number of expired sessions, not on the number of kept ones. Several owners may
        do this at once: each session is removed by one of them, and an owner may leave all sessions to another one that
        lives.
        """
        ...

    # Idempotency keys

    async def check_key(self, key: IdempotencyKey, *, now: datetime) -> None:
        """Check that a key has made nothing yet.

        Answered in the order of this owner's writes: a step with this key and an unknown outcome has happened by then,
        or never will.

        Raises:
            RepeatedError: It says what was made, and by which request.
        """
        ...

    async def forget_keys(self, *, now: datetime, limit: int) -> bool:
        """Forget keys of things that are gone for long, and note that things are gone: at most ``limit`` of each.

        Returns whether there may be more to do. Several owners may do this at once, as with :meth:`delete_expired`.
        """
        ...

    # Turns

    async def begin_turn(
        self,
        turn: TurnRecord,
        *,
        now: datetime,
        head: str | None | msgspec.UnsetType = msgspec.UNSET,
        creates: SessionRecord | None = None,
        path_bytes_max: int | None | msgspec.UnsetType = msgspec.UNSET,
        key: IdempotencyKey | None = None,
        branches: bool = False,
    ) -> BegunTurn:
        """Accept a turn: keep the turn and its input, make it the head, count it as a use.

        ``turn.state`` is ``queued`` or ``running``, its id is new. ``open_turns`` grows by one,
        ``message_count`` by the input's messages.

        Args:
            head: The head that the session must have, if the caller chose ``turn.parent`` by it.
            creates: The turn's session, to be added first, as :meth:`create_session` does.
            path_bytes_max: Return the path to the turn, too, as :meth:`read_path` does with this bound. A store that
                would hold up other writes for it leaves the path out.
            branches: The turn is to run beside other turns of its session: the path to its parent must have ended.

        Raises:
            RepeatedError
            SessionNotFoundError: Also if the session is ephemeral.
            SessionExistsError, SessionLimitError: With ``creates``, as :meth:`create_session`.
            HeadMovedError: The session has another head.
            TurnNotFoundError: ``turn.parent`` is not a turn of this session, or is ephemeral. (An open turn is
                allowed.)
            TurnInProgressError: With ``branches``, a turn on the path to ``turn.parent`` is open.
            OwnedElsewhereError: Another owner, which lives, has open turns of this session. (Turns of an owner that
                is gone are recovered in the same step.)
            TurnsSuspendedError: The session has suspended turns, or turns of an owner that is gone which would be
                suspended, and none of this owner: :meth:`adopt_turns` comes first.
        """
        ...

    async def add_turns(
        self,
        added: Sequence[TurnRecord],
        *,
        now: datetime,
        head: str | None | msgspec.UnsetType = msgspec.UNSET,
        key: IdempotencyKey | None = None,
    ) -> SessionRecord:
        """Add turns that are complete at once, make the last one the head, count it as a use. Returns the session.

        All are of one session and ``completed``, with new ids; each but the first one follows the one before it. The
        events of each are :func:`~service.storage.rules.events_at_once`. ``message_count`` grows by their messages.

        Args:
            head: The head that the session must have, if the caller chose the first turn's parent by it.

        Raises:
            RepeatedError
            SessionNotFoundError
            HeadMovedError: The session has another head.
            TurnNotFoundError: The first turn's parent is not a turn of this session.
            TurnInProgressError: That parent is open.
            OwnedElsewhereError: As :meth:`begin_turn`.
        """
        ...

    async def delete_turns(self, session_id: str, turn_id: str, *, now: datetime) -> None:
        """Delete a turn and all turns that follow it, with their events. No use of the session.

        However many they are, readers see all of them or none, also after a crash; so it is with the other deletions.
        If the head is among them, the turn's parent is the head. ``message_count`` shrinks by their messages; the
        tokens that they used stay in the totals.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            TurnInProgressError: One of these turns is open.
            OwnedElsewhereError: As :meth:`begin_turn`.
        """
        ...

    async def delete_turn(
        self, session_id: str, turn_id: str, *, now: datetime, session_revisions: Collection[str] = ()
    ) -> None:
        """Delete a turn, and none that follows it. No use of the session.

        If a turn follows it, the turn stays in its place as :func:`~service.storage.rules.emptied` makes it: without
        input, output and events; no search finds it. The turns that follow stay as they are. Otherwise the turn is
        deleted as by :meth:`delete_turns`, together with the turns right above it that are emptied
        (:attr:`~service.storage.records.TurnRecord.is_emptied`) and that no other turn follows.

        Args:
            session_revisions: If the session has no turn any more, and one of these revisions, it is removed as well,
                with its id free at once.

        Raises:
            SessionNotFoundError, TurnNotFoundError
            TurnInProgressError: The turn, or a turn that follows it, is open.
            OwnedElsewhereError: As :meth:`begin_turn`.
        """
        ...

    async def find_item(self, session_id: str, item_id: str, *, now: datetime) -> TurnRecord:
        """The turn that has an item. The search reads the session's turns, from the newest one on.

        Raises:
            SessionNotFoundError
            ItemNotFoundError: No turn has this item. (The reply of an open turn is not in the store, unless the turn is
                suspended.)
        """
        ...

    async def delete_item(self, session_id: str, item_id: str, *, now: datetime) -> None:
        """Delete an item of a turn. No use of the session.

        The outputs of a call are deleted with the call: those in the inputs of the turns that follow, up to the first
        turn with a reply on each branch. An output that is deleted leaves its call. The events of the turn are deleted
        if the item is a part of its reply: :meth:`read_events` has none from then on. ``message_count`` shrinks.

        The search for the item reads the session's turns, from the newest one on.

        Raises:
            SessionNotFoundError
            ItemNotFoundError: No turn has this item. (The reply of an open turn is not in the store.)
            TurnInProgressError: The item's turn, or a turn that follows it, is open.
            OwnedElsewhereError: As :meth:`begin_turn`.
        """
        ...

    async def start_turn(self, turn_id: str, *, now: datetime) -> bool:
        """Start a queued turn: ``started_at`` becomes ``now``. Changes nothing if the turn is not queued.

        Returns whether the turn is open and this owner's. If not, another owner has taken this one for dead and ended
        the turn, or the turn is gone: the turn must not run.
        """
        ...

    async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> Collection[str]:
        """Keep the growth of running turns, in case this owner dies before their ends.

        A checkpoint does not use a session, and :meth:`get_turn` shows it only after :meth:`recover`. The checkpoint of
        a turn that is not open, or not this owner's, is ignored. After a call that was cancelled or failed the caller
        gives the same ``after`` again: events that were kept beyond it are replaced.

        Returns the ids of the ignored turns: their work must stop.
        """
        ...

    async def end_turn(self, turn: TurnRecord, *, runs: Sequence[Run], now: datetime, after: int = 0) -> EndResult:
        """Keep a turn's end, its output and its events, and count it as a use.

        ``turn`` is the whole record, with its end. ``open_turns`` shrinks by
        one, ``message_count`` grows by the messages and calls of the output, the totals by its usage.
        The first end wins: a call changes nothing if the turn has ended, is gone or is not this owner's, and the result
        says whether the store has this very end from an earlier call; an ephemeral turn that is gone has had it. Also
        works on a session that is marked as deleted.

        Args:
            runs: All events of the turn but the terminal event, which the record tells; the texts of their pieces are
                those of ``turn.output``.
            after: The seq of the last event of the last checkpoint that was acknowledged.
        """
        ...

    async def suspend_turns(self, suspended: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        """Give up open turns of this owner, so that any owner may adopt them: all of them in one step.

        Keeps what the turns have said: from now on :meth:`get_turn` and :meth:`read_events` show it. They stay open.
        A session of which this owner has no other open turn has no owner any more. Counts as a use of the session.

        Returns the ids of the turns that are open neither as this owner's nor as suspended ones: they are lost. So a
        repeated call, after one with an unknown outcome, returns the same.
        """
        ...

    async def adopt_turns(
        self,
        session_ids: Sequence[str],
        *,
        now: datetime,
        continues: Callable[[TurnRecord], bool],
        running: Collection[str] = (),
        path_bytes_max: Callable[[TurnRecord], int | None] | None = None,
    ) -> Mapping[str, Adoption]:
        """Become the owner of the suspended turns of sessions, in one step for all of them.

        The turns of an owner that is gone are recovered first, as by :meth:`recover`. For each running turn another
        attempt begins, in the same step: ``attempt`` grows, :func:`~service.storage.rules.resumed` chooses the mode,
        and the resumption is kept as the last event; in the mode ``retry`` the output and the events of the earlier
        attempts are dropped. A queued turn stays as it is. Of several owners at once one gets the turns.

        Returns an adoption for each session. Of several sessions those may be missing for which others would have to
        wait: because another step has them now, or because their owner has just died. Ask again for each of these
        alone. Those that are put off because of their size may be asked for together; each call adopts the turns of
        one session at least. An adoption has no turns if there is nothing to adopt. After a call that was cancelled or
        failed the turns may be this owner's already: the next call returns these, too, as they are, without another
        attempt.

        Args:
            continues: Whether the model of a turn can go on after the text so far. May be called in another thread, and
                several times.
            running: Those of this owner's open turns of these sessions that the caller knows. They are never returned.
            path_bytes_max: The bound on the prompt of a turn. With it running turns may come with their paths, from
                stores for which that is less work than :meth:`read_path`. May be called in another thread.
        """
        ...

    async def list_suspended(self, *, limit: int) -> Sequence[SuspendedSession]:
        """The sessions whose turns are suspended, but for those that are marked as deleted.

        The one that waits longest comes first, unless it was used since. The cost depends on the number of suspended
        turns.
        """
        ...

    async def find_open_turn(self, session_id: str, turn_id: str) -> OpenTurn | None:
        """Where a turn is, by one short read; None if it has ended, if there is no such turn, or if its session is
        marked as deleted."""
        ...

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime, with_texts: bool = True) -> TurnRecord:
        """A turn. Without ``with_texts`` the texts of a long output, or of a suspended turn's, may be empty.

        Raises:
            SessionNotFoundError, TurnNotFoundError
        """
        ...

    async def get_reply(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        """A turn as :meth:`get_turn` has it, with an empty input: inputs may be much larger than replies.

        Raises:
            SessionNotFoundError, TurnNotFoundError
        """
        ...

    async def find_session_of(self, turn_id: str) -> str | None:
        """The id of a turn's session, which may have expired or be marked as deleted; None if there is no such turn."""
        ...

    async def list_turns(
        self,
        session_id: str,
        *,
        limit: int,
        after: str | None,
        now: datetime,
        bytes_max: int | None = None,
        parent: str | None | msgspec.UnsetType = msgspec.UNSET,
    ) -> Page[TurnRecord]:
        """A page of all turns of a session, or of those with one parent, in the order of their acceptance.

        Paged as :meth:`list_sessions`.

        Args:
            parent: The parent of the turns; None stands for the turns without a parent.

        Raises:
            SessionNotFoundError
            TurnNotFoundError: ``parent`` is not a turn of this session.
            InvalidRequestError: ``after`` is not a page cursor of this listing.
        """
        ...

    async def list_tree(self, session_id: str, *, limit: int, after: str | None, now: datetime) -> Page[TreeNode]:
        """A page of all turns of a session without their texts, in the order of their acceptance.

        Paged as :meth:`list_turns`, with the same page cursors. Reads no texts.

        Raises:
            SessionNotFoundError
            InvalidRequestError: ``after`` is not a page cursor of this listing.
        """
        ...

    async def find_places(self, session_id: str, turn_ids: Collection[str]) -> Places:
        """The head of a session, and the places of some of its turns among their siblings.

        Costs the same for every turn, also where thousands have the same parent. A turn that does not exist has no
        place. Reads deleted and expired sessions, too.
        """
        ...

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        """The turns from the root to ``turn_id``, in that order.

        With ``bytes_max``, only the newest turns that stay within it, each with its ``message_bytes`` and
        :data:`~service.storage.rules.TURN_BYTES`, but always the last turn. Empty if the turn does not exist. Reads
        deleted and expired sessions, too, because a turn runs on while its session is marked as deleted.
        """
        ...

    async def measure_path(self, session_id: str, turn_id: str) -> LeftOut:
        """The size in a prompt of all turns from the root to ``turn_id``.

        Nothing if the turn does not exist. Reads (almost) no texts. Reads deleted and expired sessions, too.
        """
        ...

    async def find_on_path(self, session_id: str, turn_id: str, *, among: Collection[str]) -> set[str]:
        """Those of some turns that are on the path to ``turn_id``. Reads no texts.

        Empty if ``turn_id`` does not exist. Looks into deleted and expired sessions, too.
        """
        ...

    async def list_path(
        self, session_id: str, turn_id: str, *, limit: int, first: str | None, bytes_max: int | None = None
    ) -> Sequence[TurnRecord]:
        """At most ``limit`` turns of the path from the root to ``turn_id``, in that order: from ``first`` on.

        ``first`` is the id of a turn; None stands for the root. Empty if ``first`` is not on this path, or if
        ``turn_id`` does not exist. Reads the texts of these turns only. Reads deleted and expired sessions, too.

        With ``bytes_max`` the turns end before the one with which their ``text_bytes`` would be more than that, but
        the first two are always there: a page of messages may begin after all messages of the first one.
        """
        ...

    async def read_events(
        self, session_id: str, turn_id: str, *, after: int = 0, length_max: int = PAGE_LENGTH_MAX
    ) -> EventsPage:
        """A page of a turn's events: those that follow the seq ``after``, at least one if there is one.

        An open turn has only those of its checkpoints, if any. An ended turn has fewer events than its ``last_seq``
        says if a crash lost some of them or none were kept; it has none if an item of its reply was deleted. Reads
        deleted and expired sessions, too. The cost depends on the page, not on the turn.

        Args:
            length_max: The approximate bound on the code points of the page's text, unless a single piece is longer.
        """
        ...

    async def find_owner(self, session_id: str) -> Owner | None:
        """The owner of a session's open turns, if it is another owner; None if it is this one, if there are no open
        turns, or if these are suspended.

        Does not check whether that owner lives. Reads deleted and expired sessions, too.
        """
        ...

    async def recover(self, *, now: datetime, after_step: Callable[[], None] | None = None) -> int:
        """After a crash: end open turns whose owner is gone as ``interrupted`` (``crash``), finish deletions.

        Called at start, before any turn, and again whenever an owner may have died; safe beside other owners.
        Each such turn keeps the output and events of its last checkpoint, and its ``last_seq`` becomes
        :func:`~service.storage.rules.seq_after_crash`, higher than any seq that was ever sent. For its
        session it is an end like any other: a use at ``now``, and no longer an open turn. Returns how many
        turns it ended.

        A turn that may have another attempt (:func:`~service.storage.rules.resumes`) does not end: it is suspended with
        what was kept of it. The seq of the next attempt's resumption follows ``last_seq``, which becomes higher than
        any seq that was ever sent, too.

        Args:
            after_step: Called after each step. Each step is short; their number depends on the number of turns.
        """
        ...

    async def aclose(self) -> None:
        """Flush and close. May be cancelled; acknowledged writes are kept in any case."""
        ...
