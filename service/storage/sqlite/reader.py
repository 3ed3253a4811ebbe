"""A reader: waiting steps share one snapshot of the file, as long as they are quick."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import apsw

from service.storage.sql_thread import Step
from service.storage.sqlite import database
from service.storage.sqlite.faults import Faults
from service.storage.sqlite.open_files import OpenFiles
from service.storage.store import Monotonic

_Step = Step[apsw.Connection, Any]
_STEPS_MAX = 100
"""The most steps of one batch, which share snapshots."""
_SNAPSHOT_S = 0.005
"""How long one snapshot takes new steps. While a snapshot is held, the log cannot restart, and the writer waits. The
outcomes of its steps are published together, so that the thread does not hold results for long."""


class Reader:
    """Runs steps that only read, for :class:`~service.storage.sql_thread.SqlThread`.

    Args:
        steps_max: The most steps of one batch; 1 for steps with large results, of which the thread then holds one.
    """

    def __init__(self, files: OpenFiles, *, monotonic: Monotonic, steps_max: int = _STEPS_MAX) -> None:
        self._files = files
        self._steps_max = steps_max
        self._faults = Faults(files.path, monotonic)
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

    def run(self, arriving: Iterator[_Step]) -> Iterator[Sequence[_Step]]:
        """Run the waiting steps, on snapshots that are taken after all of them were submitted."""
        left = deque(islice(arriving, self._steps_max))
        while left:
            try:
                self._db.execute("BEGIN")
            except apsw.Error as error:
                store_error = self._faults.translate(error, self._db)
                for step in left:
                    step.error = store_error
                yield tuple(left)
                return
            done = self._run_on_snapshot(left)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            yield done
            del done  # the thread holds no result while it runs the next steps

    def _run_on_snapshot(self, left: deque[_Step]) -> Sequence[_Step]:
        deadline = time.monotonic() + _SNAPSHOT_S
        done: list[_Step] = []
        while left:
            step = left.popleft()
            done.append(step)
            try:
                step.run(self._db)
            except Exception as error:  # noqa: BLE001  the caller gets the error
                step.error = self._faults.translate(error, self._db) if isinstance(error, apsw.Error) else error
            if time.monotonic() >= deadline:
                break
        return done

    def run_housekeeping(self, *, idle: bool) -> None:  # noqa: ARG002
        return None

    def close(self) -> None:
        self._files.prepare_close(self._db)
        self._db.close()
