"""What SQLite and the disk say, in words for an operator."""

import os
import time
from math import inf
from pathlib import Path

import apsw
import structlog

from service.errors import ResourcesExhaustedError, StoreError, is_exhaustion

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
    """What is wrong with the file and what to do; and when it may have passed, if it may."""
    return _known(error) or (f"SQLite says: {error}", 5)


def _known(error: apsw.Error) -> tuple[str, int | None] | None:
    return next(((words, after) for kind, words, after in _WORDS if isinstance(error, kind)), None)


class Faults:
    """The faults of one connection, in words for those who asked; what and where it was goes to the log.

    A fault that goes on is logged every :data:`LOG_EVERY_S` seconds, not for each step that meets it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._logged_words = ""
        self._logged_at = -inf

    def told(self, error: apsw.Error, db: apsw.Connection) -> StoreError:
        """The error that callers see: they may be anybody, so that neither the path nor what SQLite says is in it."""
        code = db.system_errno if isinstance(error, apsw.CantOpenError | apsw.IOError) else 0
        self._log(error, system=os.strerror(code) if code else None)
        if is_exhaustion(code):
            told: StoreError = ResourcesExhaustedError()
        else:
            words, retry_after_s = _known(error) or ("the log says why", 5)
            told = StoreError(f"The store failed: {words}.", retry_after_s=retry_after_s)
        told.__cause__ = error  # it is raised in another thread than it is made in
        return told

    def _log(self, error: apsw.Error, *, system: str | None) -> None:
        words, _ = fault_of(error)
        now = time.monotonic()
        if words == self._logged_words and now - self._logged_at < LOG_EVERY_S:
            return
        self._logged_words, self._logged_at = words, now
        logger.error("the store failed", store=f"sqlite:{self._path}", fault=words, sqlite=str(error), system=system)
