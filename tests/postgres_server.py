"""A pytest plugin: a PostgreSQL server for the tests that need one, one for each worker, which ends with the run.

A test needs it that has the parameter ``postgres`` or asks for the fixture ``postgres``; one that asks for
``postgres_pooler`` needs pgbouncer, too. Without these programs such tests are skipped; in CI they fail.
``--postgres-programs`` names the folder of the programs of another server, and with ``--postgres-pooler`` all stores
reach the server through pgbouncer.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from bench.database import MEMORY_DISK, START_S, binaries
from bench.unprivileged import user_without_rights
from tests import pgbouncer
from tests.pgbouncer import Pooler

if TYPE_CHECKING:
    import psycopg

NAME = "postgres"
POOLER = "postgres_pooler"
PASSWORD = "open-sesame"
"""Of the user ``guarded``, whom the server asks for it."""

CONNECT_S = 60
"""Bound of an attempt to connect: for each the server starts a process, which takes seconds on a busy machine."""

_USES_MAX = 50
"""So often a schema is emptied and used again. What was deleted stays in its indexes until it is vacuumed."""
_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "400",
    "shared_buffers": "64MB",
    # Behaviour is tested, not what a power failure leaves.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "autovacuum": "off",
    "jit": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "4GB",
}
_HBA = "local all guarded scram-sha-256\nlocal all all trust\n"
_ROLES = {"lastcall": "", "guarded": PASSWORD, "mortal": ""}


class PostgresServer:
    """A running server.

    Attributes:
        directory: The folder of its socket.
        entrance: The folder of the socket through which stores reach it.
        pooler: A pooler before it, once a test has asked for one.
    """

    def __init__(self, directory: Path, process: "subprocess.Popen[bytes]") -> None:
        self.directory = directory
        self.entrance = directory
        self.process = process
        self.pooler: Pooler | None = None
        self._connection: psycopg.Connection[Any] | None = None
        self._numbers = count()
        self._empty: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        """A database of it, for the user who may do everything."""
        return self.url_of("lastcall")

    def start_pooler(self, name: str, **settings: float) -> Pooler:
        """Start a pooler before this server. The caller stops it."""
        program = pgbouncer.program()
        if program is None:
            _miss("there is no pgbouncer: install the package pgbouncer to run the tests of a pooler")
        return pgbouncer.start_pooler(program, self.directory / name, self.directory, _ROLES, _HBA, **settings)

    def url_of(self, user: str, database: str = "postgres", *, entrance: Path | None = None) -> str:
        return f"postgresql://{user}@/{database}?host={entrance or self.entrance}&connect_timeout={CONNECT_S}"

    def connect(self) -> None:
        import psycopg

        self._connection = psycopg.connect(self.url_of("lastcall", entrance=self.directory), autocommit=True)

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements. Returns the rows of the last one."""
        assert self._connection is not None
        cursors = [self._connection.execute(statement.encode()) for statement in statements]
        return cursors[-1].fetchall() if cursors[-1].description else []

    @contextmanager
    def new_schema(self) -> Iterator[str]:
        """The name of a schema that does not exist; dropped afterwards."""
        schema = f"store_{next(self._numbers)}"
        try:
            yield schema
        finally:
            self.drop(schema)

    @contextmanager
    def empty_schema(self) -> Iterator[str]:
        """The name of a schema that is empty or does not exist yet, emptied afterwards: to make tables takes long."""
        schema, uses = self._empty.pop() if self._empty else (f"store_{next(self._numbers)}", 0)
        try:
            yield schema
            self._clear(schema)
        except BaseException:
            self.drop(schema)
            raise
        if uses < _USES_MAX:
            self._empty.append((schema, uses + 1))
        else:
            self.drop(schema)

    def cut_connections(self) -> None:
        """Cut the connections of all stores, as a restart of the server does, and wait until they are gone."""
        self.run("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    def drop(self, schema: str) -> None:
        self.run("SET client_min_messages = warning", f"DROP SCHEMA IF EXISTS {schema} CASCADE")

    def _clear(self, schema: str) -> None:
        tables = self.run(f"SELECT tablename FROM pg_tables WHERE schemaname = '{schema}' AND tablename <> 'store'")
        new_secret = f"UPDATE {schema}.store SET secret = sha256(random()::text::bytea)"
        self.run("; ".join([new_secret, *(f"DELETE FROM {schema}.{table}" for (table,) in tables)]))

    def stop(self) -> None:
        if self.pooler is not None:
            self.pooler.stop()
        if self._connection is not None:
            self._connection.close()
        self.process.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.directory, ignore_errors=True)


