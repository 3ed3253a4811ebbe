"""The protocol that every store meets; ``tests/storage/test_store_contract.py`` is its definition.

Each method is one atomic step: a reader sees all of it or nothing, and a caller that is cancelled
leaves all of it or nothing behind (it cannot know which). Returning is the acknowledgement: what a
method wrote is then as safe as the store ever makes it; how many steps share one commit is the
store's affair. Everything that decides something takes what it decides on as arguments and checks it
in the same step as the write, so that several processes may share a store.

An open store is one owner. The turns that it began are its own until they end, it is closed or its
process dies; only then may another owner's :meth:`Store.recover` end them. All open turns of a session
have one owner: to any other the store refuses a new one and says whose they are.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from service.storage.records import (
    Checkpoint,
    LeftOut,
    Owner,
    Page,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    TurnRecord,
)


class Store(Protocol):
    """Where sessions and turns are kept.

    A session that is marked as deleted, or has expired at ``now``, is not there for any method that
    takes ``now``, unless it says otherwise. ``now`` is an aware datetime; stores have no clock of
    their own. Ids of turns are unique among all sessions. Every ``limit`` is at least 1.

    A session is *used* at ``now`` by what accepts or ends a turn and by a patch, never by a read:
    ``last_accessed_at`` becomes ``now``, ``expires_at`` becomes ``now`` plus its idle timeout.

    Every method raises :class:`~service.errors.StoreError` where the store refuses or breaks. Whether
    such a step has happened is then as unknown as for one that was cancelled. It may even happen
    later, but never after a write that the same owner asks for next: the writes of an owner, and
    :meth:`is_marked`, have an order, so that a later one finds the outcome of an earlier one settled.
    Waiting is the caller's to bound. ``aclose`` flushes and closes; nothing may be called after it.
    """

    @property
    def name(self) -> str:
        """What and where, for the banner; without secrets."""
        ...

    @property
    def durable(self) -> bool:
        """Whether it outlives the process."""
        ...

    @property
    def peer_secret(self) -> bytes:
        """What the processes that share this store know, and no others. It is no part of a copy of what is kept."""
        ...

    # Sessions

    async def create_session(self, session: SessionRecord, *, now: datetime) -> None:
        """Add a session. An expired one of the same id is replaced, with all that belongs to it.

        Raises:
            SessionExistsError: The id is taken, or its deletion is not finished.
            SessionLimitError: The store keeps no more sessions; :meth:`fork_session` raises it, too.
        """
        ...

    async def fork_session(self, source_id: str, *, at: str | None, copy_id: str, now: datetime) -> SessionRecord:
        """Add a session with the settings of another one and copies of its turns from the root to ``at``.

        Without ``at`` that is the source's head; a source without turns gives a copy without any. The copies have
        ids of their own, their items too, and the same events: an event that names its session or turn names the
        source's. The totals of the session are those of its turns. It is no use of the source; an expired session of
        the new id is replaced. Returns the copy.

        Raises:
            SessionNotFoundError: The source.
            TurnNotFoundError: ``at`` is not a turn of the source.
            TurnInProgressError: A turn that would be copied is open.
            OwnedElsewhereError: It is open, and another owner's; whether that one lives is not looked at.
            SessionExistsError: As :meth:`create_session`.
            InvalidRequestError: It is more than :mod:`service.storage.fork_path` allows (``field`` is ``at``).
        """
        ...

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        """Raises: SessionNotFoundError."""
        ...

    async def list_sessions(
        self, *, limit: int, after: str | None, status: SessionStatus | None, now: datetime
    ) -> Page[SessionRecord]:
        """A page of sessions, newest first (by ``created_at``, then ``id``).

        Stable while sessions come and go: one that is there from the first page to the last is in
        exactly one of them. ``after`` is the ``next`` of the page before, and stays good when the
        sessions around it are gone.

        Raises:
            InvalidRequestError: ``after`` is not a cursor of this listing (``field`` is ``after``).
        """
        ...

    async def count_sessions(self, *, status: SessionStatus | None, now: datetime) -> int:
        """How many sessions a complete listing would have."""
        ...

    async def update_session(self, session_id: str, patch: SessionPatch, *, now: datetime) -> SessionRecord:
        """Apply a patch and count it as a use; a new idle timeout holds at once. Returns the session after it.

        Raises:
            SessionNotFoundError
        """
        ...

    async def mark_deleted(self, session_id: str, *, now: datetime) -> None:
        """Hide a session from every reader, for good, before its turns are ended.

        Raises:
            SessionNotFoundError
            OwnedElsewhereError: Its open turns are another owner's that lives, whose the deletion is then.
        """
        ...

    async def is_marked(self, session_id: str) -> bool:
        """Whether a session is marked as deleted by this owner and not removed yet.

        Answered in the order of this owner's writes: a :meth:`mark_deleted` or :meth:`remove_deleted` whose outcome
        is unknown has happened by then, or never will.
        """
        ...

    async def remove_deleted(self, session_id: str) -> None:
        """Remove a marked session, its turns and their events; the id is free then.

        Idempotent: does nothing to a session that is not marked. Turns that are still open go too.
        """
        ...

    async def delete_expired(self, *, now: datetime, limit: int) -> int:
        """Remove at most ``limit`` sessions that have expired at ``now``; how many it removed.

        The look and the delete are one step: a session that was used in between stays. Those that
        have been expired longest go first, and the cost follows what has expired, not what is kept. Of
        several owners the one that has been there longest does it; for the others it is 0.
        """
        ...

    # Turns

    async def begin_turn(
        self, turn: TurnRecord, *, now: datetime, head: str | None | msgspec.UnsetType = msgspec.UNSET
    ) -> SessionRecord:
        """Accept a turn: keep it and its input, make it the head, count it as a use.

        ``turn.state`` is ``queued`` or ``running``, its id new. ``open_turns`` grows by one,
        ``message_count`` by the input's messages. Returns the session after it.

        Args:
            head: What the session's head has to be, where ``turn.parent`` was chosen by it.

        Raises:
            SessionNotFoundError
            HeadMovedError: It is another one.
            TurnNotFoundError: ``turn.parent`` is not a turn of this session; it may be an open one.
            OwnedElsewhereError: The session's open turns are another owner's that lives. (Those of one that is
                gone are recovered in the same step.)
        """
        ...

    async def start_turn(self, turn_id: str, *, now: datetime) -> None:
        """A queued turn has begun to run: ``started_at`` is ``now``. Does nothing if it is not queued."""
        ...

    async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Keep what running turns grew by, in case this owner dies before their ends.

        No use of a session, and nothing that :meth:`get_turn` shows before :meth:`recover` did. A checkpoint of a
        turn that is not open, or not this owner's, is passed over. After a call that was cancelled or failed the
        same ``after`` is to be given again: what had been kept beyond it is replaced.
        """
        ...

    async def end_turn(self, turn: TurnRecord, *, events: Sequence[bytes], now: datetime, after: int = 0) -> bool:
        """Keep a turn's end, its output and its encoded events, and count it as a use.

        ``turn`` is the whole record: as it was accepted, and how it ended. ``open_turns`` shrinks by
        one, ``message_count`` grows by one if the turn has a text, the totals by its usage.
        The first end wins: False, and nothing changes, if the turn has ended, is gone or is not this owner's.
        Also works on a session that is marked as deleted.

        Args:
            events: Those that follow ``after``, without gaps, the terminal event last; or none.
            after: The seq of the last event of the last checkpoint that was acknowledged.
        """
        ...

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        """Raises: SessionNotFoundError, TurnNotFoundError."""
        ...

    async def list_turns(self, session_id: str, *, limit: int, after: str | None, now: datetime) -> Page[TurnRecord]:
        """A page of all turns of a session, in the order of their acceptance.

        Paged as :meth:`list_sessions`.

        Raises:
            SessionNotFoundError
            InvalidRequestError: ``after`` is not a cursor of this listing.
        """
        ...

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        """The turns from the root to ``turn_id``, in that order.

        With ``bytes_max``, only the newest whose ``message_bytes`` stay within it in all, but always
        the last. Empty if the turn is not there. Looks at what is kept: a turn that runs goes on
        while its session is marked as deleted.
        """
        ...

    async def measure_path(self, session_id: str, turn_id: str) -> LeftOut:
        """What the turns from the root to ``turn_id`` bring into a prompt, in all.

        Nothing if the turn is not there. Reads no texts, or next to none. Looks at what is kept.
        """
        ...

    async def list_path(self, session_id: str, turn_id: str, *, limit: int, first: str | None) -> Sequence[TurnRecord]:
        """At most ``limit`` turns of the path from the root to ``turn_id``, in that order: from ``first`` on.

        ``first`` is the id of a turn; None stands for the root. Empty if it is not on that path, or the turn is not
        there. Reads the texts of those turns alone. Looks at what is kept.
        """
        ...

    async def read_events(self, session_id: str, turn_id: str) -> Sequence[bytes]:
        """The encoded events of an ended turn: seq 1 first, without gaps. Looks at what is kept.

        Fewer than the turn's ``last_seq`` where a crash took the rest or none were kept: the terminal
        event is not among them then, and the turn's record says what it was.
        """
        ...

    async def find_owner(self, session_id: str) -> Owner | None:
        """Who runs the open turns of a session, if that is another owner; None where it is this one or nobody.

        Whether it still lives is not looked at. Looks at what is kept.
        """
        ...

    async def recover(self, *, now: datetime, after_step: Callable[[], None] | None = None) -> int:
        """After a crash: end open turns whose owner is gone as ``interrupted`` (``crash``), finish deletions.

        Called at start, before any turn, and again whenever an owner may have died; safe beside other owners.
        Each such turn keeps the output and events of its last checkpoint, and its ``last_seq`` becomes
        :data:`~service.storage.records.SEQ_AFTER_CRASH`, higher than any seq that was ever sent. For its
        session it is an end like any other: a use at ``now``, and no longer an open turn. Returns how many
        turns it ended.

        Args:
            after_step: Called after each step: there are as many as there is to end, and each is short.
        """
        ...

    async def aclose(self) -> None:
        """Flush and close. May be cancelled; what was acknowledged is kept all the same."""
        ...
