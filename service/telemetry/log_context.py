"""What each line of a task says of the work that it belongs to: ids, bound once and not with each call of the log.

A task inherits what is bound where it is started, and a turn's task is started by the request that accepts the turn, or
by an earlier turn's. So each piece of work binds its own ids, and they replace all that were inherited.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars


@contextmanager
def log_context(**ids: str | None) -> Iterator[None]:
    """Have the lines of the current task name these ids and no others until the block ends; None is left out."""
    before = get_contextvars()
    clear_contextvars()
    bind_contextvars(**{name: value for name, value in ids.items() if value is not None})
    try:
        yield
    finally:
        clear_contextvars()
        bind_contextvars(**before)


def add_to_log_context(**ids: str | None) -> None:
    """Have the lines of the current task name these as well, until the :func:`log_context` around it ends.

    None takes an id away that an earlier step has added.
    """
    bind_contextvars(**{name: ... if value is None else value for name, value in ids.items()})
