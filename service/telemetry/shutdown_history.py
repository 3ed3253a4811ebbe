"""The reports of past shutdowns, in a file beside the store: what the last stops were like, and which starts had none.

Each process appends a line when it serves and another one when it has stopped. A start without a stop, whose process is
gone, is a crash: it was killed, by a signal or for want of memory, or the power failed.

Several workers write to the file at once: a line is one write to the end of the file, which Linux does not mix with
others. It begins and ends with a line end, so that a line that a crash has torn spoils no other; a line that cannot be
read is passed over. A file that has grown beyond its bound becomes the one before (``….1``), which replaces the one
before that. Nothing is synced to the disk: the lines outlive a kill, and after a power failure the last may be missing.

The history must not hold up a stop, nor fail one: the last line is written by a thread that nobody waits for, for long.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec

from service import __version__
from service.settings import Settings

BYTES_MAX = 128 * 1024
"""Bound on one of the two files: some hundred stops."""
WRITE_S = 0.1
"""How long a stop waits for its line."""
FAULTS_MAX = 20
FAULT_CHARS_MAX = 300
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 19
"""Of the fields after the name of the program in proc_pid_stat(5): ``starttime``."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One process, from its start on.

    Attributes:
        run: Names it among all processes.
        boot, ticks: The boot of the machine, and when the process started in it: a process id is used again.
    """

    run: str
    pid: int
    started_at: datetime
    version: str
    boot: str
    ticks: str


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line: of the start, or with ``at`` of the stop.

    Attributes:
        exit_code: The code with which the process was about to leave.
        report: The shutdown report.
        bounds_ms: What the phases were allowed to take.
    """

    of: Run
    at: datetime | None = None
    exit_code: int = 0
    report: dict[str, Any] | None = None
    bounds_ms: dict[str, float] | None = None


def history_file(settings: Settings) -> Path | None:
    """Where the history is kept: ``shutdowns_file``, or beside a SQLite database; None if nowhere."""
    if settings.shutdowns_file is not None:
        return Path(settings.shutdowns_file)
    if settings.store_scheme != "sqlite":
        return None
    database = Path(os.path.realpath(settings.store_url.removeprefix("sqlite:")))
    return database.with_name(f"{database.name}-shutdowns")


class ShutdownHistory:
    """What this process writes. All methods but :meth:`note_stopped` may wait for the disk."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._run = Run(
            run=token_hex(8),
            pid=os.getpid(),
            started_at=datetime.now(UTC),
            version=__version__,
            boot=_boot(),
            ticks=_start_ticks(os.getpid()),
        )

    def note_started(self) -> None:
        """Write the line of the start. Without a file that can be written there is none: no start fails by that."""
        with suppress(OSError):
            _rotate(self._file)
            _append(self._file, Line(of=self._run))

    def note_stopped(self, report: dict[str, Any], *, exit_code: int, bounds_ms: dict[str, float]) -> None:
        """Write the line of the stop, the last thing that a process does. Waits for :data:`WRITE_S` at most."""
        faults = [str(fault)[:FAULT_CHARS_MAX] for fault in report.get("faults", ())][:FAULTS_MAX]
        line = Line(
            of=self._run,
            at=datetime.now(UTC),
            exit_code=exit_code,
            report=report | {"faults": faults},
            bounds_ms=bounds_ms,
        )

        def write() -> None:
            with suppress(OSError):
                _append(self._file, line)

        writing = threading.Thread(target=write, name="shutdown history", daemon=True)
        with suppress(RuntimeError):  # no more threads are allowed
            writing.start()
            writing.join(WRITE_S)


def read_history(file: Path, *, limit: int) -> list[Line]:
    """The last stops and crashes, newest first. A crash is a line without ``at``. Waits for the disk."""
    lines: dict[str, Line] = {}
    for name in (_before(file), file):
        for line in _lines_of(name):
            if line.at is not None or line.of.run not in lines:
                lines[line.of.run] = line
    past = [line for line in lines.values() if line.at is not None or not _is_alive(line.of)]
    past.sort(key=lambda line: line.at or line.of.started_at, reverse=True)
    return past[:limit]


def _append(file: Path, line: Line) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, b"\n" + msgspec.json.encode(line) + b"\n")
    finally:
        os.close(descriptor)


def _rotate(file: Path) -> None:
    """Let a file that has grown beyond the bound become the one before. One of several processes does it."""
    with suppress(FileNotFoundError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size <= BYTES_MAX:
                return
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.lstat().st_ino == os.fstat(descriptor).st_ino:
                file.replace(_before(file))
        finally:
            os.close(descriptor)


def _lines_of(file: Path) -> Iterator[Line]:
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(size - 2 * BYTES_MAX, 0))
            data = opened.read(2 * BYTES_MAX)
    except OSError:
        return
    for text in data.split(b"\n"):
        with suppress(msgspec.MsgspecError):
            if text:
                yield msgspec.json.decode(text, type=Line)


def _before(file: Path) -> Path:
    return file.with_name(f"{file.name}.1")


def _is_alive(run: Run) -> bool:
    """Whether the process of a start is still there, and not another one with its id."""
    return run.boot == _boot() and run.ticks != "" and run.ticks == _start_ticks(run.pid)


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_FIELD]
    except (OSError, IndexError):
        return ""
