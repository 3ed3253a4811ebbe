"""A reader: waiting steps share one snapshot of the file, as long as they are quick."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import apsw

from service.storage.sqlite import database
from service.storage.sqlite.faults import Faults
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.sql_thread import Step

_STEPS_MAX = 100
"""The most steps of one batch: their outcomes are published together, and the first should not wait long."""
_SNAPSHOT_S = 0.005
"""How long one snapshot takes new steps. While a snapshot is held, the log cannot restart, and the writer waits."""


class Reader:
    """Runs steps that only read, for :class:`~service.storage.sqlite.sql_thread.SqlThread`."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._faults = Faults(files.path)
        self._db: apsw.Connection

    def open(self) -> None:
        """Raises: StartupError."""
        try:
            self._db = database.connect(self._files.path, query_only=True)
            if self._files.fault() is not None:
                self.close()
                raise self._files.lost_at_start()
        except apsw.Error as error:
            raise database.startup_error(self._files.path, error) from error

    def run(self, arriving: Iterator[Step[Any]]) -> Sequence[Step[Any]]:
        """Run the waiting steps, on a snapshot that is taken after all of them were submitted."""
        taken = list(islice(arriving, _STEPS_MAX))
        left = deque(taken)
        while left:
            try:
                self._db.execute("BEGIN")
            except apsw.Error as error:
                store_error = self._faults.translate(error, self._db)
                for step in left:
                    step.error = store_error
                break
            self._run_on_snapshot(left)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        return taken

    def _run_on_snapshot(self, left: deque[Step[Any]]) -> None:
        deadline = time.monotonic() + _SNAPSHOT_S
        while left:
            step = left.popleft()
            try:
                step.run(self._db)
            except Exception as error:  # noqa: BLE001  the caller gets the error
                step.error = self._faults.translate(error, self._db) if isinstance(error, apsw.Error) else error
            if time.monotonic() >= deadline:
                return

    def run_housekeeping(self, *, idle: bool) -> bool:  # noqa: ARG002
        return False

    def close(self) -> None:
        self._files.prepare_close(self._db)
        self._db.close()
