"""The calls in a streamed reply, from pieces that servers number and name in different ways.

OpenAI opens a call with an index, an id and a name; later pieces have the index and more of the arguments. Other
servers were seen to

- leave out the index (Gemini, proxies), also with each of several calls in a chunk of its own;
- send all calls of a reply under index 0 (Gemini, Dynamo), each with another id;
- leave out the id (Ollama), repeat it with each piece (LiteLLM), or send another id with each piece (older vLLM);
- repeat the name, or send it empty, with each piece; send the id first and the name later;
- send a whole call at once, its arguments as a text or as an object;
- send ``{}`` as a placeholder before the arguments (Bedrock, Gemini).
"""

import re
from collections.abc import Sequence

import msgspec

from service.errors import ModelError
from service.ids import new_call_id
from service.models.chat_chunks import CallDelta, join_surrogates
from service.models.client import ArgumentsDelta, CallOpened, ModelEvent

CALLS_MAX = 1024
"""Bound on the calls of one reply, and on their places. Model servers take at most some hundred functions."""
_ID = re.compile(r"[\x21-\x7e]{1,16384}")
"""A server's id that can be kept, sent back and shown. The longest have a signature in them."""
_PLACEHOLDER = "{}"
_PIECE_BYTES = 32
"""What a piece of arguments counts beside its text while it is held. Its JSON has more bytes than this."""
_STRUCTURE = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)


class ReplyCalls:
    """The calls of one reply.

    A piece that has no event yet counts against no bound of its turn, so such pieces are bounded here.

    Args:
        held_bytes_max: Bound on the parts of calls that are held in no event: the arguments of calls without a name,
            ids that cannot be used. Counted in characters, and 32 more for each piece of arguments.
    """

    def __init__(self, *, held_bytes_max: int) -> None:
        self._held_bytes_max = held_bytes_max
        self._held_bytes = 0
        self.opened = 0
        """How many calls have an opening event."""
        self._calls: list[_Call] = []
        self._at: dict[int, _Call] = {}  # the last call at each index
        self._named: dict[str, _Call] = {}  # by the first id that the server sent for the call
        self._ids: set[str] | None = None

    def take(self, deltas: Sequence[CallDelta], events: list[ModelEvent]) -> None:
        """Add the events of a chunk's pieces of calls. A piece may have no event yet.

        Raises:
            ModelError: The server sends more than a reply may have (``upstream_protocol``).
        """
        for position, delta in enumerate(deltas):
            index = _index(delta.index)
            place = position if index is None and len(deltas) > 1 else index
            call = self._find(delta, index, place)
            if call is None or call.is_ended_by(delta):
                call = _Call()
                self._calls.append(call)
            if place is not None:
                self._at[place] = call
            held_before = call.held_bytes
            call.add(delta)
            if delta.id and delta.id == call.id:  # a server may send another id with each piece
                self._named[delta.id] = call
            self._emit(call, events)
            self._held_bytes += call.held_bytes - held_before
            self._check()

    def end(self, events: list[ModelEvent]) -> None:
        """Add the events that were held back, because the reply is whole."""
        for call in self._calls:
            self._emit(call, events, at_end=True)

    def _check(self) -> None:
        if len(self._calls) > CALLS_MAX or len(self._at) > CALLS_MAX:
            raise ModelError("upstream_protocol", f"The model server sent more than {CALLS_MAX} calls in one reply.")
        if self._held_bytes > self._held_bytes_max:
            raise ModelError(
                "upstream_protocol",
                f"The model server sent more than {self._held_bytes_max} bytes of calls "
                "without the names of their functions, or of ids that cannot be used.",
            )

    def _find(self, delta: CallDelta, index: int | None, place: int | None) -> "_Call | None":
        """The call at the place of a piece; None if there is none."""
        if index is None and delta.id in self._named:
            return self._named[delta.id]
        if place is not None:
            return self._at.get(place)
        return self._calls[-1] if self._calls else None

    def _emit(self, call: "_Call", events: list[ModelEvent], *, at_end: bool = False) -> None:
        if call.number is None:
            if not call.name:
                return  # the name is still to come
            ids = self._ids = self._ids or set()
            call_id = call.id if _ID.fullmatch(call.id) and call.id not in ids else new_call_id()
            ids.add(call_id)
            call.number = self.opened
            self.opened += 1
            events.append(CallOpened(call.number, call_id, call.name, call.upstream))
            call.held_bytes -= len(call.upstream) + (len(call.id) if call_id == call.id else 0)
        if text := call.take_arguments(with_placeholder=at_end):
            events.append(ArgumentsDelta(call.number, text))


