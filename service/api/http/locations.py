"""Paths of sessions and turns, and the prefix that a proxy puts before all paths of this service.

The prefix is hypercorn's ``--root-path``, ASGI's ``root_path``; it is empty without such a proxy.
"""

import re
from typing import Any, cast
from urllib.parse import quote

from quart import request
from werkzeug.routing import Rule

from service.ids import public_id


def session_path(session_id: str) -> str:
    """The path of a session, of a scoped or public id."""
    return f"/sessions/{public_id(session_id)}"


def turn_path(session_id: str, turn_id: str) -> str:
    return f"{session_path(session_id)}/turns/{turn_id}"


def located(path: str) -> str:
    """Return a path of this service as the client of the current request sees it, with the prefix."""
    return prefix_of(cast("dict[str, Any]", request.scope)) + path


def prefix_of(scope: dict[str, Any]) -> str:
    """Return the prefix as it is written in a URL, without a slash at its end."""
    return quote(root_path_of(scope))


def path_template(rule: Rule) -> str:
    """Return the path of a route as documents have it: ``/sessions/{session_id}``."""
    return re.sub("<(?:[a-z]+:)?([^>]+)>", r"{\1}", rule.rule)


def take_prefix(scope: dict[str, Any]) -> None:
    """Make the path of a request begin with the prefix.

    Some proxies pass the path on unchanged; others take the prefix off, and Quart finds no route without it.
    """
    root_path = root_path_of(scope)
    if root_path and scope["path"] == root_path:
        scope["path"] = f"{root_path}/"
    if root_path and scope["path"].startswith("/") and not scope["path"].startswith(f"{root_path}/"):
        scope["path"] = root_path + scope["path"]


def root_path_of(scope: dict[str, Any]) -> str:
    """Return the prefix as it is in an ASGI path, without a slash at its end."""
    root_path: str = scope.get("root_path", "")
    return root_path.rstrip("/")
