"""Puts into the indexes what the steps of callers could not, in short steps between other writes.

These are the rows of earlier versions, and turns with too many terms for the step that ended them. The table
``unindexed`` says what is left. A step and its progress are one transaction, so a process that dies loses nothing:
another one goes on. Rows of earlier versions that change meanwhile are indexed by their change.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
LONG_BYTES = 16 * 1024
"""The terms of a longer turn are cut in steps of their own, outside of a transaction."""

_NEXT_SESSION = "SELECT key, deletion FROM sessions WHERE key <= ? ORDER BY key DESC LIMIT 1"
_NEXT_TURN = (
    "SELECT key, owner, octet_length(input) + octet_length(output) + coalesce(output_bytes, 0) FROM turns "
    "WHERE key <= ? ORDER BY key DESC LIMIT 1"
)
_NEXT_WAITING = (
    "SELECT unindexed.key, session, octet_length(input) + octet_length(output) + coalesce(output_bytes, 0) "
    "FROM unindexed JOIN turns ON turns.key = unindexed.key WHERE kind = 'turn' ORDER BY unindexed.key DESC LIMIT 1"
)
_GET_TURN = f"SELECT {TURN_COLUMNS} FROM edited_turns WHERE key = ?"
_VERSION = "SELECT turns.id, edits FROM turns JOIN sessions ON sessions.key = session WHERE turns.key = ?"

Transact = Callable[[Callable[[apsw.Connection], Any]], Any]


class _LongTurn(NamedTuple):
    """A turn whose terms are being cut, by its key."""

    key: int
    version: Row | None
    steps: Steps[set[str]]


class Indexing:
    """The work of one process. Turns that wait come first, then the sessions and the turns of earlier versions.

    The newest ones come first. Several processes may add the turns that wait; one of them adds the rows of earlier
    versions.

    Attributes:
        old_steps: How many steps it has done for earlier versions.
    """

    def __init__(self) -> None:
        self.old_steps = 0
        self._long: _LongTurn | None = None

    def is_done(self, db: apsw.Connection) -> bool:
        return db.execute("SELECT 1 FROM unindexed LIMIT 1").fetchone() is None

    def has_waiting(self, db: apsw.Connection) -> bool:
        """Whether the next step adds turns that wait."""
        return db.execute("SELECT 1 FROM unindexed WHERE kind = 'turn' LIMIT 1").fetchone() is not None

    def run_step(self, transact: Transact) -> None:
        """Do one step. ``transact`` runs a part of it in a transaction."""
        if self._long is None:
            transact(self._index_some)
            return
        long = self._long
        deadline = time.monotonic() + STEP_S
        try:
            next(long.steps)
            while time.monotonic() < deadline:
                next(long.steps)
        except StopIteration as done:
            transact(partial(_index_long, long=long, terms=done.value))
            self._long = None

    def _index_some(self, db: apsw.Connection) -> None:
        deadline = time.monotonic() + STEP_S
        if self.has_waiting(db):
            self._index_waiting(db, deadline)
        else:
            self.old_steps += 1
            self._index_old(db, deadline)

    def _index_waiting(self, db: apsw.Connection, deadline: float) -> None:
        while (row := db.execute(_NEXT_WAITING).fetchone()) is not None:
            turn, session, size = row
            texts = _texts_of(db, turn)
            if size > LONG_BYTES:
                self._long = _LongTurn(turn, _version(db, turn), document_terms(texts))
                return
            documents.add_waiting_turn(db, turn, session, at_once(document_terms(texts)))
            if time.monotonic() >= deadline:
                return
        db.execute("DELETE FROM unindexed WHERE kind = 'turn'")  # should a row have lost its turn

    def _index_old(self, db: apsw.Connection, deadline: float) -> None:
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
                    self._long = _LongTurn(turn, _version(db, turn), document_terms(texts))
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


def _index_long(db: apsw.Connection, long: _LongTurn, terms: Iterable[str]) -> None:
    """Index a long turn, unless this was done meanwhile, or its texts have changed or are gone."""
    if _version(db, long.key) != long.version:
        return
    if db.execute("SELECT 1 FROM unindexed WHERE kind = 'turn' AND key = ?", (long.key,)).fetchone() is not None:
        documents.add_waiting_turn(db, long.key, _session_of(db, long.key), terms)
    elif not documents.has_turn(db, long.key):
        _index_turn(db, long.key, terms)


def _index_turn(db: apsw.Connection, turn: int, terms: Iterable[str]) -> None:
    documents.add_old_turn(db, turn, _session_of(db, turn), terms)


def _session_of(db: apsw.Connection, turn: int) -> int:
    session: int = db.execute("SELECT session FROM turns WHERE key = ?", (turn,)).get
    return session


def _version(db: apsw.Connection, turn: int) -> Row | None:
    """What changes with each deletion in the session of the turn, and when another turn gets its key."""
    return db.execute(_VERSION, (turn,)).fetchone()


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
