"""A server under test: started as a process group of its own, signalled, and watched until all of it is gone."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

_PORT = re.compile(r"[Rr]unning on https?://[^:\s]+:(\d+)")
_PR_SET_CHILD_SUBREAPER = 36
KILLED_S = 30
"""Bound of the wait for killed processes: a busy machine may let them wait for seconds."""
ROOT = Path(__file__).resolve().parent.parent
"""The project's own directory."""


class ServerFailedError(Exception):
    """A server did not start. The error has its log and, if it has ended, its exit code."""

    def __init__(self, message: str, *, exit_code: int | None, log: str) -> None:
        super().__init__(f"{message}\n{log}")
        self.exit_code = exit_code
        self.log = log


@dataclass(frozen=True)
class Launch:
    """How to start a server.

    Args:
        argv: The command. It prints ``Running on http://127.0.0.1:PORT`` once it listens.
        env: Added to this process's environment, after every ``LASTCALL_*`` is removed from it.
        workers: How many of the command's processes print that line.
        cpus: The cores it may use, e.g. ``"0"``; all if None.
        stderr_pipe: Its output goes through a pipe that can be filled or closed; otherwise straight
            to the log file.
        folder: Its working directory.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    cpus: str | None = None
    stderr_pipe: bool = False
    folder: Path = ROOT


@dataclass(frozen=True)
class Gone:
    """The whole group is gone. ``exit_code`` is the started command's, negative for a signal."""

    exit_code: int
    at: float  # time.monotonic()
    exits: tuple[tuple[int, int, float], ...]  # (pid, exit code, when), in the order of their ends
    strays: tuple[int, ...]  # processes started by the server that left the group and still run


