"""Which POSTs may be repeated: by this process after the owner's death, and by a client that got no answer."""

from typing import cast

from quart import request

_REPEATABLE = "lastcall.repeatable"
"""Key in the ASGI scope of a POST that may be repeated."""


def allow_repeat() -> None:
    """Allow the current POST to be repeated, because it accepts no work.

    Call this before the step that may find another process as the owner.
    """
    cast("dict[str, object]", request.scope)[_REPEATABLE] = True


def repeat_is_allowed() -> bool:
    """Whether :func:`allow_repeat` was called for the current request."""
    return _REPEATABLE in request.scope
