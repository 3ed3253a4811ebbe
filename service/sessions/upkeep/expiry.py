"""The expiry loop: removes expired sessions.

The loop need not be in time, because readers do not find an expired session. An error in this loop is logged, and the
loop goes on.
"""

import structlog
import trio

from service.clock import Clock, is_in_doubt
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.expiry")

_BATCH_MAX = 100
"""Sessions that one step removes; a larger step would delay other writes."""


async def run_expiry(
    store: Store,
    *,
    clock: Clock,
    interval_s: float,
    store_timeout_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sweep every ``interval_s``. Runs until cancelled; a cancelled sweep has removed whole batches."""
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
    """Remove all sessions that have expired by now, in batches. Returns their number.

    Removes none while the clock is in doubt: a removal is final, and a later sweep finds the same sessions.
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
