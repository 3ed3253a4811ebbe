"""Turns the error of a chat completions server into a :class:`ModelError`. Pure.

Servers agree on little more than the status and on ``{"error": {"message": ...}}``. This module tells those
cases apart in which a user can do something.
"""

import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from service.errors import ModelError
from service.failure_codes import FailureCode
from service.models.continuation import CONTINUATION_PARAMETERS
from service.models.parameters import refused_parameter
from service.models.sse_decoder import SseDecoder

_QUOTE_LENGTH_MAX = 300
_WORDS_LENGTH_MAX = 4000
_PARAMETER_LENGTH_MAX = 200
_DEPTH_MAX = 4
_MESSAGES = (
    *(
        "message",
        "Message",
        "detail",
        "msg",
        "error_msg",
        "error_message",
        "errors",
        "errorMessage",
        "errMsg",
        "errmsg",
    ),
    *("err_msg", "error_description"),
)
"""The members in which servers put a text for a reader, the most usual first."""
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"([\d.]+)(ms|s|m|h)", re.ASCII)
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

# The words of OpenAI, SGLang and LM Studio; llama.cpp; LiteLLM; vLLM; xAI; TGI; Gemini; others.
_CONTEXT_TOO_LONG = re.compile(
    r"context.?length|exceed_context_size|exceeds the available context size|context.?window"
    r"|maximum (model|prompt|input) length|`inputs` tokens \+ `max_new_tokens` must be"
    r"|input token count.{0,60}exceeds|(input|prompt) is too long",
    re.IGNORECASE,
)
# The words of OpenAI, vLLM, DeepSeek ("Model Not Exist"), Ollama ("model 'x' not found"), Gemini, LiteLLM, Mistral,
# Together, OpenRouter, Azure, and of what loads models from the Hugging Face hub when they are asked for (mlx-lm).
_MODEL_NOT_FOUND = re.compile(
    r"model_not_found|model_not_exist|\bmodels?\b.{0,200}\bnot (exist|found)|invalid[_ ]model\b|unknown model"
    r"|model_not_available|not a valid model|no endpoints found for|DeploymentNotFound"
    r"|repository not found|cached snapshot folder",
    re.IGNORECASE | re.DOTALL,
)
# The last two alternatives are the words of MiniMax and Tencent.
_WRONG_KEY = re.compile(
    r"(invalid|incorrect|wrong).api.?key|api.?key (is )?(not valid|invalid)|login fail|AuthFailure", re.IGNORECASE
)
# The words of OpenAI, Azure, LiteLLM, OpenRouter, Together, DeepSeek, Qwen, Moonshot, Zhipu, Volcengine, MiniMax, xAI
# and Gemini.
_CONTENT_FILTERED = re.compile(
    r"content.?(filter|polic|management|moderation|violat|exists risk)|moderation|flagged|invalid_prompt"
    r"|data.?inspection|inappropriate content|high.?risk|sensitive.?(content|word)|(input|output).{0,5}sensitive"
    r"|safety (check|system|polic)|usage (polic|guideline)|guardrail|prohibited.?content"
    r"|(prompt|input|content).{0,30}blocked|敏感|不安全|违规",
    re.IGNORECASE,
)
_UNSUPPORTED_CONTENT = re.compile(
    r"unsupported.{0,20}(content|media|modality|language|image|character)|invalid.{0,10}(unicode|utf-?8|surrogate)"
    r"|(image|audio|video|file|content|language|modality|multimodal)s?\b.{0,40}\bnot supported"
    r"|not support.{0,20}(image|audio|video|file|multimodal|language)",
    re.IGNORECASE,
)
_COUNT = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d{3,12})(?![\w%]|[.,]\d)", re.ASCII)
_COUNT_MIN = 512
"""A smaller number in a sentence about tokens is a status, or the requested length of the reply."""
_RATE_LIMITED = re.compile(r"rate.?limit|too many requests", re.IGNORECASE)
_OUT_OF_CREDIT = re.compile(
    r"insufficient_quota|insufficient.?balance|billing|exceeded your current quota", re.IGNORECASE
)


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """The error text of an upstream, in its own words, before secrets are removed.

    ``words`` has all texts that tell one case from another, ``message`` the text for a reader. ``parameter`` is what
    the server names as wrong in a field of its own. ``is_error_member`` is true if the text stood under ``error``, a
    member that no regular reply has.
    """

    words: str = ""
    message: str = ""
    parameter: str = ""
    status: int | None = None
    is_error_member: bool = False

    @classmethod
    def from_error_member(cls, error: object) -> "ErrorReply":
        """Read the ``error`` member of a body or of a chunk."""
        if isinstance(error, str):
            return cls(words=_words(error), message=error, is_error_member=True)
        if not isinstance(error, dict):
            return cls(is_error_member=True)
        message = _message_in(error)
        metadata = error.get("metadata")
        if isinstance(metadata, dict) and (raw := _text_of(metadata.get("raw"))):
            message = f"{message}: {raw}"  # OpenRouter's message is only "Provider returned error"
        return cls(
            words=_words(error.get("code"), error.get("Code"), error.get("type"), error.get("status"), message),
            message=message,
            parameter=_parameter(error.get("param")),
            status=_status(error.get("code")) or _status(error.get("status")),
            is_error_member=True,
        )

    @classmethod
    def from_body(cls, body: bytes) -> "ErrorReply":
        """Read the body of an error response: JSON in one of the usual shapes, events with such JSON, or plain text."""
        if body.startswith((b"data:", b"event:")):
            body = next(iter(SseDecoder(event_bytes_max=len(body) + 2).feed(body + b"\n\n")), b"")
        try:
            decoded = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return cls._from_text(body)
        except RecursionError:
            return cls()
        return cls.from_decoded(decoded)

    @classmethod
    def from_decoded(cls, decoded: object) -> "ErrorReply":
        """Read JSON that is no regular reply."""
        if isinstance(decoded, list) and decoded:
            decoded = decoded[0]  # Gemini sends a list
        if not isinstance(decoded, dict):
            return cls()
        if error := _error_in(decoded):
            return cls.from_error_member(error)
        message = _message_in(decoded)
        code = decoded.get("code")
        return cls(
            words=_words(code, decoded.get("type"), message),
            message=message,
            parameter=_parameter(decoded.get("param")),
            status=_status(code),
        )

    @classmethod
    def _from_text(cls, body: bytes) -> "ErrorReply":
        text = body.decode(errors="replace").strip()
        if not text or text[0] in "<{[" or "\ufffd" in text:
            return cls()  # the body is an HTML page, or JSON that was cut
        return cls(words=text[:_WORDS_LENGTH_MAX], message=text)

    @property
    def is_context_too_long(self) -> bool:
        """Whether the prompt, or the prompt with the requested reply, does not fit into the model."""
        return bool(_CONTEXT_TOO_LONG.search(self.words))


