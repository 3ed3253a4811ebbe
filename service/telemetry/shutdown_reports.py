"""The file of past shutdowns, as the event loop uses it: a disk that hangs takes one thread and no call for long."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
import trio

from service.errors import ReportsUnavailableError, StartupError
from service.freezes import move_on_after
from service.settings import Settings
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics
from service.telemetry.shutdown_history import Past, ShutdownHistory, history_file, read_history

logger = structlog.get_logger("lastcall.shutdown_reports")

LAST_MAX = 50
"""So many of the newest stops and crashes are looked at for the gauges about the last ones."""
T = TypeVar("T")


class _Phases(msgspec.Struct):
    """How long a stop has taken, in milliseconds."""

    total: float


class _Timed(msgspec.Struct):
    """The part of a report that the gauges tell; another version may have written it otherwise."""

    phases_ms: _Phases


class ShutdownReports:
    """Reads and writes the file in a thread.

    There is one thread at most, and it does not count among Trio's others: names of upstreams are looked up in those,
    and a thread whose disk hangs does not come back when its caller leaves.

    Args:
        timeout_s: How long one call may wait for the thread and the disk together.

    Attributes:
        history: What this process writes.
    """

    def __init__(self, file: Path, *, timeout_s: float) -> None:
        self.history = ShutdownHistory(file)
        self._file = file
        self._timeout_s = timeout_s
        self._limiter = trio.CapacityLimiter(1)

    async def read(self, *, limit: int) -> list[Past]:
        """Read what has become of past processes, newest first. A caller that is cancelled leaves at once.

        Raises:
            ReportsUnavailableError: The disk refuses or hangs.
        """
        try:
            return await self._in_thread(partial(read_history, self._file, limit=limit))
        except OSError as error:
            raise ReportsUnavailableError(_words(error)) from error

    async def measure_last(self, metrics: Metrics) -> None:
        """Set the gauges about the stops before this start: no process lives to tell its own. None if a disk hangs.

        A task beside the service, which no fault of it ends.
        """
        try:
            for past in reversed(await self.read(limit=LAST_MAX)):
                line = past.line
                if line.at is None:
                    continue  # a crash: the file does not tell when it was
                result = "clean" if line.exit_code == 0 else "faults"
                metrics.set(families.LAST_STOP_AT, result, to=line.at.timestamp())
                with suppress(msgspec.ValidationError):
                    report = msgspec.convert(line.report, _Timed)
                    metrics.set(families.LAST_STOP_TOOK, result, to=report.phases_ms.total / 1000)
        except ReportsUnavailableError:
            return  # whoever asks for the reports is told so
        except Exception as error:  # noqa: BLE001  the edge of the task
            logger.warning("the metrics do not tell the last stops", file=str(self._file), reason=repr(error))

    async def note_started(self) -> None:
        """Write the line of this start, or warn that it is missing. It may still be written once a disk answers.

        A task beside the service, which no fault of it ends.
        """
        try:
            await self._in_thread(self.history.note_started)
        except Exception as error:  # noqa: BLE001  the edge of the task
            reason = _words(error) if isinstance(error, OSError) else repr(error)
            logger.warning("this start is not noted for GET /admin/shutdowns", file=str(self._file), reason=reason)

    async def check(self) -> None:
        """Check that the file can be there.

        Raises:
            StartupError: Its folder is missing, or something else has its name.
        """
        try:
            await self._in_thread(partial(_check, self._file))
        except OSError:
            return  # what else is wrong with it may pass, and is told when it is written

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Raises: OSError: The disk refuses, or does not answer in time."""
        with move_on_after(self._timeout_s):
            try:
                return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
            except RuntimeError as error:  # there may be no more threads
                raise OSError(errno.EAGAIN, str(error)) from error
        raise TimeoutError(errno.ETIMEDOUT, f"the disk has not answered within {self._timeout_s:g} s")


async def open_shutdown_reports(settings: Settings) -> ShutdownReports | None:
    """Find where the reports are kept; None if nowhere.

    Raises:
        StartupError: ``shutdowns_file`` cannot be a file.
    """
    file = history_file(settings)
    if file is None:
        return None
    reports = ShutdownReports(file, timeout_s=settings.store_timeout_s)
    if settings.shutdowns_file is not None:
        await reports.check()
    return reports


def _check(file: Path) -> None:
    try:
        is_file = stat.S_ISREG(os.lstat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not file.parent.is_dir():
            raise StartupError(
                f"shutdowns_file is {file}, but there is no folder {file.parent}: make it, or name another file."
            ) from error
        return
    if not is_file:
        raise StartupError(f"shutdowns_file is {file}, which is not a regular file: name another one.")


def _words(error: OSError) -> str:
    return error.strerror or type(error).__name__