_SERVER = pytest.StashKey[PostgresServer]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("postgres")
    group.addoption("--postgres-programs", type=Path, metavar="DIR", help="the folder of initdb and postgres")
    group.addoption("--postgres-pooler", action="store_true", help="stores reach the server through pgbouncer")


def needed_binaries() -> Path:
    """As :func:`binaries`, for a test that needs them: without them it is skipped, and in CI it fails."""
    programs = binaries()
    if programs is None:
        _miss("there is no PostgreSQL server: install the package postgresql to run the tests of this store")
    return programs


def _miss(words: str) -> NoReturn:
    """Skip a test whose program is not there; in CI it fails."""
    if "CI" in os.environ:
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def start_server(programs: Path) -> PostgresServer:
    """Start a server in a new folder."""
    directory = Path(tempfile.mkdtemp(prefix="lastcall-pg-", dir=MEMORY_DISK))
    user = user_without_rights(directory)
    data = directory / "data"
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "lastcall", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
            check=True,
            capture_output=True,
            user=user,
            cwd=directory,
        )
        (data / "pg_hba.conf").write_text(_HBA)
        options = [option for name, value in _SETTINGS.items() for option in ("-c", f"{name}={value}")]
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", directory, *options],
            user=user,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the signal of Ctrl-C is for pytest, which stops the server
            preexec_fn=_die_with_parent,  # noqa: PLW1509  no other thread runs yet
        )
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    server = PostgresServer(directory, process)
    try:
        _wait_for(server)
        server.run(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'", "CREATE ROLE mortal LOGIN")
    except BaseException:
        server.stop()
        raise
    return server


def _die_with_parent() -> None:
    """Let a process end when its parent does, however that ends (prctl(2), ``PR_SET_PDEATHSIG``)."""
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


def _wait_for(server: PostgresServer) -> None:
    import psycopg

    deadline = time.monotonic() + START_S
    while True:
        try:
            server.connect()
            return
        except psycopg.OperationalError:
            if server.process.poll() is not None or time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def _needs_server(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    values: Iterable[object] = () if call is None else call.params.values()
    return not {NAME, POOLER}.isdisjoint(getattr(item, "fixturenames", ())) or NAME in values


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test, which look for what it leaves behind
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not _needs_server(item):
        return
    pooled = item.config.getoption("postgres_pooler")
    if _SERVER not in item.config.stash:
        item.config.stash[_SERVER] = start_server(item.config.getoption("postgres_programs") or needed_binaries())
    server = item.config.stash[_SERVER]
    if server.pooler is None and (pooled or POOLER in getattr(item, "fixturenames", ())):
        server.pooler = server.start_pooler("pooler")
        if pooled:
            server.entrance = server.pooler.directory


def pytest_unconfigure(config: pytest.Config) -> None:
    server = config.stash.get(_SERVER, None)
    if server is not None:
        del config.stash[_SERVER]
        server.stop()


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> PostgresServer:
    """The server of this worker."""
    return request.config.stash[_SERVER]


@pytest.fixture
def postgres_pooler(postgres: PostgresServer) -> Pooler:
    """The pooler before the server of this worker."""
    assert postgres.pooler is not None
    return postgres.pooler


def running(config: pytest.Config) -> PostgresServer:
    """The server of this worker, for a test with the parameter ``postgres``."""
    return config.stash[_SERVER]
