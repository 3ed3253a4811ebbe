"""A session of a PostgreSQL store is exported and imported, beside services that use the store."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import psycopg

from service.errors import RefusedError, SessionNotFoundError, StartupError
from service.storage.pieces import Run
from service.storage.postgres import additions, documents, schema, sessions
from service.storage.postgres.connections import Connection, Db
from service.storage.postgres.turn_rows import parts
from service.storage.postgres.whole_store import connected, places_of, turns_of
from service.storage.records import SessionRecord, TurnRecord
from service.storage.search import terms_at_once


def export_session(
    url: str, session_id: str, *, schema_name: str
) -> tuple[SessionRecord, list[tuple[TurnRecord, list[Run]]]]:
    """A session with its turns and their events, as of one moment.

    Raises:
        StartupError: The database cannot be used, or has no store of this version.
        SessionNotFoundError: The session does not exist. (An expired session exists until its rows are removed.)
    """
    with _opened(url, schema_name, makes=False) as (connection, db), connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        kept = sessions.find(db, session_id)
        if kept is None or kept.is_deleted or kept.record.ephemeral:
            raise SessionNotFoundError(session_id)
        return kept.record, [(it.record, list(it.runs)) for it in turns_of(db, session_id, kept.key)]


def import_session(
    url: str,
    session: SessionRecord,
    ended: Sequence[tuple[TurnRecord, Sequence[Run]]],
    *,
    schema_name: str,
    now: datetime,
) -> None:
    """Add an exported session under its own id, in one transaction. An expired session of this id is replaced.

    Makes the tables if there are none.

    Args:
        ended: The turns, all of which have ended, with their events.

    Raises:
        StartupError: The database cannot be used.
        SessionExistsError
        RefusedError: Another session has a turn of this one.
    """
    records = [turn for turn, _ in ended]
    terms = [terms_at_once(turn) for turn in records]
    with _opened(url, schema_name, makes=True) as (connection, db), connection.transaction():
        sessions.make_room(db, session.id, now)
        key = sessions.insert(db, session, turns=len(ended))
        if not ended:
            return
        keys = additions.new_keys(db, len(ended))
        runs = [runs for _, runs in ended]
        additions.insert(db, key, records, runs, keys=keys, places=places_of(records, keys), first=0)
        for some in parts(records):
            documents.add_turns(db, key, keys[some], terms[some])


@contextmanager
def _opened(url: str, schema_name: str, *, makes: bool) -> Iterator[tuple[Connection, Db]]:
    with connected(url, schema_name=schema_name, makes=makes) as (name, connection):
        if not makes and not schema.is_up(connection, schema_name):
            raise StartupError(f"{name} was written by an older version; run lastcall migrate, or start the service.")
        schema.prepare(connection, schema_name, place=name)
        db = Db(connection, schema_name)
        db.begin(None)
        try:
            yield connection, db
        except psycopg.errors.UniqueViolation:
            raise RefusedError(
                f"A turn of this session is in {name} already, in another session; delete that one first."
            ) from None
