"""Who owns the open turns: each open store has a row, whose beats tell that it lives.

An owner is dead when another one saw its beats stand still for a whole lease, by the time of the one that looks: no two
clocks are compared. Each write of an owner locks its row first, and finds it alive; so nothing is written by an owner
that was taken for dead, however late its statements arrive.
"""

import threading
from collections.abc import Callable, Collection
from secrets import token_bytes

import msgspec
import structlog

from service.errors import OwnedElsewhereError, StoreLostError
from service.storage.postgres.connections import BEGIN, Db, Me, Opening, timeouts
from service.storage.postgres.rows import Row
from service.storage.records import Owner
from service.storage.store import Monotonic

logger = structlog.get_logger("lastcall.store")

BEAT_S = 1.0
LEASE_S = 6
"""How long the beats of an owner stand still before another owner takes it for dead."""
GAP_S = 2.5
"""An observer that was held up for so long begins all leases anew: it may be the one that was away."""
RENEW_MAX_S = 5
"""How long the beginning of an epoch waits for the transactions of the one before."""
_NONCE_BYTES = 16

_INSERT = "INSERT INTO {s}.owners (nonce, address, opened_at) VALUES (%s, %s, %s) RETURNING fence"
_INSERT_BEATS = "INSERT INTO {s}.beats (fence) VALUES (%s)"
_CHECK = (
    "SELECT fence FROM {{s}}.owners WHERE fence = {fence} AND nonce = '\\x{nonce}' AND epoch = {epoch} AND NOT dead "
    "FOR SHARE"
)
_RENEW = "UPDATE {s}.owners SET epoch = epoch + 1 WHERE fence = %s AND nonce = %s AND NOT dead RETURNING epoch"
_LEAVE = "UPDATE {s}.owners SET dead = true WHERE fence = %s AND nonce = %s"
_BEAT_AND_LOOK = (
    "WITH beat AS (UPDATE {s}.beats SET beats = beats + 1 WHERE fence = %(fence)s AND EXISTS ("
    "SELECT FROM {s}.owners WHERE fence = %(fence)s AND nonce = %(nonce)s AND NOT dead)) "
    "SELECT fence, nonce, beats, dead FROM {s}.owners LEFT JOIN {s}.beats USING (fence)"
)
# Without a wait for a transaction of that owner: this thread must not miss its own beats.
_TAKE_OVER = (
    "UPDATE {s}.owners SET dead = true WHERE fence IN (SELECT fence FROM {s}.owners WHERE fence = %(fence)s "
    "AND nonce = %(nonce)s AND NOT dead FOR UPDATE SKIP LOCKED) AND NOT dead "
    "AND (SELECT beats FROM {s}.beats WHERE fence = %(fence)s) IS NOT DISTINCT FROM %(beats)s"
)


class FenceLostError(StoreLostError):
    """Another owner has taken this one for dead."""

    def __init__(self) -> None:
        super().__init__("This process was taken for dead, and lost its turns; it starts anew.", retry_after_s=1)


class EpochPassedError(Exception):
    """The epoch of this owner has passed since its transaction began."""


class Ownership:
    """This store among the owners of a database. Its threads share it.

    Attributes:
        me: This owner, once it has begun.
        is_lost: Whether another owner has taken this one for dead.
        committing: Held while a commit is in flight whose caller may leave: the next write waits for it.

    Args:
        on_lost: Called in any thread, perhaps twice.
    """

    def __init__(self, *, on_lost: Callable[[], None] | None = None) -> None:
        self._on_lost = on_lost
        self.me = Me(0, b"")
        self.is_lost = False
        self.committing = threading.Lock()
        self._is_in_doubt = False
        self._renewing = threading.Lock()

    def begin(self, db: Db, *, address: str | None, opened_at: int) -> None:
        """Become an owner, in a transaction."""
        nonce = token_bytes(_NONCE_BYTES)
        row = db.execute(_INSERT, (nonce, address, opened_at)).fetchone()
        assert row is not None
        db.execute(_INSERT_BEATS, (row[0],))
        self.me = Me(row[0], nonce)

    def opening(self, *, statement_timeout_s: float, lock_timeout_s: float | None = None) -> Opening:
        """What begins a transaction that writes, with the check of this owner. Raises: FenceLostError."""
        bounds = timeouts(statement_timeout_s, lock_s=lock_timeout_s)
        return Opening(BEGIN, *bounds, self._check(), checked=_check_found)

    def opening_of_long(self, *, statement_timeout_s: float) -> tuple[Opening, Callable[[Db], None]]:
        """What begins a transaction that writes for long, and the check to make at its end.

        Until then it does not hold the row of this owner: a take-over, or the next epoch, does not wait for it.

        Raises:
            FenceLostError
        """
        statement = self._check()
        return Opening(BEGIN, *timeouts(statement_timeout_s)), lambda db: _check_found(db.execute(statement).fetchone())

    def _check(self) -> str:
        """The statement that locks the row of this owner, if it is alive and in its epoch. Raises: FenceLostError."""
        if self.is_lost:
            raise FenceLostError
        return _CHECK.format(fence=self.me.fence, nonce=self.me.nonce.hex(), epoch=self.me.epoch)

    def doubt(self) -> None:
        """Note that a commit may be in flight on a connection that was lost: the next write must come after it."""
        self._is_in_doubt = True

    def renew(self, db: Db, *, always: bool = False) -> None:
        """Begin an epoch, if a commit is in doubt: wait for its end. What comes later finds that its epoch has passed.

        Waits for the transactions of the other threads, too: so the caller holds nothing that their commits need.

        Raises:
            FenceLostError
            OutcomeUnknownError
            psycopg.Error
        """
        with self._renewing:
            if not (self._is_in_doubt or always):
                return
            db.begin(Opening(BEGIN, *timeouts(RENEW_MAX_S)), statement_max_s=RENEW_MAX_S)
            try:
                row = db.execute(_RENEW, (self.me.fence, self.me.nonce)).fetchone()
            except BaseException:
                db.roll_back()
                raise
            db.commit()
            if row is None:
                self.lose()
                raise FenceLostError
            self.me = msgspec.structs.replace(self.me, epoch=row[0])
            self._is_in_doubt = False

    def lose(self) -> None:
        if not self.is_lost:
            if self._on_lost is not None:
                self._on_lost()  # before other threads find that it is lost
            self.is_lost = True
            logger.error(
                "another process has taken this one for dead and has its turns: this one writes no more, and ends",
                fence=self.me.fence,
            )

    def leave(self, db: Db) -> None:
        """Let other owners end what is open. Waits for writes that are in flight."""
        db.execute(_LEAVE, (self.me.fence, self.me.nonce))