class ServerProcess:
    """A started server. Made by :func:`open_server`."""

    def __init__(self, launch: Launch, log_path: Path) -> None:
        _become_subreaper()
        self.log_path = log_path
        self.port = 0
        self.gone: Gone | None = None
        self._workers = launch.workers
        self._gone = trio.Event()
        self._exits: list[tuple[int, int, float]] = []
        argv = list(launch.argv)
        if launch.cpus is not None:
            argv = ["taskset", "--cpu-list", launch.cpus, *argv]
        env = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
        self._mark = f"SERVER_UNDER_TEST={uuid.uuid4().hex}"
        env |= {"PYTHONUNBUFFERED": "1", **launch.env} | dict([self._mark.split("=")])
        self.stderr_pipe = _StderrPipe(log_path) if launch.stderr_pipe else None
        with log_path.open("ab") as log:
            output = self.stderr_pipe.write_end if self.stderr_pipe else log.fileno()
            self._process = subprocess.Popen(
                argv,
                env=env,
                cwd=launch.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.pid = self._process.pid
        token = trio.lowlevel.current_trio_token()
        threading.Thread(target=self._reap, args=(token,), daemon=True).start()

    # The server's output

    def log(self) -> str:
        """Return the server's output so far."""
        return self.log_path.read_text(errors="replace")

    async def wait_listening(self) -> None:
        """Return once all workers have printed that they listen; then ``port`` is set.

        Raises:
            ServerFailedError: It ended instead.
        """
        await self.wait_logged(_PORT, times=self._workers)
        self.port = int(_PORT.findall(self.log())[0])

    async def wait_logged(self, pattern: str | re.Pattern[str], *, times: int = 1) -> None:
        """Return once its log has so many matches.

        Raises:
            ServerFailedError: It ended instead.
        """
        while len(re.findall(pattern, self.log())) < times:  # noqa: ASYNC110  a file's growth sets no event
            if self.gone is not None:
                raise ServerFailedError("the server has ended", exit_code=self.gone.exit_code, log=self.log())
            await trio.sleep(0.01)

    async def wait_workers(self, count: int) -> list[int]:
        """Return the workers once there are so many: one that has logged its last line lives on for a moment."""
        while len(workers := self.workers()) != count:  # noqa: ASYNC110  another process's children set no event
            await trio.sleep(0.02)
        return workers

    # Signals

    def signal_main(self, number: int) -> float:
        """Signal the process that was started, and return the time. Raises ServerFailedError if all have ended."""
        return self._signal(os.kill, number)

    def signal_group(self, number: int) -> float:
        """Signal all its processes, as systemd and a terminal do. Raises as :meth:`signal_main`."""
        return self._signal(os.killpg, number)

    def members(self) -> list[int]:
        """The live processes of the group, the started one first."""
        return sorted(
            (pid for pid in _all_pids() if _group_of(pid) == self.pid), key=lambda pid: (pid != self.pid, pid)
        )

    def workers(self) -> list[int]:
        """The worker processes that a master has spawned."""
        return [pid for pid in self.members() if pid != self.pid and b"spawn_main" in _command_line(pid)]

    def resident_bytes(self) -> int:
        """Return the resident memory of all its processes; shared pages count in each."""
        return sum(_resident_bytes(pid) for pid in self.members())

    def pss_bytes(self) -> dict[int, int]:
        """Return the memory of each of its processes; a page that several processes share counts in parts.

        Source: https://docs.kernel.org/filesystems/proc.html (``smaps_rollup``)
        """
        return {pid: _pss_bytes(pid) for pid in self.members()}

    async def settled_pss_bytes(self, *, quiet_s: float = 2.0, within_s: float = 20.0) -> dict[int, int]:
        """Return :meth:`pss_bytes` once their sum has not changed by 0.2 % for a while: after garbage collections."""
        with trio.move_on_after(within_s):
            before = -1.0
            while abs(sum(self.pss_bytes().values()) - before) > 0.002 * before:
                before = sum(self.pss_bytes().values())
                await trio.sleep(quiet_s)
        return self.pss_bytes()

    def cpu_seconds(self) -> float:
        """Return the processor time that all its live processes have used."""
        return sum(_cpu_seconds(pid) for pid in self.members())

    def written_bytes(self) -> int:
        """Return how many bytes all its live processes have written to files, pipes and sockets."""
        return sum(_written_bytes(pid) for pid in self.members())

    def _signal(self, send: Callable[[int, int], None], number: int) -> float:
        now = time.monotonic()
        try:
            send(self.pid, number)
        except ProcessLookupError:
            code = self.gone.exit_code if self.gone else None
            raise ServerFailedError("the server has ended by itself", exit_code=code, log=self.log()) from None
        return now

    async def wait_gone(self) -> Gone:
        """Wait until no process of the group is left."""
        await self._gone.wait()
        assert self.gone is not None
        return self.gone

    def _reap(self, token: trio.lowlevel.TrioToken) -> None:
        """Wait for every process of the group, in a thread: a blocking wait is exact and costs nothing.

        Orphans become children of this process (the subreaper) before their parent's end can be seen, so
        the group is gone when there is no child left to wait for.
        """
        while True:
            try:
                pid, status = os.waitpid(-self.pid, 0)
            except ChildProcessError:
                break
            self._exits.append((pid, os.waitstatus_to_exitcode(status), time.monotonic()))
        codes = {pid: code for pid, code, _ in self._exits}
        self._process.returncode = codes[self.pid]  # subprocess must not wait for the process as well
        # A process that left the group has kept its environment.
        strays = tuple(pid for pid in _all_pids() if self._mark.encode() in _environment(pid))
        self.gone = Gone(exit_code=codes[self.pid], at=self._exits[-1][2], exits=tuple(self._exits), strays=strays)
        try:
            token.run_sync_soon(self._gone.set)
        except trio.RunFinishedError:
            pass


class _StderrPipe:
    """A server's output through a pipe, copied to its log until a test stops the reading."""

    def __init__(self, log_path: Path) -> None:
        self._ends = list(os.pipe())
        self._read_end, self.write_end = self._ends
        self._log_path = log_path
        self._copying = True
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def fill(self) -> None:
        """Stop reading and fill the pipe: from now on a write that may block never returns."""
        self._stop_copying()
        # Opened anew: O_NONBLOCK belongs to the open file, which the server shares.
        own_end = os.open(f"/proc/self/fd/{self.write_end}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            while True:
                os.write(own_end, b"." * 4096)
        except BlockingIOError:
            os.close(own_end)

    def close(self) -> None:
        """Stop reading and close both ends: from now on a write raises BrokenPipeError. Idempotent."""
        self._stop_copying()
        while self._ends:
            os.close(self._ends.pop())

    def _stop_copying(self) -> None:
        if self._copying:
            self._copying = False
            os.write(self.write_end, b"\n")  # wakes the thread
            self._thread.join()

    def _copy(self) -> None:
        with self._log_path.open("ab", buffering=0) as log:
            while self._copying and (data := os.read(self._read_end, 65536)):
                log.write(data)


@asynccontextmanager
async def open_server(launch: Launch, *, log_path: Path, start_timeout_s: float = 60) -> AsyncIterator[ServerProcess]:
    """Start a server and wait until it listens. Processes that are left are killed when the context is left.

    Raises:
        ServerFailedError: It ended before it listened, or did not listen in time.
    """
    server = ServerProcess(launch, log_path)
    try:
        with trio.move_on_after(start_timeout_s) as scope:
            await server.wait_listening()
        if scope.cancelled_caught:
            raise ServerFailedError("the server does not listen", exit_code=None, log=server.log())
        yield server
    finally:
        if server.gone is None:
            try:
                os.killpg(server.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            with trio.move_on_after(KILLED_S, shield=True):
                await server.wait_gone()
        if server.stderr_pipe is not None:
            server.stderr_pipe.close()


def python_command(*arguments: str) -> list[str]:
    """Return the command of this interpreter with these arguments."""
    return [sys.executable, *arguments]


def _become_subreaper() -> None:
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("cannot become a child subreaper")


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  half the price


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _written_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    (kib,) = re.findall(r"^Pss:\s+(\d+) kB$", lines, re.MULTILINE)
    return int(kib) * 1024
