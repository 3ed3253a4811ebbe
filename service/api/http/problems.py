"""Problem documents (RFC 9457), and the one map from errors to statuses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import structlog
from quart import has_request_context, request, websocket
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import HTTPException

from service.api.http.access import LoopbackOnlyError, ProxiedRequestError, UnauthorizedError
from service.api.http.admin_access import CrossSiteError
from service.api.http.callers import NotPermittedError
from service.api.http.held_bytes import HeldBytesLimitError
from service.api.http.idempotency_keys import InvalidKeyError
from service.api.http.locations import prefix_of, turn_path
from service.api.http.preconditions import MalformedHeaderError, quoted
from service.api.http.request_body import BodyTimeoutError, UnsupportedEncodingError, UnsupportedMediaTypeError
from service.api.http.strict_json import InputTooLargeError, MalformedBodyError
from service.errors import (
    INTERNAL_ERROR,
    INTERNAL_ERROR_MESSAGE,
    BranchLimitError,
    EventsDeletedError,
    EventsLostError,
    HeadMovedError,
    InvalidRequestError,
    ItemNotFoundError,
    KeyReusedError,
    LastcallError,
    LimitError,
    MadeIsGoneError,
    NodeNotFoundError,
    OwnedElsewhereError,
    OwnerHangsError,
    PreconditionFailedError,
    QueueFullError,
    ReportsUnavailableError,
    ResourcesExhaustedError,
    ResumeConflictError,
    SessionExistsError,
    SessionLimitError,
    SessionNotFoundError,
    ShuttingDownError,
    StoreError,
    StreamLimitError,
    TurnEndingError,
    TurnInProgressError,
    TurnLimitError,
    TurnMovedError,
    TurnNotFoundError,
    WorkerNotFoundError,
)

logger = structlog.get_logger("lastcall.api")

MEDIA_TYPE = "application/problem+json"


class NotReadyError(LimitError):
    """The service behind this application is not open yet, or closed."""

    code = "not_ready"

    def __init__(self) -> None:
        super().__init__("This server is not ready to answer; try again.")


STATUS_BY_ERROR: Mapping[type[LastcallError], int] = {
    MalformedBodyError: 400,
    InvalidKeyError: 400,
    MalformedHeaderError: 400,
    UnauthorizedError: 401,
    LoopbackOnlyError: 403,
    ProxiedRequestError: 403,
    NotPermittedError: 403,
    CrossSiteError: 403,
    SessionNotFoundError: 404,
    TurnNotFoundError: 404,
    ItemNotFoundError: 404,
    NodeNotFoundError: 404,
    WorkerNotFoundError: 404,
    BodyTimeoutError: 408,
    SessionExistsError: 409,
    TurnInProgressError: 409,
    HeadMovedError: 409,
    ResumeConflictError: 409,
    EventsLostError: 410,
    MadeIsGoneError: 410,
    EventsDeletedError: 410,
    PreconditionFailedError: 412,
    InputTooLargeError: 413,
    UnsupportedMediaTypeError: 415,
    InvalidRequestError: 422,
    KeyReusedError: 422,
    QueueFullError: 429,
    BranchLimitError: 429,
    TurnLimitError: 503,
    StreamLimitError: 503,
    SessionLimitError: 503,
    HeldBytesLimitError: 503,
    ReportsUnavailableError: 503,
    ShuttingDownError: 503,
    NotReadyError: 503,
    OwnedElsewhereError: 503,
    TurnEndingError: 503,
    TurnMovedError: 503,
    OwnerHangsError: 504,
    StoreError: 503,
    ResourcesExhaustedError: 503,
}
"""The most derived type counts. 429 is for a bound of the caller's own session, 503 for a bound of the server."""

