"""The request to a chat completions server, and the events in its answer. Pure.

:mod:`service.models.chat_chunks` reads one chunk of the answer.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec

from service.errors import ModelError
from service.long_texts import LONG, text_encoded
from service.models.chat_chunks import (
    Choice,
    Chunk,
    Delta,
    PartsCount,
    TokenUsage,
    decode_chunk,
    has_work,
    join_surrogates,
    tokens,
)
from service.models.client import (
    NO_OPTIONS,
    SIGNED,
    EncryptedReasoning,
    Finished,
    FinishReason,
    FunctionCall,
    FunctionCallOutput,
    Message,
    ModelEvent,
    ModelRequest,
    NamedFunction,
    Options,
    Progress,
    PromptItem,
    Reasoning,
    ReasoningDelta,
    TextDelta,
    TextFormat,
    Tools,
    Usage,
)
from service.models.continuation import Form, split
from service.models.parameters import parameters_of, refused_parameter, without_effect
from service.models.reply_calls import ReplyCalls
from service.models.reply_choices import ReplyChoices
from service.models.sse_decoder import EventTooLargeError, SseDecoder
from service.models.upstream_errors import ErrorReply, error_from_reply, quote
from service.steps import Steps, at_once

EVENT_BYTES_MAX = 1024 * 1024
"""Bound on one event. A token has some hundred bytes; a server that does not really stream sends one large event.
Larger events are left out: they are images."""
SKIPPED_BYTES_MAX = 64 * 1024 * 1024
"""Bound on one event that is left out."""
BODY_BYTES_MAX = 8 * 1024 * 1024
"""Bound on a body that is no event stream: a whole reply, with all that JSON adds to a text."""
_DONE = b"[DONE]"
_REASONING = "reasoning_content"
_MISSES_REASONING = re.compile(
    rf"{_REASONING}.*(missing|required|must|provide|pass)|(missing|must|pass).*{_REASONING}", re.DOTALL | re.IGNORECASE
)
_NOTHING = Delta()
_FIELD_NAMES = re.compile(rb"(?:data:\s*)+")
_ITEMS_IN_STEP = 64
"""The items of a prompt that are encoded in one step, which takes some hundred microseconds unless they are long."""
_LINES_MAX = 1000
"""Bound on the lines of one event that are tried one by one."""
_START_BYTES_MAX = 400
_START_LENGTH_MAX = 16
"""How many characters of skipped data the log may have: enough to recognize the data, too few to show a user's text."""

# Every other reason is a regular end of a reply: "eos", "end_turn", "stop_sequence"...
_FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",  # sent by Mistral
    "safety": "content_filter",  # sent by Gemini, like the next three
    "recitation": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "sensitive": "content_filter",  # sent by Zhipu
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
# With these reasons DeepSeek, OpenRouter, vLLM and Zhipu report a failure, not an end.
_FAILED_REASONS = frozenset({"insufficient_system_resource", "error", "abort", "network_error"})


class Dialect(msgspec.Struct, frozen=True):
    """The variant of the request that a model's server understands.

    Attributes:
        limit_field: The name of the bound on the output. Every server knows ``max_tokens``, except for OpenAI's newer
            models.
        stream_options: Whether the server knows ``stream_options``. Mistral and Fireworks refused this field, and send
            usage without it.
        left_out: The parameters that the server refuses: they are left out where their value has no effect. Where it
            has one, they are sent, and the caller is told of the refusal.
        wants_reasoning: Whether the server wants the model's reasoning in words back, with the calls that it led to.
            DeepSeek and Moonshot refuse calls without it.
    """

    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    stream_options: bool = True
    left_out: frozenset[str] = frozenset()
    wants_reasoning: bool = False

    def learn(self, request: ModelRequest, status: int, reply: ErrorReply) -> "Dialect":
        """The dialect in which to ask again after a refusal; the same dialect if another one would not help."""
        if status not in (400, 422) or reply.is_context_too_long:  # such an error names the field, too
            return self
        if self.stream_options and re.search("stream_options|include_usage", reply.words):
            return msgspec.structs.replace(self, stream_options=False)
        if request.max_output_tokens is not None and "max_completion_tokens" in reply.words:
            return msgspec.structs.replace(self, limit_field="max_completion_tokens")
        if not self.wants_reasoning and _MISSES_REASONING.search(reply.words):
            return msgspec.structs.replace(self, wants_reasoning=True)
        sent = parameters_of(request)
        refused = refused_parameter(reply.words, reply.parameter, sent)
        if refused is not None and refused in without_effect(sent):
            return msgspec.structs.replace(self, left_out=self.left_out | {refused})
        return self


