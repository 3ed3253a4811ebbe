"""The end of a client's input: most requests still get an answer, others treat it as the client's leaving.

Until bytes are sent to it, a client that has closed only its sending side looks like a client that has closed both. An
answer that needs no turn costs little. A turn costs money, so a request that waits for a turn ends.
"""

from collections.abc import Callable
from typing import cast

from quart import request

LEAVES_AT_END = "lastcall.leaves_at_end"
"""Key in the ASGI scope of the host's function, which :func:`leave_at_end_of_input` calls."""


def leave_at_end_of_input() -> None:
    """Treat the client of the current request as gone once its input ends, or at once if the input has ended.

    Call this before a turn is accepted, waited for or streamed. It has no checkpoint: the next one is cancelled.
    """
    note = cast("Callable[[], None] | None", request.scope.get(LEAVES_AT_END))
    if note is not None:
        note()
