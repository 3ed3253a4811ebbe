"""The adoption of suspended turns."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.pieces import text_of
from service.storage.postgres import event_pages, owners, recovery, segments, sessions
from service.storage.postgres.connections import Cursor, Db, Me
from service.storage.postgres.paths import ShortPath
from service.storage.postgres.segments import SEGMENT
from service.storage.postgres.sessions import StoredSession
from service.storage.postgres.turn_rows import TURN_COLUMNS, turn_of, values_of
from service.storage.records import AdoptedTurn, Adoption, Checkpoint, TurnRecord
from service.storage.rules import NOBODY

BYTES_MAX = 4 * 1024 * 1024
"""The texts of turns that one step adopts; the step takes at least one session."""

# The sessions come in the order of their keys, and those whose turns have too much text with those before are not read.
_OPEN = (
    "SELECT t.* FROM (SELECT t.*, "
    "sum(t.text_bytes) OVER (ORDER BY t.session) AS total, min(t.session) OVER () AS first "
    "FROM {s}.turns AS t WHERE t.session = ANY(ARRAY(SELECT key FROM {s}.sessions WHERE id = ANY(%(ids)s))) "
    f"AND t.owner IN ({NOBODY}, %(owner)s)) AS t WHERE t.total <= {BYTES_MAX} OR t.session = t.first"
)
_READ = f"SELECT t.session, t.key, t.owner, t.segment, {TURN_COLUMNS} FROM ({_OPEN}) AS t ORDER BY t.session, t.ordinal"
_FIELDS_BEFORE = 4
"""The columns of ``_READ`` before those of a turn."""
_READ_PAGES = event_pages.PAGES_OF.replace("{keys}", f"SELECT t.key FROM ({_OPEN}) AS t WHERE t.owner = {NOBODY}")
_TYPES = {
    "key": "bigint",
    "last_seq": "bigint",
    "message_items": "int",
    "message_bytes": "bigint",
    "text_bytes": "bigint",
    "settings": "bytea",
    "options": "bytea",
    "output": "bytea",
}
_TAKE = (
    f"UPDATE {{s}}.turns SET owner = %(owner)s, segment = {SEGMENT}, "
    f"{', '.join(f'{name} = it.{name}' for name in _TYPES if name != 'key')} "
    f"FROM unnest({', '.join(f'%({name})s::{kind}[]' for name, kind in _TYPES.items())}) AS it ({', '.join(_TYPES)}) "
    "WHERE turns.key = it.key"
)
_OWN = "UPDATE {s}.sessions SET owner = %s WHERE key = ANY(%s)"


class _Taken(msgspec.Struct, frozen=True):
    """A suspended turn that becomes this owner's: its key, its session, and the turn as it goes on."""

    key: int
    session: StoredSession
    turn: AdoptedTurn


def adopt(
    db: Db,
    session_ids: Sequence[str],
    me: Me,
    now: datetime,
    *,
    continues: Callable[[TurnRecord], bool],
    running: Collection[str],
    path_bytes_max: Callable[[TurnRecord], int | None] | None,
) -> Mapping[str, Adoption]:
    """As :meth:`~service.storage.store.Store.adopt_turns` says.

    After a stop many sessions come at once. A step for all of them reads in one go, and writes in one: a thread that
    waits for the database waits for the busy event loop, too, each time it has an answer.
    """
    is_alone = len(session_ids) == 1
    with db.pipeline():
        locked = sessions.send_locks(db, session_ids, waits=is_alone)
        sent = _send(db, session_ids, me)
    found = {kept.record.id: kept for kept in sessions.all_stored_of(locked)}
    done = {it: Adoption() for it in session_ids if is_alone and it not in found}
    mine: dict[int, StoredSession] = {}
    other_owners = {it: rules.others_of(kept.owner, besides=me.fence) for it, kept in found.items()}
    living = owners.living(db, {it for it in other_owners.values() if it is not None})
    for session_id, kept in found.items():
        others = other_owners[session_id]
        if kept.is_deleted:
            done[session_id] = Adoption()
        elif not kept.record.open_turns:
            done[session_id] = Adoption(session=kept.record)
        elif others is None:
            mine[kept.key] = kept
        elif others in living:
            done[session_id] = Adoption(session=kept.record, owner=living[others])
        elif is_alone:
            recovery.recover_turns_of(db, others, now, session=kept.key)
            mine[kept.key] = kept
            with db.pipeline():
                sent = _send(db, session_ids, me)
    turns, taken = _turns_of(db, mine, sent, continues=continues, running=running)
    if taken:
        turns = _take(db, turns, taken, me, path_bytes_max)
    for key, kept in mine.items():
        if key in turns or is_alone:
            done[kept.record.id] = Adoption(session=kept.record, turns=turns.get(key, ()))
        else:  # its open turns are this owner's or nobody's, so they were not read
            done[kept.record.id] = Adoption(is_put_off=True)
    return done


