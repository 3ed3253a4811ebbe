"""The index of sessions by the pairs of their metadata (:mod:`service.storage.metadata_pairs`): its rows change in the
transactions that change the pairs."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial

import apsw

from service.storage.metadata_pairs import COUNTED_MAX, Pair, pairs_asked_for, pairs_of
from service.storage.moments import moment, time_of
from service.storage.page_cursor import SessionPosition
from service.storage.page_size import page_of_sessions
from service.storage.records import Page, SessionRecord
from service.storage.search import SEARCH_S
from service.storage.sqlite.rows import Row

STEP_S = 0.005
"""The approximate time of one step of a listing."""
_END = (1 << 62, "")

_SOME = "SELECT 1 FROM session_metadata WHERE pair = ? LIMIT ?"
_BELOW = "SELECT created_at, id, session FROM session_metadata WHERE pair = ? AND (created_at, id) < (?, ?)"
_NEWEST = " ORDER BY created_at DESC, id DESC"
_HAS = "SELECT 1 FROM session_metadata WHERE pair = ? AND created_at = ? AND id = ? AND session = ?"


def insert(db: apsw.Connection, key: int, session: SessionRecord) -> None:
    """Add the pairs of a session, by its key."""
    for pair in pairs_of(session):
        for digest in pair:
            db.execute(
                "INSERT INTO session_metadata (pair, created_at, id, session) VALUES (?, ?, ?, ?)",
                (digest, moment(session.created_at), session.id, key),
            )


def delete(db: apsw.Connection, key: int) -> None:
    """Remove the pairs of a session, if there are any."""
    db.execute("DELETE FROM session_metadata WHERE session = ?", (key,))


class Listing:
    """Makes a page of the sessions with some pairs, as :meth:`~service.storage.store.Store.list_sessions` says.

    Works in short steps, each on its own snapshot of the file.

    Attributes:
        page: The page, once the listing is complete.

    Args:
        record: Reads the session of a key; None if the listing does not have it.
        owner: Only the rows of this owner are read.
    """

    def __init__(
        self,
        metadata: Mapping[str, str],
        record: Callable[[apsw.Connection, int], SessionRecord | None],
        *,
        owner: str | None,
        limit: int,
        after: SessionPosition | None,
        bytes_max: int | None,
    ) -> None:
        self.page: Page[SessionRecord] | None = None
        self._pairs = pairs_asked_for(metadata, owner)
        self._record = record
        self._limit = limit
        self._bytes_max = bytes_max
        self._below = _END if after is None else (moment(after.created_at), after.id)
        self._found: list[SessionRecord] = []
        self._is_partial: bool | None = None
        self._took_s = 0.0

    def read_some(self, db: apsw.Connection) -> None:
        """Do one step."""
        began_at = time.monotonic()
        if self._is_partial is None:  # the first step
            self._is_partial = db.execute("SELECT 1 FROM unindexed WHERE kind = 'sessions'").fetchone() is not None
            self._pairs.sort(key=partial(_rows_of, db))
        with closing(self._newest(db)) as rows:
            for row in rows:
                self._below = row[:2]
                session = self._record(db, row[2]) if _has_all(db, self._pairs[1:], row) else None
                if session is not None:
                    self._found.append(session)
                    if len(self._found) > self._limit:
                        break
                step_s = time.monotonic() - began_at
                if self._took_s + step_s >= SEARCH_S:
                    self._complete(rest=SessionPosition(time_of(row[0]), row[1]))
                    return
                if step_s >= STEP_S:
                    self._took_s += step_s
                    return
        self._complete()

    def _newest(self, db: apsw.Connection) -> apsw.Cursor:
        """The rows of the rarest pair that come next."""
        rarest = self._pairs[0]
        newest = " UNION ALL ".join([_BELOW] * len(rarest)) + _NEWEST
        return db.execute(newest, [value for digest in rarest for value in (digest, *self._below)])

    def _complete(self, *, rest: SessionPosition | None = None) -> None:
        self.page = page_of_sessions(
            self._found,
            limit=self._limit,
            bytes_max=self._bytes_max,
            rest=rest,
            partial=bool(self._is_partial) or rest is not None,
        )


def _rows_of(db: apsw.Connection, pair: Pair) -> int:
    return sum(len(db.execute(_SOME, (digest, COUNTED_MAX)).fetchall()) for digest in pair)


def _has_all(db: apsw.Connection, pairs: Iterable[Pair], row: Row) -> bool:
    return all(_has(db, pair, row) for pair in pairs)


def _has(db: apsw.Connection, pair: Pair, row: Row) -> bool:
    return any(db.execute(_HAS, (digest, *row)).fetchone() is not None for digest in pair)
