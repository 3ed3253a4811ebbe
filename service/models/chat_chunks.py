"""One chunk of a streamed chat completion, in OpenAI's form and in the variants of other servers. Pure.

Source: https://platform.openai.com/docs/api-reference/chat-streaming
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_TOKENS_MAX = 10**12
"""Bound on a count of tokens; a larger count is wrong."""
_PARTS_MAX = 20_000
"""Bound on a chunk's members and items. Each costs up to 0.4 us, and nothing else runs meanwhile."""
_SMALL_BYTES = 64 * 1024
"""A chunk up to this size is not counted, because it cannot have too many parts."""
_FLOAT_MAX = sys.float_info.max
_DIGITS_MAX = 40
_STARTS = (b"{", b"[", b"null", b" ", b"\t", b"\n")
_EMPTY = (b"null", b"[]", b"{}", b'""', b"false", b"0")
_WORK = re.compile(r"reason|think|thought|encrypt|signature|opaque|argument|audio|image", re.IGNORECASE)
"""The names of those members of a delta whose text shows that the model works."""


class FunctionDelta(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | dict[str, msgspec.Raw] | None = None  # an object is sent by Ollama's own API and its proxies


class CallDelta(msgspec.Struct, gc=False):
    """A piece of a call. Servers leave out and repeat each of these fields; :mod:`service.models.reply_calls` tells."""

    index: Any = None
    id: str | None = None
    function: FunctionDelta | None = None
    extra_content: msgspec.Raw | None = None  # sent by Gemini, which refuses the call in a prompt without it


class ReasoningDetail(msgspec.Struct, gc=False):
    """A part of the reasoning; ``data`` is encrypted. Words are in ``reasoning`` too, if the server sends that."""

    data: str | None = None
    signature: str | None = None  # of all words under the same index
    text: str | None = None
    summary: str | None = None
    type: str | None = None
    id: str | None = None
    format: str | None = None
    index: int | None = None


class ThinkingBlock(msgspec.Struct, gc=False):
    """A part of the reasoning in Anthropic's form; its words are in ``reasoning_content`` too."""

    type: str | None = None
    signature: str | None = None
    data: str | None = None


class Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None  # sent by DeepSeek, older vLLM, llama.cpp, LiteLLM
    reasoning: str | None = None  # sent by OpenRouter, newer vLLM, Ollama
    refusal: str | None = None  # OpenAI sends it in place of content
    tool_calls: list[CallDelta] | None = None
    function_call: FunctionDelta | None = None  # the form before tool_calls
    reasoning_details: list[ReasoningDetail] | None = None  # sent by OpenRouter
    thinking_blocks: list[ThinkingBlock] | None = None  # sent by LiteLLM

    @property
    def thoughts(self) -> str:
        """The piece of the reasoning in words."""
        words = self.reasoning_content or self.reasoning
        if words or not self.reasoning_details:
            return words or ""
        return "".join([detail.text or detail.summary or "" for detail in self.reasoning_details])

    @property
    def calls(self) -> Sequence[CallDelta]:
        if self.tool_calls or self.function_call is None:
            return self.tool_calls or ()
        return (CallDelta(function=self.function_call),)


class Choice(msgspec.Struct, gc=False):
    delta: Delta | None = None
    message: Delta | None = None  # sent by a gateway that does not stream
    finish_reason: str | None = None
    error: Any = None  # sent by OpenRouter
    index: Any = None
    text: str | None = None  # sent by a server that completes prompts

    @property
    def says_something(self) -> bool:
        """Whether the delta has a piece of the reply or of the reasoning."""
        said = self.delta or self.message
        if self.text or said is None:
            return bool(self.text)
        texts = said.content or said.reasoning_content or said.reasoning or said.refusal
        return bool(texts or said.tool_calls or said.function_call)


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class InputDetails(msgspec.Struct):
    cached_tokens: int | None = None


class TokenUsage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None
    prompt_cache_hit_tokens: int | None = None  # sent by DeepSeek
    cached_tokens: int | None = None  # sent by Moonshot
    cache_read_input_tokens: int | None = None  # sent by gateways to Anthropic
    reasoning_tokens: int | None = None  # sent by Perplexity

    @property
    def says_something(self) -> bool:
        return self.prompt_tokens is not None or self.completion_tokens is not None

    @property
    def cached(self) -> int | None:
        """The tokens of the prompt that the server had in a cache; None if it does not say."""
        details = self.prompt_tokens_details
        forms = (
            details.cached_tokens if details is not None else None,
            self.prompt_cache_hit_tokens,
            self.cached_tokens,
            self.cache_read_input_tokens,
        )
        return next((count for count in forms if count is not None), None)

    @property
    def reasoned(self) -> int | None:
        """The tokens of the reasoning; None if the server does not say."""
        details = self.completion_tokens_details
        said = details.reasoning_tokens if details is not None else None
        return self.reasoning_tokens if said is None else said


class Chunk(msgspec.Struct, gc=False):
    choices: list[Choice] | None = None
    usage: TokenUsage | None = None
    error: Any = None


class _WorkChoice(msgspec.Struct):
    delta: dict[str, msgspec.Raw] | None = None
    message: dict[str, msgspec.Raw] | None = None


class _WorkChunk(msgspec.Struct):
    choices: list[_WorkChoice] | None = None


_decode = msgspec.json.Decoder(Chunk).decode
_decode_work = msgspec.json.Decoder(_WorkChunk).decode


class PartsCount:
    """Counts the members and items of a JSON text that arrives in pieces: the objects that a decoder would make."""

    def __init__(self) -> None:
        self._parts = 0
        self._quotes = 0
        self._is_in_text = False
        self._escape = b""

    def add(self, chunk: bytes) -> None:
        """Take the next piece.

        Raises:
            ValueError: The text has more parts than may be decoded.
        """
        text = (self._escape + chunk).replace(rb"\\", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        text = text.removesuffix(b"\\").replace(rb"\"", b"")
        self._quotes += text.count(b'"')
        if self._quotes <= 4 * _PARTS_MAX:
            pieces = text.split(b'"')
            self._parts += _parts(b"".join(pieces[self._is_in_text :: 2]))
            self._is_in_text ^= len(pieces) % 2 == 0
        if self._parts > _PARTS_MAX or self._quotes > 4 * _PARTS_MAX:
            raise ValueError("too many parts")


def decode_chunk(payload: bytes, *, is_checked: bool = False) -> Chunk:
    """Read a chunk strictly, which is fast; if the strict reading fails, read the parts that can be read.

    After a loose reading a text may hold lone surrogates (:func:`join_surrogates`).

    Args:
        is_checked: Whether a :class:`PartsCount` has counted the parts of the payload.

    Raises:
        ValueError: The text is not JSON, does not look like a chunk, or has too many parts.
    """
    if len(payload) > _SMALL_BYTES and not is_checked:
        PartsCount().add(payload)
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    if not payload.startswith(_STARTS):
        raise ValueError("nothing like a chunk")
    try:
        return _read_loosely(payload)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def has_work(payload: bytes) -> bool:
    """Whether a chunk without text has other content in its first delta: a tool call, encrypted reasoning, an image.

    The shape decides, because each server has its own names: a list or an object that is not empty, or a text
    under a name like "reasoning". A role alone is no content.
    """
    try:
        chunk = _decode_work(payload)
        choice = chunk.choices[0] if chunk.choices else None
        said = (choice.delta or choice.message if choice is not None else None) or {}
        return any(_is_work(name, bytes(value).strip()) for name, value in said.items())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def join_surrogates(text: str) -> str:
    """The text in a form that can be encoded: surrogate pairs become their character, lone surrogates U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def tokens(count: int | None) -> int:
    """The count, moved into the range of possible counts."""
    return min(max(count or 0, 0), _TOKENS_MAX)


def _parts(payload: bytes) -> int:
    return payload.count(b",") + payload.count(b"{") + payload.count(b"[")


def _is_work(name: str, value: bytes) -> bool:
    if value in _EMPTY:
        return False
    if value.startswith(b'"'):
        return bool(_WORK.search(name))
    # A list or an object that holds only empty values is no work: [null], {"signature": null}
    return value.startswith((b"{", b"[")) and (len(value) > 256 or _has_content(msgspec.json.decode(value)))


def _has_content(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_content, value.values()))
    return any(map(_has_content, value)) if isinstance(value, list) else value not in (None, "", False)


def _int(digits: str) -> int:
    """Read a number of JSON; 0 for a very long one, as thousands of digits cost as much as thousands of numbers."""
    return int(digits) if len(digits) <= _DIGITS_MAX else 0


def _float(text: str) -> float:
    """Read a number of JSON; the largest one that there is for a larger one, because JSON cannot say infinity."""
    return min(max(float(text), -_FLOAT_MAX), _FLOAT_MAX)


def _no_number(_: str) -> None:
    """Read NaN or Infinity, which are not JSON: what is kept of the chunk goes back to the server as JSON."""


def _read_loosely(payload: bytes) -> Chunk:
    """Read the usable parts of a chunk that has another form than OpenAI's.

    Servers have sent: content in parts (Mistral), reasoning in an object (Envoy), half a surrogate pair, counts with
    fractions (OpenRouter), a list around an error (Gemini), NaN (Python's own json).
    """
    text = payload.decode(errors="replace")
    decoded = json.loads(text, strict=False, parse_int=_int, parse_float=_float, parse_constant=_no_number)
    if isinstance(decoded, list):
        decoded = decoded[0] if decoded else None
    if decoded is None:
        return Chunk()
    if not isinstance(decoded, dict):
        raise ValueError("nothing like a chunk")  # noqa: TRY004  a server's answer is wrong, not an argument
    choices = decoded.get("choices")
    return Chunk(
        choices=[_choice(choice) for choice in choices] if isinstance(choices, list) else None,
        usage=_usage(decoded.get("usage")),
        error=decoded.get("error"),
    )


def _choice(said: object) -> Choice:
    if not isinstance(said, dict):
        return Choice()
    reason, text = said.get("finish_reason"), said.get("text")
    return Choice(
        delta=_delta(said.get("delta")),
        message=_delta(said.get("message")),
        finish_reason=reason if isinstance(reason, str) else None,
        error=said.get("error"),
        index=said.get("index"),
        text=_text(text),
    )


def _delta(said: object) -> Delta | None:
    if not isinstance(said, dict):
        return None
    return Delta(
        content=_text(said.get("content")),
        reasoning_content=_thoughts(said.get("content")) or _text(said.get("reasoning_content")),
        reasoning=_text(said.get("reasoning")),
        refusal=_text(said.get("refusal")),
        tool_calls=_calls(said.get("tool_calls")),
        function_call=_function(said.get("function_call")),
        reasoning_details=_details(said.get("reasoning_details")),
        thinking_blocks=_blocks(said.get("thinking_blocks")),
    )


def _calls(said: object) -> list[CallDelta]:
    calls = [said] if isinstance(said, dict) else said if isinstance(said, list) else []
    return [
        CallDelta(
            index=call.get("index"),
            id=_name(call.get("id")),
            function=_function(call.get("function")),
            extra_content=_raw(call.get("extra_content")),
        )
        for call in calls
        if isinstance(call, dict)
    ]


def _function(said: object) -> FunctionDelta | None:
    if not isinstance(said, dict):
        return None
    arguments = said.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return FunctionDelta(name=_name(said.get("name")), arguments=arguments)


def _details(said: object) -> list[ReasoningDetail]:
    details = [detail for detail in said if isinstance(detail, dict)] if isinstance(said, list) else []
    return [
        ReasoningDetail(
            data=_name(detail.get("data")),
            signature=_name(detail.get("signature")),
            text=_text(detail.get("text")),
            summary=_text(detail.get("summary")),
            type=_name(detail.get("type")),
            id=_name(detail.get("id")),
            format=_name(detail.get("format")),
            index=_whole(detail.get("index")),
        )
        for detail in details
    ]


def _blocks(said: object) -> list[ThinkingBlock]:
    blocks = [block for block in said if isinstance(block, dict)] if isinstance(said, list) else []
    return [
        ThinkingBlock(
            type=_name(block.get("type")), signature=_name(block.get("signature")), data=_name(block.get("data"))
        )
        for block in blocks
    ]


def _name(said: object) -> str | None:
    """A name or an id; some servers count ids up as numbers."""
    if isinstance(said, int) and not isinstance(said, bool):
        return str(said)
    return join_surrogates(said) if isinstance(said, str) else None


def _raw(said: object) -> msgspec.Raw | None:
    return None if said is None else msgspec.Raw(json.dumps(said).encode())


def _text(said: object) -> str:
    """The text of a string, of an object with a text, or of a list of strings and objects."""
    if isinstance(said, list):
        return "".join(map(_text, said))
    if isinstance(said, dict):
        return _text(said.get("text"))
    return said if isinstance(said, str) else ""


def _thoughts(content: object) -> str:
    parts = content if isinstance(content, list) else []
    return "".join(_text(part.get("thinking")) for part in parts if isinstance(part, dict))


def _usage(said: object) -> TokenUsage | None:
    if not isinstance(said, dict):
        return None
    of_input, of_output = said.get("prompt_tokens_details"), said.get("completion_tokens_details")
    return TokenUsage(
        prompt_tokens=_whole(said.get("prompt_tokens")),
        completion_tokens=_whole(said.get("completion_tokens")),
        total_tokens=_whole(said.get("total_tokens")),
        prompt_tokens_details=InputDetails(_whole(of_input.get("cached_tokens")))
        if isinstance(of_input, dict)
        else None,
        completion_tokens_details=OutputDetails(_whole(of_output.get("reasoning_tokens")))
        if isinstance(of_output, dict)
        else None,
        prompt_cache_hit_tokens=_whole(said.get("prompt_cache_hit_tokens")),
        cached_tokens=_whole(said.get("cached_tokens")),
        cache_read_input_tokens=_whole(said.get("cache_read_input_tokens")),
        reasoning_tokens=_whole(said.get("reasoning_tokens")),
    )


def _whole(count: object) -> int | None:
    if isinstance(count, float):
        return int(count) if math.isfinite(count) else None
    return count if isinstance(count, int) else None
