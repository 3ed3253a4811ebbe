"""The steps that delete turns and items.

A deletion first looks for all that it takes with it, in short steps of a reader, and then notes and deletes the parts
(:mod:`service.storage.sqlite.tree_changes`), mostly within one transaction. If the tree changes meanwhile, the
deletion begins anew.
"""

import time
from collections.abc import Collection
from datetime import datetime

import apsw
import msgspec

from service.errors import ItemNotFoundError, TurnInProgressError, TurnNotFoundError
from service.storage import rules
from service.storage.item_json import items_of
from service.storage.pieces import pack, text_of
from service.storage.records import Item, TurnRecord, count_messages
from service.storage.sqlite import (
    documents,
    event_pages,
    reclaim,
    removals,
    sessions,
    tree_changes,
    trees,
    turns,
)
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.rows import TURN_COLUMNS, Row, input_of, values_of
from service.storage.sqlite.tree_changes import Part, Progress

RECLAIM_S = 0.005
"""The approximate time for which the last step of a deletion deletes rows itself, so that the texts of one that is not
large leave the file in its transaction. The housekeeping does the rest."""
_TAKEN = "key, id, ordinal, owner, parent, input, deleted_items, output, output_bytes IS NOT NULL"
_ROOT = f"SELECT {_TAKEN} FROM shown_turns WHERE id = ? AND session = ?"
_EMPTIED = f"{_ROOT} AND events_deleted AND ordinal < ?"
_NEWER_FIRST = (
    "SELECT id, ordinal, instr(input, :item) > 0 OR instr(output, :item) > 0 FROM shown_turns "
    "WHERE session = :session AND ordinal < :below ORDER BY ordinal DESC"
)
# ``+`` makes SQLite search by owner: the open turns of one are few.
_OPEN = f"SELECT id FROM turns WHERE owner IN ({rules.NOBODY}, ?) AND +session = ?"
_IS_OPEN = "SELECT owner IS NOT NULL FROM turns WHERE id = ? AND session = ?"
_FOUND = f"{TURN_COLUMNS}, key, ordinal"
_GET = f"SELECT {_FOUND} FROM shown_turns WHERE id = ? AND session = ?"
_EMPTY = (
    "UPDATE turns SET input = '[]', output = '[]', options = NULL, runs = ?, output_bytes = NULL, text_length = NULL, "
    "message_items = 0, message_bytes = 0 WHERE key = ?"
)
_KEPT = (*("input", "output", "runs", "output_bytes", "text_length", "message_items", "message_bytes"),)
_KEEP = f"UPDATE turns SET {', '.join(f'{name} = :{name}' for name in _KEPT)} WHERE key = :key"


class _Version(msgspec.Struct, frozen=True):
    """What changes with each deletion in a session and with each new turn, and when another session gets its key."""

    session: int
    created_at: datetime
    edits: int
    turns_begun: int


def _version_of(kept: sessions.StoredSession) -> _Version:
    return _Version(kept.key, kept.record.created_at, kept.edits, kept.turns_begun)


# Turns


class FollowersRead:
    """Finds a turn and all turns that follow it, in short steps. Anew if the tree changes meanwhile.

    Attributes:
        session_id: The session.
        turn_id: The turn.
        parts: The turns, the first one first.
        messages: How many messages they have.
        open_turn: One of them that is open, if there is one.
        parent: That of the first turn.
        ordinal: That of the first turn.
        version: The version of the tree in which they were found.
    """

    def __init__(self, session_id: str, turn_id: str, now: datetime) -> None:
        self.session_id = session_id
        self.is_complete = False
        self.parts: list[Part] = []
        self.messages = 0
        self.open_turn: str | None = None
        self.parent: str | None = None
        self.ordinal = 0
        self.version: _Version | None = None
        self.turn_id = turn_id
        self._now = now
        self._following: list[tuple[str, int]] = []
        """Turns, each with the ordinal after which its further children come."""

    def read_some(self, db: apsw.Connection) -> None:
        """Do one step. Raises: SessionNotFoundError, TurnNotFoundError."""
        kept = sessions.visible(db, self.session_id, self._now)
        if self.version != _version_of(kept):
            self._begin(db, kept)
        deadline = time.monotonic() + turns.STEP_S
        while self._following:
            parent, after = self._following.pop()
            for row in trees.children_of(db, kept.key, parent, _TAKEN, after=after):
                self._take(row)
                if time.monotonic() >= deadline:
                    self._following.append((parent, row[2]))
                    return
        self.is_complete = True

    def _begin(self, db: apsw.Connection, kept: sessions.StoredSession) -> None:
        row: Row | None = db.execute(_ROOT, (self.turn_id, kept.key)).fetchone()
        if row is None:
            raise TurnNotFoundError(self.turn_id)
        self.version = _version_of(kept)
        self.parts, self.messages, self.open_turn, self._following = [], 0, None, []
        self.ordinal, self.parent = row[2], row[4]
        self._take(row)

    def _take(self, row: Row) -> None:
        key, turn_id, _, owner, *_ = row
        self.parts.append(Part(key))
        self.messages += _count_messages(row)
        self._following.append((turn_id, -1))
        if owner is not None:
            self.open_turn = turn_id


