"""Paths of turns, from the root to a turn.

A path is made of chains (:mod:`service.storage.postgres.schema`): of each chain it has the turns down to a depth. So a
statement finds the chains, which are few, and reads each as one range of an index. Where only the last turns of a path
are wanted, it reads no others.
"""

from collections.abc import Collection, Sequence

import msgspec

from service.errors import TurnNotFoundError
from service.storage import rules
from service.storage.postgres import event_pages
from service.storage.postgres.connections import Db
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import COLUMNS, PATH_COLUMNS, turn_of
from service.storage.records import LeftOut, TurnRecord

_ALL = (1 << 31) - 1
"""More turns than a session has."""
_NO_BOUND = 1 << 62
_LONG_ROW_BYTES = 128 * 1024
"""The longest turn, in bytes of its texts, that the acceptance of a turn reads. Reasoning may be long."""

# Chains of a path, of which only the last ``turns_max`` turns are wanted. ``foot`` is the depth of the last one.
_CHAINS = """
WITH RECURSIVE chains (chain, depth, chain_parent, foot) AS (
    SELECT t.chain, t.depth, t.chain_parent, t.depth FROM {s}.turns AS t {of_session}
    UNION ALL
    SELECT t.chain, t.depth, t.chain_parent, chains.foot FROM chains JOIN {s}.turns AS t ON t.key = chains.chain_parent
    WHERE chains.foot - t.depth < %(turns_max)s
)
"""
_OF_SESSION = "JOIN {s}.sessions AS s ON s.key = t.session WHERE t.id = %(turn)s AND s.id = %(session)s"
_PATH = _CHAINS.replace("{of_session}", _OF_SESSION)
_SHORT = _CHAINS.replace("{of_session}", f"{_OF_SESSION} AND s.turns < %(turns_max)s")
_BY_KEY = _CHAINS.replace("{of_session}", "WHERE t.id = %(turn)s AND t.session = %(session)s")
# A range for each chain: with a limit PostgreSQL reads no turns of other paths. No text is read of a row that is no
# result.
_NEWEST = """
FROM (
    SELECT t.*, chains.foot, sum(t.message_bytes + %(turn_bytes)s) OVER (ORDER BY t.depth DESC) AS total
    FROM chains CROSS JOIN LATERAL (
        SELECT * FROM {s}.turns AS t WHERE t.chain = chains.chain AND t.depth <= chains.depth
        ORDER BY t.depth DESC LIMIT %(turns_max)s
    ) AS t
) AS t
"""
_READ = f"{_PATH} SELECT {PATH_COLUMNS} {_NEWEST} WHERE t.total <= %(bytes_max)s OR t.depth = t.foot ORDER BY t.depth"
_SHORT_COLUMNS = PATH_COLUMNS.replace(
    "t.input, t.output", "CASE WHEN t.is_short THEN t.input END, CASE WHEN t.is_short THEN t.output END"
)
_READ_SHORT = f"""
{_SHORT}
SELECT {_SHORT_COLUMNS}, t.is_short FROM (
    SELECT t.*, (sum(t.message_bytes) OVER () <= %(short_bytes)s
        AND max(t.text_bytes) OVER () <= {_LONG_ROW_BYTES}) AS is_short {_NEWEST} WHERE t.total <= %(bytes_max)s
) AS t ORDER BY t.depth
"""
_MEASURE = f"""
{_PATH}
SELECT coalesce(sum(part.items), 0)::bigint, coalesce(sum(part.bytes), 0)::bigint FROM chains CROSS JOIN LATERAL (
    SELECT sum(t.message_items) AS items, sum(t.message_bytes) AS bytes
    FROM {{s}}.turns AS t WHERE t.chain = chains.chain AND t.depth <= chains.depth
) AS part
"""
_FIND = f"""
{_PATH}
SELECT t.id FROM {{s}}.turns AS t JOIN chains ON chains.chain = t.chain AND chains.depth >= t.depth
WHERE t.id = ANY(%(among)s)
"""
_FIRST = """
SELECT t.depth FROM {s}.turns AS t JOIN chains ON chains.chain = t.chain AND chains.depth >= t.depth
WHERE t.id = %(first)s
"""
_PAGE = f"""
{_PATH}
SELECT {PATH_COLUMNS} FROM (
    SELECT t.*, row_number() OVER (ORDER BY t.depth) AS n, sum(t.text_bytes) OVER (ORDER BY t.depth) AS total
    FROM (SELECT CASE WHEN %(first)s::text IS NULL THEN 0 ELSE ({_FIRST}) END AS depth) AS first
    CROSS JOIN chains CROSS JOIN LATERAL (
        SELECT * FROM {{s}}.turns AS t WHERE t.chain = chains.chain AND t.depth >= first.depth
        AND t.depth < first.depth + %(limit)s AND t.depth <= chains.depth ORDER BY t.depth LIMIT %(limit)s
    ) AS t
) AS t WHERE t.n <= 2 OR t.total <= %(bytes_max)s ORDER BY t.depth
"""
# Down to the first turn above which none is open.
_UP = f"""
{_BY_KEY}, path AS (
    SELECT t.id, t.state, t.started_at, t.depth FROM chains CROSS JOIN LATERAL (
        SELECT * FROM {{s}}.turns AS t WHERE t.chain = chains.chain AND t.depth <= chains.depth
        ORDER BY t.depth DESC LIMIT %(turns_max)s
    ) AS t
)
SELECT id, state, started_at FROM path WHERE depth >= coalesce(
    (SELECT max(depth) FROM path WHERE started_at IS NOT NULL OR state = 'completed'), 0
) ORDER BY depth DESC LIMIT %(turns_max)s
"""
_SEGMENTS = f"{_BY_KEY} SELECT chain, depth FROM chains ORDER BY depth"


