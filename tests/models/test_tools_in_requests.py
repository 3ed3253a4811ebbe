"""The body of a request with tools, calls and their outputs."""

import json
from typing import Any

from service.models.chat_completions import Dialect, encode_request
from service.models.client import (
    EncryptedReasoning,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    Message,
    ModelRequest,
    NamedFunction,
    PromptItem,
    Tools,
)

HI = Message("user", "hi")


def body(*prompt: PromptItem, tools: Tools = Tools()) -> dict[str, Any]:  # noqa: B008  immutable
    encoded = encode_request(ModelRequest(model="m", prompt=prompt or (HI,), tools=tools), Dialect())
    decoded: dict[str, Any] = json.loads(encoded)
    return decoded


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_without_tools_the_body_names_none() -> None:
    assert set(body()) == {"model", "messages", "stream", "stream_options"}


def test_tools_go_to_the_server_as_the_caller_described_them() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    functions = FunctionTool(name="f", description="It is.", parameters=schema, strict=True), FunctionTool(name="g")
    sent = body(tools=Tools(functions=functions, choice="required", parallel=False))
    assert sent["tools"] == [
        {
            "type": "function",
            "function": {"name": "f", "description": "It is.", "parameters": schema, "strict": True},
        },
        {"type": "function", "function": {"name": "g"}},
    ]
    assert sent["tool_choice"] == "required"
    assert sent["parallel_tool_calls"] is False
    named = body(tools=Tools(functions=functions, choice=NamedFunction("g")))
    assert named["tool_choice"] == {"type": "function", "function": {"name": "g"}}
    assert "parallel_tool_calls" not in named


def test_a_reply_is_one_message_with_its_calls_and_each_output_is_a_message() -> None:
    said = body(
        *(Message("system", "S"), HI, Message("assistant", "Let me look.")),
        *(FunctionCall("a", "f", '{"x":1}'), FunctionCall("b", "g", "")),
        *(FunctionCallOutput("a", "1"), FunctionCallOutput("b", ""), Message("user", "and?")),
        *(FunctionCall("c", "f", "{}"), FunctionCallOutput("c", "2")),
    )
    assert said["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [called("a", "f", '{"x":1}'), called("b", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": None, "tool_calls": [called("c", "f", "{}")]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]


def test_arguments_that_are_no_json_are_sent_as_a_text_in_json() -> None:
    for arguments in ('{"a": 1', "{}{}", "no", '"\\u12"'):
        call = body(HI, FunctionCall("a", "f", arguments), FunctionCallOutput("a", "?"))["messages"][1]["tool_calls"][0]
        assert json.loads(call["function"]["arguments"]) == {"not_json": arguments}
    for arguments in ('{"a": 1.0}', "[]", " {}\n"):
        call = body(HI, FunctionCall("a", "f", arguments), FunctionCallOutput("a", "?"))["messages"][1]["tool_calls"][0]
        assert call["function"]["arguments"] == arguments


def test_fields_that_only_the_server_knows_go_back_unchanged() -> None:
    encrypted = EncryptedReasoning("gAAA", '{"type":"reasoning.encrypted","n":1.0}')
    call = FunctionCall("a", "f", "{}", '{"extra_content":{"google":{"thought_signature":"x","n":1e2}}}')
    request = ModelRequest(model="m", prompt=(HI, encrypted, call, FunctionCallOutput("a", "1")))
    reply = json.loads(encode_request(request, Dialect()))["messages"][1]
    assert reply["reasoning_details"] == [{"type": "reasoning.encrypted", "n": 1.0, "data": "gAAA"}]
    assert reply["tool_calls"] == [
        {**called("a", "f", "{}"), "extra_content": {"google": {"thought_signature": "x", "n": 1e2}}}
    ]
    assert b"1e2" in encode_request(request, Dialect()), "the very text of the server"