class EndOfBranchRead(FollowersRead):
    """Finds a turn, and if none follows it the emptied turns right above it that no other turn follows.

    ``parts`` are these turns, the last one first; ``parent`` and ``ordinal`` are those of the first of them.

    Attributes:
        is_followed: Whether turns follow the turn; then the turn is the only part.
    """

    is_followed = False

    def read_some(self, db: apsw.Connection) -> None:
        kept = sessions.visible(db, self.session_id, self._now)
        if self.version != _version_of(kept):
            self._begin(db, kept)
            self.is_followed = trees.has_child(db, kept.key, self.turn_id)
        deadline = time.monotonic() + turns.STEP_S
        while not self.is_followed and self.parent is not None and self._goes_too(db, kept.key, self.parent):
            if time.monotonic() >= deadline:
                return
        self.is_complete = True

    def _goes_too(self, db: apsw.Connection, session: int, above: str) -> bool:
        """Take the next turn above, if it is emptied and nothing else follows it. Returns whether it is taken."""
        row: Row | None = db.execute(_EMPTIED, (above, session, self.ordinal)).fetchone()
        if row is None or trees.has_child(db, session, above, besides=self.ordinal):
            return False
        *_, said, deleted, replied, _ = row
        if input_of(said, deleted) or items_of(replied):
            return False
        self.ordinal, self.parent = row[2], row[4]
        self.parts.append(Part(row[0]))
        return True


def _count_messages(row: Row) -> int:
    """The messages, calls and outputs of the turn of a row with the columns ``_TAKEN``."""
    *_, said, deleted, replied, is_paged = row
    output = items_of(replied)
    if is_paged:  # the texts are elsewhere: each message has one
        output = tuple(msgspec.structs.replace(item, text="…") for item in output)
    return count_messages(input_of(said, deleted)) + count_messages(output)


def delete_turn(
    db: apsw.Connection,
    *,
    read: EndOfBranchRead,
    change: int,
    progress: Progress,
    owners: Ownership,
    now: datetime,
    session_revisions: Collection[str],
) -> Progress:
    """Do one step of the deletion of one turn. Where turns follow it there is one step, which empties it.

    The turn may be very large. So this step reads none of it, and leaves rows with its events to the housekeeping.
    """
    if read.is_followed:
        return _empty(db, read, change, owners, now)
    progress = delete_turns(db, read=read, change=change, progress=progress, owners=owners, now=now)
    if progress.is_done and session_revisions:
        kept = sessions.visible(db, read.session_id, now)
        if rules.revision_of(kept.record) in session_revisions and not trees.has_turns(db, kept.key):
            removals.hide(db, kept.key)
    return progress


def _empty(db: apsw.Connection, read: EndOfBranchRead, change: int, owners: Ownership, now: datetime) -> Progress:
    kept = sessions.visible(db, read.session_id, now)
    if sessions.settle(db, kept, owners, now) or read.version != _version_of(kept):
        return tree_changes.give_up(db, change)
    if still_open := _open_follower(db, kept, read.turn_id, read.ordinal, owners.fence):
        raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
    # The turn has ended since, so that its messages are not counted; or an ephemeral one that followed it has ended.
    if read.open_turn is not None or not trees.has_child(db, kept.key, read.turn_id):
        return tree_changes.give_up(db, change)
    key = read.parts[0].turn
    event_pages.note_deleted(db, key)
    db.execute(_EMPTY, (pack(rules.events_at_once(())), key))
    documents.change_turn(db, key, kept.key, ())
    _note(db, kept, messages=read.messages, head=kept.record.head)
    if event_pages.has_rows(db, key):
        tree_changes.delete_events_at_once(db, change, key)
        _reclaim_some(db, change)
    return Progress(is_done=True)


