"""A reader: the steps that are there share a look at the file, as far as they are quick."""

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
"""The steps that are told together: the first should not wait long for the last."""
_SNAPSHOT_S = 0.005
"""How long steps begin on one snapshot. While it is held the log cannot begin anew, and others wait for that."""


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
        """Run the steps that are there, each on a snapshot that was taken after all of them were asked for."""
        taken = list(islice(arriving, _STEPS_MAX))
        left = deque(taken)
        while left:
            try:
                self._db.execute("BEGIN")
            except apsw.Error as error:
                told = self._faults.told(error, self._db)
                for step in left:
                    step.error = told
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
            except Exception as error:  # noqa: BLE001  it is its caller's
                step.error = self._faults.told(error, self._db) if isinstance(error, apsw.Error) else error
            if time.monotonic() >= deadline:
                return

    def rest(self, *, idle: bool) -> bool:  # noqa: ARG002
        return False

    def close(self) -> None:
        self._files.prepare_close(self._db)
        self._db.close()
