"""The steps that read and write turns, each within a transaction. A step refuses before its first write."""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from service.errors import SessionNotFoundError, TurnInProgressError, TurnNotFoundError, TurnsSuspendedError
from service.storage import rules
from service.storage.moments import moment
from service.storage.page_cursor import TurnPosition, encode_cursor
from service.storage.postgres import event_pages, idempotency, owners, paths, recovery, removals, sessions, suspensions
from service.storage.postgres.connections import Db, Me
from service.storage.postgres.ends import End, keep_ends
from service.storage.postgres.event_pages import record_of
from service.storage.postgres.paths import ShortPath
from service.storage.postgres.rows import Row
from service.storage.postgres.segments import SEGMENT, SEGMENT_OF_NEW
from service.storage.postgres.turn_rows import COLUMNS, TURN_COLUMNS, values_of
from service.storage.records import (
    BegunTurn,
    EndResult,
    IdempotencyKey,
    Page,
    SessionRecord,
    Siblings,
    TurnRecord,
)

_VISIBLE = "s.deletion IS NULL AND (s.open_turns > 0 OR s.expires_at > %(now)s)"
_WHERE_IS = """
SELECT p.key, p.chain, p.depth, p.chain_parent, p.ephemeral,
    EXISTS (SELECT FROM {s}.turns AS c WHERE c.chain = p.chain AND c.depth = p.depth + 1),
    coalesce((
        SELECT c.place FROM {s}.turns AS c WHERE c.session = s.key AND coalesce(c.parent, '') = %(siblings_of)s
        ORDER BY c.place DESC LIMIT 1
    ), 0)
FROM {s}.sessions AS s LEFT JOIN {s}.turns AS p ON p.id = %(parent)s AND p.session = s.key WHERE s.id = %(session)s
"""
# A turn that begins a chain has its own key as the number of the chain.
_BEGIN = f"""
WITH added AS (INSERT INTO {{s}}.turns (
    key, session, ordinal, id, parent, chain, depth, chain_parent, place, owner, segment, state, created_at, started_at,
    ended_at, last_seq, message_items, message_bytes, messages, text_bytes, ephemeral, events_deleted, settings,
    options, input, output, runs
) OVERRIDING SYSTEM VALUE
SELECT new.key, %(session)s, %(ordinal)s, %(id)s, %(parent)s, coalesce(%(chain)s::bigint, new.key), %(depth)s,
    %(chain_parent)s, %(place)s, %(owner)s, {SEGMENT_OF_NEW}, %(state)s, %(created_at)s, %(started_at)s, %(ended_at)s,
    %(last_seq)s, %(message_items)s, %(message_bytes)s, %(messages)s, %(text_bytes)s, %(ephemeral)s, %(events_deleted)s,
    %(settings)s, %(options)s, %(input)s, %(output)s, %(runs)s
FROM (SELECT nextval('{{s}}.turns_key_seq') AS key) AS new
)
UPDATE {{s}}.sessions SET head = %(head)s, open_turns = %(open_turns)s, owner = %(owner)s, turns = %(ordinal)s + 1,
    message_count = %(message_count)s, last_accessed_at = %(last_accessed_at)s, expires_at = %(expires_at)s
WHERE key = %(session)s
"""
# A turn that was adopted while it was queued has its first events in an earlier segment. ``+ 0`` as in ``ends.py``.
_START = f"""
WITH own AS (SELECT key, state FROM {{s}}.turns WHERE id = %(turn)s AND owner + 0 = %(owner)s), started AS (
    UPDATE {{s}}.turns SET state = 'running', started_at = %(now)s, segment = least(segment, {SEGMENT})
    FROM own WHERE turns.key = own.key AND own.state = 'queued'
)
SELECT true FROM own
"""
_FIND = (
    f"SELECT {TURN_COLUMNS} FROM {{s}}.turns AS t JOIN {{s}}.sessions AS s ON s.key = t.session "
    "WHERE t.id = %(turn)s AND s.id = %(session)s"
)
_GET = (
    f"SELECT {TURN_COLUMNS} "
    "FROM {s}.sessions AS s LEFT JOIN {s}.turns AS t ON t.id = %(turn)s AND t.session = s.key "
    f"WHERE s.id = %(session)s AND {_VISIBLE}"
)
_GET_WITHOUT_INPUT = _GET.replace(" t.input,", " '[]'::bytea,")
_FIND_SESSION = (
    "SELECT s.id FROM {s}.turns AS t JOIN {s}.sessions AS s ON s.key = t.session WHERE t.id = %s "
    f"AND s.deletion IS DISTINCT FROM {removals.HIDDEN}"
)
_HAS = f"""
SELECT %(parent)s::text IS NULL OR EXISTS (SELECT FROM {{s}}.turns AS t WHERE t.id = %(parent)s AND t.session = s.key)
FROM {{s}}.sessions AS s WHERE s.id = %(session)s AND {_VISIBLE}
"""
# Of turns that are not on the page no text is read.
_PAGE = f"""
SELECT {TURN_COLUMNS}, t.ordinal, t.found FROM (
    SELECT t.*, row_number() OVER (ORDER BY t.ordinal) AS n, count(*) OVER () AS found,
        sum(t.text_bytes) OVER (ORDER BY t.ordinal) AS total
    FROM (
        SELECT t.* FROM {{s}}.turns AS t WHERE t.session = (SELECT key FROM {{s}}.sessions WHERE id = %(session)s)
        AND t.ordinal > %(after)s {{which}} ORDER BY {{order}} LIMIT %(limit)s + 1
    ) AS t
) AS t WHERE t.n <= %(limit)s AND (t.n = 1 OR %(bytes_max)s::bigint IS NULL OR t.total <= %(bytes_max)s::bigint)
ORDER BY t.ordinal
"""
_PAGE_OF_ALL = _PAGE.replace("{which}", "").replace("{order}", "t.ordinal")
# The order of places is that of the ordinals, and has an index.
_PAGE_OF_CHILDREN = _PAGE.replace("{which}", "AND coalesce(t.parent, '') = %(siblings_of)s").replace(
    "{order}", "t.place"
)


