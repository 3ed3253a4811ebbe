"""The end of the process: its exit codes, and the shortest way out."""

import atexit
import os
import sys
import threading
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
    """What the process that holds the tree returns. From ``sysexits.h``, as far as that fits."""

    CLEAN = 0
    WATCHDOG = 70
    CRASHED = 71
    FAULTS = 75
    REFUSED = 78


def leave(code: int) -> NoReturn:
    """End the process now, with what was said written and nothing else done.

    For when everything is closed, or never will be: the interpreter's own finalisation takes 80 ms and more to free,
    object by object, what the kernel takes back in one go.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    drain_log()
    os._exit(code)


def leave_at_exit(code: int) -> None:
    """Take the short way out once the interpreter begins to finalise: after ``trio.run``, before the slow part.

    That begins with a wait for all threads that are no daemons, whoever left them behind: so before ``atexit``, too.
    """
    atexit.register(leave, code)
    threading._register_atexit(leave, code)  # type: ignore[attr-defined]


def say(text: str, *, level: Level = "warning") -> None:
    """Write lines to standard error, apart from the log: where no event loop runs, also in a signal handler.

    The lines have the log's form once it is configured; before that (settings that cannot be read) they are plain
    text. Never raises, and never waits for long: a pipe without a reader must not keep the master from its workers. A
    byte of a path or a variable that is not UTF-8 is escaped.
    """
    layout = current_layout()
    writer = LogWriter(2)  # the log's own has a lock, which the code under a signal handler may hold
    for line in text.splitlines():
        said = f"lastcall: {escape(line)}" if layout is None else layout.line(line, level=level, logger_name=LOGGER)
        writer.write(f"{said}\n")
    writer.drain(SAY_S)
    writer.close()


def refuse_to_start(reason: Exception | str) -> NoReturn:
    """End a start that failed, and say why: an error without a sentence for people is said with its type."""
    say(str(reason) if isinstance(reason, StartupError | str) else repr(reason), level="error")
    leave(ExitCode.REFUSED)
