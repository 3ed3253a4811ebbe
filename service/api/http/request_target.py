"""Request targets that no request can be made of: refused before Quart, which would crash on them, sees them.

Quart takes the first character of a path that may be empty (``GET ?x``), splits an absolute URL that may be none
(``http://[``) and decodes the query, in which HTTP/2 lets any byte pass. Proven by
``tests/api/http/test_request_target.py``.
"""

from typing import Any
from urllib.parse import urlsplit

from werkzeug.exceptions import BadRequest, HTTPException, NotFound

from service.api.http.problems import problem_response

_NEITHER = "The target of this request is neither a path nor a URL."


def fault_of(scope: dict[str, Any]) -> HTTPException | None:
    """What is wrong with a connection's target, if it is none of RFC 9112, 3.2: a path, an absolute URL or ``*``.

    Or nothing is there, because its path begins with two slashes or none: Quart would take it for the one with one.
    """
    path: str = scope["path"]
    if not path or not scope["query_string"].isascii() or not (scope.get("raw_path") or b"").isascii():
        return BadRequest(_NEITHER)
    if path[0] != "/":
        try:
            path = urlsplit(path).path
        except ValueError:
            return BadRequest(_NEITHER)
    return None if path[:1] == "/" != path[1:2] else NotFound()


async def refuse_target(scope: dict[str, Any], send: Any, fault: HTTPException) -> None:
    """Answer in place of the application."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    response = problem_response(fault)
    headers = [(name.lower().encode(), value.encode()) for name, value in response.headers.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": await response.get_data(as_text=False), "more_body": False})
