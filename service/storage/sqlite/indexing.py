"""Puts the rows of earlier versions into the indexes, in short steps between other writes.

The table ``unindexed`` says how far this is. A step and its progress are one transaction, so a process that dies loses
nothing: the next one goes on. Rows that change meanwhile are indexed by their change.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import apsw
import structlog

from service.steps import Steps, at_once
from service.storage.search import searched_texts
from service.storage.sqlite import documents, event_pages, metadata, sessions
from service.storage.sqlite.rows import TURN_COLUMNS, Row
from service.storage.terms import document_terms

logger = structlog.get_logger("lastcall.store")

STEP_S = 0.01
"""The approximate time of one step: it ends after the row in which this time is over."""
LONG_BYTES = 64 * 1024
"""The terms of a longer turn are cut in steps of their own, outside of a transaction."""

_NEXT_SESSION = "SELECT key, deletion FROM sessions WHERE key <= ? ORDER BY key DESC LIMIT 1"
_NEXT_TURN = (
    "SELECT key, owner, octet_length(input) + octet_length(output) + coalesce(output_bytes, 0) FROM turns "
    "WHERE key <= ? ORDER BY key DESC LIMIT 1"
)
_GET_TURN = f"SELECT {TURN_COLUMNS} FROM turns WHERE key = ?"

Transact = Callable[[Callable[[apsw.Connection], Any]], Any]


class Indexing:
    """The work of one process. Sessions come first, then turns, the newest ones first.

    Attributes:
        steps: How many steps it has done.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._long: tuple[int, Steps[set[str]]] | None = None
        """The key of a long turn, and the cutting of its terms."""

    def is_done(self, db: apsw.Connection) -> bool:
        return db.execute("SELECT 1 FROM unindexed LIMIT 1").fetchone() is None

    def run_step(self, transact: Transact) -> None:
        """Do one step. ``transact`` runs a part of it in a transaction."""
        self.steps += 1
        if self._long is None:
            transact(self._index_some)
            return
        key, steps = self._long
        deadline = time.monotonic() + STEP_S
        try:
            next(steps)
            while time.monotonic() < deadline:
                next(steps)
        except StopIteration as done:
            transact(partial(_index_turn, turn=key, terms=done.value))
            self._long = None

    def _index_some(self, db: apsw.Connection) -> None:
        deadline = time.monotonic() + STEP_S
        left: dict[str, int] = dict(db.execute("SELECT kind, key FROM unindexed").fetchall())  # type: ignore[arg-type]
        if "sessions" in left:
            _note(db, "sessions", _index_sessions(db, left["sessions"], deadline))
        elif "turns" in left:
            _note(db, "turns", self._index_turns(db, left["turns"], deadline))

    def _index_turns(self, db: apsw.Connection, key: int, deadline: float) -> int | None:
        """Index turns from this key on. Returns the key that is next; None at the end."""
        while (row := db.execute(_NEXT_TURN, (key,)).fetchone()) is not None:
            turn, owner, size = row
            if owner is None and not documents.has_turn(db, turn):  # an open turn is indexed by its end
                texts = _texts_of(db, turn)
                if size > LONG_BYTES:
                    self._long = turn, document_terms(texts)
                    return int(turn)
                _index_turn(db, turn, at_once(document_terms(texts)))
            key = int(turn) - 1
            if time.monotonic() >= deadline:
                return key
        return None


def _index_sessions(db: apsw.Connection, key: int, deadline: float) -> int | None:
    """Index sessions from this key on. Returns the key that is next; None at the end."""
    while (row := db.execute(_NEXT_SESSION, (key,)).fetchone()) is not None:
        session, deletion = row
        if deletion == 0:
            _index_session(db, session)
        key = int(session) - 1
        if time.monotonic() >= deadline:
            return key
    return None


def _index_session(db: apsw.Connection, session: int) -> None:
    try:
        record = sessions.by_key(db, session)
    except (ValueError, LookupError) as error:
        logger.warning("a session cannot be searched: its row is damaged", session=session, error=str(error))
        return
    metadata.delete(db, session)
    metadata.insert(db, session, record)
    if record.title is not None and not documents.has_title(db, session):
        documents.add_old_title(db, session, record.title)


def _index_turn(db: apsw.Connection, turn: int, terms: Iterable[str]) -> None:
    """Index an ended turn, unless it was indexed meanwhile or its rows are gone."""
    session: int | None = db.execute("SELECT session FROM turns WHERE key = ?", (turn,)).get
    if session is not None and not documents.has_turn(db, turn):
        documents.add_old_turn(db, turn, session, terms)


def _texts_of(db: apsw.Connection, turn: int) -> Sequence[str]:
    """The texts of a turn. None of a damaged row, which must not stop the writer; `lastcall check` tells damage."""
    row: Row = db.execute(_GET_TURN, (turn,)).fetchone()  # type: ignore[assignment]
    try:
        return tuple(searched_texts(event_pages.record_of(db, "", row)))
    except (ValueError, LookupError) as error:
        logger.warning("a turn cannot be searched: its row is damaged", turn_id=row[0], error=str(error))
        return ()


def _note(db: apsw.Connection, kind: str, key: int | None) -> None:
    if key is None:
        db.execute("DELETE FROM unindexed WHERE kind = ?", (kind,))
    else:
        db.execute("UPDATE unindexed SET key = ? WHERE kind = ?", (key, kind))
