"""Errors as OpenAI's clients read them: ``{"error": {"message": "…", "type": "…", "param": null, "code": "…"}}``.

The statuses are those that the clients map to classes. OpenAI's SDKs repeat a request that got 408, 409, 429 or 5xx by
themselves, and send no idempotency key: where a repetition could do a thing twice the answer says
``x-should-retry: false``.

Source: https://platform.openai.com/docs/guides/error-codes
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

import msgspec
from quart import current_app, has_request_context, request
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import MethodNotAllowed, NotFound

from service.api.http.access import UnauthorizedError
from service.api.http.idempotency_keys import HEADER
from service.api.http.locations import located
from service.api.http.operations import operation_of
from service.api.http.problems import Refusal, status_of
from service.api.http.strict_json import shown
from service.api.openai.ids import conversation_id, response_id
from service.errors import (
    BranchLimitError,
    EventsDeletedError,
    EventsLostError,
    InvalidRequestError,
    ItemNotFoundError,
    LastcallError,
    MadeIsGoneError,
    OwnerHangsError,
    QueueFullError,
    SessionExistsError,
    SessionNotFoundError,
    StoreError,
    TurnEndingError,
    TurnInProgressError,
    TurnMovedError,
    TurnNotFoundError,
)
from service.ids import public_id
from service.storage.records import IdempotencyKey

_PATH = "/v1"
_NOT_THERE = frozenset({f"{_PATH}/responses/compact", f"{_PATH}/responses/input_tokens"})
"""Calls that are not there, though a response could have a path of this form. Nor are there WebSockets."""
SHOULD_RETRY = "x-should-retry"
"""Header that OpenAI's SDKs obey before all else."""

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ErrorMember(msgspec.Struct, frozen=True, kw_only=True):
    """The error. ``code`` is OpenAI's where OpenAI has one for the case, else the code that the native API answers."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """``{"error": {"message": "…", "type": "invalid_request_error", "param": null, "code": "not_found"}}``"""

    error: ErrorMember


class ParameterError(InvalidRequestError):
    """A parameter of a call of OpenAI's API is not taken.

    Attributes:
        openai_code: OpenAI's code for it: ``unknown_parameter``, ``unsupported_parameter``, ``unsupported_value``…
    """

    status: ClassVar[int] = 400

    def __init__(self, message: str, *, param: str, code: str = "invalid_value") -> None:
        super().__init__(message, field=param)
        self.openai_code = code


class UnknownModelError(ParameterError):
    """No upstream is known to have the model."""

    status = 404

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {shown(model)!r} does not exist.", param="model", code="model_not_found")


class PreviousResponseNotFoundError(ParameterError):
    """The response that the new one is to follow does not exist, or not any more."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Previous response with id {name[:128]!r} not found: it never existed, was not stored, was deleted or has "
            "expired.",
            param="previous_response_id",
            code="previous_response_not_found",
        )


class ConversationNotFoundError(SessionNotFoundError):
    """There is no conversation with this name for the caller."""

    def __init__(self, name: str, *, param: str | None = None) -> None:
        super().__init__(name)
        self.name = name[:200]
        self.param = param


class PreviousResponseOpenError(ParameterError):
    """The response that the new one is to follow has not ended."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Previous response {name!r} is queued or in progress: wait for it, or cancel it.",
            param="previous_response_id",
            code="previous_response_in_progress",
        )


class ConversationLockedError(ParameterError):
    """Another response of the conversation is on its way, and one follows the other."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Another response of the conversation {name!r} is queued or in progress: wait for it, or cancel it. "
            "Responses with a previous_response_id run side by side.",
            param="conversation",
            code="conversation_locked",
        )


class ResponseNotFoundError(TurnNotFoundError):
    """There is no response with this name for the caller."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name[:128]


class _Shown(NamedTuple):
    """What an error of the service is on this face. None stands for the problem document's part."""

    code: str | None = None
    message: str | None = None
    param: str | None = None


def is_path_of_openai(path: str) -> bool:
    """Whether a path, without the prefix, belongs to OpenAI's API."""
    return path == _PATH or path.startswith(f"{_PATH}/")


def openai_error_response(refusal: Refusal) -> TrioResponse:
    """The response to a refused request, for a client of OpenAI's API."""
    problem, error = refusal.problem, refusal.error
    page = problem.type.partition("#")[0]
    told = _no_call(page) if isinstance(error, NotFound) else _shown(error)
    status = status_for_clients(type(error)) if isinstance(error, LastcallError) else problem.status
    headers = dict(refusal.headers)
    if isinstance(error, MethodNotAllowed) and (not has_request_context() or request.path in _NOT_THERE):
        status, told = 404, _no_call(page)
        headers.pop("Allow", None)
    member = ErrorMember(
        message=told.message or problem.detail,
        type=_type_of(status),
        param=told.param or problem.field,
        code=told.code or problem.code,
    )
    if isinstance(error, OwnerHangsError | TurnEndingError | TurnMovedError):
        headers["Location"] = located(response_path(error.turn_id))
    else:
        headers.pop("Location", None)
    if _is_repeated_in_vain(error, status):
        headers[SHOULD_RETRY] = "false"
    return TrioResponse(msgspec.json.encode(ErrorBody(member)), status, headers, content_type="application/json")


