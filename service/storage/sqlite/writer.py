"""The only writer: many steps share a commit, and work without a waiting caller is done between commits."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, TypeVar

import apsw
import structlog

from service.errors import RefusedError, RepeatedError, StoreError
from service.storage.sql_thread import PAUSE_S, Step
from service.storage.sqlite import database, documents
from service.storage.sqlite.faults import Faults
from service.storage.sqlite.file_system import network_file_system
from service.storage.sqlite.indexing import Indexing
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.ownership import Ownership, is_oldest
from service.storage.sqlite.reclaim import reclaim_some, shrink
from service.storage.sqlite.reserve import Reserve
from service.storage.store import Monotonic
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

logger = structlog.get_logger("lastcall.store")

T = TypeVar("T")

_Step = Step[apsw.Connection, Any]
_COMMIT_AFTER_S = 0.02
"""How long a commit is delayed while more steps arrive; usually no further step arrives in this time."""
_CHECKPOINT_PAGES = 1000
_LOG_PAGES_MAX = 16 * 1024
"""A longer log (64 MiB) is forced to restart: under constant reads the log never restarts by itself."""
_RESET_EVERY_S = 1.0
"""The pause after a failed restart of the log: each attempt blocks all writers."""
_HOUSEKEEPING_INTERVAL_S = 0.1
"""The interval of the work between commits while steps keep arriving."""
_RETRY_S = 1.0
"""The pause after work between commits that has failed."""
_INDEX_RETRY_S = 1.0
"""The pause until a process looks again whether the one that indexes old rows is gone."""
_INDEX_AFTER_S = 0.5
"""How long documents wait for others that are indexed together with them, if they are few."""
_SHRINK_PAGES = 256
"""The pages that one step gives back to a full disk."""


class Writer:
    """Runs steps in transactions, for :class:`~service.storage.sql_thread.SqlThread`.

    Attributes:
        commits: How many transactions held steps.
        steps: How many steps they held.
        removed: Set by a step, in the writer's thread, that hid rows which are to be reclaimed.
    """

    def __init__(
        self,
        files: OpenFiles,
        ownership: Ownership,
        *,
        address: str | None,
        opened_at: int,
        monotonic: Monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self.commits = 0
        self.steps = 0
        self.removed = True
        self._files = files
        self._path = files.path
        self._wal_path = files.path.with_name(f"{files.path.name}-wal")
        self._monotonic = monotonic
        self._metrics = metrics or Metrics()
        self._faults = Faults(files.path, monotonic)
        self._ownership = ownership
        self._address = address
        self._opened_at = opened_at
        self._db: apsw.Connection
        self._reserve: Reserve
        self._is_full = False
        """Whether the disk was full, and the free pages were not given back to it yet."""
        self._wal_pages = 0
        self._unmerged = 0
        """The commits that may have added parts to the search index since these were merged."""
        self._indexing: Indexing | None = Indexing()
        """The work for the indexes, while some may be left."""
        self._waiting = 0
        """The documents that wait for the index, as far as they are counted."""
        self._index_at = -inf
        self._housekept_at = -inf
        self._reset_at = -inf

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
                with database.transaction(
                    self._db, opens=self._path
                ):  # from the transaction's beginning on the log file exists
                    self._files.note_opened(self._db)
                self._db.set_wal_hook(self._note_wal)
                database.prepare(self._db, self._path, ownership=self._ownership)
                self._transact(lambda db: self._ownership.begin(db, address=self._address, opened_at=self._opened_at))
                self._reserve = Reserve(self._path.with_name(f"{self._path.name}-reserve"))
            except BaseException:
                self._db.close()
                raise
        except (apsw.Error, OSError) as error:
            raise database.startup_error(self._path, error) from error

    def run(self, arriving: Iterator[_Step]) -> Sequence[Sequence[_Step]]:
        """Run the waiting steps in one transaction.

        If the transaction fails, each step runs in a transaction of its own, so that only the faulty steps fail, and a
        step that refuses after it has written leaves nothing behind. A commit into files that were deleted or replaced
        counts as failed for all steps.
        """
        taken: list[_Step] = []
        try:
            if self._is_full and self._is_short():
                raise apsw.FullError  # the space that is left is for steps that free space
            self._transact(lambda db: self._run_and_look(db, partial(_run_together, db, arriving, taken)))
        except Exception as error:  # noqa: BLE001  the callers get their step's error
            self._is_full = self._is_full or isinstance(error, apsw.FullError)
            if not taken:  # the transaction did not begin: the fault is the same for all steps
                taken += arriving
                store_error = self._translate(error)
                for step in taken:
                    if step.makes_space and isinstance(error, apsw.FullError):
                        self._run_alone(step)
                    else:
                        step.error = store_error
            elif len(taken) == 1 and not (taken[0].makes_space and isinstance(error, apsw.FullError)):
                taken[0].error = self._translate(error)
            else:
                for step in taken:
                    self._run_alone(step)
        if (fault := self._files.fault()) is not None:
            for step in taken:
                step.error = step.error or fault
        self.commits += 1
        self._unmerged += 1
        self.steps += len(taken)
        return (taken,)

    def run_housekeeping(self, *, idle: bool) -> float | None:
        """Write a checkpoint, reclaim rows, or add to the index or merge it, if it is time. Returns when there is more
        of this, in seconds."""
        now = self._monotonic()
        is_crowded = self._waiting >= documents.WAITING_MAX
        if not idle and not is_crowded and now - self._housekept_at < _HOUSEKEEPING_INTERVAL_S:
            return self._pause_s(now)
        self._housekept_at = now
        try:
            if self._is_full:
                return PAUSE_S if self._make_space() else None
            if self._wal_pages >= _CHECKPOINT_PAGES:
                self._write_checkpoint(now)
            elif self._indexing is not None and now >= self._index_at and (self._waiting or not self.removed):
                self._index_rows(self._indexing, now)
            elif self.removed:
                self.removed = self._transact(reclaim_some)
            elif self._unmerged >= documents.SEGMENTS_MAX and not self._transact(documents.merge_some):
                self._unmerged = 0
        except (apsw.Error, StoreError) as error:
            # A step will meet the same fault and tell its caller. Without a step the work is tried again later.
            was_full, self._is_full = self._is_full, self._is_full or isinstance(error, apsw.FullError)
            if self._is_full and not was_full:
                return PAUSE_S
            return None if self._pause_s(now) is None else _RETRY_S
        return self._pause_s(now)

    def _pause_s(self, now: float) -> float | None:
        """After which time there is work between commits; None if there is none."""
        is_due = self._wal_pages >= _CHECKPOINT_PAGES or self._unmerged >= documents.SEGMENTS_MAX
        if self._is_full or self.removed or is_due:
            return PAUSE_S
        return None if self._indexing is None else max(self._index_at - now, PAUSE_S)

    def _index_rows(self, indexing: Indexing, now: float) -> None:
        """Do a step for the indexes: of a file of an earlier version, if this is the process that does it."""
        if indexing.is_done(self._db):
            if indexing.old_steps:
                logger.info("the search index is whole: all earlier turns are in it")
            self._indexing, self._waiting = None, 0
            return
        takes_old = is_oldest(self._db, self._ownership)
        if not self._count_waiting(indexing) and not takes_old:
            self._index_at = now + _INDEX_RETRY_S
        else:
            if not self._waiting and not indexing.old_steps:
                logger.info("earlier turns are put into the search index: until then searches are partial")
            self._index_at = now + _INDEX_RETRY_S  # should the step fail
            indexing.run_step(self._transact, takes_old=takes_old)
            self._index_at = now
            if not self._count_waiting(indexing) and not indexing.old_steps and indexing.is_done(self._db):
                self._indexing = None
            self._unmerged += 1
            if self._unmerged >= documents.SEGMENTS_MAX and not self._transact(documents.merge_some):
                self._unmerged = 0

    def close(self) -> None:
        self._files.prepare_close(self._db)
        self._files.close()
        self._reserve.close()
        self._db.close()

    def _run_alone(self, step: _Step) -> None:
        def run() -> None:
            self._transact(lambda db: self._run_and_look(db, partial(_run_one, db, step)))

        try:
            self._with_reserve(run) if step.makes_space else run()
        except Exception as error:  # noqa: BLE001  the caller gets the error
            step.error = self._translate(error)

    def _run_and_look(self, db: apsw.Connection, run: Callable[[], None]) -> None:
        """Run steps within a transaction, and look whether there are documents that wait for the index."""
        run()
        if self._indexing is None and not (indexing := Indexing()).is_done(db):
            self._indexing, self._index_at = indexing, self._monotonic() + _INDEX_AFTER_S
        if self._indexing is not None and self._count_waiting(self._indexing) >= documents.WAITING_MAX:
            self._index_at = -inf

    def _count_waiting(self, indexing: Indexing) -> int:
        self._waiting = indexing.count_waiting(self._db, at_most=documents.WAITING_MAX)
        return self._waiting

    def _with_reserve(self, write: Callable[[], T]) -> T:
        """Make a write that frees space; if the disk is full, with the space of the reserve."""
        try:
            return write()
        except apsw.FullError:
            self._is_full = True
            self._reserve.release()
            try:
                return write()
            finally:
                self._reserve.fill()

    def _make_space(self) -> bool:
        """Free space on a full disk: cut the log, reclaim removed rows, cut the file. Returns whether more is left."""
        if (fault := self._files.fault()) is not None:
            raise fault
        self._wal_pages = 0
        self._with_reserve(lambda: database.reset_log(self._db, cut=True))
        step = reclaim_some if self.removed else partial(shrink, pages=_SHRINK_PAGES)
        more = self._with_reserve(lambda: self._transact(step))
        more, self.removed = more or self.removed, more and self.removed
        if not more:
            self._with_reserve(lambda: database.reset_log(self._db, cut=True))
            self._is_full = self._is_short()
        return more

    def _is_short(self) -> bool:
        """Whether the disk is too full for the whole reserve."""
        self._reserve.fill()
        return self._reserve.is_short

    def _transact(self, call: Callable[[apsw.Connection], T]) -> T:
        if (fault := self._files.fault()) is not None:
            raise fault
        with database.transaction(self._db):
            result = call(self._db)
            began_at = time.perf_counter()
        self._metrics.observe(families.STORE_COMMIT, value=time.perf_counter() - began_at)
        with suppress(OSError):  # a file that was deleted is told by the next step
            self._metrics.set(families.WAL_BYTES, to=self._wal_path.stat().st_size)
        return result

    def _write_checkpoint(self, now: float) -> None:
        if self._files.fault() is not None:
            return  # the pages would go into one file, and their log would be cut off under another
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

    def _translate(self, error: Exception) -> Exception:
        return self._faults.translate(error, self._db) if isinstance(error, apsw.Error) else error


def _run_together(db: apsw.Connection, arriving: Iterator[_Step], taken: list[_Step]) -> None:
    deadline = time.monotonic() + _COMMIT_AFTER_S
    for step in arriving:
        taken.append(step)
        _run_one(db, step)
        if time.monotonic() >= deadline:
            return


def _run_one(db: apsw.Connection, step: _Step) -> None:
    """Run a step within a transaction. A refusal of a step that has written nothing is the step's own outcome.

    The number of changes proves that the step has written nothing. A savepoint for each step would prove it as well,
    but SQLite copies each page that a step changes: the end of a turn would take a third more time.

    Raises:
        Exception: The step failed, or it refused although it has written; the transaction must be rolled back.
    """
    changes = db.total_changes()
    try:
        step.run(db)
    except (RefusedError, RepeatedError) as refusal:
        if db.total_changes() != changes:
            raise
        step.error = refusal
    else:
        step.error = None
