"""A turn's task, a child of its session's: it runs the turn to its end.

Whatever happens to it becomes one terminal event: the first cause decides, synchronously; the upstream connection is
closed; the end is kept; the event is appended; the streams end. In this order, for every cause.
"""

from collections.abc import Awaitable, Callable

import structlog
import trio

from service.clock import Clock
from service.errors import ModelError, StoreError
from service.models.client import ModelRequest
from service.sessions.events import outcome
from service.sessions.events.events import encode_frame
from service.sessions.turns.prompt import build_prompt
from service.sessions.turns.turn import Turn
from service.settings import Settings
from service.storage.records import TurnRecord
from service.storage.store import Store
from service.storage.store_deadline import answered_within

logger = structlog.get_logger("lastcall.turn")


async def run_turn(
    turn: Turn,
    *,
    wait_for_others: Callable[[], Awaitable[None]],
    default_end: Callable[[], outcome.Outcome],
    store: Store,
    clock: Clock,
    settings: Settings,
) -> None:
    """Run a turn to its end. Its failures become its terminal event and end nothing else.

    Ends when the turn has; cancellation from above decides ``default_end()`` and still keeps and
    tells it, within ``cleanup_timeout_s``.

    Args:
        wait_for_others: Returns when no earlier turn of the session is open.
    """
    try:
        with turn.scope() as scope:
            await wait_for_others()
            await _reply(turn, store=store, clock=clock, settings=settings)
        if scope.cancelled_caught:
            turn.decide_from_deadlines()
    except Exception as error:  # noqa: BLE001  the edge of a turn
        _decide_failed(turn, error)
    finally:
        turn.decide(default_end())
        await end_turn(  # noqa: ASYNC102  shielded inside
            turn, store=store, clock=clock, within_s=settings.cleanup_timeout_s
        )


async def end_turn(turn: Turn, *, store: Store, clock: Clock, within_s: float) -> bool:
    """Keep and tell the end that is decided; False, and nothing happens, where somebody else does or has.

    Args:
        within_s: What the store may take. An end that is not kept by then is told as such.
    """
    if turn.is_ending:
        return False
    record = turn.finish(clock())
    stored = False
    # Shielded: every end is kept and told, also one that a cancellation caused.
    with trio.CancelScope(deadline=trio.current_time() + within_s, shield=True):
        stored = await _keep(turn, record, store=store, clock=clock)
    turn.conclude(record, stored=stored)
    return True


async def _reply(turn: Turn, *, store: Store, clock: Clock, settings: Settings) -> None:
    """Take the model's reply to the end and decide it."""
    was_queued = not turn.running
    turn.start(clock())
    record = turn.record()
    with answered_within(settings.store_timeout_s):
        if was_queued:
            await store.start_turn(turn.id, now=clock())
        path = await store.read_path(turn.session_id, turn.id, bytes_max=settings.prompt_bytes_max)
    request = ModelRequest(
        model=record.model,
        messages=build_prompt(path, system_message=turn.system_message, bytes_max=settings.prompt_bytes_max),
        temperature=record.temperature,
        max_output_tokens=record.max_output_tokens,
    )
    turn.expect_token("first_token", within_s=settings.first_token_timeout_s)
    async with turn.client.stream(request) as stream:
        try:
            while turn.end is None:
                events = await stream.receive()
                if turn.end is not None:
                    break  # decided by somebody else while these were on their way
                finished = turn.take(events)
                if finished is not None:
                    turn.decide(outcome.Completed(finished.finish_reason, finished.usage))
                turn.expect_token("next_token", within_s=settings.next_token_timeout_s)
        except Exception as error:  # noqa: BLE001  decided now: until the client has closed a deadline may pass
            _decide_failed(turn, error)


def _decide_failed(turn: Turn, error: Exception) -> None:
    if isinstance(error, ModelError | StoreError):
        turn.decide(outcome.failed(error.code, str(error)))
        return
    logger.error("turn crashed", session_id=turn.session_id, turn_id=turn.id, exc_info=error)
    turn.crashed = True
    turn.decide(outcome.internal_error())


async def _keep(turn: Turn, record: TurnRecord, *, store: Store, clock: Clock) -> bool:
    """Put an end into the store, with the events that are not there yet; whether that worked."""
    after = turn.stored_seq
    events = turn.log.frames(after=after)
    events.append(encode_frame(turn.terminal_event(stored=True)))
    try:
        return await store.end_turn(record, events=events, now=clock(), after=after)
    except StoreError as error:
        logger.warning("the end of a turn was not stored", turn_id=turn.id, error=str(error))
    except Exception:
        logger.exception("storing the end of a turn failed", turn_id=turn.id)
    return False
