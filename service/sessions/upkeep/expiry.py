"""The expiry loop: reclaims what has expired.

Nobody depends on it being in time, because an expired session is not there for readers anyway. An
error in it is logged and it goes on.
"""

import structlog
import trio

from service.clock import Clock, is_in_doubt
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.expiry")

_BATCH_MAX = 100
"""What one step removes: more would keep other writes waiting."""


async def run_expiry(
    store: Store,
    *,
    clock: Clock,
    interval_s: float,
    store_timeout_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sweep every ``interval_s``.

    Runs until cancelled; a cancelled sweep leaves whole batches behind.
    """
    task_status.started()
    while True:
        await trio.sleep(interval_s)
        try:
            removed = await sweep(store, clock=clock, store_timeout_s=store_timeout_s)
        except Exception:
            logger.exception("expiry sweep failed; the next one tries again")
        else:
            if removed:
                logger.info("sessions expired", removed=removed)


async def sweep(store: Store, *, clock: Clock, store_timeout_s: float) -> int:
    """Remove all sessions that have expired by now, in batches; how many.

    None while it is in doubt what time it is: what is removed is gone for good, and the next sweep finds it, too.
    """
    removed = 0
    while True:
        now = clock()
        if is_in_doubt(clock):
            return removed
        with answered_within(store_timeout_s):
            batch = await store.delete_expired(now=now, limit=_BATCH_MAX)
        removed += batch
        if batch < _BATCH_MAX:
            return removed
