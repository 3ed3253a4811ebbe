"""The events of a response: a turn's events as OpenAI's clients read them.

A frame is ``event: TYPE`` and one line of JSON with the same ``type``; it has no ``id:``, because the position of an
event is its ``sequence_number``. See :mod:`service.api.http.face_frames` for how frames are numbered and shared.

An output item is told in full: its opening, the pieces of its text, its text as a whole and its end. A message and
reasoning may grow in turns, token by token; they end when a call opens, after which their text does not go on. Calls
may grow in turns, too; they end with the response. Encrypted reasoning has no events of its own: its item opens with
the next item after it, and has the encrypted content at its end. The reasoning that stands before a call for what the
call's server wants back (:func:`~service.api.openai.items.reasoning_before`) is no item of the turn: it opens and ends
before the call opens, and all items from the call on have an ``output_index`` that is higher by one.

The response's last event is followed by an ``error`` event if the reply was cut: the model server failed, a deadline
passed, the response was cancelled, the server stopped or crashed.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec
from msgspec import UNSET

from service.api.http.face_frames import Step, TurnSource
from service.api.http.frame_json import frame_json
from service.api.http.long_frames import LONG, whole_text
from service.api.openai.echo import Echo
from service.api.openai.failures import RESPONSE_PARAMS, EndError, end_error
from service.api.openai.ids import item_name
from service.api.openai.items import (
    OutputText,
    ReasoningText,
    ShownFunctionCall,
    ShownItem,
    ShownMessage,
    ShownReasoning,
    reasoning_before,
    shown_item,
)
from service.api.openai.response import Response, ResponseStatus, response_at_first, response_of
from service.sessions.events.events import Event, Piece, TurnCall, TurnQueued, TurnStarted
from service.storage.records import Item

DONE = b"data: [DONE]\n\n"
_CUT = {
    "message": "The stream was cut before the end of the response. If it is stored, get it, or its events after "
    "the last sequence_number.",
    "type": "server_error",
    "param": None,
    "code": "stream_cut",
}
CUT = b"data: %b\n\n" % frame_json({"error": _CUT})
"""The last frame of a stream that ends early, without a number, so that the numbers go on where it is resumed. OpenAI's
SDKs raise it; they would take an end without a terminal event for that of a whole stream."""
_TERMINAL_TYPES: Mapping[ResponseStatus, str] = {
    "completed": "response.completed",
    "failed": "response.failed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",  # it has no event of its own; the response in the event has this status
}
_HOLE = msgspec.Raw(b"@")
"""Stands where JSON that was made before goes. Within a text a quote is escaped, so ``NAME":@`` is nowhere else."""
_NO_TEXT = OutputText("")
_NO_REASONING = ReasoningText("")


class ResponseFace:
    """The face of a response. Meets :class:`~service.api.http.face_frames.Face`.

    Args:
        turn: The response's turn.
        encrypted: Whether encrypted reasoning is shown, though the request did not ask for it.
    """

    end = DONE

    def __init__(self, turn: TurnSource, *, encrypted: bool = False) -> None:
        self.turn = turn
        record = turn.record_at_first()
        self.echo = Echo.of_face(record.face)
        self.encrypted = encrypted or self.echo.encrypted
        self.key = ("response", self.encrypted)

    def __repr__(self) -> str:
        return f"<ResponseFace of {self.turn!r}>"

    def begin(self) -> "_State":
        return _State(self)


class _State(NamedTuple):
    """What has been told of a response. Meets :class:`~service.api.http.face_frames.FaceState`.

    Attributes:
        begun: Whether the response was told at all.
        opened: The number of items that were opened: those with lower indices.
        open: The indices of the opened items that have not ended.
        signed: The indices of the opened calls that have reasoning of their own before them.
        templates: By the index of an item, the frame of a piece of it, for a number and the JSON of a text.
    """

    face: ResponseFace
    begun: bool = False
    opened: int = 0
    open: tuple[int, ...] = ()
    signed: tuple[int, ...] = ()
    templates: Mapping[int, bytes] = {}

    def piece(self, event: Piece, number: int) -> bytes | None:
        template = self.templates.get(event.item)
        return None if template is None else template % (number, frame_json(event.text))

    def step(self, event: Event, number: int, gap: int) -> Step:
        told = _Telling(self, number - gap)
        if not isinstance(event, TurnQueued | TurnStarted):
            told.begin()
        before_gap = len(told.frames)
        told.number = number
        match event:
            case TurnQueued():
                told.begin("queued")
            case TurnStarted():
                told.start()
            case TurnCall():
                told.open_call(event)
            case Piece():
                told.open_text(event)
            case _:
                told.end()
        return Step(told.frames, told.state(), before_gap)


