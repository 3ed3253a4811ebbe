"""Recovery: ends the open turns of an owner that is gone, or suspends those that may have another attempt.

Each step is within a transaction and bounded. If two owners recover the same turns, the second finds nothing to do.
"""

from datetime import datetime
from functools import partial
from math import inf

import apsw
import msgspec

from service.errors import OwnedElsewhereError
from service.storage import rules
from service.storage.item_json import items_of
from service.storage.records import Item
from service.storage.search import terms_at_once
from service.storage.sqlite import documents, event_pages, suspensions, tree_changes
from service.storage.sqlite.ends import keep_end
from service.storage.sqlite.ownership import Ownership, fences, owner_of
from service.storage.sqlite.rows import STAGED_MARK, TURN_COLUMNS, Row, turn_of

_TURNS_MAX = 100
"""The most turns that one step ends, so that the step holds the write lock for milliseconds only."""
_BYTES_MAX = 1024 * 1024
"""Bound on the messages of these turns, in bytes: a step ends with the turn that passes it."""

_OPEN = (
    "SELECT turns.key FROM turns CROSS JOIN sessions ON sessions.key = session "
    "WHERE turns.owner = :owner AND deletion <> 2 AND (:session IS NULL OR session = :session) LIMIT :limit"
)
_GET = f"SELECT {TURN_COLUMNS}, session FROM edited_turns WHERE key = ?"
_GET_SESSION = "SELECT id, idle_timeout_s FROM sessions WHERE key = ?"


class Recovered(msgspec.Struct, frozen=True):
    """How many turns were ended, and how many were suspended instead."""

    ended: int = 0
    released: int = 0


def recover_some(db: apsw.Connection, owners: Ownership, now: datetime) -> tuple[int, bool]:
    """Do one step of the recovery. Returns how many turns it ended, and whether no turn is left."""
    for fence in fences(db):
        if owners.is_alive(fence):
            continue
        recovered = recover_turns_of(db, fence, now, turns_max=_TURNS_MAX, bytes_max=_BYTES_MAX)
        if recovered == Recovered():
            db.execute(
                "UPDATE sessions SET id = NULL, deletion = 2, deleter = NULL WHERE deletion = 1 AND deleter = ?",
                (fence,),
            )
            tree_changes.give_up_all_of(db, fence)
            db.execute("DELETE FROM owners WHERE fence = ?", (fence,))
        return recovered.ended, False
    return 0, True


def recover_turns_of(
    db: apsw.Connection,
    fence: int,
    now: datetime,
    *,
    session: int | None = None,
    turns_max: int = -1,
    bytes_max: float = inf,
) -> Recovered:
    """End open turns of an owner as ``interrupted`` (``crash``), in one session or in all. Those that may have another
    attempt are suspended."""
    rows: list[Row] = db.execute(_OPEN, {"owner": fence, "session": session, "limit": turns_max}).fetchall()
    ended = released = size = 0
    for (key,) in rows:
        turn_size, is_ended = _recover(db, key, now, searched_bytes_max=documents.STEP_BYTES_MAX - size)
        size += turn_size
        ended += is_ended
        released += not is_ended
        if size >= bytes_max:
            break
    return Recovered(ended, released)


def refuse_if_alive(db: apsw.Connection, fence: int, owners: Ownership, session_id: str) -> None:
    """Raises: OwnedElsewhereError, if the owner of this session's open turns lives."""
    if owners.is_alive(fence):
        owner = owner_of(db, fence)
        raise OwnedElsewhereError(session_id, fence=owner.fence, address=owner.address)


def _recover(db: apsw.Connection, key: int, now: datetime, *, searched_bytes_max: int) -> tuple[int, bool]:
    """End or suspend an open turn. Returns the bytes of its messages, and whether it has ended.

    With messages of more than ``searched_bytes_max`` it is indexed later.
    """
    row: Row = db.execute(_GET, (key,)).fetchone()  # type: ignore[assignment]
    session = row[-1]
    session_id, idle_timeout_s = db.execute(_GET_SESSION, (session,)).fetchone()  # type: ignore[misc]
    _drop_staged(db, key)
    opened = turn_of(session_id, row)[0]
    resumes = rules.resumes(opened)
    recovered = rules.released if resumes else partial(rules.crashed, now=now)
    turn = recovered(opened, items_kept_of(db, key), event_pages.growth_of(db, key))
    size = sum(len(item.text.encode()) for item in (*turn.input, *turn.output))
    if resumes:
        suspensions.keep(db, key, turn)
        suspensions.release(db, session, now, idle_timeout_s=idle_timeout_s)
        return size, False
    has_frames = db.execute("SELECT 1 FROM events WHERE turn = ? LIMIT 1", (key,)).fetchone() is not None
    runs = None if has_frames else event_pages.runs_in_pages(db, key)
    terms = terms_at_once(turn) if size <= searched_bytes_max else None
    keep_end(db, key, turn, now, runs=runs, session=session, idle_timeout_s=idle_timeout_s, terms=terms)
    return size, True


def items_kept_of(db: apsw.Connection, turn: int) -> list[Item]:
    """The items that the checkpoints of an open turn have kept, without their texts."""
    outputs = db.execute("SELECT items FROM outputs WHERE turn = ? ORDER BY after", (turn,))
    return [item for (json,) in outputs for item in items_of(json)]


def _drop_staged(db: apsw.Connection, turn: int) -> None:
    """Remove the events of a checkpoint or an end whose last step never came."""
    mark: Row | None = db.execute(
        "SELECT key, after FROM outputs WHERE turn = ? AND items LIKE ?", (turn, f"{STAGED_MARK} %")
    ).fetchone()
    if mark is not None:
        key, after = mark
        db.execute("DELETE FROM events WHERE turn = ? AND after >= ?", (turn, after))
        db.execute("DELETE FROM event_pages WHERE turn = ? AND after >= ?", (turn, after))
        db.execute("DELETE FROM outputs WHERE key = ?", (key,))
