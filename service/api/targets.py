"""Request targets that no request can be made of: refused before Quart, which would crash on them, sees them.

Quart takes the first character of a path that may be empty (``GET ?x``), splits an absolute URL that may be none
(``http://[``) and decodes the query, in which HTTP/2 lets any byte pass. Proven by ``tests/api/test_targets.py``.
"""

from typing import Any
from urllib.parse import urlsplit

from werkzeug.exceptions import BadRequest

from service.api.problems import problem_response


def is_usable(scope: dict[str, Any]) -> bool:
    """Whether a connection's target is one of RFC 9112, 3.2: of ASCII, and a path, an absolute URL or ``*``."""
    path: str = scope["path"]
    if not path or not scope["query_string"].isascii() or not (scope.get("raw_path") or b"").isascii():
        return False
    if path[0] == "/":
        return True
    try:
        urlsplit(path)
    except ValueError:
        return False
    return True


async def refuse_target(scope: dict[str, Any], send: Any) -> None:
    """Answer in place of the application."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    response = problem_response(BadRequest("The target of this request is neither a path nor a URL."))
    headers = [(name.lower().encode(), value.encode()) for name, value in response.headers.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": await response.get_data(as_text=False), "more_body": False})