class RetryHints(msgspec.Struct, frozen=True, kw_only=True):
    """The response's advice about asking again: after how many seconds, and whether at all. None for no advice."""

    after_s: float | None = None
    is_useful: bool | None = None

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], *, now: datetime) -> "RetryHints":
        """Read ``retry-after-ms`` (Azure), which is finer, or else ``Retry-After``, and ``x-should-retry`` (OpenAI).

        Args:
            headers: The headers by name; the case of a name does not matter.
        """
        ms = headers.get("retry-after-ms", "").strip()
        exact_s = float(ms) / 1000 if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", ms, re.ASCII) else None
        should = headers.get("x-should-retry", "").strip().lower()
        return cls(
            after_s=parse_retry_after(headers.get("retry-after"), now=now) if exact_s is None else exact_s,
            is_useful={"true": True, "false": False}.get(should),
        )


_NO_HINTS = RetryHints()
_REFUSING = frozenset({400, 404, 422})
"""The statuses with which servers refuse a parameter. OpenRouter says 404 if no provider takes the parameter."""
_REFUSED_INPUT: tuple[FailureCode, ...] = ("context_too_long", "content_filter", "unsupported_content")
"""Codes of refusals of an input: the same input is refused again, even if a header says otherwise."""


def _error_in(said: dict[Any, Any]) -> object:
    """The error in a body: under ``error``, or under the names that other clouds use."""
    if said.get("error"):
        return said["error"]
    for wrapper in ("Response", "ResponseMetadata"):  # used by Tencent, Volcengine
        if isinstance(said.get(wrapper), dict) and said[wrapper].get("Error"):
            return said[wrapper]["Error"]
    status = said.get("base_resp")  # MiniMax sends this member with regular replies, too, with the code 0
    if isinstance(status, dict) and status.get("status_code"):
        return {"code": status["status_code"], "message": status.get("status_msg")}
    return None


