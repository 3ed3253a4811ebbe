"""Cross-origin requests: allowed for the pages of ``cors_origins`` only."""

from quart import request
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import Headers

from service.api.http.app_state import no_content

_METHODS = "GET, POST, PATCH, DELETE"
_OF_OPENAI = (
    "Arch",
    "Helper-Method",
    "Lang",
    "OS",
    "Package-Version",
    "Retry-Count",
    "Runtime",
    "Runtime-Version",
    "Timeout",
)
"""What OpenAI's JavaScript client tells of itself with each request, in headers ``X-Stainless-…``."""
_REQUEST_HEADERS = ", ".join(
    (
        *("Authorization", "Content-Type", "Idempotency-Key", "If-Match", "Last-Event-ID", "Lastcall-Owner"),
        *("OpenAI-Beta", "OpenAI-Organization", "OpenAI-Project", "X-Request-ID"),
        *(f"X-Stainless-{name}" for name in _OF_OPENAI),
    )
)
_RESPONSE_HEADERS = "ETag, Location, Retry-After, X-Request-ID, X-Should-Retry"
_PREFLIGHT_S = 600


def allowed_origin(origin: str | None, allowed: tuple[str, ...]) -> str | None:
    """Return the allowed origin for the answer to a page of ``origin``; None if the page may not read it."""
    if origin is None:
        return None
    return "*" if "*" in allowed else origin if origin in allowed else None


def preflight_response(allowed: tuple[str, ...]) -> TrioResponse | None:
    """Return the answer to a browser's preflight request, which has no API key and so comes before the access check."""
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return None
    if allowed_origin(request.headers.get("Origin"), allowed) is None:
        return None
    headers = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": _REQUEST_HEADERS,
        "Access-Control-Max-Age": str(_PREFLIGHT_S),
    }
    response = no_content()
    response.headers.update(headers)
    return response


def allow_origin(headers: Headers, allowed: tuple[str, ...]) -> None:
    """Let the requesting page read a response, if its origin is allowed."""
    if not allowed:
        return
    headers.add("Vary", "Origin")
    origin = allowed_origin(request.headers.get("Origin"), allowed)
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = _RESPONSE_HEADERS
