"""The messages of a conversation, in pages: those of the turns on the path from the root to the head, oldest first."""

from collections.abc import Sequence
from datetime import datetime
from typing import Self

import msgspec

from service.errors import InvalidRequestError
from service.storage.records import Item, Page, TurnRecord

_COUNT_DIGITS_MAX = 9


class MessageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a call or the output of a call on the path from the root to the head."""

    item: Item
    turn_id: str
    created_at: datetime


class Position(msgspec.Struct, frozen=True):
    """A message position on a path: after the first ``count`` messages of a turn. As a page cursor ``turn_6f….2``."""

    turn_id: str
    count: int

    @classmethod
    def parse(cls, cursor: str) -> Self:
        """Read a page cursor. Raises: InvalidRequestError (``after``), if the cursor is not one of this listing."""
        turn_id, _, count = cursor.rpartition(".")
        if not (turn_id and count.isascii() and count.isdigit() and len(count) <= _COUNT_DIGITS_MAX):
            raise InvalidRequestError("This cursor is not one that a listing here gave out.", field="after")
        return cls(turn_id, int(count))

    def __str__(self) -> str:
        return f"{self.turn_id}.{self.count}"


def turns_needed(limit: int) -> int:
    """How many turns of the path a page needs: the page before may have shown all messages of the first turn."""
    return limit + 2


def page_of_messages(path: Sequence[TurnRecord], *, head: str | None, limit: int, skip: int) -> Page[MessageRecord]:
    """The messages of a part of the path to ``head`` as one page, without the first ``skip`` of its first turn.

    ``path`` has at least two turns, or ends at the head. The page has no message if these turns have none.
    """
    messages = [
        (message, Position(turn.id, count)) for turn in path for count, message in enumerate(messages_of(turn), 1)
    ]
    page, rest = messages[skip : skip + limit], messages[skip + limit :]
    goes_on = None
    if rest:
        _, goes_on = page[-1]
    elif path and path[-1].id != head:
        goes_on = Position(path[-1].id, len(messages_of(path[-1])))
    return Page(
        data=tuple(message for message, _ in page),
        next=str(goes_on) if goes_on else None,
        cursors=tuple(str(position) for _, position in page),
    )


def messages_of(turn: TurnRecord) -> list[MessageRecord]:
    """The messages of a turn, its calls and the outputs: the input, and the reply if the reply is not empty."""
    replied_at = turn.ended_at or turn.created_at
    items = [(item, turn.created_at) for item in turn.input] + [(item, replied_at) for item in turn.output]
    return [MessageRecord(item=item, turn_id=turn.id, created_at=at) for item, at in items if item.is_message]
