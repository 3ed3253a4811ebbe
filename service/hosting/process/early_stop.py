"""A stop during the start, before the service handles signals: the process ends with code 0, since nothing is open.

This module is imported before all others, so it imports nothing that takes a moment.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_on_stop_signals() -> Callable[[], None]:
    """End the process with code 0 on a stop signal, until the service or the master handles it. Returns the undo.

    A signal that this process ignores, as its parent wants it, stays ignored.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end)

    def undo() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is _end:
                signal.signal(number, handler)

    return undo


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)
