"""The protocol that every store meets; ``tests/storage/test_store_contract.py`` is its definition.

Each method is one atomic step: a reader sees all of it or nothing, and a caller that is cancelled
leaves all of it or nothing behind (it cannot know which). Everything that decides something takes
what it decides on as arguments and checks it in the same step as the write, so that several
processes may share a store.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from service.storage.records import (
    Page,
    SessionPatch,
    SessionRecord,
    SessionStatus,
    TurnRecord,
)


class Store(Protocol):
    """Where sessions and turns are kept.

    A session that is marked as deleted, or has expired at ``now``, is not there for any reader.

    Every method raises :class:`~service.errors.StoreError` where the store refuses or breaks.
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

    # Sessions

    async def create_session(self, session: SessionRecord, *, now: datetime) -> None:
        """Add a session. An expired one of the same id is replaced, with all that belongs to it.

        Raises:
            SessionExistsError: The id is taken, or its deletion is not finished.
        """
        ...

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        """Raises: SessionNotFoundError."""
        ...

    async def list_sessions(
        self, *, limit: int, after: str | None, status: SessionStatus | None, now: datetime
    ) -> Page[SessionRecord]:
        """A page of sessions, newest first, stable while sessions come and go.

        ``after`` is the ``next`` of the page before; one that is not ours raises InvalidRequestError.
        """
        ...

    async def count_sessions(self, *, status: SessionStatus | None, now: datetime) -> int:
        """How many sessions a complete listing would have."""
        ...

    async def update_session(self, session_id: str, patch: SessionPatch, *, now: datetime) -> SessionRecord:
        """Apply a patch and move the deadline to ``now`` plus the session's idle timeout.

        Raises:
            SessionNotFoundError
        """
        ...

    async def mark_deleted(self, session_id: str, *, now: datetime) -> None:
        """Hide a session from every reader, for good, before its turns are ended.

        Raises:
            SessionNotFoundError
        """
        ...

    async def remove_deleted(self, session_id: str) -> None:
        """Remove a marked session, its turns and their events. Idempotent."""
        ...

    async def delete_expired(self, *, now: datetime, limit: int) -> int:
        """Remove at most ``limit`` sessions that have expired at ``now``; how many it removed.

        The look and the delete are one step: a session that was used in between stays.
        """
        ...

    # Turns

    async def begin_turn(self, turn: TurnRecord, *, now: datetime) -> SessionRecord:
        """Accept a turn: keep it and its input, make it the head, move the session's deadline.

        ``turn.state`` is ``queued`` or ``running``. Returns the session after it.

        Raises:
            SessionNotFoundError
            TurnNotFoundError: ``turn.parent`` is not a turn of this session.
        """
        ...

    async def start_turn(self, turn_id: str, *, now: datetime) -> None:
        """A queued turn has begun to run. Does nothing if it is not queued."""
        ...

    async def end_turn(self, turn: TurnRecord, *, events: Sequence[bytes], now: datetime) -> bool:
        """Keep a turn's end, its output and its encoded events, and move the session's deadline.

        The first end wins: False, and nothing changes, if the turn has ended or is gone.
        Also works on a session that is marked as deleted.
        """
        ...

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        """Raises: SessionNotFoundError, TurnNotFoundError."""
        ...

    async def list_turns(
        self, session_id: str, *, limit: int, after: str | None, now: datetime
    ) -> Page[TurnRecord]:
        """A page of all turns of a session, oldest first."""
        ...

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        """The turns from the root to ``turn_id``, in that order.

        With ``bytes_max``, only the newest whose texts (UTF-8) stay within it, but always the last.
        Empty if the turn is not there.
        """
        ...

    async def read_events(self, session_id: str, turn_id: str) -> Sequence[bytes]:
        """The encoded events of an ended turn, seq 1 first; empty if none were kept."""
        ...

    async def recover(self, *, now: datetime) -> int:
        """After a crash: end open turns whose owner is gone as ``interrupted`` (``crash``), finish deletions.

        Called once at start, before any turn. Returns how many turns it ended.
        """
        ...

    async def aclose(self) -> None:
        """Flush and close. May be cancelled; what was acknowledged is kept all the same."""
        ...
