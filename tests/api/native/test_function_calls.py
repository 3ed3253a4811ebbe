"""Function calls over HTTP: tools in a request, calls in events and items, and outputs in the next input."""

import json
from typing import Any
from urllib.parse import quote

import pytest
from trio.testing import MockClock

from tests.api.inprocess import SSE, open_api

CALLING = "scripted:?first_token_s=0&rate=0&call=" + quote('get_weather:{"city":"Oslo"}')
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


def brings(call_id: str, text: str) -> dict[str, str]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


async def test_a_call_is_streamed_and_its_output_is_answered(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        path = f"/sessions/{await api.new_session()}/turns"
        streamed = await api.call("POST", path, {"input": "The weather?", "tools": [TOOL]}, headers=SSE)
        opening, *pieces = streamed.events[1:-1]
        assert {**opening, "id": ""} == {
            "type": "turn.call",
            "seq": 2,
            "item": 0,
            "id": "",
            "call_id": "call_1_0",
            "name": "get_weather",
        }
        assert {piece["type"] for piece in pieces} == {"turn.arguments"}
        assert {piece["item"] for piece in pieces} == {0}
        assert "".join(piece["text"] for piece in pieces) == '{"city":"Oslo"}'
        assert streamed.events[-1]["finish_reason"] == "tool_calls"
        turn = (await api.call("GET", streamed.headers["location"])).json
        assert turn["text"] == ""
        assert turn["items"] == [
            {"type": "message", "id": turn["items"][0]["id"], "role": "user", "text": "The weather?"},
            {
                "type": "function_call",
                "id": opening["id"],
                "call_id": "call_1_0",
                "name": "get_weather",
                "arguments": '{"city":"Oslo"}',
                "complete": True,
            },
        ]
        answer = await api.call("POST", path, {"input": [brings("call_1_0", "4 °C"), {"type": "message", "text": "?"}]})
        assert answer.status == 200
        assert answer.json["input"] == "?"
        assert [item["type"] for item in answer.json["items"]] == ["function_call_output", "message", "function_call"]
        answer = await api.call("POST", path, {"input": [brings("call_3_0", "5 °C"), brings("no_call", "6 °C")]})
        assert answer.json["state"] == "completed"
        messages = (await api.call("GET", f"{path.removesuffix('turns')}messages?limit=3")).json
        assert [{**it, "id": "", "turn_id": "", "created_at": ""} for it in messages["data"]] == [
            {"id": "", "turn_id": "", "role": "user", "text": "The weather?", "created_at": ""},
            {
                "id": "",
                "turn_id": "",
                "role": "assistant",
                "text": "",
                "created_at": "",
                "type": "function_call",
                "call_id": "call_1_0",
                "name": "get_weather",
                "arguments": '{"city":"Oslo"}',
                "complete": True,
            },
            {
                "id": "",
                "turn_id": "",
                "role": "user",
                "text": "",
                "created_at": "",
                "type": "function_call_output",
                "call_id": "call_1_0",
                "output": "4 °C",
            },
        ]
        assert messages["data"][1]["id"] == opening["id"]
        assert messages["next"]


async def test_a_turn_without_calls_has_no_items(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1&reasoning=1&first_token_s=0") as api:
        path = f"/sessions/{await api.new_session()}/turns"
        plain = (await api.call("POST", path, {"input": "Hi", "tools": [TOOL]})).json
        items = [{"type": "message", "text": "Hi"}, {"type": "message", "text": "you"}]
        listed = (await api.call("POST", path, {"input": items})).json
        assert "items" not in plain
        assert "items" not in listed
        assert listed["input"] == "Hi\nyou"


async def test_a_client_that_comes_back_with_its_outputs_starts_no_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        path = f"/sessions/{await api.new_session()}/turns"
        first = await api.call("POST", path, {"input": [brings("a", "1")]}, headers=SSE)
        again = await api.call("POST", path, {"input": [brings("a", "1")]}, headers=SSE | {"Last-Event-ID": "1"})
        assert again.headers["location"] == first.headers["location"]
        assert again.events == first.events[1:]
        other = await api.call("POST", path, {"input": [brings("a", "2")]}, headers=SSE | {"Last-Event-ID": "1"})
        other.problem(409, "resume_conflict", "input")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": [brings("a", "1"), brings("a", "2")]}, "input[1].call_id"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"name": "untyped"}]}, "tools[1].type"),
        ({"tools": [TOOL], "tool_choice": {"name": TOOL["name"]}}, "tool_choice.type"),
        ({"input": [{"type": "image", "url": "x"}]}, "input[0].type"),
    ],
)
async def test_what_cannot_be_meant_is_refused_by_name(
    body: dict[str, Any], field: str, autojump_clock: MockClock
) -> None:
    async with open_api(model_url=CALLING) as api:
        session_id = await api.new_session()
        refused = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi"} | body)
        problem = refused.problem(422, "invalid_request", field)
        assert problem["detail"].isprintable()
        assert (await api.call("GET", f"/sessions/{session_id}")).json["head"] is None


async def test_texts_and_tools_have_the_bound_of_an_input_together(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING, input_bytes_max=1024) as api:
        path = f"/sessions/{await api.new_session()}/turns"
        halves = [brings("a", "x" * 600), {"type": "message", "text": "y" * 600}]
        (await api.call("POST", path, {"input": halves})).problem(413, "input_too_large", "input")
        large = TOOL | {"parameters": {"enum": ["x" * 30] * 40}}
        (await api.call("POST", path, {"input": "Hi", "tools": [large]})).problem(413, "input_too_large", "tools")
        assert (await api.call("POST", path, {"input": halves[:1], "tools": [TOOL]})).status == 200


async def test_tools_are_for_the_models_server_as_they_were_given(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        path = f"/sessions/{await api.new_session()}/turns"
        choice = {"type": "function", "name": "get_weather"}
        body = {"input": "Hi", "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
        turn_id = (await api.call("POST", path, body)).json["id"]
        kept = await api.service.sessions.get_turn(path.split("/")[2], turn_id)
        assert kept.tools
        assert json.loads(json.dumps(kept.tools.functions[0].parameters)) == TOOL["parameters"]
        assert kept.tools.parallel is False
