"""Changes of a tree that have too many parts for one step: deletions, and additions of turns.

The parts are noted step by step, and then one statement changes the state of all of them for all readers. A deletion
notes turns, and items of the inputs of turns, which readers see until it is done, or the events of a turn that it
empties in the same step; an addition notes the turns that it has added, which readers see only once it is done. What a
process has noted that died or gave up is undone. Rows are changed, deleted and forgotten afterwards
(:mod:`service.storage.sqlite.reclaim`), by any process.
"""

import time
from collections.abc import Sequence
from secrets import randbits
from typing import NamedTuple

import apsw
import msgspec

from service.storage.records import TurnRecord
from service.storage.sqlite.rows import as_json

STEP_S = 0.01
"""The approximate time of one step."""

DELETING, DELETED, OVER, ADDING = 0, 1, 2, 3
"""The states. The turns of a change are hidden while it is ``DELETED`` or ``ADDING``."""
EVENTS = '""'
"""The items of a part that stands for the rows with the events of an emptied turn: no item has an empty id."""
_AT_ONCE = 256
_KEY_BITS = 62
_NO_OWNER = 0
"""The owner of a change that is done in one step."""
_BEGIN = "INSERT OR IGNORE INTO tree_changes (key, state, owner) VALUES (?, ?, ?)"
_NOTE = "INSERT INTO changed_parts (change, turn, items) VALUES (?, ?, ?)"
_SET = "UPDATE tree_changes SET state = ? WHERE key = ?"
_GIVE_UP = (
    f"UPDATE tree_changes SET state = iif(state = {ADDING}, {DELETED}, {OVER}) "
    f"WHERE state IN ({DELETING}, {ADDING}) AND {{which}} = ?"
)
_HAS_TURN = "SELECT 1 FROM changed_parts WHERE change = ? AND turn = ?"
_KEEP_INPUT = "UPDATE turns SET input = ?, message_items = ?, message_bytes = ? WHERE key = ?"


class Part(NamedTuple):
    """A part: a turn by its key; or some items of its input, whose ids are in a JSON list without brackets; or the rows
    with its events (:data:`EVENTS`), which no reader looks at any more.
    """

    turn: int
    items: str | None = None

    @classmethod
    def of_items(cls, turn: int, item_ids: Sequence[str]) -> "Part":
        return cls(turn, as_json(item_ids)[1:-1])


class Progress(msgspec.Struct, frozen=True):
    """The progress of a change.

    Attributes:
        noted: How many of its parts are noted.
        is_done: Whether it is done; False if the tree has changed, so that the change begins anew; None before that.
    """

    noted: int = 0
    is_done: bool | None = None


def new_key() -> int:
    """A key for a change, known before its first step: the outcome of a step may stay unknown."""
    return randbits(_KEY_BITS)


def note_some(db: apsw.Connection, change: int, parts: Sequence[Part], noted: int, *, owner: int) -> int:
    """Note further parts of a deletion, until the time of a step is over. Returns how many are noted.

    Args:
        noted: How many are noted already.
        owner: The fence of this owner.
    """
    deadline = time.monotonic() + STEP_S
    if noted == 0:
        db.execute(_BEGIN, (change, DELETING, owner))
    while noted < len(parts):
        some = parts[noted : noted + _AT_ONCE]
        db.executemany(_NOTE, ((change, *part) for part in some))
        noted += len(some)
        if time.monotonic() >= deadline:
            break
    return noted


def note_added(db: apsw.Connection, change: int, turns: Sequence[int], *, owner: int) -> None:
    """Note turns that an addition has added: they are hidden from their first moment on."""
    db.execute(_BEGIN, (change, ADDING, owner))
    db.executemany(_NOTE, ((change, turn, None) for turn in turns))


def delete_at_once(db: apsw.Connection, turn: int) -> None:
    """Delete a turn, which is out of the tree, in this step."""
    _delete_at_once(db, new_key(), Part(turn))


def delete_events_at_once(db: apsw.Connection, change: int, turn: int) -> None:
    """Delete the events of a turn that is emptied in this step. Their rows may be large."""
    _delete_at_once(db, change, Part(turn, EVENTS))


def _delete_at_once(db: apsw.Connection, change: int, part: Part) -> None:
    db.execute(_BEGIN, (change, DELETED, _NO_OWNER))
    db.execute(_NOTE, (change, *part))


def set_deleted(db: apsw.Connection, change: int) -> None:
    """Delete all noted parts: from the commit on no reader finds them."""
    db.execute(_SET, (DELETED, change))


def set_added(db: apsw.Connection, change: int) -> None:
    """Show the turns of an addition: from the commit on readers find them."""
    db.execute(_SET, (OVER, change))


def give_up(db: apsw.Connection, change: int) -> Progress:
    """Undo a change, unless it is done. Returns the progress of one that begins anew."""
    db.execute(_GIVE_UP.format(which="key"), (change,))
    return Progress(is_done=False)


def give_up_all_of(db: apsw.Connection, owner: int) -> None:
    """Undo the unfinished changes of an owner that is gone."""
    db.execute(_GIVE_UP.format(which="owner"), (owner,))


def has_turn(db: apsw.Connection, change: int, session: int, turn_id: str) -> bool:
    """Whether a turn is one of the parts."""
    key: int | None = db.execute("SELECT key FROM turns WHERE id = ? AND session = ?", (turn_id, session)).get
    return db.execute(_HAS_TURN, (change, key)).fetchone() is not None


def keep_input(db: apsw.Connection, key: int, turn: TurnRecord) -> None:
    """Write the input of a turn that has lost items; its events and its output stay as they are."""
    in_prompts = turn.in_prompts
    db.execute(_KEEP_INPUT, (as_json(turn.input), in_prompts.items, in_prompts.bytes, key))
