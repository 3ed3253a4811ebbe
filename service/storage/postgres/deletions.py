"""Deletions of turns and items. Each is one transaction: readers see the tree before it or after it.

The row of the session is locked first, as by all steps that change its tree. So what a deletion finds stays as it is
until it commits.
"""

import time
from collections.abc import Collection
from datetime import datetime
from itertools import groupby

import msgspec

from service.errors import ItemNotFoundError, TurnInProgressError, TurnNotFoundError
from service.storage import rules
from service.storage.postgres import documents, event_pages, idempotency, removals, sessions, trees
from service.storage.postgres.connections import Db, Me
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import TURN_COLUMNS, values_of
from service.storage.records import Item, TurnRecord

STEP_S = 0.01
"""The approximate time of one step of a search for an item."""
_LOOKED_AT_ONCE = 500
"""The turns whose texts one statement looks through for the id of an item."""
_BYTES_AT_ONCE = 2 * 1024 * 1024
"""Bound on these texts, unless one turn has more."""
_LENGTH_MAX = 64
"""So many successive turns after a call are read at once, in the search for its outputs: at first one, because mostly
the next turn has a reply."""
_NEWEST = 1 << 62

_ROOT = "SELECT chain, depth, parent, place FROM {s}.turns WHERE id = %s AND session = %s"
_TAKEN = (
    "SELECT array_agg(key), array_agg(id), sum(messages)::bigint, min(id) FILTER (WHERE owner IS NOT NULL), "
    "bool_or(id = %(head)s) FROM unnest(%(chains)s::bigint[], %(depths)s::int[]) AS part (of_chain, from_depth) "
    "JOIN {s}.turns ON chain = of_chain AND depth >= from_depth"
)
_OF_INPUT = ("input", "message_items", "message_bytes", "messages", "text_bytes")
_OF_OUTPUT = ("output", "runs", "settings", "events_deleted", "options")
_KEY = "SELECT key FROM {s}.turns WHERE id = %s AND session = %s"
_HAS_FOLLOWER = "SELECT true FROM {s}.turns WHERE session = %s AND coalesce(parent, '') = %s LIMIT 1"
# The turns above that are emptied (TurnRecord.is_emptied), and that no other turn follows.
_END_OF_BRANCH = (
    "WITH RECURSIVE up (id, parent, n) AS ("
    "SELECT id, parent, 0 FROM {s}.turns WHERE key = %(turn)s "
    "UNION ALL SELECT above.id, above.parent, up.n + 1 FROM up JOIN {s}.turns AS above ON above.id = up.parent "
    "WHERE above.events_deleted AND above.input = '[]' AND above.output = '[]' AND NOT EXISTS ("
    "SELECT FROM {s}.turns AS other "
    "WHERE other.session = %(session)s AND coalesce(other.parent, '') = above.id AND other.id <> up.id"
    ")) SELECT id FROM up ORDER BY n DESC LIMIT 1"
)
_HAS_TURNS = "SELECT true FROM {s}.turns WHERE session = %s LIMIT 1"
_NOTE = "UPDATE {s}.sessions SET head = %s, message_count = message_count - %s, edits = edits + 1 WHERE key = %s"
_CANDIDATES = (
    "SELECT min(ordinal), array_agg(key ORDER BY ordinal DESC) "
    "FILTER (WHERE position(%(item)s::bytea IN input) > 0 OR position(%(item)s::bytea IN output) > 0) "
    "FROM (SELECT key, sum(text_bytes) OVER (ORDER BY ordinal DESC) - text_bytes AS before FROM ("
    "SELECT key, ordinal, text_bytes FROM {s}.turns "
    "WHERE session = %(session)s AND ordinal < %(below)s ORDER BY ordinal DESC LIMIT %(limit)s) AS newest) AS taken "
    "JOIN {s}.turns USING (key) WHERE before < %(bytes)s"
)
_WHERE = "SELECT chain, depth FROM {s}.turns WHERE key = %s"
_GET = f"SELECT {TURN_COLUMNS} FROM {{s}}.turns AS t WHERE t.key = %s AND t.session = %s"
_AFTER = (
    f"SELECT {TURN_COLUMNS}, t.key, t.chain, t.depth, of_part "
    "FROM unnest(%(chains)s::bigint[], %(depths)s::int[]) WITH ORDINALITY AS part (of_chain, from_depth, of_part) "
    "JOIN {s}.turns AS t ON t.chain = of_chain AND t.depth >= from_depth AND t.depth < from_depth + %(length)s "
    "ORDER BY of_part, t.depth"
)


