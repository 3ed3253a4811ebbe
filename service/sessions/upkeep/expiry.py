"""The expiry loop: removes expired sessions, and forgets idempotency keys of things that are gone for long.

The loop need not be in time, because readers do not find an expired session, and a key that is kept longer is no harm.
"""

from collections.abc import Callable

import structlog
import trio

from service.clock import Clock, is_in_doubt
from service.sessions.upkeep.run_every import RUN_MAX_S, run_every
from service.storage.store import Store
from service.storage.store_deadline import answered_within
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

logger = structlog.get_logger("lastcall.expiry")

_BATCH_MAX = 100
"""Sessions that one step removes, or keys that it forgets; a larger step would delay other writes."""


async def run_expiry(
    store: Store,
    *,
    clock: Clock,
    interval_s: float,
    store_timeout_s: float,
    metrics: Metrics | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sweep every ``interval_s``. Runs until cancelled; a cancelled sweep has removed whole batches.

    A sweep that a stop cancels is not counted, but for the sessions that it has removed.
    """

    counted = metrics or Metrics()

    async def sweep_and_count() -> None:
        began_at = trio.current_time()
        result: str | None = "failed"
        removed = 0

        def note_removed(batch: int) -> None:
            nonlocal removed
            removed += batch
            counted.add(families.EXPIRED, by=batch)

        try:
            await sweep(store, clock=clock, store_timeout_s=store_timeout_s, note_removed=note_removed)
            await forget_keys(store, clock=clock, store_timeout_s=store_timeout_s)
            result = "ok"
        except trio.Cancelled:
            if trio.current_time() - began_at < RUN_MAX_S:  # by a stop
                result = None
            raise
        finally:
            if result is not None:
                counted.add(families.SWEEPS, result)
                counted.observe(families.SWEEP_DURATION, value=trio.current_time() - began_at)
            if removed:
                logger.info("sessions expired", removed=removed)

    task_status.started()
    await run_every(interval_s, sweep_and_count, name="expiry")


async def sweep(
    store: Store, *, clock: Clock, store_timeout_s: float, note_removed: Callable[[int], object] = lambda _: None
) -> int:
    """Remove all sessions that have expired by now, in batches. Returns their number.

    Removes none while the clock is in doubt: a removal is final, and a later sweep finds the same sessions.

    Args:
        note_removed: Called with the number of the sessions of each batch.
    """
    removed = 0
    while True:
        now = clock()
        if is_in_doubt(clock):
            return removed
        with answered_within(store_timeout_s):
            batch = await store.delete_expired(now=now, limit=_BATCH_MAX)
        removed += batch
        note_removed(batch)
        if batch < _BATCH_MAX:
            return removed


async def forget_keys(store: Store, *, clock: Clock, store_timeout_s: float) -> None:
    """Forget the keys of things that are gone for long, in batches; none while the clock is in doubt."""
    while True:
        now = clock()
        if is_in_doubt(clock):
            return
        with answered_within(store_timeout_s):
            if not await store.forget_keys(now=now, limit=_BATCH_MAX):
                return
