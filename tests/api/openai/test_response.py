"""The Response object: valid for others' types in every state, and true."""

from typing import Any

import msgspec
import pytest

from service.api.openai.echo import Echo
from service.api.openai.response import response_at_first, response_of
from service.failure_codes import FAILURES
from service.models.client import FunctionTool, NamedFunction, Tools, Usage
from service.storage.records import Failure, Item, LeftOut, TurnRecord
from tests.api.openai.validation import check_response
from tests.api.told_turns import TURN_ID
from tests.storage.rows import T0, a_turn, at

SESSION = "olga/sess_" + "6f" * 16
MESSAGE = Item(id="msg_" + "1" * 32, role="assistant", text="Hello")
REASONING = Item(id="msg_" + "2" * 32, type="reasoning", role="assistant", text="Hm.")
CALL = Item(
    id="fc_" + "3" * 32, type="function_call", role="assistant", text="{}", call_id="call_1", name="get", complete=True
)


def a_record(**fields: Any) -> TurnRecord:
    return msgspec.structs.replace(a_turn(TURN_ID, SESSION), **fields)


def shown(record: TurnRecord, **more: Any) -> dict[str, Any]:
    return check_response(msgspec.json.encode(response_of(record, **more)))


def completed(**fields: Any) -> TurnRecord:
    return a_record(**({"state": "completed", "finish_reason": "stop", "ended_at": at(1.5), "last_seq": 4} | fields))


def test_a_turn_of_another_face_is_a_response_with_the_defaults() -> None:
    tools = Tools(functions=(FunctionTool(name="get", parameters={"type": "object"}),), choice=NamedFunction("get"))
    response = shown(completed(output=(MESSAGE,), parent="turn_" + "9" * 32, tools=tools, system_message="Be brief."))
    assert response | {"output": []} == {
        "id": "resp_" + "0a" * 16,
        "object": "response",
        "created_at": int(T0.timestamp()),
        "completed_at": int(at(1.5).timestamp()),
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "Be brief.",
        "max_output_tokens": None,
        "max_tool_calls": None,
        "model": "a-model",
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": {"type": "function", "name": "get"},
        "tools": [
            {"type": "function", "name": "get", "description": None, "parameters": {"type": "object"}, "strict": None}
        ],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "auto",
        "usage": None,
        "user": None,
        "metadata": {},
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "conversation": {"id": "conv_" + "6f" * 16},
        "lastcall": {"session_id": "sess_" + "6f" * 16, "turn_id": TURN_ID, "state": "completed", "seq": 4},
    }


def test_a_response_shows_what_its_request_said() -> None:
    echo = Echo(
        previous_response_id="resp_" + "8" * 32,
        store=False,
        metadata={"team": "blue"},
        truncation="disabled",
        parallel_tool_calls=False,
        tool_choice="required",
        tools=[{"type": "function", "name": "get", "parameters": {}}, {"type": "web_search"}],
        text={"format": None, "verbosity": "low"},
        reasoning={"effort": "low", "summary": None, "context": None},
        safety_identifier="s",
        prompt_cache_key="k",
        user="u",
        max_tool_calls=3,
        tools_left_out=("web_search",),
    )
    response = shown(completed(face=echo.face(), temperature=0, max_output_tokens=99))
    assert response["conversation"] is None
    assert (response["previous_response_id"], response["store"]) == ("resp_" + "8" * 32, False)
    assert (response["metadata"], response["truncation"]) == ({"team": "blue"}, "disabled")
    assert (response["parallel_tool_calls"], response["tool_choice"]) == (False, "required")
    assert [tool["name"] for tool in response["tools"]] == ["get"], "a tool that the model did not get is not shown"
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert response["reasoning"] == {"effort": "low", "summary": None}
    assert (response["temperature"], response["max_output_tokens"], response["max_tool_calls"]) == (0.0, 99, 3)
    assert (response["safety_identifier"], response["prompt_cache_key"], response["user"]) == ("s", "k", "u")
    assert response["lastcall"]["tools_left_out"] == ["web_search"]


