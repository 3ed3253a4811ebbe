"""The one writer: many steps share a commit, and what nobody waits for is done between commits."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import apsw
import structlog

from service.errors import RefusedError, StoreError
from service.storage.sqlite import database
from service.storage.sqlite.faults import Faults
from service.storage.sqlite.file_system import network_file_system
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.reclaim import reclaim_some
from service.storage.sqlite.sql_thread import Step

logger = structlog.get_logger("lastcall.store")

T = TypeVar("T")

_COMMIT_AFTER_S = 0.02
"""How long a commit is put off while more steps keep arriving; mostly the next one is not there so soon."""
_CHECKPOINT_PAGES = 1000
_LOG_PAGES_MAX = 16 * 1024
"""A longer log, 64 MiB, is made to begin anew: while readers follow closely on each other it never does by itself."""
_RESET_EVERY_S = 1.0
"""Where that fails it is tried again so much later: nobody writes while it is tried."""
_REST_EVERY_S = 0.1
"""While steps keep arriving, what is done at rest waits so long in between."""


class Writer:
    """Runs steps in transactions, for :class:`~service.storage.sqlite.sql_thread.SqlThread`.

    Attributes:
        commits: How many transactions held steps.
        steps: How many steps they held.
        removed: Set by a step that cut a session off: there are rows to reclaim.
    """

    def __init__(self, files: OpenFiles, ownership: Ownership, *, address: str | None, opened_at: int) -> None:
        self.commits = 0
        self.steps = 0
        self.removed = True
        self._files = files
        self._path = files.path
        self._faults = Faults(files.path)
        self._ownership = ownership
        self._address = address
        self._opened_at = opened_at
        self._db: apsw.Connection
        self._wal_pages = 0
        self._rested_at = 0.0
        self._reset_at = 0.0

    def open(self) -> None:
        """Raises: StartupError."""
        try:
            self._files.refuse_others()
            database.create_file(self._path)
            self._ownership.open()
            if kind := network_file_system(self._path):
                logger.warning("the database is on a network file system: its locks may not hold", type=kind)
            self._db = database.connect(self._path)
            try:
                with database.transaction(self._db):  # from its beginning on the log is there
                    self._files.note_opened(self._db)
                self._db.set_wal_hook(self._note_wal)
                database.prepare(self._db, self._path, ownership=self._ownership)
                self._transact(lambda db: self._ownership.begin(db, address=self._address, opened_at=self._opened_at))
            except BaseException:
                self._db.close()
                raise
        except (apsw.Error, OSError) as error:
            raise database.startup_error(self._path, error) from error

    def run(self, arriving: Iterator[Step[Any]]) -> Sequence[Step[Any]]:
        """Run the steps that are there in one transaction.

        Where that fails each is tried in one of its own, so that it fails for those alone whose fault it is. What is
        committed into files that nobody will find any more has failed for all of them.
        """
        taken: list[Step[Any]] = []
        try:
            self._transact(lambda db: _run_together(db, arriving, taken))
        except Exception as error:  # noqa: BLE001  they are the callers'
            if not taken:  # not even begun: it is the same fault for all that are there
                taken += arriving
                for step in taken:
                    step.error = self._told(error)
            elif len(taken) == 1:
                taken[0].error = self._told(error)
            else:
                for step in taken:
                    self._run_alone(step)
        if (fault := self._files.fault()) is not None:
            for step in taken:
                step.error = step.error or fault
        self.commits += 1
        self.steps += len(taken)
        return taken

    def rest(self, *, idle: bool) -> bool:
        """Write a checkpoint or reclaim something, if it is time for it; whether there may be more to do."""
        now = time.monotonic()
        if not idle and now - self._rested_at < _REST_EVERY_S:
            return True
        self._rested_at = now
        try:
            if self._wal_pages >= _CHECKPOINT_PAGES:
                self._write_checkpoint(now)
            elif self.removed:
                self.removed = self._transact(reclaim_some)
        except (apsw.Error, StoreError):
            return False  # a step will meet the same fault and tell its caller
        return self.removed

    def close(self) -> None:
        self._files.prepare_close(self._db)
        self._files.close()
        self._db.close()

    def _run_alone(self, step: Step[Any]) -> None:
        try:
            self._transact(lambda db: _run_one(db, step))
        except Exception as error:  # noqa: BLE001  it is its caller's
            step.error = self._told(error)

    def _transact(self, call: Callable[[apsw.Connection], T]) -> T:
        if (fault := self._files.fault()) is not None:
            raise fault
        with database.transaction(self._db):
            return call(self._db)

    def _write_checkpoint(self, now: float) -> None:
        if self._files.fault() is not None:
            return  # the pages would go into one file and the log that holds them be cut off under another
        is_long = self._wal_pages >= _LOG_PAGES_MAX
        self._wal_pages = 0
        if is_long and now - self._reset_at >= _RESET_EVERY_S:
            self._reset_at = now
            database.reset_log(self._db)
        else:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _note_wal(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _told(self, error: Exception) -> Exception:
        return self._faults.told(error, self._db) if isinstance(error, apsw.Error) else error


def _run_together(db: apsw.Connection, arriving: Iterator[Step[Any]], taken: list[Step[Any]]) -> None:
    deadline = time.monotonic() + _COMMIT_AFTER_S
    for step in arriving:
        taken.append(step)
        _run_one(db, step)
        if time.monotonic() >= deadline:
            return


def _run_one(db: apsw.Connection, step: Step[Any]) -> None:
    try:
        step.run(db)
        step.error = None
    except RefusedError as refusal:
        step.error = refusal  # it has written nothing, so the others can go on