class _Telling:
    """The frames of one event, while they are made.

    Attributes:
        number: The number of the first frame that is made after the frames before a gap.
    """

    def __init__(self, state: _State, number: int) -> None:
        self.frames: list[bytes] = []
        self.number = number
        self._face = state.face
        self._begun = state.begun
        self._opened = state.opened
        self._open = list(state.open)
        self._signed = list(state.signed)
        self._templates = dict(state.templates)

    def state(self) -> _State:
        return _State(self._face, self._begun, self._opened, tuple(self._open), tuple(self._signed), self._templates)

    def begin(self, status: str = "in_progress") -> None:
        """Tell the response, unless it was told."""
        if self._begun:
            return
        self._begun = True
        record = self._face.turn.record_at_first()
        response = response_at_first(record, "queued" if status == "queued" else "in_progress")
        self._tell_response("response.created", response)
        self._tell_response("response.queued" if status == "queued" else "response.in_progress", response)

    def start(self) -> None:
        """Tell that the response is in progress."""
        if not self._begun:
            self.begin()
        else:
            record = self._face.turn.record_at_first()
            self._tell_response("response.in_progress", response_at_first(record, "in_progress"))

    def open_call(self, event: TurnCall) -> None:
        """Open a call. The texts before it end."""
        items = self._face.turn.begun_items()
        self._open_items(items[: event.item])
        self._close_texts()
        self._open_item(items[event.item])

    def open_text(self, event: Piece) -> None:
        """Open the item of a piece, and tell the piece."""
        items = self._face.turn.begun_items()
        self._open_items(items[: event.item + 1])
        if event.item not in self._templates:
            self._open_part(event.item, items[event.item])
        self.frames.append(self._templates[event.item] % (self._next_number, frame_json(event.text)))

    def end(self) -> None:
        """End all items, and the response."""
        record = self._face.turn.record()
        response = response_of(record, encrypted=self._face.encrypted)
        self._open_items(record.output)
        output = []
        rest = iter(response.output)
        for index, text in enumerate(_texts_as_json(record.output)):
            if index in self._signed:
                output.append(frame_json(next(rest)))
            shown = next(rest)
            json = _json_of_item(shown, text)
            output.append(json)
            if index in self._open:
                self._close(index, shown, text, json)
        whole = frame_json(msgspec.structs.replace(response, output=cast("Any", _HOLE)))
        self._tell(
            _TERMINAL_TYPES[response.status],
            b'"response":%b' % whole.replace(b'output":@', b'output":[%b]' % b",".join(output), 1),
        )
        if record.state != "completed":
            self._tell_error(end_error(record, params=RESPONSE_PARAMS).error)

    # Items

    def _open_items(self, items: Sequence[Item]) -> None:
        """Open those of the first items that were not opened: an item's index is its place in the output."""
        for item in items[self._opened :]:
            self._open_item(item)

    def _open_item(self, item: Item) -> None:
        index = self._opened
        if self._face.echo.encrypted and (signed := reasoning_before(item)) is not None:
            self._tell_signed(signed)
        empty = msgspec.structs.replace(item, text="", encrypted="", upstream="")
        opened = shown_item(empty, status="in_progress", namespaces=self._face.echo.namespaces)
        if isinstance(opened, ShownMessage | ShownReasoning):
            opened = msgspec.structs.replace(opened, content=())
        self._tell("response.output_item.added", b'"output_index":%d,"item":%b' % (self._at(index), frame_json(opened)))
        self._opened += 1
        self._open.append(index)
        if item.type == "message":
            self._open_part(index, item)
        elif item.type == "function_call":
            place = b'"item_id":%b,"output_index":%d' % (frame_json(item_name(item)), self._at(index))
            self._templates[index] = _template("response.function_call_arguments.delta", place)

    def _tell_signed(self, reasoning: ShownReasoning) -> None:
        """Tell the whole reasoning before the call that opens next."""
        index = self._opened
        place = self._at(index)
        self._signed.append(index)
        opened = msgspec.structs.replace(reasoning, status="in_progress", content=(), encrypted_content=UNSET)
        self._tell("response.output_item.added", b'"output_index":%d,"item":%b' % (place, frame_json(opened)))
        self._tell("response.output_item.done", b'"output_index":%d,"item":%b' % (place, frame_json(reasoning)))

    def _at(self, index: int) -> int:
        """The place of an item in the output that is shown."""
        return index + bisect_right(self._signed, index)

    def _open_part(self, index: int, item: Item) -> None:
        """Open the text of a message or of reasoning."""
        place = _place_of_part(self._at(index), item_name(item))
        is_message = item.type == "message"
        part = frame_json(_NO_TEXT if is_message else _NO_REASONING)
        self._tell("response.content_part.added", b'%b,"part":%b' % (place, part))
        if is_message:
            self._templates[index] = _template("response.output_text.delta", place, b',"logprobs":[]')
        else:
            self._templates[index] = _template("response.reasoning_text.delta", place)

    def _close_texts(self) -> None:
        """End the open messages and reasoning; what they say is whole."""
        begun = self._face.turn.begun_items()
        closing = [index for index in self._open if begun[index].type != "function_call"]
        if not closing:
            return
        is_long = self._face.turn.text_bytes_max > LONG
        items = begun if is_long else self._face.turn.record().output
        for index in closing:
            item, text = items[index], whole_text(index)
            if not is_long:
                text = frame_json(item.text)
            elif index in self._templates:  # it has a text, of which this takes the place
                item = msgspec.structs.replace(item, text="-")
            shown = shown_item(
                item, status="completed", namespaces=self._face.echo.namespaces, encrypted=self._face.encrypted
            )
            self._close(index, shown, text, _json_of_item(shown, text))

    def _close(self, index: int, shown: ShownItem, text: bytes, json: bytes) -> None:
        """End an item, whose text and which itself are given as JSON, too."""
        self._open.remove(index)
        if index in self._templates:
            for kind, body in _ends_of_text(self._at(index), shown, text):
                self._tell(kind, body)
        self._tell("response.output_item.done", b'"output_index":%d,"item":%b' % (self._at(index), json))

    # Frames

    @property
    def _next_number(self) -> int:
        return self.number + len(self.frames)

    def _tell_response(self, kind: str, response: Response) -> None:
        self._tell(kind, b'"response":%b' % frame_json(response))

    def _tell_error(self, error: EndError) -> None:
        """Tell that the reply was cut, in the forms of OpenAI and of Open Responses at once.

        OpenAI's SDKs raise the event, and with them each framework that would take the texts before it for a whole
        reply: many look at ``response.completed`` alone.
        """
        flat = b'"code":%b,"message":%b,"param":%b' % tuple(map(frame_json, (error.code, error.message, error.param)))
        self._tell("error", b'%b,"error":%b' % (flat, frame_json(error)))

    def _tell(self, kind: str, body: bytes) -> None:
        name = kind.encode()
        frame = b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (name, name, self._next_number, body)
        self.frames.append(frame)


