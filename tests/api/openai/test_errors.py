"""Under /v1 every error is one that OpenAI's clients can read, and repeat only where that does no harm."""

import json
import re
from typing import Any

import pytest
from quart import request
from werkzeug.exceptions import BadRequest, MethodNotAllowed

from service.api.http.access import LoopbackOnlyError, ProxiedRequestError, UnauthorizedError
from service.api.http.admin_access import CrossSiteError
from service.api.http.callers import NotPermittedError
from service.api.http.held_bytes import HeldBytesLimitError
from service.api.http.idempotency_keys import InvalidKeyError
from service.api.http.preconditions import MalformedHeaderError
from service.api.http.problems import STATUS_BY_ERROR, NotReadyError, refusal_of
from service.api.http.request_body import BodyTimeoutError, UnsupportedMediaTypeError
from service.api.http.strict_json import InputTooLargeError, MalformedBodyError
from service.api.openai.errors import (
    ConversationLockedError,
    ConversationNotFoundError,
    ParameterError,
    PreviousResponseNotFoundError,
    PreviousResponseOpenError,
    ResponseNotFoundError,
    UnknownModelError,
    openai_error_response,
    status_for_clients,
)
from service.errors import (
    BranchLimitError,
    EventsDeletedError,
    EventsLostError,
    HeadMovedError,
    InvalidRequestError,
    ItemNotFoundError,
    KeyReusedError,
    LastcallError,
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
from tests.api.inprocess import LOOPBACK, Reply, open_api, request_context

KEY = "a-key-of-sixteen-or-more"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY")


def error(reply: Reply, status: int, code: str) -> dict[str, Any]:
    """The error member of an answer that must be one, in OpenAI's shape."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply
    assert reply.json.keys() == {"error"}
    member: dict[str, Any] = reply.json["error"]
    assert member.keys() == {"message", "type", "param", "code"}
    assert member["code"] == code
    return member


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/embeddings", "/v1/files?limit=3", "/v1/%C3%BC/x", "/v1/responses/", "/v1/responses/a/b"],
)
@pytest.mark.parametrize("method", METHODS)
async def test_the_answer_to_a_call_that_is_not_there_says_so(method: str, path: str) -> None:
    async with open_api() as api:
        body = {"model": "x", "messages": []} if method == "POST" else None
        member = error(await api.call(method, path, body), 404, "not_found")
    assert member["message"] == "There is no such call under /v1. All calls of this server are at /docs."
    assert (member["type"], member["param"]) == ("invalid_request_error", None)


async def test_below_a_prefix_the_answer_is_the_same_and_names_the_page_there() -> None:
    async with open_api() as api:
        for path in ("/v1/embeddings", "/ai/v1/embeddings"):
            member = error(await api.call("GET", path, scope={"root_path": "/ai"}), 404, "not_found")
            assert "/ai/docs" in member["message"]


async def test_a_call_without_a_key_gets_401_in_the_same_shape() -> None:
    async with open_api(api_keys=(KEY,)) as api:
        reply = await api.call("POST", "/v1/responses", {})
        assert error(reply, 401, "invalid_api_key")["type"] == "invalid_request_error"
        assert reply.headers["www-authenticate"] == "Bearer"
        error(await api.call("GET", "/v1/embeddings", headers={"Authorization": f"Bearer {KEY}"}), 404, "not_found")


async def test_another_host_is_403_in_the_same_shape() -> None:
    async with open_api() as api:
        error(await api.call("GET", "/v1/models", headers={"Host": "app.example.org"}), 403, "loopback_only")


async def test_a_path_that_only_begins_alike_is_a_problem() -> None:
    async with open_api() as api:
        for path in ("/v10", "/v1x/models", "/x/v1/models"):
            (await api.call("GET", path)).problem(404, "not_found")


HEX = "0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19"
TURN, SESSION = f"turn_{HEX}", f"blue/sess_{HEX}"
EACH: dict[Exception, tuple[int, str]] = {
    MalformedBodyError("not JSON"): (400, "malformed_body"),
    InvalidKeyError("empty"): (400, "invalid_idempotency_key"),
    MalformedHeaderError("If-Match"): (400, "malformed_header"),
    UnauthorizedError(): (401, "invalid_api_key"),
    LoopbackOnlyError(): (403, "loopback_only"),
    ProxiedRequestError("via"): (403, "proxied_without_keys"),
    NotPermittedError("may"): (403, "not_permitted"),
    SessionNotFoundError(SESSION): (404, "conversation_not_found"),
    ConversationNotFoundError("conv_x", param="conversation"): (404, "conversation_not_found"),
    TurnNotFoundError(TURN): (404, "response_not_found"),
    ResponseNotFoundError("resp_x"): (404, "response_not_found"),
    ItemNotFoundError(f"fc_{HEX}"): (404, "item_not_found"),
    BodyTimeoutError(): (408, "body_timeout"),
    SessionExistsError(SESSION): (409, "conversation_exists"),
    TurnInProgressError(TURN): (400, "conversation_locked"),
    ConversationLockedError("conv_x"): (400, "conversation_locked"),
    PreviousResponseNotFoundError("resp_x"): (400, "previous_response_not_found"),
    PreviousResponseOpenError("resp_x"): (400, "previous_response_in_progress"),
    UnknownModelError("m"): (404, "model_not_found"),
    ParameterError("no", param="prompt", code="unsupported_parameter"): (400, "unsupported_parameter"),
    HeadMovedError(TURN): (409, "head_moved"),
    ResumeConflictError("no", field="x", session_id=SESSION, turn_id=TURN): (409, "resume_conflict"),
    EventsLostError(TURN, after=1, state="interrupted", text="x"): (410, "events_lost"),
    MadeIsGoneError(session_id=SESSION, turn_id=TURN): (410, "idempotency_key_spent"),
    EventsDeletedError(TURN): (410, "events_deleted"),
    PreconditionFailedError("r"): (412, "precondition_failed"),
    InputTooLargeError("large", field="input"): (413, "input_too_large"),
    UnsupportedMediaTypeError(): (415, "unsupported_media_type"),
    InvalidRequestError("bad", field="temperature"): (400, "invalid_value"),
    KeyReusedError(): (422, "idempotency_key_reused"),
    QueueFullError("full"): (429, "rate_limit_exceeded"),
    BranchLimitError("full"): (429, "rate_limit_exceeded"),
    TurnLimitError("full"): (503, "turn_limit"),
    StreamLimitError("full"): (503, "stream_limit"),
    SessionLimitError("full"): (503, "session_limit"),
    HeldBytesLimitError(): (503, "held_bytes_limit"),
    ShuttingDownError(): (503, "shutting_down"),
    NotReadyError(): (503, "not_ready"),
    OwnedElsewhereError(SESSION, fence=1, address=None): (503, "owned_elsewhere"),
    TurnEndingError(session_id=SESSION, turn_id=TURN): (503, "turn_ending"),
    TurnMovedError(session_id=SESSION, turn_id=TURN): (503, "turn_moved"),
    OwnerHangsError(session_id=SESSION, turn_id=TURN): (504, "owner_hangs"),
    StoreError("no"): (503, "store_unavailable"),
    ResourcesExhaustedError(): (503, "resources_exhausted"),
    ValueError("a secret"): (500, "internal_error"),
    BadRequest(): (400, "bad_request"),
    MethodNotAllowed(["GET"]): (405, "method_not_allowed"),
}
UNTRANSLATED = (HeadMovedError, ResumeConflictError, PreconditionFailedError, OwnedElsewhereError, MalformedHeaderError)
"""Errors of calls that this API does not have, or whose words name a setting."""

FOR_OPERATORS = {CrossSiteError, NodeNotFoundError, ReportsUnavailableError, WorkerNotFoundError}
"""Errors of the calls under ``/admin`` alone."""


async def shown(
    refused: Exception,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    prefix: str = "",
    path: str = "/v1/responses",
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The status, the headers and the error member with which a request is answered."""
    scope = LOOPBACK | {"root_path": prefix}
    async with request_context(f"{prefix}{path}", method=method, headers=headers, scope=scope):
        response = openai_error_response(refusal_of(refused, scope=dict(request.scope)))
        body = json.loads(await response.get_data(as_text=False))
    assert body.keys() == {"error"}
    return response.status_code, {name.lower(): value for name, value in response.headers.items()}, body["error"]


@pytest.mark.parametrize("refused", EACH, ids=lambda it: type(it).__name__)
async def test_each_error_has_a_status_and_a_code_that_clients_know(refused: Exception) -> None:
    status, headers, member = await shown(refused)
    assert (status, member["code"]) == EACH[refused]
    if isinstance(refused, LastcallError):
        assert status == status_for_clients(type(refused))
    kinds = {429: "rate_limit_error"} | dict.fromkeys((500, 503, 504), "server_error")
    assert member["type"] == kinds.get(status, "invalid_request_error")
    assert member.keys() == {"message", "type", "param", "code"}
    assert "a secret" not in member["message"]
    assert headers["cache-control"] == "no-store"
    if not isinstance(refused, UNTRANSLATED):
        assert re.search(r"\b(turn|session)_?|blue", member["message"]) is None, member["message"]


def test_no_error_of_the_service_is_forgotten() -> None:
    assert STATUS_BY_ERROR.keys() - FOR_OPERATORS <= {type(it) for it in EACH}


@pytest.mark.parametrize(
    ("refused", "method", "headers", "is_told"),
    [
        (StoreError("the outcome is unknown", retry_after_s=None), "POST", {}, True),
        (StoreError("the outcome is unknown", retry_after_s=None), "GET", {}, False),
        (StoreError("the outcome is unknown", retry_after_s=None), "POST", {"Idempotency-Key": "a"}, False),
        (StoreError("nothing was begun"), "POST", {}, False),
        (ValueError("broken"), "POST", {}, True),
        (ValueError("broken"), "DELETE", {}, False),
        (OwnerHangsError(session_id=SESSION, turn_id=TURN), "POST", {}, True),
        (HeadMovedError(TURN), "DELETE", {}, True),
        (ShuttingDownError(), "POST", {}, False),
        (QueueFullError("full"), "POST", {}, False),
        (TurnEndingError(session_id=SESSION, turn_id=TURN), "POST", {}, False),
        (TurnMovedError(session_id=SESSION, turn_id=TURN), "POST", {}, False),
        (BodyTimeoutError(), "POST", {}, False),
    ],
)
async def test_a_client_is_told_not_to_repeat_what_it_might_do_twice(
    refused: Exception, method: str, headers: dict[str, str], is_told: bool
) -> None:
    _, answered, _ = await shown(refused, method, headers)
    assert answered.get("x-should-retry") == ("false" if is_told else None)


@pytest.mark.parametrize(
    ("path", "is_told"),
    [
        ("/v1/responses", False),
        ("/v1/conversations", False),
        ("/v1/conversations/conv_-a/items", False),
        ("/v1/conversations/conv_-a", True),
        ("/v1/chat/completions", True),
        ("/v1/nowhere", True),
    ],
)
async def test_a_key_counts_only_where_the_call_reads_it(path: str, is_told: bool) -> None:
    _, answered, _ = await shown(ValueError("broken"), headers={"Idempotency-Key": "a"}, path=path)
    assert answered.get("x-should-retry") == ("false" if is_told else None)


async def test_the_wait_and_the_place_of_an_accepted_response_are_told() -> None:
    _, headers, _ = await shown(ShuttingDownError())
    assert (headers["retry-after"], headers["connection"]) == ("1", "close")
    _, headers, _ = await shown(OwnerHangsError(session_id=SESSION, turn_id=TURN), prefix="/ai")
    assert headers["location"] == f"/ai/v1/responses/resp_{HEX}"
    _, headers, _ = await shown(MethodNotAllowed(["GET"]))
    assert headers["allow"] == "GET"


async def test_a_target_that_is_no_path_is_refused_in_the_same_shape() -> None:
    async with open_api() as api:
        error(await api.call("GET", "/v1/models", headers={"Host": "a..b"}), 400, "bad_request")
