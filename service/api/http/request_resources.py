"""What a request holds: given back when the request is over, however it ends.

A handler returns before its response is sent, and a client may leave at any await between the two, so
neither a ``with`` in the handler nor the response's own close is sure to run. The ASGI call is: it
encloses both.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

from quart import request

_KEY = "lastcall.held"


class RequestResources:
    """What one request holds, to be entered around its ASGI call. An exit stack of the plainest kind."""

    def __init__(self) -> None:
        self._give_back: list[Callable[[], object]] = []

    def add(self, give_back: Callable[[], object]) -> None:
        self._give_back.append(give_back)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_all_back()

    def _give_all_back(self) -> None:
        try:
            while self._give_back:
                self._give_back.pop()()
        finally:
            if self._give_back:  # one of them raised: the others are given back all the same
                self._give_all_back()


def request_resources(scope: dict[str, Any]) -> RequestResources:
    """What the request of this ASGI scope will hold."""
    resources = scope[_KEY] = RequestResources()
    return resources


def release_after_request(give_back: Callable[[], object]) -> None:
    """Call ``give_back`` when the current request is over; last in, first out."""
    scope: dict[str, Any] = cast("dict[str, Any]", request.scope)
    resources: RequestResources = scope[_KEY]
    resources.add(give_back)
