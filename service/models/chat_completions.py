"""What goes to a chat completions server, and what comes of its answer. Pure.

One chunk of it is read in :mod:`service.models.chat_chunks`.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import msgspec

from service.errors import ModelError
from service.models.chat_chunks import Chunk, Delta, TokenUsage, decode_chunk, join_surrogates, tokens
from service.models.client import (
    Finished,
    FinishReason,
    ModelEvent,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from service.models.sse_decoder import EventTooLargeError, SseDecoder
from service.models.upstream_errors import ErrorReply, error_from_reply, quote

EVENT_BYTES_MAX = 1024 * 1024
"""Bound on one event: a token has some hundred bytes, a server that does not really stream one large event."""
BODY_BYTES_MAX = 8 * 1024 * 1024
"""Bound on a body that is no event stream: a whole reply, with all that JSON adds to a text."""
_DONE = b"[DONE]"

# Everything else ends a reply in a regular way: "eos", "end_turn", "stop_sequence"...
_FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",  # Mistral
    "safety": "content_filter",  # Gemini, as the next three
    "recitation": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "sensitive": "content_filter",  # Zhipu
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
# DeepSeek, OpenRouter, vLLM, Zhipu: not an end but a failure.
_FAILED_REASONS = frozenset({"insufficient_system_resource", "error", "abort", "network_error"})


class Dialect(msgspec.Struct, frozen=True):
    """What a model's server has no words for, or other ones.

    Attributes:
        limit_field: The bound on the output. Every server knows ``max_tokens``, but for OpenAI's newer models.
        stream_options: Whether it knows them. Mistral and Fireworks refused them, and send usage unasked.
    """

    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    stream_options: bool = True

    def learn(self, request: ModelRequest, status: int, reply: ErrorReply) -> "Dialect":
        """The dialect in which to ask again after a refusal; this very one where that would not help."""
        if status not in (400, 422) or reply.is_context_too_long:  # which names the field, too
            return self
        if self.stream_options and re.search("stream_options|include_usage", reply.words):
            return msgspec.structs.replace(self, stream_options=False)
        if request.max_output_tokens is not None and "max_completion_tokens" in reply.words:
            return msgspec.structs.replace(self, limit_field="max_completion_tokens")
        return self


def encode_request(request: ModelRequest, dialect: Dialect) -> bytes:
    """The body of the request."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": message.role, "content": message.text} for message in request.messages],
        "stream": True,
    }
    if dialect.stream_options:
        body["stream_options"] = {"include_usage": True}
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_output_tokens is not None:
        body[dialect.limit_field] = request.max_output_tokens
    return msgspec.json.encode(body)


