"""The one way in which the loops of this folder run: the pause, the bound, and what becomes of an error.

The pause counts from the end of a run to the beginning of the next one, so a slow store is not asked again at once. The
first run comes after a pause.
"""

from collections.abc import Awaitable, Callable

import structlog
import trio

from service.errors import StoreError
from service.freezes import LATE_S, READING_S, move_on_after
from service.telemetry.refusal_log import causes_of

logger = structlog.get_logger("lastcall.upkeep")

RUN_MAX_S = 600.0
"""Bound of one run. Each wait within a run has a shorter bound; without this one a forgotten bound would end a loop."""


async def run_every(
    pause_s: float,
    run: Callable[[], Awaitable[float | None]],
    *,
    name: str,
    woken: Callable[[], Awaitable[None]] = trio.sleep_forever,
) -> None:
    """Call ``run`` again and again until cancelled. An error in it is logged, and the loop goes on.

    After a freeze the data that has arrived meanwhile is read before the next run.

    Args:
        run: May return the time of its next run, on Trio's clock, instead of ``pause_s`` after its end.
        name: The name of the loop in the log.
        woken: Waits for what ends a pause early.
    """
    due_at = trio.current_time() + pause_s
    while True:
        with trio.move_on_at(due_at):
            await woken()
        if trio.current_time() - due_at >= LATE_S:
            await trio.sleep(READING_S)
        next_at = await _run_once(run, name)
        due_at = trio.current_time() + pause_s if next_at is None else next_at


async def _run_once(run: Callable[[], Awaitable[float | None]], name: str) -> float | None:
    try:
        with move_on_after(RUN_MAX_S):
            return await run()
        logger.error("a loop was interrupted, because it took too long; it tries again", loop=name, bound_s=RUN_MAX_S)
    except StoreError as error:
        logger.warning("the store refuses; a loop tries again", loop=name, error=str(error), cause=causes_of(error))
    except Exception:
        logger.exception("a loop failed; it tries again", loop=name)
    return None
