"""A disk of a few MiB: a layer of SQLite's own file access (a VFS) that counts the bytes in a folder."""

import errno
import os
from pathlib import Path

import apsw


class SmallDisk(apsw.VFS):
    """While this VFS is installed, the database files of a folder cannot take more than ``bytes_max`` in all.

    Attributes:
        others_bytes: The bytes that other programs have written to the disk.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self.name = "small disk"
        self.folder = folder
        self.bytes_max = bytes_max
        self.others_bytes = 0
        self._allocate = os.posix_fallocate
        super().__init__(self.name, "unix", makedefault=True)

    @property
    def free(self) -> int:
        sizes = (it.stat().st_size for it in self.folder.iterdir() if not it.name.endswith("-shm"))
        return self.bytes_max - self.others_bytes - sum(sizes)

    def fill(self) -> None:
        """Let other programs take all free space."""
        self.others_bytes += max(self.free, 0)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Takes the place of ``os.posix_fallocate``."""
        if offset + length - os.fstat(fd).st_size > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._allocate(fd, offset, length)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> "SmallDiskFile":  # noqa: N802
        return SmallDiskFile(self, name if isinstance(name, str) or name is None else name.filename(), flags)


class SmallDiskFile(apsw.VFSFile):
    def __init__(self, disk: SmallDisk, path: str | None, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("unix", path, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        growth = offset + len(data) - super().xFileSize()
        if growth > 0 and growth > self._disk.free:
            raise apsw.FullError("told to")
        super().xWrite(data, offset)
