"""The embedded model client: a script instead of a model. Deterministic, paced, offline.

The URL of the client describes the reply, so that tests, demos and benchmarks can ask for any behaviour::

    scripted:                                   a short answer that quotes the input
    scripted:?tokens=200&rate=50                200 tokens, 50 a second
    scripted:?tokens=200&fail_after=20          an upstream_error after 20 of them
    scripted:?call=get_weather:{"city":"Oslo"}  a call; once its output is there, a text that quotes the output
    scripted:?text=Hello there.                 this text
    scripted:?refuse=text_format                a server that does not take this parameter
    scripted:?continues=false                   a server that cannot go on with a reply that was cut

If a JSON text is asked for, the reply is the simplest JSON that fits the schema. Other options have no effect.

Entering the stream fixes the moment at which each token is due. A late caller gets all due tokens at once, so a
slow event loop does not stretch the reply.
"""

import math
import re
import unicodedata
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated
from urllib.parse import parse_qsl

import anyio
import msgspec

from service.errors import ModelError, SettingsError
from service.failure_codes import FailureCode
from service.json_words import in_json_words
from service.models.client import (
    NO_OPTIONS,
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    Finished,
    FinishReason,
    FunctionCall,
    FunctionCallOutput,
    ModelEvent,
    ModelRequest,
    Options,
    PromptItem,
    Reasoning,
    ReasoningDelta,
    TakeEvents,
    TextDelta,
    TextFormat,
    Usage,
    relay_received,
)
from service.models.parameters import parameters_of

_BATCH_MAX = 64
"""Bound on the tokens of one :meth:`ScriptedStream.receive`, for an unpaced script."""
_QUOTE_LENGTH_MAX = 120
_ARGUMENTS_LENGTH = 8
"""How many characters of a call's arguments are one token."""
_CALL = r"^[A-Za-z0-9_.-]{1,64}(:[^\x00]*)?$"
_RETRYABLE = frozenset(
    {"upstream_unreachable", "resources_exhausted", "upstream_error", "rate_limited", "upstream_truncated"}
)

