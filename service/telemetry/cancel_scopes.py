"""The cancel scopes that a task is in: the one place that looks at what Trio keeps to itself.

Trio tells the nurseries of a task, but not the scopes that a task has opened without a nursery. Each scope has a
status, whose parent is the status of the scope around it, and a task knows the innermost one. And Trio's public
``cancel_called`` cancels a scope whose deadline has passed: a look must not do that.

Nothing here changes anything. ``tests/telemetry/test_cancel_scopes.py`` fails first when a new Trio has other names.
"""

# ruff: noqa: SLF001  see above

from typing import Any

import trio

_DEPTH_MAX = 200
"""More scopes than any task of this service is in: a bound on one look."""


def scopes_in(task: trio.lowlevel.Task) -> list[trio.CancelScope]:
    """The scopes that a task has entered and not left, the outermost first; those of its nurseries are among them.

    Scopes around the nursery in which the task was started belong to other tasks. A task that is over has none.
    """
    status: Any = task._cancel_status
    around = task.parent_nursery._cancel_status if task.parent_nursery is not None else None
    if status is around or status is None:
        return []
    scopes: list[trio.CancelScope] = []
    while status is not None and status is not around and len(scopes) < _DEPTH_MAX:
        scopes.append(status._scope)
        status = status._parent
    scopes.reverse()
    return scopes


def is_over(task: trio.lowlevel.Task) -> bool:
    """Whether a task has ended."""
    return task._cancel_status is None


def was_left(scope: trio.CancelScope) -> bool:
    """Whether the task that has entered a scope has left it again."""
    return scope._cancel_status is None


def is_cancelled(task: trio.lowlevel.Task) -> bool:
    """Whether the next checkpoint of a task raises, because of any scope around it."""
    status: Any = task._cancel_status
    return status is not None and bool(status.effectively_cancelled)


def was_cancelled(scope: trio.CancelScope) -> bool:
    """Whether a scope was cancelled. Unlike ``cancel_called`` this cancels no scope whose deadline has passed."""
    return scope._cancel_called
