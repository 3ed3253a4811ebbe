"""What the end of a client's input means: most requests are answered all the same, others take it for leaving.

A client that closes its sending side cannot be told from one that closes both before something is sent to it. An
answer that comes by itself costs little. A turn costs money, so that a request which waits for one does not go on.
"""

from collections.abc import Callable
from typing import cast

from quart import request

LEAVES_AT_END = "lastcall.leaves_at_end"
"""In the ASGI scope, put there by the host: to be called once the request takes the end of the input for leaving."""


def leave_at_end_of_input() -> None:
    """From now on the client of the current request has left once its input ends, or now if it has ended already.

    To be said before a turn is accepted, waited for or streamed. Without a checkpoint; the request is cancelled at one.
    """
    note = cast("Callable[[], None] | None", request.scope.get(LEAVES_AT_END))
    if note is not None:
        note()
