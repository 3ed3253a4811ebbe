"""Connections to the file, and bringing its schema up to date.

The file uses WAL, so that readers and the writer never wait for each other, and ``synchronous=FULL``, so that a
commit is on the disk when it returns.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from secrets import token_hex

import apsw
import msgspec
import structlog

from service.errors import StartupError
from service.storage.sqlite.faults import fault_of
from service.storage.sqlite.ownership import Ownership, any_alive
from service.storage.sqlite.schema import APPLICATION_ID, SCRIPTS

logger = structlog.get_logger("lastcall.store")

SYNCHRONOUS = "FULL"
CHECK_BYTES_MAX = 32 * 1024 * 1024
"""A file up to this size is checked whole at each opening; of a larger file only the beginning is checked."""

_LOCK_WAIT_S = 5.0
_LOCK_POLL_S = 0.001
_UPGRADE_WAIT_S = 1800.0
"""How long a start waits for the lock of a file whose schema is old: another process copies the file and changes it."""
_RESET_WAIT_S = 0.03
_CACHE_KIB = 16 * 1024
_WAL_KEPT_BYTES = 64 * 1024 * 1024
_COPIED_PAGES = 256


def connect(path: Path, *, query_only: bool = False) -> apsw.Connection:
    """A connection with our settings. It writes no checkpoints by itself."""
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        if db.readonly("main"):  # SQLite opens a file read-only if it may not write
            raise apsw.ReadOnlyError
        db.set_busy_handler(_wait_for_lock)
        # This setting counts for a new file only, and before WAL. In any other file the pragma would write, too.
        if db.pragma("page_count") == 0:
            db.pragma("auto_vacuum", "INCREMENTAL")
        if _enter_wal(db) != "wal":
            raise StartupError(f"{path} cannot be used: its file system does not allow shared memory (WAL).")
        db.pragma("synchronous", SYNCHRONOUS)
        db.pragma("foreign_keys", True)
        db.pragma("trusted_schema", False)
        db.pragma("cache_size", -_CACHE_KIB)
        db.pragma("journal_size_limit", _WAL_KEPT_BYTES)
        db.pragma("wal_autocheckpoint", 0)
        if query_only:
            db.pragma("query_only", True)
    except BaseException:
        db.close()
        raise
    return db


def _enter_wal(db: apsw.Connection) -> str:
    """Let the file use WAL from now on, if it does not yet. Returns the journal mode of the file after that.

    Where two connections change the mode of a new file at once, SQLite refuses one of them without a call of the busy
    handler, because neither could go on if both waited.
    """
    for calls in count():
        try:
            return str(db.pragma("journal_mode", "WAL"))
        except apsw.BusyError:
            if not _wait_for_lock(calls):
                raise
    raise AssertionError("count has no end")


def _wait_for_lock(calls: int) -> bool:
    """Wait for a lock that another process holds: its transactions take milliseconds."""
    time.sleep(_LOCK_POLL_S)
    return calls < _LOCK_WAIT_S / _LOCK_POLL_S


def reset_log(db: apsw.Connection, *, cut: bool = False) -> bool:
    """Write a checkpoint and restart the log. False if readers hold the log for too long.

    With ``cut`` the log's space goes back to the disk. The checkpoint blocks other writers, so a passive checkpoint
    runs first and leaves little work for it.
    """
    db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    deadline = time.monotonic() + _RESET_WAIT_S

    def wait_until_then(_: int) -> bool:
        time.sleep(_LOCK_POLL_S)
        return time.monotonic() < deadline

    db.set_busy_handler(wait_until_then)
    try:
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE if cut else apsw.SQLITE_CHECKPOINT_RESTART)
    except apsw.BusyError:
        return False
    finally:
        db.set_busy_handler(_wait_for_lock)
    return True


def create_file(path: Path, *, flags: int = 0) -> None:
    """Make the file if it does not exist, readable by its user alone, because it holds conversations.

    Args:
        flags: Further flags of ``open(2)``, such as ``O_EXCL``.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600))


def prepare(db: apsw.Connection, path: Path, *, ownership: Ownership) -> None:
    """Check the file and bring its schema to the newest version, after a copy of the old file.

    Raises:
        StartupError: The file is not ours, damaged, or from a newer version.
    """
    _check_intact(db, path)
    if version_of(db, path) == len(SCRIPTS):
        return
    with transaction(db, opens=path):
        version = version_of(db, path)  # another process may have changed the schema first
        if 0 < version < len(SCRIPTS):
            if any_alive(db, ownership):
                raise StartupError(f"{path} is in use by an older version of this service; stop that one first.")
            logger.info("the file is copied and brought to a new schema: this may take a while", schema=len(SCRIPTS))
            back_up(path, path.with_name(f"{path.name}.schema-{version}"), replace=True)
        for script in SCRIPTS[version:]:
            db.execute(script)
        db.pragma("user_version", len(SCRIPTS))
        db.pragma("application_id", APPLICATION_ID)