class Segment(msgspec.Struct, frozen=True):
    """The part of a path that is in one chain, from the depth ``first`` to the depth ``last``."""

    chain: int
    first: int
    last: int


def segments_of(db: Db, session: int, turn_id: str) -> list[Segment]:
    """The parts of the path to a turn, from the root on, by the session's key. None if there is no such turn."""
    values = {"session": session, "turn": turn_id, "turns_max": _ALL}
    segments: list[Segment] = []
    for chain, depth in db.execute(_SEGMENTS, values).fetchall():
        segments.append(Segment(chain, segments[-1].last + 1 if segments else 0, depth))
    return segments


def read(db: Db, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
    """The newest turns of a path, as :meth:`~service.storage.store.Store.read_path` says."""
    values = {
        "session": session_id,
        "turn": turn_id,
        "turn_bytes": rules.TURN_BYTES,
        "bytes_max": _NO_BOUND if bytes_max is None else bytes_max,
        "turns_max": _ALL if bytes_max is None else min(bytes_max // rules.TURN_BYTES + 1, _ALL),
    }
    return event_pages.records_of(db, session_id, db.execute(_READ, values).fetchall(), with_options=False)


class ShortPath:
    """The path to a turn that is about to begin, for :meth:`~service.storage.store.Store.begin_turn`.

    It is read only if it is so short that other writes may wait for it.
    """

    def __init__(self, db: Db, turn: TurnRecord, bytes_max: int | None) -> None:
        self._turn = turn
        bound = _NO_BOUND if bytes_max is None else bytes_max - turn.message_bytes - rules.TURN_BYTES
        values = {
            "session": turn.session_id,
            "turn": turn.parent,
            "turn_bytes": rules.TURN_BYTES,
            "bytes_max": bound,
            "short_bytes": rules.SHORT_PATH_BYTES,
            "turns_max": rules.SHORT_PATH_TURNS,
        }
        self._cursor = None if turn.parent is None else db.execute(_READ_SHORT, values)

    def turns(self, *, turns_before: int) -> Sequence[TurnRecord] | None:
        """The path; None if it is too long.

        Args:
            turns_before: The turns that began in the session before this one.
        """
        if turns_before >= rules.SHORT_PATH_TURNS:
            return None
        rows: list[Row] = [] if self._cursor is None else self._cursor.fetchall()
        if any(not row[COLUMNS] or row[COLUMNS - 1] is not None for row in rows):
            return None
        earlier = [turn_of(self._turn.session_id, row, with_options=False)[0] for row in rows]
        return [*earlier, self._turn]


def measure(db: Db, session_id: str, turn_id: str) -> LeftOut:
    values = {"session": session_id, "turn": turn_id, "turns_max": _ALL}
    return LeftOut(*db.execute(_MEASURE, values).fetchone())  # type: ignore[misc]


def find(db: Db, session_id: str, turn_id: str, *, among: Collection[str]) -> set[str]:
    """Those of some turns that are on a path."""
    values = {"session": session_id, "turn": turn_id, "turns_max": _ALL, "among": list(among)}
    return {row[0] for row in db.execute(_FIND, values).fetchall()}


def list_page(
    db: Db, session_id: str, turn_id: str, *, limit: int, first: str | None, bytes_max: int | None
) -> Sequence[TurnRecord]:
    """The turns of a path from ``first`` on, as :meth:`~service.storage.store.Store.list_path` says."""
    values = {
        "session": session_id,
        "turn": turn_id,
        "first": first,
        "limit": limit,
        "bytes_max": _NO_BOUND if bytes_max is None else bytes_max,
        "turns_max": _ALL,
    }
    return event_pages.records_of(db, session_id, db.execute(_PAGE, values).fetchall(), with_options=False)


def find_open(db: Db, session: int, turn_id: str) -> str | None:
    """The open turn on the path to a turn (:func:`~service.storage.rules.find_open`), by the session's key.

    Raises:
        TurnNotFoundError: There is no such turn.
    """
    values = {"session": session, "turn": turn_id, "turns_max": rules.NEVER_STARTED_MAX + 1}
    rows: list[Row] = db.execute(_UP, values).fetchall()
    if not rows:
        raise TurnNotFoundError(turn_id)
    return rules.find_open((row[0], row[1], row[2]) for row in rows)
