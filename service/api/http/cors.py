"""Cross-origin requests: for the pages of ``cors_origins`` and no others."""

from quart import request
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import Headers

from service.api.http.app_state import no_content

_METHODS = "GET, POST, PATCH, DELETE"
_REQUEST_HEADERS = "Authorization, Content-Type, Last-Event-ID, X-Request-ID"
_RESPONSE_HEADERS = "Location, Retry-After, X-Request-ID"
_PREFLIGHT_S = 600


def allowed_origin(origin: str | None, allowed: tuple[str, ...]) -> str | None:
    """What to answer to a page of this origin, if anything."""
    if origin is None:
        return None
    return "*" if "*" in allowed else origin if origin in allowed else None


def preflight_response(allowed: tuple[str, ...]) -> TrioResponse | None:
    """The answer to a browser that asks before its request. It carries no API key, so it comes before access."""
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
    """Let the requesting page read a response, if it may."""
    if not allowed:
        return
    headers.add("Vary", "Origin")
    origin = allowed_origin(request.headers.get("Origin"), allowed)
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = _RESPONSE_HEADERS
