"""A PostgreSQL store as a whole, for a copy while no service uses it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import psycopg

from service.errors import StartupError
from service.storage.pieces import unpack
from service.storage.postgres import (
    additions,
    documents,
    event_pages,
    recovery,
    removals,
    schema,
    sessions,
    suspensions,
)
from service.storage.postgres.connections import Connection, Db, connect_first, name_of_store
from service.storage.postgres.faults import startup_error
from service.storage.postgres.owners import BEAT_S, LEASE_S, Observer, Ownership
from service.storage.postgres.rows import SESSION_COLUMNS, SESSION_WIDTH, session_of
from service.storage.postgres.turn_rows import COLUMNS, TURN_COLUMNS
from service.storage.postgres.turns import Place
from service.storage.records import TurnRecord
from service.storage.search import searched_texts
from service.storage.whole_store import WholeKey, WholeSession, WholeTurn, kept_runs, told_runs

_OTHERS = "SELECT count(*) FROM {s}.owners WHERE NOT dead AND fence <> %s"
_IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM {s}.sessions) AND NOT EXISTS (SELECT FROM {s}.idempotency_keys)"
_AT_ONCE = 200
_SESSIONS = (
    f"SELECT {SESSION_COLUMNS}, (SELECT documents.key FROM {{s}}.documents "
    "WHERE documents.session = sessions.key AND turn IS NULL) FROM {s}.sessions "
    "WHERE deletion IS NULL AND NOT ephemeral AND id > %(after)s ORDER BY id LIMIT %(limit)s"
)
_TURNS = (
    f"SELECT {TURN_COLUMNS}, t.ordinal, t.key, t.runs, documents.key FROM {{s}}.turns AS t "
    "LEFT JOIN {s}.documents ON documents.turn = t.key "
    "WHERE t.session = %(session)s AND t.ordinal > %(after)s ORDER BY t.ordinal LIMIT %(limit)s"
)
_KEYS = (
    "SELECT caller, k.key, fingerprint, session_id, s.key IS NOT NULL, turn, first_turn, gone_at "
    "FROM {s}.idempotency_keys AS k LEFT JOIN {s}.sessions AS s ON s.key = k.session AND deletion IS NULL "
    "AND NOT ephemeral WHERE (caller, k.key) > (%(caller)s, %(key)s) ORDER BY caller, k.key LIMIT %(limit)s"
)
_ADD_KEY = (
    "INSERT INTO {s}.idempotency_keys (caller, key, fingerprint, session, session_id, turn, first_turn, gone_at) "
    "VALUES (%s, %s, %s, CASE WHEN %s THEN (SELECT key FROM {s}.sessions WHERE id = %s) END, %s, %s, %s, %s)"
)


@contextmanager
def open_whole_store(url: str, *, schema_name: str, now: datetime, makes: bool) -> Iterator["WholePostgresStore"]:
    """Open the store in a schema. Turns of processes that are gone are recovered.

    Args:
        makes: Whether the tables are made if there are none.

    Raises:
        StartupError: The database cannot be used, or another process uses the store.
    """
    with connected(url, schema_name=schema_name, makes=makes) as (name, connection):
        ownership = Ownership()
        schema.prepare(connection, schema_name, place=name)
        store = WholePostgresStore(name, connection, Db(connection, schema_name))
        store.become_owner(ownership, now)
        try:
            yield store
        finally:
            if not connection.closed:
                ownership.leave(store.db)


def bring_up(url: str, *, schema_name: str) -> tuple[str, int, int]:
    """Bring the tables of a store up, and make them if there are none.

    Returns:
        The name of the store, and the version of its tables before and now.

    Raises:
        StartupError: The database cannot be used, or its tables are of a version that this code does not know.
    """
    with connected(url, schema_name=schema_name, makes=True) as (name, connection):
        prepared = schema.prepare(connection, schema_name, place=name)
    return name, prepared.before, prepared.version


@contextmanager
def connected(url: str, *, schema_name: str, makes: bool) -> Iterator[tuple[str, Connection]]:
    """Connect for a command of an operator. Gives the name of the store, too.

    Args:
        makes: Whether the command makes the tables if there are none.

    Raises:
        StartupError: The database cannot be used, or has no store.
    """
    name = name_of_store(url, schema_name)
    connection = connect_first(url, place=name)
    try:
        if not makes and not schema.has_tables(connection, schema_name):
            raise StartupError(f"There is no store in {name}.")
        yield name, connection
    except psycopg.Error as error:
        raise startup_error(name, error) from None
    finally:
        connection.close()


class WholePostgresStore:
    """Meets :class:`service.storage.whole_store.WholeStore`. Made by :func:`open_whole_store`."""

    def __init__(self, name: str, connection: Connection, db: Db) -> None:
        self.name = name
        self.db = db
        self._connection = connection
        db.begin(None)

    def become_owner(self, ownership: Ownership, now: datetime) -> None:
        """Raises: StartupError: Another process uses the store."""
        with self._connection.transaction():
            ownership.begin(self.db, address=None, opened_at=time.time_ns() // 1000)
        # A process that was killed counts as gone once its beats stood still for a whole lease.
        observer = Observer(ownership, time.monotonic)
        deadline = time.monotonic() + LEASE_S + 3 * BEAT_S
        while others := self._others(ownership):
            if time.monotonic() >= deadline:
                ownership.leave(self.db)
                raise StartupError(f"{self.name} is used by {others} process(es); stop the service first.")
            observer.run_once(self.db)
            time.sleep(BEAT_S)
        place: recovery.Place | None = recovery.Place()
        while place is not None:
            with self._connection.transaction():
                _, place = recovery.recover_some(self.db, now, place)
        is_left = True
        while is_left:
            with self._connection.transaction():
                is_left = removals.remove_some(self.db)

    def _others(self, ownership: Ownership) -> int:
        others: int = self.db.execute(_OTHERS, (ownership.me.fence,)).fetchone()[0]  # type: ignore[index]
        return others

    # Reading

    def is_empty(self) -> bool:
        return bool(self.db.execute(_IS_EMPTY).fetchone()[0])  # type: ignore[index]

    def all_sessions(self) -> Iterator[WholeSession]:
        after = ""
        while rows := self.db.execute(_SESSIONS, {"after": after, "limit": _AT_ONCE}).fetchall():
            for row in rows:
                record = session_of(row)
                yield WholeSession(record, row[SESSION_WIDTH], tuple(turns_of(self.db, record.id, row[0])))
                after = record.id

    def all_keys(self) -> Iterator[WholeKey]:
        last: dict[str, object] = {"caller": "", "key": ""}
        while rows := self.db.execute(_KEYS, last | {"limit": _AT_ONCE}).fetchall():
            yield from (WholeKey(*row) for row in rows)
            last = {"caller": rows[-1][0], "key": rows[-1][1]}

    # Writing

    def add_session(self, session: WholeSession) -> None:
        with self._connection.transaction():
            key = sessions.insert(self.db, session.record, turns=len(session.turns), indexes_title=False)
            keys = self._add_turns(key, session.turns) if session.turns else []
            found: list[tuple[int, int | None, Iterable[str]]] = [
                (turn.document, turn_key, searched_texts(turn.record))
                for turn, turn_key in zip(session.turns, keys, strict=True)
                if turn.document is not None
            ]
            if session.document is not None and session.record.title is not None:
                found.append((session.document, None, (session.record.title,)))
            documents.restore(self.db, key, found)
            suspensions.note(self.db, key, open_turns=session.record.open_turns)

    def _add_turns(self, session: int, turns: Sequence[WholeTurn]) -> list[int]:
        """Returns the keys of the turns."""
        records = [turn.record for turn in turns]
        keys = additions.new_keys(self.db, len(turns))
        runs = [kept_runs(turn) for turn in turns]
        additions.insert(self.db, session, records, runs, keys=keys, places=places_of(records, keys), first=0)
        return keys

    def add_key(self, key: WholeKey) -> None:
        values = (key.exists, key.session_id, key.session_id, key.turn, key.first_turn, key.gone_at)
        self.db.execute(_ADD_KEY, (key.caller, key.key, key.fingerprint, *values))

    def finish(self) -> None:
        documents.go_on_after_restored(self.db)


def turns_of(db: Db, session_id: str, session: int) -> Iterator[WholeTurn]:
    """The turns of a session with their events, as far as they have ended; ``session`` is its key."""
    after = -1
    while rows := db.execute(_TURNS, {"session": session, "after": after, "limit": _AT_ONCE}).fetchall():
        records = event_pages.records_of(db, session_id, [row[: COLUMNS + 1] for row in rows])
        for turn, (*_, key, packed, document) in zip(records, rows, strict=True):
            runs = event_pages.runs_of(db, key) if packed is None else unpack(packed)
            yield WholeTurn(turn, told_runs(turn, runs), document)
        after = rows[-1][COLUMNS + 1]


def places_of(turns: Sequence[TurnRecord], keys: Sequence[int]) -> list[Place]:
    """The places of all turns of a session in its tree."""
    key_of = {turn.id: key for turn, key in zip(turns, keys, strict=True)}
    place_of: dict[str | None, Place] = {}
    children: dict[str | None, int] = {}
    places: list[Place] = []
    for turn, key in zip(turns, keys, strict=True):
        number = children[turn.parent] = children.get(turn.parent, 0) + 1
        if turn.parent is None:
            place = Place(key, number=number)
        else:
            before = place_of[turn.parent]
            if number == 1:
                place = Place(before.chain, before.depth + 1, before.chain_parent)
            else:
                place = Place(key, before.depth + 1, key_of[turn.parent], number)
        place_of[turn.id] = place
        places.append(place)
    return places
