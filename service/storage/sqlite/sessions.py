"""The steps that read and write sessions, each within a transaction. A step refuses before its first write."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

import apsw
import msgspec

from service.errors import SessionExistsError, SessionNotFoundError, TurnInProgressError
from service.ids import new_session_id, owner_of, scoped
from service.models.client import Usage
from service.storage import rules
from service.storage.moments import moment
from service.storage.page_cursor import SessionPosition, encode_cursor
from service.storage.page_size import fitting
from service.storage.records import IdempotencyKey, Page, SessionPatch, SessionRecord, SessionStatus, TitleSource
from service.storage.sqlite import documents, idempotency, metadata, recovery, removals, trees
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.rows import SESSION_COLUMNS, SETTINGS_COLUMNS, Row, session_of, settings_of

_GET = f"SELECT {SESSION_COLUMNS}, deletion, turns_begun, owner, edits FROM sessions WHERE id = ?"
_GET_BY_KEY = (
    f"SELECT {SESSION_COLUMNS} FROM sessions WHERE key = ? AND deletion = 0 AND (open_turns > 0 OR expires_at > ?)"
)
# Two simple statements are several times as fast as one that joins.
_SETTINGS_BYTES = (
    "SELECT coalesce(octet_length(title), 0) + coalesce(octet_length(system_message), 0) + octet_length(metadata) "
    "FROM session_settings WHERE session = ?"
)
_GET_SETTINGS = f"SELECT {SETTINGS_COLUMNS} FROM session_settings WHERE session = ?"
_LIST = (
    f"SELECT {SESSION_COLUMNS} FROM sessions "
    "WHERE deletion = 0 AND ephemeral = 0 AND (open_turns > 0 OR expires_at > :now) {filter}"
)
_NEWEST = " ORDER BY created_at DESC, id DESC LIMIT :limit"
_FILTERS: dict[SessionStatus | None, str] = {
    None: "",
    "running": "AND open_turns > 0",
    "idle": "AND open_turns = 0",
}
# The indexes have either the sessions with an owner or those without, so SQLite must see which of them are asked for.
_INDEXED_OWNER = "AND ephemeral = 0 AND owner_name <> '' AND owner_name = :owner"
_ANY_OWNER = "AND ephemeral = 0 AND owner_name <> ''"
_NO_OWNER = "AND ephemeral = 0 AND owner_name = ''"
# Without those indexes: the running sessions are few.
_OWNER = "AND +owner_name = :owner"
_COUNT_RUNNING = "SELECT count(*) FROM sessions WHERE deletion = 0 AND ephemeral = 0 AND open_turns > 0 {filter}"
# An ephemeral session is never idle.
_COUNT_IDLE = "SELECT count(*) FROM sessions WHERE deletion = 0 AND open_turns = 0 AND expires_at > :now {filter}"
_COUNT_IDLE_OF = _COUNT_IDLE.replace("expires_at", "+expires_at")  # by the index of the owner
_EXPIRED_AMONG = (
    "SELECT key, expires_at, id FROM sessions WHERE deletion = 0 AND open_turns = 0 AND expires_at <= :now {filter}"
)
_EXPIRED = (
    f"{_EXPIRED_AMONG.format(filter=_NO_OWNER)} UNION ALL {_EXPIRED_AMONG.format(filter=_ANY_OWNER)} "
    "ORDER BY expires_at, id LIMIT :limit"
)
_ITEMS = "SELECT iif(deleted_items IS NULL, message_items, NULL) FROM shown_turns WHERE id = ? AND session = ?"


class StoredSession(msgspec.Struct, frozen=True):
    """A stored session: its record, and the fields that only the store knows."""

    record: SessionRecord
    key: int
    deletion: int
    turns_begun: int
    owner: int | None
    edits: int = 0

    @property
    def is_deleted(self) -> bool:
        return self.deletion != 0


def find(db: apsw.Connection, session_id: str) -> StoredSession | None:
    """The session of this id in any state, unless it is removed."""
    row: Row | None = db.execute(_GET, (session_id,)).fetchone()
    if row is None:
        return None
    deletion, turns_begun, owner, edits = row[-4:]
    return StoredSession(
        _record(db, row), key=row[0], deletion=deletion, turns_begun=turns_begun, owner=owner, edits=edits
    )


def _record(db: apsw.Connection, row: Row) -> SessionRecord:
    settings: Row | None = db.execute(_GET_SETTINGS, (row[0],)).fetchone()
    assert settings is not None, "a session without its settings"
    return session_of(row, settings)


def visible_by_key(db: apsw.Connection, key: int, now: datetime) -> SessionRecord | None:
    """The session of this key, unless it is marked as deleted, removed or has expired."""
    row: Row | None = db.execute(_GET_BY_KEY, (key, moment(now))).fetchone()
    return None if row is None else _record(db, row)


def by_key(db: apsw.Connection, key: int) -> SessionRecord:
    """The session of this key, which has an id."""
    row: Row = db.execute(f"SELECT {SESSION_COLUMNS} FROM sessions WHERE key = ?", (key,)).fetchone()  # type: ignore[assignment]
    return _record(db, row)


def visible(db: apsw.Connection, session_id: str, now: datetime) -> StoredSession:
    """Raises: SessionNotFoundError."""
    kept = find(db, session_id)
    if kept is None or not rules.is_visible(kept.record, now, is_deleted=kept.is_deleted):
        raise SessionNotFoundError(session_id)
    return kept


def create(
    db: apsw.Connection, session: SessionRecord, now: datetime, *, key: IdempotencyKey | None = None
) -> StoredSession:
    idempotency.check(db, key, now)
    make_room(db, session.id, now)
    created = StoredSession(session, key=insert(db, session), deletion=0, turns_begun=0, owner=None)
    idempotency.keep(db, key, session=created.key, session_id=session.id)
    return created


def make_room(db: apsw.Connection, session_id: str, now: datetime) -> None:
    """Cut off an expired session of this id. Raises: SessionExistsError: A session of this id has not expired."""
    expired = find_expired(db, session_id, now)
    if expired is not None:
        removals.hide(db, expired)


def find_expired(db: apsw.Connection, session_id: str, now: datetime) -> int | None:
    """The key of an expired session of this id. Raises: SessionExistsError: A session of this id has not expired."""
    present = find(db, session_id)
    if present is None:
        return None
    if rules.keeps_its_id(present.record, now, is_deleted=present.is_deleted):
        raise SessionExistsError(session_id)
    return present.key


def insert(db: apsw.Connection, session: SessionRecord, *, turns_begun: int = 0) -> int:
    """Add a session. Returns its key."""
    db.execute(
        "INSERT INTO sessions (id, owner_name, created_at, last_accessed_at, expires_at, idle_timeout_s, head, "
        "message_count, input_tokens, output_tokens, reasoning_tokens, cached_tokens, turns_begun, ephemeral) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            session.id,
            session.owner,
            moment(session.created_at),
            moment(session.last_accessed_at),
            moment(session.expires_at),
            session.idle_timeout_s,
            session.head,
            session.message_count,
            session.input_tokens,
            session.output_tokens,
            session.reasoning_tokens,
            session.cached_tokens,
            turns_begun,
            int(session.ephemeral),
        ),
    )
    key = db.last_insert_rowid()
    db.execute(
        f"INSERT INTO session_settings (session, {SETTINGS_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (key, *settings_of(session)),
    )
    documents.set_title(db, key, session.title)
    metadata.insert(db, key, session)
    return key


def insert_hidden(db: apsw.Connection, session: SessionRecord, hidden_id: str, *, turns_begun: int, fence: int) -> int:
    """Add a session that is built step by step. Readers see nothing of it, and it is removed if its builder dies.

    Args:
        hidden_id: An id that no client can choose (:func:`hidden_id_for`).
        fence: The owner that builds it.

    Returns:
        The key of the session.
    """
    key = insert(db, msgspec.structs.replace(session, id=hidden_id), turns_begun=turns_begun)
    db.execute("UPDATE sessions SET deletion = 1, deleter = ? WHERE key = ?", (fence, key))
    return key


def hidden_id_for(session_id: str) -> str:
    """An id for a session while it is hidden."""
    return scoped(owner_of(session_id), f"+{new_session_id()}")


def show(db: apsw.Connection, key: int, session_id: str) -> None:
    """Show a session that was built hidden, by its own id, which is free."""
    db.execute("UPDATE sessions SET id = ?, deletion = 0, deleter = NULL WHERE key = ?", (session_id, key))
    db.execute("UPDATE session_metadata SET id = ? WHERE session = ?", (session_id, key))


def list_page(
    db: apsw.Connection,
    *,
    limit: int,
    after: SessionPosition | None,
    status: SessionStatus | None,
    now: datetime,
    owner: str | None,
    bytes_max: int | None,
) -> Page[SessionRecord]:
    further = ""
    values: dict[str, int | str] = {"now": moment(now), "limit": limit + 1}
    if owner is not None:
        values["owner"] = owner
    if after is not None:
        further = " AND (created_at, id) < (:after, :after_id)"
        values |= {"after": moment(after.created_at), "after_id": after.id}
    lists = (_LIST.format(filter=f"{_FILTERS[status]} {it}{further}") for it in _owner_filters(status, owner))
    rows: list[Row] = db.execute(" UNION ALL ".join(lists) + _NEWEST, values).fetchall()
    sizes = (db.execute(_SETTINGS_BYTES, (key,)).get for key, *_ in rows[:limit])
    data = tuple(_record(db, row) for row in rows[: fitting(sizes, bytes_max=bytes_max)])
    cursors = tuple(encode_cursor(SessionPosition(session.created_at, session.id)) for session in data)
    return Page(data=data, next=cursors[-1] if len(data) < len(rows) else None, cursors=cursors)


def _owner_filters(status: SessionStatus | None, owner: str | None) -> Sequence[str]:
    """The conditions by which a listing finds its sessions: by each of them in the order of an index."""
    if status == "running":
        return ("" if owner is None else _OWNER,)
    if owner is None:
        return (_NO_OWNER, _ANY_OWNER)
    return (_INDEXED_OWNER if owner else _NO_OWNER,)


def listing_by_metadata(
    pairs: Mapping[str, str],
    *,
    limit: int,
    after: SessionPosition | None,
    status: SessionStatus | None,
    now: datetime,
    owner: str | None,
    bytes_max: int | None,
) -> metadata.Listing:
    def listed(db: apsw.Connection, key: int) -> SessionRecord | None:
        session = visible_by_key(db, key, now)
        return session if session is not None and rules.is_listed(session, status, owner, pairs) else None

    return metadata.Listing(pairs, listed, owner=owner, limit=limit, after=after, bytes_max=bytes_max)


def count(db: apsw.Connection, status: SessionStatus | None, now: datetime, *, owner: str | None = None) -> int:
    running = 0 if status == "idle" else _count(db, _COUNT_RUNNING, now, owner, "" if owner is None else _OWNER)
    return running if status == "running" else running + _count_idle(db, now, owner)


def _count_idle(db: apsw.Connection, now: datetime, owner: str | None) -> int:
    if owner:
        return _count(db, _COUNT_IDLE_OF, now, owner, _INDEXED_OWNER)
    owned = _count(db, _COUNT_IDLE, now, owner, _ANY_OWNER) if owner is None else 0
    return _count(db, _COUNT_IDLE, now, owner, _NO_OWNER) + owned


def _count(db: apsw.Connection, query: str, now: datetime, owner: str | None, filter_: str) -> int:
    counted: int = db.execute(query.format(filter=filter_), {"now": moment(now), "owner": owner}).get
    return counted


def update(
    db: apsw.Connection,
    session_id: str,
    patch: SessionPatch,
    owners: Ownership,
    now: datetime,
    *,
    revisions: Collection[str] | None = None,
) -> SessionRecord:
    kept = visible(db, session_id, now)
    rules.check_revision(kept.record, revisions)
    rules.check_head(kept.record, patch.seen_head)
    if patch.head is not msgspec.UNSET:
        kept = _free_to_move(db, kept, patch.head, owners, now)
    session = rules.patched(kept.record, patch, now)
    db.execute(
        "UPDATE sessions SET idle_timeout_s = ?, last_accessed_at = ?, expires_at = ?, head = ? WHERE key = ?",
        (session.idle_timeout_s, moment(session.last_accessed_at), moment(session.expires_at), session.head, kept.key),
    )
    if rules.changes_of(patch).keys() - {"idle_timeout_s", "head"}:
        db.execute(
            f"UPDATE session_settings SET ({SETTINGS_COLUMNS}) = (?, ?, ?, ?, ?, ?) WHERE session = ?",
            (*settings_of(session), kept.key),
        )
    if session.title != kept.record.title:
        documents.set_title(db, kept.key, session.title)
    if session.metadata != kept.record.metadata:
        metadata.delete(db, kept.key)
        metadata.insert(db, kept.key, session)
    return session


def keep_title(
    db: apsw.Connection,
    session: SessionRecord,
    title: str | None,
    usage: Usage | None,
    now: datetime,
    *,
    source: TitleSource | None = None,
) -> bool:
    kept = find(db, session.id)
    if kept is None or not rules.is_titled(kept.record, session, now, is_deleted=kept.is_deleted):
        return False
    if source is not None and db.execute(_ITEMS, (source.turn_id, kept.key)).get != source.items:
        title = None
    changed = rules.titled(kept.record, title, usage, now)
    db.execute(
        "UPDATE sessions SET input_tokens = ?, output_tokens = ?, reasoning_tokens = ?, cached_tokens = ? "
        "WHERE key = ?",
        (changed.input_tokens, changed.output_tokens, changed.reasoning_tokens, changed.cached_tokens, kept.key),
    )
    if changed.title == kept.record.title:
        return False
    db.execute(
        "UPDATE session_settings SET title = ?, titled_at = ? WHERE session = ?", (changed.title, moment(now), kept.key)
    )
    documents.set_title(db, kept.key, changed.title)
    return True


def _free_to_move(
    db: apsw.Connection, kept: StoredSession, head: str | None, owners: Ownership, now: datetime
) -> StoredSession:
    """The session whose head may move to a turn, or to None. Turns of an owner that is gone are recovered.

    Raises:
        TurnNotFoundError, TurnInProgressError, OwnedElsewhereError
    """
    # Also without open turns: the new head may not be one of the session's turns.
    found = [trees.find_open(db, kept.key, turn) for turn in (head, kept.record.head) if turn is not None]
    still_open = next((turn for turn in found if turn is not None), None)
    if still_open is None:
        return kept
    if not settle(db, kept, owners, now):
        raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_MOVING)
    return _free_to_move(db, visible(db, kept.record.id, now), head, owners, now)  # some may be suspended now


def settle(db: apsw.Connection, kept: StoredSession, owners: Ownership, now: datetime) -> bool:
    """Recover the open turns of a session if their owner is gone. Returns whether this was so.

    Raises:
        OwnedElsewhereError: The owner lives.
    """
    others = rules.others_of(kept.owner, besides=owners.fence)
    if others is None:
        return False
    recovery.refuse_if_alive(db, others, owners, kept.record.id)
    recovery.recover_turns_of(db, others, now, session=kept.key)
    return True


def mark_deleted(
    db: apsw.Connection,
    session_id: str,
    deleter: Ownership,
    now: datetime,
    *,
    revisions: Collection[str] | None = None,
) -> None:
    kept = visible(db, session_id, now)
    rules.check_revision(kept.record, revisions)
    settle(db, kept, deleter, now)
    db.execute("UPDATE sessions SET deletion = 1, deleter = ? WHERE key = ?", (deleter.fence, kept.key))


def is_marked(db: apsw.Connection, session_id: str, fence: int) -> bool:
    query = "SELECT 1 FROM sessions WHERE id = ? AND deletion = 1 AND deleter = ?"
    return db.execute(query, (session_id, fence)).fetchone() is not None


def remove_deleted(db: apsw.Connection, session_id: str) -> bool:
    """Cut a marked session off. Returns whether there was one."""
    key = db.execute("SELECT key FROM sessions WHERE id = ? AND deletion = 1", (session_id,)).get
    if key is None:
        return False
    removals.hide(db, key)
    return True


def delete_expired(db: apsw.Connection, now: datetime, limit: int) -> int:
    """Cut expired sessions off, the earliest deadline first. Returns how many."""
    rows: list[Row] = db.execute(_EXPIRED, {"now": moment(now), "limit": limit}).fetchall()
    db.executemany(removals.HIDE, [(key,) for key, *_ in rows])
    return len(rows)
