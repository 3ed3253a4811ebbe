"""The tree of a session's turns: places among siblings, pages of the tree, and what follows a turn.

A tree consists of chains (:mod:`service.storage.postgres.schema`): what follows a turn in its own chain is one range of
an index, and further chains begin at the further children of these turns. A step that changes a tree has locked the row
of the session before.
"""

from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

from service.errors import SessionNotFoundError
from service.storage.moments import moment, time_of
from service.storage.page_cursor import TurnPosition, encode_cursor
from service.storage.postgres.connections import Db
from service.storage.postgres.rows import Row
from service.storage.records import Page, Places, Siblings, TreeNode
from service.storage.rules import NOBODY

_LAST_PLACE = (
    "SELECT last.place FROM {s}.turns AS last WHERE last.session = turns.session "
    "AND coalesce(last.parent, '') = coalesce(turns.parent, '') ORDER BY last.place DESC LIMIT 1"
)
_PLACES = (
    f"SELECT head, turns.id, turns.place, ({_LAST_PLACE}) FROM {{s}}.sessions "
    "LEFT JOIN {s}.turns ON turns.session = sessions.key AND turns.id = ANY(%s) WHERE sessions.id = %s"
)
_NODES = (
    "SELECT node.id, node.parent, node.state, node.created_at, node.ended_at, node.ordinal "
    "FROM {s}.sessions LEFT JOIN LATERAL ("
    "SELECT * FROM {s}.turns WHERE session = sessions.key AND ordinal > %(after)s ORDER BY ordinal LIMIT %(limit)s"
    ") AS node ON true "
    "WHERE sessions.id = %(session)s AND deletion IS NULL AND (open_turns > 0 OR expires_at > %(now)s) "
    "ORDER BY node.ordinal"
)
_BRANCHES = (
    "SELECT parent.chain, parent.depth, child.chain, child.depth FROM {s}.turns AS child "
    "JOIN {s}.turns AS parent ON parent.key = child.chain_parent "
    "WHERE child.session = %s AND child.key = child.chain AND child.chain_parent IS NOT NULL"
)
_MOVE_UP = (
    "UPDATE {s}.turns SET place = place - 1 "
    "WHERE session = %(session)s AND coalesce(parent, '') = coalesce(%(parent)s, '') AND place > %(place)s"
)
_OPEN_FOLLOWER = (
    "WITH RECURSIVE up (open_turn, chain, depth, chain_parent) AS ("
    f"SELECT id, chain, depth, chain_parent FROM {{s}}.turns WHERE owner IN ({NOBODY}, %(owner)s) "
    "AND session = %(session)s "
    "UNION ALL SELECT open_turn, parent.chain, parent.depth, parent.chain_parent FROM up "
    "JOIN {s}.turns AS parent ON parent.key = up.chain_parent) "
    "SELECT open_turn FROM up JOIN {s}.turns AS this ON this.key = %(turn)s "
    "WHERE up.chain = this.chain AND up.depth >= this.depth LIMIT 1"
)


class Part(NamedTuple):
    """The turns of a chain from this depth on."""

    chain: int
    depth: int


class Branches:
    """Where chains of a session begin that follow a turn of another chain. They are few, and read at once.

    A recursive statement would find what follows a turn, too, but with old statistics PostgreSQL looked through the
    whole session for each turn of it.
    """

    def __init__(self, db: Db, session: int) -> None:
        self._after: dict[int, list[tuple[int, Part]]] = {}
        """The chains that follow a turn of this chain: the depth of the turn, and the whole chain."""
        for chain, depth, *following in db.execute(_BRANCHES, (session,)).fetchall():
            self._after.setdefault(chain, []).append((depth, Part(*following)))

    def followers(self, chain: int, depth: int) -> list[Part]:
        """The turn at this depth of a chain, and all turns that follow it, in parts."""
        parts = [Part(chain, depth)]
        for part in parts:  # it grows meanwhile
            parts += [branch for after, branch in self._after.get(part.chain, ()) if after >= part.depth]
        return parts

    def children(self, chain: int, depth: int) -> list[Part]:
        """The chains that begin with a child of this turn, which is not the last one of its chain or has no child."""
        return [branch for after, branch in self._after.get(chain, ()) if after == depth]


def find_places(db: Db, session_id: str, turn_ids: Collection[str]) -> Places:
    rows: list[Row] = db.execute(_PLACES, (list(turn_ids), session_id)).fetchall()
    if not rows:
        return Places()
    return Places(rows[0][0], {turn_id: Siblings(place, count) for _, turn_id, place, count in rows if turn_id})


def list_page(db: Db, session_id: str, *, limit: int, after: TurnPosition | None, now: datetime) -> Page[TreeNode]:
    """A page of the turns of a session, without their texts. Raises: SessionNotFoundError."""
    values = {
        "session": session_id,
        "now": moment(now),
        "after": -1 if after is None else after.ordinal,
        "limit": limit + 1,
    }
    found: list[Row] = db.execute(_NODES, values).fetchall()
    if not found:
        raise SessionNotFoundError(session_id)
    rows = [row for row in found if row[0] is not None]
    cursors = tuple(encode_cursor(TurnPosition(row[-1])) for row in rows[:limit])
    return Page(
        data=tuple(map(_node_of, rows[:limit])), next=cursors[-1] if len(rows) > limit else None, cursors=cursors
    )


def move_up(db: Db, session: int, parent: str | None, place: int) -> None:
    """Close the gap that a turn has left among its siblings. ``place`` was its place."""
    db.execute(_MOVE_UP, {"session": session, "parent": parent, "place": place})


def find_open_follower(db: Db, session: int, turn: int, *, owner: int) -> str | None:
    """An open turn, suspended or of an owner, that is this turn or follows it, by the keys of session and turn."""
    row = db.execute(_OPEN_FOLLOWER, {"session": session, "turn": turn, "owner": owner}).fetchone()
    return None if row is None else str(row[0])


def _node_of(row: Row) -> TreeNode:
    return TreeNode(
        id=row[0],
        parent=row[1],
        state=row[2],
        created_at=time_of(row[3]),
        ended_at=None if row[4] is None else time_of(row[4]),
    )
