"""The steps that delete turns and items, each within a transaction.

A deletion of turns gives their rows, without their texts, to a session that is removed already. So no query finds them,
and what they have in other tables is reclaimed with that session, in short steps.
"""

import time
from collections.abc import Collection, Iterator
from datetime import datetime

import apsw
import msgspec

from service.errors import ItemNotFoundError, TurnInProgressError, TurnNotFoundError
from service.storage import rules
from service.storage.pieces import text_of
from service.storage.records import Item, TurnRecord, count_messages
from service.storage.sqlite import documents, event_pages, idempotency, recovery, sessions, trees, turns
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.rows import TURN_COLUMNS, Row, items_of, values_of

_FOLLOWERS = (
    "WITH RECURSIVE found (key, id) AS (SELECT key, id FROM turns WHERE id = :turn AND session = :session "
    "UNION ALL SELECT turns.key, turns.id FROM found CROSS JOIN turns "
    "ON session = :session AND coalesce(parent, '') = found.id) SELECT key FROM found LIMIT :limit"
)
_ROW = (
    "SELECT id, ordinal, parent, owner, input, output, output_bytes IS NOT NULL, "
    "octet_length(input) + octet_length(output) + coalesce(output_bytes, 0) FROM turns WHERE key = ?"
)
_HIDE = (
    "UPDATE turns SET session = :hidden, parent = NULL, input = '[]', output = '[]', runs = NULL, options = NULL, "
    "error = NULL WHERE key = :key"
)
_NEWER_FIRST = (
    "SELECT id, ordinal, instr(input, :item) > 0 OR instr(output, :item) > 0 FROM turns "
    "WHERE session = :session AND ordinal < :below ORDER BY ordinal DESC"
)
_OPEN = "SELECT id FROM turns WHERE owner = ? AND session = ?"
_GET = f"SELECT {TURN_COLUMNS}, key, ordinal FROM turns WHERE id = ? AND session = ?"
_CHILDREN = f"SELECT id FROM turns WHERE {trees.CHILDREN}"
_KEPT = (
    *("input", "output", "runs", "output_bytes", "text_length", "message_items", "message_bytes", "events_deleted"),
)
_KEEP = f"UPDATE turns SET {', '.join(f'{name} = :{name}' for name in _KEPT)} WHERE key = :key"


class _Follower(msgspec.Struct, frozen=True):
    """A turn that is to be deleted."""

    key: int
    id: str
    ordinal: int
    parent: str | None
    owner: int | None
    messages: int


def delete_turns(db: apsw.Connection, session_id: str, turn_id: str, owners: Ownership, now: datetime) -> None:
    kept = sessions.visible(db, session_id, now)
    gone_owner = _check_owner(db, kept, owners)
    followers = list(_followers(db, kept.key, turn_id))
    for turn in followers:
        if turn.owner is not None and gone_owner is None:
            raise TurnInProgressError(turn.id, instead=rules.INSTEAD_OF_DELETING)
    if gone_owner is not None:
        recovery.end_turns_of(db, gone_owner, now, session=kept.key)
        kept = sessions.visible(db, session_id, now)
        followers = list(_followers(db, kept.key, turn_id))
    hidden = sessions.insert_removed(db, now)
    trees.remove(db, kept.key, [(turn.id, turn.parent, turn.ordinal) for turn in followers])
    for turn in followers:
        documents.forget_turn(db, turn.key)
        idempotency.move(db, turn.id, kept.key, hidden)
        db.execute(_HIDE, {"hidden": hidden, "key": turn.key})
    head = kept.record.head
    _note(
        db,
        kept,
        messages=sum(turn.messages for turn in followers),
        head=followers[0].parent if head in {turn.id for turn in followers} else head,
    )


def _check_owner(db: apsw.Connection, kept: sessions.StoredSession, owners: Ownership) -> int | None:
    """The owner of the session's open turns, if it is gone. Raises: OwnedElsewhereError, if it lives."""
    if kept.owner in (None, owners.fence):
        return None
    recovery.refuse_if_alive(db, kept.owner, owners, kept.record.id)
    return kept.owner


def _followers(db: apsw.Connection, session: int, turn_id: str) -> Iterator[_Follower]:
    """A turn and all that follow it. Raises: TurnNotFoundError, TooManyTurnsError."""
    limit = rules.DELETED_TURNS_MAX + 1
    keys: list[Row] = db.execute(_FOLLOWERS, {"turn": turn_id, "session": session, "limit": limit}).fetchall()
    if not keys:
        raise TurnNotFoundError(turn_id)
    size = 0
    for number, (key,) in enumerate(keys, 1):
        row: Row = db.execute(_ROW, (key,)).fetchone()  # type: ignore[assignment]
        name, ordinal, parent, owner, said, replied, is_paged, row_bytes = row
        size += row_bytes
        rules.check_size_of_deletion(turn_id, turns=number, size=size)
        output = items_of(replied)
        if is_paged:  # the texts are elsewhere: each message has one
            output = tuple(msgspec.structs.replace(item, text="…") for item in output)
        messages = count_messages(items_of(said)) + count_messages(output)
        yield _Follower(key, name, ordinal, parent, owner, messages)


