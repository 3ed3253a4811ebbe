"""The request's id: the caller's ``X-Request-ID``, or one that is made here. It is in the answer and in the log.

A caller's id is taken where there is one header with one of :data:`~service.ids.REQUEST_ID`; else it is replaced, so
that nothing of a header gets into the log as it came.
"""

from typing import Any, cast

from quart import request

from service.ids import is_request_id, new_request_id

HEADER = "X-Request-ID"
HEADER_BYTES = HEADER.lower().encode()
_KEY = "lastcall.request_id"


def name_request(scope: dict[str, Any]) -> str:
    """Give the request of this ASGI scope its id."""
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
