"""A disk that loses unsynced data in a power cut: a layer of SQLite's own file access (a VFS)."""

import random
import threading
from pathlib import Path

import apsw

Write = tuple[int, bytes | None]
"""An offset and the bytes written there; None: the file was truncated there."""


class LossyDisk(apsw.VFS):
    """While this VFS is installed, every database file that the process opens is on it."""

    def __init__(self) -> None:
        self.name = "lossy disk"
        self.syncs = 0
        self._lock = threading.Lock()
        self._synced: dict[str, bytes] = {}
        self._unsynced: dict[str, list[Write]] = {}
        super().__init__(self.name, "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> "LossyFile":  # noqa: N802
        path = name if isinstance(name, str) or name is None else name.filename()
        return LossyFile(self, path, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        super().xDelete(filename, syncdir)
        with self._lock:
            self._synced.pop(filename, None)
            self._unsynced.pop(filename, None)

    def note(self, path: str, write: Write) -> None:
        with self._lock:
            self._unsynced.setdefault(path, []).append(write)

    def sync(self, path: str) -> None:
        with self._lock:
            self.syncs += 1
            self._synced[path] = _applied(self._synced.get(path, b""), self._unsynced.pop(path, []))

    def cut_the_power(self, database: Path, left: Path, luck: random.Random | None = None) -> None:
        """Write a database's files, as the power cut leaves them, into the directory ``left``, under their names.

        Unsynced writes are lost; with ``luck`` some of them survive, in any combination.
        """
        with self._lock:
            files = [path for path in self._synced.keys() | self._unsynced.keys() if path.startswith(str(database))]
            for path in sorted(files):
                unsynced = self._unsynced.get(path, [])
                lucky = [write for write in unsynced if luck is not None and luck.random() < 0.5]
                (left / Path(path).name).write_bytes(_applied(self._synced.get(path, b""), lucky))


class LossyFile(apsw.VFSFile):
    def __init__(self, disk: LossyDisk, path: str | None, flags: list[int]) -> None:
        self._disk = disk
        self._path = path
        super().__init__("unix", path, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        if self._path is not None:
            self._disk.note(self._path, (offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        super().xTruncate(newsize)
        if self._path is not None:
            self._disk.note(self._path, (newsize, None))

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        if self._path is not None:
            self._disk.sync(self._path)


def _applied(content: bytes, writes: list[Write]) -> bytes:
    file = bytearray(content)
    for offset, data in writes:
        if data is None:
            del file[offset:]
        else:
            file.extend(bytes(max(0, offset - len(file))))
            file[offset : offset + len(data)] = data
    return bytes(file)
