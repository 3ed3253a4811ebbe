"""The ids of the work on each log line of a task. They are bound once, and not given in each call of the log.

A task inherits the ids of the task that starts it, and the task of another request or turn may start a turn's task. So
each piece of work binds its own ids, and they replace all inherited ids.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from structlog.typing import EventDict, WrappedLogger

_current: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=MappingProxyType({}))


class log_context:  # noqa: N801  used as a function
    """Put these ids, and no others, on the log lines of the current task until the block ends; None is left out.

    A class, because a generator would take several times the memory in each request and each running turn.
    """

    __slots__ = ("_before", "_ids")

    def __init__(self, **ids: str | None) -> None:
        self._ids = {name: value for name, value in ids.items() if value is not None}
        self._before: Mapping[str, str]

    def __enter__(self) -> None:
        self._before = _current.get()
        _current.set(self._ids)

    def __exit__(self, *_: object) -> None:
        _current.set(self._before)


def add_to_log_context(**ids: str | None) -> None:
    """Add ids to the log lines of the current task, until the :func:`log_context` around it ends.

    None removes an id that an earlier step has added.
    """
    changed = {**_current.get(), **ids}
    _current.set({name: value for name, value in changed.items() if value is not None})


def current_ids() -> Mapping[str, str]:
    """The ids on the log lines of the current task."""
    return _current.get()


def with_current_ids(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put the ids of the current task on an event, for structlog; what the call of the log names wins."""
    merged: dict[str, Any] = {**_current.get(), **event}
    return merged