def encode_request(request: ModelRequest, dialect: Dialect, form: Form = "none") -> bytes:
    """Do :func:`request_encoded` at once."""
    return at_once(request_encoded(request, dialect, form))


def request_encoded(request: ModelRequest, dialect: Dialect, form: Form = "none") -> Steps[bytes]:
    """The body of the request.

    Args:
        form: How the server is asked to go on with the text so far, if the request has one.
    """
    if dialect.left_out:
        request = _without(request, without_effect(parameters_of(request)) & dialect.left_out)
    messages = yield from _messages(request.prompt, dialect)
    body: dict[str, Any] = {"stream": True}
    if request.prefix:
        assert form != "none", "the client has said that it cannot continue"
        yield from _encode(_message_so_far(request.prefix, form), messages)
        if form == "final_message":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    if dialect.stream_options:
        body["stream_options"] = {"include_usage": True}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_output_tokens is not None:
        body[dialect.limit_field] = request.max_output_tokens
    if request.tools.functions:
        body |= _tools(request.tools)
    if request.options is not NO_OPTIONS:
        body |= _options(request.options)
    begin = b'{"model":%b,"messages":[' % msgspec.json.encode(request.model)
    return b"".join([begin, *messages, b"],", msgspec.json.encode(body)[1:]])


def _without(request: ModelRequest, names: Collection[str]) -> ModelRequest:
    """The request without some of its parameters."""
    tools, options = request.tools, request.options
    return msgspec.structs.replace(
        request,
        temperature=None if "temperature" in names else request.temperature,
        tools=msgspec.structs.replace(
            tools,
            choice=None if "tool_choice" in names else tools.choice,
            parallel=None if "parallel_tool_calls" in names else tools.parallel,
        ),
        options=msgspec.structs.replace(options, **{name: None for name in names if name in Options.__struct_fields__}),
    )


def _options(options: Options) -> dict[str, Any]:
    body = options.given()
    if options.text_format is not None:
        body["response_format"] = _response_format(body.pop("text_format"))
    return body


def _response_format(text_format: TextFormat) -> dict[str, Any]:
    if text_format.type == "json_object":
        return {"type": "json_object"}
    described = {
        "name": text_format.name,
        "description": text_format.description,
        "schema": text_format.schema,
        "strict": text_format.strict,
    }
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in described.items() if value is not None},
    }


def _messages(prompt: Sequence[PromptItem], dialect: Dialect) -> Steps[list[bytes]]:
    """The prompt in messages, as JSON with commas between them: what the assistant says between two others' messages is
    one message with its calls.
    """
    pieces: list[bytes] = []
    last: dict[str, Any] = {}
    for index, item in enumerate(prompt):
        if index % _ITEMS_IN_STEP == 0:
            yield
        is_assistants = not isinstance(item, FunctionCallOutput) and item.role == "assistant"
        if not (is_assistants and last.get("role") == "assistant"):
            if last:
                yield from _encode(last, pieces)
            last = {"role": "assistant", "content": None} if is_assistants else {}
        if isinstance(item, FunctionCallOutput):
            last = {"role": "tool", "tool_call_id": item.call_id, "content": item.text}
        elif isinstance(item, Message) and item.role != "assistant":
            last = {"role": item.role, "content": item.text}
        else:
            _add_to_reply(last, item, dialect)
    if last:
        yield from _encode(last, pieces)
    return pieces


def _message_so_far(text: str, form: Form) -> dict[str, Any]:
    """The last message of a request that continues a reply."""
    message: dict[str, Any] = {"role": "assistant", "content": split(text)[0]}
    return message | {"prefix": True} if form == "prefix" else message


