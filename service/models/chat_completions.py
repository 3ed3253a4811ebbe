"""The wire format of streamed chat completions, as OpenAI defined it and others vary it. Pure.

Source: https://platform.openai.com/docs/api-reference/chat-streaming
"""

from collections.abc import Callable
from typing import Any

import msgspec

from service.errors import ModelError
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
from service.models.upstream_errors import ErrorReply, error_from_reply

EVENT_BYTES_MAX = 1024 * 1024
"""Bound on one event: a token has some hundred bytes, a server that does not really stream one large event."""

# Everything else ends a reply in a regular way: "eos", "end_turn", "stop_sequence"...
_FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
# DeepSeek, OpenRouter, vLLM: not an end but a failure.
_FAILED_REASONS = frozenset({"insufficient_system_resource", "error", "abort"})


def encode_request(request: ModelRequest, *, limit_field: str) -> bytes:
    """The body of the request; ``limit_field`` is what this upstream calls the bound on its output."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": message.role, "content": message.text} for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.max_output_tokens is not None:
        body[limit_field] = request.max_output_tokens
    return msgspec.json.encode(body)


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None  # DeepSeek, older vLLM, llama.cpp, LiteLLM
    reasoning: str | None = None  # OpenRouter, newer vLLM, Ollama


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: _OutputDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class ReplyDecoder:
    """Turns the bytes of one streamed reply into events.

    A reply is whole once a finish reason was there: ``[DONE]`` only says that nothing follows, and
    not every server sends it.

    Args:
        redact: Takes the secrets out of an upstream's words.
    """

    def __init__(self, *, redact: Callable[[str], str]) -> None:
        self._sse = SseDecoder(event_bytes_max=EVENT_BYTES_MAX)
        self._redact = redact
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None
        self.finished = False
        self.failure: ModelError | None = None
        """Why nothing more can come. Kept, not raised: what came before it in the same chunk counts."""

    @property
    def has_finish_reason(self) -> bool:
        """Whether the text is whole; usage and ``[DONE]`` may follow."""
        return self._finish_reason is not None

    def feed(self, chunk: bytes) -> list[ModelEvent]:
        """The events that this chunk completes; empty where there was nothing but overhead."""
        events: list[ModelEvent] = []
        try:
            for payload in self._sse.feed(chunk):
                if payload == b"[DONE]":
                    events.append(self.end())
                    break
                if payload:
                    self._take(payload, events)
        except ModelError as error:
            self.failure = error
        except EventTooLargeError:
            message = f"The model server sent an event of more than {EVENT_BYTES_MAX} bytes."
            self.failure = ModelError("upstream_protocol", message)
        return events

    def end(self) -> Finished:
        """Nothing will follow.

        Raises:
            ModelError: ``upstream_truncated``, where no finish reason was there.
        """
        if self._finish_reason is None:
            message = "The model server ended the reply before it was whole."
            raise ModelError("upstream_truncated", message, retryable=True)
        self.finished = True
        return Finished(finish_reason=self._finish_reason, usage=self._usage)

    def _take(self, payload: bytes, events: list[ModelEvent]) -> None:
        try:
            chunk = _decode_chunk(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ModelError(
                "upstream_protocol", "The model server sent something that is not a chat completion."
            ) from error
        if chunk.error:
            raise error_from_reply(ErrorReply.from_error_member(chunk.error), redact=self._redact)
        if chunk.choices:
            choice = chunk.choices[0]
            delta = choice.delta
            if delta is not None:
                reasoning = delta.reasoning_content or delta.reasoning
                if reasoning:
                    events.append(ReasoningDelta(reasoning))
                if delta.content:
                    events.append(TextDelta(delta.content))
            if choice.finish_reason:
                self._finish_reason = _finish_reason(choice.finish_reason)
        if chunk.usage is not None:
            self._usage = _usage(chunk.usage)


def _finish_reason(reason: str) -> FinishReason:
    if reason in _FAILED_REASONS:
        raise ModelError("upstream_error", "The model server gave up in the middle of the reply.", retryable=True)
    return _FINISH_REASONS.get(reason, "stop")


def _usage(usage: _Usage) -> Usage:
    details = usage.completion_tokens_details
    return Usage(
        input_tokens=usage.prompt_tokens or 0,
        output_tokens=usage.completion_tokens or 0,
        reasoning_tokens=(details.reasoning_tokens or 0) if details is not None else 0,
    )
