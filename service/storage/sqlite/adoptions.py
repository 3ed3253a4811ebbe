"""The adoption of a session's suspended turns, in one step within a transaction."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

import apsw

from service.storage import rules
from service.storage.pieces import last_seq
from service.storage.records import AdoptedTurn, TurnRecord
from service.storage.rules import NOBODY
from service.storage.sqlite import event_pages, recovery, sessions, suspensions
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.rows import TURN_COLUMNS, Row, turn_of

# ``+`` makes SQLite search by owner: the open turns of one are few.
_OPEN = (
    f"SELECT {TURN_COLUMNS}, key, owner FROM edited_turns "
    f"WHERE owner IN ({NOBODY}, :fence) AND +session = :session ORDER BY ordinal"
)
_OWN = "UPDATE sessions SET owner = ? WHERE key = ?"


def adopt(
    db: apsw.Connection,
    session_id: str,
    owners: Ownership,
    now: datetime,
    *,
    continues: Callable[[TurnRecord], bool],
    running: Collection[str],
) -> Sequence[AdoptedTurn]:
    kept = sessions.find(db, session_id)
    if kept is None or kept.is_deleted or not kept.record.open_turns:
        return []
    sessions.settle(db, kept, owners, now)
    adopted: list[AdoptedTurn] = []
    rows: list[Row] = db.execute(_OPEN, {"fence": owners.fence, "session": kept.key}).fetchall()
    for *columns, key, owner in rows:
        if owner == NOBODY:
            turn = event_pages.record_of(db, session_id, tuple(columns))
            adopted.append(_take(db, key, turn, owners.fence, continues))
        else:
            turn, _ = turn_of(session_id, tuple(columns))
            if turn.id not in running and turn.on_interrupt != "fail":
                runs = event_pages.runs_in_pages(db, key)
                items, growth = recovery.items_kept_of(db, key), event_pages.growth_of(db, key)
                adopted.append(rules.as_adopted(turn, runs, items, growth))
    if any(owner == NOBODY for *_, owner in rows):
        db.execute(_OWN, (owners.fence, kept.key))
    return adopted


def _take(
    db: apsw.Connection, key: int, turn: TurnRecord, fence: int, continues: Callable[[TurnRecord], bool]
) -> AdoptedTurn:
    """Become the owner of the turn of this key, and begin another attempt if it was running."""
    runs = event_pages.runs_in_pages(db, key)
    adopted = rules.resumed(turn, runs, continues=continues(turn))
    suspensions.take(db, key, adopted.turn, fence)
    if adopted.runs != tuple(runs):
        if not adopted.turn.output:
            db.execute("DELETE FROM outputs WHERE turn = ?", (key,))
            event_pages.keep(db, key, adopted.runs, "", after=0)
        else:
            event_pages.keep(db, key, adopted.runs[-1:], "", after=last_seq(runs))
    return adopted
