"""Queries on the index of :mod:`service.storage.postgres.documents`, in short steps.

A query for the documents of one block gives all of them, however many: so it begins with a small block, the newest one.
Where a block took little time the next one is larger, and the terms are rare: few queries go through all documents.
"""

import time
from collections.abc import Iterable, Iterator
from functools import partial

from service.steps import Steps
from service.storage.postgres import event_pages, sessions
from service.storage.postgres.connections import Db
from service.storage.postgres.documents import LEVELS, block_mark, owner_mark, session_mark
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import TURN_COLUMNS
from service.storage.records import SessionRecord
from service.storage.search import Found, SearchQuery, SteppedSearch, searched_texts

STEP_S = 0.01
"""The approximate time of one step, which ends with the query in which this time is over."""
TERMS_MAX = 16
"""The terms of a query that the index looks for, the longest ones. A document that has them is looked through for the
others."""
_FAST_S = 0.004
"""A larger block comes after one whose query took less time."""
_SLOW_S = 0.02
"""A smaller block comes after one whose query took more time."""
_FOUND_MIN, _FOUND_MAX = 32, 512
"""The documents that one query gives at most: at first, and later, because a search may pass by many of them."""

_NEWEST = "SELECT max(key) FROM {s}.documents"
_OLDEST = "SELECT min(key) FROM {s}.documents"
# Not by the index of keys, which has documents without these terms, too.
_FIND = (
    "SELECT found.key, found.session, found.turn, turns.id FROM ("
    "SELECT key, session, turn FROM {s}.documents WHERE terms @> %(terms)s AND key + 0 BETWEEN %(first)s AND %(last)s "
    "ORDER BY key + 0 DESC LIMIT %(limit)s) AS found LEFT JOIN {s}.turns ON turns.key = found.turn "
    "ORDER BY found.key DESC"
)
_IN = (
    "SELECT key FROM {s}.documents WHERE terms @> %(terms)s AND key + 0 BETWEEN %(first)s AND %(last)s "
    "ORDER BY key + 0 DESC LIMIT %(limit)s"
)
_HAS = "SELECT true FROM {s}.documents WHERE key = %(number)s AND terms @> %(terms)s"
_GET_TURN = f"SELECT {TURN_COLUMNS} FROM {{s}}.turns AS t WHERE t.key = %s"
_TERMS = "SELECT terms FROM {s}.documents WHERE key = %s"


class Search(SteppedSearch[Db]):
    """A search in the index of this store."""

    def __init__(self, query: SearchQuery) -> None:
        super().__init__(_PostgresIndex(query), query)


class _PostgresIndex:
    """Meets :class:`service.storage.search.SteppedIndex`. A session is its key."""

    def __init__(self, query: SearchQuery) -> None:
        self._db: Db
        self._query = query
        self._terms = list(query.terms[:TERMS_MAX])
        self._further = frozenset(query.terms[TERMS_MAX:])
        self._of_owner = [] if query.owner is None else [owner_mark(query.owner)]
        self._step = 0
        self._step_ends_at = 0.0
        self._found_in = 0
        """The step in which the last document was found."""
        self._sessions: set[int] = set()
        """The sessions of the documents that the last query gave."""
        self._records: dict[int, SessionRecord] = {}
        """Those of them that are visible, as they were in the step ``_read_in``."""
        self._read_in = 0

    # Steps

    def begin_step(self, db: Db) -> None:
        db.start()  # what fails later ends the steps: a repeated one would find none
        self._db = db
        self._step += 1
        self._step_ends_at = time.monotonic() + STEP_S

    def is_step_over(self) -> bool:
        return time.monotonic() >= self._step_ends_at

    def end_step(self) -> None:
        """The transaction ends with the step."""

    # The index

    def newest(self) -> int | None:
        return self._number(_NEWEST)

    def is_whole(self) -> bool:
        return True

    def documents(self, *, below: int) -> Iterator[tuple[int, Found[int] | None]]:
        lowest = self._number(_OLDEST)
        if lowest is None:
            return
        last, level, limit = below - 1, 0, _FOUND_MIN
        while last >= lowest:
            first = last >> LEVELS[level] << LEVELS[level]
            began_at = time.monotonic()
            rows, step = self._find(first, last, level, limit), self._step
            took_s = time.monotonic() - began_at
            for row in rows:
                yield row[0], self._found(row, step)
            if len(rows) == limit:
                last, limit = rows[-1][0] - 1, min(2 * limit, _FOUND_MAX)
                continue
            last = first - 1
            if took_s < _FAST_S:
                level = min(level + 1, len(LEVELS) - 1)
            elif took_s > _SLOW_S:
                level = max(level - 1, 0)
            if last >= lowest:
                yield first, None

    def is_in(self, session: int, *, first: int, last: int) -> Steps[bool]:
        terms = [session_mark(session), *self._terms]
        while last >= first:
            values = {"terms": terms, "first": first, "last": last, "limit": _FOUND_MIN}
            numbers = [number for (number,) in self._db.execute(_IN, values).fetchall()]
            for number in numbers:
                if self._has_further(number):
                    return True
            if len(numbers) < _FOUND_MIN:
                return False
            last = numbers[-1] - 1
            yield
        return False

    def record(self, session: int) -> SessionRecord | None:
        if self._read_in != self._step:
            self._read_records()
        record = self._records.get(session)
        return record if record is not None and self._query.takes(record) else None

    def still_has(self, document: Found[int]) -> Steps[bool]:
        yield from ()
        if self._found_in == self._step:
            return True
        values = {"number": document.number, "terms": self._terms}
        if self._db.execute(_HAS, values).fetchone() is None or not self._has_further(document.number):
            return False
        return self.record(document.session) is not None

    def _number(self, query: str) -> int | None:
        row = self._db.execute(query).fetchone()
        return None if row is None else row[0]

    def _find(self, first: int, last: int, level: int, limit: int) -> list[Row]:
        """The newest documents of a block, from the number ``last`` down."""
        terms = [block_mark(last, level), *self._of_owner, *self._terms]
        rows = self._db.execute(_FIND, {"terms": terms, "first": first, "last": last, "limit": limit}).fetchall()
        self._sessions = {session for _, session, *_ in rows}
        self._read_records()
        return rows

    def _found(self, row: Row, step: int) -> Found[int] | None:
        """The document of a row that was found in this step."""
        number, session, turn, turn_id = row
        if not self._has_further(number):
            return None
        self._found_in = step
        texts = partial(self._title, session) if turn is None else partial(self._messages, turn)
        return Found(number, session, turn_id, texts)

    def _has_further(self, number: int) -> bool:
        """Whether a document has the terms that the index was not asked for."""
        if not self._further:
            return True
        row: Row | None = self._db.execute(_TERMS, (number,)).fetchone()
        return row is not None and self._further.issubset(row[0])

    def _read_records(self) -> None:
        self._records = sessions.visible_by_keys(self._db, self._sessions, self._query.now)
        self._read_in = self._step

    def _title(self, session: int) -> Iterable[str]:
        record = self.record(session)
        return () if record is None or record.title is None else (record.title,)

    def _messages(self, turn: int) -> Iterable[str]:
        row: Row | None = self._db.execute(_GET_TURN, (turn,)).fetchone()
        return () if row is None else searched_texts(event_pages.record_of(self._db, "", row))
