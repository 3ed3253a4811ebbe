"""A disk that can be told to fail or to hang: a layer of SQLite's own file access (a VFS)."""

import threading

import apsw


class FaultyDisk(apsw.VFS):
    """While this VFS is installed, every database file that the process opens is on it.

    Attributes:
        write_fault: Raised by every write and sync, if set.
        read_fault: Raised by every read, if set.
        system_error: The errno that the operating system seems to have refused with.
        read_only: Files can be opened for reading only.
        running: While cleared, every sync hangs.
    """

    def __init__(self) -> None:
        self.name = "faulty disk"
        self.write_fault: type[apsw.Error] | None = None
        self.read_fault: type[apsw.Error] | None = None
        self.system_error = 0
        self.read_only = False
        self.running = threading.Event()
        self.running.set()
        self.hanging = threading.Event()
        super().__init__(self.name, "unix", makedefault=True)

    def xGetLastError(self) -> tuple[int, str]:  # noqa: N802
        return self.system_error, ""

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> "FaultyFile":  # noqa: N802
        if self.read_only:
            flags[0] = flags[0] & ~apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_READONLY
        return FaultyFile(self, name if isinstance(name, str) or name is None else name.filename(), flags)


class FaultyFile(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, path: str | None, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("unix", path, flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        if self._disk.read_fault is not None:
            raise self._disk.read_fault("told to")
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._disk.write_fault is not None:
            raise self._disk.write_fault("told to")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if not self._disk.running.is_set():
            self._disk.hanging.set()
            self._disk.running.wait()
        if self._disk.write_fault is not None:
            raise self._disk.write_fault("told to")
        super().xSync(flags)
