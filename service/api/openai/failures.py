"""The ends of turns whose clients get an error in place of a reply, in OpenAI's shape, with the cause beside it."""

from collections.abc import Mapping
from typing import Literal

import msgspec
from quart_trio.wrappers import TrioResponse

from service.api.openai.errors import SHOULD_RETRY, ErrorType
from service.sessions.events.events import TerminalEvent, TurnCancelled, TurnFailed, TurnInterrupted
from service.storage.records import Failure, TurnRecord

_CODES: Mapping[str, str] = {
    "context_too_long": "context_length_exceeded",
    "content_filter": "content_policy_violation",
    "rate_limited": "rate_limit_exceeded",
}
"""Codes of failures for which OpenAI has a code that clients know. All others are those of docs/failures.md."""
_STATUS: Mapping[str, int] = {
    "context_too_long": 400,
    "content_filter": 400,
    "unsupported_content": 400,
    "parameter_refused": 400,
    "upstream_rejected": 400,
    "model_not_found": 404,
    "rate_limited": 429,
    "internal_error": 500,
    "reply_too_large": 500,
    "log_too_large": 500,
    "store_unavailable": 503,
    "resources_exhausted": 503,
    "connect_timeout": 504,
    "first_token_timeout": 504,
    "next_token_timeout": 504,
    "turn_timeout": 504,
}
"""The status of a failure, by its code; 502 for all others, which are faults of model servers."""
_FINAL = frozenset({"turn_timeout", "reply_too_large", "log_too_large", "cancelled"})
"""Ends that would most likely come again, and cost as much, if a client repeated its call by itself."""
_PARAMS: Mapping[str, str] = {"text_format": "response_format", "max_output_tokens": "max_completion_tokens"}
"""Parameters of the core that chat completions call otherwise."""
RESPONSE_PARAMS: Mapping[str, str] = {
    "text_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
}
"""Parameters of the core that responses call otherwise."""
_STOPPED = "The server stopped before the reply was complete; ask again."
_CRASHED = "The process that ran the reply has ended before the reply was complete; ask again."
_CANCELLED = "The reply was cancelled before it was complete."


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """How the turn ended: ``{"state": "interrupted", "reason": "shutdown", "code": null}``"""

    state: Literal["failed", "cancelled", "interrupted"]
    reason: str | None = None
    code: str | None = None

    @property
    def status(self) -> int:
        """The status of an answer that tells this cause."""
        if self.state == "failed":
            return _STATUS.get(self.code or "", 502)
        return 503 if self.state == "interrupted" else 500


class EndError(msgspec.Struct, frozen=True, kw_only=True):
    """The error of a reply that did not come to its end; ``lastcall`` has the cause in the words of the native API."""

    message: str
    type: ErrorType
    param: str | None
    code: str
    lastcall: Cause


class EndErrorBody(msgspec.Struct, frozen=True):
    """The error of a reply that did not come to its end.

    ``{"error": {"message": "The server stopped before the reply was complete; ask again.", "type": "server_error",
    "param": null, "code": "interrupted", "lastcall": {"state": "interrupted", "reason": "shutdown", "code": null}}}``
    """

    error: EndError


def end_error(end: TerminalEvent | TurnRecord, *, params: Mapping[str, str] = _PARAMS) -> EndErrorBody:
    """The error of a turn that has ended, and not as completed.

    Args:
        params: The names of parameters that a face calls otherwise than the core.
    """
    match end:
        case TurnFailed(error=Failure() as error) | TurnRecord(state="failed", error=Failure() as error):
            cause = Cause(state="failed", code=error.code)
            param = params.get(error.param, error.param) if error.param else None
            return _body(cause, error.message, code=_CODES.get(error.code, error.code), param=param)
        case TurnInterrupted(reason=why) | TurnRecord(state="interrupted", reason=why):
            words = _CRASHED if why == "crash" else _STOPPED
            return _body(Cause(state="interrupted", reason=why), words, code="interrupted")
        case TurnCancelled(reason=why) | TurnRecord(state="cancelled", reason=why):
            return _body(Cause(state="cancelled", reason=why), _CANCELLED, code="cancelled")
        case _:
            raise AssertionError(end)


def _body(cause: Cause, message: str, *, code: str, param: str | None = None) -> EndErrorBody:
    kind: ErrorType = "invalid_request_error"
    if cause.status >= 429:
        kind = "rate_limit_error" if cause.status == 429 else "server_error"
    return EndErrorBody(EndError(message=message, type=kind, param=param, code=code, lastcall=cause))


CRASHED = _body(Cause(state="interrupted", reason="crash"), _CRASHED, code="interrupted")
"""The error of a reply whose process has died."""


def end_response(turn: TurnRecord, *, repeats_input: bool = False, params: Mapping[str, str] = _PARAMS) -> TrioResponse:
    """The answer to a client whose reply did not come to its end, and which has got nothing of it.

    Args:
        repeats_input: Whether a repetition of the request would bring its input once more into a conversation.
        params: As in :func:`end_error`.
    """
    body = end_error(turn, params=params)
    cause = body.error.lastcall
    headers = {"Cache-Control": "no-store"}
    if repeats_input or (cause.code or cause.state) in _FINAL:
        headers[SHOULD_RETRY] = "false"
    return TrioResponse(msgspec.json.encode(body), cause.status, headers, content_type="application/json")
