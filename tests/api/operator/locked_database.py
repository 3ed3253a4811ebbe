"""A database whose lock another process holds."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from service.storage.sqlite import database


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, the store of this process refuses each write at once, and answers reads.

    In the place of a lock that is held for longer than a write waits for it: a test would have to make that time short,
    and on a busy machine other writes would take longer, too.
    """
    with closing(database.connect(path)) as other, pytest.MonkeyPatch.context() as patch:
        other.execute("BEGIN IMMEDIATE")
        patch.setattr(database, "_LOCK_WAIT_S", 0)
        yield
