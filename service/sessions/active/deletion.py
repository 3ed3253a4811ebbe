"""The deletion of a session: gone for everybody at once, then its turns end, then its rows go.

Each of the two writes may have an outcome that is unknown: the store did not answer in time, and does it later or
never. Until the store has told, the session's id is remembered here, and :meth:`Deletions.settle` asks.
"""

import structlog
import trio

from service.clock import Clock
from service.errors import LastcallError, RefusedError, StoreError
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.active.session import ActiveSession, Deletion
from service.sessions.events import outcome
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.deletion")

UNSETTLED_MAX = 10_000
"""Deletions whose outcome is unknown, or that are under way; beyond it new ones are refused."""


class Deletions:
    """Deletes sessions.

    Args:
        nursery: The sessions supervisor's own: a deletion goes on though its caller leaves.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        active: ActiveSessions,
        pending_writes: PendingWrites,
        *,
        store: Store,
        clock: Clock,
        store_timeout_s: float,
    ) -> None:
        self._nursery = nursery
        self._active = active
        self._pending_writes = pending_writes
        self._store = store
        self._clock = clock
        self._store_timeout_s = store_timeout_s
        self._unsettled: set[str] = set()
        """The sessions that are marked as deleted in the store, or may be, by this process."""

    def has_begun(self, session_id: str) -> bool:
        """Whether the deletion of a session is under way: it is to be found no more, whatever the store says yet."""
        session = self._active.find(session_id)
        return session is not None and session.deletion is not None

    async def delete(self, session_id: str) -> None:
        """Delete a session, as :meth:`~service.sessions.sessions.Sessions.delete_session` says.

        Cancellation affects the caller alone.
        """
        with self._active.holding(session_id) as session:
            deletion = session.deletion or self._begin(session)
        await deletion.ended.wait()
        if deletion.error is not None:
            raise deletion.error

    async def settle(self) -> None:
        """Ask the store what has become of the deletions whose outcome is unknown, and begin to finish those.

        A session that the store did not mark in the end is there and usable as before.

        Raises:
            StoreError: The store does not answer; the rest is left to the next time.
        """
        for session_id in list(self._unsettled):
            with self._active.holding(session_id) as session:
                # The lock: a deletion that begins meanwhile would be taken for settled by an answer from before.
                async with session.acceptance:
                    if session.deletion is None and session_id in self._unsettled and await self._is_marked(session_id):
                        logger.info("a deletion whose outcome was unknown is finished", session_id=session_id)
                        self._begin(session)

    def _begin(self, session: ActiveSession) -> Deletion:
        deletion = session.deletion = Deletion()
        self._nursery.start_soon(self._run, session, deletion, name=f"delete {session.id}")
        return deletion

    async def _run(self, session: ActiveSession, deletion: Deletion) -> None:
        """Its task. A failure is told to those who wait for it and ends nothing else; a later deletion begins anew."""
        try:
            async with session.acceptance:
                await self._mark(session.id)
            for turn in session.turns:
                turn.cut_short(outcome.Cancelled("session_deleted"))
            await session.wait_without_turns()
            self._pending_writes.forget_ends_of(session.id)
            with self._pending_writes.writing():
                await self._store.remove_deleted(session.id)
            self._unsettled.discard(session.id)
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

    async def _mark(self, session_id: str) -> None:
        """Have a session marked as deleted, by an earlier attempt or now.

        Raises:
            SessionNotFoundError, OwnedElsewhereError
            StoreError: Whether it is marked is unknown, and is remembered to be.
        """
        if session_id in self._unsettled and await self._is_marked(session_id):
            return
        if len(self._unsettled) >= UNSETTLED_MAX:
            raise StoreError("The store has not answered too many deletions yet; try again later.")
        self._unsettled.add(session_id)
        try:
            with self._pending_writes.writing():
                await self._store.mark_deleted(session_id, now=self._clock())
        except RefusedError:
            self._unsettled.discard(session_id)
            raise

    async def _is_marked(self, session_id: str) -> bool:
        """Ask the store for the outcome of an earlier attempt; the answer settles it. Raises: StoreError."""
        with answered_within(self._store_timeout_s):
            marked = await self._store.is_marked(session_id)
        if not marked:
            self._unsettled.discard(session_id)
        return marked