ADVICE: Mapping[str, str] = {
    "malformed_body": "send one JSON document, without repeated keys",
    "malformed_header": "`field` names the header and `detail` its form",
    "invalid_idempotency_key": "send one `Idempotency-Key` of 1 to 255 printable ASCII characters, bare or in quotes",
    "bad_request": "the request is not valid HTTP, or its target is neither a path nor a URL",
    "unauthorized": "send `Authorization: Bearer <key>`",
    "loopback_only": "this server serves its own machine only: set `LASTCALL_API_KEYS` there",
    "proxied_without_keys": "this server serves its own machine only, and a proxy passed the request on: "
    "set `LASTCALL_API_KEYS` there",
    "not_permitted": "the key lacks what `detail` names: use another one, or give it to the key (`may`)",
    "cross_site": "calls under `/admin` are for pages of this server, and for programs: `cors_origins` does not hold "
    "there",
    "node_not_found": "the node has ended: get the whole tree again",
    "worker_not_found": "the worker has ended: `GET /admin/tree` names those that there are",
    "not_found": "there is no such call: `/docs` lists all calls",
    "session_not_found": "the session never existed, was deleted or has expired",
    "turn_not_found": "the session has no such turn",
    "item_not_found": "the session has no such message, call or result",
    "method_not_allowed": "the path has no such method: `Allow` names those that it has",
    "body_timeout": "the body did not arrive within `body_timeout_s`",
    "session_exists": "choose another id, or leave it out",
    "turn_in_progress": "wait for the turn `turn_id`, cancel it, or send `on_conflict` as `queue` or `supersede`",
    "head_moved": "the head is `turn_id` now: read the session, and decide again",
    "resume_conflict": "`Last-Event-ID` on a POST names no event of a turn with this input",
    "events_lost": "a crash took these events; the problem has the turn's `state` and `text`",
    "precondition_failed": "the session has changed since you read it: get it again; `ETag` is its present one. A weak "
    "ETag, `W/…`, never matches",
    "idempotency_key_spent": "what the first call with this `Idempotency-Key` made is gone: send a new key",
    "events_deleted": "a part of the reply was deleted, and the events with it: get the turn for what is left",
    "input_too_large": "`field` says which part; `input_bytes_max` is the bound, and `history_bytes_max` of a body "
    "under `/v1` with a conversation",
    "unsupported_media_type": "send `Content-Type: application/json`, not compressed",
    "invalid_request": "`field` and `detail` say what is allowed",
    "branch_limit": "`branches_max` turns run in this session: try again after `Retry-After`",
    "idempotency_key_reused": "another request came with this `Idempotency-Key` before: send a new key, or the same "
    "method, path and body",
    "queue_full": "`queued_turns_max` turns wait in this session: try again after `Retry-After`",
    "held_bytes_limit": "requests and answers hold `held_bytes_max` bytes: try again after `Retry-After`",
    "internal_error": "an error in Lastcall; its log has the cause: report it",
    "not_ready": "the server is starting or stopping: try again; another process may answer",
    "owned_elsewhere": "another process runs this session's turns and cannot be reached: try again after `Retry-After`",
    "reports_unavailable": "the disk with the reports of past shutdowns refuses or hangs, `detail` says how: the "
    "server's operator looks at `shutdowns_file`, or at the file beside the database",
    "resources_exhausted": "the server may open no more files or connections: try again after `Retry-After`; "
    "its operator may raise `ulimit -n`",
    "session_limit": "`memory_sessions_max` sessions are kept: try again after `Retry-After`",
    "shutting_down": "the server is stopping: try again; another process may answer",
    "store_unavailable": "the store refuses or does not answer; without `Retry-After` the outcome is unknown: "
    "read the session before you repeat the call; with an `Idempotency-Key` the call may be repeated at once",
    "stream_limit": "`streams_max` streams are open: try again after `Retry-After`",
    "owner_hangs": "the process that runs the turn hangs; the turn was accepted: do not repeat the call, ask for the "
    "turn at `Location`",
    "turn_ending": "the turn is ending, and its end takes long: repeat the call after `Retry-After`, or ask for the "
    "turn at `Location`",
    "turn_limit": "`live_turns_max` turns are open: try again after `Retry-After`",
    "turn_moved": "the process stops, or was taken for dead, and the turn goes on in another one or after the next "
    "start: ask for the turn at `Location`, with `?wait=60`, after `Retry-After`; do not repeat the call without an "
    "`Idempotency-Key`",
}
"""Advice to the reader for each code of a problem: a text without a full stop, with code in backticks."""

REASONS_TO_RETRY: Mapping[str, str] = {
    "session_exists": "never: the id stays taken until its session is deleted or expires",
    "turn_in_progress": "never: how long the turn takes is not known; `GET …/turns/{turn}?wait=30` waits for its end",
    "head_moved": "never: the head does not move back by itself",
    "resume_conflict": "never: the same request gets the same answer",
    "branch_limit": "always: turns end within moments",
    "queue_full": "always: a queued turn starts, and leaves the queue, when the one before it ends",
    "held_bytes_limit": "always: other requests end within moments",
    "not_ready": "always: a start takes moments, and in a stop another process may answer",
    "owned_elsewhere": "always: the process that runs the turns is found again, or its turns are ended",
    "reports_unavailable": "always, 10 seconds: a disk that hangs may answer again",
    "resources_exhausted": "always: connections close within moments",
    "session_limit": "always, 10 seconds: sessions expire, or are deleted, less often than turns end",
    "shutting_down": "always: another process may answer, or this one starts again",
    "store_unavailable": "if the fault may pass and nothing was begun; without it, look before you repeat the call",
    "stream_limit": "always: streams end within moments",
    "turn_ending": "always: the end is on its way",
    "turn_limit": "always: turns end within moments",
    "turn_moved": "always: another process goes on with the turn, or this one starts again",
}
"""Whether an answer with status 409, 429 or 503 has ``Retry-After``, by its code, and why."""