def _status(code: object) -> int | None:
    return int(str(code)) if re.fullmatch(r"[45]\d\d", str(code), re.ASCII) else None


def _parameter(said: object) -> str:
    return said[:_PARAMETER_LENGTH_MAX] if isinstance(said, str) else ""


def _words(*parts: object) -> str:
    return " ".join(str(part)[:_WORDS_LENGTH_MAX] for part in parts if isinstance(part, str | int) and part != "")


def _message_in(error: dict[Any, Any], *, depth: int = 0) -> str:
    return next((text for name in _MESSAGES if (text := _text_of(error.get(name), depth=depth))), "")


def _text_of(said: object, *, depth: int = 0) -> str:
    """The text for a reader in an error of any known form."""
    if isinstance(said, str):
        return said
    if depth == _DEPTH_MAX:
        return ""
    if isinstance(said, list):  # sent by FastAPI, Cloudflare
        return "; ".join(text for item in said[:4] if (text := _text_of(item, depth=depth + 1)))
    if isinstance(said, dict):
        text, place = _message_in(said, depth=depth + 1), said.get("loc")
        return f"{'.'.join(map(str, place[:8]))}: {text}" if text and isinstance(place, list) and place else text
    return ""


def error_from_status(
    status: int,
    reply: ErrorReply,
    *,
    redact: Callable[[str], str],
    hints: RetryHints = _NO_HINTS,
    sent: Collection[str] = (),
) -> ModelError:
    """The error for a response whose status is not 200.

    Args:
        sent: The parameters of the request (:mod:`service.models.parameters`).
    """
    error = _error_from_status(status, reply, redact=redact, sent=sent)
    if hints.is_useful is not None:
        error.retryable = hints.is_useful and error.code not in _REFUSED_INPUT
    if error.retryable or error.code == "rate_limited":
        error.retry_after_s = hints.after_s
    return error


def _error_from_status(
    status: int, reply: ErrorReply, *, redact: Callable[[str], str], sent: Collection[str]
) -> ModelError:
    words = quote(reply, redact=redact)
    if 300 <= status < 400:
        return ModelError(
            "upstream_rejected",
            f"The model server answered HTTP {status}, a redirect, and those are not followed: "
            "the model URL should name the final address.",
        )
    is_about_model = _MODEL_NOT_FOUND.search(reply.words)
    if (status == 401 and not is_about_model) or (status == 400 and _WRONG_KEY.search(reply.words)):
        message = f"The model server did not accept the API key (HTTP {status})."
        return ModelError("upstream_auth", message, upstream_words=words)
    if status == 403 and not is_about_model and not _CONTENT_FILTERED.search(reply.words):
        message = "The model server does not allow this request with this API key (HTTP 403)."
        return ModelError("upstream_auth", message, upstream_words=words)
    if status == 413 or (status < 500 and reply.is_context_too_long):
        tokens, tokens_max = token_counts(reply.message)
        return ModelError(
            "context_too_long",
            f"The conversation is too long for this model (HTTP {status}).",
            upstream_words=words,
            tokens=tokens,
            tokens_max=tokens_max,
        )
    if status < 500 and status != 429 and is_about_model:
        message = f"The model server does not know this model (HTTP {status})."
        return ModelError("model_not_found", message, upstream_words=words)
    refused = refused_parameter(reply.words, reply.parameter, sent) if status in _REFUSING else None
    if status == 404 and refused is None:
        return ModelError(
            "upstream_rejected",
            "The model server has no chat completions at this address (HTTP 404): check the model URL.",
            upstream_words=words,
        )
    if status == 429:
        return ModelError(
            "rate_limited",
            "The model server takes no more requests for now (HTTP 429).",
            upstream_words=words,
            retryable=not _OUT_OF_CREDIT.search(reply.words),
        )
    if status >= 500 or status == 408:
        return ModelError(
            "upstream_error",
            f"The model server failed (HTTP {status}).",
            upstream_words=words,
            retryable=True,
        )
    code, what = _refusal(reply)
    if code == "upstream_rejected" and refused is not None:
        message = f"The model server does not take {refused}, or not this value of it (HTTP {status})."
        return ModelError(
            "parameter_refused",
            message,
            upstream_words=words,
            parameter=refused,
            may_be_continuation=refused in CONTINUATION_PARAMETERS,
        )
    return ModelError(
        code,
        f"The model server {what} (HTTP {status}).",
        upstream_words=words,
        may_be_continuation=code == "upstream_rejected" and status in (400, 422),
    )


