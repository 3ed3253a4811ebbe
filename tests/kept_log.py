"""The service's log in memory, and functions that read a log."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from service.settings import Settings
from service.telemetry.escaping import escape
from service.telemetry.logging import configure_logging

Format = Literal["json", "console"]
FORMATS: tuple[Format, ...] = ("json", "console")


@contextmanager
def kept_log(log_format: Format, **settings: Any) -> Iterator[Callable[[], str]]:
    """Configure the log until the block ends; gives a function that reads the log so far."""
    fd = os.memfd_create("log")
    level = logging.getLogger().level
    log = configure_logging(Settings(log_format=log_format, **settings), fd=fd)
    try:
        yield lambda: os.pread(fd, 1 << 20, 0).decode()
    finally:
        log.uninstall()
        logging.getLogger().setLevel(level)
        os.close(fd)


def lines_of(log: str, message: str) -> list[dict[str, Any]]:
    """The lines of a log in JSON that have this message."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == message]


def said_in(log: str) -> list[str]:
    """The lines of ``process_exit.say``, apart from the log: plain text, or JSON once the process knows the format."""
    said = []
    for line in log.splitlines():
        if line.startswith("lastcall: "):
            said.append(line.removeprefix("lastcall: "))
        elif line.startswith("{") and (event := json.loads(line))["logger"] == "lastcall.process":
            assert event["pid"] > 0
            said.append(escape(event["message"]))
    return said
