"""The request's id: the caller's ``X-Request-ID``, or a new one. The answer and the log have it.

A caller's id is used if there is exactly one such header and its value matches :data:`~service.ids.REQUEST_ID`.
Otherwise a new id replaces it, so no unchecked text of a header gets into the log.
"""

from typing import Any, cast

from quart import request

from service.ids import is_request_id, new_request_id

HEADER = "X-Request-ID"
HEADER_BYTES = HEADER.lower().encode()
_KEY = "lastcall.request_id"


def name_request(scope: dict[str, Any]) -> str:
    """Set the id of the request in its ASGI scope, and return the id."""
    named = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == HEADER_BYTES]
    request_id = scope[_KEY] = named[0] if len(named) == 1 and is_request_id(named[0]) else new_request_id()
    return request_id


def current_request_id() -> str:
    """The id of the current request."""
    return request_id_of(cast("dict[str, Any]", request.scope))


def request_id_of(scope: dict[str, Any]) -> str:
    """The id of the request of this ASGI scope."""
    request_id: str = scope[_KEY]
    return request_id
