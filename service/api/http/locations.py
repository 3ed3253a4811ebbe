"""Where things are to be found: paths, and the prefix that a proxy has for this service before all of them.

The prefix is hypercorn's ``--root-path``, ASGI's ``root_path``; empty where there is none.
"""

from typing import Any, cast
from urllib.parse import quote

from quart import request


def session_path(session_id: str) -> str:
    return f"/sessions/{session_id}"


def turn_path(session_id: str, turn_id: str) -> str:
    return f"{session_path(session_id)}/turns/{turn_id}"


def located(path: str) -> str:
    """A path of ours as the client of the current request has to ask for it."""
    return prefix_of(cast("dict[str, Any]", request.scope)) + path


def prefix_of(scope: dict[str, Any]) -> str:
    """The prefix, as it is written in a URL: it does not end with a slash."""
    return quote(root_path_of(scope))


def take_prefix(scope: dict[str, Any]) -> None:
    """Have the path of a request begin with the prefix, as it does where a proxy passes the path on as it came.

    Other proxies take the prefix off, and Quart finds nothing at a path without it.
    """
    root_path = root_path_of(scope)
    if root_path and scope["path"] == root_path:
        scope["path"] = f"{root_path}/"
    if root_path and scope["path"].startswith("/") and not scope["path"].startswith(f"{root_path}/"):
        scope["path"] = root_path + scope["path"]


def root_path_of(scope: dict[str, Any]) -> str:
    """The prefix, as a path of ASGI's begins with it."""
    root_path: str = scope.get("root_path", "")
    return root_path.rstrip("/")