_Count = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
_Rate = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
_Calls = Annotated[tuple[Annotated[str, msgspec.Meta(pattern=_CALL)], ...], msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=65_536)]
_Parameters = Annotated[
    tuple[Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,64}$")], ...], msgspec.Meta(max_length=64)
]
_SEVERAL = ("call", "refuse")
"""The parameters that may be there several times."""
_DEPTH_MAX = 32


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a scripted reply does: the parameters of its URL.

    Args:
        tokens: Length of the text, as numbered tokens. Without it, the reply quotes the input, or is only calls.
        rate: Tokens a second; 0 for tokens without waits.
        first_token_s: Wait before the first token.
        text: The text, a word a token, in place of numbered tokens and of the quote.
        token_bytes: Size of each numbered token; without it, a token is its number and a space.
        reasoning: Tokens of reasoning before the text.
        encrypted: Size of encrypted reasoning before the text, which is one token; without it, there is none.
        call: A call after the text, as ``name:arguments``; may be there several times. Eight characters of the
            arguments are a token, and so is the name. A prompt that ends with outputs of calls gets no calls.
        finish: The reason of the end, in place of ``stop`` or ``tool_calls``.
        refuse: Refuse a request that has this parameter (``text_format``, ``top_p``); may be there several times.
        fail_after: Fail after this number of tokens, reasoning included; 0 refuses the request itself.
        fail_code: The code of the failure, one of the codes with which turns fail.
        silent_after: Send nothing more, for ever, after this number of tokens, reasoning included.
        ignore_close_s: Seconds that leaving the stream takes, even under cancellation: a hung close.
        continues: Whether it goes on with a reply that was cut off. The rest is the same as without the cut, and all
            counts are of the whole reply: a script that fails after 20 tokens fails there again.
    """

    tokens: _Count | None = None
    rate: _Rate = 40
    first_token_s: _Seconds = 0.2
    text: _Text | None = None
    token_bytes: _Size | None = None
    reasoning: _Count = 0
    encrypted: _Size | None = None
    call: _Calls = ()
    finish: FinishReason | None = None
    refuse: _Parameters = ()
    fail_after: _Count | None = None
    fail_code: FailureCode = "upstream_error"
    silent_after: _Count | None = None
    ignore_close_s: _Seconds = 0
    continues: bool = True

    @classmethod
    def from_url(cls, url: str, *, setting: str = "model_url") -> "Script":
        """Read a ``scripted:`` URL.

        Raises:
            SettingsError: The URL is not a ``scripted:`` URL, or a parameter is unknown, repeated or has a bad
                value; the message begins with ``setting``.
        """
        scheme, _, query = url.partition("?")
        if scheme != "scripted:":
            raise SettingsError(f"{setting}: {url!r} is not a scripted: URL; allowed is scripted:?name=value&…")
        known = ", ".join(cls.__struct_fields__)
        values: dict[str, str | list[str]] = {}
        for parameter, value in parse_qsl(query, keep_blank_values=True):
            if parameter in _SEVERAL:
                several = values.setdefault(parameter, [])
                assert isinstance(several, list)
                several.append(value)
            elif parameter in values:
                raise SettingsError(f"{setting}: {parameter!r} is there twice in {url!r}.")
            else:
                values[parameter] = value
            if parameter not in cls.__struct_fields__:
                raise SettingsError(f"{setting}: {parameter!r} is not a parameter of scripted:; those are {known}.")
            try:
                converted = msgspec.convert({parameter: values[parameter]}, cls, strict=False)
            except msgspec.ValidationError as error:
                reason = in_json_words(str(error).partition(" - ")[0], of_text=True)
                raise SettingsError(f"{setting}: {parameter}={value!r} is not allowed: {reason}.") from error
            if getattr(converted, parameter) is None:
                raise SettingsError(f"{setting}: {parameter}={value!r} is not allowed: leave it out instead.")
        return msgspec.convert(values, cls, strict=False)


@asynccontextmanager
async def open_scripted(url: str, *, name: str | None = None) -> AsyncIterator["ScriptedClient"]:
    """Open a client that replies as the URL describes.

    Args:
        name: The name of the upstream, if there are several.

    Raises:
        SettingsError: The URL has a parameter that is unknown or wrong.
    """
    script = Script.from_url(url, setting=f"upstreams.{name}.url" if name else "model_url")
    client = ScriptedClient(script, name=name or "scripted")
    try:
        yield client
    finally:
        await client.aclose()


class ScriptedClient:
    """Replies to every model's name as its script describes. Its only state is a count of streams."""

    def __init__(self, script: Script, *, name: str = "scripted") -> None:
        self.name = name
        self.script = script
        self.streams_open = 0
        """Streams that are entered and not yet left."""

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator["ScriptedStream"]:
        """See :class:`~service.models.client.ModelClient`."""
        await anyio.lowlevel.checkpoint()
        for name in parameters_of(request):
            if name in self.script.refuse:
                message = f"The scripted model does not take {name}, as its URL says."
                raise ModelError("parameter_refused", message, parameter=name)
        if self.script.fail_after == 0:
            raise _failure(self.script)
        self.streams_open += 1
        try:
            yield ScriptedStream(self.script, request)
        finally:
            if self.script.ignore_close_s:
                close_deadline = anyio.current_time() + self.script.ignore_close_s
                with anyio.CancelScope(shield=True, deadline=close_deadline):
                    await anyio.sleep_forever()
            self.streams_open -= 1

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:  # noqa: ARG002  any form can be continued
        """See :class:`~service.models.client.ModelClient`."""
        return self.script.continues and bool(text)

    async def aclose(self) -> None:
        """Do nothing: the client has no connections."""


