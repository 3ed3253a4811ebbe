"""Queries on the index of :mod:`service.storage.sqlite.documents`, in short steps.

Each step reads its own snapshot of the file: while a snapshot is held, the log of the file cannot restart. So a query
ends with its step, and the next step goes on below the last number.
"""

import heapq
import time
from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter

import apsw

from service.steps import Steps
from service.storage.records import SessionRecord
from service.storage.search import Found, SearchQuery, SteppedSearch, searched_texts
from service.storage.sqlite import event_pages, sessions
from service.storage.sqlite.documents import (
    BLOCK_BITS,
    LOOKED_AT_BYTES_MAX,
    block_term,
    owner_term,
    session_term,
)
from service.storage.sqlite.rows import TURN_COLUMNS, Row
from service.storage.terms import has_terms

STEP_S = 0.005
"""The approximate time of one step, without that in which FTS5 finds the first document."""
TERMS_MAX = 16
"""The terms of a query that FTS5 looks for. A document that has them is read and looked through for the others."""

_NO_END = 1 << 62
_TURN_BY_KEY = f"SELECT {TURN_COLUMNS} FROM shown_turns WHERE key = ?"
_IS_OLD = "SELECT 1 FROM unindexed WHERE kind IN ('sessions', 'turns')"
_WAITING = (
    "SELECT unindexed.key FROM unindexed CROSS JOIN documents ON documents.key = unindexed.key "
    "CROSS JOIN turns ON turns.key = turn CROSS JOIN sessions ON sessions.key = turns.session "
    "WHERE kind = 'document' AND unindexed.key BETWEEN :first AND :last AND (:owner IS NULL OR owner_name = :owner) "
    "AND octet_length(input) + octet_length(output) + coalesce(output_bytes, 0) {bytes}"
)
"""Those of other owners are not told to an owner."""
_WAITING_LONG = _WAITING.format(bytes="> :bytes LIMIT 1")
_WAITING_SHORT = _WAITING.format(
    bytes="<= :bytes AND (:session IS NULL OR turns.session = :session) ORDER BY unindexed.key DESC"
)
_MATCHING = "SELECT rowid FROM search WHERE search MATCH ? AND rowid BETWEEN ? AND ? ORDER BY rowid DESC"


class Search(SteppedSearch[apsw.Connection]):
    """A search in the index of this store."""

    def __init__(self, query: SearchQuery) -> None:
        super().__init__(_SqliteIndex(query), query)


