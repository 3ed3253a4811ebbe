"""A thread that reads: each step sees one snapshot."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import psycopg

from service.storage.postgres.connections import (
    BEGIN_SNAPSHOT,
    Db,
    Line,
    Opening,
    OutcomeUnknownError,
    ends_connection,
    timeouts,
)
from service.storage.postgres.faults import Faults
from service.storage.postgres.running import RunningStep
from service.storage.sql_thread import Step

STATEMENT_MAX_S = 30


class Reader:
    """Runs steps that only read, for :class:`~service.storage.sql_thread.SqlThread`.

    A step that shares is one statement, and needs no transaction around it.

    Attributes:
        running: The step that runs.
    """

    def __init__(self, line: Line, faults: Faults) -> None:
        self._line = line
        self._faults = faults
        self.running = RunningStep(line)

    def open(self) -> None:
        """The connection is made when it is needed."""

    def run(self, arriving: Iterator[Step[Db, Any]]) -> Iterator[Sequence[Step[Db, Any]]]:
        for step in islice(arriving, 1):
            with self.running.set_to(step):
                try:
                    self._run(step)
                except Exception as error:  # noqa: BLE001  the caller gets the error
                    step.error = self._faults.translate(error) if isinstance(error, psycopg.Error) else error
            yield (step,)

    def run_housekeeping(self, *, idle: bool) -> None:  # noqa: ARG002
        return None

    def close(self) -> None:
        self._line.drop()

    def _run(self, step: Step[Db, Any]) -> None:
        """Run a step; once more if its connection was found lost before its first result."""
        db = self._line.open()
        try:
            self._run_on(db, step)
        except psycopg.Error as error:
            if ends_connection(error):
                db.close()
            if not db.is_lost or db.executed:
                raise
            self._run_on(self._line.open(), step)

    def _run_on(self, db: Db, step: Step[Db, Any]) -> None:
        opening = None if step.shares else Opening(BEGIN_SNAPSHOT, *timeouts(STATEMENT_MAX_S))
        db.begin(opening, statement_max_s=STATEMENT_MAX_S, is_given_up=lambda: step.is_given_up)
        try:
            step.run(db)
        except BaseException:
            db.roll_back()
            raise
        with suppress(OutcomeUnknownError):  # nothing was written, and the rows are here
            db.commit()