# Turns


def delete_turns(db: Db, session_id: str, turn_id: str, me: Me, now: datetime) -> None:
    """Delete a turn and all that follow it, as :meth:`~service.storage.store.Store.delete_turns` says."""
    kept = sessions.locked(db, session_id, now)
    _settle(db, kept, turn_id, me, now)
    _delete_all(db, kept, turn_id)


def delete_turn(
    db: Db, session_id: str, turn_id: str, me: Me, now: datetime, *, session_revisions: Collection[str]
) -> None:
    """Delete a turn and none that follows it, as :meth:`~service.storage.store.Store.delete_turn` says."""
    kept = sessions.locked(db, session_id, now)
    key = _settle(db, kept, turn_id, me, now)
    if db.execute(_HAS_FOLLOWER, (kept.key, turn_id)).fetchone() is not None:
        _empty(db, kept, key, me)
        return
    last: Row = db.execute(_END_OF_BRANCH, {"turn": key, "session": kept.key}).fetchone()  # type: ignore[assignment]
    _delete_all(db, kept, last[0])
    may_go = rules.revision_of(kept.record) in session_revisions
    if may_go and db.execute(_HAS_TURNS, (kept.key,)).fetchone() is None:
        removals.remove_empty(db, [kept.key])


def _settle(db: Db, kept: sessions.StoredSession, turn_id: str, me: Me, now: datetime) -> int:
    """End what a dead owner has left open in a session whose row is locked. Returns the key of a turn.

    The rest of a deletion reads the tree after it: ephemeral turns are gone by then, and others have moved up.

    Raises:
        TurnNotFoundError: Also if the turn was an ephemeral one that is gone now.
        OwnedElsewhereError
    """
    key = _key_of(db, kept, turn_id)
    return _key_of(db, kept, turn_id) if sessions.settle(db, kept, me, now) else key


def _key_of(db: Db, kept: sessions.StoredSession, turn_id: str) -> int:
    """Raises: TurnNotFoundError."""
    found: Row | None = db.execute(_KEY, (turn_id, kept.key)).fetchone()
    if found is None:
        raise TurnNotFoundError(turn_id)
    key: int = found[0]
    return key


def _empty(db: Db, kept: sessions.StoredSession, key: int, me: Me) -> None:
    """Empty a turn that others follow. Raises: TurnInProgressError."""
    still_open = trees.find_open_follower(db, kept.key, key, owner=me.fence)
    if still_open is not None:
        raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
    turn = _find(db, kept.record.id, key, kept.key)
    assert turn is not None, "the session is locked"
    _keep(db, key, rules.emptied(turn))
    documents.change_turn(db, key, ())
    db.execute(_NOTE, (kept.record.head, turn.message_count, kept.key))


def _delete_all(db: Db, kept: sessions.StoredSession, turn_id: str) -> None:
    """Delete a turn and all that follow it, of a session that is settled. Raises: TurnInProgressError."""
    chain, depth, parent, place = db.execute(_ROOT, (turn_id, kept.key)).fetchone()  # type: ignore[misc]
    head = kept.record.head
    chains, depths = zip(*trees.Branches(db, kept.key).followers(chain, depth), strict=True)
    values = {"chains": list(chains), "depths": list(depths), "head": head}
    taken: Row = db.execute(_TAKEN, values).fetchone()  # type: ignore[assignment]
    keys, ids, messages, open_turn, has_head = taken
    if open_turn is not None:
        raise TurnInProgressError(open_turn, instead=rules.INSTEAD_OF_DELETING)
    with db.pipeline():
        idempotency.cut_off_turns(db, kept.key, ids)
        removals.remove_turns(db, keys)
        trees.move_up(db, kept.key, parent, place)
        db.execute(_NOTE, (parent if has_head else head, messages, kept.key))


# Items


class ItemSearch:
    """Searches the turn of an item in short steps, from the newest turn on.

    Attributes:
        turn: The turn, once the search is complete; None if no turn has the item.
        key: The key of the turn.
    """

    def __init__(self, session_id: str, item_id: str, now: datetime) -> None:
        self.session_id = session_id
        self.item_id = item_id
        self.is_complete = False
        self.turn: TurnRecord | None = None
        self.key = 0
        self._now = now
        self._below = _NEWEST

    def read_some(self, db: Db) -> None:
        """Do one step. Raises: SessionNotFoundError."""
        session = sessions.visible(db, self.session_id, self._now).key
        deadline = time.monotonic() + STEP_S
        while not self.is_complete:
            self._look(db, session)
            if time.monotonic() >= deadline:
                return

    def _look(self, db: Db, session: int) -> None:
        values = {
            # With its quotes, as it stands in JSON. Perhaps a text has it, too.
            "item": msgspec.json.encode(self.item_id),
            "session": session,
            "below": self._below,
            "limit": _LOOKED_AT_ONCE,
            "bytes": _BYTES_AT_ONCE,
        }
        lowest, keys = db.execute(_CANDIDATES, values).fetchone() or (None, None)
        for key in keys or ():
            turn = _find(db, self.session_id, key, session)
            if turn is not None and turn.find_item(self.item_id) is not None:
                self.turn, self.key, self.is_complete = turn, key, True
                return
        self._below = lowest
        self.is_complete = lowest is None


