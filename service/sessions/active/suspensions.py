"""Suspended turns: what a stop interrupts and another process, or the next start, goes on with.

Their growth goes to the store in one step for many turns that wait at the same time, not in one for each: a stop ends
hundreds of turns at once. Large replies go in several steps, one after the other, so that the first ones are kept when
the time is over. A turn that the store does not take in time stays this owner's in the store. The next process finds it
there as after a crash, so nothing is lost but the growth since the last checkpoint.
"""

from collections.abc import Iterable, Sequence

import structlog
import trio

from service.clock import Clock
from service.errors import StoreError
from service.freezes import extended_when_late
from service.sessions.turns.turn import Turn
from service.steps import Steps, in_steps
from service.storage.records import SuspendedTurn
from service.storage.store import Store
from service.telemetry.refusal_log import causes_of

logger = structlog.get_logger("lastcall.suspension")

_BATCH_MAX = 256
"""Turns that one step of the store takes; a larger step would delay other writes."""
_BATCH_BYTES_MAX = 1024 * 1024
"""The approximate growth since the last checkpoints that one step takes, or that of one turn."""
_BATCH_LOG_BYTES_MAX = 4 * 1024 * 1024
"""The approximate size of the whole replies that one step takes, which are in memory once more, or that of one turn."""


class Suspensions:
    """Suspends turns, many in one step of the store.

    Attributes:
        not_kept: How many turns were left that the store has not released: they go on once this process is gone.
    """

    def __init__(self, store: Store, *, clock: Clock) -> None:
        self.not_kept = 0
        self._store = store
        self._clock = clock
        self._waiting: dict[str, Turn] = {}
        self._is_writing = False
        self._changes = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Suspensions: {len(self._waiting)} turns wait>"

    async def suspend(self, turn: Turn, *, within_s: float) -> None:
        """Give a turn, whose work has stopped, to the store, and close its log. Only ``within_s`` ends the wait."""
        self._waiting[turn.id] = turn
        with (
            trio.CancelScope(deadline=trio.current_time() + within_s, shield=True) as scope,
            extended_when_late(scope, timeout_s=within_s),
        ):
            await trio.lowlevel.checkpoint()  # the turns that stop now come in this round
            while turn.id in self._waiting:
                if self._is_writing:
                    await self._changes.park()
                else:
                    await trio.lowlevel.checkpoint_if_cancelled()  # the time of many turns ends at the same moment
                    await self._write_some()
        self._leave([turn], are_kept=False)  # has no effect if the store has answered

    def leave_unkept(self, turn: Turn) -> None:
        """Close the log of a turn whose task is gone, so that the store does not learn of it."""
        self._leave([turn], are_kept=False)

    async def _write_some(self) -> None:
        """Give the turns that wait to the store, as many as one step takes."""
        turns = _first_of(self._waiting.values())
        self._is_writing = True
        try:
            kept = await in_steps(_kept(turns))
            lost = await self._store.suspend_turns(kept, now=self._clock())
        except StoreError as error:
            self._note_failed(turns, error=str(error), cause=causes_of(error))
        except Exception as error:
            logger.exception("suspending turns failed", turns=len(turns))
            self._note_failed(turns, error=repr(error))
        else:
            for turn in turns:
                turn.is_lost = turn.id in lost
            self._leave(turns, are_kept=True)
            if len(turns) > len(lost):
                logger.info(
                    "turns suspended: another process, or the next start, goes on with them",
                    turns=len(turns) - len(lost),
                )
        finally:
            self._is_writing = False
            self._changes.unpark_all()

    def _note_failed(self, turns: Sequence[Turn], **why: object) -> None:
        self._leave(turns, are_kept=False)
        logger.warning("the store did not take suspended turns: they go on later, or once this process is gone", **why)

    def _leave(self, turns: Sequence[Turn], *, are_kept: bool) -> None:
        for turn in turns:
            self._waiting.pop(turn.id, None)
            if not turn.is_suspended:
                turn.is_unreleased = not (are_kept or turn.is_lost)
                self.not_kept += turn.is_unreleased
                turn.leave()


def _first_of(turns: Iterable[Turn]) -> list[Turn]:
    """The first turns, as many as one step of the store takes: at least one."""
    first: list[Turn] = []
    growth = size = 0
    for turn in turns:
        growth += turn.log.size_after(turn.stored_seq)
        size += turn.log.size
        if first and (growth > _BATCH_BYTES_MAX or size > _BATCH_LOG_BYTES_MAX or len(first) == _BATCH_MAX):
            break
        first.append(turn)
    return first


def _kept(turns: Sequence[Turn]) -> Steps[list[SuspendedTurn]]:
    """What the store keeps of turns, to whose logs nothing is appended."""
    kept: list[SuspendedTurn] = []
    for turn in turns:
        texts = yield from turn.log.joined_texts()
        kept.append(turn.suspended(texts))
        yield
    return kept
