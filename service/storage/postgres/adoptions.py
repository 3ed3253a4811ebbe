"""The adoption of a session's suspended turns."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.pieces import text_of
from service.storage.postgres import event_pages, segments, sessions
from service.storage.postgres.connections import Cursor, Db, Me
from service.storage.postgres.segments import SEGMENT
from service.storage.postgres.turn_rows import TURN_COLUMNS, turn_of, values_of
from service.storage.records import AdoptedTurn, Checkpoint, TurnRecord
from service.storage.rules import NOBODY

_OPEN = (
    f"SELECT t.key, t.owner, t.segment, {TURN_COLUMNS} FROM {{s}}.turns AS t "
    "WHERE t.session = (SELECT key FROM {s}.sessions WHERE id = %(session)s) "
    f"AND t.owner IN ({NOBODY}, %(owner)s) ORDER BY t.ordinal"
)
_TAKE = (
    f"UPDATE {{s}}.turns SET owner = %(owner)s, segment = {SEGMENT}, last_seq = %(last_seq)s, "
    "message_items = %(message_items)s, message_bytes = %(message_bytes)s, text_bytes = %(text_bytes)s, "
    "settings = %(settings)s, options = %(options)s, output = %(output)s WHERE key = %(key)s"
)
_OWN = "UPDATE {s}.sessions SET owner = %s WHERE key = %s"


def adopt(
    db: Db,
    session_id: str,
    me: Me,
    now: datetime,
    *,
    continues: Callable[[TurnRecord], bool],
    running: Collection[str],
) -> Sequence[AdoptedTurn]:
    """As :meth:`~service.storage.store.Store.adopt_turns` says.

    After a stop many sessions come at once, each with a step of its own. So a step reads in one go, and writes in one.
    """
    with db.pipeline():
        locked = sessions.send_lock(db, session_id)
        sent = _send(db, session_id, me)
    kept = sessions.stored_of(locked)
    if kept is None or kept.is_deleted or not kept.record.open_turns:
        return []
    if sessions.settle(db, kept, me, now):
        with db.pipeline():
            sent = _send(db, session_id, me)
    found, pages = sent[0].fetchall(), event_pages.suspended_of(sent[1])
    adopted: list[AdoptedTurn] = []
    taken: dict[int, AdoptedTurn] = {}
    for key, owner, segment, *columns in found:
        turn, _ = turn_of(session_id, tuple(columns))
        if owner == NOBODY:
            waits = pages.get(key, event_pages.Kept())
            turn = waits.told_of(turn)
            taken[key] = rules.resumed(turn, waits.runs, continues=continues(turn))
            adopted.append(taken[key])
        elif turn.id not in running and turn.on_interrupt != "fail":
            grown = segments.grown_of(db, owner, [key], segment=segment)[key]
            adopted.append(rules.as_adopted(grown.told_of(turn), grown.runs, grown.items, grown.texts))
    if taken:
        _take(db, kept.key, taken, me)
    return adopted


def _send(db: Db, session_id: str, me: Me) -> tuple[Cursor, Cursor]:
    """Ask for the open turns of a session, and for what is kept of those that are suspended."""
    return (
        db.execute(_OPEN, {"session": session_id, "owner": me.fence}),
        event_pages.send_suspended(db, session_id),
    )


def _take(db: Db, session: int, adopted: dict[int, AdoptedTurn], me: Me) -> None:
    """Become the owner of turns, by their keys. What was kept of them goes into a segment of this owner."""
    with db.pipeline():
        for key, it in adopted.items():
            begun = msgspec.structs.replace(it.turn, output=())
            values = values_of(begun) | event_pages.values_of_events(begun, None)
            db.execute(_TAKE, values | {"key": key, "owner": me.fence})
        db.execute(_OWN, (me.fence, session))
        event_pages.drop(db, list(adopted))
        segments.keep(db, [_checkpoint(it) for it in adopted.values() if it.runs], me)


def _checkpoint(adopted: AdoptedTurn) -> Checkpoint:
    turn = adopted.turn
    return Checkpoint(
        session_id=turn.session_id,
        turn_id=turn.id,
        after=0,
        runs=adopted.runs,
        text=text_of(adopted.runs, [item.text for item in turn.output]),
        items=rules.without_texts(turn.output),
    )
