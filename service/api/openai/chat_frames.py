r"""A chat completion as JSON: whole, and as the chunks of a stream.

A stream has the role first, then texts, reasoning and calls as they arrive, then the reason of the end and ``[DONE]``.
A turn that ends in another way than as completed has no such reason, because no value of OpenAI's list says so: the
stream ends with ``data: {"error": …}``, without ``[DONE]``, and a call that waits gets an error. So no client takes a
reply that was cut off for a whole one.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from service.api.http.face_frames import TurnSource
from service.api.http.frame_json import frame_json
from service.api.openai.failures import CRASHED, end_error
from service.api.openai.signatures import extra_content_of
from service.models.client import FinishReason, Usage
from service.sessions.events.events import (
    Event,
    TurnArguments,
    TurnCall,
    TurnCompleted,
    TurnDelta,
    TurnQueued,
    TurnReasoning,
    TurnResumed,
    TurnStarted,
)
from service.storage.records import Item, TurnRecord, is_json_object

_DONE = b"data: [DONE]\n\n"
_NOTHING = b":\n\n"
"""A comment, because no frame is empty."""


class CachedTokens(msgspec.Struct, frozen=True):
    """The part of the prompt that was in a cache: ``{"cached_tokens": 64}``"""

    cached_tokens: int


class ReasoningTokens(msgspec.Struct, frozen=True):
    """The part of the reply that is reasoning: ``{"reasoning_tokens": 200}``"""

    reasoning_tokens: int


class CompletionUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the upstream counted them.

    ``{"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46, "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0}}``
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens

    @classmethod
    def of(cls, usage: Usage) -> "CompletionUsage":
        return cls(
            prompt_tokens=usage.input_tokens,
            completion_tokens=usage.output_tokens,
            total_tokens=usage.input_tokens + usage.output_tokens,
            prompt_tokens_details=CachedTokens(usage.cached_tokens or 0),
            completion_tokens_details=ReasoningTokens(usage.reasoning_tokens),
        )


class CalledFunction(msgspec.Struct, frozen=True):
    """``{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}``: the arguments as the model wrote them."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """``{"id": "call_6f…", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}``"""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    extra_content: Annotated[
        dict[str, Any] | msgspec.UnsetType, Meta(description="What the model server wants back with the call.")
    ] = msgspec.UNSET


class CompletionMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The reply: ``{"role": "assistant", "content": "Hello.", "refusal": null, "annotations": []}``

    ``content`` is null if the model only called functions.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    annotations: Annotated[tuple[str, ...], Meta(max_length=0)] = ()
    tool_calls: tuple[ToolCall, ...] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """``{"index": 0, "message": {"role": "assistant", …}, "logprobs": null, "finish_reason": "stop"}``"""

    index: int = 0
    message: CompletionMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole reply.

    ``{"id": "chatcmpl-0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19", "object": "chat.completion", "created": 1769851800,
    "model": "scripted", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello.", "refusal": null,
    "annotations": []}, "logprobs": null, "finish_reason": "stop"}], "usage": null}``
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: CompletionUsage | None = None

    @classmethod
    def of(cls, turn: TurnRecord) -> "ChatCompletion":
        """The completion of a turn that has completed."""
        assert turn.finish_reason is not None, "only a completed turn is a completion"
        calls = [item for item in turn.output if item.type == "function_call"]
        text = turn.text
        message = CompletionMessage(
            content=None if calls and not text else text,
            tool_calls=tuple(map(_tool_call, calls)) or msgspec.UNSET,
            reasoning_content=_reasoning(turn) or msgspec.UNSET,
        )
        return cls(
            id=completion_id(turn.id),
            created=int(turn.created_at.timestamp()),
            model=turn.model,
            choices=(Choice(message=message, finish_reason=turn.finish_reason),),
            usage=None if turn.usage is None else CompletionUsage.of(turn.usage),
        )


def completion_id(turn_id: str) -> str:
    """The id of a turn's completion: ``chatcmpl-`` and the hexadecimal digits of the turn's id."""
    return f"chatcmpl-{turn_id.removeprefix('turn_')}"


def _tool_call(item: Item) -> ToolCall:
    function = CalledFunction(item.name, item.text)
    return ToolCall(id=item.call_id, function=function, extra_content=extra_content_of(item))


def _reasoning(turn: TurnRecord) -> str:
    return "".join([item.text for item in turn.output if item.type == "reasoning"])


class _HeldCall(NamedTuple):
    """A call of which the client is told at the end."""

    opened: TurnCall
    arguments: list[str]


class ChunkEncoder:
    """The frames of a turn's events, for one stream: in order, and any event that was encoded may be asked for again.

    It is asked again when a stream could not write at once what it had read. So what an event does to the state is done
    once: a call keeps its number, and whether it is held, from its first frame on.

    The SDK takes a call for whole when the next one begins, though a model server may send pieces of several calls in
    turns. So a call that begins before the one before it is whole is held until the end.

    Args:
        turn: The turn of these events.
        includes_usage: Whether the last chunk has the tokens, in no choice (``stream_options.include_usage``).
    """

    def __init__(self, turn: TurnSource, *, includes_usage: bool) -> None:
        self._turn = turn
        self._includes_usage = includes_usage
        self._numbers: dict[int, int] = {}  # of the calls that the client knows, by their items
        self._call: int | None = None  # the item of the newest one of these, and its arguments so far
        self._arguments: list[str] = []
        self._held: dict[int, _HeldCall] = {}
        self._seq = 0  # of the newest piece of a call that is in the state
        record = turn.record_at_first()
        told = {
            "id": completion_id(record.id),
            "object": "chat.completion.chunk",
            "created": int(record.created_at.timestamp()),
            "model": record.model,
        }
        self._head = frame_json(told)[:-1]
        usage = b',"usage":null' if includes_usage else b""
        self._before_delta = b'%b%b,"choices":[{"index":0,"delta":' % (self._head, usage)

    def __repr__(self) -> str:
        return f"<ChunkEncoder: {len(self._numbers)} calls, {len(self._held)} held>"

    def __call__(self, event: Event) -> bytes:
        """The frames of an event. An event that a client of chat completions is not told is a comment."""
        if isinstance(event, TurnDelta):  # nearly all of them
            return self._chunk(b'{"content":%b}' % frame_json(event.text))
        match event:
            case TurnReasoning(text=text):
                return self._chunk(b'{"reasoning_content":%b}' % frame_json(text))
            case TurnArguments():
                return self._argue(event)
            case TurnCall():
                return self._open(event)
            case TurnQueued() | TurnResumed():
                return _NOTHING
            case TurnStarted():
                return self._chunk(b'{"role":"assistant","content":""}')
            case TurnCompleted():
                return self._end(event)
            case _:
                return _frame(frame_json(end_error(event)))

    def _open(self, call: TurnCall) -> bytes:
        if call.item in self._held:
            return _NOTHING
        if call.item in self._numbers:
            return self._opened(call)
        if self._held or not (self._call is None or is_json_object("".join(self._arguments))):
            self._held[call.item] = _HeldCall(call, [])
            return _NOTHING
        self._call, self._arguments = call.item, []
        return self._opened(call)

    def _argue(self, piece: TurnArguments) -> bytes:
        held = self._held.get(piece.item)
        if piece.seq > self._seq:
            self._seq = piece.seq
            if held is not None:
                held.arguments.append(piece.text)
            elif piece.item == self._call:
                self._arguments.append(piece.text)
        return self._argued(piece.item, piece.text) if held is None else _NOTHING

    def _opened(self, call: TurnCall) -> bytes:
        number = self._numbers.setdefault(call.item, len(self._numbers))
        told: dict[str, Any] = {
            "index": number,
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        extra_content = extra_content_of(self._turn.begun_items()[call.item])
        if extra_content is not msgspec.UNSET:
            told["extra_content"] = extra_content
        return self._chunk(b'{"tool_calls":[%b]}' % frame_json(told))

    def _argued(self, item: int, text: str) -> bytes:
        told = {"index": self._numbers[item], "function": {"arguments": text}}
        return self._chunk(b'{"tool_calls":[%b]}' % frame_json(told))

    def _rest(self) -> bytes:
        """The calls that were held."""
        frames = [
            self._opened(held.opened) + self._argued(item, "".join(held.arguments)) for item, held in self._held.items()
        ]
        return b"".join(frames)

    def _end(self, end: TurnCompleted) -> bytes:
        frame = self._rest() + self._chunk(b"{}", finish_reason=frame_json(end.finish_reason))
        if self._includes_usage and end.usage is not None:
            usage = frame_json(CompletionUsage.of(end.usage))
            frame += _frame(b'%b,"choices":[],"usage":%b}' % (self._head, usage))
        return frame + _DONE

    def _chunk(self, delta: bytes, *, finish_reason: bytes = b"null") -> bytes:
        return _frame(b'%b%b,"logprobs":null,"finish_reason":%b}]}' % (self._before_delta, delta, finish_reason))


def _frame(json: bytes) -> bytes:
    return b"data: %b\n\n" % json


ENDS = (_DONE, b"}}}\n\n")
"""How streams end: the last frame, and the end of an error."""
CUT = _frame(frame_json(CRASHED))
"""The last frame of a stream whose process has died, or does not know whether another one has ended the turn."""
