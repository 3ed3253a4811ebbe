"""Recovery: ends the open turns of owners that are gone, or suspends those that may have another attempt.

Each step is a transaction, and bounded. Several owners may recover at once: each takes sessions that no other one has
taken, and each turn is ended or suspended once.
"""

from collections.abc import Collection
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.page_size import fitting
from service.storage.postgres import owners, removals, segments, suspensions
from service.storage.postgres.connections import Db
from service.storage.postgres.ends import End, keep_ends
from service.storage.postgres.rows import Row
from service.storage.postgres.segments import Grown
from service.storage.postgres.suspensions import Suspension
from service.storage.postgres.turn_rows import TURN_COLUMNS, turn_of
from service.storage.records import TurnRecord
from service.storage.search import terms_at_once

_TURNS_MAX = 100
"""The most turns that one step ends."""
_BYTES_MAX = 1024 * 1024
"""Bound on the growth of these turns, in bytes: a step ends with the turn that passes it."""

_DEAD = (
    "SELECT fence FROM {s}.owners WHERE dead AND fence <> ALL(%(passed)s::bigint[]) "
    "ORDER BY fence <= %(last)s, fence LIMIT 1"
)
# The sessions that others have taken are passed over.
_TAKE = (
    "SELECT s.key FROM {s}.turns AS t JOIN {s}.sessions AS s ON s.key = t.session "
    "WHERE t.owner = %(owner)s LIMIT %(limit)s FOR NO KEY UPDATE OF s SKIP LOCKED"
)
_HAS_MORE = (
    "SELECT EXISTS (SELECT FROM {s}.turns WHERE owner = %(owner)s) "
    "OR EXISTS (SELECT FROM {s}.sessions WHERE deletion = %(owner)s)"
)
_OPEN = (
    f"SELECT s.id, t.key, t.segment, {TURN_COLUMNS} "
    "FROM {s}.turns AS t JOIN {s}.sessions AS s ON s.key = t.session "
    "WHERE t.owner = %(owner)s AND t.session = ANY(%(sessions)s::bigint[]) ORDER BY t.key LIMIT %(limit)s"
)
_FIELDS_BEFORE = 3
"""The columns of ``_OPEN`` before those of a turn."""


class Place(msgspec.Struct, frozen=True):
    """How far a recovery has come, which takes the dead owners in turn.

    Attributes:
        last: The owner of the last step.
        passed: The owners of which others hold all that is left. A later recovery comes back to them.
    """

    last: int = 0
    passed: frozenset[int] = frozenset()


def recover_some(db: Db, now: datetime, place: Place) -> tuple[int, Place | None]:
    """Do one step of the recovery. Returns how many turns it ended, and the place of the next step if there is one."""
    values = {"passed": list(place.passed), "last": place.last}
    dead: Row | None = db.execute(_DEAD, values).fetchone()
    if dead is None:
        return 0, None
    fence: int = dead[0]
    further = Place(fence, place.passed)
    taken = db.execute(_TAKE, {"owner": fence, "limit": _TURNS_MAX}).fetchall()
    if taken:
        return _recover_some(
            db, fence, now, {key for (key,) in taken}, turns_max=_TURNS_MAX, bytes_max=_BYTES_MAX
        ), further
    if removals.hide_marked_by(db, fence):
        return 0, further
    if db.execute(_HAS_MORE, {"owner": fence}).fetchone() != (False,):
        return 0, Place(fence, place.passed | {fence})
    if not segments.drop_some_of(db, fence):
        owners.forget(db, fence)
    return 0, further


def recover_turns_of(db: Db, fence: int, now: datetime, *, session: int) -> None:
    """End or suspend the open turns of an owner that is gone in one session, whose row is locked."""
    _recover_some(db, fence, now, [session], turns_max=None, bytes_max=None)


def _recover_some(
    db: Db, owner: int, now: datetime, taken: Collection[int], *, turns_max: int | None, bytes_max: int | None
) -> int:
    """End open turns of an owner as ``interrupted`` (``crash``), in sessions whose rows are locked; suspend those that
    may have another attempt. Returns how many ended."""
    rows = db.execute(_OPEN, {"owner": owner, "sessions": list(taken), "limit": turns_max}).fetchall()
    if not rows:
        return 0
    keys: list[int] = [row[1] for row in rows]
    segment = min(row[2] for row in rows)
    sizes = segments.sizes_of(db, owner, keys, segment=segment)
    keys = keys[: fitting((sizes.get(key, 0) for key in keys), bytes_max=bytes_max)]
    grown = segments.grown_of(db, owner, keys, segment=segment)
    ends: list[End] = []
    released: list[Suspension] = []
    for key, row in zip(keys, rows, strict=False):
        it = grown[key]
        turn = it.told_of(turn_of(row[0], row[_FIELDS_BEFORE:])[0])
        if rules.resumes(turn):
            released.append(Suspension(rules.released(turn, it.items, it.texts), it.runs))
        else:
            ends.append(_end_of(rules.crashed(turn, it.items, it.texts, now), it, now))
    keep_ends(db, ends, owner=owner)
    suspensions.keep(db, released, now, owner=owner)
    suspensions.leave(db, taken, owner=owner)
    return len(ends)


def _end_of(turn: TurnRecord, grown: Grown, now: datetime) -> End:
    return End(turn, grown.runs, () if turn.ephemeral else terms_at_once(turn), now)