class _Call:
    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.upstream = ""
        self.number: int | None = None  # once it has an opening event
        self.held_bytes = 0
        """The size of the call's parts that are in no event."""
        self._new: list[str] = []  # arguments that are in no event yet
        self._half = ""  # the first of two surrogates, if the second comes with the next piece
        self._has_begun = False
        self._unread: list[str] = []  # arguments that were not looked at for the end of the object
        self._end = _ObjectEnd()

    def is_ended_by(self, delta: CallDelta) -> bool:
        """Whether this piece, at the same place, begins another call."""
        function = delta.function
        name = function.name if function is not None else None
        if not name:
            return False
        if delta.id and self.id:
            return delta.id != self.id
        if not self.name:
            return False
        return name != self.name or bool(function is not None and function.arguments and self._is_whole())

    def add(self, delta: CallDelta) -> None:
        function = delta.function
        if delta.id and not self.id:
            self.id = delta.id
            self.held_bytes += len(self.id)
        if delta.extra_content is not None and not self.upstream and self.number is None:
            self.upstream = f'{{"extra_content":{bytes(delta.extra_content).decode()}}}'
            self.held_bytes += len(self.upstream)
        if function is None or (function.name and self.name and self._is_whole()):
            return  # the server repeats the whole call
        self.name = self.name or join_surrogates(function.name or "")
        arguments = function.arguments
        if not arguments and arguments != {}:
            return
        text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        if self._is_placeholder():
            self._take_new()
        text = self._joined(text)
        self._new.append(text)
        self.held_bytes += _PIECE_BYTES + len(text)

    def take_arguments(self, *, with_placeholder: bool) -> str:
        """The arguments that are in no event yet. A placeholder waits for what follows."""
        if not self._new or (self._is_placeholder() and not with_placeholder):
            return ""
        if text := self._take_new():
            self._has_begun = True
            self._unread.append(text)
        return text

    def _is_placeholder(self) -> bool:
        """Whether the arguments so far may be only a placeholder."""
        return not self._has_begun and len(self._new) <= len(_PLACEHOLDER) and "".join(self._new) == _PLACEHOLDER

    def _take_new(self) -> str:
        text = "".join(self._new)
        self.held_bytes -= _PIECE_BYTES * len(self._new) + len(text)
        self._new.clear()
        return text

    def _joined(self, text: str) -> str:
        if text.isascii() and not self._half:
            return text
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return join_surrogates(text)

    def _is_whole(self) -> bool:
        """Whether the arguments are a whole object, so that nothing can follow."""
        for text in self._unread:
            self._end.read(text)
        self._unread.clear()
        return self._end.is_reached


class _ObjectEnd:
    """Looks for the end of a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self.is_reached = False
        self._depth = 0
        self._is_in_text = False
        self._escape = ""

    def read(self, piece: str) -> None:
        text, self._escape = self._escape + piece, ""
        for found in _STRUCTURE.finditer(text):
            mark = found[0]
            if mark == "\\":
                self._escape = mark
            elif mark == '"':
                self._is_in_text = not self._is_in_text
            elif mark[0] != "\\" and not self._is_in_text:
                self._depth += 1 if mark in "{[" else -1
                self.is_reached = self._depth == 0


def _index(said: object) -> int | None:
    if isinstance(said, bool):
        return None
    if isinstance(said, float) and said.is_integer():
        return int(said)
    if isinstance(said, str) and said.isdecimal() and said.isascii() and len(said) < 10:
        return int(said)
    return said if isinstance(said, int) else None