def _send(db: Db, session_ids: Sequence[str], me: Me) -> tuple[Cursor, Cursor]:
    """Ask for the open turns of sessions, and for what is kept of those that are suspended."""
    values = {"ids": list(session_ids), "owner": me.fence}
    return db.execute(_READ, values), db.execute(_READ_PAGES, values)


def _turns_of(
    db: Db,
    mine: Mapping[int, StoredSession],
    sent: tuple[Cursor, Cursor],
    *,
    continues: Callable[[TurnRecord], bool],
    running: Collection[str],
) -> tuple[dict[int, list[AdoptedTurn]], list[_Taken]]:
    """The turns of these sessions, by the keys of both, that the caller does not know; and those to take."""
    pages = event_pages.kept_in(sent[1])
    turns: dict[int, list[AdoptedTurn]] = {}
    taken: list[_Taken] = []
    for session, key, owner, segment, *columns in sent[0]:
        kept = mine.get(session)
        if kept is None:
            continue
        adopted = turns.setdefault(session, [])
        turn, _ = turn_of(kept.record.id, tuple(columns))
        if owner == NOBODY:
            waits = pages.get(key, event_pages.Kept())
            turn = waits.told_of(turn)
            it = rules.resumed(turn, waits.runs, continues=continues(turn))
            taken.append(_Taken(key, kept, it))
            adopted.append(it)
        elif turn.id not in running and turn.on_interrupt != "fail":
            grown = segments.grown_of(db, owner, [key], segment=segment)[key]
            adopted.append(rules.as_adopted(grown.told_of(turn), grown.runs, grown.items, grown.texts))
    return turns, taken


def _take(
    db: Db,
    turns: Mapping[int, Sequence[AdoptedTurn]],
    taken: Sequence[_Taken],
    me: Me,
    path_bytes_max: Callable[[TurnRecord], int | None] | None,
) -> dict[int, list[AdoptedTurn]]:
    """Become the owner of turns. What was kept of them goes into a segment of this owner.

    Returns all of the turns, with the paths of those that were taken.
    """
    begun = {it.key: msgspec.structs.replace(it.turn.turn, output=()) for it in taken}
    rows = [values_of(turn) | event_pages.values_of_events(turn, None) | {"key": key} for key, turn in begun.items()]
    values: dict[str, object] = {name: [row[name] for row in rows] for name in _TYPES}
    paths: dict[str, tuple[ShortPath, int]] = {}
    with db.pipeline():
        db.execute(_TAKE, values | {"owner": me.fence})
        db.execute(_OWN, (me.fence, list({it.session.key for it in taken})))
        event_pages.drop(db, list(begun))
        checkpoints = [_checkpoint(it.turn) for it in taken if it.turn.runs]
        # Their results are not fetched: none of these turns can be another owner's.
        kept = segments.send(db, checkpoints, me)
        if path_bytes_max is not None:
            for it in taken:
                if it.turn.turn.state == "running":
                    turn = begun[it.key]
                    paths[turn.id] = ShortPath(db, turn, path_bytes_max(turn)), it.session.turns
    assert not segments.lost_of(kept)
    short = {turn_id: path.turns(turns_before=before) for turn_id, (path, before) in paths.items()}
    return {key: list(_with_paths(adopted, short)) for key, adopted in turns.items()}


def _with_paths(
    adopted: Iterable[AdoptedTurn], paths: Mapping[str, Sequence[TurnRecord] | None]
) -> Iterable[AdoptedTurn]:
    return (msgspec.structs.replace(it, path=paths.get(it.turn.id)) for it in adopted)


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
