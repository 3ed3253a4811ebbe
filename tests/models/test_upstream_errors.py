"""Servers' failures in their own words, and the errors that the client makes of them."""

from datetime import UTC, datetime

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.models.upstream_errors import (
    ErrorReply,
    RetryHints,
    error_from_reply,
    error_from_status,
    parse_retry_after,
    token_counts,
)

Said = list[tuple[int, object, str, bool]]
"""Status and body of an answer; code of the client's error, and whether it is retryable."""


def said(message: str, **more: object) -> dict[str, object]:
    """The usual shape of an error's body."""
    return {"error": {"message": message, **more}}


OPENAI: Said = [
    (401, said("Incorrect API key provided: sk-x.", code="invalid_api_key"), "upstream_auth", False),
    (404, said("The model `x` does not exist or you lack access.", code="model_not_found"), "model_not_found", False),
    (403, said("Project `p` does not have access to model `x`", code="model_not_found"), "model_not_found", False),
    (400, said("maximum context length is 8192", code="context_length_exceeded"), "context_too_long", False),
    (400, said("Invalid value: 'x'", param="temperature", code=None), "upstream_rejected", False),
    (429, said("Rate limit reached for gpt-4o", type="tokens", code="rate_limit_exceeded"), "rate_limited", True),
    (429, said("You exceeded your current quota", code="insufficient_quota"), "rate_limited", False),
]
DEEPSEEK: Said = [
    (400, said("Model Not Exist", type="invalid_request_error"), "model_not_found", False),
    (402, said("Insufficient Balance", code="invalid_request_error"), "upstream_rejected", False),
]
VLLM: Said = [
    (400, said("This model's maximum context length is 4096 tokens.", code=400), "context_too_long", False),
    (404, {"object": "error", "message": "The model `x` does not exist.", "code": 404}, "model_not_found", False),
]
MLX_LM: Said = [  # what it says where it loads the model that is asked for, from the hub and offline
    (
        404,
        {"error": "401 Client Error. Repository Not Found for url: https://h/api/models/x"},
        "model_not_found",
        False,
    ),
    (
        404,
        {"error": "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk."},
        "model_not_found",
        False,
    ),
]
OLLAMA: Said = [(404, said('model "x" not found, try pulling it first', type="api_error"), "model_not_found", False)]
LLAMA_CPP: Said = [
    (400, said("the request exceeds the available context size", code=400), "context_too_long", False),
    (400, said("too much", type="exceed_context_size_error"), "context_too_long", False),
    (503, said("Loading model", code=503, type="unavailable_error"), "upstream_error", True),
]
LITELLM: Said = [
    (400, said("litellm.ContextWindowExceededError: ...", type=None, code="400"), "context_too_long", False),
    (400, said("Invalid model name passed in model=x", code="400"), "model_not_found", False),
]
SGLANG: Said = [
    (
        400,
        {"object": "error", "message": "The input is longer than the model's context length."},
        "context_too_long",
        False,
    )
]
TGI: Said = [
    (
        422,
        {"error": "`inputs` tokens + `max_new_tokens` must be at most 4096", "type": "validation"},
        "context_too_long",
        False,
    )
]
XAI: Said = [
    (400, {"code": "invalid", "error": "This model's maximum prompt length is 131072"}, "context_too_long", False)
]
GEMINI: Said = [
    (400, [said("API key not valid. Please pass a valid API key.", code=400)], "upstream_auth", False),
    (404, [said("models/foo is not found for API version v1main", code=404)], "model_not_found", False),
    (429, [said("Resource has been exhausted (e.g. check quota).", code=429)], "rate_limited", True),
    (400, [said("The input token count (1200000) exceeds the maximum", code=400)], "context_too_long", False),
]
MISTRAL: Said = [
    (400, {"object": "error", "message": "Invalid model: foo", "type": "invalid_model"}, "model_not_found", False),
]
OPENROUTER: Said = [
    (404, said("No endpoints found for foo/bar.", code=404), "model_not_found", False),
    (400, said("foo/bar is not a valid model ID", code=400), "model_not_found", False),
    (403, said("Your chosen model requires moderation and your input was flagged"), "content_filter", False),
]
AZURE: Said = [
    (404, said("The API deployment does not exist.", code="DeploymentNotFound"), "model_not_found", False),
    (400, said("The prompt triggered the content management policy.", code="content_filter"), "content_filter", False),
]
FILTERS: Said = [
    (400, said("Content Exists Risk", type="invalid_request_error"), "content_filter", False),
    (400, said("Invalid prompt: it was flagged.", code="invalid_prompt"), "content_filter", False),
    (
        400,
        said("Input data may contain inappropriate content.", code="data_inspection_failed"),
        "content_filter",
        False,
    ),
    (400, said("The request was rejected because it was considered high risk"), "content_filter", False),
    (400, said("系统检测到输入或生成内容可能包含不安全或敏感内容", code="1301"), "content_filter", False),
    (400, said("No.", code="InputTextSensitiveContentDetected"), "content_filter", False),
    (400, said("Content violates usage guidelines."), "content_filter", False),
    (403, said("Your request was blocked by our firewall"), "upstream_auth", False),
    (402, said("Your credit is used up, content or not"), "upstream_rejected", False),
    (400, said("model names are case sensitive"), "upstream_rejected", False),
]
UNSUPPORTED: Said = [
    (400, said("Image input is not supported by this model"), "unsupported_content", False),
    (400, said("This model does not support image input"), "unsupported_content", False),
    (422, said("messages.0.content: unsupported content part"), "unsupported_content", False),
    (400, said("Invalid Unicode in messages"), "unsupported_content", False),
    (400, said("response_format is not supported"), "upstream_rejected", False),
]
OTHERS: Said = [
    (404, {"detail": "Not Found"}, "upstream_rejected", False),
    (413, b"<html>413 Request Entity Too Large</html>", "context_too_long", False),
    (502, b"<html>502 Bad Gateway</html>", "upstream_error", True),
    (504, b"<html>504 Gateway Time-out</html>", "upstream_error", True),
    (302, b"", "upstream_rejected", False),
    (418, b"", "upstream_rejected", False),
]


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable"),
    [
        *[*OPENAI, *DEEPSEEK, *VLLM, *MLX_LM, *OLLAMA, *LLAMA_CPP, *LITELLM, *SGLANG, *TGI, *XAI, *GEMINI, *MISTRAL],
        *[*OPENROUTER, *AZURE, *FILTERS, *UNSUPPORTED, *OTHERS],
    ],
)
def test_servers_words_are_understood(status: int, body: object, code: str, retryable: bool) -> None:
    reply = ErrorReply.from_body(body if isinstance(body, bytes) else msgspec.json.encode(body))
    error = error_from_status(status, reply, redact=str)
    assert (error.code, error.retryable) == (code, retryable)
    assert str(status) in str(error)
    assert reply.message in str(error)
    assert not reply.message or reply.message not in error.message, "the upstream's words are kept apart"
    assert "<" not in str(error), "no markup"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"detail": [{"loc": ["body", "model"], "msg": "Field required"}]}, "body.model: Field required"),
        (
            {"object": "error", "message": {"detail": [{"loc": ["body", "x"], "msg": "Extra inputs"}]}},
            "body.x: Extra inputs",
        ),
        ({"success": False, "errors": [{"code": 7003, "message": "No route"}, {"message": "b"}]}, "No route; b"),
        ({"Message": "Bedrock's"}, "Bedrock's"),
        ({"error_msg": "Baidu's", "error_code": 6}, "Baidu's"),
        ({"errorMessage": "Lambda's", "errorType": "X"}, "Lambda's"),
        ({"error": "invalid_client", "error_description": "unused"}, "invalid_client"),
        ({"error_description": "OAuth's"}, "OAuth's"),
        ({"base_resp": {"status_code": 1004, "status_msg": "MiniMax's"}}, "MiniMax's"),
        ({"base_resp": {"status_code": 1004}}, ""),
        ({"base_resp": {"status_code": 0, "status_msg": "success"}}, ""),
        ({"base_resp": "x", "Response": [1], "ResponseMetadata": {"Error": None}}, ""),
        ({"Response": {"Error": {"Code": "AuthFailure", "Message": "Tencent's"}, "RequestId": "1"}}, "Tencent's"),
        ({"ResponseMetadata": {"Error": {"Code": "X", "Message": "Volcengine's"}}}, "Volcengine's"),
        (b'event: ping\ndata: 1\n\nevent: error\ndata: {"message": "an event\'s"}\n\n', "an event's"),
        (b"upstream connect error", "upstream connect error"),
        (b'data: {"error": {"message": "as an event"}}\n\n', "as an event"),
        (b'event: error\ndata: {"error": {"message": "unfinished"}}', "unfinished"),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": "it is down"}}},
            "Provider returned error: it is down",
        ),
        ({"message": {"message": {"message": {"message": {"message": {"message": "deep"}}}}}}, ""),
        ([], ""),
        ({"detail": []}, ""),
        (b"<html>", ""),
        (b'{"error": {"mess', ""),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b"", ""),
    ],
)
def test_the_message_for_a_reader_is_found_in_many_shapes(body: object, message: str) -> None:
    assert ErrorReply.from_body(body if isinstance(body, bytes) else msgspec.json.encode(body)).message == message


