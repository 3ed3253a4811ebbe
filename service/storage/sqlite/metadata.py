"""The index of sessions by the pairs of their metadata: its rows change in the transactions that change the pairs.

A row has a digest of the pair, so that it is short whatever the pair. The record of the session decides in the end.

The sessions of an owner are in the rows of this owner and in those of all owners. The sessions without an owner are in
rows of their own. So a listing reads no row of a session that its caller must not know, and neither its time nor its
page cursor tells of one; a listing of all sessions merges the two kinds of rows.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b

import apsw

from service.storage.page_cursor import SessionPosition
from service.storage.page_size import page_of_sessions
from service.storage.records import Page, SessionRecord
from service.storage.search import SEARCH_S
from service.storage.sqlite.rows import Row, moment, time_of

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


def list_page(
    db: apsw.Connection,
    metadata: Mapping[str, str],
    record: Callable[[int], SessionRecord | None],
    *,
    owner: str | None,
    limit: int,
    after: SessionPosition | None,
    bytes_max: int | None,
) -> Page[SessionRecord]:
    """A page of the sessions with these pairs, as :meth:`~service.storage.store.Store.list_sessions` says.

    Args:
        record: Reads the session of a key; None if the listing does not have it.
        owner: Only the rows of this owner are read.
    """
    deadline = time.monotonic() + SEARCH_S
    owners = (_NO_OWNER, _ALL_OWNERS) if owner is None else (owner,)
    pairs = sorted(_pairs(metadata, owners), key=partial(_rows_of, db))
    is_partial = db.execute("SELECT 1 FROM unindexed WHERE kind = 'sessions'").fetchone() is not None
    rarest, others = pairs[0], pairs[1:]
    start = _END if after is None else (moment(after.created_at), after.id)
    found: list[SessionRecord] = []
    rest: SessionPosition | None = None
    newest = " UNION ALL ".join([_BELOW] * len(rarest)) + _NEWEST
    for row in db.execute(newest, [value for digest in rarest for value in (digest, *start)]):
        session = record(row[2]) if _has_all(db, others, row) else None
        if session is not None:
            found.append(session)
            if len(found) > limit:
                break
        if time.monotonic() >= deadline:
            rest, is_partial = SessionPosition(time_of(row[0]), row[1]), True
            break
    return page_of_sessions(found, limit=limit, bytes_max=bytes_max, rest=rest, partial=is_partial)


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
