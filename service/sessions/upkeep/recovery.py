"""The recovery loop: retries refused writes, finishes deletions, ends the turns of processes that have died.

Nothing waits for this loop. An error in it is logged, and the loop goes on.
"""

import structlog
import trio

from service.errors import StoreError
from service.sessions.sessions import Sessions
from service.telemetry.refusal_log import causes_of

logger = structlog.get_logger("lastcall.recovery")

INTERVAL_S = 2.0


async def run_recovery(
    sessions: Sessions, *, shared: bool, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Recover every two seconds, until cancelled.

    Args:
        shared: Whether other processes, which may die, can use the same store.
    """
    task_status.started()
    while True:
        await trio.sleep(INTERVAL_S)
        try:
            await recover_once(sessions, shared=shared)
        except StoreError as error:
            logger.warning("the store still refuses; trying again", error=str(error), cause=causes_of(error))
        except Exception:
            logger.exception("the recovery loop failed; trying again")


async def recover_once(sessions: Sessions, *, shared: bool) -> None:
    """Try each step of the recovery once. Raises: StoreError, after all steps were tried."""
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
    if refusal is not None:
        raise refusal