class ScriptedStream:
    """One scripted reply; see :class:`~service.models.client.ModelStream`."""

    def __init__(self, script: Script, request: ModelRequest) -> None:
        self._script = script
        last = request.prompt[-1]
        has_outputs = isinstance(last, FunctionCallOutput)
        self._calls = [] if has_outputs else list(_calls(script.call, request.prompt))
        self._words: list[str] | None = None
        if script.text is not None:
            self._words = _tokens(script.text)
        elif script.tokens is None and request.options.text_format is not None and not self._calls:
            self._words = _tokens(_fitting_text(request.options.text_format))
        elif script.tokens is None:
            self._words = [] if self._calls else _answer(last.text, has_outputs=has_outputs)
        text_length = len(self._words) if self._words is not None else script.tokens or 0
        limit = request.max_output_tokens
        self._reasoning = script.reasoning + (script.encrypted is not None)
        self._total = self._length = self._reasoning + text_length + len(self._calls)
        self._cut = limit is not None and limit < self._length
        if limit is not None:
            self._length = min(self._length, limit)
        self._stop = min(self._length, _or_inf(script.fail_after), _or_inf(script.silent_after))
        self._input_tokens = sum(len(it.text.split()) for it in request.prompt if not isinstance(it, Reasoning))
        self._input_tokens += len(request.prefix.split())
        self._first = self._next = 0
        self._rest = ""  # what is left of the first token
        if request.prefix:
            self._skip(request.prefix, text_length)
        self._start = anyio.current_time() + script.first_token_s
        self.usage: Usage | None = None

    async def receive(self) -> Sequence[ModelEvent]:
        if self._next >= self._stop and self._stop < self._length:
            await self._break_off()
        await anyio.sleep_until(self._due(self._next))
        events: list[ModelEvent] = []
        now = anyio.current_time()
        while self._next < self._stop and len(events) < _BATCH_MAX and self._due(self._next) <= now:
            events.append(self._token(self._next))
            self._next += 1
        if self._next >= self._length:
            events.append(self._finished())
        return events

    async def relay(self, take: TakeEvents) -> None:
        await relay_received(self, take)

    def _skip(self, text: str, text_length: int) -> None:
        """Begin after this text. Raises: ModelError."""
        length = index = 0
        while length < len(text) and index < text_length:
            word = self._text(index)
            if not (text.startswith(word, length) or word.startswith(text[length:])):
                break
            length += len(word)
            index += 1
        if length < len(text):
            raise ModelError(
                "upstream_rejected",
                "The scripted model would not have begun its reply with this text.",
                may_be_continuation=True,
            )
        self._first = self._next = self._reasoning + index
        if length > len(text):  # the text so far ends in a token
            self._first = self._next = self._next - 1
            self._rest = self._text(index - 1)[len(text) - length :]

    def _text(self, index: int) -> str:
        return self._words[index] if self._words is not None else _numbered(index, self._script.token_bytes)

    def _due(self, index: int) -> float:
        return self._start + ((index - self._first) / self._script.rate if self._script.rate else 0.0)

    async def _break_off(self) -> None:
        if self._script.fail_after == self._stop:
            await anyio.lowlevel.checkpoint()
            raise _failure(self._script)
        await anyio.sleep_forever()

    def _token(self, index: int) -> ModelEvent:
        if index < self._script.reasoning:
            return ReasoningDelta(_numbered(index, self._script.token_bytes))
        if index < self._reasoning:
            return EncryptedReasoning("e" * (self._script.encrypted or 0))
        if index >= self._total - len(self._calls):
            return self._calls[index - self._total]
        if index == self._first and self._rest:
            return TextDelta(self._rest)
        return TextDelta(self._text(index - self._reasoning))

    def _finished(self) -> Finished:
        self.usage = Usage(
            input_tokens=self._input_tokens,
            output_tokens=max(self._length - self._first, 0),
            reasoning_tokens=min(self._reasoning, self._length) - min(self._reasoning, self._first),
        )
        reason: FinishReason = "tool_calls" if self._calls else "stop"
        reason = "length" if self._cut else self._script.finish or reason
        return Finished(finish_reason=reason, usage=self.usage)