@pytest.mark.parametrize(
    ("member", "code", "retryable"),
    [
        ({"message": "Rate limit exceeded", "code": 429}, "rate_limited", True),
        ({"message": "Rate limit reached", "type": "rate_limit_error"}, "rate_limited", True),
        ({"message": "This model's maximum context length is 4096 tokens"}, "context_too_long", False),
        ({"message": "It was flagged.", "code": "content_filter"}, "content_filter", False),
        ({"message": "no such luck", "code": "400"}, "upstream_rejected", False),
        ({"message": "Incorrect API key provided"}, "upstream_auth", False),
        ({"message": "Internal error", "code": "internal"}, "upstream_error", True),
        ("just words", "upstream_error", True),
        ({"reason": "another shape"}, "upstream_error", True),
        (["a", "list"], "upstream_error", True),
        (True, "upstream_error", True),
    ],
)
def test_an_error_in_mid_stream_is_understood(member: object, code: str, retryable: bool) -> None:
    error = error_from_reply(ErrorReply.from_error_member(member), redact=str)
    assert (error.code, error.retryable) == (code, retryable)


@pytest.mark.parametrize(
    ("message", "tokens", "tokens_max"),
    [
        ("maximum context length is 8192 tokens. However, your messages resulted in 10000 tokens.", 10000, 8192),
        ("context length is 8192 tokens; you asked for 9100 (8100 in messages, 1000 in the completion)", 9100, 8192),
        ("request (5021 tokens) exceeds the available context size (4096 tokens), try increasing it", 5021, 4096),
        ("The input token count (1,200,000) exceeds the maximum allowed (1,048,576).", 1200000, 1048576),
        ("prompt is too long: 208310 tokens > 200000 maximum", 208310, 200000),
        ("maximum prompt length is 131072 but the request contains 200000 tokens.", 200000, 131072),
        ("context length of 8192 tokens. You requested 9000: 8000 from messages and 1000 to come.", 9000, 8192),
        ("Prompt contains 40000 tokens, too large for model with 32768 maximum context length", 40000, 32768),
        ("Range of input length should be [1, 30720]", None, 30720),
        ("maximum context length is 8192 tokens", None, 8192),
        ("the request exceeds the available context size", None, None),
        ("context length exceeded (HTTP 400, 99.5% of 1.5e6)", None, None),
        ("8192 and 8192", None, 8192),
        ("9" * 400, None, None),
        ("٨١٩٢", None, None),
        ("", None, None),
    ],
)  # fmt: skip
def test_the_tokens_that_would_fit_are_read_from_a_refusal(
    message: str, tokens: int | None, tokens_max: int | None
) -> None:
    assert token_counts(message) == (tokens, tokens_max)
    reply = ErrorReply.from_body(msgspec.json.encode(said(f"context length: {message}")))
    error = error_from_status(400, reply, redact=str)
    assert (error.code, error.tokens, error.tokens_max) == ("context_too_long", tokens, tokens_max)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "message", "code", "type", "detail", "errors", "loc", "metadata", "raw", "other"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def test_only_a_part_of_a_message_of_a_megabyte_is_read() -> None:
    for body in (
        {"error": "model " * 200_000},
        {"error": {"message": "model " * 200_000}},
        {"detail": "model " * 9999},
    ):
        assert len(ErrorReply.from_body(msgspec.json.encode(body)).words) <= 4100


