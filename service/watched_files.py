"""Files that are read again when they change, without a restart."""

from collections.abc import Iterable
from pathlib import Path

LOOK_INTERVAL_S = 0.4
"""The time between two looks at the files. A change is in force after two to three of them."""

_Look = dict[Path, tuple[int, ...] | None]


class WatchedFiles:
    """A set of files.

    Attributes:
        files: The files, which may be others from look to look.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self.files = files
        self._looked: _Look | None = None
        self._read: _Look | None = None

    def note_read(self) -> None:
        """Note that the files are about to be read as they are now."""
        self._read = _look_at(self.files)

    def note_unread(self) -> None:
        """Note that the files could not be used: :meth:`have_changed` tells them again, also if they stay as they are.

        The cause may lie elsewhere: no descriptor was left, or a certificate is not valid yet.
        """
        self._read = None

    def have_changed(self) -> bool:
        """Look at the files once. Whether they have changed since they were read, and not since the last look.

        A file that changes from look to look may be half written. Returns True once for each change.
        """
        looked = _look_at(self.files)
        is_settled, self._looked = looked == self._looked, looked
        if not is_settled or looked == self._read:
            return False
        self._read = looked
        return True


def _look_at(files: Iterable[Path]) -> _Look:
    return {path: _state_of(path) for path in files}


def _state_of(path: Path) -> tuple[int, ...] | None:
    """What changes with a file: also if another one takes its place, and keeps the old time. None without a file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev
