"""The index of sessions by the pairs of their metadata: its rows change in the transactions that change the pairs.

A row has a digest of the pair, so that it is short whatever the pair. The record of the session decides in the end.

The sessions of an owner are in the rows of this owner and in those of all owners. The sessions without an owner are in
rows of their own. So a listing reads no row of a session that its caller must not know, and neither its time nor its
page cursor tells of one; a listing of all sessions merges the two kinds of rows.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import blake2b

import apsw

from service.storage.page_cursor import SessionPosition
from service.storage.page_size import page_of_sessions
from service.storage.records import Page, SessionRecord
from service.storage.search import SEARCH_S
from service.storage.sqlite.rows import Row, moment, time_of

STEP_S = 0.005
"""The approximate time of one step of a listing."""
_COUNTED_MAX = 1000
"""So many rows of each pair are counted, to begin with the rarest one."""
_DIGEST_BYTES = 16
_END = (1 << 62, "")
_NO_OWNER = ""
_ALL_OWNERS = "/"  # no owner's name has a slash

_SOME = "SELECT 1 FROM session_metadata WHERE pair = ? LIMIT ?"
_BELOW = "SELECT created_at, id, session FROM session_metadata WHERE pair = ? AND (created_at, id) < (?, ?)"
_NEWEST = " ORDER BY created_at DESC, id DESC"
_HAS = "SELECT 1 FROM session_metadata WHERE pair = ? AND created_at = ? AND id = ? AND session = ?"


_Pair = tuple[bytes, ...]


def insert(db: apsw.Connection, key: int, session: SessionRecord) -> None:
    """Add the pairs of a session, by its key."""
    for pair in _pairs(session.metadata, (session.owner, _ALL_OWNERS) if session.owner else (_NO_OWNER,)):
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
        self._pairs = _pairs(metadata, (_NO_OWNER, _ALL_OWNERS) if owner is None else (owner,))
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


def _rows_of(db: apsw.Connection, pair: _Pair) -> int:
    return sum(len(db.execute(_SOME, (digest, _COUNTED_MAX)).fetchall()) for digest in pair)


def _has_all(db: apsw.Connection, pairs: Iterable[_Pair], row: Row) -> bool:
    return all(_has(db, pair, row) for pair in pairs)


def _has(db: apsw.Connection, pair: _Pair, row: Row) -> bool:
    return any(db.execute(_HAS, (digest, *row)).fetchone() is not None for digest in pair)


def _pairs(metadata: Mapping[str, str], owners: Sequence[str]) -> list[_Pair]:
    """The digests of each pair: one for each of these owners."""
    return [tuple(_digest(owner, name, value) for owner in owners) for name, value in metadata.items()]


def _digest(*texts: str) -> bytes:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(4) + encoded)
    return digest.digest()
