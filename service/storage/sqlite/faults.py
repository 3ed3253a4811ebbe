"""Faults of SQLite and the disk, in words for an operator."""

import os
from math import inf
from pathlib import Path

import apsw
import structlog

from service.errors import ResourcesExhaustedError, StoreError, is_exhaustion
from service.storage.store import Monotonic

logger = structlog.get_logger("lastcall.store")

LOG_EVERY_S = 10.0

_WORDS: tuple[tuple[type[apsw.Error], str, int | None], ...] = (
    (apsw.FullError, "the disk is full; free some space", 5),
    (apsw.BusyError, "another process holds its lock", 1),
    (apsw.ReadOnlyError, "it cannot be written to; check its permissions and the file system", 5),
    (apsw.PermissionsError, "it cannot be written to; check its permissions", 5),
    (apsw.CorruptError, "it is damaged; stop the service and restore a backup", None),
    (apsw.NotADBError, "it is damaged, or no database; stop the service and restore a backup", None),
    (apsw.CantOpenError, "it cannot be opened; check that its directory exists and can be written to", 5),
    (apsw.IOError, "the disk refuses to read or write it", 5),
    (apsw.TooBigError, "a value is too large for it", None),
    (apsw.NoMemError, "there is no memory left", 5),
    (apsw.InterruptError, "it is being closed", 1),
)


def fault_of(error: apsw.Error) -> tuple[str, int | None]:
    """The fault and what to do, in words; and after how many seconds it may have passed, None if it will not."""
    return _known(error) or (f"SQLite says: {error}", 5)


def _known(error: apsw.Error) -> tuple[str, int | None] | None:
    return next(((words, after) for kind, words, after in _WORDS if isinstance(error, kind)), None)


class Faults:
    """Turns the faults of one connection into errors for callers; the details go to the log.

    A lasting fault is logged every :data:`LOG_EVERY_S` seconds, not for each failed step.
    """

    def __init__(self, path: Path, monotonic: Monotonic) -> None:
        self._path = path
        self._monotonic = monotonic
        self._logged_words = ""
        self._logged_at = -inf

    def translate(self, error: apsw.Error, db: apsw.Connection) -> StoreError:
        """The error that callers see. It has neither the path nor SQLite's words, because callers may be strangers."""
        code = db.system_errno if isinstance(error, apsw.CantOpenError | apsw.IOError) else 0
        self._log(error, system=os.strerror(code) if code else None)
        if is_exhaustion(code):
            store_error: StoreError = ResourcesExhaustedError()
        else:
            words, retry_after_s = _known(error) or ("the log says why", 5)
            store_error = StoreError(f"The store failed: {words}.", retry_after_s=retry_after_s)
        store_error.__cause__ = error  # raised in another thread than the one that makes it
        return store_error

    def _log(self, error: apsw.Error, *, system: str | None) -> None:
        words, _ = fault_of(error)
        now = self._monotonic()
        if words == self._logged_words and now - self._logged_at < LOG_EVERY_S:
            return
        self._logged_words, self._logged_at = words, now
        logger.error("the store failed", store=f"sqlite:{self._path}", fault=words, sqlite=str(error), system=system)
