"""The deletion of a session: mark the session as deleted, end its turns, remove its rows.

The outcome of each of the two writes may be unknown: a store that did not answer in time may still do the write later.
Until the outcome is known, this module remembers the session's id, and :meth:`Deletions.resolve` asks the store.
"""

from collections.abc import Collection

import structlog
import trio

from service.clock import Clock
from service.errors import LastcallError, PreconditionFailedError, RefusedError, StoreError
from service.freezes import move_on_after
from service.ids import public_id
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.active.session import ActiveSession, Deletion
from service.sessions.events import outcome
from service.sessions.titles import Titles
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.deletion")

UNRESOLVED_MAX = 10_000
"""Bound on deletions that are under way or have an unknown outcome; beyond it new deletions are refused."""


class Deletions:
    """Deletes sessions.

    Args:
        nursery: The nursery of the sessions supervisor, so that a deletion continues when its caller leaves.

    Attributes:
        callers_waiting: How many callers wait for a deletion.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        active: ActiveSessions,
        pending_writes: PendingWrites,
        titles: Titles,
        *,
        store: Store,
        clock: Clock,
        store_timeout_s: float,
    ) -> None:
        self.callers_waiting = 0
        self._nursery = nursery
        self._active = active
        self._pending_writes = pending_writes
        self._titles = titles
        self._store = store
        self._clock = clock
        self._store_timeout_s = store_timeout_s
        self._unresolved: set[str] = set()
        """The sessions that this process has marked, or may have marked, as deleted in the store."""

    def is_under_way(self, session_id: str) -> bool:
        """Whether a deletion of a session is under way and certain (:attr:`ActiveSession.is_deleted`)."""
        session = self._active.find(session_id)
        return session is not None and session.is_deleted

    async def delete(self, session_id: str, *, within_s: float, revisions: Collection[str] | None = None) -> None:
        """Delete a session, as :meth:`~service.sessions.sessions.Sessions.delete_session` says.

        Cancellation, and the end of ``within_s``, affect the caller alone.
        """
        self.callers_waiting += 1
        try:
            with move_on_after(within_s) as wait:
                error = await self._wait_deleted(session_id, revisions)
        finally:
            self.callers_waiting -= 1
        if wait.cancelled_caught:
            raise StoreError(
                f"Session {public_id(session_id)!r} is being deleted, which takes longer than usual; try again."
            )
        if error is not None:
            raise error

    async def _wait_deleted(self, session_id: str, revisions: Collection[str] | None) -> Exception | None:
        """Wait for the deletion of a session, which begins unless one is under way. Returns the deletion's error.

        A deletion that another caller has begun, and that was refused for the revisions of that caller, says nothing
        about this call: then a deletion for this call begins.
        """
        while True:
            with self._active.holding(session_id) as session:
                begins = session.deletion is None
                deletion = session.deletion or self._begin(session, revisions)
            await deletion.ended.wait()
            if begins or not isinstance(deletion.error, PreconditionFailedError):
                return deletion.error

    async def resolve(self) -> None:
        """Ask the store for the unknown outcomes, and finish the deletions of sessions that are marked.

        A session that the store did not mark exists and is usable as before.

        Raises:
            StoreError: The store does not answer; the other deletions wait for the next call.
        """
        for session_id in list(self._unresolved):
            with self._active.holding(session_id) as session:
                # Without the lock, an old answer of the store could decide a deletion that began after the question.
                async with session.acceptance:
                    if (
                        session.deletion is None
                        and session_id in self._unresolved
                        and await self._is_marked(session_id)
                    ):
                        logger.info("a deletion with an unknown outcome is finished", session_id=session_id)
                        self._begin(session)

    def _begin(self, session: ActiveSession, revisions: Collection[str] | None = None) -> Deletion:
        deletion = session.deletion = Deletion(revisions)
        self._nursery.start_soon(self._run, session, deletion, name=f"delete {session.id}")
        return deletion

    async def _run(self, session: ActiveSession, deletion: Deletion) -> None:
        """The task of a deletion. A failure reaches the callers that wait for it; a later deletion begins anew."""
        try:
            async with session.acceptance:
                await self._mark(session.id, deletion.revisions)
                deletion.is_certain = True
            self._titles.cancel(session.id)
            for turn in session.turns:
                turn.cut_short(outcome.Cancelled("session_deleted"))
            await session.wait_without_turns()
            self._pending_writes.discard_ends_of(session.id)
            with self._pending_writes.writing():
                await self._store.remove_deleted(session.id)
            self._unresolved.discard(session.id)
            deletion.error = None
        except LastcallError as error:
            deletion.error = error
        except Exception as error:
            logger.exception("deletion crashed", session_id=session.id)
            deletion.error = error
        finally:
            deletion.ended.set()
            session.deletion = None
            self._active.forget_without_work(session)

    async def _mark(self, session_id: str, revisions: Collection[str] | None) -> None:
        """Mark a session as deleted, unless an earlier attempt has done so.

        Raises:
            SessionNotFoundError, OwnedElsewhereError, PreconditionFailedError
            StoreError: The outcome is unknown; the session's id is remembered.
        """
        if session_id in self._unresolved and await self._is_marked(session_id):
            return
        if len(self._unresolved) >= UNRESOLVED_MAX:
            raise StoreError("The store has not answered too many deletions yet; try again later.")
        self._unresolved.add(session_id)
        try:
            with self._pending_writes.writing():
                await self._store.mark_deleted(session_id, now=self._clock(), revisions=revisions)
        except RefusedError:
            self._unresolved.discard(session_id)
            raise

    async def _is_marked(self, session_id: str) -> bool:
        """Ask the store for the outcome of an earlier attempt. Raises: StoreError."""
        with answered_within(self._store_timeout_s):
            marked = await self._store.is_marked(session_id)
        if not marked:
            self._unresolved.discard(session_id)
        return marked
