"""What a chat completions server says when it fails, as :class:`ModelError`. Pure.

Servers agree on little more than the status and on ``{"error": {"message": ...}}``; what is told apart
here are the cases in which a user can do something.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

from service.errors import ModelError

_QUOTE_LENGTH_MAX = 300

# OpenAI, vLLM, llama.cpp, LiteLLM and DeepSeek, in this order.
_CONTEXT_TOO_LONG = re.compile(
    r"context_length_exceeded|maximum context length|exceed_context_size|exceeds the available context size"
    r"|context.?window|input is too long|prompt is too long",
    re.IGNORECASE,
)
# OpenAI, vLLM, DeepSeek ("Model Not Exist"), Ollama ("model 'x' not found"), LiteLLM.
_MODEL_NOT_FOUND = re.compile(
    r"model_not_found|model_not_exist|\bmodels?\b.{0,200}\bnot (exist|found)|invalid model name|unknown model",
    re.IGNORECASE | re.DOTALL,
)
_RATE_LIMITED = re.compile(r"rate.?limit|too many requests", re.IGNORECASE)
_OUT_OF_CREDIT = re.compile(
    r"insufficient_quota|insufficient.?balance|billing|exceeded your current quota", re.IGNORECASE
)


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """What an upstream said: its own words, not yet fit to be shown.

    ``words`` has everything that may tell one case from another, ``message`` what is for a reader;
    ``is_error_member`` where it stood under ``error``, which no regular reply has.
    """

    words: str = ""
    message: str = ""
    status: int | None = None
    is_error_member: bool = False

    @classmethod
    def from_error_member(cls, error: object) -> "ErrorReply":
        """Read the ``error`` member of a body or of a chunk."""
        if isinstance(error, str):
            return cls(words=error, message=error, is_error_member=True)
        if not isinstance(error, dict):
            return cls(is_error_member=True)
        message = error.get("message")
        code = str(error.get("code"))
        return cls(
            words=" ".join(str(error[key]) for key in ("code", "type", "message") if error.get(key) is not None),
            message=message if isinstance(message, str) else "",
            status=int(code) if re.fullmatch(r"[45]\d\d", code, re.ASCII) else None,
            is_error_member=True,
        )

    @classmethod
    def from_body(cls, body: bytes) -> "ErrorReply":
        """Read the body of an error response: JSON in one of the usual shapes, or nothing."""
        try:
            decoded = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return cls()
        if not isinstance(decoded, dict):
            return cls()
        if decoded.get("error"):
            return cls.from_error_member(decoded["error"])
        for message in (decoded.get("message"), decoded.get("detail")):
            if isinstance(message, str):
                return cls(words=f"{decoded.get('code')} {decoded.get('type')} {message}", message=message)
        return cls()


def error_from_status(
    status: int, reply: ErrorReply, *, retry_after_s: float | None, redact: Callable[[str], str]
) -> ModelError:
    """The error for a response whose status is not 200."""
    said = _said(reply, redact)
    if 300 <= status < 400:
        return ModelError(
            "upstream_rejected",
            f"The model server answered HTTP {status}, a redirect, and those are not followed: "
            "the model URL should name the final address.",
        )
    if status in (401, 403) and not _MODEL_NOT_FOUND.search(reply.words):
        return ModelError("upstream_auth", f"The model server did not accept the API key (HTTP {status}).{said}")
    if status == 413 or (status < 500 and _CONTEXT_TOO_LONG.search(reply.words)):
        return ModelError("context_too_long", f"The conversation is too long for this model (HTTP {status}).{said}")
    if status < 500 and status != 429 and _MODEL_NOT_FOUND.search(reply.words):
        return ModelError("model_not_found", f"The model server does not know this model (HTTP {status}).{said}")
    if status == 404:
        return ModelError(
            "upstream_rejected",
            f"The model server has no chat completions at this address (HTTP 404): check the model URL.{said}",
        )
    if status == 429:
        return ModelError(
            "rate_limited",
            f"The model server takes no more requests for now (HTTP 429).{said}",
            retryable=not _OUT_OF_CREDIT.search(reply.words),
            retry_after_s=retry_after_s,
        )
    if status >= 500 or status == 408:
        return ModelError(
            "upstream_error",
            f"The model server failed (HTTP {status}).{said}",
            retryable=True,
            retry_after_s=retry_after_s,
        )
    return ModelError("upstream_rejected", f"The model server refused the request (HTTP {status}).{said}")


def error_from_reply(reply: ErrorReply, *, redact: Callable[[str], str]) -> ModelError:
    """The error for an ``error`` member where a part of the reply should have been."""
    if reply.status is not None:
        return error_from_status(reply.status, reply, retry_after_s=None, redact=redact)
    for pattern, status in ((_CONTEXT_TOO_LONG, 400), (_MODEL_NOT_FOUND, 404), (_RATE_LIMITED, 429)):
        if pattern.search(reply.words):
            return error_from_status(status, reply, retry_after_s=None, redact=redact)
    return ModelError("upstream_error", f"The model server reported an error.{_said(reply, redact)}", retryable=True)


def parse_retry_after(value: str | None, *, now: datetime) -> float | None:
    """Seconds to wait, from a ``Retry-After`` of seconds or of an HTTP date; None where it is neither.

    Source: https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3
    """
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", value, re.ASCII):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())


def _said(reply: ErrorReply, redact: Callable[[str], str]) -> str:
    """The upstream's own message as the end of a sentence of ours: one line, short, without secrets."""
    # Redacted before it is cut, or half a key could be left at the end.
    text = redact(reply.message)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(text) > _QUOTE_LENGTH_MAX:
        text = text[: _QUOTE_LENGTH_MAX - 1] + "…"
    return f" It says: {text}" if text else ""