def test_a_json_schema_is_shown_as_it_was_given() -> None:
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}
    encoded = msgspec.json.encode(response_of(completed(face=Echo(text=text).face())))
    assert check_response(encoded)["text"] == text


@pytest.mark.parametrize(
    ("fields", "status", "details"),
    [
        ({"state": "queued"}, "queued", None),
        ({"state": "running", "output": (MESSAGE,)}, "in_progress", None),
        ({"state": "completed", "finish_reason": "tool_calls", "output": (CALL,)}, "completed", None),
        ({"state": "completed", "finish_reason": "length"}, "incomplete", {"reason": "max_output_tokens"}),
        ({"state": "completed", "finish_reason": "content_filter"}, "incomplete", {"reason": "content_filter"}),
        ({"state": "cancelled", "reason": "requested"}, "incomplete", None),
        ({"state": "cancelled", "reason": "requested", "background": True}, "cancelled", None),
        ({"state": "interrupted", "reason": "shutdown", "output": (MESSAGE,)}, "incomplete", None),
        ({"state": "interrupted", "reason": "crash", "output": (CALL,)}, "incomplete", None),
        ({"state": "interrupted", "reason": "crash", "output": (REASONING,)}, "failed", None),
        ({"state": "interrupted", "reason": "shutdown"}, "failed", None),
    ],
)
def test_the_status_tells_whether_the_reply_is_whole(
    fields: dict[str, Any], status: str, details: dict[str, str] | None
) -> None:
    response = shown(a_record(**fields))
    assert (response["status"], response["incomplete_details"]) == (status, details)
    assert (response["error"] is not None) == (status == "failed")
    assert response["completed_at"] is None
    assert response["lastcall"]["state"] == fields["state"]
    assert response["lastcall"].get("reason") == fields.get("reason")


@pytest.mark.parametrize("code", FAILURES)
def test_every_failure_has_a_code_that_clients_know_and_its_own_beside(code: str) -> None:
    response = shown(a_record(state="failed", error=Failure(code, "What happened."), output=(MESSAGE,)))
    assert response["status"] == "failed"
    assert response["error"]["message"] == "What happened."
    assert response["error"]["code"] in ("server_error", "rate_limit_exceeded", "invalid_prompt")
    assert response["lastcall"]["code"] == code


def test_what_did_not_go_to_the_model_and_what_is_not_stored_is_told() -> None:
    record = completed(left_out=LeftOut(2, 80), stored=False, usage=Usage(input_tokens=1, output_tokens=2))
    response = shown(record)
    assert response["lastcall"]["left_out"] == {"items": 2, "bytes": 80}
    assert response["lastcall"]["stored"] is False
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("output", "statuses"),
    [
        ((REASONING, MESSAGE, CALL), ["completed", "completed", "completed"]),
        ((CALL, MESSAGE), ["completed", "incomplete"]),
        ((msgspec.structs.replace(CALL, complete=False),), ["incomplete"]),
        ((REASONING, MESSAGE), ["completed", "incomplete"]),
        ((REASONING,), ["incomplete"]),
    ],
)
def test_what_the_end_has_cut_off_is_incomplete(output: tuple[Item, ...], statuses: list[str]) -> None:
    response = shown(a_record(state="cancelled", reason="requested", output=output))
    assert [item["status"] for item in response["output"]] == statuses


def test_a_response_is_told_at_its_beginning_as_if_nothing_had_come_yet() -> None:
    at_first = response_at_first(completed(output=(MESSAGE,), usage=Usage(input_tokens=1, output_tokens=2)), "queued")
    response = check_response(msgspec.json.encode(at_first))
    assert (response["status"], response["output"], response["usage"]) == ("queued", [], None)
    assert response["lastcall"]["state"] == "queued"
    assert "seq" not in response["lastcall"]
