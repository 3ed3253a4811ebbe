"""The tree of a session's turns: siblings, open turns on a path, and pages of the tree.

The table ``siblings`` has the place of each turn that has a sibling. A turn without siblings has no row there, so that
a conversation without branches costs one look-up in an index for each turn.
"""

from collections.abc import Collection, Iterator
from datetime import datetime

import apsw

from service.errors import TurnNotFoundError
from service.storage import rules
from service.storage.moments import time_of
from service.storage.page_cursor import TurnPosition, encode_cursor
from service.storage.records import Page, Places, Siblings, TreeNode, TurnState
from service.storage.sqlite.rows import Row

CHILDREN = "session = ? AND coalesce(parent, '') = ?"
"""The condition that finds the children of a turn, or of None as the empty text, by their index."""

_OTHER_CHILD = f"SELECT ordinal FROM shown_turns WHERE {CHILDREN} AND ordinal <> ? LIMIT 1"
_LAST_PLACE = "SELECT place FROM siblings WHERE session = ? AND parent = ? ORDER BY ordinal DESC LIMIT 1"
_NEWEST = "SELECT ordinal, place FROM siblings WHERE session = ? AND parent = ? ORDER BY ordinal DESC LIMIT 1"
_PLACE = "SELECT place FROM siblings WHERE session = ? AND parent = ? AND ordinal = ?"
_SIBLING = "session = :session AND parent = :parent AND ordinal = :ordinal"
_NEWER_SIBLINGS = "session = :session AND parent = :parent AND ordinal > :ordinal"
_PLACE_BEFORE = (
    "SELECT place FROM siblings WHERE session = :session AND parent = :parent AND ordinal < :ordinal "
    "ORDER BY ordinal DESC LIMIT 1"
)
_ADD = "INSERT INTO siblings (session, parent, ordinal, place) VALUES (?, ?, ?, ?)"
_STEP_UP = "SELECT id, state, started_at, parent FROM shown_turns WHERE id = ? AND session = ?"
_NODES = (
    "SELECT id, parent, state, created_at, ended_at, ordinal FROM shown_turns "
    "WHERE session = ? AND ordinal > ? ORDER BY ordinal LIMIT ?"
)


def add_sibling(db: apsw.Connection, session: int, parent: str | None, ordinal: int) -> Siblings:
    """Count a turn, which is or is about to be in the session, among its siblings. Mostly it is the newest of them."""
    parent = parent or ""
    other: int | None = db.execute(_OTHER_CHILD, (session, parent, ordinal)).get
    if other is None:
        return Siblings()
    newest: Row | None = db.execute(_NEWEST, (session, parent)).fetchone()
    if newest is None:
        newest = other, 1
        db.execute(_ADD, (session, parent, other, 1))
    newest_ordinal, count = newest
    place = count + 1
    if newest_ordinal > ordinal:
        values = {"session": session, "parent": parent, "ordinal": ordinal}
        place = (db.execute(_PLACE_BEFORE, values).get or 0) + 1
        db.execute(f"UPDATE siblings SET place = place + 1 WHERE {_NEWER_SIBLINGS}", values)
    db.execute(_ADD, (session, parent, ordinal, place))
    return Siblings(place, count + 1)


def has_child(db: apsw.Connection, session: int, parent: str, *, besides: int = -1) -> bool:
    """Whether any turn follows a turn; ``besides`` is the ordinal of one that does not count."""
    return db.execute(_OTHER_CHILD, (session, parent, besides)).fetchone() is not None


def has_turns(db: apsw.Connection, session: int) -> bool:
    """Whether a session has any turn."""
    return db.execute("SELECT 1 FROM shown_turns WHERE session = ? LIMIT 1", (session,)).fetchone() is not None


def children_of(db: apsw.Connection, session: int, parent: str, columns: str, *, after: int) -> Iterator[Row]:
    """The children of a turn after an ordinal, in their order."""
    # With an order SQLite takes several times as long, and most turns have one child.
    has_several = db.execute(_LAST_PLACE, (session, parent)).fetchone() is not None
    order = "ORDER BY ordinal" if has_several else ""
    query = f"SELECT {columns} FROM shown_turns WHERE {CHILDREN} AND ordinal > ? {order}"
    yield from db.execute(query, (session, parent, after))


def forget_place(db: apsw.Connection, session: int, parent: str | None, ordinal: int) -> None:
    """Remove the place of a turn whose siblings are removed, too."""
    db.execute(
        f"DELETE FROM siblings WHERE {_SIBLING}", {"session": session, "parent": parent or "", "ordinal": ordinal}
    )


def remove(db: apsw.Connection, session: int, parent: str | None, ordinal: int) -> None:
    """Take a turn out of the tree: its siblings move up. The turns that follow it cannot be found without it."""
    values = {"session": session, "parent": parent or "", "ordinal": ordinal}
    db.execute(f"DELETE FROM siblings WHERE {_SIBLING}", values)
    db.execute(f"UPDATE siblings SET place = place - 1 WHERE {_NEWER_SIBLINGS}", values)
    if db.execute(_LAST_PLACE, (session, parent or "")).get == 1:  # the last one has no siblings any more
        db.execute("DELETE FROM siblings WHERE session = ? AND parent = ?", (session, parent or ""))


def find_places(db: apsw.Connection, session_id: str, turn_ids: Collection[str]) -> Places:
    row: Row | None = db.execute("SELECT key, head FROM sessions WHERE id = ?", (session_id,)).fetchone()
    if row is None:
        return Places()
    session, head = row
    siblings: dict[str, Siblings] = {}
    for turn_id in turn_ids:
        turn: Row | None = db.execute(
            "SELECT ordinal, coalesce(parent, '') FROM shown_turns WHERE id = ? AND session = ?", (turn_id, session)
        ).fetchone()
        if turn is None:
            continue
        ordinal, parent = turn
        place: int | None = db.execute(_PLACE, (session, parent, ordinal)).get
        if place is None:
            siblings[turn_id] = Siblings()
        else:
            siblings[turn_id] = Siblings(place, db.execute(_LAST_PLACE, (session, parent)).get)
    return Places(head, siblings)


def find_open(db: apsw.Connection, session: int, turn_id: str) -> str | None:
    """The open turn on the path to a turn, if there is one. Raises: TurnNotFoundError: There is no such turn."""
    return rules.find_open(_up_from(db, session, turn_id))


def _up_from(db: apsw.Connection, session: int, turn_id: str) -> Iterator[tuple[str, TurnState, datetime | int | None]]:
    next_id: str | None = turn_id
    while next_id is not None:
        row: Row | None = db.execute(_STEP_UP, (next_id, session)).fetchone()
        if row is None:
            raise TurnNotFoundError(next_id)
        *found, next_id = row
        yield tuple(found)


def list_page(db: apsw.Connection, session: int, *, limit: int, after: TurnPosition | None) -> Page[TreeNode]:
    """A page of the turns of a session, without their texts."""
    rows: list[Row] = db.execute(_NODES, (session, -1 if after is None else after.ordinal, limit + 1)).fetchall()
    cursors = tuple(encode_cursor(TurnPosition(row[-1])) for row in rows[:limit])
    return Page(
        data=tuple(map(_node_of, rows[:limit])), next=cursors[-1] if len(rows) > limit else None, cursors=cursors
    )


def _node_of(row: Row) -> TreeNode:
    return TreeNode(
        id=row[0],
        parent=row[1],
        state=row[2],
        created_at=time_of(row[3]),
        ended_at=None if row[4] is None else time_of(row[4]),
    )
