"""Turns that are complete at once."""

from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.moments import moment
from service.storage.pieces import Run
from service.storage.postgres import documents, event_pages, idempotency, sessions
from service.storage.postgres.connections import Db, Me
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
    "owner": "bigint",
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
    with idempotency.checked(db, key, now):
        kept, place, _ = to_follow(db, added[0], me, now, head=head, branches=True, instead=rules.INSTEAD_OF_ADDING)
        session = rules.with_added(kept.record, added, now)
        _insert_chain(db, kept.key, added, place, first=kept.turns, terms=terms)
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
    with idempotency.checked(db, key, now):
        sessions.make_room(db, session.id, now)
        created = sessions.insert(db, session, turns=len(added))
        _insert_chain(db, created, added, Place(), first=0, terms=terms)
        idempotency.keep(db, key, session=created, session_id=session.id, now=now)


def _insert_chain(
    db: Db,
    session: int,
    turns: Sequence[TurnRecord],
    place: Place,
    *,
    first: int,
    terms: Sequence[Collection[str]],
) -> None:
    """Insert turns of a session, each of which follows the one before it, and is its only child.

    Args:
        place: The place of the first one.
        first: Its ordinal.
        terms: Those of each.
    """
    keys = new_keys(db, len(turns))
    chain = keys[0] if place.chain is None else place.chain
    further = (Place(chain, place.depth + n, place.chain_parent) for n in range(1, len(turns)))
    runs = [rules.events_at_once(turn.output) for turn in turns]
    insert(db, session, turns, runs, keys=keys, places=[place, *further], first=first)
    for some in parts(turns):
        documents.add_turns(db, session, keys[some], terms[some])


def new_keys(db: Db, count: int) -> list[int]:
    """The keys of turns that will be added."""
    keys: list[int] | None = db.execute(_KEYS, (count,)).fetchone()[0]  # type: ignore[index]
    return keys or []


def insert(
    db: Db,
    session: int,
    turns: Sequence[TurnRecord],
    runs: Sequence[Sequence[Run]],
    *,
    keys: Sequence[int],
    places: Sequence[Place],
    first: int,
) -> None:
    """Insert ended turns of a session, each with its events, its key and its place, but not as documents. Open ones are
    suspended.

    Args:
        first: The ordinal of the first one.
    """
    for some in parts(turns):
        rows = [
            values_of(turns[n])
            | _values_of_state(turns[n], runs[n])
            | {"key": keys[n], "ordinal": first + n}
            | places[n].values
            | {"chain": keys[n] if places[n].chain is None else places[n].chain}
            for n in range(some.start, some.stop)
        ]
        db.execute(_INSERT, {name: [row[name] for row in rows] for name in _TYPES} | {"session": session})
        for row, n in zip(rows, range(some.start, some.stop), strict=True):
            if row["runs"] is None:
                event_pages.add(db, [(keys[n], turns[n], runs[n])])


def _values_of_state(turn: TurnRecord, runs: Sequence[Run]) -> dict[str, object]:
    if turn.is_open:
        return event_pages.values_in_pages(turn, runs) | {"owner": rules.NOBODY}
    return event_pages.values_of_events(turn, runs) | {"owner": None}
