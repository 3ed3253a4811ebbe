"""What the log says of a turn: its ids on each line of its work, and one line of its end."""

from contextlib import AbstractContextManager
from typing import Any

import structlog
import trio

from service.models.client import Usage
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn
from service.telemetry.log_context import log_context

logger = structlog.get_logger("lastcall.turn")


def turn_log_context(turn: Turn) -> AbstractContextManager[None]:
    """Have the lines of the current task name this turn, and no other work, until the block ends."""
    return log_context(**_ids(turn))


def log_end(turn: Turn) -> None:
    """Write the line of a turn that has ended: what it was, how it ended, how long it took and how much it said.

    Seconds count from the acceptance. A turn that failed, or whose end is not in the store, is a warning. Nothing that
    the user, the model or the model's server said is in the line.
    """
    now = trio.current_time()
    log = logger.info if turn.stored and not isinstance(turn.end, outcome.Failed) else logger.warning
    log(
        "turn ended",
        **_ids(turn),
        model=turn.model,
        outcome=turn.state,
        **_ending(turn),
        **_tokens(turn.usage),
        **({} if turn.stored else {"stored": False}),
        **({"queued_s": _seconds(turn, turn.started_at)} if turn.was_queued else {}),
        first_token_s=_seconds(turn, turn.first_token_at),
        total_s=_seconds(turn, now),
        attempts=turn.attempts,
        events=turn.log.last_seq,
        text_length=turn.text_length,
        text_bytes=turn.text_bytes,
        **({"calls": turn.calls} if turn.calls else {}),
    )


def log_adoption(turn: Turn) -> None:
    """Write the line of a turn that goes on in this process."""
    record = turn.record_at_first()
    logger.info(
        "turn adopted: it goes on here",
        **_ids(turn),
        state=turn.state,
        attempt=record.attempt,
        on_interrupt=record.on_interrupt,
        text_length=turn.text_length,
    )


def _ids(turn: Turn) -> dict[str, str | None]:
    ids = {"session_id": turn.session_id, "turn_id": turn.id, "request_id": turn.request_id}
    if turn.trace is not None and turn.trace.trace_id is not None:
        ids["trace_id"] = turn.trace.trace_id
    return {**ids, "upstream": turn.client.name}


def _seconds(turn: Turn, at: float | None) -> float | None:
    return None if at is None else round(at - turn.accepted_at, 3)


def _tokens(usage: Usage | None) -> dict[str, int]:
    return {} if usage is None else {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}


def _ending(turn: Turn) -> dict[str, Any]:
    code = outcome.code_of(turn.end)
    if code is None:
        return {}
    if isinstance(turn.end, outcome.Failed):
        return {"code": code, "error": turn.error_for_log or turn.end.error.message}
    return {"code": code}