def delete_turns(
    db: apsw.Connection,
    *,
    read: FollowersRead,
    change: int,
    progress: Progress,
    owners: Ownership,
    now: datetime,
) -> Progress:
    """Do one step of the deletion of the turns that a read has found."""
    kept = sessions.visible(db, read.session_id, now)
    if sessions.settle(db, kept, owners, now) or read.version != _version_of(kept):
        return tree_changes.give_up(db, change)
    if read.open_turn is not None:
        if db.execute(_IS_OPEN, (read.open_turn, kept.key)).get:
            raise TurnInProgressError(read.open_turn, instead=rules.INSTEAD_OF_DELETING)
        return tree_changes.give_up(db, change)
    noted = tree_changes.note_some(db, change, read.parts, progress.noted, owner=owners.fence)
    if noted < len(read.parts):
        return Progress(noted)
    tree_changes.set_deleted(db, change)
    trees.remove(db, kept.key, read.parent, read.ordinal)
    head = kept.record.head
    if head is not None and tree_changes.has_turn(db, change, kept.key, head):
        head = read.parent
    _note(db, kept, messages=read.messages, head=head)
    _reclaim_some(db, change)
    return Progress(noted, is_done=True)


def _reclaim_some(db: apsw.Connection, change: int) -> None:
    if RECLAIM_S:
        reclaim.finish_change(db, change, tree_changes.DELETED, deadline=time.monotonic() + RECLAIM_S)


# Items


class ItemSearch:
    """Searches the turn of an item in short steps, from the newest turn on; then, if wanted, the outputs of a call.

    Attributes:
        session_id: The session.
        turn: The turn, once the search is complete; None if no turn has the item.
        answers: The outputs of the call, if the item is one.
        messages: How many messages these are.
        version: The version of the tree when the search was complete.
    """

    def __init__(self, session_id: str, item_id: str, now: datetime, *, with_answers: bool = True) -> None:
        self.session_id = session_id
        self.item_id = item_id
        self._with_answers = with_answers
        self.is_complete = False
        self.turn: TurnRecord | None = None
        self.answers: list[Part] = []
        self.messages = 0
        self.version: _Version | None = None
        self._now = now
        self._below = 1 << 62
        self._call: Item | None = None
        self._following: list[tuple[str, int]] = []
        """Turns, each with the ordinal after which its further children come."""

    def read_some(self, db: apsw.Connection) -> None:
        """Do one step. Raises: SessionNotFoundError."""
        kept = sessions.visible(db, self.session_id, self._now)
        version, self.version = self.version, _version_of(kept)
        if self._call is not None and version != self.version:
            self._begin_anew()
        if self._call is None:
            self._search(db, kept)
        else:
            self._find_answers(db, kept, self._call)

    def _begin_anew(self) -> None:
        self.turn, self._call, self._below = None, None, 1 << 62
        self.answers, self.messages, self._following = [], 0, []

    def _search(self, db: apsw.Connection, kept: sessions.StoredSession) -> None:
        deadline = time.monotonic() + turns.STEP_S
        values = {"item": f'"{self.item_id}"', "session": kept.key, "below": self._below}
        for turn_id, ordinal, may_have_it in db.execute(_NEWER_FIRST, values):
            found = _find(db, self.session_id, kept.key, turn_id) if may_have_it else None
            item = None if found is None else found.turn.find_item(self.item_id)
            if found is not None and item is not None:
                self.turn = found.turn
                if item.type == "function_call" and self._with_answers:
                    self._call, self._following = item, [(turn_id, -1)]
                    return
                break
            self._below = ordinal
            if time.monotonic() >= deadline:
                return
        self.is_complete = True

    def _find_answers(self, db: apsw.Connection, kept: sessions.StoredSession, call: Item) -> None:
        """Look for the outputs of a call in the turns that follow, up to the first turn with a reply on each branch."""
        deadline = time.monotonic() + turns.STEP_S
        while self._following:
            parent, after = self._following.pop()
            for row in trees.children_of(db, kept.key, parent, _FOUND, after=after):
                *_, key, ordinal = row
                child = event_pages.record_of(db, self.session_id, row[:-2])
                if outputs := rules.answers_to(call, child):
                    self.answers.append(Part.of_items(key, outputs))
                    self.messages += child.message_count - rules.without_items(child, outputs).message_count
                if not child.has_reply:
                    self._following.append((child.id, -1))
                if time.monotonic() >= deadline:
                    self._following.append((parent, ordinal))
                    return
        self.is_complete = True