def _encode(message: dict[str, Any], pieces: list[bytes]) -> Steps[None]:
    """Add a message, after a comma if it is not the first one. A long text is encoded in steps."""
    if pieces:
        pieces.append(b",")
    text = message["content"]
    if text is not None and len(text) >= LONG:
        message["content"] = msgspec.Raw(b"".join((yield from text_encoded(text))))
    pieces.append(msgspec.json.encode(message))


def _add_to_reply(
    message: dict[str, Any], item: Message | FunctionCall | EncryptedReasoning | Reasoning, dialect: Dialect
) -> None:
    match item:
        case Message():
            message["content"] = (message["content"] or "") + item.text
        case FunctionCall():
            function = {"name": item.name, "arguments": _arguments(item.text)}
            call = {"id": item.call_id, "type": "function", "function": function, **_upstream(item.upstream)}
            message.setdefault("tool_calls", []).append(call)
            if dialect.wants_reasoning:
                message.setdefault(_REASONING, "")
        case EncryptedReasoning():
            _add_encrypted(message, item)
        case Reasoning() if dialect.wants_reasoning:
            message[_REASONING] = message.get(_REASONING, "") + item.text
        case Reasoning():
            pass


def _add_encrypted(message: dict[str, Any], item: EncryptedReasoning) -> None:
    fields = _upstream(item.upstream)
    kind = bytes(fields.get("type", b"")).decode().strip('"')
    sealed: dict[str, Any] = {"signature" if kind in SIGNED else "data": item.text}
    if kind == "reasoning.text":
        sealed["text"] = item.signed
    elif kind == "thinking":
        sealed["thinking"] = item.signed
    is_block = kind in ("thinking", "redacted_thinking")
    message.setdefault("thinking_blocks" if is_block else "reasoning_details", []).append(fields | sealed)


def _arguments(text: str) -> str:
    """Arguments that every server can parse: those that are no JSON, and that a model may send, become a text in JSON.

    Servers (vLLM, Ollama) refuse the whole prompt for one call whose arguments they cannot parse.
    """
    if not text.strip():
        return "{}"
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError):
        return msgspec.json.encode({"not_json": text}).decode()
    return text


def _upstream(fields: str) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(fields, type=dict[str, msgspec.Raw]) if fields else {}


def _tools(tools: Tools) -> dict[str, Any]:
    body: dict[str, Any] = {"tools": [{"type": "function", "function": function} for function in tools.functions]}
    if isinstance(tools.choice, NamedFunction):
        body["tool_choice"] = {"type": "function", "function": {"name": tools.choice.name}}
    elif tools.choice is not None:
        body["tool_choice"] = tools.choice
    if tools.parallel is not None:
        body["parallel_tool_calls"] = tools.parallel
    return body


