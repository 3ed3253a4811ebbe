"""The checkpoint loop: stores the growth of running turns, so that a crash loses little of them.

After an error the next checkpoint stores what the failed one did not.
"""

from collections.abc import Callable, Iterator, Sequence

import trio

from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_task import lose
from service.sessions.upkeep.run_every import run_every
from service.storage.records import Checkpoint
from service.storage.store import Store
from service.storage.store_deadline import answered_within

_BATCH_LENGTH_MAX = 1024 * 1024
"""The approximate size of one call to the store, in code points and events; a larger call would delay other writes."""


async def run_checkpoints(
    store: Store,
    *,
    open_turns: Callable[[], Sequence[Turn]],
    interval_s: float,
    store_timeout_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Store the growth of all open turns every ``interval_s``. Runs until cancelled."""

    async def checkpoint_open_turns() -> None:
        await checkpoint_turns(store, open_turns(), store_timeout_s=store_timeout_s)

    task_status.started()
    await run_every(interval_s, checkpoint_open_turns, name="checkpoints")


async def checkpoint_turns(store: Store, turns: Sequence[Turn], *, store_timeout_s: float) -> None:
    """Store the growth of these turns, usually in one call. Turns that are not this process's any more stop.

    Raises:
        StoreError
    """
    for batch in _batches(turns):
        with answered_within(store_timeout_s):
            lost = await store.checkpoint_turns([checkpoint for _, checkpoint in batch])
        for turn, checkpoint in batch:
            if turn.id in lost:
                lose(turn)
            else:
                turn.note_checkpoint(checkpoint)


def _batches(turns: Sequence[Turn]) -> Iterator[list[tuple[Turn, Checkpoint]]]:
    batch: list[tuple[Turn, Checkpoint]] = []
    size = 0
    for turn in turns:
        checkpoint = turn.checkpoint()
        if checkpoint is None:
            continue
        batch.append((turn, checkpoint))
        size += len(checkpoint.text) + sum(len(run.lengths) for run in checkpoint.runs)
        if size > _BATCH_LENGTH_MAX:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
