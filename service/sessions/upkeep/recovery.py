"""The mending loop: sets right, as soon as that can be, what a fault has left behind.

The store gets what it refused, and the turns of processes that have died are ended. Nobody waits for it. An
error in it is logged and it goes on.
"""

import structlog
import trio

from service.errors import StoreError
from service.sessions.sessions import Sessions

logger = structlog.get_logger("lastcall.mending")

INTERVAL_S = 2.0


async def run_mending(
    sessions: Sessions, *, shared: bool, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Mend every two seconds, until cancelled.

    Args:
        shared: Whether other processes may have the store as well, and die.
    """
    task_status.started()
    while True:
        await trio.sleep(INTERVAL_S)
        try:
            await mend(sessions, shared=shared)
        except StoreError as error:
            logger.warning("the store still refuses; trying again", error=str(error))
        except Exception:
            logger.exception("mending failed; trying again")


async def mend(sessions: Sessions, *, shared: bool) -> None:
    """Do what can be done now. Raises: StoreError, after having tried everything."""
    refusal: StoreError | None = None
    try:
        await sessions.unkept.settle()
    except StoreError as error:
        refusal = error
    if shared:
        recovered = await sessions.recover()
        if recovered:
            logger.info("turns of a process that died ended as interrupted", turns=recovered)
    if refusal is not None:
        raise refusal