_CODE_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}
_OTHER_REFUSAL = (400, "bad_request")
_BROKEN = (500, INTERNAL_ERROR)


def status_of(kind: type[Exception]) -> int:
    """Return the status of an error type: 500 for an unexpected one."""
    for ancestor in kind.__mro__:
        if ancestor in STATUS_BY_ERROR:
            return STATUS_BY_ERROR[ancestor]
    return 500


def code_of(kind: type[LastcallError]) -> str:
    """Return the stable code of an error type that is in the map."""
    code: str = getattr(kind, "code")  # noqa: B009
    return code


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A problem document.

    ``{"type": "/docs#turn_in_progress", "title": "Turn in progress", "status": 409, "code": "turn_in_progress",
    "detail": "Turn 'turn_0a…' is still running or queued in this session; …", "turn_id": "turn_0a…"}``

    ``field`` names the part of the request that is wrong; ``retry_after_s`` repeats the header;
    ``turn_id``, ``state`` and ``text`` belong to the turn that is in the way, is missing or has lost events.

    Source: https://www.rfc-editor.org/rfc/rfc9457
    """

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: str | None = None
    retry_after_s: int | None = None
    turn_id: str | None = None
    state: str | None = None
    text: str | None = None


def codes() -> list[tuple[int, str]]:
    """Return every code that a problem document may have, with its status, in order.

    Other refusals of a request have a status of their own and the code of 400.
    """
    known = {(status, code_of(error)) for error, status in STATUS_BY_ERROR.items()}
    return sorted(known | set(_CODE_BY_STATUS.items()) | {_OTHER_REFUSAL, _BROKEN})


def problem_of(error: Exception, *, prefix: str = "") -> Problem:
    """Return the problem document of an error. The document of an unexpected error has no details.

    Args:
        prefix: The prefix of the service's paths in a URL.
    """
    if isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        code = _CODE_BY_STATUS.get(error.code, _OTHER_REFUSAL[1])
        return _problem(prefix, error.code, code, error.description or error.name)
    status = status_of(type(error))
    if status == 500 or not isinstance(error, LastcallError):
        return _problem(prefix, *_BROKEN, INTERNAL_ERROR_MESSAGE)
    problem = _problem(prefix, status, code_of(type(error)), str(error))
    names = ("field", "retry_after_s", "turn_id", "state", "text")
    return msgspec.structs.replace(problem, **{name: getattr(error, name, None) for name in names})


def _problem(prefix: str, status: int, code: str, detail: str) -> Problem:
    title = code.replace("_", " ").capitalize()
    return Problem(type=f"{prefix}/docs#{code}", title=title, status=status, code=code, detail=detail)


@dataclass(frozen=True)
class Refusal:
    """An error as the answer to one request, before it gets the form of an API; ``headers`` go with each form."""

    error: Exception
    problem: Problem
    headers: dict[str, str]


def refusal_of(error: Exception, *, scope: dict[str, Any]) -> Refusal:
    """Return an error as the answer to the request of this ASGI scope."""
    prefix = prefix_of(scope)
    problem = problem_of(error, prefix=prefix)
    headers = {"Cache-Control": "no-store"}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(problem.retry_after_s)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedEncodingError):
        headers["Accept-Encoding"] = "identity"  # RFC 9110, 15.5.16
    if isinstance(error, PreconditionFailedError):
        headers["ETag"] = quoted(error.revision)
    if isinstance(error, ShuttingDownError | TurnMovedError):
        headers["Connection"] = "close"  # so that a pool finds another server
    if (
        isinstance(error, ResumeConflictError | OwnerHangsError | TurnEndingError | TurnMovedError)
        and error.session_id
        and error.turn_id
    ):
        headers["Location"] = prefix + turn_path(error.session_id, error.turn_id)
    if isinstance(error, HTTPException):
        headers.update(pair for pair in error.get_headers() if pair[0] == "Allow")
    return Refusal(error, problem, headers)


def problem_response(refusal: Refusal) -> TrioResponse:
    """Return the response with a refusal's problem document."""
    problem = refusal.problem
    return TrioResponse(msgspec.json.encode(problem), problem.status, refusal.headers, content_type=MEDIA_TYPE)


async def answer_error(
    error: Exception, *, respond: Callable[[Refusal], TrioResponse] = problem_response
) -> TrioResponse:
    """Return the response to any error that a request raised. This is the edge of a request.

    If ``respond`` finds no room for the answer, the response says so.
    """
    connection = request if has_request_context() else websocket
    scope = cast("dict[str, Any]", connection.scope)
    try:
        response = respond(refusal_of(error, scope=scope))
    except HeldBytesLimitError as full:
        response = respond(refusal_of(full, scope=scope))
    if response.status_code == 500:
        logger.error("request failed", exc_info=error)
    return response
