"""The steps that read and write sessions, each within a transaction.

A step that changes a session, its turns or their places locks the session's row first.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

import msgspec
import psycopg

from service.errors import SessionExistsError, SessionNotFoundError, TurnInProgressError
from service.models.client import Usage
from service.storage import rules
from service.storage.moments import moment
from service.storage.page_cursor import SessionPosition, encode_cursor
from service.storage.postgres import documents, idempotency, metadata, owners, paths, recovery, removals
from service.storage.postgres.connections import Cursor, Db, Me
from service.storage.postgres.rows import SESSION_COLUMNS, SESSION_WIDTH, Row, idle_us_of, session_of, settings_of
from service.storage.records import IdempotencyKey, Page, SessionPatch, SessionRecord, SessionStatus, TitleSource

_GET = f"SELECT {SESSION_COLUMNS}, deletion, turns, owner, edits FROM {{s}}.sessions WHERE id = %s"
_GET_AND_LOCK = f"{_GET} FOR UPDATE"
# In the order of their keys: so do all steps that lock several sessions.
_LOCK_ALL = f"{_GET.replace('id = %s', 'id = ANY(%s)')} ORDER BY key FOR UPDATE"
_VISIBLE = (
    "sessions.deletion IS NULL AND NOT sessions.ephemeral "
    "AND (sessions.open_turns > 0 OR sessions.expires_at > %(now)s)"
)
_COLUMNS_IN_BOUND = SESSION_COLUMNS.removesuffix(", settings")
# The settings of a row that is not on the page are not read.
_PAGE = (
    f"SELECT {_COLUMNS_IN_BOUND}, CASE WHEN %(bytes_max)s::bigint IS NULL OR row_number() OVER newest = 1 "
    "OR sum(text_bytes) OVER newest <= %(bytes_max)s::bigint THEN settings END "
    "FROM (SELECT * FROM ({lists}) AS merged ORDER BY created_at DESC, id DESC LIMIT %(limit)s) AS newest_rows "
    "WINDOW newest AS (ORDER BY created_at DESC, id DESC ROWS UNBOUNDED PRECEDING) ORDER BY created_at DESC, id DESC"
)
_LIST = f"SELECT {SESSION_COLUMNS}, text_bytes FROM {{s}}.sessions WHERE {_VISIBLE} "
_FILTERS: dict[SessionStatus | None, str] = {
    None: "",
    "running": "AND open_turns > 0 ",
    "idle": "AND open_turns = 0 ",
}
# The indexes have either the sessions with an owner or those without, so the planner must see which are asked for.
_OWNER = "AND owner_name <> '' AND owner_name = %(owner)s "
_ANY_OWNER = "AND owner_name <> '' "
_NO_OWNER = "AND owner_name = '' "
_COUNT_RUNNING = "SELECT count(*) FROM {s}.sessions WHERE deletion IS NULL AND NOT ephemeral AND open_turns > 0 "
# An ephemeral session is never idle.
_COUNT_IDLE = "SELECT count(*) FROM {s}.sessions WHERE deletion IS NULL AND open_turns = 0 AND expires_at > %(now)s "
_EXPIRED_AMONG = (
    "(SELECT key, expires_at, id FROM {s}.sessions WHERE deletion IS NULL AND open_turns = 0 AND expires_at <= %(now)s "
)
_EARLIEST = "ORDER BY expires_at, id LIMIT %(limit)s"
_EXPIRED = (
    "SELECT key FROM ("
    f"{_EXPIRED_AMONG}{_NO_OWNER}{_EARLIEST}) UNION ALL {_EXPIRED_AMONG}{_ANY_OWNER}{_EARLIEST})"
    f") AS newest_rows {_EARLIEST}"
)
# Of several owners each takes the rows that no other one has taken. A session that was just used is not among them.
_TAKE_EXPIRED = (
    f"SELECT key FROM {{s}}.sessions WHERE key = ANY(ARRAY({_EXPIRED})) "
    "AND deletion IS NULL AND open_turns = 0 AND expires_at <= %(now)s FOR UPDATE SKIP LOCKED"
)
_INSERT = (
    "INSERT INTO {s}.sessions (id, owner_name, created_at, last_accessed_at, expires_at, idle_us, ephemeral, head, "
    "turns, message_count, input_tokens, output_tokens, reasoning_tokens, cached_tokens, text_bytes, settings) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING RETURNING key"
)
_USE = "UPDATE {s}.sessions SET last_accessed_at = %s, expires_at = %s, idle_us = %s, head = %s WHERE key = %s"
_SET = "UPDATE {s}.sessions SET settings = %s, text_bytes = %s WHERE key = %s"
_SET_TOTALS = (
    "UPDATE {s}.sessions SET input_tokens = %s, output_tokens = %s, reasoning_tokens = %s, cached_tokens = %s "
    "WHERE key = %s"
)
_ITEMS = "SELECT message_items FROM {s}.turns WHERE id = %s AND session = %s"


class StoredSession(msgspec.Struct, frozen=True):
    """A stored session: its record, and the fields that only the store knows.

    ``turns`` is the next ordinal, ``owner`` that of the open turns, and ``deletion`` the owner that marked the session.
    ``edits`` counts the deletions of turns and items.
    """

    record: SessionRecord
    key: int
    turns: int = 0
    owner: int | None = None
    deletion: int | None = None
    edits: int = 0

    @property
    def is_deleted(self) -> bool:
        return self.deletion is not None


def find(db: Db, session_id: str, *, lock: bool = False) -> StoredSession | None:
    """The session of this id in any state, unless it is removed.

    Args:
        lock: Wait for other steps on the session, and let no other one begin until the transaction is over.
    """
    return _stored(db.execute(_GET_AND_LOCK if lock else _GET, (session_id,)).fetchone())


def _stored(row: Row | None) -> StoredSession | None:
    if row is None:
        return None
    deletion, turns, owner, edits = row[SESSION_WIDTH:]
    return StoredSession(session_of(row), key=row[0], turns=turns, owner=owner, deletion=deletion, edits=edits)


def visible(db: Db, session_id: str, now: datetime, *, lock: bool = False) -> StoredSession:
    """Raises: SessionNotFoundError."""
    return _visible(session_id, find(db, session_id, lock=lock), now)


def send_lock(db: Db, session_id: str) -> Cursor:
    """Lock a session, as the first statement of a pipeline; :func:`visible_of` takes the result."""
    return db.execute(_GET_AND_LOCK, (session_id,))


def send_locks(db: Db, session_ids: Sequence[str], *, waits: bool) -> Cursor:
    """Lock sessions, as the first statement of a pipeline; :func:`all_stored_of` takes the result.

    Args:
        waits: Whether to wait for other steps on the sessions; otherwise those that another step has are left out.
    """
    return db.execute(_LOCK_ALL + ("" if waits else " SKIP LOCKED"), (list(session_ids),))


def all_stored_of(sent: Cursor) -> list[StoredSession]:
    """The sessions that :func:`send_locks` has locked, in any state, unless they are removed."""
    return [kept for kept in map(_stored, sent.fetchall()) if kept is not None]


def visible_of(session_id: str, sent: Cursor, now: datetime) -> StoredSession:
    """The session that :func:`send_lock` has locked. Raises: SessionNotFoundError."""
    return _visible(session_id, _stored(sent.fetchone()), now)


def _visible(session_id: str, kept: StoredSession | None, now: datetime) -> StoredSession:
    if kept is None or not rules.is_visible(kept.record, now, is_deleted=kept.is_deleted):
        raise SessionNotFoundError(session_id)
    return kept


def locked(db: Db, session_id: str, now: datetime) -> StoredSession:
    """A session that a step changes. Raises: SessionNotFoundError."""
    return visible(db, session_id, now, lock=True)


def create(db: Db, session: SessionRecord, now: datetime, *, key: IdempotencyKey | None = None) -> StoredSession:
    with idempotency.checked(db, key, now):
        make_room(db, session.id, now)
        created = StoredSession(session, key=insert(db, session))
        idempotency.keep(db, key, session=created.key, session_id=session.id, now=now)
        return created


def make_room(db: Db, session_id: str, now: datetime) -> None:
    """Hide an expired session of this id. Raises: SessionExistsError: A session of this id has not expired."""
    present = find(db, session_id, lock=True)
    if present is None:
        return
    if rules.keeps_its_id(present.record, now, is_deleted=present.is_deleted):
        raise SessionExistsError(session_id)
    removals.hide(db, [present.key])


def insert(db: Db, session: SessionRecord, *, turns: int = 0, indexes_title: bool = True) -> int:
    """Add a session. Returns its key. Raises: SessionExistsError: Another step has added one of this id meanwhile.

    Args:
        turns: The turns that the same transaction adds.
        indexes_title: False if the caller puts the title into the index.
    """
    row = db.execute(
        _INSERT,
        (
            session.id,
            session.owner,
            moment(session.created_at),
            moment(session.last_accessed_at),
            moment(session.expires_at),
            idle_us_of(session),
            session.ephemeral,
            session.head,
            turns,
            session.message_count,
            session.input_tokens,
            session.output_tokens,
            session.reasoning_tokens,
            session.cached_tokens,
            session.text_bytes,
            settings_of(session),
        ),
    ).fetchone()
    if row is None:
        raise SessionExistsError(session.id)
    key: int = row[0]
    if session.title is not None and indexes_title:
        documents.add_title(db, key, session.title)
    metadata.insert(db, key, session)
    return key


def show(db: Db, key: int, session_id: str) -> None:
    """Give a session that was added under another id its own one.

    Raises:
        SessionExistsError: Another step has added one of this id meanwhile.
    """
    db.execute("SAVEPOINT hidden")
    try:
        db.execute("UPDATE {s}.sessions SET id = %s WHERE key = %s", (session_id, key))
    except psycopg.errors.UniqueViolation:
        db.execute("ROLLBACK TO SAVEPOINT hidden")
        raise SessionExistsError(session_id) from None
    db.execute("UPDATE {s}.session_metadata SET id = %s WHERE session = %s", (session_id, key))


def list_page(
    db: Db,
    *,
    limit: int,
    after: SessionPosition | None,
    status: SessionStatus | None,
    now: datetime,
    owner: str | None,
    bytes_max: int | None,
) -> Page[SessionRecord]:
    """One statement."""
    further = ""
    values: dict[str, object] = {"now": moment(now), "limit": limit + 1, "bytes_max": bytes_max, "owner": owner}
    if after is not None:
        further = "AND (created_at, id) < (%(after)s, %(after_id)s) "
        values |= {"after": moment(after.created_at), "after_id": after.id}
    newest = "ORDER BY created_at DESC, id DESC LIMIT %(limit)s"
    lists = " UNION ALL ".join(
        f"({_LIST}{_FILTERS[status]}{which}{further}{newest})" for which in _owner_filters(status, owner)
    )
    rows: list[Row] = db.execute(_PAGE.replace("{lists}", lists), values).fetchall()
    shown = [row for row in rows[:limit] if row[SESSION_WIDTH - 1] is not None]
    data = tuple(map(session_of, shown))
    cursors = tuple(encode_cursor(SessionPosition(session.created_at, session.id)) for session in data)
    return Page(data=data, next=cursors[-1] if len(data) < len(rows) else None, cursors=cursors)


def _owner_filters(status: SessionStatus | None, owner: str | None) -> Sequence[str]:
    """The conditions by which a listing finds its sessions: by each of them in the order of an index."""
    if status == "running":  # they are few
        return ("" if owner is None else "AND owner_name = %(owner)s ",)
    if owner is None:
        return (_NO_OWNER, _ANY_OWNER)
    return (_OWNER if owner else _NO_OWNER,)


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
    return metadata.Listing(
        pairs,
        columns=SESSION_COLUMNS,
        visible=(_VISIBLE, {"now": moment(now)}),
        is_listed=lambda session: rules.is_listed(session, status, owner, pairs),
        owner=owner,
        limit=limit,
        after=after,
        bytes_max=bytes_max,
    )


def visible_by_keys(db: Db, keys: Collection[int], now: datetime) -> dict[int, SessionRecord]:
    """The sessions of these keys that are listed at ``now``, by their keys."""
    query = f"SELECT {SESSION_COLUMNS} FROM {{s}}.sessions WHERE key = ANY(%(keys)s) AND {_VISIBLE}"
    rows = db.execute(query, {"keys": list(keys), "now": moment(now)}).fetchall()
    return {row[0]: session_of(row) for row in rows}


def count(db: Db, status: SessionStatus | None, now: datetime, *, owner: str | None = None) -> int:
    """One statement."""
    parts = []
    if status != "idle":
        parts.append(_COUNT_RUNNING + ("" if owner is None else "AND owner_name = %(owner)s "))
    if status != "running":
        parts += [_COUNT_IDLE + which for which in _owner_filters("idle", owner)]
    query = "SELECT " + " + ".join(f"({part})" for part in parts)
    row = db.execute(query, {"now": moment(now), "owner": owner}).fetchone()
    assert row is not None
    counted: int = row[0]
    return counted


def update(
    db: Db,
    session_id: str,
    patch: SessionPatch,
    me: Me,
    now: datetime,
    *,
    revisions: Collection[str] | None = None,
) -> SessionRecord:
    kept = locked(db, session_id, now)
    rules.check_revision(kept.record, revisions)
    rules.check_head(kept.record, patch.seen_head)
    if patch.head is not msgspec.UNSET:
        kept = _free_to_move(db, kept, patch.head, me, now)
    session = rules.patched(kept.record, patch, now)
    used = (moment(session.last_accessed_at), moment(session.expires_at), idle_us_of(session))
    db.execute(_USE, (*used, session.head, kept.key))
    if rules.changes_of(patch).keys() - {"head"}:
        db.execute(_SET, (settings_of(session), session.text_bytes, kept.key))
    if session.title != kept.record.title:
        documents.set_title(db, kept.key, session.title)
    if session.metadata != kept.record.metadata:
        metadata.delete(db, [kept.key])
        metadata.insert(db, kept.key, session)
    return session


def keep_title(
    db: Db,
    session: SessionRecord,
    title: str | None,
    usage: Usage | None,
    now: datetime,
    *,
    source: TitleSource | None = None,
) -> bool:
    kept = find(db, session.id, lock=True)
    if kept is None or not rules.is_titled(kept.record, session, now, is_deleted=kept.is_deleted):
        return False
    if source is not None:
        row = db.execute(_ITEMS, (source.turn_id, kept.key)).fetchone()
        if row is None or row[0] != source.items:
            title = None
    changed = rules.titled(kept.record, title, usage, now)
    totals = (changed.input_tokens, changed.output_tokens, changed.reasoning_tokens, changed.cached_tokens)
    db.execute(_SET_TOTALS, (*totals, kept.key))
    if changed.title == kept.record.title:
        return False
    db.execute(_SET, (settings_of(changed), changed.text_bytes, kept.key))
    documents.set_title(db, kept.key, changed.title)
    return True


def _free_to_move(db: Db, kept: StoredSession, head: str | None, me: Me, now: datetime) -> StoredSession:
    """The session whose head may move to a turn, or to None. Turns of an owner that is gone are recovered.

    Raises:
        TurnNotFoundError, TurnInProgressError, OwnedElsewhereError
    """
    # Also without open turns: the new head may not be one of the session's turns.
    found = [paths.find_open(db, kept.key, turn) for turn in (head, kept.record.head) if turn is not None]
    still_open = next((turn for turn in found if turn is not None), None)
    if still_open is None:
        return kept
    if not settle(db, kept, me, now):
        raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_MOVING)
    return _free_to_move(db, visible(db, kept.record.id, now), head, me, now)  # some may be suspended now


def settle(db: Db, kept: StoredSession, me: Me, now: datetime) -> bool:
    """Recover the open turns of a session whose row is locked, if their owner is gone. Returns whether this was so.

    Raises:
        OwnedElsewhereError: The owner lives.
    """
    others = rules.others_of(kept.owner, besides=me.fence)
    if others is None:
        return False
    owners.refuse_if_alive(db, others, kept.record.id)
    recovery.recover_turns_of(db, others, now, session=kept.key)
    return True


def mark_deleted(db: Db, session_id: str, me: Me, now: datetime, *, revisions: Collection[str] | None = None) -> None:
    kept = locked(db, session_id, now)
    rules.check_revision(kept.record, revisions)
    settle(db, kept, me, now)
    db.execute("UPDATE {s}.sessions SET deletion = %s WHERE key = %s", (me.fence, kept.key))


def is_marked(db: Db, session_id: str, me: Me) -> bool:
    query = "SELECT true FROM {s}.sessions WHERE id = %s AND deletion = %s"
    return db.execute(query, (session_id, me.fence)).fetchone() is not None


def hide_deleted(db: Db, session_id: str) -> None:
    """Hide a marked session, if there is one."""
    query = "SELECT key FROM {s}.sessions WHERE id = %s AND deletion IS NOT NULL FOR UPDATE"
    rows = db.execute(query, (session_id,)).fetchall()
    removals.hide(db, [key for (key,) in rows])


def hide_expired(db: Db, now: datetime, limit: int) -> int:
    """Hide expired sessions, the earliest deadline first. Returns how many."""
    rows = db.execute(_TAKE_EXPIRED, {"now": moment(now), "limit": limit}).fetchall()
    removals.hide(db, [key for (key,) in rows])
    return len(rows)
