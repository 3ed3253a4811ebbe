"""The recovery loop: retries refused writes, finishes deletions, ends the turns of processes that have died, and adopts
the turns that no process runs.

Nothing waits for this loop.
"""

from collections.abc import Awaitable, Callable
from functools import partial

import structlog
import trio

from service.errors import StoreError
from service.sessions.sessions import Sessions
from service.sessions.upkeep.run_every import run_every

logger = structlog.get_logger("lastcall.recovery")

INTERVAL_S = 2.0


async def run_recovery(
    sessions: Sessions,
    *,
    shared: bool,
    woken: Callable[[], Awaitable[None]] = trio.sleep_forever,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Recover every two seconds until cancelled, and besides whenever the loop is woken.

    Args:
        shared: Whether other processes, which may die, can use the same store.
        woken: Waits for what ends a pause early: this process has taken another one for dead.
    """
    recover = partial(recover_once, sessions, shared=shared)
    task_status.started()
    await run_every(INTERVAL_S, recover, name="recovery", woken=woken)


async def recover_once(sessions: Sessions, *, shared: bool) -> float | None:
    """Try each step of the recovery once. Returns the time of the next run, if that comes before the pause is over.

    Raises:
        StoreError: After all steps were tried.
    """
    next_at: float | None = None
    refusal: StoreError | None = None
    for step in (sessions.pending_writes.retry, sessions.deletions.resolve):
        try:
            await step()
        except StoreError as error:
            refusal = error
    if shared:
        recovered = await sessions.recover()
        if recovered:
            logger.info("turns of a process that died ended as interrupted", turns=recovered)
    try:
        next_at = await sessions.adopt_waiting()
    except StoreError as error:
        refusal = error
    if refusal is not None:
        raise refusal
    until = trio.current_time() + INTERVAL_S
    return until if next_at is None else min(next_at, until)
