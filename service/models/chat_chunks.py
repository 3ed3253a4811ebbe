"""One chunk of a streamed chat completion: as OpenAI defined it, and as others vary it. Pure.

Source: https://platform.openai.com/docs/api-reference/chat-streaming
"""

import json
import math
from typing import Any

import msgspec

_TOKENS_MAX = 10**12
"""No count of tokens is larger; what says so is wrong."""


class Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None  # DeepSeek, older vLLM, llama.cpp, LiteLLM
    reasoning: str | None = None  # OpenRouter, newer vLLM, Ollama
    refusal: str | None = None  # OpenAI, in place of content


class Choice(msgspec.Struct):
    delta: Delta | None = None
    message: Delta | None = None  # where somebody on the way does not stream
    finish_reason: str | None = None
    error: Any = None  # OpenRouter


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class TokenUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: OutputDetails | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: TokenUsage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


def decode_chunk(payload: bytes) -> Chunk:
    """Read a chunk: strictly, because that is fast, and if that fails whatever can be read of it.

    A text may then hold lone surrogates (:func:`join_surrogates`).

    Raises:
        ValueError: It is not JSON, or nothing like a chunk.
    """
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return _read_loosely(payload)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def join_surrogates(text: str) -> str:
    """A text that can be encoded: pairs of surrogates become their character, lone ones U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def tokens(count: int | None) -> int:
    """A count within what can be."""
    return min(max(count or 0, 0), _TOKENS_MAX)


def _read_loosely(payload: bytes) -> Chunk:
    """Seen: content in parts (Mistral), reasoning in an object (Envoy), half a surrogate pair, counts with fractions
    (OpenRouter), a list around an error (Gemini), NaN (Python's own json)."""
    decoded = json.loads(payload.decode(errors="replace"), strict=False)
    if isinstance(decoded, list):
        decoded = decoded[0] if decoded else None
    if decoded is None:
        return Chunk()
    if not isinstance(decoded, dict):
        raise ValueError("nothing like a chunk")  # noqa: TRY004  of a server's answer, not of an argument
    choices = decoded.get("choices")
    return Chunk(
        choices=[_choice(choice) for choice in choices[:1]] if isinstance(choices, list) else None,
        usage=_usage(decoded.get("usage")),
        error=decoded.get("error"),
    )


def _choice(said: object) -> Choice:
    if not isinstance(said, dict):
        return Choice()
    reason = said.get("finish_reason")
    return Choice(
        delta=_delta(said.get("delta")),
        message=_delta(said.get("message")),
        finish_reason=reason if isinstance(reason, str) else None,
        error=said.get("error"),
    )


def _delta(said: object) -> Delta | None:
    if not isinstance(said, dict):
        return None
    return Delta(
        content=_text(said.get("content")),
        reasoning_content=_thoughts(said.get("content")) or _text(said.get("reasoning_content")),
        reasoning=_text(said.get("reasoning")),
        refusal=_text(said.get("refusal")),
    )


def _text(said: object) -> str:
    """The text in a string, in an object with one, or in a list of those."""
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
    details = said.get("completion_tokens_details")
    return TokenUsage(
        prompt_tokens=_whole(said.get("prompt_tokens")),
        completion_tokens=_whole(said.get("completion_tokens")),
        completion_tokens_details=OutputDetails(_whole(details.get("reasoning_tokens")))
        if isinstance(details, dict)
        else None,
    )


def _whole(count: object) -> int | None:
    if isinstance(count, float):
        return int(count) if math.isfinite(count) else None
    return count if isinstance(count, int) else None