class ReplyDecoder:
    """Turns the bytes of one streamed reply into events.

    A reply is whole once a finish reason was there. ``[DONE]`` only says that nothing follows, and not every server
    sends it; where a text was there it stands for a finish reason, which not every server sends either. Some say
    "stop" with their first chunk or with each: text that follows counts.

    A body that is JSON and no event stream is a reply as well, if it is a whole completion: somebody on the way does
    not stream.

    Args:
        redact: Takes the secrets out of an upstream's words.
        described: What the response says it is, where that is no event stream.
    """

    def __init__(self, *, redact: Callable[[str], str], described: str | None = None) -> None:
        self._sse = SseDecoder(event_bytes_max=EVENT_BYTES_MAX)
        self._redact = redact
        self._described = described
        self._begun = False
        self._has_events = False
        self._has_text = False
        self._body: bytearray | None = None  # of what is no event stream
        self._half = ""  # of a pair of surrogates, the second of which comes with the next chunk
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None
        self.finished = False
        self.failure: ModelError | None = None
        """Why nothing more can come. Kept, not raised: what came before it in the same chunk counts."""

    @property
    def has_finish_reason(self) -> bool:
        """Whether it can end here; more text, usage and ``[DONE]`` may follow."""
        return self._finish_reason is not None

    @property
    def is_whole(self) -> bool:
        """Whether no more text is to be expected. A "stop" before anything was said is not the end yet."""
        return self._finish_reason is not None and (self._has_text or self._finish_reason != "stop")

    def feed(self, chunk: bytes) -> list[ModelEvent]:
        """The events that this chunk completes; empty where there was nothing but overhead."""
        events: list[ModelEvent] = []
        try:
            if not self._begun:
                self._begin(chunk)
            if self._body is not None:
                self._collect(chunk)
                return events
            for payload in self._sse.feed(chunk):
                self._has_events = True
                if payload.strip() == _DONE:
                    self._note_done()
                    events.extend(self.end())
                    break
                if payload:
                    self._take(payload, events)
        except ModelError as error:
            self.failure = error
        except EventTooLargeError:
            message = f"The model server sent an event of more than {EVENT_BYTES_MAX} bytes."
            self.failure = ModelError("upstream_protocol", message)
        return events

    def end(self) -> list[ModelEvent]:
        """Nothing will follow: what is left, and :class:`Finished`.

        Raises:
            ModelError: ``upstream_truncated``, where no finish reason was there; or what a body said that was no
                event stream.
        """
        events: list[ModelEvent] = []
        if self._body is not None:
            self._take_whole(bytes(self._body), events)
        elif self._finish_reason is None:
            self._take_rest(events)
        if self._finish_reason is None:
            if not self._has_events and self._described is not None:
                raise self._no_event_stream()
            message = "The model server ended the reply before it was whole."
            raise ModelError("upstream_truncated", message, retryable=True)
        self.finished = True
        return [*events, Finished(finish_reason=self._finish_reason, usage=self._usage)]

    def _begin(self, chunk: bytes) -> None:
        """An event stream is told from other bodies by how it begins, whatever the response says it is."""
        start = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
        self._begun = bool(start)
        if start.startswith(b"<"):
            raise self._no_event_stream()
        if start.startswith((b"{", b"[")):
            self._body = bytearray()

    def _collect(self, chunk: bytes) -> None:
        assert self._body is not None
        self._body += chunk
        if len(self._body) > BODY_BYTES_MAX:
            raise self._no_event_stream()

    def _take_rest(self, events: list[ModelEvent]) -> None:
        with suppress(ValueError):  # it was cut off, or too large: then it is not there
            rest = self._sse.rest()
            if rest.strip() == _DONE:
                self._note_done()
            else:
                self._take_chunk(decode_chunk(rest), events)

    def _note_done(self) -> None:
        """The server says that this was all."""
        if self._has_text and self._finish_reason is None:
            self._finish_reason = "stop"

    def _take(self, payload: bytes, events: list[ModelEvent]) -> None:
        try:
            chunk = decode_chunk(payload)
        except ValueError as error:
            if self.is_whole:
                return  # what is still to come is not worth failing for
            raise ModelError(
                "upstream_protocol", "The model server sent something that is not a chat completion."
            ) from error
        if chunk.choices is None and chunk.usage is None and not chunk.error:
            said = ErrorReply.from_body(payload)
            if said.message:
                raise error_from_reply(said, redact=self._redact)
        self._take_chunk(chunk, events)

    def _take_whole(self, body: bytes, events: list[ModelEvent]) -> None:
        try:
            chunk = decode_chunk(body)
        except ValueError:
            raise self._no_event_stream() from None
        if not chunk.choices and not chunk.error:
            raise self._no_event_stream(ErrorReply.from_body(body))
        self._take_chunk(chunk, events)
        self._note_done()

    def _take_chunk(self, chunk: Chunk, events: list[ModelEvent]) -> None:
        choice = chunk.choices[0] if chunk.choices else None
        error = chunk.error or (choice is not None and choice.error)
        if error and not self.is_whole:
            raise error_from_reply(ErrorReply.from_error_member(error), redact=self._redact)
        if choice is not None:
            delta = choice.delta
            if delta is None and not self._has_text:  # with text before it, it is all of that once more
                delta = choice.message
            if delta is not None:
                self._take_delta(delta, events)
            if choice.finish_reason and choice.finish_reason != "null":
                self._finish_reason = _finish_reason(choice.finish_reason)
        if chunk.usage is not None:
            self._usage = _usage(chunk.usage)

    def _take_delta(self, delta: Delta, events: list[ModelEvent]) -> None:
        reasoning = delta.reasoning_content or delta.reasoning
        if reasoning:
            events.append(ReasoningDelta(join_surrogates(reasoning)))
        text = delta.content or delta.refusal
        if text:
            if self._half or not text.isascii():
                text = self._joined(text)
            if text:
                self._has_text = True
                events.append(TextDelta(text))

    def _joined(self, text: str) -> str:
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return join_surrogates(text)

    def _no_event_stream(self, said: ErrorReply | None = None) -> ModelError:
        words = "" if said is None else quote(said, redact=self._redact)
        return ModelError(
            "upstream_protocol",
            f"The model server answered with {self._described or 'something else'} instead of an event stream: "
            f"check the model URL.{words}",
        )


def _finish_reason(reason: str) -> FinishReason:
    reason = reason.lower()
    if reason in _FAILED_REASONS:
        raise ModelError("upstream_error", "The model server gave up in the middle of the reply.", retryable=True)
    return "content_filter" if reason.startswith("content_filter") else _FINISH_REASONS.get(reason, "stop")


def _usage(usage: TokenUsage) -> Usage:
    details = usage.completion_tokens_details
    return Usage(
        input_tokens=tokens(usage.prompt_tokens),
        output_tokens=tokens(usage.completion_tokens),
        reasoning_tokens=tokens(details.reasoning_tokens if details is not None else None),
    )
