"""``POST …/messages``: a conversation from elsewhere in one call, each item checked and bounded."""

from typing import Any

import pytest
from trio.testing import MockClock

from tests.api.inprocess import open_api


def message(role: str, text: str) -> dict[str, str]:
    return {"type": "message", "role": role, "text": text}


CALL = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city":"Oslo"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "4 °C"}
CONVERSATION = [
    message("system", "Be brief."),
    message("user", "The weather?"),
    CALL,
    OUTPUT,
    message("assistant", "4 °C."),
    message("user", "Thanks"),
]


async def test_a_conversation_is_there_at_once_and_goes_on(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?rate=0&first_token_s=0") as api:
        session = f"/sessions/{await api.new_session()}"
        added = await api.call("POST", f"{session}/messages", {"items": CONVERSATION})
        assert added.status == 201
        first, second, third = added.json["turns"]
        assert added.headers["location"] == f"{session}/turns/{third}"
        listed = (await api.call("GET", f"{session}/messages")).json["data"]
        assert listed == added.json["messages"]
        assert [(it["turn_id"], it["role"], it["text"]) for it in listed] == [
            (first, "system", "Be brief."),
            (first, "user", "The weather?"),
            (first, "assistant", ""),
            (second, "user", ""),
            (second, "assistant", "4 °C."),
            (third, "user", "Thanks"),
        ]
        turn = (await api.call("GET", f"{session}/turns/{first}")).json
        assert (turn["state"], turn["started_at"], turn["finish_reason"]) == ("completed", None, "tool_calls")
        assert [item["type"] for item in turn["items"]] == ["message", "message", "function_call"]
        events = (await api.call("GET", f"{session}/turns/{first}/events")).events
        assert [event["type"] for event in events] == [
            *("turn.started", "turn.call", "turn.arguments", "turn.completed"),
        ]
        assert (await api.call("GET", session)).json["message_count"] == 6
        asked = await api.call("POST", f"{session}/turns", {"input": "Bye"})
        assert asked.json["parent"] == third


async def test_a_branch_is_added_with_a_parent(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session = f"/sessions/{await api.new_session()}"
        first = (await api.call("POST", f"{session}/messages", {"items": CONVERSATION[:2]})).json["turns"][0]
        for parent in (first, None):
            body = {"items": [message("user", "x")], "parent": parent}
            added = (await api.call("POST", f"{session}/messages", body)).json
            assert (await api.call("GET", f"{session}/turns/{added['turns'][0]}")).json["parent"] == parent
        assert len((await api.call("GET", f"{session}/messages")).json["data"]) == 1
        missing = {"items": [message("user", "x")], "parent": f"turn_{'0' * 32}"}
        (await api.call("POST", f"{session}/messages", missing)).problem(422, "invalid_request", "parent")
        (await api.call("POST", "/sessions/none/messages", {"items": [OUTPUT]})).problem(404, "session_not_found")


WRONG: list[tuple[list[Any], int, str, str]] = [
    ([], 422, "invalid_request", "items"),
    ([message("tool", "x")], 422, "invalid_request", "items[0].role"),
    ([message("user", "x"), message("user", "")], 422, "invalid_request", "items[1].text"),
    ([{"type": "reasoning", "text": "x"}], 422, "invalid_request", "items[0].type"),
    ([CALL | {"name": "get weather"}], 422, "invalid_request", "items[0].name"),
    ([CALL | {"call_id": ""}], 422, "invalid_request", "items[0].call_id"),
    ([OUTPUT, message("user", "x"), OUTPUT], 422, "invalid_request", "items[2].call_id"),
    ([message("user", "a\0b")], 422, "invalid_request", "items[0].text"),
    ([message("user", "a\ud800b")], 422, "invalid_request", "items[0].text"),
    ([message("user", "x")] * 501, 422, "invalid_request", "items"),
    ([message("user", "x"), message("user", "é" * 1000)], 413, "input_too_large", "items"),
    ([message("assistant", "x" * 1025)], 413, "input_too_large", "items[0]"),
]


@pytest.mark.parametrize(("items", "status", "code", "field"), WRONG)
async def test_one_wrong_item_refuses_the_whole_conversation(
    items: list[Any], status: int, code: str, field: str
) -> None:
    async with open_api(input_bytes_max=1500, reply_bytes_max=1024) as api:
        session = f"/sessions/{await api.new_session()}"
        refused = await api.call("POST", f"{session}/messages", {"items": items})
        refused.problem(status, code, field)
        assert (await api.call("GET", session)).json["head"] is None


async def test_each_item_may_be_as_long_as_an_input(autojump_clock: MockClock) -> None:
    async with open_api(input_bytes_max=2048) as api:
        session = f"/sessions/{await api.new_session()}"
        items = [message(role, role[0] * 2048) for role in ("user", "assistant", "user", "assistant", "system")]
        added = await api.call("POST", f"{session}/messages", {"items": items})
        assert [len(it["text"]) for it in added.json["messages"]] == [2048] * 5
        assert len(added.json["turns"]) == 3
