"""A stop during the start, before the service handles signals: the process ends with code 0, since nothing is open.

This module is imported before all others, so it imports nothing that takes a moment.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_on_stop_signals(*, hold_hangups: bool = False) -> Callable[[], None]:
    """End the process with code 0 on a stop signal, until the service or the master handles it. Returns the undo.

    A signal that this process ignores, as its parent wants it, stays ignored.

    Args:
        hold_hangups: Hold SIGHUP back, for a process that is about to be a master. By default SIGHUP would kill it, and
            systemd takes that for a clean end. The master starts its workers after it, so they have what was changed.
    """
    handlers = dict.fromkeys(_SIGNALS, _end) | ({signal.SIGHUP: _hold} if hold_hangups else {})
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)

    def undo() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) in (_end, _hold, _held):
                signal.signal(number, handler)

    return undo


def deliver_hangups() -> None:
    """Hold SIGHUP back no longer, because this process is no master. One that has come ends the process now."""
    handler = signal.getsignal(signal.SIGHUP)
    if handler in (_hold, _held):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if handler is _held:
        signal.raise_signal(signal.SIGHUP)


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)


def _hold(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGHUP, _held)


def _held(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGHUP after the first one: there is nothing more to keep."""
