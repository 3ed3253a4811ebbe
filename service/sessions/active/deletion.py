"""The deletion of a session: gone for everybody at once, then its turns end, then its rows go."""

import structlog
import trio

from service.errors import LastcallError
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.active.session import ActiveSession, Deletion
from service.sessions.events import outcome

logger = structlog.get_logger("lastcall.deletion")


class Deletions:
    """Deletes sessions.

    Args:
        nursery: The sessions supervisor's own: a deletion goes on though its caller leaves.
    """

    def __init__(self, nursery: trio.Nursery, active: ActiveSessions, pending_writes: PendingWrites) -> None:
        self._nursery = nursery
        self._active = active
        self._pending_writes = pending_writes

    def has_begun(self, session_id: str) -> bool:
        """Whether the deletion of a session is under way: it is to be found no more, whatever the store says yet."""
        session = self._active.find(session_id)
        return session is not None and session.deletion is not None

    async def delete(self, session_id: str) -> None:
        """Delete a session, as :meth:`~service.sessions.sessions.Sessions.delete_session` says.

        Cancellation affects the caller alone.
        """
        with self._active.holding(session_id) as session:
            deletion = session.deletion
            if deletion is None:
                deletion = session.deletion = Deletion()
                self._nursery.start_soon(self._run, session, deletion, name=f"delete {session_id}")
        await deletion.ended.wait()
        if deletion.error is not None:
            raise deletion.error

    async def _run(self, session: ActiveSession, deletion: Deletion) -> None:
        """Its task. A failure is told to those who wait for it and ends nothing else; a later deletion begins anew."""
        try:
            async with session.acceptance:
                await self._pending_writes.mark(session.id)
            for turn in session.turns:
                turn.cut_short(outcome.Cancelled("session_deleted"))
            await session.wait_without_turns()
            self._pending_writes.forget_ends_of(session.id)
            await self._pending_writes.remove(session.id)
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
