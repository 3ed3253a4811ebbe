"""A PostgreSQL server of its own, that a test may stop, kill, freeze, replicate and replace.

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

from tests.postgres_server import MEMORY_DISK, START_S
from tests.unprivileged import user_without_rights

if TYPE_CHECKING:
    import psycopg

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
        import psycopg

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
        import psycopg

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


@contextmanager
def open_database(programs: Path) -> Iterator[Database]:
    """A folder for a server, which is not made yet; removed with the server afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lastcall-pg-", dir=MEMORY_DISK))
    folder.chmod(0o711)  # a replica in a user namespace of its own uses the socket
    user = user_without_rights(folder)
    database = Database(programs, folder, user)
    try:
        yield database
    finally:
        database.remove()


def _children_of(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in tasks.read_text().split()]
