"""The outcome of a turn, which is decided once, and the terminal event that publishes it."""

from typing import TypedDict

import msgspec

from service.errors import INTERNAL_ERROR, INTERNAL_ERROR_MESSAGE
from service.failure_codes import FailureCode
from service.models.client import FinishReason, Usage
from service.sessions.events.events import TerminalEvent, TurnCancelled, TurnCompleted, TurnFailed, TurnInterrupted
from service.storage.records import CancelReason, Failure, InterruptReason, LeftOut, TurnRecord


class Completed(msgspec.Struct, frozen=True):
    """The upstream finished its reply."""

    finish_reason: FinishReason


class Failed(msgspec.Struct, frozen=True):
    """The upstream, the store or this service broke, or a deadline passed."""

    error: Failure


class Cancelled(msgspec.Struct, frozen=True):
    """A caller ended the turn."""

    reason: CancelReason


class Interrupted(msgspec.Struct, frozen=True):
    """The service stopped or crashed before the turn ended."""

    reason: InterruptReason


Outcome = Completed | Failed | Cancelled | Interrupted


class Suspended(msgspec.Struct, frozen=True):
    """The turn's work stops here, and goes on in another process or after the next start. No outcome: no event tells
    it."""


class Ending(msgspec.Struct, gc=False):
    """What a turn's end is called, for those who look and must not keep the turn, with its log, for that.

    Attributes:
        name: As :func:`name_of` has it, from the decision on; empty before.
    """

    name: str = ""

    def __call__(self) -> str:
        return self.name


def failed(code: FailureCode, message: str, *, param: str | None = None) -> Failed:
    return Failed(Failure(code, message, msgspec.UNSET if param is None else param))


def internal_error() -> Failed:
    """The outcome for a fault of this service. The process's log has the cause; the turn's record has no details."""
    return failed(INTERNAL_ERROR, INTERNAL_ERROR_MESSAGE)


def record_changes(end: Outcome) -> dict[str, object]:
    """The fields of a turn's record that this end sets; the other fields of an end are None."""
    match end:
        case Completed(finish_reason):
            return {"state": "completed", "finish_reason": finish_reason}
        case Failed(error):
            return {"state": "failed", "error": error}
        case Cancelled(reason):
            return {"state": "cancelled", "reason": reason}
        case Interrupted(reason):
            return {"state": "interrupted", "reason": reason}


def outcome_of(turn: TurnRecord) -> Outcome | None:
    """The outcome in a turn's record. None if the turn is open, or if the record lacks a field of its end."""
    if turn.state == "completed" and turn.finish_reason is not None:
        return Completed(turn.finish_reason)
    if turn.state == "failed" and turn.error is not None:
        return Failed(turn.error)
    reason = turn.reason
    if reason == "shutdown" or reason == "crash":  # noqa: PLR1714  mypy does not follow the other way
        return Interrupted(reason) if turn.state == "interrupted" else None
    return Cancelled(reason) if turn.state == "cancelled" and reason is not None else None


def name_of(end: Outcome | Suspended) -> str:
    """What metrics and traces call an end: the state of the turn after it, or ``suspended``."""
    return type(end).__name__.lower()


def code_of(end: Outcome | Suspended | None) -> str | None:
    """Why a turn has ended so: the finish reason, the failure's code, or the reason of another end."""
    match end:
        case Completed(finish_reason):
            return finish_reason
        case Failed(Failure(code)):
            return code
        case Cancelled(reason) | Interrupted(reason):
            return reason
    return None


def terminal_event(
    end: Outcome, *, seq: int, text_length: int, usage: Usage | None, left_out: LeftOut | None, stored: bool
) -> TerminalEvent:
    """The terminal event for this outcome."""
    rest = _Rest(seq=seq, text_length=text_length, usage=usage, left_out=left_out, stored=stored)
    match end:
        case Completed(finish_reason):
            return TurnCompleted(finish_reason=finish_reason, **rest)
        case Failed(error):
            return TurnFailed(error=error, **rest)
        case Cancelled(reason):
            return TurnCancelled(reason=reason, **rest)
        case Interrupted(reason):
            return TurnInterrupted(reason=reason, **rest)


class _Rest(TypedDict):
    """What each kind of terminal event has."""

    seq: int
    text_length: int
    usage: Usage | None
    left_out: LeftOut | None
    stored: bool
