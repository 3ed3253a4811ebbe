"""Pending writes: ends of turns that the store refused, kept in memory until the store takes them.

Their number is bounded, because such an end counts as a live turn.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import msgspec
import structlog
import trio

from service.clock import Clock
from service.errors import EditedMeanwhileError, SessionLimitError, StoreError
from service.ids import new_session_id
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_log import log_end
from service.storage.records import SessionRecord
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.pending_writes")

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
"""An earlier time than any clock may be set back to."""


class PendingWrites:
    """The pending writes, and whether the store takes writes now.

    Attributes:
        refusal: Why the store refused the last write; None if the store took it. :meth:`retry` checks this again.
    """

    def __init__(self, store: Store, *, clock: Clock, store_timeout_s: float) -> None:
        self.refusal: StoreError | None = None
        self._store = store
        self._clock = clock
        self._store_timeout_s = store_timeout_s
        self._ends: dict[str, Turn] = {}
        self._given_up: dict[str, str] = {}
        """The sessions of the turns whose ends this process will never store, because of a fault of its own."""

    @contextmanager
    def writing(
        self, *, within_s: float | None = None, shield: bool = False, late_is_refused: bool = True
    ) -> Iterator[None]:
        """Bound one write to the store, and note its outcome in :attr:`refusal`. Raises: StoreError.

        Args:
            within_s: How long the write may take; ``store_timeout_s`` unless given.
            late_is_refused: Whether a write that is not done by then was refused. A write that had less than its time
                says nothing of the store.
            shield: Whether only this bound ends the write, and no cancellation from outside.
        """
        try:
            with answered_within(self._store_timeout_s if within_s is None else within_s, shield=shield):
                yield
        except EditedMeanwhileError:
            raise
        except StoreError as error:
            if late_is_refused or not isinstance(error.__cause__, trio.TooSlowError):
                self.refusal = error
            raise
        self.refusal = None

    # Ends of turns

    def add_end(self, turn: Turn) -> None:
        """Keep an end that is not in the store, and publish the end if the turn has not done so.

        That of a turn that outlives its process is not told before the store has it.
        """
        self.refusal = self.refusal or StoreError("The store did not take the end of a turn.")
        if not turn.ended.is_set():
            record = turn.finish(self._clock())
            if turn.outlives:
                turn.leave(record)
            else:
                turn.conclude(record, stored=False)
                log_end(turn)
        self._ends[turn.id] = turn

    @property
    def turns(self) -> int:
        """How many turns have an end that is not in the store."""
        return len(self._ends)

    def find_turn(self, session_id: str, turn_id: str) -> Turn | None:
        """The turn, if its end is a pending write."""
        turn = self._ends.get(turn_id)
        return turn if turn is not None and turn.session_id == session_id else None

    def has_end_of(self, turn_id: str) -> bool:
        return turn_id in self._ends

    def ended_in(self, session_id: str) -> list[str]:
        """The turns of a session that have ended here, though the store has them as open ones: none may run again."""
        given_up = [turn_id for turn_id, it in self._given_up.items() if it == session_id]
        return [turn.id for turn in self._ends_of(session_id)] + given_up

    def discard_ends_of(self, session_id: str) -> None:
        """Drop the ends of a session that is deleted."""
        self._given_up = {turn_id: it for turn_id, it in self._given_up.items() if it != session_id}
        for turn in self._ends_of(session_id):
            del self._ends[turn.id]
            turn.settle(is_kept=True)

    def _ends_of(self, session_id: str) -> list[Turn]:
        return [turn for turn in self._ends.values() if turn.session_id == session_id]

    # Once more

    async def retry(self) -> None:
        """Try all pending writes again.

        A write that is refused again, or not tried because the caller was cancelled, stays pending. Two calls may run
        at the same time. If the last write was refused, a test write at the end finds out whether the store takes
        writes.

        Raises:
            StoreError: The last refusal, if there was one.
        """
        refusal: StoreError | None = None
        for turn in list(self._ends.values()):
            try:
                await self._store_end(turn)
            except StoreError as error:
                refusal = error
        if self.refusal is not None:
            await self._try_to_write()
        if refusal is not None:
            raise refusal

    async def retry_ends_of(self, session_id: str) -> None:
        """Try the pending ends of one session again, before its next turn. Raises: StoreError, at the first refusal."""
        for turn in self._ends_of(session_id):
            await self._store_end(turn)

    async def _store_end(self, turn: Turn) -> None:
        """Store an end, unless the store has it already or the turn never began there.

        Earlier writes that were not answered in time have been done by then, or will never be done.

        Raises:
            StoreError
        """
        runs = turn.log.runs()
        record = msgspec.structs.replace(turn.untold or turn.record(), stored=True)
        is_kept = is_given_up = False
        try:
            with self.writing():
                result = await self._store.end_turn(record, runs=runs, now=self._clock(), after=turn.stored_seq)
            is_kept = result.is_kept
            turn.stored = turn.stored or is_kept
        except StoreError:
            raise
        except Exception:
            logger.exception("storing the end of a turn failed; giving this write up", turn_id=turn.id)
            is_given_up = True
        if self._ends.pop(turn.id, None) is not None:  # and not another call
            if is_given_up:
                self._given_up[turn.id] = turn.session_id
            turn.settle(is_kept=is_kept)

    async def _try_to_write(self) -> None:
        """Make a test write that no caller can see: a session that has expired already. Raises: StoreError."""
        now = self._clock()
        unseen = SessionRecord(
            id=new_session_id(), created_at=now, last_accessed_at=now, expires_at=_LONG_AGO, idle_timeout_s=1
        )
        with self.writing(), suppress(SessionLimitError):  # a full store works
            await self._store.create_session(unseen, now=now)
