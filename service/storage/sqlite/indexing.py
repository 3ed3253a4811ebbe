"""Puts into the indexes what the steps of callers do not, in short steps between other writes.

These are the rows of earlier versions, and documents that wait for their terms. The table ``unindexed`` says what is
left. A step and its progress are one transaction, so a process that dies loses nothing: another one goes on. Rows of
earlier versions that change meanwhile are indexed by their change.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import apsw
import structlog

from service.steps import Steps, at_once
from service.storage.search import searched_texts
from service.storage.sqlite import documents, event_pages, metadata, sessions
from service.storage.sqlite.documents import OldDocument
from service.storage.sqlite.rows import TURN_COLUMNS, Row
from service.storage.terms import TERMS_MAX, document_terms

logger = structlog.get_logger("lastcall.store")

STEP_S = 0.01
"""The approximate time of one step: no further row is taken, and none is cut on, once this time is over."""
LONG_BYTES = 16 * 1024
"""The terms of a longer turn are cut in steps of their own, outside of a transaction. So are those of a shorter one
that takes the time of a step: a character of some scripts takes a hundred times as long as a letter of ASCII."""
_WAITING_AT_ONCE = 256
"""The documents that wait of which one step reads the places."""

_NEXT_SESSION = "SELECT key, deletion FROM sessions WHERE key <= ? ORDER BY key DESC LIMIT 1"
_BYTES = "octet_length(input) + octet_length(output) + coalesce(output_bytes, 0)"
_NEXT_TURN = f"SELECT key, session, owner, {_BYTES} FROM turns WHERE key <= ? ORDER BY key DESC LIMIT 1"
_NEXT_WAITING = (
    f"SELECT unindexed.key, turns.key, turns.session, {_BYTES} FROM unindexed "
    "CROSS JOIN documents ON documents.key = unindexed.key CROSS JOIN turns ON turns.key = turn "
    "WHERE kind = 'document' ORDER BY unindexed.key LIMIT ?"
)
_OLD = "SELECT kind, key FROM unindexed WHERE kind IN ('sessions', 'turns')"
_WAITS = "SELECT 1 FROM unindexed WHERE kind = 'document' AND key = ?"
_GET_TURN = f"SELECT {TURN_COLUMNS} FROM edited_turns WHERE key = ?"
_VERSION = "SELECT turns.id, edits FROM turns JOIN sessions ON sessions.key = session WHERE turns.key = ?"

Transact = Callable[[Callable[[apsw.Connection], Any]], Any]


class _LongTurn(NamedTuple):
    """A turn whose terms are being cut outside of a transaction: its key, its session's key, and its number if it
    waits."""

    key: int
    session: int
    number: int | None
    version: Row | None
    steps: Steps[set[str]]


class Indexing:
    """The work of one process. Documents that wait come first, then the sessions and the turns of earlier versions.

    Of the documents that wait the oldest ones come first, and short turns before long ones; of earlier versions the
    newest rows. Several processes may add documents that wait; one of them adds the rows of earlier versions.

    Attributes:
        old_steps: How many steps it has done for earlier versions.
    """

    def __init__(self) -> None:
        self.old_steps = 0
        self._long: _LongTurn | None = None
        self._begun: _LongTurn | None = None
        """A shorter turn whose terms were not cut within the step that began with it. It comes before all others."""

    def is_done(self, db: apsw.Connection) -> bool:
        return db.execute("SELECT 1 FROM unindexed LIMIT 1").fetchone() is None

    def count_waiting(self, db: apsw.Connection, *, at_most: int) -> int:
        """The number of documents that wait."""
        return len(db.execute("SELECT 1 FROM unindexed WHERE kind = 'document' LIMIT ?", (at_most,)).fetchall())

    def run_step(self, transact: Transact, *, takes_old: bool = True) -> None:
        """Do one step. ``transact`` runs a part of it in a transaction.

        Args:
            takes_old: Whether this is the process that adds the rows of earlier versions.
        """
        deadline = time.monotonic() + STEP_S
        if self._begun is None:
            transact(partial(self._index_some, deadline=deadline, takes_old=takes_old))
        turn = self._begun or self._long
        if turn is None:
            return
        try:
            next(turn.steps)
            while time.monotonic() < deadline:
                next(turn.steps)
        except StopIteration as done:
            if turn is self._begun:  # before the transaction: should it fail, the turn is cut again
                self._begun = None
            else:
                self._long = None
            transact(partial(_index_long, long=turn, terms=done.value))

    def _index_some(self, db: apsw.Connection, deadline: float, *, takes_old: bool) -> None:
        if self._index_waiting(db, deadline) or self._long is not None or not takes_old:
            return
        left: dict[str, int] = dict(db.execute(_OLD).fetchall())  # type: ignore[arg-type]
        self.old_steps += bool(left)
        deadline -= STEP_S / 2  # for cutting the terms; the index takes the rest of the time
        if "sessions" in left:
            _note(db, "sessions", _index_sessions(db, left["sessions"], deadline))
        elif "turns" in left:
            _note(db, "turns", self._index_turns(db, left["turns"], deadline))

    def _index_waiting(self, db: apsw.Connection, deadline: float) -> bool:
        """Index documents that wait. Returns whether this took the time of the step."""
        rows: list[Row] = db.execute(_NEXT_WAITING, (_WAITING_AT_ONCE,)).fetchall()
        if not rows:
            db.execute("DELETE FROM unindexed WHERE kind = 'document'")  # should a row have lost its turn
            return False
        added = 0
        for number, turn, session, size in rows:
            if size > LONG_BYTES:
                continue
            steps = document_terms(_texts_of(db, turn))
            terms = _cut(steps, deadline)
            if terms is None:
                if not added:
                    self._begun = _LongTurn(turn, session, number, _version(db, turn), steps)
                return True  # the next step begins with it
            added += len(terms)
            if len(terms) < added > TERMS_MAX:
                return True
            documents.add_waiting(db, number, session, terms)
            if time.monotonic() >= deadline:
                return True
        longest = next((row for row in rows if row[3] > LONG_BYTES), None)
        if self._long is None and longest is not None:
            number, turn, session, _ = longest
            self._long = _LongTurn(turn, session, number, _version(db, turn), document_terms(_texts_of(db, turn)))
        return False

    def _index_turns(self, db: apsw.Connection, key: int, deadline: float) -> int | None:
        """Index turns from this key on. Returns the key that is next; None at the end."""
        found: list[OldDocument] = []
        terms_count = 0
        while (row := db.execute(_NEXT_TURN, (key,)).fetchone()) is not None:
            turn, session, owner, size = row
            if owner is None and not documents.has_turn(db, turn):  # an open turn is indexed by its end
                steps = document_terms(_texts_of(db, turn))
                terms = None if size > LONG_BYTES else _cut(steps, deadline)
                if terms is None:
                    if not found:
                        self._long = _LongTurn(turn, session, None, _version(db, turn), steps)
                    key = turn
                    break
                found.append(OldDocument(session, turn, terms))
                terms_count += len(terms)
            key = turn - 1
            if terms_count >= TERMS_MAX or time.monotonic() >= deadline:
                break
        documents.add_old(db, found)
        return None if row is None else key


def _cut(steps: Steps[set[str]], deadline: float) -> set[str] | None:
    """The terms of a turn; None if the time is over before all are cut. At least one part of it is cut."""
    try:
        next(steps)
        while time.monotonic() < deadline:
            next(steps)
    except StopIteration as done:
        terms: set[str] = done.value
        return terms
    return None


def _index_sessions(db: apsw.Connection, key: int, deadline: float) -> int | None:
    """Index sessions from this key on. Returns the key that is next; None at the end."""
    found: list[OldDocument] = []
    while (row := db.execute(_NEXT_SESSION, (key,)).fetchone()) is not None:
        session, deletion = row
        if deletion == 0:
            found += _index_session(db, session)
        key = session - 1
        if time.monotonic() >= deadline:
            break
    documents.add_old(db, found)
    return None if row is None else key


def _index_session(db: apsw.Connection, session: int) -> Iterable[OldDocument]:
    """Index the pairs of a session. Returns its title, if that is not indexed."""
    try:
        record = sessions.by_key(db, session)
    except (ValueError, LookupError) as error:
        logger.warning("a session cannot be searched: its row is damaged", session=session, error=str(error))
        return ()
    metadata.delete(db, session)
    metadata.insert(db, session, record)
    if record.title is None or documents.has_title(db, session):
        return ()
    return (OldDocument(session, None, at_once(document_terms((record.title,)))),)


def _index_long(db: apsw.Connection, long: _LongTurn, terms: Collection[str]) -> None:
    """Index a long turn, unless this was done meanwhile, or its texts have changed or are gone."""
    if _version(db, long.key) != long.version:
        return
    if long.number is None:
        if not documents.has_turn(db, long.key):
            documents.add_old(db, [OldDocument(long.session, long.key, terms)])
    elif db.execute(_WAITS, (long.number,)).fetchone() is not None:
        documents.add_waiting(db, long.number, long.session, terms)


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