class _SqliteIndex:
    """Meets :class:`service.storage.search.SteppedIndex`. A session is its key."""

    def __init__(self, query: SearchQuery) -> None:
        self._db: apsw.Connection
        self._query = query
        terms = query.terms[:TERMS_MAX]
        if query.owner is not None:  # the cost of the search depends on the owner's documents
            terms = (owner_term(query.owner), *terms)
        self._match = " ".join(f'"{term}"' for term in terms)
        self._is_single = len(terms) == 1
        self._further = query.terms[TERMS_MAX:]
        self._step = 0
        self._step_ends_at = 0.0
        self._has_begun = False
        """Whether FTS5 has found the first document of this step."""
        self._found_in = 0
        """The step in which the last document was found."""
        self._open: list[apsw.Cursor] = []

    # Steps

    def begin_step(self, db: apsw.Connection) -> None:
        self._db = db
        self._step += 1
        self._step_ends_at = time.monotonic() + STEP_S
        self._has_begun = False

    def is_step_over(self) -> bool:
        return time.monotonic() >= self._step_ends_at

    def end_step(self) -> None:
        """End the queries of this step, which hold its snapshot."""
        for cursor in self._open:
            cursor.close()
        self._open.clear()

    # The index

    def newest(self) -> int | None:
        number: int | None = self._db.execute("SELECT max(key) FROM documents").get
        return number

    def is_whole(self) -> bool:
        long = {"first": 0, "last": _NO_END, "owner": self._query.owner, "bytes": LOOKED_AT_BYTES_MAX}
        return self._db.execute(_IS_OLD).fetchone() is None and self._db.execute(_WAITING_LONG, long).fetchone() is None

    def documents(self, *, below: int) -> Iterator[tuple[int, Found[int] | None]]:
        lowest: int | None = self._db.execute("SELECT min(key) FROM documents").get
        if lowest is None:
            return
        last = below - 1
        while last >= lowest:
            block = last >> BLOCK_BITS
            first = block << BLOCK_BITS
            # A query for a single term finds its documents one by one, in all blocks.
            found = self._found(lowest, last) if self._is_single else self._found(first, last, block_term(block))
            for number, document in found:
                self._found_in = self._step
                yield number, document
            if self._is_single:
                return
            if first > lowest:
                yield first, None
            last = first - 1

    def is_in(self, session: int, *, first: int, last: int) -> Steps[bool]:
        for _, found in self._found(first, last, session_term(session), session=session):
            if found is not None:
                return True
            yield
        return False

    def record(self, session: int) -> SessionRecord | None:
        record = sessions.visible_by_key(self._db, session, self._query.now)
        return record if record is not None and self._query.takes(record) else None

    def still_has(self, document: Found[int]) -> Steps[bool]:
        if self._found_in == self._step:
            return True
        number = document.number
        for _, found in self._found(number, number, block_term(number >> BLOCK_BITS)):
            if found is not None:
                return self.record(document.session) is not None
            yield
        return False

    def _found(
        self, first: int, last: int, *marks: str, session: int | None = None
    ) -> Iterator[tuple[int, Found[int] | None]]:
        """The documents from ``last`` down to ``first``, each with its number; None if it lacks a term of the query.

        A document whose texts are looked through for terms may take many steps. In each of them the number above it
        comes, with None.

        Args:
            session: Only its documents; its mark is among ``marks``.
        """
        match = " ".join((self._match, *(f'"{mark}"' for mark in marks)))
        while last >= first:
            step = self._step
            # Both queries read the snapshot of this step, so a document is among the results of one of them.
            indexed = ((number, self._further) for number in self._matching(match, first, last))
            waiting = ((number, self._query.terms) for number in self._waiting(first, last, session))
            for number, missing in heapq.merge(indexed, waiting, key=itemgetter(0), reverse=True):
                last = number - 1
                found = self._document(number)
                if found is not None and missing:
                    texts = tuple(found.texts())
                    looking = has_terms(texts, missing)
                    while (has := _next(looking)) is None:
                        yield number + 1, None
                    if has and self._step != step and self._texts_of(number) != texts:
                        last = number  # once more, as it is now
                        break
                    found = found if has else None
                yield number, found
                if self._step != step:
                    break
            else:
                return

    def _matching(self, match: str, first: int, last: int) -> Iterator[int]:
        """The documents that FTS5 finds."""
        found = self._numbers(_MATCHING, (match, first, last))
        if not self._has_begun:  # each step of a search gets on, however long the beginning takes
            self._has_begun = True
            self._step_ends_at = time.monotonic() + STEP_S
        return found

    def _waiting(self, first: int, last: int, session: int | None) -> Iterator[int]:
        """The documents that wait for their terms, and are short enough to be looked through."""
        of_whom = {"owner": self._query.owner, "session": session}
        return self._numbers(_WAITING_SHORT, of_whom | {"first": first, "last": last, "bytes": LOOKED_AT_BYTES_MAX})

    def _numbers(self, query: str, values: tuple[str, int, int] | dict[str, int | str | None]) -> Iterator[int]:
        cursor = self._db.cursor()
        self._open.append(cursor)
        return (number for (number,) in cursor.execute(query, values))

    def _document(self, number: int) -> Found[int] | None:
        row: Row | None = self._db.execute("SELECT session, turn FROM documents WHERE key = ?", (number,)).fetchone()
        if row is None:
            return None
        session, key = row
        if key is None:
            return Found(number, session, None, partial(_title, self._db, session))
        turn_id: str | None = self._db.execute("SELECT id FROM shown_turns WHERE key = ?", (key,)).get
        return None if turn_id is None else Found(number, session, turn_id, partial(_messages, self._db, key))

    def _texts_of(self, number: int) -> tuple[str, ...] | None:
        document = self._document(number)
        return None if document is None else tuple(document.texts())


def _next(looking: Steps[bool]) -> bool | None:
    """Do a step. Returns the result; None if there are more steps."""
    try:
        next(looking)
    except StopIteration as done:
        has: bool = done.value
        return has
    return None


def _title(db: apsw.Connection, session: int) -> Iterable[str]:
    title: str | None = db.execute("SELECT title FROM session_settings WHERE session = ?", (session,)).get
    return () if title is None else (title,)


def _messages(db: apsw.Connection, turn: int) -> Iterable[str]:
    row: Row | None = db.execute(_TURN_BY_KEY, (turn,)).fetchone()
    return () if row is None else searched_texts(event_pages.record_of(db, "", row))