def _check_found(row: Row | None) -> None:
    """Raises: EpochPassedError."""
    if row is None:
        raise EpochPassedError


class Observer:
    """Sees which other owners have died.

    Args:
        on_beat: Called for each beat of this owner that the database has answered, with the time at which it was sent.
        on_taken: Called after each take-over.

    Attributes:
        lease_ends_in_s: How long after the last look the first lease of another owner ends, if its beats stand still;
            None if none does. A look at that moment finds the owner dead, and one with the next beat only later.
    """

    def __init__(
        self,
        ownership: Ownership,
        monotonic: Monotonic,
        *,
        on_beat: Callable[[float], None] | None = None,
        on_taken: Callable[[], None] | None = None,
    ) -> None:
        self.lease_ends_in_s: float | None = None
        self._on_taken = on_taken
        self._on_beat = on_beat
        self._ownership = ownership
        self._monotonic = monotonic
        self._seen: dict[tuple[int, bytes], tuple[int | None, float]] = {}
        self._looked_at = monotonic()

    def run_once(self, db: Db) -> int:
        """Beat, and take over from the owners that have died. Returns how many.

        An owner that was taken for dead does neither: after a failover its fence may be that of another owner.
        """
        if self._ownership.is_lost:
            return 0
        seen, self._seen = self._seen, {}  # should the look fail, all leases begin anew
        self.lease_ends_in_s = None
        began_at = self._monotonic()
        me = self._ownership.me
        rows = db.execute(_BEAT_AND_LOOK, {"fence": me.fence, "nonce": me.nonce}).fetchall()
        looked_at = self._monotonic()
        if (me.fence, me.nonce, False) not in {(fence, nonce, dead) for fence, nonce, _, dead in rows}:
            self._ownership.lose()
            return 0
        if self._on_beat is not None:
            self._on_beat(began_at)
        if looked_at - self._looked_at >= GAP_S:
            seen = {}
        self._looked_at = looked_at
        taken = 0
        for fence, nonce, beats, dead in rows:
            if dead or fence == me.fence:
                continue
            last, since = seen.get((fence, nonce), (None, looked_at))
            if last != beats:
                since = looked_at
            self._seen[fence, nonce] = (beats, since)
            if began_at - since >= LEASE_S and self._take_over(db, fence, nonce, beats):
                taken += 1
        ends = (since + LEASE_S - looked_at for _, since in self._seen.values())
        self.lease_ends_in_s = min((it for it in ends if it > 0), default=None)
        return taken

    def _take_over(self, db: Db, fence: int, nonce: bytes, beats: int | None) -> bool:
        values = {"fence": fence, "nonce": nonce, "beats": beats}
        if not db.execute(_TAKE_OVER, values).rowcount:
            return False
        logger.warning("a process that shares the database has died", fence=fence)
        if self._on_taken is not None:
            self._on_taken()
        return True


def refuse_if_alive(db: Db, fence: int, session_id: str) -> None:
    """Raises: OwnedElsewhereError, if the owner of this session's open turns lives."""
    owner = living(db, [fence]).get(fence)
    if owner is not None:
        raise OwnedElsewhereError(session_id, fence=fence, address=owner.address)


def living(db: Db, fences: Collection[int]) -> dict[int, Owner]:
    """Those of some owners that live, by their fences."""
    query = "SELECT fence, address FROM {s}.owners WHERE fence = ANY(%s) AND NOT dead"
    rows = db.execute(query, (list(fences),)).fetchall() if fences else ()
    return {fence: Owner(fence=fence, address=address) for fence, address in rows}


def find_owner(db: Db, session_id: str, *, besides: int) -> Owner | None:
    """The owner of a session's open turns, if it is not ``besides``."""
    row = db.execute(
        "SELECT o.fence, o.address FROM {s}.sessions JOIN {s}.owners o ON o.fence = owner "
        "WHERE id = %s AND owner <> %s",
        (session_id, besides),
    ).fetchone()
    return None if row is None else Owner(fence=row[0], address=row[1])


def owner_of(db: Db, fence: int) -> Owner:
    row = db.execute("SELECT address FROM {s}.owners WHERE fence = %s", (fence,)).fetchone()
    return Owner(fence=fence, address=None if row is None else row[0])


def forget(db: Db, fence: int) -> None:
    """Remove an owner that is dead and has nothing left."""
    db.execute("DELETE FROM {s}.beats WHERE fence = %s", (fence,))
    db.execute("DELETE FROM {s}.owners WHERE fence = %s AND dead", (fence,))
