"""Checkpoints: what the replies of open turns grew by, in segments.

A segment is one row for a call of an owner, with the growth of all its turns. The ``body`` costs little more than the
texts in it, and no row of a turn is written. Beside the body stand the keys of the turns, the seq that the growth of
each follows, and the place in the body where it ends, so that the growth of one turn is read without that of the
others: the body is not compressed, and PostgreSQL reads slices of it.

An owner removes the segments that are older than its open turns. So a turn that is open has the number of the first
segment that it may be in.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from service.models.client import Usage
from service.storage import pieces
from service.storage.event_rows import page_of_rows
from service.storage.pieces import Run
from service.storage.postgres.connections import Cursor, Db, Me
from service.storage.postgres.rows import Row
from service.storage.records import Checkpoint, EventsPage, Item, LeftOut, TurnRecord

BODY_BYTES_MAX = 4 * 1024 * 1024
"""Bound on a segment. A call with more growth makes several, and the growth of one turn is in one."""

SEGMENT = "(SELECT last_value + is_called::int FROM {s}.segments_seq_seq)"
"""The first segment that a turn may be in which starts now: those of this owner come in the order of its writes."""
_NONE = 9223372036854775807  # the greatest bigint
SEGMENT_OF_NEW = f"CASE %(state)s WHEN 'queued' THEN {_NONE} ELSE {SEGMENT} END"
"""The same for a new turn. One that waits needs no segment, and keeps none of the other turns from being dropped."""

_DROP_OLD = (
    "DELETE FROM {s}.segments WHERE owner = %(owner)s "
    f"AND seq < coalesce((SELECT min(segment) FROM {{s}}.turns WHERE owner = %(owner)s{{besides}}), {_NONE})"
)
DROP_OLD = _DROP_OLD.replace("{besides}", " AND id <> ALL(%(ids)s::text[])")
"""A part of a statement: removes the segments of an owner that none of its open turns needs but those that end."""
# A turn that is not this owner's open one has the key 0 there. A checkpoint may overtake the start of its turn, which
# another thread makes because of a lock: then the row of the turn gets this segment, and the start keeps it.
_ADD = """
WITH dropped AS ({drop_old}), given AS (
    SELECT array_agg(coalesce(t.key, 0) ORDER BY it.n) AS turns, count(t.key) AS found,
        array_agg(t.key) FILTER (WHERE t.segment = {none}) AS waiting
    FROM unnest(%(ids)s::text[]) WITH ORDINALITY AS it (id, n)
    LEFT JOIN {s}.turns AS t ON t.id = it.id AND t.owner = %(owner)s
), added AS (
    INSERT INTO {s}.segments (owner, turns, afters, ends, body)
    SELECT %(owner)s, given.turns, %(afters)s::bigint[], %(ends)s::int[], %(body)s FROM given WHERE found > 0
    RETURNING seq
), moved AS (
    UPDATE {s}.turns SET segment = added.seq FROM added, given
    WHERE turns.key = ANY(given.waiting) AND turns.owner = %(owner)s AND turns.segment > added.seq
)
SELECT turns FROM given
""".replace("{drop_old}", _DROP_OLD.replace("{besides}", "")).replace("{none}", str(_NONE))
_DROP_SOME = (
    "DELETE FROM {s}.segments WHERE owner = %(owner)s AND seq IN ("
    "SELECT seq FROM {s}.segments WHERE owner = %(owner)s ORDER BY seq LIMIT %(limit)s)"
)
_DROPPED_MAX = 100
# The growth that a later segment replaces ends where that begins, or later. ``bound``: where the next one begins.
_PAGE = """
SELECT after, substring(body FROM start + 1 FOR length) FROM (
    SELECT *, sum(length) OVER (ORDER BY seq) - length AS before FROM (
        SELECT s.seq, s.body, s.afters[n] AS after, coalesce(s.ends[n - 1], 0) AS start,
            s.ends[n] - coalesce(s.ends[n - 1], 0) AS length,
            min(s.afters[n]) OVER (ORDER BY s.seq ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS bound
        FROM {s}.segments AS s CROSS JOIN LATERAL array_position(s.turns, %(turn)s) AS n
        WHERE s.owner = %(owner)s AND s.seq >= %(segment)s AND n IS NOT NULL
    ) AS part WHERE bound IS NULL OR (bound > after AND bound > %(after)s)
) AS part WHERE before < %(length_max)s ORDER BY seq
"""
_LAST = """
SELECT s.afters[n], substring(s.body FROM coalesce(s.ends[n - 1], 0) + 1 FOR s.ends[n] - coalesce(s.ends[n - 1], 0))
FROM {s}.segments AS s CROSS JOIN LATERAL array_position(s.turns, %(turn)s) AS n
WHERE s.owner = %(owner)s AND s.seq >= %(segment)s AND n IS NOT NULL ORDER BY s.seq DESC LIMIT 1
"""
_OF_OWNER = """
FROM {s}.segments AS s
CROSS JOIN LATERAL unnest(s.turns, s.afters, s.ends) WITH ORDINALITY AS it (turn, after, until, n)
CROSS JOIN LATERAL (SELECT coalesce(s.ends[it.n::int - 1], 0) AS start) AS begins
WHERE s.owner = %(owner)s AND s.seq >= %(segment)s AND it.turn = ANY(%(turns)s::bigint[])
"""
_SIZES = f"SELECT it.turn, sum(it.until - begins.start)::bigint {_OF_OWNER} GROUP BY it.turn"
_ALL = (
    f"SELECT it.turn, it.after, substring(s.body FROM begins.start + 1 FOR it.until - begins.start) {_OF_OWNER} "
    "ORDER BY s.seq"
)


class _Growth(msgspec.Struct, frozen=True, array_like=True):
    """The growth of one turn, as it stands in the body of a segment."""

    runs: tuple[Run, ...]
    text: str
    items: tuple[Item, ...]
    left_out: LeftOut | None
    usage: Usage | None


_growth: msgspec.msgpack.Decoder[_Growth] = msgspec.msgpack.Decoder(_Growth)


def keep(db: Db, checkpoints: Sequence[Checkpoint], me: Me) -> list[str]:
    """Keep checkpoints. Returns the turns that are not this owner's open turns."""
    return lost_of(send(db, checkpoints, me))


Sent = list[tuple[list[Checkpoint], Cursor]]
"""The checkpoints of each segment, and the answer to its statement."""


def send(db: Db, checkpoints: Sequence[Checkpoint], me: Me) -> Sent:
    """Keep checkpoints, in a pipeline or outside; :func:`lost_of` takes the result."""
    # Nearly always one.
    return [(some, db.execute(_ADD, _values(some, bodies, me))) for some, bodies in _segments_of(checkpoints)]


def lost_of(sent: Sent) -> list[str]:
    """The turns of checkpoints that are not this owner's open turns."""
    lost: list[str] = []
    for some, answer in sent:
        row: Row = answer.fetchone()  # type: ignore[assignment]
        lost += [it.turn_id for it, key in zip(some, row[0], strict=True) if key == 0]
    return list(dict.fromkeys(lost))


def _segments_of(checkpoints: Iterable[Checkpoint]) -> Iterator[tuple[list[Checkpoint], list[bytes]]]:
    """The checkpoints of each segment, and their parts of the body. A segment has each turn once."""
    some: list[Checkpoint] = []
    bodies: list[bytes] = []
    turns = set[str]()
    size = 0
    for it in checkpoints:
        body = msgspec.msgpack.encode(_Growth(it.runs, it.text, it.items, it.left_out, it.usage))
        if some and (size + len(body) > BODY_BYTES_MAX or it.turn_id in turns):
            yield some, bodies
            some, bodies, turns, size = [], [], set(), 0
        some.append(it)
        bodies.append(body)
        turns.add(it.turn_id)
        size += len(body)
    if some:
        yield some, bodies


def _values(checkpoints: Sequence[Checkpoint], bodies: Sequence[bytes], me: Me) -> dict[str, object]:
    ends: list[int] = []
    end = 0
    for body in bodies:
        end += len(body)
        ends.append(end)
    return {
        "owner": me.fence,
        "ids": [it.turn_id for it in checkpoints],
        "afters": [it.after for it in checkpoints],
        "ends": ends,
        "body": b"".join(bodies),
    }


def drop_some_of(db: Db, fence: int) -> bool:
    """Remove segments of an owner that has no open turns any more. Returns whether there may be more of them."""
    return db.execute(_DROP_SOME, {"owner": fence, "limit": _DROPPED_MAX}).rowcount == _DROPPED_MAX


def read(db: Db, turn: int, *, owner: int, segment: int, after: int, length_max: int) -> EventsPage:
    """The events of an open turn after a seq, as far as they were kept."""
    values = {"turn": turn, "owner": owner, "segment": segment, "after": after, "length_max": length_max}
    with db.pipeline():
        last = db.execute(_LAST, values)
        page = db.execute(_PAGE, values)
    newest: Row | None = last.fetchone()
    if newest is None:
        return EventsPage(after=after)
    kept = pieces.last_seq(_growth.decode(newest[1]).runs, newest[0])
    grown = ((row_after, _growth.decode(body)) for row_after, body in page)
    rows = ((row_after, list(it.runs), it.text) for row_after, it in grown)
    return msgspec.structs.replace(page_of_rows(rows, after=after, length_max=length_max), kept=kept)


def sizes_of(db: Db, owner: int, turns: Sequence[int], *, segment: int) -> dict[int, int]:
    """The size of what open turns of an owner have in segments, in bytes; by their keys.

    Args:
        segment: The first segment that one of them may be in.
    """
    return dict(db.execute(_SIZES, {"owner": owner, "turns": list(turns), "segment": segment}).fetchall())


class Grown:
    """What the checkpoints of a turn have kept.

    Attributes:
        runs: Its events.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, _Growth]] = []
        self._left_out: LeftOut | None = None
        self._usage: Usage | None = None

    @property
    def runs(self) -> list[Run]:
        return pieces.join(run for _, it in self._kept for run in it.runs)

    @property
    def items(self) -> Iterator[Item]:
        """The items as the checkpoints have them, without texts."""
        return (item for _, it in self._kept for item in it.items)

    @property
    def texts(self) -> Iterator[tuple[int, str]]:
        """The texts of the pieces, each with the index of its item."""
        return (text for _, it in self._kept for text in pieces.texts_by_item(it.runs, it.text))

    def add(self, after: int, body: bytes) -> None:
        """Add a checkpoint, which replaces what earlier ones have kept beyond the seq that it follows."""
        growth = _growth.decode(body)
        while self._kept and self._kept[-1][0] >= after:
            self._kept.pop()
        self._kept.append((after, growth))
        self._left_out = growth.left_out or self._left_out
        self._usage = growth.usage or self._usage

    def told_of(self, turn: TurnRecord) -> TurnRecord:
        """The turn with what the checkpoints told of it beside its reply."""
        return msgspec.structs.replace(turn, left_out=self._left_out or turn.left_out, usage=self._usage or turn.usage)


def grown_of(db: Db, owner: int, turns: Sequence[int], *, segment: int) -> dict[int, Grown]:
    """What the checkpoints of open turns of an owner have kept, by the keys of the turns."""
    grown = {key: Grown() for key in turns}
    for key, after, body in db.execute(_ALL, {"owner": owner, "turns": list(turns), "segment": segment}):
        grown[key].add(after, body)
    return grown
