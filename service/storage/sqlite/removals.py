"""Removals of sessions, and of ephemeral turns by their ends: no query finds their rows, which are reclaimed later.

What is reclaimed: :mod:`service.storage.sqlite.reclaim`.
"""

import apsw

from service.storage.records import TurnRecord
from service.storage.sqlite import tree_changes, trees

HIDE = "UPDATE sessions SET id = NULL, deletion = 2, deleter = NULL WHERE key = ?"
_PLACE = "SELECT ordinal, (SELECT ephemeral FROM sessions WHERE key = session) FROM turns WHERE key = ?"
_EMPTY = (
    "UPDATE turns SET owner = NULL, state = ?, input = '[]', output = '[]', runs = NULL, options = NULL, error = NULL "
    "WHERE key = ?"
)


def hide(db: apsw.Connection, session: int) -> None:
    """Hide a session: no query finds it any more, and its rows are reclaimed later."""
    db.execute(HIDE, (session,))


def remove_ephemeral(db: apsw.Connection, key: int, turn: TurnRecord, *, session: int) -> None:
    """Remove an ephemeral turn that has ended, and its session if that was made for it.

    Args:
        key: The turn's key.
        session: Its session's key. The session's counts have the end already.
    """
    ordinal, is_alone = db.execute(_PLACE, (key,)).fetchone()  # type: ignore[misc]
    db.execute("DELETE FROM outputs WHERE turn = ?", (key,))
    db.execute(_EMPTY, (turn.state, key))
    if is_alone:
        hide(db, session)
    else:
        trees.remove(db, session, turn.parent, ordinal)
        tree_changes.delete_at_once(db, key)
