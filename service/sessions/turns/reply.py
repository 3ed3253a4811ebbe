"""The output of a running turn. Its texts are in the turn's event log and nowhere else."""

from typing import Literal

import msgspec

from service.ids import new_message_id
from service.sessions.events.event_log import EventLog
from service.storage.records import Item


class _Growing(msgspec.Struct):
    """An output item that grows."""

    id: str
    type: Literal["message", "reasoning"]


class Reply:
    """The items of a turn's output, in the order of their arrival. An item's index is ``item`` of its events.

    Attributes:
        length: The code points of the message so far.
        bytes: The same in bytes of UTF-8.
    """

    def __init__(self, log: EventLog) -> None:
        self.length = 0
        self.bytes = 0
        self._log = log
        self._items: list[_Growing] = []

    def __repr__(self) -> str:
        return f"<Reply: {len(self._items)} items, {self.length} code points>"

    @property
    def begun(self) -> bool:
        """Whether the model has sent a piece of an item."""
        return bool(self._items)

    def index_of(self, kind: Literal["message", "reasoning"]) -> int:
        """The index of the item of a kind, for the next piece; the item begins with its first piece."""
        for index, item in enumerate(self._items):
            if item.type == kind:
                return index
        return len(self._items)

    def note_piece(self, item: int, kind: Literal["message", "reasoning"], text: str, *, size: int = 0) -> None:
        """Note a piece that was appended to the log."""
        if item == len(self._items):
            self._items.append(_Growing(id=new_message_id(), type=kind))
        if kind == "message":
            self.length += len(text)
            self.bytes += size

    def items(self, *, after: int = 0) -> tuple[Item, ...]:
        """The output with the texts of the events after a seq; without the items that these events do not touch."""
        return tuple(
            Item(id=self._items[index].id, type=self._items[index].type, role="assistant", text=text)
            for index, text in sorted(self._log.texts(after=after).items())
            if text
        )