def delete_item(db: Db, search: ItemSearch, me: Me, now: datetime, *, terms: Collection[str]) -> bool:
    """Delete the item that a search has found. Returns whether it is done: not if the turn has changed meanwhile.

    Args:
        terms: Those of the turn without the item.

    Raises:
        SessionNotFoundError, ItemNotFoundError, TurnInProgressError, OwnedElsewhereError
    """
    kept = sessions.locked(db, search.session_id, now)
    if sessions.settle(db, kept, me, now):
        return False
    if search.turn is None:
        raise ItemNotFoundError(search.item_id)
    turn = _find(db, search.session_id, search.key, kept.key)
    item = search.turn.find_item(search.item_id)
    if turn is None or item is None:
        return False
    if kept.record.open_turns:
        still_open = trees.find_open_follower(db, kept.key, search.key, owner=me.fence)
        if still_open is not None:
            raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
    if turn != search.turn:  # it has ended since, or lost another item, and the terms are not its own
        return False
    changed = {search.key: (turn, rules.without_items(turn, [item.id]))}
    if item.type == "function_call":
        changed |= _without_answers(db, search.session_id, kept.key, search.key, item)
    for key, (_, without) in changed.items():
        _keep(db, key, without)
    if item.type == "message":
        documents.change_turn(db, search.key, terms)
    messages = sum(before.message_count - without.message_count for before, without in changed.values())
    db.execute(_NOTE, (kept.record.head, messages, kept.key))
    return True


def _without_answers(
    db: Db, session_id: str, session: int, turn: int, call: Item
) -> dict[int, tuple[TurnRecord, TurnRecord]]:
    """The turns that have outputs of a call, by their keys, as they are and without them.

    They are among the turns that follow the one of the call, up to the first turn with a reply on each branch.
    """
    found: dict[int, tuple[TurnRecord, TurnRecord]] = {}
    branches = trees.Branches(db, session)
    chain, depth = db.execute(_WHERE, (turn,)).fetchone()  # type: ignore[misc]
    parts, length = [trees.Part(chain, depth + 1), *branches.children(chain, depth)], 1
    while parts:
        chains, depths = zip(*parts, strict=True)
        values = {"chains": list(chains), "depths": list(depths), "length": length}
        rows: list[Row] = db.execute(_AFTER, values).fetchall()
        records = event_pages.records_of(db, session_id, [row[:-4] for row in rows])
        parts = []
        for _, of_part in groupby(zip(rows, records, strict=True), lambda it: it[0][-1]):
            for (*_, key, chain, depth, _), record in of_part:
                if outputs := rules.answers_to(call, record):
                    found[key] = record, rules.without_items(record, outputs)
                if record.has_reply:
                    break
                parts += branches.children(chain, depth)
            else:
                parts.append(trees.Part(chain, depth + 1))
        length = min(2 * length, _LENGTH_MAX)
    return found


def _find(db: Db, session_id: str, key: int, session: int) -> TurnRecord | None:
    row: Row | None = db.execute(_GET, (key, session)).fetchone()
    return None if row is None else event_pages.record_of(db, session_id, row)


def _keep(db: Db, key: int, turn: TurnRecord) -> None:
    """Write a turn that has lost items. Its output and its events stay if it has lost nothing of a reply."""
    values = values_of(turn)
    names: tuple[str, ...] = _OF_INPUT
    runs = rules.events_at_once(turn.output)
    if turn.events_deleted:
        names += _OF_OUTPUT
        values |= event_pages.values_of_events(turn, runs)
        event_pages.drop(db, [key])
        if values["runs"] is None:
            event_pages.add(db, [(key, turn, runs)])
    changes = ", ".join(f"{name} = %({name})s" for name in names)
    db.execute(f"UPDATE {{s}}.turns SET {changes} WHERE key = %(key)s", values | {"key": key})
