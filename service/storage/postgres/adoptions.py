"""The adoption of a session's suspended turns."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.pieces import last_seq, text_of
from service.storage.postgres import event_pages, segments, sessions
from service.storage.postgres.connections import Db, Me
from service.storage.postgres.owners import NOBODY
from service.storage.postgres.segments import SEGMENT
from service.storage.postgres.turn_rows import TURN_COLUMNS, turn_of, values_of
from service.storage.records import AdoptedTurn, Checkpoint, TurnRecord

_OPEN = (
    f"SELECT t.key, t.owner, t.segment, {TURN_COLUMNS} FROM {{s}}.turns AS t "
    f"WHERE t.session = %(session)s AND t.owner IN ({NOBODY}, %(owner)s) ORDER BY t.ordinal"
)
_FIELDS_BEFORE = 3
"""The columns of ``_OPEN`` before those of a turn."""
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
    """As :meth:`~service.storage.store.Store.adopt_turns` says."""
    kept = sessions.find(db, session_id, lock=True)
    if kept is None or kept.is_deleted or not kept.record.open_turns:
        return []
    sessions.settle(db, kept, me, now)
    adopted: list[AdoptedTurn] = []
    taken: dict[int, AdoptedTurn] = {}
    for key, owner, segment, *columns in db.execute(_OPEN, {"session": kept.key, "owner": me.fence}).fetchall():
        if owner == NOBODY:
            turn = event_pages.record_of(db, session_id, tuple(columns))
            taken[key] = rules.resumed(turn, event_pages.runs_of(db, key), continues=continues(turn))
            adopted.append(taken[key])
        elif columns[0] not in running:
            it = _taken(db, key, turn_of(session_id, tuple(columns))[0], owner=owner, segment=segment)
            if it.turn.on_interrupt != "fail":
                adopted.append(it)
    if taken:
        _take(db, kept.key, taken, me)
    return adopted


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


def _taken(db: Db, key: int, turn: TurnRecord, *, owner: int, segment: int) -> AdoptedTurn:
    """The turn of this key, which is this owner's already."""
    grown = segments.grown_of(db, owner, [key], segment=segment)[key]
    turn = grown.told_of(turn)
    output = rules.with_texts(rules.joined(grown.items), grown.texts)
    runs = tuple(grown.runs)
    return AdoptedTurn(turn=msgspec.structs.replace(turn, output=output, last_seq=last_seq(runs)), runs=runs)
