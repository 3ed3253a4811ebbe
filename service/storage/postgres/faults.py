"""Faults of PostgreSQL and the way to it, in words for an operator. None of them has the password."""

import re
from math import inf

import psycopg
import structlog

from service.errors import StartupError, StoreError
from service.storage.store import Monotonic

logger = structlog.get_logger("lastcall.store")

LOG_EVERY_S = 10.0

_WORDS: tuple[tuple[type[psycopg.Error], str, int | None], ...] = (
    (psycopg.errors.DiskFull, "the disk of the database is full; free some space", 5),
    (psycopg.errors.OutOfMemory, "the database has no memory left", 5),
    (psycopg.errors.TooManyConnections, "the database takes no more connections; raise max_connections", 5),
    (psycopg.errors.ReadOnlySqlTransaction, "the database takes no writes; is it a standby?", 5),
    (psycopg.errors.QueryCanceled, "the database took too long", 1),
    (psycopg.errors.LockNotAvailable, "the database took too long", 1),
    (psycopg.errors.DeadlockDetected, "many wanted to change the same at once", 1),
    (psycopg.errors.SerializationFailure, "many wanted to change the same at once", 1),
    (psycopg.errors.InsufficientPrivilege, "the user of store_url may not read or write its tables", 5),
    (psycopg.errors.UndefinedTable, "its tables are gone; stop the service and restore a backup", None),
    (psycopg.errors.DataCorrupted, "the database is damaged; stop the service and restore a backup", None),
    (psycopg.errors.IndexCorrupted, "the database is damaged; stop the service and restore a backup", None),
    (psycopg.errors.IdleInTransactionSessionTimeout, "this process was held up for seconds", 1),
)
_NO_ANSWER = "the database does not answer"

_AT_START: tuple[tuple[str, str], ...] = (
    ("password authentication failed", "the server refuses the user or the password; correct store_url"),
    ("no password supplied", "the server asks for a password; add it to store_url, or set PGPASSWORD or PGPASSFILE"),
    ("no pg_hba.conf entry", "the server's pg_hba.conf does not let this user in from here"),
    ("Peer authentication failed", "the server lets another user of this machine in; correct the user in store_url"),
    ("Ident authentication failed", "the server lets another user of this machine in; correct the user in store_url"),
    ("does not exist", "there is no such user or database; make it (createuser, createdb), or correct store_url"),
    ("authentication failed", "the server refuses the user or the password; correct store_url"),
    ("no such database", "there is no such database; make it (createdb), or correct store_url"),
    ("no such user", "the pooler does not know this user; add it to its auth_file, or correct store_url"),
    ("unsupported startup parameter", "the pooler refuses a parameter of store_url; see ignore_startup_parameters"),
    ("no more connections allowed", "the pooler takes no more connections; raise its max_client_conn"),
    ("query_wait_timeout", "the pooler has no free connection; raise its default_pool_size"),
    ("too many clients", "the server takes no more connections; raise max_connections"),
    ("remaining connection slots", "the server takes no more connections; raise max_connections"),
    ("is starting up", "the server is starting; try again in some seconds"),
    ("is shutting down", "the server is shutting down"),
    ("could not translate host name", "there is no host of this name; correct store_url"),
    ("failed to resolve host", "there is no host of this name; correct store_url"),
    ("Connection refused", "no server listens there; start PostgreSQL, or correct store_url"),
    ("No such file or directory", "no server listens there; start PostgreSQL, or correct store_url"),
    ("timeout expired", "the server does not answer"),
    ("certificate verify failed", "the server's certificate is not trusted; see sslmode and sslrootcert"),
    # A path ends with a quote there, and an address with its port.
    ('" failed: Permission denied', "this process may not open the server's socket; see unix_socket_permissions"),
    ("failed: Permission denied", "this machine does not let this process connect there"),
    ("permission denied", "the user of store_url may not do this; let it create a schema, or make the schema for it"),
)


class Faults:
    """Turns the faults of a store's connections into errors for callers; the details go to the log.

    A lasting fault is logged every :data:`LOG_EVERY_S` seconds, not for each failed step.
    """

    def __init__(self, name: str, monotonic: Monotonic) -> None:
        self._name = name
        self._monotonic = monotonic
        self._logged_words = ""
        self._logged_at = -inf

    def translate(self, error: psycopg.Error) -> StoreError:
        """The error that callers see. It has neither the place nor PostgreSQL's words: callers may be strangers."""
        words, retry_after_s = fault_of(error)
        self._log(words, error)
        store_error = StoreError(f"The store failed: {words}.", retry_after_s=retry_after_s)
        store_error.__cause__ = error  # raised in another thread than the one that makes it
        return store_error

    def _log(self, words: str, error: psycopg.Error) -> None:
        now = self._monotonic()
        if words == self._logged_words and now - self._logged_at < LOG_EVERY_S:
            return
        self._logged_words, self._logged_at = words, now
        logger.error(
            "the store failed", store=self._name, fault=words, postgresql=_line(error), sqlstate=error.sqlstate
        )


def fault_of(error: psycopg.Error) -> tuple[str, int | None]:
    """The fault in words; and after how many seconds it may have passed, None if it will not."""
    known = next(((words, after) for kind, words, after in _WORDS if isinstance(error, kind)), None)
    if known is not None:
        return known
    if "query_wait_timeout" in str(error):  # pgbouncer's, which has no code of its own
        return "the pooler of the database has no free connection", 1
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return _NO_ANSWER, 1
    return "the log says why", 5


def startup_error(place: str, error: psycopg.Error) -> StartupError:
    line = _line(error)
    words = next((words for mark, words in _AT_START if mark.lower() in line.lower()), None)
    if words is None:
        words = fault_of(error)[0]
    return StartupError(f"{place} cannot be used: {words} ({line}).")


def _line(error: psycopg.Error) -> str:
    """What PostgreSQL says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "failed: " in line or "FATAL" in line] or lines[:1]
    return re.sub(r"\s+", " ", telling[-1]).rstrip(".") if telling else type(error).__name__
