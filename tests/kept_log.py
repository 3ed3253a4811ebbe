"""The service's log, into memory."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from service.settings import Settings
from service.telemetry.logging import configure_logging

Format = Literal["json", "console"]
FORMATS: tuple[Format, ...] = ("json", "console")


@contextmanager
def kept_log(log_format: Format) -> Iterator[Callable[[], str]]:
    """Configure the log until the block ends; gives the way to read what was written so far."""
    fd = os.memfd_create("log")
    level = logging.getLogger().level
    log = configure_logging(Settings(log_format=log_format), fd=fd)
    try:
        yield lambda: os.pread(fd, 1 << 20, 0).decode()
    finally:
        log.uninstall()
        logging.getLogger().setLevel(level)
        os.close(fd)
