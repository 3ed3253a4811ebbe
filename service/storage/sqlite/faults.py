"""What SQLite and the disk say, in words for an operator."""

from pathlib import Path

import apsw

from service.errors import StoreError

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
    for kind, words, retry_after_s in _WORDS:
        if isinstance(error, kind):
            return words, retry_after_s
    return f"SQLite says: {error}", 5


def store_error(path: Path, error: apsw.Error) -> StoreError:
    """The error that callers see."""
    words, retry_after_s = fault_of(error)
    told = StoreError(f"The store sqlite:{path} failed: {words}.", retry_after_s=retry_after_s)
    told.__cause__ = error  # it is raised in another thread than it is made in
    return told
