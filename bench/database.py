"""A PostgreSQL server of its own, that a bench or a test may stop, kill, freeze, replicate and replace.

The server of ``tests/postgres_server.py`` is shared by many tests and keeps nothing through a stop. This one commits
synchronously, because it is checked that what was acknowledged is there after a stop in mid-work.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from bench.unprivileged import user_without_rights

if TYPE_CHECKING:
    import psycopg

START_S = 60
"""Bound on the start of a server, on a loaded machine."""
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "fsync": "off",  # processes are killed here, and no machine loses its power
    "full_page_writes": "off",
    "synchronous_commit": "on",
    "wal_level": "replica",
    "max_wal_senders": "4",
    "hot_standby": "on",
    "jit": "off",
    "restart_after_crash": "on",
}


class Database:
    """One server in a folder. Made by :func:`open_database`."""

    def __init__(self, programs: Path, folder: Path, user: int | None) -> None:
        self.folder = folder
        self.socket = folder / ".s.PGSQL.5432"
        self._programs = programs
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        self._data = folder / "data"

    @property
    def url(self) -> str:
        """For what does not go through a link."""
        return f"postgresql://lastcall@/postgres?host={self.folder}"

    def make(self) -> None:
        options = ("-U", "lastcall", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self._run(self._programs / "initdb", "-D", self._data, *options)

    def make_standby_of(self, primary: "Database", name: str) -> None:
        """Copy a server that runs; this one follows it from its start on."""
        connection = f"host={primary.folder} user=lastcall application_name={name}"
        into = ("-D", self._data, "-d", connection)
        self._run(self._programs / "pg_basebackup", *into, "-R", "-X", "stream", "-c", "fast")

    async def start(self, **settings: str) -> None:
        """Start, and return once it takes connections. To be called in the main thread, with which the server ends."""
        options = [part for name, value in (_SETTINGS | settings).items() for part in ("-c", f"{name}={value}")]
        guard = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220  it takes a moment
                [*guard, self._programs / "postgres", "-D", self._data, "-k", self.folder, *options],
                user=self._user,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with trio.fail_after(START_S):
            while not await trio.to_thread.run_sync(self._takes_connections):  # noqa: ASYNC110  it sets no event
                await trio.sleep(0.05)

    def _takes_connections(self) -> bool:
        import psycopg  # noqa: PLC0415  an extra of the service: a bench without a database needs none

        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()[-3000:]
        try:
            self.run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    async def stop(self, mode: str = "immediate") -> None:
        """Stop as ``pg_ctl stop`` does. Idempotent."""
        if self._process is None:
            return
        self._process.send_signal({"immediate": signal.SIGQUIT, "fast": signal.SIGINT}[mode])
        await trio.to_thread.run_sync(self._process.wait, START_S)
        self._process = None

    def freeze(self) -> None:
        """Stop the time of all its processes."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def promote(self) -> None:
        """Make a standby the primary."""
        self.run("SELECT pg_promote(true, 60)")

    def name_standbys(self, names: str) -> None:
        """Let commits wait for these standbys; for none, if it is empty."""
        self.run(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'", "SELECT pg_reload_conf()")

    def connect(self) -> "psycopg.Connection[Any]":
        import psycopg  # noqa: PLC0415  as above

        return psycopg.connect(self.url, autocommit=True, connect_timeout=5)

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements on a connection of their own. Returns the rows of the last one."""
        with self.connect() as connection:
            cursors = [connection.execute(statement.encode()) for statement in statements]
            return cursors[-1].fetchall() if cursors[-1].description else []

    def cut_connections(self, *, share: float = 1.0) -> None:
        """Cut so large a share of the connections of clients."""
        self.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < {share}"
        )

    def remove(self) -> None:
        if self._process is not None:
            self.thaw()
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(START_S)
            finally:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd=self.folder)

    def _signal_all(self, number: int) -> None:
        assert self._process is not None
        for pid in (self._process.pid, *_children_of(self._process.pid)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # a backend that has ended meanwhile


def binaries() -> Path | None:
    """The directory of a server's programs; None if there is none on this machine."""
    found = [Path(shutil.which("initdb") or "/never").resolve().parent]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    return next((it for it in found if all((it / name).exists() for name in ("initdb", "postgres"))), None)


def _version(directory: Path) -> float:
    try:
        return float(directory.parent.name)
    except ValueError:
        return 0


def new_database(programs: Path, *, within: str | Path | None = MEMORY_DISK) -> Database:
    """A new folder for a server, which is not made yet. The caller removes it.

    Args:
        within: Where the folder is made. A server that refuses to run as root needs to reach it as another user.
    """
    folder = Path(tempfile.mkdtemp(prefix="lastcall-pg-", dir=within))
    folder.chmod(0o711)  # a replica in a user namespace of its own uses the socket
    return Database(programs, folder, user_without_rights(folder))


@contextmanager
def open_database(programs: Path) -> Iterator[Database]:
    """A folder in memory for a server, which is not made yet; removed with the server afterwards."""
    database = new_database(programs)
    try:
        yield database
    finally:
        database.remove()


def _children_of(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in tasks.read_text().split()]
