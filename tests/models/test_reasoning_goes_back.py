"""Reasoning that its server wants back: signed, encrypted, or in words with the calls that it led to."""

import json
from typing import Any

import pytest

from service.models.chat_completions import Dialect, ReplyDecoder, encode_request
from service.models.client import (
    EncryptedReasoning,
    FunctionCall,
    FunctionCallOutput,
    Message,
    ModelEvent,
    ModelRequest,
    PromptItem,
    Reasoning,
    ReasoningDelta,
    TextDelta,
    is_signature,
)
from service.models.upstream_errors import ErrorReply
from tests.models.replies import ask
from tests.models.upstream import open_upstream
from tests.upstreams.raw_server import DONE, Connection, Request, delta, finish

HI = Message("user", "hi")
CALL = FunctionCall("a", "f", "{}")
OUTPUT = FunctionCallOutput("a", "1")
DEEPSEEK = "Missing `reasoning_content` field in the assistant message at message index 1."
MOONSHOT = "thinking is enabled but reasoning_content is missing in assistant tool call message at index 2"
OLD_DEEPSEEK = "The reasoning_content is for display only. Please remove the reasoning_content from your message."


def saying(**members: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": members}]}


def read(*chunks: object) -> list[ModelEvent]:
    decoder = ReplyDecoder(redact=str)
    events: list[ModelEvent] = []
    for chunk in chunks:
        events += decoder.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    return events + decoder.end()


def sent(*prompt: PromptItem, dialect: Dialect = Dialect()) -> list[dict[str, Any]]:  # noqa: B008  immutable
    messages: list[dict[str, Any]] = json.loads(encode_request(ModelRequest(model="m", prompt=prompt), dialect))[
        "messages"
    ]
    return messages


def test_a_signature_comes_after_the_words_that_it_signs_and_goes_back_with_them() -> None:
    """As OpenRouter sends the reasoning of Anthropic's models."""
    rest = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}
    first, second, signature, *_ = read(
        saying(reasoning="Let me ", reasoning_details=[rest | {"text": "Let me "}]),
        saying(reasoning="see.", reasoning_details=[rest | {"text": "see."}]),
        saying(content="", reasoning_details=[rest | {"signature": "Eo8B"}]),
        delta("x"),
        finish(),
    )
    assert [first, second] == [ReasoningDelta("Let me "), ReasoningDelta("see.")]
    assert isinstance(signature, EncryptedReasoning)
    assert signature.text == "Eo8B"
    assert is_signature(signature.upstream)
    signed = EncryptedReasoning(signature.text, signature.upstream, "Let me see.")
    reply = sent(HI, signed, CALL, OUTPUT)[1]
    assert reply["reasoning_details"] == [rest | {"text": "Let me see.", "signature": "Eo8B"}]
    assert "reasoning_content" not in reply


def test_blocks_of_anthropic_go_back_as_such() -> None:
    """As LiteLLM sends them."""
    words, signature, hidden, *_ = read(
        saying(reasoning_content="hm", thinking_blocks=[{"type": "thinking", "thinking": "hm", "signature": ""}]),
        saying(thinking_blocks=[{"type": "thinking", "thinking": "", "signature": "Eo8B"}]),
        saying(thinking_blocks=[{"type": "redacted_thinking", "data": "gAAA"}]),
        delta("x"),
        finish(),
    )
    assert words == ReasoningDelta("hm")
    assert isinstance(signature, EncryptedReasoning)
    assert isinstance(hidden, EncryptedReasoning)
    assert (is_signature(signature.upstream), is_signature(hidden.upstream)) == (True, False)
    signed = EncryptedReasoning(signature.text, signature.upstream, "hm")
    reply = sent(HI, signed, hidden, CALL, OUTPUT)[1]
    assert reply["thinking_blocks"] == [
        {"type": "thinking", "thinking": "hm", "signature": "Eo8B"},
        {"type": "redacted_thinking", "data": "gAAA"},
    ]
    assert "reasoning_details" not in reply


def test_words_in_details_alone_are_reasoning() -> None:
    details = [{"type": "reasoning.text", "text": "a"}, {"type": "reasoning.summary", "summary": "b"}]
    assert read(saying(reasoning_details=details), delta("x"), finish())[:2] == [ReasoningDelta("ab"), TextDelta("x")]


@pytest.mark.parametrize("details", ["x", [1, None], [{"signature": 5, "text": {"text": "a"}}], {"data": "x"}])
def test_details_of_another_form_fail_no_reply(details: object) -> None:
    for name in ("reasoning_details", "thinking_blocks"):
        assert read(saying(**{name: details}), delta("x"), finish())[-2] == TextDelta("x")


@pytest.mark.parametrize("words", [DEEPSEEK, MOONSHOT])
def test_a_server_that_misses_the_words_gets_them_with_the_calls_that_they_led_to(words: str) -> None:
    request = ModelRequest(model="m", prompt=(HI, Reasoning("Let me see."), CALL, OUTPUT))
    learned = Dialect().learn(request, 400, ErrorReply(words=words))
    assert learned == Dialect(wants_reasoning=True)
    assert learned.learn(request, 400, ErrorReply(words=words)) == learned, "that did not help"
    prompt = (HI, Reasoning("Let me see."), CALL, OUTPUT, CALL, OUTPUT, Message("assistant", "done"), HI)
    calling, no_words, plain = (it for it in sent(*prompt, dialect=learned) if it["role"] == "assistant")
    assert calling["reasoning_content"] == "Let me see."
    assert no_words["reasoning_content"] == "", "a field that is missing is refused"
    assert "reasoning_content" not in plain
    assert not any("reasoning_content" in message for message in sent(*prompt))


@pytest.mark.parametrize(("status", "words"), [(400, OLD_DEEPSEEK), (500, DEEPSEEK), (400, "reasoning_content")])
def test_other_words_about_reasoning_change_nothing(status: int, words: str) -> None:
    request = ModelRequest(model="m", prompt=(HI, Reasoning("Let me see."), CALL, OUTPUT))
    assert Dialect().learn(request, status, ErrorReply(words=words)) == Dialect()


async def test_a_conversation_with_calls_goes_on_with_a_server_that_wants_its_reasoning_back() -> None:
    requests: list[Request] = []

    async def behave(connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            requests.append(request)
            calling = msgs[1] if len(msgs := request.json["messages"]) > 1 else {}  # type: ignore[arg-type,index]
            if "tool_calls" in calling and "reasoning_content" not in calling:
                await connection.send_response(400, {"error": {"message": DEEPSEEK}})
                continue
            await connection.send_head()
            for payload in (delta("ok"), finish(), DONE):
                await connection.send_event(payload)
            await connection.end_body()

    prompt = (HI, Reasoning("Let me see."), CALL, OUTPUT)
    async with open_upstream(behave) as upstream:
        for _ in range(2):
            assert (await ask(upstream.client, ModelRequest(model="m", prompt=prompt))).text == "ok"
    assert len(requests) == 3, "the client has learnt it"
