"""The checkpoint loop: keeps what running turns grew by, so that a crash takes little of them.

Nobody waits for it. An error in it is logged and it goes on; the next checkpoint brings what that one did not.
"""

from collections.abc import Callable, Iterator, Sequence

import structlog
import trio

from service.errors import StoreError
from service.sessions.turns.turn import Turn
from service.storage.records import Checkpoint
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.checkpoints")

_BATCH_BYTES_MAX = 2 * 1024 * 1024
"""What one call to the store brings, about: more would keep other writes waiting."""


async def run_checkpoints(
    store: Store,
    *,
    open_turns: Callable[[], Sequence[Turn]],
    interval_s: float,
    store_timeout_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Every ``interval_s`` keep the progress of all turns that made some. Runs until cancelled."""
    task_status.started()
    while True:
        await trio.sleep(interval_s)
        try:
            await checkpoint_turns(store, open_turns(), store_timeout_s=store_timeout_s)
        except StoreError as error:
            logger.warning("a checkpoint was not stored; the next one tries again", error=str(error))
        except Exception:
            logger.exception("a checkpoint failed; the next one tries again")


async def checkpoint_turns(store: Store, turns: Sequence[Turn], *, store_timeout_s: float) -> None:
    """Keep the progress of these turns, mostly in one call. Raises: StoreError."""
    for batch in _batches(turns):
        with answered_within(store_timeout_s):
            await store.checkpoint_turns([checkpoint for _, checkpoint in batch])
        for turn, checkpoint in batch:
            turn.note_checkpoint(checkpoint)


def _batches(turns: Sequence[Turn]) -> Iterator[list[tuple[Turn, Checkpoint]]]:
    batch: list[tuple[Turn, Checkpoint]] = []
    size = 0
    for turn in turns:
        checkpoint = turn.checkpoint()
        if checkpoint is None:
            continue
        batch.append((turn, checkpoint))
        size += sum(map(len, checkpoint.events))
        if size > _BATCH_BYTES_MAX:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
