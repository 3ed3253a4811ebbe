"""Invalid request targets: refused before Quart sees them, because Quart would crash on them.

Quart reads the first character of a path that may be empty (``GET ?x``), splits an absolute URL that may be invalid
(``http://[``), decodes the query, in which HTTP/2 allows any byte, and encodes the host's name, which may be invalid
(``a..b``). Proven by ``tests/api/http/test_request_target.py``.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import BadRequest, HTTPException, NotFound

from service.api.http.locations import root_path_of
from service.api.http.problems import Refusal, refusal_of
from service.api.http.request_id import HEADER, request_id_of

_NEITHER = "The target of this request is neither a path nor a URL."
_HOST_LENGTH_MAX = 300
"""Bound on a host with its port: a name has at most 253 characters, and to check thousands takes tens of ms."""
_NO_HOST = "The Host header of this request is not a valid host name."


def fault_of(scope: dict[str, Any]) -> HTTPException | None:
    """Return the fault of a request's target; None for a path, an absolute URL or ``*`` (RFC 9112, 3.2).

    A path that begins with two slashes or with none is not found: Quart would read it as the path with one slash.
    """
    path: str = scope["path"]
    if not path or not scope["query_string"].isascii() or not (scope.get("raw_path") or b"").isascii():
        return BadRequest(_NEITHER)
    if path[0] != "/":
        try:
            path = urlsplit(path).path
        except ValueError:
            return BadRequest(_NEITHER)
    if not all(map(_names_host, (value for name, value in scope["headers"] if name.lower() == b"host"))):
        return BadRequest(_NO_HOST)
    if (root_path := root_path_of(scope)) and path.startswith(f"{root_path}/"):
        path = path.removeprefix(root_path)
    return None if path[:1] == "/" != path[1:2] else NotFound()


def _names_host(value: bytes) -> bool:
    if len(value) > _HOST_LENGTH_MAX:
        return False
    try:
        value.decode("latin-1").lower().encode("idna")
    except UnicodeError:  # a label is empty, or longer than 63 characters
        return False
    return True


async def refuse_target(
    scope: dict[str, Any],
    send: Any,
    fault: HTTPException,
    *,
    respond: Callable[[Refusal], TrioResponse],
    note: Callable[[Refusal], None],
) -> None:
    """Answer in place of the application.

    Args:
        respond: Makes the answer.
        note: Called with what is answered.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    refusal = refusal_of(fault, scope=scope)
    note(refusal)
    response = respond(refusal)
    response.headers[HEADER] = request_id_of(scope)
    headers = [(name.lower().encode(), value.encode()) for name, value in response.headers.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": await response.get_data(as_text=False), "more_body": False})