def delete_item(
    db: apsw.Connection,
    *,
    search: ItemSearch,
    terms: Collection[str],
    change: int,
    progress: Progress,
    owners: Ownership,
    now: datetime,
) -> Progress:
    """Do one step of the deletion of an item that a search has found.

    Args:
        terms: Those of the turn without the item.
    """
    session_id = search.session_id
    kept = sessions.visible(db, session_id, now)
    if sessions.settle(db, kept, owners, now):
        return tree_changes.give_up(db, change)
    if search.turn is None:
        raise ItemNotFoundError(search.item_id)
    found = _find(db, session_id, kept.key, search.turn.id)
    item = search.turn.find_item(search.item_id)
    if search.version != _version_of(kept) or found is None or item is None:
        return tree_changes.give_up(db, change)
    if still_open := _open_follower(db, kept, found.turn.id, found.ordinal, owners.fence):
        raise TurnInProgressError(still_open, instead=rules.INSTEAD_OF_DELETING)
    if found.turn != search.turn:  # it has ended since, and the terms are not its own
        return tree_changes.give_up(db, change)
    noted = progress.noted
    if search.answers:
        noted = tree_changes.note_some(db, change, search.answers, noted, owner=owners.fence)
        if noted < len(search.answers):
            return Progress(noted)
        tree_changes.set_deleted(db, change)
    messages = search.messages + _delete_from(db, found, [item.id])
    if item.type == "message":
        documents.change_turn(db, found.key, kept.key, terms)
    _note(db, kept, messages=messages, head=kept.record.head)
    if search.answers:
        _reclaim_some(db, change)
    return Progress(noted, is_done=True)


class _Found(msgspec.Struct, frozen=True):
    turn: TurnRecord
    key: int
    ordinal: int


def _find(db: apsw.Connection, session_id: str, session: int, turn_id: str) -> _Found | None:
    row: Row | None = db.execute(_GET, (turn_id, session)).fetchone()
    return None if row is None else _Found(event_pages.record_of(db, session_id, row[:-2]), row[-2], row[-1])


def _open_follower(
    db: apsw.Connection, kept: sessions.StoredSession, turn_id: str, ordinal: int, fence: int
) -> str | None:
    """An open turn that is this turn or follows it. One whose path is long counts as a follower."""
    looked_at = 0
    rows: list[Row] = db.execute(_OPEN, (fence, kept.key)).fetchall() if kept.record.open_turns else []
    for (open_id,) in rows:
        for row in turns.path_down(db, kept.key, open_id, "id, parent"):
            looked_at += 1
            if row[0] == turn_id or looked_at > rules.PATHS_LOOKED_AT_MAX:
                return str(open_id)
            if row[-2] < ordinal:
                break
    return None


def _delete_from(db: apsw.Connection, found: _Found, item_ids: Collection[str]) -> int:
    """Delete items of an ended turn. Returns how many messages there are less."""
    turn = rules.without_items(found.turn, item_ids)
    values = values_of(turn)
    if turn.events_deleted:
        runs = rules.events_at_once(turn.output)
        values |= event_pages.end_columns(turn, runs)
        event_pages.drop_all(db, found.key)
        if not values["runs"]:
            text = text_of(runs, [item.text for item in turn.output])
            event_pages.keep(db, found.key, runs, text, after=0)
        db.execute(_KEEP, {name: values[name] for name in _KEPT} | {"key": found.key})
    else:  # the events and the output stay as they are
        tree_changes.keep_input(db, found.key, turn)
    return found.turn.message_count - turn.message_count


def _note(db: apsw.Connection, kept: sessions.StoredSession, *, messages: int, head: str | None) -> None:
    session = rules.with_deleted(kept.record, messages=messages, head=head)
    db.execute(
        "UPDATE sessions SET head = ?, message_count = ?, edits = edits + 1 WHERE key = ?",
        (session.head, session.message_count, kept.key),
    )
