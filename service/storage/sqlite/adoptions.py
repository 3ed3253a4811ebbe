"""The adoption of suspended turns, in one step within a transaction."""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime

import apsw

from service.errors import OwnedElsewhereError
from service.storage import rules
from service.storage.pieces import last_seq
from service.storage.records import AdoptedTurn, Adoption, Owner, TurnRecord
from service.storage.rules import NOBODY
from service.storage.sqlite import event_pages, recovery, sessions, suspensions
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.rows import TURN_COLUMNS, Row, turn_of

# ``+`` makes SQLite search by owner: the open turns of one are few.
_OPEN = (
    f"SELECT {TURN_COLUMNS}, key, owner FROM edited_turns "
    f"WHERE owner IN ({NOBODY}, :fence) AND +session = :session ORDER BY ordinal"
)
BYTES_MAX = 4 * 1024 * 1024
"""The texts of turns with which a step ends: others wait for it."""
_OWN = "UPDATE sessions SET owner = ? WHERE key = ?"


def adopt(
    db: apsw.Connection,
    session_ids: Sequence[str],
    owners: Ownership,
    now: datetime,
    *,
    continues: Callable[[TurnRecord], bool],
    running: Collection[str],
) -> Mapping[str, Adoption]:
    """As :meth:`~service.storage.store.Store.adopt_turns` says. Puts off what follows the session that passes the
    size."""
    done: dict[str, Adoption] = {}
    size = 0
    for session_id in session_ids:
        if size > BYTES_MAX:
            done[session_id] = Adoption(is_put_off=True)
            continue
        done[session_id] = it = _adopt(db, session_id, owners, now, continues=continues, running=running)
        size += sum(turn.turn.text_bytes for turn in it.turns)
    return done


def _adopt(
    db: apsw.Connection,
    session_id: str,
    owners: Ownership,
    now: datetime,
    *,
    continues: Callable[[TurnRecord], bool],
    running: Collection[str],
) -> Adoption:
    kept = sessions.find(db, session_id)
    if kept is None or kept.is_deleted:
        return Adoption()
    if not kept.record.open_turns:
        return Adoption(session=kept.record)
    try:
        sessions.settle(db, kept, owners, now)
    except OwnedElsewhereError as error:
        return Adoption(session=kept.record, owner=Owner(fence=error.fence, address=error.address))
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
    return Adoption(session=kept.record, turns=adopted)


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