def _refusal(reply: ErrorReply) -> tuple[FailureCode, str]:
    """The code of a refusal for an unusual reason, and a sentence that says what happened."""
    if _CONTENT_FILTERED.search(reply.words):
        return "content_filter", "refused the content of the conversation"
    if _UNSUPPORTED_CONTENT.search(reply.words):
        return "unsupported_content", "does not take content of a kind that the conversation has"
    return "upstream_rejected", "refused the request"


def error_from_reply(reply: ErrorReply, *, redact: Callable[[str], str], sent: Collection[str] = ()) -> ModelError:
    """The error for an ``error`` member where a part of the reply should have been."""
    if reply.status is not None:
        return error_from_status(reply.status, reply, redact=redact, sent=sent)
    for pattern, status in (
        (_CONTEXT_TOO_LONG, 400),
        (_WRONG_KEY, 400),
        (_MODEL_NOT_FOUND, 404),
        (_RATE_LIMITED, 429),
        (_CONTENT_FILTERED, 400),
        (_UNSUPPORTED_CONTENT, 400),
    ):
        if pattern.search(reply.words):
            return error_from_status(status, reply, redact=redact)
    words = quote(reply, redact=redact)
    return ModelError("upstream_error", "The model server reported an error.", upstream_words=words, retryable=True)


def token_counts(message: str) -> tuple[int | None, int | None]:
    """The tokens that a refusal counted and the tokens that the model takes; None for a number that is not there.

    Servers word such a refusal in a dozen ways. In all of them the largest number is the count, and the next the bound.
    """
    numbers = {int(number.replace(",", "")) for number in _COUNT.findall(message[:_WORDS_LENGTH_MAX])}
    counts = sorted(number for number in numbers if number >= _COUNT_MIN)
    if len(counts) < 2:
        return None, counts[0] if counts else None
    return counts[-1], counts[-2]


def parse_retry_after(value: str | None, *, now: datetime) -> float | None:
    """Seconds to wait, from a ``Retry-After`` of seconds or of an HTTP date; None for any other value.

    Durations like "1s" and "1m30s" are in no standard, but servers send them, so they are read, too.

    Source: https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3
    """
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", value, re.ASCII):
        return float(value)
    if _DURATION.fullmatch(value.strip()):
        return sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION_PART.findall(value))
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())


def quote(reply: ErrorReply, *, redact: Callable[[str], str]) -> str:
    """The upstream's own message as a sentence: one short line without secrets; empty if there is no message."""
    # The message is redacted before it is cut: otherwise half a key could be left at its end.
    text = redact(reply.message)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(text) > _QUOTE_LENGTH_MAX:
        text = text[: _QUOTE_LENGTH_MAX - 1] + "…"
    return f"It says: {text}" if text else ""