def _texts_as_json(items: Sequence[Item]) -> list[bytes]:
    """The texts of an output as JSON; if they are long together, what stands for them in long frames."""
    if sum([len(item.text) for item in items]) <= LONG:
        return [frame_json(item.text) for item in items]
    return [whole_text(index) for index in range(len(items))]


def _template(kind: str, place: bytes, rest: bytes = b"") -> bytes:
    """The frame of a piece of a text, for a number and the JSON of the text."""
    name = kind.encode()
    return b'event: %b\ndata: {"type":"%b","sequence_number":%%d,%b,"delta":%%b%b}\n\n' % (name, name, place, rest)


def _place_of_part(index: int, name: str) -> bytes:
    return b'"item_id":%b,"output_index":%d,"content_index":0' % (frame_json(name), index)


def _ends_of_text(index: int, shown: ShownItem, text: bytes) -> Iterator[tuple[str, bytes]]:
    """The types and the fields of the events that end the text of an item."""
    if isinstance(shown, ShownFunctionCall):
        place = b'"item_id":%b,"output_index":%d' % (frame_json(shown.id), index)
        name = frame_json(shown.name)
        yield "response.function_call_arguments.done", b'%b,"name":%b,"arguments":%b' % (place, name, text)
        return
    place = _place_of_part(index, shown.id)
    if isinstance(shown, ShownMessage):
        yield "response.output_text.done", b'%b,"text":%b,"logprobs":[]' % (place, text)
        part = frame_json(OutputText(cast("str", _HOLE)))
    else:
        yield "response.reasoning_text.done", b'%b,"text":%b' % (place, text)
        part = frame_json(ReasoningText(cast("str", _HOLE)))
    yield "response.content_part.done", b'%b,"part":%b' % (place, part.replace(b'text":@', b'text":%b' % text, 1))


def _json_of_item(shown: ShownItem, text: bytes) -> bytes:
    """The JSON of an item whose text is JSON already, so that a long text is encoded once for all events with it."""
    if isinstance(shown, ShownFunctionCall):
        json = frame_json(msgspec.structs.replace(shown, arguments=cast("str", _HOLE)))
        return json.replace(b'arguments":@', b'arguments":%b' % text, 1)
    if isinstance(shown, ShownMessage | ShownReasoning) and shown.content:
        part = msgspec.structs.replace(shown.content[0], text=cast("str", _HOLE))
        json = frame_json(msgspec.structs.replace(shown, content=cast("Any", (part,))))
        return json.replace(b'text":@', b'text":%b' % text, 1)
    return frame_json(shown)