class ReplyDecoder:
    """Turns the bytes of one streamed reply into events.

    A reply is whole once a finish reason has arrived. ``[DONE]`` only says that nothing follows, and not every server
    sends it. After a text, ``[DONE]`` replaces a missing finish reason, because not every server sends one. Some
    servers say "stop" with their first chunk or with each chunk: text after it counts.

    A reply with calls ends as ``tool_calls`` where its server says "stop".

    A JSON body that is no event stream is a reply as well, if it is a whole completion: some gateways do not stream.

    Args:
        redact: Removes the secrets from an upstream's words.
        described: The content type of the response, if it is no event stream.
        sent: The parameters of the request, which an error in the reply may be about.
        warn: Called with a sentence for the log and the beginning of the data, once for data that is no chunk
            and once for events that are too large.
    """

    def __init__(
        self,
        *,
        redact: Callable[[str], str],
        described: str | None = None,
        sent: Collection[str] = (),
        warn: Callable[[str, str], None] | None = None,
    ) -> None:
        self._sse = SseDecoder(event_bytes_max=EVENT_BYTES_MAX, skipped_bytes_max=SKIPPED_BYTES_MAX)
        self._redact = redact
        self._described = described
        self._sent = sent
        self._warn = warn
        self._warned: frozenset[str] = frozenset()
        self._choices = ReplyChoices()
        self._calls = ReplyCalls(held_bytes_max=EVENT_BYTES_MAX)
        self._begun = False
        self._has_events = False
        self._has_text = False
        self._has_skipped = False
        self._large_events = 0
        self._holds_an_end = False
        self._body: bytearray | None = None  # the body so far, if it is no event stream
        self._body_parts = PartsCount()
        self._half = ""  # the first of two surrogates, if the second comes with the next chunk
        self._finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        """What the server has counted so far."""
        self.finished = False
        self.failure: ModelError | None = None
        """The error that ended the reply. It is not raised at once, so that earlier events of its chunk count."""

    @property
    def has_finish_reason(self) -> bool:
        """Whether the reply can end here; more text, usage and ``[DONE]`` may follow."""
        return self._finish_reason is not None or self._holds_an_end

    @property
    def is_whole(self) -> bool:
        """Whether no more text is expected. A "stop" before any text is not the end yet."""
        return self._holds_an_end or (
            self._finish_reason is not None and (self._has_output or self._finish_reason != "stop")
        )

    @property
    def _has_output(self) -> bool:
        return self._has_text or self._calls.opened > 0

    def feed(self, chunk: bytes) -> list[ModelEvent]:
        """The events that this chunk completes; empty if the chunk has only overhead."""
        events: list[ModelEvent] = []
        try:
            if not self._begun:
                self._begin(chunk)
            if self._body is not None:
                self._collect(chunk)
                return events
            payloads = self._sse.feed(chunk)
            if payloads:
                self._has_events = True
            for payload in payloads:
                if self._take(payload, events):
                    break
            if not events:
                self._note_large_events(events)
        except ModelError as error:
            self.failure = error
        except EventTooLargeError:
            self.failure = self._too_large(SKIPPED_BYTES_MAX)
        return events

    def end(self) -> list[ModelEvent]:
        """End the reply: the remaining events, and :class:`Finished`.

        Raises:
            ModelError: ``upstream_truncated``, if no finish reason has arrived; or the error in what was left: the
                last event, or a body that is no event stream.
        """
        events: list[ModelEvent] = []
        if self._body is not None:
            self._take_whole(bytes(self._body), events)
        elif self._finish_reason is None:
            self._take_rest(events)
        if not self.finished:
            self._finish(events)
        return events

    def _begin(self, chunk: bytes) -> None:
        """Recognize an event stream by its beginning, because the content type may be wrong."""
        start = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
        self._begun = bool(start)
        if start.startswith(b"<"):
            raise self._no_event_stream()
        if start.startswith((b"{", b"[")):
            self._body = bytearray()

    def _collect(self, chunk: bytes) -> None:
        assert self._body is not None
        self._body += chunk
        with suppress(ValueError):
            self._body_parts.add(chunk)
            if len(self._body) <= BODY_BYTES_MAX:
                return
        raise self._no_event_stream()

    def _take_rest(self, events: list[ModelEvent]) -> None:
        """Take the event that has begun and not ended. If its data is no chunk, it was cut off and is ignored."""
        with suppress(EventTooLargeError):
            for payload in self._sse.rest():
                for line in _pieces(payload):
                    if line.strip() == _DONE:
                        self._note_done(events)
                    else:
                        with suppress(ValueError):
                            self._take_chunk(decode_chunk(line), line, events)

    def _note_done(self, events: list[ModelEvent]) -> None:
        """Note that the server has ended the reply."""
        self._take_held(events)
        if self._has_output and self._finish_reason is None:
            self._finish_reason = "stop"

    def _finish(self, events: list[ModelEvent]) -> None:
        self._take_held(events)
        self._calls.end(events)
        self._note_large_events(events)
        if self._large_events and not self._has_output:
            raise self._too_large(EVENT_BYTES_MAX)  # the large event may have been the reply
        if self._finish_reason is None:
            raise self._unfinished()
        if self._finish_reason == "stop" and self._calls.opened:
            self._finish_reason = "tool_calls"  # several servers say "stop" here
        self.finished = True
        events.append(Finished(finish_reason=self._finish_reason, usage=self.usage))

    def _take(self, payload: bytes, events: list[ModelEvent]) -> bool:
        """Take an event's data. Returns whether it was the last event."""
        try:
            chunk = decode_chunk(payload)
        except ValueError:
            return self._take_lines(payload, events)
        self._take_chunk(chunk, payload, events)
        return False

    def _take_lines(self, payload: bytes, events: list[ModelEvent]) -> bool:
        """Take data that is no chunk: ``[DONE]``, several chunks that a single line end separates, or unknown data.

        Data that is not JSON does not fail the reply: keep-alives that were meant as comments, the time, words.
        """
        if payload.strip() == _DONE:
            self._note_done(events)
            self._finish(events)
            return True
        if names := _FIELD_NAMES.match(payload):  # the server has written the field's name twice
            return self._take(payload[names.end() :], events)
        lines = _pieces(payload)
        if len(lines) > 1:
            return any(self._take(line, events) for line in lines)
        if not payload.strip():
            return False
        self._has_skipped = True
        self._warn_once("The model server sent data that is no chunk of a reply; the data is skipped.", payload)
        return False

    def _take_no_choice(self, chunk: Chunk, payload: bytes) -> None:
        """Check for an error in an unusual form.

        Raises:
            ModelError: The data is an error.
        """
        said = ErrorReply.from_body(payload)
        is_error = said.is_error_member or (said.message and chunk.choices is None and chunk.usage is None)
        if is_error and not self.is_whole:
            raise self._error(said)

    def _take_whole(self, body: bytes, events: list[ModelEvent]) -> None:
        try:
            chunk = decode_chunk(body, is_checked=True)
        except ValueError:
            raise self._no_event_stream() from None
        if not chunk.choices and not chunk.error:
            said = ErrorReply.from_body(body)
            raise self._error(said) if said.is_error_member else self._no_event_stream(said)
        self._take_chunk(chunk, body, events)
        self._note_done(events)

    def _take_chunk(self, chunk: Chunk, payload: bytes, events: list[ModelEvent]) -> None:
        if chunk.error:
            self._fail(chunk.error)
        choices = chunk.choices
        if choices:
            choice = choices[0]
            if choice.index == self._choices.usual and len(choices) == 1:
                self._take_choice(choice, payload, events)
            else:
                self._take_choices(choices, payload, events)
        elif not chunk.error:
            self._take_no_choice(chunk, payload)
        if chunk.usage is not None and (self.usage is None or chunk.usage.says_something):
            self.usage = _usage(chunk.usage)

    def _take_choices(self, choices: Sequence[Choice], payload: bytes, events: list[ModelEvent]) -> None:
        """Take the choices of a chunk that belong to the reply."""
        first_has_ended = self._finish_reason is not None
        for choice in self._choices.admit(choices, first_has_ended=first_has_ended):
            self._take_choice(choice, payload, events)
        self._holds_an_end = self._choices.holds_an_end
        if not self._choices.is_holding or events:
            return
        if any(choice.says_something for choice in choices) or has_work(payload):
            events.append(Progress())

    def _take_held(self, events: list[ModelEvent]) -> None:
        """Take the held choices that belong to the reply, because nothing follows."""
        if self._choices.is_holding:
            for choice in self._choices.end(first_has_ended=self._finish_reason is not None):
                self._take_choice(choice, b"", events)

    def _take_choice(self, choice: Choice, payload: bytes, events: list[ModelEvent]) -> None:
        if choice.error:
            self._fail(choice.error)
        delta = choice.delta
        if delta is None and not self._has_output:  # after a text, the message is that text once more
            delta = choice.message
        if delta is None:
            delta = _NOTHING
        reasoning = delta.thoughts
        if reasoning:
            events.append(ReasoningDelta(join_surrogates(reasoning)))
        text = delta.content or delta.refusal or choice.text
        if text:
            if self._half or not text.isascii():
                text = self._joined(text)
            if text:
                self._has_text = True
                events.append(TextDelta(text))
        if delta.tool_calls or delta.function_call:
            self._calls.take(delta.calls, events)
        if delta.reasoning_details or delta.thinking_blocks:
            _take_encrypted(delta, events)
        if not text and not events and has_work(payload):
            events.append(Progress())
        if choice.finish_reason and choice.finish_reason != "null":
            self._finish_reason = _finish_reason(choice.finish_reason)

    def _fail(self, error: object) -> None:
        if not self.is_whole:
            raise self._error(ErrorReply.from_error_member(error))

    def _error(self, said: ErrorReply) -> ModelError:
        return error_from_reply(said, redact=self._redact, sent=self._sent)

    def _note_large_events(self, events: list[ModelEvent]) -> None:
        """Count an event that was left out because of its size as progress of the model: such an event is an image."""
        if self._sse.large_events > self._large_events:
            self._large_events = self._sse.large_events
            self._warn_once(
                f"The model server sent an event of more than {EVENT_BYTES_MAX} bytes; the event is skipped."
            )
            if not self.finished:
                events.append(Progress())

    def _warn_once(self, sentence: str, payload: bytes = b"") -> None:
        if sentence not in self._warned:
            self._warned |= {sentence}
            if self._warn is not None:
                start = self._redact(payload[:_START_BYTES_MAX].decode(errors="replace"))
                self._warn(sentence, start[:_START_LENGTH_MAX])

    def _joined(self, text: str) -> str:
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return join_surrogates(text)

    def _unfinished(self) -> ModelError:
        """The error for a reply without a finish reason."""
        if not self._choices.has_begun and self.usage is None:
            if self._has_skipped or self._sse.foreign_events:
                message = "The model server sent something that is not a chat completion."
                return ModelError("upstream_protocol", message)
            if not self._has_events and self._described is not None:
                return self._no_event_stream()
        message = "The model server ended the reply before it was whole."
        return ModelError("upstream_truncated", message, retryable=True)

    def _too_large(self, bytes_max: int) -> ModelError:
        return ModelError("upstream_protocol", f"The model server sent an event of more than {bytes_max} bytes.")

    def _no_event_stream(self, said: ErrorReply | None = None) -> ModelError:
        kind = "" if self._described is None else f"The answer is {self._described}."
        words = "" if said is None else quote(said, redact=self._redact)
        return ModelError(
            "upstream_protocol",
            "The model server answered with something else than an event stream: check the model URL.",
            upstream_words=" ".join(part for part in (kind, words) if part),
        )


