"""Resources of a request, which are given back when the request is over, after every kind of end.

A handler returns before its response is sent, and a client may leave at any await in between. So neither a ``with`` in
the handler nor the response's own close is sure to run. The end of the ASGI call, which encloses both, always runs.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

from quart import request

_KEY = "lastcall.request_resources"


class RequestResources:
    """The resources of one request: an exit stack for synchronous functions, entered around the ASGI call."""

    def __init__(self) -> None:
        self._releases: list[Callable[[], object]] = []

    def add(self, release: Callable[[], object]) -> None:
        self._releases.append(release)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release_all()

    def _release_all(self) -> None:
        try:
            while self._releases:
                self._releases.pop()()
        finally:
            if self._releases:  # one function raised: the remaining resources are still released
                self._release_all()


def request_resources(scope: dict[str, Any]) -> RequestResources:
    """Make the resources of the request of this ASGI scope."""
    resources = scope[_KEY] = RequestResources()
    return resources


def release_after_request(release: Callable[[], object]) -> None:
    """Call ``release`` when the current request is over; last in, first out."""
    scope: dict[str, Any] = cast("dict[str, Any]", request.scope)
    resources: RequestResources = scope[_KEY]
    resources.add(release)
