"""What a request holds: given back when the request is over, however it ends.

A handler returns before its response is sent, and a client may leave at any await between the two, so
neither a ``with`` in the handler nor the response's own close is sure to run. The ASGI call is: it
encloses both.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, cast

from quart import request

_KEY = "lastcall.held"

P = ParamSpec("P")


def holding(scope: dict[str, Any]) -> ExitStack:
    """The stack of one request, to be entered around its ASGI call."""
    held = ExitStack()
    scope[_KEY] = held
    return held


def give_back_later(give_back: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call ``give_back``, which must not raise, when the current request is over; last in, first out."""
    scope: dict[str, Any] = cast("dict[str, Any]", request.scope)
    held: ExitStack = scope[_KEY]
    held.callback(give_back, *args, **kwargs)
