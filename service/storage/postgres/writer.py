"""A thread that writes: each step is a transaction, and steps on turns of this owner share one.

Ends of turns that share a transaction share a statement, too: a stop ends hundreds of turns at once, and to plan the
statement costs the server more than to do it for one turn.

A step that would wait for a lock is handed over to the thread of the long changes. These are usually what it waits for,
and the steps of other sessions do not wait for them.

A step may run several times: its transaction is repeated after a deadlock, and after a connection that was lost before
the commit. So a step changes nothing but the database.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import psycopg

from service.errors import StoreError
from service.storage.postgres.connections import (
    ATTEMPTS_MAX,
    Db,
    GivenUpError,
    Line,
    OutcomeUnknownError,
    ends_connection,
    is_repeatable,
)
from service.storage.postgres.faults import Faults
from service.storage.postgres.owners import EpochPassedError, Ownership
from service.storage.postgres.running import RunningStep
from service.storage.sql_thread import Step, run_together
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

T = TypeVar("T")

STATEMENT_MAX_S = 10.0
_SHARED_MAX = 64
"""The most steps that share a transaction."""
_PAUSE_S = 0.005
"""The first pause before a step is repeated; the pauses grow."""

LOCK_MAX_S = 0.1
"""How long a step waits for a lock before it is handed over: longer than the transactions of other short steps take."""
_LOCK_HURRIED_S = 0.01
"""The same for a step that others wait for, because they shared a transaction in which one of them met a lock."""

Steps = Sequence[Step[Db, Any]]


class Writer:
    """Runs steps that write, for :class:`~service.storage.sql_thread.SqlThread`.

    Args:
        line: The thread's connection.
        opens: Called at the start, in the thread; raises a StartupError.
        is_left: Whether a step is given up when its caller leaves, up to its commit: for long steps, which run beside
            the other writes.
        hand_over: Takes a step that would wait for a lock, if the thread behind it takes one. Such a step is given up
            when its caller leaves, as the long ones are.

    Attributes:
        commits: How many transactions were committed.
        steps: How many steps they held.
        running: The step that runs in a transaction of its own.
    """

    def __init__(
        self,
        line: Line,
        ownership: Ownership,
        faults: Faults,
        *,
        opens: Callable[[], None] | None = None,
        closes: Callable[[], None] | None = None,
        is_left: bool = False,
        hand_over: Callable[[Step[Db, Any]], bool] | None = None,
        statement_timeout_s: float | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.commits = 0
        self.steps = 0
        self.running = RunningStep(line)
        self._line = line
        self._ownership = ownership
        self._faults = faults
        self._opens = opens
        self._closes = closes
        self._is_left = is_left
        self._hand_over = hand_over
        self._metrics = metrics or Metrics()
        self._statement_timeout_s = STATEMENT_MAX_S if statement_timeout_s is None else statement_timeout_s

    def open(self) -> None:
        """Raises: StartupError."""
        if self._opens is not None:
            self._opens()

    def run(self, arriving: Iterator[Step[Db, Any]]) -> Iterator[Steps]:
        """Run the waiting steps, in their order."""
        shared: list[Step[Db, Any]] = []
        for step in arriving:
            shares = step.shares and not self._is_left  # each caller may leave for itself
            if shares:
                shared.append(step)
                if len(shared) < _SHARED_MAX:
                    continue
            if shared:
                yield self._run_together(shared)
                shared = []
            if not shares and self._run_alone(step):
                yield (step,)
        if shared:
            yield self._run_together(shared)

    def run_housekeeping(self, *, idle: bool) -> None:  # noqa: ARG002
        return None

    def close(self) -> None:
        if self._closes is not None:
            self._closes()
        self._line.drop()

    def _run_together(self, steps: list[Step[Db, Any]]) -> Steps:
        """Run steps in one transaction. If it fails, each runs in its own, so that only the faulty ones fail, and only
        those wait that must. Returns the steps that have their outcomes."""
        if len(steps) == 1:
            return steps if self._run_alone(steps[0]) else ()

        try:
            self._transact(lambda db: run_together(db, steps), steps=len(steps))
        except StoreError as error:  # the fault is the same for all steps
            for step in steps:
                step.error = error
        except Exception as error:  # noqa: BLE001  each step meets its own error
            hurries = isinstance(error, psycopg.errors.LockNotAvailable)
            return [step for step in steps if self._run_alone(step, hurries=hurries)]
        return steps

    def _run_alone(self, step: Step[Db, Any], *, hurries: bool = False) -> bool:
        """Run a step in its own transaction. Returns whether it has its outcome: else another thread has the step."""
        lock_s = _LOCK_HURRIED_S if hurries else LOCK_MAX_S
        with self.running.set_to(step):
            try:
                self._transact(step.run, step if self._is_left else None, lock_s=lock_s)
            except psycopg.errors.LockNotAvailable as error:
                if self._hand_over is not None and self._hand_over(step):
                    return False
                step.error = self._faults.translate(error)
            except Exception as error:  # noqa: BLE001  the caller gets the error
                step.error = self._faults.translate(error) if isinstance(error, psycopg.Error) else error
        return True

    def _transact(
        self,
        call: Callable[[Db], T],
        step: Step[Db, Any] | None = None,
        *,
        steps: int = 1,
        lock_s: float = LOCK_MAX_S,
    ) -> T:
        """Make a call in a transaction; again if others were in its way.

        Args:
            step: The step whose caller may leave.
        """
        epoch_passed = False
        for attempt in range(ATTEMPTS_MAX):
            db = self._line.open()
            try:
                self._renew(db, always=epoch_passed)
                epoch_passed = False
                result = self._try(db, call, step, lock_s)
            except EpochPassedError:
                epoch_passed = attempt > 0
            except psycopg.Error as error:
                if ends_connection(error):
                    db.close()
                if attempt == ATTEMPTS_MAX - 1 or not (is_repeatable(error) or (db.is_lost and attempt == 0)):
                    raise
                if not db.is_lost:
                    time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1))  # noqa: S311  it spreads attempts
            else:
                self.commits += 1
                self.steps += steps
                return result
        raise StoreError("The store failed: many wanted to change the same at once.")

    def _renew(self, db: Db, *, always: bool) -> None:
        """Let the commits that are in flight or in doubt come first.

        Raises:
            psycopg.Error: The connection is lost.
            StoreError
        """
        with self._ownership.committing:
            pass  # Held any longer, it would keep from its commit what the new epoch waits for.
        try:
            self._ownership.renew(db, always=always)
        except OutcomeUnknownError as error:
            raise _no_standby() from error
        except psycopg.Error as error:
            if db.is_lost or ends_connection(error):
                raise
            raise self._faults.translate(error) from error

    def _try(self, db: Db, call: Callable[[Db], T], step: Step[Db, Any] | None, lock_s: float) -> T:
        """Make a call in a transaction, once.

        Raises:
            psycopg.Error: Nothing has happened.
            StoreError: The outcome is unknown.
        """
        check: Callable[[Db], None] | None = None
        if self._is_left:
            opening, check = self._ownership.opening_of_long(statement_timeout_s=self._statement_timeout_s)
        else:
            opening = self._ownership.opening(
                statement_timeout_s=self._statement_timeout_s,
                lock_timeout_s=None if self._hand_over is None else lock_s,
            )
        db.begin(
            opening,
            statement_max_s=self._statement_timeout_s,
            is_given_up=None if step is None else lambda: step.is_given_up,
        )
        try:
            result = call(db)
            if check is not None and db.is_open:
                check(db)
        except BaseException:
            db.roll_back()
            raise
        self._commit(db, step)
        return result

    def _commit(self, db: Db, step: Step[Db, Any] | None) -> None:
        if not db.is_open:
            db.commit()  # there is nothing to commit
            return
        if step is None:
            self._commit_now(db)
            return
        with self._ownership.committing:
            if not step.claim_commit():
                db.roll_back()
                raise GivenUpError
            self._commit_now(db)

    def _commit_now(self, db: Db) -> None:
        began_at = time.perf_counter()
        try:
            db.commit()
            self._metrics.observe(families.STORE_COMMIT, value=time.perf_counter() - began_at)
        except OutcomeUnknownError as error:
            raise _no_standby() from error
        except psycopg.Error as error:
            if ends_connection(error):
                db.close()
            if not db.is_lost:
                raise
            self._ownership.doubt()
            raise self._faults.translate(error) from error


def _no_standby() -> StoreError:
    return StoreError("The store failed: a standby that must have each write did not answer.")
