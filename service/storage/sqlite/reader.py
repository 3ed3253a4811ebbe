"""A reader: the steps that are there see the same moment."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw

from service.storage.sqlite import database
from service.storage.sqlite.faults import store_error
from service.storage.sqlite.sql_thread import Step

_STEPS_MAX = 100
"""The steps that are told together: the first should not wait long for the last."""


class Reader:
    """Runs steps that only read, for :class:`~service.storage.sqlite.sql_thread.SqlThread`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: apsw.Connection

    def open(self) -> None:
        """Raises: StartupError."""
        try:
            self._db = database.connect(self._path, query_only=True)
        except apsw.Error as error:
            raise database.startup_error(self._path, error) from error

    def run(self, arriving: Iterator[Step[Any]]) -> Sequence[Step[Any]]:
        """Run the steps that are there on one snapshot, taken after all of them were asked for."""
        taken: list[Step[Any]] = []
        for step in arriving:
            taken.append(step)
            if len(taken) == _STEPS_MAX:
                break
        try:
            self._db.execute("BEGIN")
        except apsw.Error as error:
            for step in taken:
                step.error = store_error(self._path, error)
            return taken
        for step in taken:
            try:
                step.run(self._db)
            except Exception as error:  # noqa: BLE001  it is its caller's
                step.error = store_error(self._path, error) if isinstance(error, apsw.Error) else error
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        return taken

    def rest(self, *, idle: bool) -> bool:  # noqa: ARG002
        return False

    def close(self) -> None:
        self._db.close()