@contextmanager
def transaction(db: apsw.Connection, *, opens: Path | None = None) -> Iterator[None]:
    """A transaction around the body: all of its writes happen, or none if it raises.

    Args:
        opens: The file, where it is being opened: then this waits for a process that brings the schema up.
    """
    if opens is None:
        db.execute("BEGIN IMMEDIATE")
    else:
        _begin_after_upgrade(db, opens)
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some faults have rolled it back already
            db.execute("ROLLBACK")
        raise


def _begin_after_upgrade(db: apsw.Connection, path: Path) -> None:
    """Begin a transaction. An old schema says that another process may hold the lock to change it, for minutes."""
    deadline = time.monotonic() + _UPGRADE_WAIT_S
    waits = False
    while True:
        is_old = version_of(db, path) < len(SCRIPTS)  # before the attempt, which the process may end
        try:
            db.execute("BEGIN IMMEDIATE")
        except apsw.BusyError:
            if not is_old or time.monotonic() >= deadline:
                raise
            if not waits:
                logger.info("another process holds the lock of a file with an old schema: waiting until it is changed")
            waits = True
        else:
            return


def version_of(db: apsw.Connection, path: Path) -> int:
    """The version of the file's schema, 0 for an empty file. Raises: StartupError: The file is not ours, or newer."""
    version: int = db.pragma("user_version")
    if version > len(SCRIPTS):
        raise StartupError(
            f"{path} was written by a newer version of this service (schema {version}, this one knows {len(SCRIPTS)}); "
            "start that version, or restore a backup from before."
        )
    is_ours = db.pragma("application_id") == APPLICATION_ID
    if not is_ours and db.execute("SELECT count(*) FROM sqlite_schema").get:
        raise StartupError(f"{path} is a database of something else; name another file in store_url.")
    return version


def _check_intact(db: apsw.Connection, path: Path) -> None:
    if path.stat().st_size <= CHECK_BYTES_MAX and (problem := db.execute("PRAGMA quick_check(1)").get) != "ok":
        raise StartupError(f"{path} is damaged ({problem}); restore a backup, or move the file away to begin anew.")


class BackupProgress(msgspec.Struct, frozen=True):
    """How far a backup is.

    Attributes:
        log_bytes: The size of the store's log. While the copy is written, the log grows with every write to the store.
    """

    copied_bytes: int
    total_bytes: int
    log_bytes: int


def back_up(
    path: Path, copy: Path, *, replace: bool = False, on_progress: Callable[[BackupProgress], None] | None = None
) -> None:
    """Write a consistent copy of a database that may be in use: the database of the moment at which this call begins.

    The copy gets its name when it is whole. Until then it has a unique name; a failed copy is removed.

    Args:
        replace: Whether the copy may replace a file.
        on_progress: Called after each step of about a MiB. An error that it raises ends the backup.

    Raises:
        apsw.Error, OSError
    """
    unfinished = copy.with_name(f".lastcall-{token_hex(8)}.unfinished")
    create_file(unfinished, flags=os.O_EXCL)
    try:
        _copy(path, unfinished, on_progress)
        if replace:
            unfinished.replace(copy)
        else:
            _name(unfinished, copy)
        _sync_folder(copy.parent)
    finally:
        for left in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
            left.unlink(missing_ok=True)


def _copy(path: Path, to: Path, on_progress: Callable[[BackupProgress], None] | None) -> None:
    log = path.with_name(f"{path.name}-wal")
    with closing(connect(path, query_only=True)) as source, closing(apsw.Connection(str(to))) as target:
        # Without a read transaction, SQLite begins the copy anew at each write to the source: under constant writes
        # the copy would never be whole.
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        page_bytes = source.pragma("page_size")
        with target.backup("main", source, "main") as backup:
            while not backup.done:
                backup.step(_COPIED_PAGES)
                if on_progress is not None:
                    total, left = backup.page_count, backup.remaining
                    log_bytes = log.stat().st_size
                    on_progress(BackupProgress((total - left) * page_bytes, total * page_bytes, log_bytes))
        source.execute("ROLLBACK")
        target.pragma("journal_mode", "DELETE")  # one file, nothing beside it


def _sync_folder(folder: Path) -> None:
    """Bring a new name in a folder to the disk, so that the file is there after a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync folders
            raise
    finally:
        os.close(fd)


def _name(file: Path, name: Path) -> None:
    """Rename a file to a free name. Raises: FileExistsError."""
    try:
        name.hardlink_to(file)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        create_file(name, flags=os.O_EXCL)  # the replaced file is the empty one made here
        file.replace(name)


def startup_error(path: Path, error: apsw.Error | OSError) -> StartupError:
    words = fault_of(error)[0] if isinstance(error, apsw.Error) else f"{error.strerror}"
    return StartupError(f"The store sqlite:{path} cannot be opened: {words} (LASTCALL_STORE_URL names another).")