class ItemSearch:
    """Searches the turn of an item in short steps, from the newest turn on.

    Attributes:
        turn: The turn, once the search is complete; None if no turn has the item.
        edits: How often something was deleted from the session when the search was complete.
    """

    def __init__(self, session_id: str, item_id: str, now: datetime) -> None:
        self.session_id = session_id
        self.item_id = item_id
        self.turn: TurnRecord | None = None
        self.edits = 0
        self.is_complete = False
        self._now = now
        self._below = 1 << 62

    def read_some(self, db: apsw.Connection) -> None:
        """Do one step. Raises: SessionNotFoundError."""
        session = sessions.visible(db, self.session_id, self._now)
        self.edits = session.edits
        deadline = time.monotonic() + turns.STEP_S
        values = {"item": f'"{self.item_id}"', "session": session.key, "below": self._below}
        for turn_id, ordinal, may_have_it in db.execute(_NEWER_FIRST, values):
            found = _find(db, self.session_id, session.key, turn_id) if may_have_it else None
            if found is not None and found.turn.find_item(self.item_id) is not None:
                self.turn = found.turn
                break
            self._below = ordinal
            if time.monotonic() >= deadline:
                return
        self.is_complete = True


def delete_item(
    db: apsw.Connection, *, search: ItemSearch, terms: Collection[str], owners: Ownership, now: datetime
) -> bool:
    """Delete an item that a search has found. False if the turn, or its session, has changed: the search begins anew.

    Args:
        terms: Those of the turn without the item.
    """
    session_id = search.session_id
    kept = sessions.visible(db, session_id, now)
    gone_owner = _check_owner(db, kept, owners)
    if search.turn is None:
        raise ItemNotFoundError(search.item_id)
    found = _find(db, session_id, kept.key, search.turn.id)
    item = search.turn.find_item(search.item_id)
    if kept.edits != search.edits or found is None or item is None:
        return False
    if gone_owner is not None:
        recovery.end_turns_of(db, gone_owner, now, session=kept.key)
        kept = sessions.visible(db, session_id, now)
        found = _find(db, session_id, kept.key, search.turn.id)
    elif still_open := _open_follower(db, kept, found, owners.fence):
        raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
    if found is None or found.turn != search.turn:  # it has ended since, and the terms are not its own
        return False
    changes: list[tuple[_Found, Collection[str]]] = [(found, [item.id])]
    if item.type == "function_call":
        changes += _answers(db, session_id, kept.key, found.turn, item)
    messages = sum(_delete_from(db, it, item_ids) for it, item_ids in changes)
    if item.type == "message":
        documents.change_turn(db, found.key, kept.key, terms)
    _note(db, kept, messages=messages, head=kept.record.head)
    return True


class _Found(msgspec.Struct, frozen=True):
    turn: TurnRecord
    key: int
    ordinal: int


def _find(db: apsw.Connection, session_id: str, session: int, turn_id: str) -> _Found | None:
    row: Row | None = db.execute(_GET, (turn_id, session)).fetchone()
    return None if row is None else _Found(event_pages.record_of(db, session_id, row[:-2]), row[-2], row[-1])


def _open_follower(db: apsw.Connection, kept: sessions.StoredSession, found: _Found, fence: int) -> str | None:
    """An open turn that is this turn or follows it. One whose path is long counts as a follower."""
    looked_at = 0
    rows: list[Row] = db.execute(_OPEN, (fence, kept.key)).fetchall() if kept.record.open_turns else []
    for (open_id,) in rows:
        for row in turns.path_down(db, kept.key, open_id, "id, parent"):
            looked_at += 1
            if row[0] == found.turn.id or looked_at > rules.PATHS_LOOKED_AT_MAX:
                return str(open_id)
            if row[-2] < found.ordinal:
                break
    return None


def _answers(
    db: apsw.Connection, session_id: str, session: int, turn: TurnRecord, call: Item
) -> Iterator[tuple[_Found, Collection[str]]]:
    """The outputs of a call in the turns that follow, up to the first turn with a reply on each branch.

    Raises: TooManyTurnsError.
    """
    following, looked_at = [turn.id], 0
    while following:
        parent = following.pop()
        children: list[Row] = db.execute(_CHILDREN, (session, parent)).fetchall()
        for (child_id,) in children:
            looked_at += 1
            rules.check_size_of_deletion(turn.id, turns=looked_at, size=0)
            child = _find(db, session_id, session, child_id)
            assert child is not None
            if outputs := rules.answers_to(call, child.turn):
                yield child, outputs
            if not child.turn.has_reply:
                following.append(child_id)


def _delete_from(db: apsw.Connection, found: _Found, item_ids: Collection[str]) -> int:
    """Delete items of an ended turn. Returns how many messages there are less."""
    turn = rules.without_items(found.turn, item_ids)
    values = values_of(turn)
    if turn.events_deleted:
        runs = rules.events_at_once(turn.output)
        values |= event_pages.end_columns(turn, runs)
        event_pages.drop(db, found.key)
        db.execute("DELETE FROM events WHERE turn = ?", (found.key,))
        if not values["runs"]:
            text = text_of(runs, [item.text for item in turn.output])
            event_pages.keep(db, found.key, runs, text, after=0)
        db.execute(_KEEP, {name: values[name] for name in _KEPT} | {"key": found.key})
    else:  # the events and the output stay as they are
        in_prompts = turn.in_prompts
        db.execute(
            "UPDATE turns SET input = ?, message_items = ?, message_bytes = ? WHERE key = ?",
            (values["input"], in_prompts.items, in_prompts.bytes, found.key),
        )
    return found.turn.message_count - turn.message_count


def _note(db: apsw.Connection, kept: sessions.StoredSession, *, messages: int, head: str | None) -> None:
    session = rules.with_deleted(kept.record, messages=messages, head=head)
    db.execute(
        "UPDATE sessions SET head = ?, message_count = ?, edits = edits + 1 WHERE key = ?",
        (session.head, session.message_count, kept.key),
    )
