"""The ids of the work on each log line of a task. They are bound once, and not given in each call of the log.

A task inherits the ids of the task that starts it, and the task of another request or turn may start a turn's task. So
each piece of work binds its own ids, and they replace all inherited ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars


@contextmanager
def log_context(**ids: str | None) -> Iterator[None]:
    """Put these ids, and no others, on the log lines of the current task until the block ends; None is left out."""
    before = get_contextvars()
    clear_contextvars()
    bind_contextvars(**{name: value for name, value in ids.items() if value is not None})
    try:
        yield
    finally:
        clear_contextvars()
        bind_contextvars(**before)


def add_to_log_context(**ids: str | None) -> None:
    """Add ids to the log lines of the current task, until the :func:`log_context` around it ends.

    None removes an id that an earlier step has added.
    """
    bind_contextvars(**{name: ... if value is None else value for name, value in ids.items()})
