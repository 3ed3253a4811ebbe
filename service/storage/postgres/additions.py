"""Turns that are complete at once."""

from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.postgres import documents, event_pages, idempotency, sessions
from service.storage.postgres.connections import Db, Me
from service.storage.postgres.rows import moment
from service.storage.postgres.sessions import StoredSession
from service.storage.postgres.turn_rows import parts, values_of
from service.storage.postgres.turns import Place, to_follow
from service.storage.records import IdempotencyKey, SessionRecord, TurnRecord

_TYPES = {
    "key": "bigint",
    "ordinal": "int",
    "id": "text",
    "parent": "text",
    "chain": "bigint",
    "depth": "int",
    "chain_parent": "bigint",
    "place": "int",
    "state": "text",
    "created_at": "bigint",
    "started_at": "bigint",
    "ended_at": "bigint",
    "last_seq": "bigint",
    "message_bytes": "bigint",
    "message_items": "int",
    "messages": "int",
    "text_bytes": "bigint",
    "ephemeral": "boolean",
    "events_deleted": "boolean",
    "settings": "bytea",
    "options": "bytea",
    "input": "bytea",
    "output": "bytea",
    "runs": "bytea",
}
_KEYS = "SELECT array_agg(nextval('{s}.turns_key_seq')) FROM generate_series(1, %s)"
_INSERT = (
    f"INSERT INTO {{s}}.turns (session, {', '.join(_TYPES)}) OVERRIDING SYSTEM VALUE SELECT %(session)s, * "
    f"FROM unnest({', '.join(f'%({name})s::{kind}[]' for name, kind in _TYPES.items())})"
)
_USE = (
    "UPDATE {s}.sessions SET head = %s, turns = %s, message_count = %s, last_accessed_at = %s, expires_at = %s "
    "WHERE key = %s"
)


def add(
    db: Db,
    added: Sequence[TurnRecord],
    me: Me,
    now: datetime,
    *,
    terms: Sequence[Collection[str]],
    head: str | None | msgspec.UnsetType,
    key: IdempotencyKey | None,
) -> SessionRecord:
    """Add turns, as :meth:`~service.storage.store.Store.add_turns` says; ``terms`` are those of each."""
    idempotency.check(db, key, now)
    kept, place, _ = to_follow(db, added[0], me, now, head=head, branches=True, instead=rules.INSTEAD_OF_ADDING)
    session = rules.with_added(kept.record, added, now)
    _insert(db, kept, place, added, terms)
    db.execute(
        _USE,
        (
            session.head,
            kept.turns + len(added),
            session.message_count,
            moment(session.last_accessed_at),
            moment(session.expires_at),
            kept.key,
        ),
    )
    idempotency.keep(
        db, key, session=kept.key, session_id=session.id, turn=added[-1].id, first_turn=added[0].id, now=now
    )
    return session


def create(
    db: Db,
    session: SessionRecord,
    added: Sequence[TurnRecord],
    now: datetime,
    *,
    terms: Sequence[Collection[str]],
    key: IdempotencyKey | None,
) -> None:
    """Add a session with turns, as :meth:`~service.storage.store.Store.create_session` says; ``terms`` of each turn."""
    idempotency.check(db, key, now)
    sessions.make_room(db, session.id, now)
    created = StoredSession(session, key=sessions.insert(db, session, turns=len(added)))
    _insert(db, created, Place(), added, terms)
    idempotency.keep(db, key, session=created.key, session_id=session.id, now=now)


def _insert(
    db: Db, kept: StoredSession, place: Place, added: Sequence[TurnRecord], terms: Sequence[Collection[str]]
) -> None:
    """Insert turns, each of which follows the one before. ``place``: of the first one."""
    keys: list[int] = db.execute(_KEYS, (len(added),)).fetchone()[0]  # type: ignore[index]
    for some in parts(added):
        rows = [_values(added[n], kept, place, keys, n) for n in range(some.start, some.stop)]
        columns = {name: [row[name] for row in rows] for name in _TYPES}
        db.execute(_INSERT, columns | {"session": kept.key})
        for turn, turn_key in zip(added[some], keys[some], strict=True):
            runs = rules.events_at_once(turn.output)
            if not event_pages.fits_in_turn(turn, runs):
                event_pages.add(db, turn_key, turn, runs)
        documents.add_turns(db, kept.key, keys[some], terms[some])


def _values(turn: TurnRecord, kept: StoredSession, place: Place, keys: Sequence[int], number: int) -> dict[str, object]:
    """The columns of one of the turns, by name. Each but the first one is the only child of the one before it.

    Args:
        place: The place of the first one.
        keys: The keys of all.
    """
    return (
        values_of(turn)
        | event_pages.values_of_events(turn, rules.events_at_once(turn.output))
        | {
            "key": keys[number],
            "ordinal": kept.turns + number,
            "chain": keys[0] if place.chain is None else place.chain,
            "depth": place.depth + number,
            "chain_parent": place.chain_parent,
            "place": 1 if number else place.number,
        }
    )