class Place(msgspec.Struct, frozen=True):
    """Where in the tree of its session a turn is to be added.

    Attributes:
        chain: The chain of the turn; None if it begins one.
        chain_parent: The turn that the first turn of the chain follows.
        number: The place of the turn among its siblings.
    """

    chain: int | None = None
    depth: int = 0
    chain_parent: int | None = None
    number: int = 1

    @property
    def values(self) -> dict[str, object]:
        """The columns of the turn, by name."""
        return {
            "chain": self.chain,
            "depth": self.depth,
            "chain_parent": self.chain_parent,
            "place": self.number,
        }


def begin(
    db: Db,
    turn: TurnRecord,
    me: Me,
    now: datetime,
    *,
    head: str | None | msgspec.UnsetType = msgspec.UNSET,
    creates: SessionRecord | None = None,
    path_bytes_max: int | None | msgspec.UnsetType = msgspec.UNSET,
    key: IdempotencyKey | None = None,
    branches: bool = False,
) -> BegunTurn:
    with idempotency.checked(db, key, now):
        path: Sequence[TurnRecord] | None = None
        if creates is not None:
            rules.check_first_turn(creates, turn, head)
            kept, place = sessions.create(db, creates, now), Place()
            path = None if path_bytes_max is msgspec.UNSET else [turn]
        else:
            kept, place, path = to_follow(
                db, turn, me, now, head=head, branches=branches, path_bytes_max=path_bytes_max, begins=True
            )
        session = rules.begun(kept.record, turn, now)
        values = values_of(turn) | event_pages.values_of_events(turn, None) | place.values
        used = {
            "head": session.head,
            "open_turns": session.open_turns,
            "message_count": session.message_count,
            "last_accessed_at": moment(session.last_accessed_at),
            "expires_at": moment(session.expires_at),
        }
        db.execute(_BEGIN, values | used | {"session": kept.key, "ordinal": kept.turns, "owner": me.fence})
        idempotency.keep(db, key, session=kept.key, session_id=turn.session_id, turn=turn.id, now=now)
        return BegunTurn(session, path, Siblings(place.number, place.number))


def to_follow(
    db: Db,
    turn: TurnRecord,
    me: Me,
    now: datetime,
    *,
    head: str | None | msgspec.UnsetType,
    branches: bool,
    path_bytes_max: int | None | msgspec.UnsetType = msgspec.UNSET,
    begins: bool = False,
    **instead: str,
) -> tuple[sessions.StoredSession, Place, Sequence[TurnRecord] | None]:
    """The session of a turn that may begin, with its row locked; the turn's place; and its path, if it is asked for and
    short. Turns of an owner that is gone are recovered.

    Args:
        branches: Whether the path to the parent must have ended.
        begins: Whether the session becomes this owner's: no turn may wait for an owner.
        instead: What the caller may do if it has not.

    Raises:
        SessionNotFoundError, TurnNotFoundError, HeadMovedError, TurnInProgressError, OwnedElsewhereError,
        TurnsSuspendedError
    """
    kept, place, path = _look(db, turn, now, path_bytes_max)
    others = rules.others_of(kept.owner, besides=me.fence)
    if others is not None:
        owners.refuse_if_alive(db, others, turn.session_id)
    rules.check_head(kept.record, head)
    if begins and (others is not None or kept.owner == rules.NOBODY):
        waiting = suspensions.first_waiting(db, kept.key, others=others)
        if waiting is not None:
            raise TurnsSuspendedError(waiting)
    if others is not None:
        recovery.recover_turns_of(db, others, now, session=kept.key)
        kept, place, path = _look(db, turn, now, path_bytes_max)
    if branches and turn.parent is not None and kept.record.open_turns:
        still_open = paths.find_open(db, kept.key, turn.parent)
        if still_open is not None:
            raise TurnInProgressError(still_open, **instead)
    return kept, place, path


