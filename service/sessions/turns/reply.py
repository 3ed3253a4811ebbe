"""The output of a running turn. Its texts are in the turn's event log and nowhere else."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from service.ids import reply_item_id
from service.models.client import ArgumentsDelta, CallOpened, EncryptedReasoning, ReasoningDelta, is_signature
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import Event, TurnArguments, TurnCall, TurnReasoning
from service.storage.records import Item, cut_off, utf8_length

Output = ReasoningDelta | EncryptedReasoning | CallOpened | ArgumentsDelta
"""The events of a model that are a part of an output item, other than its text."""


_ENCRYPTED_BYTES = 256
"""What encrypted reasoning takes beside its text: no event of it counts against the bound of the log."""


def size_of(told: Output) -> int:
    """The size that counts against ``reply_bytes_max``, in bytes of UTF-8. Reasoning in words counts in the log."""
    match told:
        case ReasoningDelta():
            return 0
        case ArgumentsDelta(_, text):
            return utf8_length(text)
        case CallOpened(_, call_id, name, upstream):
            return len((call_id + name + upstream).encode())
        case EncryptedReasoning(text, upstream):
            return _ENCRYPTED_BYTES + len((text + upstream).encode())


class _Growing(msgspec.Struct):
    """An output item that grows; ``begins`` is the item without its text, ``changed_at`` the seq of its last change
    but the growth of its text, or of its first event."""

    begins: Item
    changed_at: int


class Reply:
    """The items of a turn's output, in the order of their arrival. An item's index is ``item`` of its events.

    A text continues the last message, and reasoning the last reasoning, unless a call came in between. A server may
    send a text and reasoning in turns, token by token.

    Attributes:
        length: The code points of the messages so far.
        bytes: The size of the messages, the calls and the encrypted reasoning so far, in bytes of UTF-8.
        calls: The number of calls so far.
    """

    def __init__(self, log: EventLog, turn_id: str) -> None:
        self.length = 0
        self.bytes = 0
        self._log = log
        self._turn_id = turn_id
        self._items: list[_Growing] = []
        self._current: dict[Literal["message", "reasoning"], int] = {}  # the items that texts of a kind continue
        self._calls: list[int] = []  # the items of the calls
        self._restored_items = self._restored_calls = self._restored_bytes = 0

    def __repr__(self) -> str:
        return f"<Reply: {len(self._items)} items, {self.length} code points>"

    def restore(self, items: Sequence[Item]) -> None:
        """Take over the items of an earlier process, whose events are in the log: a text goes on in its message.

        Reasoning does not go on: it begins a new item. A call does not either: the model numbers its calls anew.
        """
        for index, item in enumerate(items):
            self._items.append(_Growing(msgspec.structs.replace(item, text=""), 0))
            match item.type:
                case "message":
                    self._current["message"] = index
                    self.length += len(item.text)
                    self.bytes += utf8_length(item.text)
                case "function_call":
                    self._calls.append(index)
                    self._current.clear()
                    self.bytes += size_of(CallOpened(0, item.call_id, item.name, item.upstream))
                    self.bytes += utf8_length(item.text)
            if item.encrypted:
                self.bytes += size_of(EncryptedReasoning(item.encrypted, item.upstream))
        self._restored_items, self._restored_calls, self._restored_bytes = len(items), len(self._calls), self.bytes

    @property
    def begun(self) -> bool:
        """Whether the model has sent a piece of an item, in this process."""
        return len(self._items) > self._restored_items or self.bytes > self._restored_bytes

    @property
    def calls(self) -> int:
        return len(self._calls)

    def index_of(self, kind: Literal["message", "reasoning"]) -> int:
        """The index of the item that a piece of this kind continues or begins."""
        return self._current.get(kind, len(self._items))

    def note_text(self, text: str, size: int) -> None:
        """Note a piece of a message, whose event is in the log, and whose size counts against the bound."""
        self.length += len(text)
        self.bytes += size
        if "message" not in self._current:
            self._begin_text("message")

    def event_of(self, told: Output) -> Event | None:
        """The event that tells a part of the output; None if no event tells it. Changes nothing."""
        seq = self._log.last_seq + 1
        match told:
            case ReasoningDelta(text):
                return TurnReasoning(seq=seq, item=self.index_of("reasoning"), text=text)
            case CallOpened(_, call_id, name):
                index = len(self._items)
                item_id = reply_item_id("function_call", self._turn_id, index)
                return TurnCall(seq=seq, item=index, id=item_id, call_id=call_id, name=name)
            case ArgumentsDelta(number, text):
                return TurnArguments(seq=seq, item=self._calls[self._restored_calls + number], text=text)
            case EncryptedReasoning():
                return None

    def note(self, told: Output, event: Event | None, size: int) -> None:
        """Note a part of the output, whose event is in the log, and whose size counts against the bound."""
        self.bytes += size
        match told:
            case ReasoningDelta():
                self._begin_text("reasoning")
            case CallOpened(_, call_id, name, upstream):
                assert isinstance(event, TurnCall)
                call = Item(
                    id=event.id,
                    type="function_call",
                    role="assistant",
                    text="",
                    call_id=call_id,
                    name=name,
                    upstream=upstream,
                )
                self._calls.append(len(self._items))
                self._items.append(_Growing(call, event.seq))
                self._current.clear()
            case EncryptedReasoning(text, upstream):
                self._encrypt(text, upstream)
            case ArgumentsDelta():
                pass

    def items(self, texts: Mapping[int, str] | None = None) -> tuple[Item, ...]:
        """The output so far. A call is complete if its arguments so far are a whole JSON object.

        Args:
            texts: The texts of the log, if the caller has them.
        """
        texts = self._log.texts() if texts is None else texts
        return tuple(
            cut_off(msgspec.structs.replace(growing.begins, text=texts.get(index, "")))
            for index, growing in enumerate(self._items)
        )

    def changed_after(self, seq: int) -> tuple[Item, ...]:
        """The items that began or changed after a seq, without their texts; perhaps also with it."""
        return tuple(growing.begins for growing in self._items if growing.changed_at >= seq)

    def _begin_text(self, kind: Literal["message", "reasoning"]) -> None:
        """Begin an item, unless the text continues one."""
        if kind not in self._current:
            self._current[kind] = len(self._items)
            item_id = reply_item_id(kind, self._turn_id, len(self._items))
            begins = Item(id=item_id, type=kind, role="assistant", text="")
            self._items.append(_Growing(begins, self._log.last_seq))

    def _encrypt(self, text: str, upstream: str) -> None:
        """Add encrypted reasoning to the current reasoning, or to new reasoning if that has some already."""
        self._begin_text("reasoning")
        index = self._current["reasoning"]
        if self._items[index].begins.encrypted:
            del self._current["reasoning"]
            self._begin_text("reasoning")
            index = self._current["reasoning"]
        begins = msgspec.structs.replace(self._items[index].begins, encrypted=text, upstream=upstream)
        self._items[index] = _Growing(begins, self._log.last_seq)
        if is_signature(upstream):  # what follows is not what was signed
            del self._current["reasoning"]