@given(status=st.integers(300, 599), body=json_values.map(msgspec.json.encode) | st.binary(max_size=50))
def test_any_body_gives_a_short_line_without_the_secret(status: int, body: bytes) -> None:
    reply = ErrorReply.from_body(body)
    error = error_from_status(status, reply, redact=lambda text: text.replace("a", "*"))
    assert str(error).isprintable()
    assert len(str(error)) < 500
    assert "a" not in error.upstream_words.removeprefix("It says: ")
    assert str(error) == f"{error.message} {error.upstream_words}".rstrip()
    error_from_reply(reply, redact=str)


NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 1.5 ", 1.5),
        ("-3", None),
        ("1e3", None),
        ("inf", None),
        ("٣", None),
        ("9" * 400, None),
        ("", None),
        ("tomorrow", None),
        ("1s", 1.0),
        (" 250ms ", 0.25),
        ("1m30.5s", 90.5),
        ("1h", 3600.0),
        ("1 s", None),
        ("1d", None),
        ("-1s", None),
        ("s", None),
        ("1s" * 9, 9.0),
        ("٣s", None),
        ("Sun, 01 Mar 2026 12:00:10 GMT", 10.0),
        ("Sun, 01 Mar 2026 14:00:10 +0200", 10.0),
        ("Sunday, 01-Mar-26 12:00:10 GMT", 10.0),
        ("Sun Mar  1 12:00:10 2026", 10.0),
        ("Sun, 01 Mar 1926 12:00:10 GMT", 0.0),
        ("Sun, 99 Mar 2026 12:00:10 GMT", None),
        ("Sun, 01 Mar 2026 12:00:10 +999999999999999", None),
        (f"Sun, 01 Mar 2026 {'9' * 20}:00:10 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_or_nothing(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, now=NOW) == seconds


@pytest.mark.parametrize(
    ("headers", "hints"),
    [
        ({}, RetryHints()),
        ({"Retry-After": "2"}, RetryHints(after_s=2.0)),
        ({"Retry-After": "2", "Retry-After-Ms": "1500"}, RetryHints(after_s=1.5)),
        ({"Retry-After": "2", "retry-after-ms": "soon"}, RetryHints(after_s=2.0)),
        ({"retry-after-ms": "-1"}, RetryHints()),
        ({"retry-after-ms": "1e9"}, RetryHints()),
        ({"retry-after-ms": "0.5"}, RetryHints(after_s=0.0005)),
        ({"X-Should-Retry": "true"}, RetryHints(is_useful=True)),
        ({"x-should-retry": " False "}, RetryHints(is_useful=False)),
        ({"x-should-retry": "perhaps"}, RetryHints()),
    ],
)
def test_the_hints_of_a_response_about_another_attempt_are_read(headers: dict[str, str], hints: RetryHints) -> None:
    assert RetryHints.from_headers(httpx.Headers(headers), now=NOW) == hints


@pytest.mark.parametrize(
    ("status", "hints", "retryable", "after_s"),
    [
        (500, RetryHints(after_s=2.0), True, 2.0),
        (500, RetryHints(after_s=2.0, is_useful=False), False, None),
        (429, RetryHints(after_s=2.0, is_useful=False), False, 2.0),
        (400, RetryHints(after_s=2.0), False, None),
        (400, RetryHints(after_s=2.0, is_useful=True), True, 2.0),
        (409, RetryHints(is_useful=True), True, None),
        (413, RetryHints(after_s=2.0, is_useful=True), False, None),
    ],
)
def test_the_hints_of_a_response_count_more_than_its_status(
    status: int, hints: RetryHints, retryable: bool, after_s: float | None
) -> None:
    error = error_from_status(status, ErrorReply(), redact=str, hints=hints)
    assert (error.retryable, error.retry_after_s) == (retryable, after_s)
