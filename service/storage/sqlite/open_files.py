"""The files of an open store, and whether their names still lead to them.

A file that was deleted, moved or replaced stays open and takes writes, which are lost with the process. So the names
are checked around each commit: before it, so that a refused step writes nothing; after it, so that no lost write is
acknowledged. Both checks cost some 20 us of a commit. A change between the second check and the answer is not seen.

A starting process learns from locks which files other processes serve under this name. A lock file would be moved
with the other files, so the locks are on the folder, and on the folder above it, which may be replaced as well.
"""

import ctypes
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import apsw
import structlog

from service.errors import StartupError, StoreError, StoreLostError
from service.storage.sqlite.ofd_locks import OfdLocks

logger = structlog.get_logger("lastcall.store")

_BESIDE = ("-wal", "-shm", "-owners")
_NUMBER_BITS = 32
_FOLDERS = 2
_LOOKS_MAX = 100
"""Each look but the last needs another process that opened or closed the files meanwhile."""
_RETRY_AFTER_S = 5

Identity = tuple[int, int] | None
"""The device and the inode to which a name leads; None if it leads to no file."""


def real_path(path: str | Path) -> Path:
    """The full path of the file itself, without links, so that the files beside it are the same for every link."""
    return Path(os.path.realpath(path))


class OpenFiles:
    """The database file and the files beside it.

    All methods block, for microseconds: they are for the threads of the store.

    Args:
        name: The path in the settings. If it is a link, the link is watched as well, because it may be changed.

    Attributes:
        path: The file itself.
        were_lost: Whether the names led elsewhere when the store was closed.
    """

    def __init__(self, name: str | Path) -> None:
        self.path = real_path(name)
        self.were_lost = False
        self._name = Path(os.path.abspath(name))  # noqa: PTH100  links stay as they are
        self._names = (self._name, *(self.path.with_name(f"{self.path.name}{ending}") for ending in _BESIDE))
        self._opened: tuple[Identity, ...] = ()
        self._locks: list[tuple[OfdLocks, int]] = []
        self._logged = ""

    # At the start

    def refuse_others(self) -> None:
        """Check that no other process serves other files under this name. Changes nothing.

        Raises:
            StartupError: Another process does.
            OSError: The names cannot be read.
        """
        self._open_locks()
        for _ in range(_LOOKS_MAX):
            found = self._look()
            if not self._others_serve(None) or not (None in found or self._others_serve(_number_of(found))):
                return
            if self._look() == found:
                break
            # Another process made the files between the look and the question for the locks: compare the new files.
        self.close()
        raise self._served_elsewhere()

    def note_opened(self, db: apsw.Connection) -> None:
        """Remember the files that are open now, and lock them, so that starting processes see that they are served.

        Raises:
            StartupError: The files were just deleted or replaced, or another process serves other files.
            OSError: The names cannot be read.
        """
        found = self._look()
        if None in found or _has_moved(db):
            raise self.lost_at_start()
        number = _number_of(found)
        for locks, base in self._locks:
            locks.hold(base + number, shared=True)
        if self._others_serve(number):
            raise self._served_elsewhere()
        self._opened = found

    def lost_at_start(self) -> StartupError:
        return StartupError(f"{self._name} was deleted or replaced while it was being opened; start again.")

    def _open_locks(self) -> None:
        for folder, base in _places(self._name, self.path):
            with suppress(OSError):  # a folder that may not be read
                locks = OfdLocks(folder, flags=os.O_RDONLY | os.O_DIRECTORY)
                try:
                    locks.others_hold(base)
                except OSError:  # a file system without locks
                    locks.close()
                else:
                    self._locks.append((locks, base))

    def _others_serve(self, number: int | None) -> bool:
        """Whether other processes serve files with another number under this name."""
        end = 1 << _NUMBER_BITS
        if number is None:
            return any(locks.others_hold(base, length=end) for locks, base in self._locks)
        return any(
            locks.others_hold(base, length=number) or locks.others_hold(base + number + 1, length=end - number - 1)
            for locks, base in self._locks
        )

    def _served_elsewhere(self) -> StartupError:
        return StartupError(
            f"{self._name} was deleted or replaced, and another process of this service still serves the file that was "
            "there before; stop that process, or put its file back, and start again."
        )

    # While it is open

    def fault(self) -> StoreError | None:
        """The error while writes must be refused; None if every name leads to the open file.

        The log gets one critical line when this begins, and a line when it ends.
        """
        try:
            found = self._look()
        except OSError as error:
            self._log("the database file cannot be inspected: writes are refused", error=error.strerror)
            return StoreError("The store failed: its file cannot be inspected.", retry_after_s=_RETRY_AFTER_S)
        if found == self._opened:
            self._log("")
            return None
        changed = [
            f"{name.name} {'deleted' if now is None else 'replaced'}"
            for name, was, now in zip(self._names, self._opened, found, strict=True)
            if now != was
        ]
        self._log(
            "the database file was deleted, moved or replaced: writes are refused, and what it holds is lost when the "
            "last process that has it open stops, unless it is put back before",
            changed=changed,
        )
        return StoreLostError("The store failed: its file was deleted or replaced.", retry_after_s=_RETRY_AFTER_S)

    def _look(self) -> tuple[Identity, ...]:
        return tuple(map(_identity, self._names))

    def _log(self, event: str, **more: object) -> None:
        if event == self._logged:
            return
        self._logged = event
        if event:
            logger.critical(event, store=f"sqlite:{self.path}", **more)
        else:
            logger.warning("the database file is there again: writes go on", store=f"sqlite:{self.path}")

    # At the end

    def prepare_close(self, db: apsw.Connection) -> None:
        """Prepare the close of a connection: the last close deletes files by name, which may be files of others now."""
        if self._opened and self.fault() is not None:
            self.were_lost = True
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def close(self) -> None:
        """Release the locks, so that other processes may serve other files under this name. Idempotent.

        To be called after the last write, and before the last connection closes and removes files.
        """
        for locks, _ in self._locks:
            locks.close()
        self._locks.clear()


def _places(*names: Path) -> set[tuple[Path, int]]:
    """The folders that have the locks, each with the byte where those for a name begin."""
    places = set()
    for name in names:
        for folder in list(name.parents)[:_FOLDERS]:
            key = sha256(os.fsencode(name.relative_to(folder))).digest()
            places.add((folder, (int.from_bytes(key[:4]) >> 1) << _NUMBER_BITS))
    return places


def _number_of(identities: tuple[Identity, ...]) -> int:
    return int.from_bytes(sha256(repr(identities).encode()).digest()[: _NUMBER_BITS // 8])


def _identity(name: Path) -> Identity:
    try:
        found = os.stat(name)  # noqa: PTH116  half the time
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _has_moved(db: apsw.Connection) -> bool:
    """Whether the open file's inode differs from that of its path. Source: sqlite3_file_control."""
    moved = ctypes.c_int(0)
    db.file_control("main", apsw.SQLITE_FCNTL_HAS_MOVED, ctypes.addressof(moved))
    return bool(moved.value)
