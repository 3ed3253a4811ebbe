"""A SQLite store as a whole, for a copy while no service uses it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import apsw

from service.errors import StartupError
from service.storage.sqlite import (
    database,
    documents,
    event_pages,
    maintenance,
    recovery,
    sessions,
    suspensions,
    trees,
    turns,
)
from service.storage.sqlite.indexing import Indexing
from service.storage.sqlite.ownership import Ownership, any_alive
from service.storage.sqlite.rows import TURN_COLUMNS, Row
from service.storage.whole_store import WholeKey, WholeSession, WholeTurn, kept_runs, told_runs

_SESSIONS = "SELECT key, id FROM sessions WHERE deletion = 0 AND ephemeral = 0 ORDER BY id"
_TITLE = "SELECT key FROM documents WHERE session = ? AND turn IS NULL"
_TURNS = (
    f"SELECT {TURN_COLUMNS}, key, (SELECT documents.key FROM documents WHERE turn = shown_turns.key) FROM shown_turns "
    "WHERE session = ? ORDER BY ordinal"
)
_KEYS = (
    "SELECT caller, key, fingerprint, session_id, EXISTS (SELECT 1 FROM sessions WHERE sessions.key = session "
    "AND deletion = 0 AND ephemeral = 0), turn, first_turn, gone_at FROM idempotency_keys ORDER BY caller, key"
)
_IS_EMPTY = (
    "SELECT NOT EXISTS (SELECT 1 FROM sessions WHERE deletion <> 2) AND NOT EXISTS (SELECT 1 FROM idempotency_keys)"
)
_ADD_KEY = (
    "INSERT INTO idempotency_keys (caller, key, fingerprint, session, session_id, turn, first_turn, gone_at) "
    "VALUES (?, ?, ?, iif(?, (SELECT key FROM sessions WHERE id = ?), NULL), ?, ?, ?, ?)"
)


@contextmanager
def open_whole_store(path: Path, *, now: datetime, makes: bool) -> Iterator["WholeSqliteStore"]:
    """Open the store in a file. Turns of processes that are gone are recovered.

    Args:
        makes: Whether the file is made if there is none.

    Raises:
        StartupError: The file cannot be used, or another process uses the store.
    """
    if makes:
        maintenance.make_store(path)
    with maintenance.opened(path) as db:
        ownership = Ownership(path.with_name(f"{path.name}-owners"))
        try:
            ownership.open()
            with database.transaction(db):
                ownership.begin(db, address=None, opened_at=time.time_ns() // 1000)
            if any_alive(db, ownership):
                raise StartupError(f"{path} is used by another process; stop the service first.")
            store = WholeSqliteStore(path, db)
            store.end_open_turns(ownership, now)
            store.index_all()
            yield store
        except OSError as error:
            raise database.startup_error(path, error) from error
        finally:
            with database.transaction(db):
                db.execute("DELETE FROM owners WHERE fence = ?", (ownership.fence,))
            ownership.close()


class WholeSqliteStore:
    """Meets :class:`service.storage.whole_store.WholeStore`. Made by :func:`open_whole_store`."""

    def __init__(self, path: Path, db: apsw.Connection) -> None:
        self.name = f"sqlite:{path}"
        self._db = db

    def end_open_turns(self, ownership: Ownership, now: datetime) -> None:
        finished = False
        while not finished:
            with database.transaction(self._db):
                _, finished = recovery.recover_some(self._db, ownership, now)

    def index_all(self) -> None:
        """Give all documents their numbers and their terms."""
        work = Indexing()
        while not work.is_done(self._db):
            work.run_step(self._transact)

    def _transact(self, step: Any) -> Any:
        with database.transaction(self._db):
            return step(self._db)

    # Reading

    def is_empty(self) -> bool:
        return bool(self._db.execute(_IS_EMPTY).get)

    def all_sessions(self) -> Iterator[WholeSession]:
        found: list[Row] = self._db.execute(_SESSIONS).fetchall()
        for key, session_id in found:
            record = sessions.by_key(self._db, key)
            title: int | None = self._db.execute(_TITLE, (key,)).get
            yield WholeSession(record, title, tuple(map(partial(self._turn, session_id), self._rows(key))))

    def _rows(self, session: int) -> list[Row]:
        return self._db.execute(_TURNS, (session,)).fetchall()

    def _turn(self, session_id: str, row: Row) -> WholeTurn:
        turn = event_pages.record_of(self._db, session_id, row[:-2])
        key, document = row[-2:]
        if turn.is_open:
            runs = event_pages.runs_in_pages(self._db, key)
        else:
            runs = [] if turn.events_deleted else event_pages.runs_of(self._db, key)
        return WholeTurn(turn, told_runs(turn, runs), document)

    def all_keys(self) -> Iterator[WholeKey]:
        found: list[Row] = self._db.execute(_KEYS).fetchall()
        for caller, key, fingerprint, session_id, exists, *made in found:
            yield WholeKey(caller, key, fingerprint, session_id, bool(exists), *made)

    # Writing

    def add_session(self, session: WholeSession) -> None:
        with database.transaction(self._db):
            key = sessions.insert(self._db, session.record, turns_begun=len(session.turns))
            if session.document is not None and session.record.title is not None:
                documents.forget_title(self._db, key)
                documents.add_title(self._db, key, session.record.title, number=session.document)
            for ordinal, turn in enumerate(session.turns):
                trees.add_sibling(self._db, key, turn.record.parent, ordinal)
                if turn.record.is_open:
                    turns.insert_suspended(self._db, key, ordinal, turn.record, turn.runs)
                    continue
                turns.insert_ended(
                    self._db, key, ordinal, turn.record, kept_runs(turn), terms=None, document=turn.document
                )

            suspensions.note(self._db, key, open_turns=session.record.open_turns)

    def add_key(self, key: WholeKey) -> None:
        with database.transaction(self._db):
            values = (key.exists, key.session_id, key.session_id, key.turn, key.first_turn, key.gone_at)
            self._db.execute(_ADD_KEY, (key.caller, key.key, key.fingerprint, *values))

    def finish(self) -> None:
        self.index_all()