def _take_encrypted(delta: Delta, events: list[ModelEvent]) -> None:
    """Take what only the server can read of the reasoning, and its signatures."""
    for detail in delta.reasoning_details or ():
        rest = {"type": detail.type, "id": detail.id, "format": detail.format, "index": detail.index}
        if detail.data:
            events.append(EncryptedReasoning(detail.data, _fields(rest)))
        elif detail.signature:
            events.append(EncryptedReasoning(detail.signature, _fields(rest | {"type": "reasoning.text"})))
    for block in delta.thinking_blocks or ():
        if block.data:
            events.append(EncryptedReasoning(block.data, _fields({"type": "redacted_thinking"})))
        elif block.signature:
            events.append(EncryptedReasoning(block.signature, _fields({"type": "thinking"})))


def _fields(values: Mapping[str, object]) -> str:
    return msgspec.json.encode({name: value for name, value in values.items() if value is not None}).decode()


def _pieces(payload: bytes) -> list[bytes]:
    """The lines of an event's data; the data in one piece if there are too many lines."""
    return payload.split(b"\n") if payload.count(b"\n") < _LINES_MAX else [payload]


def _finish_reason(reason: str) -> FinishReason:
    reason = reason.lower()
    if reason in _FAILED_REASONS:
        raise ModelError("upstream_error", "The model server gave up in the middle of the reply.", retryable=True)
    return "content_filter" if reason.startswith("content_filter") else _FINISH_REASONS.get(reason, "stop")


def _usage(usage: TokenUsage) -> Usage:
    """The counts of a server. Some (xAI) count the reasoning beside the completion, which shows in their totals."""
    said, written, reasoned = tokens(usage.prompt_tokens), tokens(usage.completion_tokens), tokens(usage.reasoned)
    is_beside = reasoned > 0 and usage.total_tokens == said + written + reasoned
    return Usage(
        input_tokens=said,
        output_tokens=written + reasoned if is_beside else written,
        reasoning_tokens=reasoned,
        cached_tokens=msgspec.UNSET if usage.cached is None else tokens(usage.cached),
    )
