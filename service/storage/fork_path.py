"""The turns that a fork copies, and their copies: the same rules for every store."""

from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from service.errors import InvalidRequestError, TurnInProgressError
from service.ids import new_item_id, new_turn_id
from service.storage.records import Item, SessionRecord, TurnRecord
from service.storage.rules import Counts, counts_of_begin, counts_of_end, used, with_counts

TURNS_MAX = 10_000
"""How many turns one fork copies at most."""
BYTES_MAX = 64 * 1024 * 1024
"""The messages and events that one fork copies at most."""


class ForkPath:
    """The path that a fork copies, collected from its last turn to the root.

    Attributes:
        turns: The turns, the last one first.
        counts: What these turns add to the counts and totals of a session.
    """

    def __init__(self) -> None:
        self.turns: list[TurnRecord] = []
        self.counts = Counts()
        self._bytes = 0

    def add(self, turn: TurnRecord, *, events_bytes: int) -> None:
        """Add a turn. Raises: TurnInProgressError: The turn is open. InvalidRequestError: The path is too large."""
        if turn.is_open:
            raise TurnInProgressError(turn.id, instead="fork at a turn that has ended")
        self.turns.append(turn)
        self.counts += counts_of_begin(turn)
        self.counts += counts_of_end(turn)
        self._bytes += turn.message_bytes + events_bytes
        if len(self.turns) > TURNS_MAX or self._bytes > BYTES_MAX:
            raise InvalidRequestError(
                f"The turns up to this one are too much to copy: more than {TURNS_MAX}, or than {BYTES_MAX} bytes with "
                "their events; fork at an earlier one.",
                field="at",
            )


def copies_of(path: ForkPath, *, copy_id: str) -> Iterator[TurnRecord]:
    """Copies of the turns of ``path``, root first, some 30 microseconds each.

    The copies and their items have new ids; all other fields stay.
    """
    parent = None
    for turn in reversed(path.turns):
        copied = msgspec.structs.replace(
            turn,
            id=new_turn_id(),
            session_id=copy_id,
            parent=parent,
            input=_copied(turn.input),
            output=_copied(turn.output),
        )
        yield copied
        parent = copied.id


def forked_session(
    source: SessionRecord, path: ForkPath, *, head: str | None, copy_id: str, now: datetime
) -> SessionRecord:
    """A new session with the settings of ``source`` and the copies of ``path``; ``head`` is the last copy."""
    session = msgspec.structs.replace(source, id=copy_id, created_at=now, head=head)
    return with_counts(used(session, now), path.counts)


def _copied(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(msgspec.structs.replace(item, id=new_item_id(item.type)) for item in items)
