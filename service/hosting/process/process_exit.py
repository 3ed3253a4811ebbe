"""The end of the process: its exit codes, and the fastest exit."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Literal, NoReturn

from service.errors import StartupError
from service.telemetry.escaping import escape
from service.telemetry.log_writer import LogWriter
from service.telemetry.logging import current_layout, drain_log

SAY_S = 0.25
LOGGER = "lastcall.process"
Level = Literal["info", "warning", "error"]


class ExitCode(IntEnum):
    """The exit codes of the process, taken from ``sysexits.h`` where one fits."""

    CLEAN = 0
    WATCHDOG = 70
    CRASHED = 71
    FAULTS = 75
    REFUSED = 78


def leave(code: int) -> NoReturn:
    """End the process now. Only the output and the log are written first.

    Call this when everything is closed or cannot be closed. Python's own finalisation takes 80 ms and more to free
    objects one by one, and the kernel frees the process's memory at once.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    drain_log()
    os._exit(code)


def leave_at_exit(code: int) -> None:
    """Call :func:`leave` when Python begins to finalise: after ``trio.run``, before the slow part.

    The slow part begins with a wait for all threads that are no daemons, and that wait comes before ``atexit``.
    """
    atexit.register(leave, code)
    threading._register_atexit(leave, code)  # type: ignore[attr-defined]


def say(text: str, *, level: Level = "warning") -> None:
    """Write lines to standard error without the log's queue. Works without an event loop and in a signal handler.

    The lines have the log's form once it is configured; before that (settings that cannot be read) they are plain
    text. Never raises, and waits for 0.25 s at most: a pipe without a reader must not keep the master from its
    workers. Bytes of a path or a variable that are not UTF-8 are escaped.
    """
    layout = current_layout()
    writer = LogWriter(2)  # the log's writer has a lock, which the interrupted code may hold
    for line in text.splitlines():
        said = f"lastcall: {escape(line)}" if layout is None else layout.line(line, level=level, logger_name=LOGGER)
        writer.write(f"{said}\n")
    writer.drain(SAY_S)
    writer.close()


_refusal_listeners: list[Callable[[str], None]] = []


def tell_refusals_to(listener: Callable[[str], None]) -> None:
    """Have this called with the reason when the start of this process is refused."""
    _refusal_listeners.append(listener)


def refuse_to_start(reason: Exception | str) -> NoReturn:
    """End a start that failed, and write the reason: a StartupError's text, or another error with its type."""
    text = str(reason) if isinstance(reason, StartupError | str) else repr(reason)
    say(text, level="error")
    for tell in _refusal_listeners:
        tell(text)
    leave(ExitCode.REFUSED)