def _failure(script: Script) -> ModelError:
    return ModelError(
        script.fail_code,
        "The scripted model failed, as its URL says.",
        retryable=script.fail_code in _RETRYABLE,
    )


def _or_inf(count: int | None) -> float:
    return math.inf if count is None else count


def _numbered(index: int, size: int | None) -> str:
    text = f"{index} "
    return text if size is None else text.rjust(size, ".")[-size:]


def _calls(calls: Sequence[str], prompt: Sequence[PromptItem]) -> Iterator[ModelEvent]:
    """The calls in tokens. Their ids differ from those in the prompt, also where a client has left some of it out."""
    known = {it.call_id for it in prompt if isinstance(it, FunctionCall)}
    turn = len(prompt)
    while any(f"call_{turn}_{number}" in known for number in range(len(calls))):
        turn += 1
    for number, call in enumerate(calls):
        name, _, arguments = call.partition(":")
        yield CallOpened(number, f"call_{turn}_{number}", name)
        for start in range(0, len(arguments), _ARGUMENTS_LENGTH):
            yield ArgumentsDelta(number, arguments[start : start + _ARGUMENTS_LENGTH])


def _answer(text: str, *, has_outputs: bool) -> list[str]:
    """A short reply to an input, or to the output of a call, in tokens."""
    begins = "The call returned" if has_outputs else "You said"
    answer = (
        f"{begins}: “{_shortened(text)}” I am a script and not a model, so that is all I can say about it. "
        "Name a real one in LASTCALL_MODEL_URL and LASTCALL_MODEL, and it answers here."
    )
    return _tokens(answer)


def _tokens(text: str) -> list[str]:
    """A text in tokens: words, each with the white space after it."""
    return re.findall(r"\s*\S+\s*|\s+", text)


def _fitting_text(text_format: TextFormat) -> str:
    return msgspec.json.encode(_fitting(text_format.schema or {"type": "object"})).decode()


def _fitting(schema: object, *, depth: int = 0) -> object:
    """The simplest JSON value that fits a usual schema; None for a schema that says more than types and values."""
    if not isinstance(schema, dict) or depth == _DEPTH_MAX:
        return None
    for choices in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(choices, list) and choices:
            return choices[0]
    for several in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(several), list) and schema[several]:
            return _fitting(schema[several][0], depth=depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties, required = schema.get("properties"), schema.get("required")
        parts = properties if isinstance(properties, dict) else {}
        names = required if isinstance(required, list) else list(parts)
        return {name: _fitting(parts.get(name), depth=depth + 1) for name in names if isinstance(name, str)}
    simplest: dict[object, object] = {"array": [], "string": "text", "integer": 0, "number": 0, "boolean": False}
    return simplest.get(kind) if isinstance(kind, str) else None


def _shortened(text: str) -> str:
    """The beginning of a text on one line, cut between words, or at least not inside a character."""
    text = " ".join(text.split())
    if len(text) <= _QUOTE_LENGTH_MAX:
        return text
    cut = text.rfind(" ", _QUOTE_LENGTH_MAX // 2, _QUOTE_LENGTH_MAX)
    if cut < 0:
        cut = _QUOTE_LENGTH_MAX
        while cut > 0 and _joins(text[cut - 1], text[cut]):
            cut -= 1
    return text[:cut] + "…"


def _joins(left: str, right: str) -> bool:
    """Whether two code points are shown as one: a combining mark, a joiner, a modifier, half a flag."""
    return (
        unicodedata.category(right) in ("Mn", "Me", "Mc", "Cf")
        or left == "\u200d"
        or 0x1F3FB <= ord(right) <= 0x1F3FF
        or (0x1F1E6 <= ord(left) <= 0x1F1FF and 0x1F1E6 <= ord(right) <= 0x1F1FF)
    )