@contextmanager
def not_done_twice(key: IdempotencyKey | None) -> Iterator[None]:
    """Let no SDK repeat by itself what a conversation would have twice, if the store may have done it."""
    try:
        yield
    except StoreError as error:
        if key is None and error.outcome_is_unknown:
            error.retry_after_s = None
        raise


def status_for_clients(kind: type[LastcallError]) -> int:
    """The status that errors of a type have on this face."""
    if issubclass(kind, ParameterError):
        return kind.status
    if issubclass(kind, TurnInProgressError):
        return 400
    status = status_of(kind)
    return 400 if status == 422 and issubclass(kind, InvalidRequestError) else status


def response_path(turn_id: str) -> str:
    """The path of a response, without the prefix."""
    return f"{_PATH}/responses/{response_id(turn_id)}"


def _type_of(status: int) -> ErrorType:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _is_repeated_in_vain(error: Exception, status: int) -> bool:
    """Whether an SDK that repeats the request by itself would do harm, or would only ask again in vain.

    A POST of which it is not known what became of it may have begun a response, which a repetition would begin twice;
    with an idempotency key it may be repeated.
    """
    if status == 409 or isinstance(error, OwnerHangsError):
        return True
    if status < 500 or not has_request_context() or request.method != "POST" or _has_key():
        return False
    return status == 500 or getattr(error, "retry_after_s", None) is None


def _has_key() -> bool:
    """Whether the current request has an idempotency key, and its call reads it."""
    if HEADER not in request.headers or request.url_rule is None:
        return False
    return operation_of(current_app.view_functions[request.url_rule.endpoint]).keyed


def _no_call(page: str) -> _Shown:
    return _Shown(
        code="not_found", message=f"There is no such call under {_PATH}. All calls of this server are at {page}."
    )


def _shown(error: Exception) -> _Shown:  # noqa: C901, PLR0911, PLR0912  a table
    """What an error is on this face, in the words of responses and conversations."""
    match error:
        case UnauthorizedError():
            return _Shown(code="invalid_api_key")
        case ParameterError():
            return _Shown(code=error.openai_code)
        case ResponseNotFoundError():
            return _Shown(
                code="response_not_found",
                message=f"Response with id {error.name!r} not found: it never existed, was not stored, was deleted or "
                "has expired.",
            )
        case TurnNotFoundError(turn_id=turn_id):
            name = response_id(turn_id)
            return _Shown(code="response_not_found", message=f"Response with id {name!r} not found.")
        case SessionNotFoundError(session_id=session_id):
            name = error.name if isinstance(error, ConversationNotFoundError) else _conversation(session_id)
            return _Shown(
                code="conversation_not_found",
                message=f"Conversation with id {name!r} not found: it never existed, was deleted or has expired.",
                param=error.param if isinstance(error, ConversationNotFoundError) else None,
            )
        case SessionExistsError(session_id=session_id):
            return _Shown(code="conversation_exists", message=f"A conversation {_conversation(session_id)!r} exists.")
        case ItemNotFoundError(item_id=item_id):
            return _Shown(message=f"Item with id {item_id!r} not found.")
        case TurnInProgressError(turn_id=turn_id):
            return _Shown(
                code="conversation_locked",
                message=f"Response {response_id(turn_id)!r} is queued or in progress: wait for it, or cancel it.",
                param="conversation",
            )
        case EventsDeletedError():
            return _Shown(message="A part of this response was deleted, and its events too: get it without a stream.")
        case EventsLostError():
            return _Shown(message="A crash lost events of this response: get it without a stream.")
        case OwnerHangsError(turn_id=turn_id):
            return _Shown(
                message=f"The process that runs response {response_id(turn_id)!r} hangs. The response was accepted: do "
                "not repeat this call, get the response at its URL (Location) later."
            )
        case TurnEndingError(turn_id=turn_id):
            return _Shown(
                message=f"Response {response_id(turn_id)!r} is ending, but its end takes longer than usual: repeat "
                "this call, or get the response at its URL (Location) later."
            )
        case TurnMovedError(turn_id=turn_id):
            return _Shown(
                message=f"Response {response_id(turn_id)!r} has left this process, which stops or was taken for dead: "
                "repeat this call, or get the response at its URL (Location)."
            )
        case MadeIsGoneError():
            return _Shown(
                message="What the call with this Idempotency-Key made was deleted or has expired. Send a new key to "
                "make another."
            )
        case QueueFullError() | BranchLimitError():
            return _Shown(code="rate_limit_exceeded")
        case InvalidRequestError(code="invalid_request", field="model"):
            return _Shown(code="model_not_found" if "upstream" in str(error) else None)
        case InvalidRequestError(code="invalid_request"):
            return _Shown(code=_code_of_words(str(error)))
    return _Shown()


def _conversation(session_id: str) -> str:
    return conversation_id(public_id(session_id))


_CODES_BY_WORDS = (
    ("Object contains unknown field", "unknown_parameter"),
    ("This call takes no parameters", "unknown_parameter"),
    ("Object missing required field", "missing_required_parameter"),
)
"""OpenAI's codes for what the conversion of a body or a query says, by the beginning of its message."""


def _code_of_words(message: str) -> str:
    for words, code in _CODES_BY_WORDS:
        if message.startswith(words):
            return code
    return "invalid_type" if message.startswith("Expected ") and ", got " in message else "invalid_value"
