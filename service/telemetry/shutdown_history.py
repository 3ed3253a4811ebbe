"""The reports of past shutdowns, in a file beside the store: what the last stops were like, and which starts had none.

Each process appends a line when it serves and another one when it has stopped. A start without a stop, whose process is
gone, is a crash: it was killed, by a signal or for want of memory, or the power failed. Of a process in another
container or on another machine nothing tells here whether it is gone: its fate is unknown. A lock on the file would
tell, but its release would hold up the end of a process whose disk hangs.

Several workers write to the file at once: a line is one write to the end of the file, which Linux does not mix with
others. It begins and ends with a line end, so that a line that a crash has torn spoils no other; a line that cannot be
read is passed over. A file that has grown beyond its bound becomes the one before (``….1``), which replaces the one
before that. Nothing is synced to the disk: the lines outlive a kill, and after a power failure the last may be missing.

The history must not hold up a stop, nor fail one: the last line is written by a thread that nobody waits for, for long.
"""

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from service import __version__
from service.settings import Settings

BYTES_MAX = 128 * 1024
"""Bound on one of the two files: some hundred stops."""
WRITE_S = 0.1
"""How long a stop waits for its line."""
FAULTS_MAX = 20
FAULT_CHARS_MAX = 300
INTEGER_MAX = 2**53 - 1
"""Of numbers in the file that are shown: JSON carries no larger ones exactly."""
Time = Annotated[datetime, Meta(tz=True)]
Fate = Literal["alive", "gone", "unknown"]
"""What has become of a process that has left no report."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 19
"""Of the fields after the name of the program in proc_pid_stat(5): ``starttime``."""


_NAMESPACE = Path("/proc/self/ns/pid")
_FIRST_NAMESPACE = "pid:[4026531836]"
"""The namespace of process ids outside of all containers (``PROC_PID_INIT_INO`` of Linux)."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One process, from its start on.

    Attributes:
        run: Names it among all processes.
        boot, ticks: The boot of the machine, and when the process started in it: a process id is used again.
        namespace: That of the process id: each container has its own.
        host: The name of the machine, or of the container.
    """

    run: str
    pid: Annotated[int, Meta(ge=0, le=INTEGER_MAX)]
    started_at: Time
    version: str
    boot: str
    ticks: str
    namespace: str = ""
    host: str = ""


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line: of the start, or with ``at`` of the stop.

    Attributes:
        exit_code: The code with which the process was about to leave.
        report: The shutdown report.
        bounds_ms: What the phases were allowed to take.

    ``exit_code``, ``report`` and ``bounds_ms`` may be anything: another version may have written them, and a stop whose
    details cannot be shown is no crash.
    """

    of: Run
    at: Time | None = None
    exit_code: Any = 0
    report: Any = None
    bounds_ms: Any = None


class Past(msgspec.Struct, frozen=True):
    """What the file tells of a process: its stop (a line with ``at``), or its start and what has become of it."""

    line: Line
    fate: Fate


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
            namespace=_namespace(),
            host=os.uname().nodename,
        )

    def note_started(self) -> None:
        """Write the line of the start. Raises: OSError: There is no such line."""
        with suppress(OSError):  # another process does it, say
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


def read_history(file: Path, *, limit: int) -> list[Past]:
    """The last stops and the processes that have left no report, newest first, without those that live here.

    Waits for the disk. Without a file there is nothing to tell.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    lines: dict[str, Line] = {}
    for name in (_before(file), file):
        for line in _lines_of(name):
            if line.at is not None or line.of.run not in lines:
                lines[line.of.run] = line
    told = (Past(line, "gone" if line.at is not None else _fate(line.of)) for line in lines.values())
    past = [it for it in told if it.fate != "alive"]
    past.sort(key=lambda it: it.line.at or it.line.of.started_at, reverse=True)
    return past[:limit]


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    """Open a regular file, and nothing else: opening a pipe would wait, reading a device need not end."""
    descriptor = os.open(file, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def _append(file: Path, line: Line) -> None:
    text = b"\n" + msgspec.json.encode(line) + b"\n"
    with _opened(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _rotate(file: Path) -> None:
    """Let a file that has grown beyond the bound become the one before. One of several processes does it."""
    with _opened(file, os.O_RDONLY) as descriptor:
        if os.fstat(descriptor).st_size <= BYTES_MAX:
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.lstat().st_ino == os.fstat(descriptor).st_ino:
            file.replace(_before(file))


def _lines_of(file: Path) -> Iterator[Line]:
    try:
        with _opened(file, os.O_RDONLY) as descriptor:
            begin = max(os.fstat(descriptor).st_size - 2 * BYTES_MAX, 0)
            data = os.pread(descriptor, 2 * BYTES_MAX, begin)
    except FileNotFoundError:
        return
    for text in data.split(b"\n"):
        with suppress(ValueError, RecursionError):  # errors of msgspec are ValueErrors, and so is a byte of no UTF-8
            if text:
                yield msgspec.json.decode(text, type=Line)


def _before(file: Path) -> Path:
    return file.with_name(f"{file.name}.1")


def _fate(run: Run) -> Fate:
    """What has become of the process of a start: another one may have its id, and one elsewhere cannot be seen."""
    boot, namespace = _boot(), _namespace()
    if "" in (boot, namespace, run.boot, run.namespace, run.ticks):
        return "unknown"
    if (run.boot, run.namespace) == (boot, namespace):
        return "alive" if run.ticks == _start_ticks(run.pid) else "gone"
    is_here = run.namespace == namespace == _FIRST_NAMESPACE and run.host == os.uname().nodename
    return "gone" if is_here else "unknown"  # this machine has started anew since


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(_NAMESPACE.readlink())
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_bytes()  # the name of a program may be any bytes
        return stat_line.rpartition(b")")[2].split()[_START_FIELD].decode()
    except (OSError, IndexError):
        return ""
