"""The index of sessions by the pairs of their metadata: its rows change in the transactions that change the pairs.

A row has a digest of the pair, so that it is short whatever the pair. The record of the session decides in the end.
"""

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from hashlib import blake2b

import apsw

from service.storage.page_cursor import SessionPosition, encode_cursor
from service.storage.page_size import fitting
from service.storage.records import Page, SessionRecord
from service.storage.search import SEARCH_S
from service.storage.sqlite.rows import Row, moment, time_of

_COUNTED_MAX = 1000
"""So many rows of each pair are counted, to begin with the rarest one."""
_DIGEST_BYTES = 16
_END = (1 << 62, "")

_SOME = "SELECT 1 FROM session_metadata WHERE pair = ? LIMIT ?"
_NEWEST = (
    "SELECT created_at, id, session FROM session_metadata WHERE pair = ? AND (created_at, id) < (?, ?) "
    "ORDER BY created_at DESC, id DESC"
)
_HAS = "SELECT 1 FROM session_metadata WHERE pair = ? AND created_at = ? AND id = ? AND session = ?"


def insert(db: apsw.Connection, key: int, session: SessionRecord) -> None:
    """Add the pairs of a session, by its key."""
    for pair in _pairs(session.metadata, ("", session.owner) if session.owner else ("",)):
        db.execute(
            "INSERT INTO session_metadata (pair, created_at, id, session) VALUES (?, ?, ?, ?)",
            (pair, moment(session.created_at), session.id, key),
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
        owner: The owner, whose own rows are read, so that the sessions of others cost nothing.
    """
    deadline = time.monotonic() + SEARCH_S
    pairs = sorted(_pairs(metadata, (owner or "",)), key=partial(_rows_of, db))
    is_partial = db.execute("SELECT 1 FROM unindexed WHERE kind = 'sessions'").fetchone() is not None
    rarest, others = pairs[0], pairs[1:]
    start = _END if after is None else (moment(after.created_at), after.id)
    found: list[SessionRecord] = []
    rest: str | None = None
    for row in db.execute(_NEWEST, (rarest, *start)):
        session = record(row[2]) if _has_all(db, others, row) else None
        if session is not None:
            found.append(session)
            if len(found) > limit:
                break
        if time.monotonic() >= deadline:
            rest, is_partial = encode_cursor(SessionPosition(time_of(row[0]), row[1])), True
            break
    data = tuple(found[: fitting((session.text_bytes for session in found[:limit]), bytes_max=bytes_max)])
    cursors = tuple(encode_cursor(SessionPosition(session.created_at, session.id)) for session in data)
    return Page(data, cursors[-1] if len(data) < len(found) else rest, cursors, partial=is_partial)


def _rows_of(db: apsw.Connection, pair: bytes) -> int:
    return len(db.execute(_SOME, (pair, _COUNTED_MAX)).fetchall())


def _has_all(db: apsw.Connection, pairs: Collection[bytes], row: Row) -> bool:
    return all(db.execute(_HAS, (pair, *row)).fetchone() is not None for pair in pairs)


def _pairs(metadata: Mapping[str, str], owners: Collection[str]) -> list[bytes]:
    """The digests of pairs for all callers (the owner is empty), or for those of an owner."""
    return [_digest(owner, name, value) for name, value in metadata.items() for owner in owners]


def _digest(*texts: str) -> bytes:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(4) + encoded)
    return digest.digest()
