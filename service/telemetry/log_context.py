"""The ids of the work on each log line of a task. They are bound once, and not given in each call of the log.

A task inherits the ids of the task that starts it, and the task of another request or turn may start a turn's task. So
each piece of work binds its own ids, and they replace all inherited ids.
"""

from typing import Any

from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars


class log_context:  # noqa: N801  used as a function
    """Put these ids, and no others, on the log lines of the current task until the block ends; None is left out.

    A class, because a generator would take several times the memory in each request and each running turn.
    """

    __slots__ = ("_before", "_ids")

    def __init__(self, **ids: str | None) -> None:
        self._ids = {name: value for name, value in ids.items() if value is not None}
        self._before: dict[str, Any]

    def __enter__(self) -> None:
        self._before = get_contextvars()
        clear_contextvars()
        bind_contextvars(**self._ids)

    def __exit__(self, *_: object) -> None:
        clear_contextvars()
        bind_contextvars(**self._before)


def add_to_log_context(**ids: str | None) -> None:
    """Add ids to the log lines of the current task, until the :func:`log_context` around it ends.

    None removes an id that an earlier step has added.
    """
    bind_contextvars(**{name: ... if value is None else value for name, value in ids.items()})
