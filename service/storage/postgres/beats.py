"""The thread of the beats: it tells the other owners that this one lives, and looks for those that do not."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import psycopg

from service.errors import StoreError
from service.storage.postgres.connections import Db, Line
from service.storage.postgres.faults import Faults
from service.storage.postgres.owners import BEAT_S, Observer
from service.storage.sql_thread import PAUSE_S, Step

STATEMENT_MAX_S = 2
"""With the grace for its answer a lost beat leaves time for another one within the lease."""


class Beats:
    """Beats every second, for :class:`~service.storage.sql_thread.SqlThread`; besides when a step asks for it.

    A beat looks for owners that have died, too. So one comes at the moment at which a lease ends, in addition.
    """

    def __init__(self, line: Line, observer: Observer, faults: Faults) -> None:
        self._line = line
        self._observer = observer
        self._faults = faults
        self._due_at = time.monotonic() + BEAT_S

    def open(self) -> None:
        """The connection is made when it is needed."""

    def run(self, arriving: Iterator[Step[Db, Any]]) -> Iterator[Sequence[Step[Db, Any]]]:
        for step in arriving:
            try:
                self._run(step.run)
            except Exception as error:  # noqa: BLE001  the caller gets the error
                step.error = error
            yield (step,)

    def run_housekeeping(self, *, idle: bool) -> float | None:  # noqa: ARG002
        """Beat, if it is time or a lease ends."""
        if time.monotonic() >= self._due_at:
            beat_at = time.monotonic() + BEAT_S
            with suppress(StoreError):  # the log has it
                self._run(self._observer.run_once)
            lease_ends_in_s = self._observer.lease_ends_in_s
            lease_ends_at = beat_at if lease_ends_in_s is None else time.monotonic() + lease_ends_in_s
            self._due_at = min(beat_at, lease_ends_at)
        return max(self._due_at - time.monotonic(), PAUSE_S)

    def close(self) -> None:
        self._line.drop()

    def _run(self, call: Callable[[Db], object]) -> None:
        """Raises: StoreError."""
        db = self._line.open()
        db.begin(None, statement_max_s=STATEMENT_MAX_S)
        try:
            call(db)
        except psycopg.Error as error:
            self._line.drop()
            raise self._faults.translate(error) from error
