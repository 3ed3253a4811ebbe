"""Queries on the index of :mod:`service.storage.sqlite.documents`."""

from collections.abc import Iterable, Iterator
from functools import partial

import apsw

from service.steps import Steps, at_once
from service.storage.records import Match, Page, SessionRecord
from service.storage.search import Found, SearchQuery, search_page, searched_texts
from service.storage.sqlite import event_pages, sessions
from service.storage.sqlite.documents import BLOCK_BITS, block_term, owner_term, session_term
from service.storage.sqlite.rows import TURN_COLUMNS, Row
from service.storage.terms import document_terms

TERMS_MAX = 16
"""The terms of a query that FTS5 looks for. A document that has them is read and looked through for the others."""

_TURN_BY_KEY = f"SELECT {TURN_COLUMNS} FROM turns WHERE key = ?"
_WAITING = (
    "SELECT 1 FROM unindexed LEFT JOIN turns ON kind = 'turn' AND turns.key = unindexed.key "
    "LEFT JOIN sessions ON sessions.key = turns.session WHERE true"
)
"""The turns of others that wait are not told to an owner."""
_MATCHING = "SELECT rowid FROM search WHERE search MATCH ? AND rowid BETWEEN ? AND ? ORDER BY rowid DESC"


def page(db: apsw.Connection, query: SearchQuery) -> Page[Match]:
    """A page of a search, as :meth:`~service.storage.store.Store.search_sessions` says."""
    return at_once(search_page(_SqliteIndex(db, query), query))


class _SqliteIndex:
    """Meets :class:`service.storage.search.Index`. A session is its key."""

    def __init__(self, db: apsw.Connection, query: SearchQuery) -> None:
        self._db = db
        self._query = query
        terms = query.terms[:TERMS_MAX]
        if query.owner is not None:  # the cost of the search depends on the owner's documents
            terms = (owner_term(query.owner), *terms)
        self._match = " ".join(f'"{term}"' for term in terms)
        self._is_single = len(terms) == 1
        self._further = frozenset(query.terms[TERMS_MAX:])

    def newest(self) -> int | None:
        number: int | None = self._db.execute("SELECT max(key) FROM documents").get
        return number

    def is_whole(self) -> bool:
        owner = self._query.owner
        waiting = _WAITING if owner is None else f"{_WAITING} AND (kind <> 'turn' OR owner_name = :owner)"
        return self._db.execute(f"{waiting} LIMIT 1", {"owner": owner}).fetchone() is None

    def documents(self, *, below: int) -> Iterator[tuple[int, Found[int] | None]]:
        lowest: int | None = self._db.execute("SELECT min(key) FROM documents").get
        if lowest is None:
            return
        if self._is_single:  # such a query finds its documents one by one
            yield from self._found(self._match, lowest, below - 1)
            return
        last = below - 1
        while last >= lowest:
            block = last >> BLOCK_BITS
            first = block << BLOCK_BITS
            yield from self._found(f'{self._match} "{block_term(block)}"', first, last)
            if first > lowest:
                yield first, None
            last = first - 1

    def is_in(self, session: int, *, first: int, last: int) -> Steps[bool]:
        yield
        of_session = f'{self._match} "{session_term(session)}"'
        return any(found is not None for _, found in self._found(of_session, first, last))

    def record(self, session: int) -> SessionRecord | None:
        record = sessions.visible_by_key(self._db, session, self._query.now)
        return record if record is not None and self._query.takes(record) else None

    def still_has(self, document: Found[int]) -> bool:  # noqa: ARG002
        return True  # a page is read in one snapshot

    def _found(self, match: str, first: int, last: int) -> Iterator[tuple[int, Found[int] | None]]:
        for (number,) in self._db.execute(_MATCHING, (match, first, last)):
            document = self._document(number)
            if document is None or (self._further and not self._further <= at_once(document_terms(document.texts()))):
                yield number, None
            else:
                yield number, document

    def _document(self, number: int) -> Found[int] | None:
        row: Row | None = self._db.execute("SELECT session, turn FROM documents WHERE key = ?", (number,)).fetchone()
        if row is None:
            return None
        session, key = row
        if key is None:
            return Found(number, session, None, partial(_title, self._db, session))
        turn_id: str | None = self._db.execute("SELECT id FROM turns WHERE key = ?", (key,)).get
        return Found(number, session, turn_id, partial(_messages, self._db, key))


def _title(db: apsw.Connection, session: int) -> Iterable[str]:
    title: str | None = db.execute("SELECT title FROM session_settings WHERE session = ?", (session,)).get
    return () if title is None else (title,)


def _messages(db: apsw.Connection, turn: int) -> Iterable[str]:
    row: Row | None = db.execute(_TURN_BY_KEY, (turn,)).fetchone()
    return () if row is None else searched_texts(event_pages.record_of(db, "", row))
