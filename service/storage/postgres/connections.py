"""A thread's connection to PostgreSQL, and the transactions of its steps.

Nothing here belongs to a session of PostgreSQL: no prepared statement, no setting that outlives a transaction, no lock
beyond one. So a pooler may give each transaction another connection.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import inf
from typing import Any, TypeVar

import msgspec
import psycopg
from psycopg.conninfo import conninfo_to_dict

from service.errors import StoreError
from service.setting_types import shown_store_url
from service.storage.postgres.faults import Faults, startup_error
from service.storage.postgres.rows import Row
from service.storage.postgres.schema import quoted

Connection = psycopg.Connection[Row]
Cursor = psycopg.Cursor[Row]
T = TypeVar("T")

CONNECT_TIMEOUT_S = 3
"""The time for one address of a server; libpq takes 2 s at least."""
BACKOFF_S = 0.5
"""The pause after a failed attempt to connect, in which steps fail at once."""
CANCEL_TIMEOUT_S = 2.0
ANSWER_GRACE_S = 2.0
"""How long an answer may take beyond the time that its statement has in the server."""
COMMIT_MAX_S = 10
"""The time of a commit, also of a long change: the next write waits for it."""
ATTEMPTS_MAX = 6
"""How often a step runs that met a deadlock, or a change of the row that it has read."""

_ADDED = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "client_encoding": "utf8",
    "application_name": "lastcall",
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 4000,
}
"""What a connection asks for unless the URL says something else: a peer that has vanished is noticed in 5 s."""

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
BEGIN_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
IDLE_MAX_S = 5
"""How long a transaction may wait for its process. Shorter than a lease: the transaction of a process that was stopped
is gone before another one takes over."""


class GivenUpError(Exception):
    """The caller of a step has left, and nothing of it may happen."""


class Me(msgspec.Struct, frozen=True):
    """This owner, as its rows name it. The nonce tells it from another one, to which a failover gave the same fence.

    The epoch of its connections passes when a commit may have been left in flight.
    """

    fence: int
    nonce: bytes
    epoch: int = 0


class Opening:
    """What begins a transaction: statements that are sent together, as one text.

    Args:
        statements: The last one may be a query.
        checked: Receives the row of the query; raises what stands against the transaction.
    """

    def __init__(self, *statements: str, checked: Callable[[Row | None], None] | None = None) -> None:
        self.text = "; ".join(statements)
        self.checked = checked


class Db:
    """A connection as the steps see it.

    In the text of a statement ``{s}.`` stands before each name of a table. Parameters are ``%s`` or ``%(name)s``.
    Results are binary.

    Attributes:
        executed: How many statements the step has done, with the one that begins its transaction.
        due_at: When the answer of the server must be here for which the thread waits; infinite if it waits for none.
    """

    def __init__(self, connection: Connection, schema: str) -> None:
        self.executed = 0
        self.due_at = inf
        self._answer_max_s = inf
        self._connection = connection
        self._schema = quoted(schema) + "."
        self._opening: Opening | None = None
        self._is_given_up: Callable[[], bool] | None = None
        self._is_open = False
        self._warnings: list[str] = []
        connection.add_notice_handler(self._note)

    def execute(self, statement: str, parameters: Any = None) -> Cursor:
        """Run a statement. Its result is there at once, but in a :meth:`pipeline` only when it is fetched.

        Raises:
            psycopg.Error
            GivenUpError
        """
        if self._is_given_up is not None and self._is_given_up():
            raise GivenUpError
        self.start()
        with self._answered():
            cursor = self._connection.execute(_text(statement, self._schema), parameters, binary=True)
        self.executed += 1
        return cursor

    @contextmanager
    def pipeline(self) -> Iterator[None]:
        """Send the statements within the context together. Their results are there when the context is left."""
        self.start()
        with self._answered(), self._connection.pipeline():
            yield

    @contextmanager
    def _answered(self, max_s: float = inf) -> Iterator[None]:
        """Wait for the server in the body. Another thread cuts the connection if that takes too long."""
        due_at = self.due_at
        self.due_at = time.monotonic() + min(self._answer_max_s, max_s)
        try:
            yield
        finally:
            self.due_at = due_at

    def start(self) -> None:
        """Begin the transaction now. A step does this first that cannot be repeated once it has begun its own work.

        Raises:
            psycopg.Error
        """
        opening, self._opening = self._opening, None
        if opening is None:
            return
        self._is_open = True
        with self._answered():
            cursor = self._connection.execute(_text(opening.text, self._schema))
        if opening.checked is not None:
            cursor.set_result(-1)
            opening.checked(cursor.fetchone())
        self.executed += 1

    # For the threads

    def begin(
        self, opening: Opening | None, *, statement_max_s: float = inf, is_given_up: Callable[[], bool] | None = None
    ) -> None:
        """Let the next statement begin a transaction; with None each statement is a transaction of its own.

        Args:
            statement_max_s: How long a statement may take in the server.
            is_given_up: Asked before each statement.
        """
        self.executed = 0
        self._answer_max_s = statement_max_s + ANSWER_GRACE_S
        self._opening = opening
        self._is_given_up = is_given_up
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether a transaction has begun."""
        return self._is_open

    @property
    def is_lost(self) -> bool:
        return self._connection.closed

    def commit(self) -> None:
        """Commit, if a transaction has begun.

        Raises:
            psycopg.Error: The commit failed, or its outcome is unknown if the connection is lost now.
            OutcomeUnknownError
        """
        self._opening = None
        if not self._is_open:
            return
        self._warnings.clear()
        with self._answered(COMMIT_MAX_S + ANSWER_GRACE_S):
            cursor = self._connection.execute("COMMIT")
        self._is_open = False
        if cursor.statusmessage != "COMMIT":
            raise psycopg.errors.InFailedSqlTransaction("the transaction was rolled back")
        if self._warnings:
            # The commit is done here, but a standby that must have it may not.
            raise OutcomeUnknownError(self._warnings[0])

    def roll_back(self) -> None:
        """Roll back, if a transaction has begun. A connection on which that fails is closed."""
        self._opening = None
        if self._is_open and not self.is_lost:
            try:
                with self._answered(COMMIT_MAX_S + ANSWER_GRACE_S):
                    self._connection.execute("ROLLBACK")
            except psycopg.Error:
                self.close()
        self._is_open = False

    def cancel(self) -> bool:
        """Cancel the statement that runs. May be called in another thread. False if the cancel may arrive later."""
        try:
            self._connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
        except (psycopg.Error, OSError):
            return False
        return True

    def close(self) -> None:
        with suppress(psycopg.Error):
            self._connection.close()

    def same_socket(self) -> socket.socket | None:
        """The socket of the connection under another number, which the caller closes. None if it is lost."""
        try:
            return socket.socket(fileno=os.dup(self._connection.pgconn.socket))
        except psycopg.Error:
            return None

    def _note(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warnings.append(str(notice.message_primary))


class OutcomeUnknownError(Exception):
    """A commit was answered, but its outcome is not certain."""


class Line:
    """A thread's connection: made when it is needed, and made anew when it was lost.

    Args:
        url: As libpq takes it.
    """

    def __init__(self, url: str, schema: str, faults: Faults) -> None:
        self._url = url
        self._schema = schema
        self._faults = faults
        self._db: Db | None = None
        self._socket: socket.socket | None = None
        self._cutting = threading.Lock()
        """Held while another thread uses the socket: its number may then not become that of another one."""
        self._failed_at = -inf
        self._failure: StoreError | None = None

    @property
    def current(self) -> Db | None:
        """The connection, if there is one."""
        return self._db

    def open(self) -> Db:
        """The connection. Raises: StoreError: There is none, and a new one cannot be made."""
        if self._db is not None and self._db.is_lost:
            self.drop()
        if self._db is None:
            self.take(self._reconnect())
        assert self._db is not None
        return self._db

    def take(self, db: Db) -> None:
        """Take a connection that was made already."""
        with self._cutting:
            self._db = db
            self._socket = db.same_socket()

    def drop(self) -> None:
        """Close the connection; the next step makes another one."""
        with self._cutting:
            db, self._db = self._db, None
            same, self._socket = self._socket, None
            if same is not None:
                same.close()
        if db is not None:
            db.close()

    def cut(self, *, late_at: float = inf) -> bool:
        """Cut the connection if the answer of the server was due before ``late_at``. Called in any thread.

        The thread that waits for the answer finds its connection lost. Returns whether there was something to cut.
        """
        with self._cutting:
            if self._db is None or self._socket is None or self._db.due_at >= late_at:
                return False
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            return True

    def _reconnect(self) -> Db:
        if self._failure is not None and time.monotonic() - self._failed_at < BACKOFF_S:
            raise self._failure
        try:
            db = Db(connect(self._url), self._schema)
        except psycopg.Error as error:
            self._failed_at, self._failure = time.monotonic(), self._faults.translate(error)
            raise self._failure from error
        self._failure = None
        return db


def name_of_store(url: str, schema: str) -> str:
    """The name of a store in messages, without secrets."""
    return f"{shown_store_url(url)} (schema {schema})"


def connect(url: str) -> Connection:
    """Raises: psycopg.OperationalError."""
    given = conninfo_to_dict(url)
    added: dict[str, Any] = {name: value for name, value in _ADDED.items() if name not in given}
    return psycopg.connect(url, autocommit=True, prepare_threshold=None, **added)


def connect_first(url: str, *, place: str) -> Connection:
    """Connect at the start of the service. Raises: StartupError."""
    try:
        return connect(url)
    except psycopg.Error as error:
        raise startup_error(place, error) from None  # its cause may tell a part of the URL


def timeouts(statement_s: float, *, lock_s: float | None = None) -> list[str]:
    """The statements that bound a transaction: its statements, the waits for its process, and each wait for a lock."""
    bounds = [
        f"SET LOCAL statement_timeout = '{statement_s:g}s'",
        f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_MAX_S}s'",
        "SET LOCAL jit = off",  # it may cost more than it saves wherever statistics mislead the planner
    ]
    if lock_s is not None:
        bounds.append(f"SET LOCAL lock_timeout = '{lock_s:g}s'")
    return bounds


def ends_connection(error: psycopg.Error) -> bool:
    """Whether the server has ended the connection with this error, also before the connection is seen to be closed."""
    return isinstance(
        error,
        psycopg.errors.AdminShutdown
        | psycopg.errors.CrashShutdown
        | psycopg.errors.IdleInTransactionSessionTimeout
        | psycopg.errors.IdleSessionTimeout,
    )


def is_repeatable(error: psycopg.Error) -> bool:
    """Whether the step may succeed if it runs again: the server has rolled it back because of others."""
    return isinstance(error, psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure)


@lru_cache(maxsize=2048)
def _text(statement: str, prefix: str) -> bytes:
    return statement.replace("{s}.", prefix).encode()