def _look(
    db: Db, turn: TurnRecord, now: datetime, path_bytes_max: int | None | msgspec.UnsetType
) -> tuple[sessions.StoredSession, Place, Sequence[TurnRecord] | None]:
    """Raises: SessionNotFoundError, TurnNotFoundError."""
    # Each statement sees what was committed before it began, so the second one sees the session as it was locked.
    with db.pipeline():
        locked = sessions.send_lock(db, turn.session_id)
        placed = db.execute(
            _WHERE_IS, {"session": turn.session_id, "parent": turn.parent, "siblings_of": turn.parent or ""}
        )
        path = None if path_bytes_max is msgspec.UNSET else ShortPath(db, turn, path_bytes_max)
    kept = sessions.visible_of(turn.session_id, locked, now)
    rules.check_takes_turns(kept.record)
    parent, chain, depth, chain_parent, is_ephemeral, is_taken, last_place = placed.fetchone()  # type: ignore[misc]
    if turn.parent is not None and (parent is None or is_ephemeral):
        raise TurnNotFoundError(turn.parent)
    if turn.parent is None:
        place = Place(number=last_place + 1)
    elif is_taken or turn.ephemeral:  # nothing will follow an ephemeral turn
        place = Place(None, depth + 1, parent, last_place + 1)
    else:
        place = Place(chain, depth + 1, chain_parent, last_place + 1)
    return kept, place, None if path is None else path.turns(turns_before=kept.turns)


def start(db: Db, turn_id: str, me: Me, now: datetime) -> bool:
    """Start a queued turn. Returns whether the turn is this owner's, and so open."""
    values = {"turn": turn_id, "owner": me.fence, "now": moment(now)}
    return db.execute(_START, values).fetchone() is not None


def end_all(db: Db, ends: Sequence[End], me: Me, *, leaves: bool) -> list[EndResult]:
    """Keep ends of turns. ``leaves``: this owner has suspended turns, perhaps the other open ones of these sessions."""
    first = {it.turn.id: it for it in reversed(ends)}  # two calls may tell the end of one turn
    kept = keep_ends(db, list(first.values()), owner=me.fence)
    if leaves:
        suspensions.leave_after_ends(db, {it.turn.session_id for it in first.values()}, owner=me.fence)
    ended = {turn_id for turn_id, is_kept in zip(first, kept, strict=True) if is_kept}
    return [
        EndResult.KEPT
        if it.turn.id in ended and it is first[it.turn.id]
        else rules.result_of_late_end(find(db, it.turn.session_id, it.turn.id), it.turn)
        for it in ends
    ]


def find(db: Db, session_id: str, turn_id: str) -> TurnRecord | None:
    """The turn, also if its session is marked as deleted or has expired."""
    row: Row | None = db.execute(_FIND, {"turn": turn_id, "session": session_id}).fetchone()
    return None if row is None else record_of(db, session_id, row)


def get(
    db: Db,
    session_id: str,
    turn_id: str,
    now: datetime,
    *,
    with_texts: bool = True,
    with_input: bool = True,
) -> TurnRecord:
    query = _GET if with_input else _GET_WITHOUT_INPUT
    row: Row | None = db.execute(query, {"turn": turn_id, "session": session_id, "now": moment(now)}).fetchone()
    if row is None:
        raise SessionNotFoundError(session_id)
    if row[0] is None:
        raise TurnNotFoundError(turn_id)
    return record_of(db, session_id, row, with_texts=with_texts)


def find_session_of(db: Db, turn_id: str) -> str | None:
    """The id of a turn's session; None if there is no such turn."""
    row: Row | None = db.execute(_FIND_SESSION, (turn_id,)).fetchone()
    return None if row is None else row[0]


def list_page(
    db: Db,
    session_id: str,
    *,
    limit: int,
    after: TurnPosition | None,
    now: datetime,
    bytes_max: int | None,
    parent: str | None | msgspec.UnsetType,
) -> Page[TurnRecord]:
    named = parent if isinstance(parent, str) else None
    with db.pipeline():
        has = db.execute(_HAS, {"session": session_id, "parent": named, "now": moment(now)})
        page = db.execute(
            _PAGE_OF_ALL if parent is msgspec.UNSET else _PAGE_OF_CHILDREN,
            {
                "session": session_id,
                "after": -1 if after is None else after.ordinal,
                "siblings_of": named or "",
                "limit": limit,
                "bytes_max": bytes_max,
            },
        )
    exists: Row | None = has.fetchone()
    if exists is None:
        raise SessionNotFoundError(session_id)
    if named is not None and not exists[0]:
        raise TurnNotFoundError(named)
    rows: list[Row] = page.fetchall()
    cursors = tuple(encode_cursor(TurnPosition(row[-2])) for row in rows)
    data = event_pages.records_of(db, session_id, [row[: COLUMNS + 1] for row in rows])
    has_next = bool(rows) and len(rows) < rows[0][-1]
    return Page(data=tuple(data), next=cursors[-1] if has_next else None, cursors=cursors)
