"""Errors as OpenAI's clients read them: ``{"error": {"message": "…", "type": "…", "param": null, "code": "…"}}``.

Source: https://platform.openai.com/docs/guides/error-codes
"""

import msgspec
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import NotFound

from service.api.http.problems import Refusal

_PATH = "/v1"


class ErrorMember(msgspec.Struct, frozen=True, kw_only=True):
    """The error. Its ``code`` is the code of the problem document that other calls would answer."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """``{"error": {"message": "…", "type": "invalid_request_error", "param": null, "code": "not_found"}}``"""

    error: ErrorMember


def is_path_of_openai(path: str) -> bool:
    """Whether a path, without the prefix, belongs to OpenAI's API."""
    return path == _PATH or path.startswith(f"{_PATH}/")


def openai_error_response(refusal: Refusal) -> TrioResponse:
    """Return the response for a client of OpenAI's API."""
    problem = refusal.problem
    message = problem.detail
    if isinstance(refusal.error, NotFound):
        page = problem.type.partition("#")[0]
        message = (
            f"This server does not speak OpenAI's API yet: it has no call under {_PATH}. Its own API is at {page}."
        )
    member = ErrorMember(
        message=message,
        type="server_error" if problem.status >= 500 else "invalid_request_error",
        param=problem.field,
        code=problem.code,
    )
    body = msgspec.json.encode(ErrorBody(member))
    return TrioResponse(body, problem.status, refusal.headers, content_type="application/json")
