"""The calls of /v1/responses: creating, following, streaming, resuming, cancelling, deleting, and what they refuse."""

import json
from typing import Any
from urllib.parse import quote

import httpx2
import openai
import pytest
import trio
from openai.types.responses import NamespaceTool
from trio.testing import MockClock

from service.api.openai.response_events import CUT
from service.errors import StoreError
from service.sessions.events.replay import Replay
from tests.api.inprocess import Api, Reply, leave, open_api
from tests.upstreams.raw_server import Connection, open_raw_server

PATH = "/v1/responses"
JSON = {"Content-Type": "application/json"}
SLOW = "scripted:?tokens=100&rate=1&first_token_s=0"
STEADY = "scripted:?tokens=3&rate=1&first_token_s=0"
CALLING = "scripted:?first_token_s=0&rate=0&call=" + quote('get_weather:{"city":"Oslo"}')
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True}
UNKNOWN = "resp_" + 32 * "a"


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream, each checked to be named by its type; and that the stream ends as OpenAI's do."""
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream"), reply
    assert reply.body.endswith(b"\n\ndata: [DONE]\n\n")
    events = []
    for frame in reply.body.decode().removesuffix("data: [DONE]\n\n").split("\n\n"):
        lines = [line for line in frame.splitlines() if not line.startswith(":")]
        if lines:
            named, data = lines
            event = json.loads(data.removeprefix("data: "))
            assert named == f"event: {event['type']}"
            events.append(event)
    return events


def error_of(reply: Reply, status: int, code: str, param: str | None = None) -> str:
    """The message of an error, which must be this one in OpenAI's shape."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply
    member = reply.json["error"]
    assert (member["code"], member["param"]) == (code, param), member
    message: str = member["message"]
    return message


async def create(api: Api, input_: object = "Hi", **body: object) -> Reply:
    return await api.call("POST", PATH, {"model": "scripted", "input": input_} | body)


async def get(api: Api, name: str, query: str = "") -> Reply:
    return await api.call("GET", f"{PATH}/{name}{query}")


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


async def native_turn(api: Api, response: dict[str, Any]) -> dict[str, Any]:
    told = response["lastcall"]
    turn: dict[str, Any] = (await api.call("GET", f"/sessions/{told['session_id']}/turns/{told['turn_id']}")).json
    return turn


# Creating


async def test_a_response_is_a_turn_of_a_session_of_its_own(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        reply = await create(api, instructions="Be brief.", metadata={"team": "blue"})
        response = reply.json
        assert (reply.status, response["status"], response["object"]) == (200, "completed", "response")
        assert reply.headers["location"] == f"{PATH}/{response['id']}"
        assert reply.headers["x-request-id"]
        turn = await native_turn(api, response)
        assert turn["text"] == text_of(response) != ""
        assert (turn["input"], turn["parent"]) == ("Hi", None)
        assert (response["instructions"], response["metadata"]) == ("Be brief.", {"team": "blue"})
        assert response["conversation"] is None
        assert (await get(api, response["id"])).json == response
        other = (await create(api)).json
        assert other["lastcall"]["session_id"] != response["lastcall"]["session_id"]


async def test_a_stream_tells_the_same_response(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        reply = await create(api, stream=True)
        events = events_of(reply)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["type"] for event in events[:4]] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert events[-1]["type"] == "response.completed"
        response = events[-1]["response"]
        assert reply.headers["location"] == f"{PATH}/{response['id']}"
        assert (await get(api, response["id"])).json == response
        assert "".join(it["delta"] for it in events if it["type"] == "response.output_text.delta") == text_of(response)


async def test_a_background_response_is_answered_at_once_and_goes_on(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=1") as api:
        accepted = (await create(api, background=True)).json
        assert (accepted["status"], accepted["background"], accepted["output"]) == ("in_progress", True, [])
        await trio.sleep(10)
        assert (await get(api, accepted["id"])).json["status"] == "completed"


async def test_a_background_response_can_be_streamed_and_outlives_its_stream(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=10&rate=1&first_token_s=0") as api:
        connection = api.open("POST", PATH, headers=JSON)
        async with connection:
            await connection.send(b'{"input":"Hi","background":true,"stream":true}')
            await connection.send_complete()
            seen = b""
            while seen.count(b"output_text.delta\n") < 3:
                seen += await connection.receive()
            await leave(connection)
        name = json.loads(seen.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
        number = seen.count(b"event: ") - 1
        rest = events_of(await get(api, name, f"?stream=true&starting_after={number}"))
        assert rest[0]["sequence_number"] == number + 1
        assert rest[-1]["response"]["status"] == "completed"
        whole = events_of(await get(api, name, "?stream=true&include_obfuscation=false"))
        assert whole[number + 1 :] == rest
        assert events_of(await get(api, name, "?stream=true&starting_after=0")) == whole[1:]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_a_foreground_response(stream: bool, autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, disconnect_grace_s=0) as api:
        connection = api.open("POST", PATH, headers=JSON)
        async with connection:
            await connection.send(json.dumps({"input": "Hi", "stream": stream}).encode())
            await connection.send_complete()
            await trio.sleep(3)
            await leave(connection)
        (session,) = (await api.call("GET", "/sessions")).json["data"]
        name = f"resp_{session['head'].removeprefix('turn_')}"
        response = (await get(api, name)).json
        assert (response["status"], response["incomplete_details"]) == ("incomplete", None)
        assert (response["lastcall"]["state"], response["lastcall"]["reason"]) == ("cancelled", "disconnected")


async def test_a_key_makes_one_response_of_many_requests(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        body = {"input": "Hi", "model": "scripted"}
        replies = [
            await api.call("POST", PATH, body | more, headers={"Idempotency-Key": "a"})
            for more in ({}, {}, {"store": None})
        ]
        assert len({reply.json["id"] for reply in replies}) == 1
        other = await api.call("POST", PATH, body | {"input": "Ho"}, headers={"Idempotency-Key": "a"})
        error_of(other, 422, "idempotency_key_reused", "Idempotency-Key")
        streamed = [
            await api.call("POST", PATH, body | {"stream": True}, headers={"Idempotency-Key": "b"}) for _ in range(2)
        ]
        assert events_of(streamed[0]) == events_of(streamed[1])


async def test_a_response_that_is_not_stored_is_gone_after_its_end(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        response = (await create(api, store=False)).json
        assert (response["status"], response["store"]) == ("completed", False)
        error_of(await get(api, response["id"]), 404, "response_not_found")
        assert (await api.call("GET", "/sessions")).json["data"] == []
        streamed = events_of(await create(api, store=False, stream=True))
        error_of(await get(api, streamed[-1]["response"]["id"]), 404, "response_not_found")
        refused = await create(api, previous_response_id=response["id"])
        error_of(refused, 400, "previous_response_not_found", "previous_response_id")


# What a response follows


async def test_previous_response_id_is_the_parent_and_makes_a_tree(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        first = (await create(api)).json
        replies = [(await create(api, text, previous_response_id=first["id"])).json for text in ("one", "two")]
        for reply in replies:
            assert reply["previous_response_id"] == first["id"]
            assert reply["conversation"] is None
            assert (await native_turn(api, reply))["parent"] == first["lastcall"]["turn_id"]
        assert len({reply["lastcall"]["session_id"] for reply in (first, *replies)}) == 1


async def test_responses_that_follow_one_run_side_by_side(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=1") as api:
        first = (await create(api)).json
        replies: list[Reply] = []

        async def follow() -> None:
            replies.append(await create(api, previous_response_id=first["id"]))

        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(follow)
        assert [reply.json["status"] for reply in replies] == ["completed"] * 3
        assert trio.current_time() - began_at < 10


async def test_a_conversation_is_followed_one_response_at_a_time(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=1") as api:
        session_id = await api.new_session(id="support-4711")
        conversation = f"conv_-{session_id}"
        running = (await create(api, conversation=conversation, background=True)).json
        assert running["conversation"] == {"id": conversation}
        message = error_of(
            await create(api, conversation={"id": conversation}), 400, "conversation_locked", "conversation"
        )
        assert conversation in message
        await trio.sleep(10)
        second = (await create(api, conversation=conversation)).json
        assert (await native_turn(api, second))["parent"] == running["lastcall"]["turn_id"]
        made = await api.new_session()
        assert (await create(api, conversation=f"conv_{made.removeprefix('sess_')}")).json["status"] == "completed"


async def test_what_a_response_cannot_follow_is_refused_by_its_name(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        for name in (UNKNOWN, "resp_x", "turn_" + 32 * "a", ""):
            reply = await create(api, previous_response_id=name)
            error_of(reply, 400, "previous_response_not_found", "previous_response_id")
        for name in ("conv_" + 32 * "a", "conv_-nobody", "sess_x", ""):
            error_of(await create(api, conversation=name), 404, "conversation_not_found", "conversation")
        both = await create(api, conversation="conv_-x", previous_response_id=UNKNOWN)
        error_of(both, 400, "mutually_exclusive_parameters", "previous_response_id")
        running = (await create(api, background=True)).json
        still = await create(api, previous_response_id=running["id"])
        error_of(still, 400, "previous_response_in_progress", "previous_response_id")
        assert (await api.call("POST", f"{PATH}/{running['id']}/cancel")).status == 200
        assert (await create(api, previous_response_id=running["id"], background=True)).status == 200
        assert len((await api.call("GET", "/sessions")).json["data"]) == 1, "a refused request has made no session"


# Without an input


async def add(api: Api, conversation: str, *items: dict[str, Any]) -> None:
    assert (await api.call("POST", f"/v1/conversations/{conversation}/items", {"items": list(items)})).status == 200


@pytest.mark.parametrize("given", [{}, {"input": None}, {"input": ""}, {"input": []}], ids=str)
async def test_without_an_input_the_last_item_of_the_conversation_is_answered(
    given: dict[str, Any], autojump_clock: MockClock
) -> None:
    async with open_api() as api:
        made = await api.call("POST", "/v1/conversations", {"items": [{"role": "user", "content": "Of items"}]})
        conversation = made.json["id"]
        body = {"model": "scripted", "conversation": conversation} | given
        first = (await api.call("POST", PATH, body)).json
        assert "Of items" in text_of(first)
        assert (await get(api, first["id"], "/input_items")).json["data"] == []
        assert (await get(api, first["id"])).json == first
        listed = (await api.call("GET", f"/v1/conversations/{conversation}/items?order=asc")).json["data"]
        assert [item["role"] for item in listed] == ["user", "assistant"]
        refused = error_of(await api.call("POST", PATH, body), 400, "invalid_value", "input")
        assert "one of the model" in refused
        note = {"role": "developer", "content": "Be brief."}
        await add(api, conversation, {"role": "user", "content": "Once more"}, note)
        events = events_of(await api.call("POST", PATH, body | {"stream": True, "store": False}))
        assert "Once more" in text_of(events[-1]["response"])
        previous = (await api.call("GET", f"/sessions/sess_{conversation.removeprefix('conv_')}")).json["head"]
        body = {"model": "scripted", "previous_response_id": f"resp_{previous.removeprefix('turn_')}"} | given
        assert "Once more" in text_of((await api.call("POST", PATH, body)).json)
        native = (await native_turn(api, first))["input"]
        assert native == ""


async def test_without_an_input_the_output_of_a_call_is_answered(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        conversation = (await api.call("POST", "/v1/conversations", {})).json["id"]
        (call,) = (await create(api, "The weather?", conversation=conversation, tools=[TOOL])).json["output"]
        refused = await api.call("POST", PATH, {"conversation": conversation})
        error_of(refused, 400, "invalid_value", "input")
        await add(api, conversation, {"type": "function_call_output", "call_id": call["call_id"], "output": "4 °C"})
        assert "4 °C" in text_of((await api.call("POST", PATH, {"conversation": conversation})).json)


async def test_an_input_without_an_answer_is_answered_by_the_next_response_without_an_input(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=0&fail_after=0&fail_code=upstream_rejected") as api:
        conversation = (await api.call("POST", "/v1/conversations", {})).json["id"]
        empty = await api.call("POST", PATH, {"conversation": conversation})
        assert "has no item" in error_of(empty, 400, "invalid_value", "input")
        assert (await create(api, conversation=conversation)).status == 400
        again = await api.call("POST", PATH, {"conversation": conversation})
        assert again.json["error"]["code"] == "upstream_rejected"
        failed = (await api.call("GET", again.headers["location"])).json
        assert failed["status"] == "failed", "a response without an input and without an output is one, too"
        refused = await api.call("POST", PATH, {"conversation": conversation})
        assert "refused" in error_of(refused, 400, "invalid_value", "input")


async def test_a_response_without_an_input_names_what_it_cannot_follow(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        unknown = await api.call("POST", PATH, {"previous_response_id": UNKNOWN})
        error_of(unknown, 400, "previous_response_not_found", "previous_response_id")
        nowhere = await api.call("POST", PATH, {"conversation": "conv_-none"})
        error_of(nowhere, 404, "conversation_not_found", "conversation")


# Tools


async def test_a_call_is_answered_by_its_output_through_previous_response_id(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        first = (await create(api, "The weather?", tools=[TOOL])).json
        (call,) = first["output"]
        assert (call["type"], call["name"], call["arguments"]) == ("function_call", "get_weather", '{"city":"Oslo"}')
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "4 °C"}
        second = (await create(api, [output], previous_response_id=first["id"], tools=[TOOL])).json
        assert "4 °C" in text_of(second)
        items = (await get(api, second["id"], "/input_items")).json["data"]
        assert [(it["type"], it["output"]) for it in items] == [("function_call_output", "4 °C")]


async def test_functions_of_namespaces_come_back_in_their_namespaces(autojump_clock: MockClock) -> None:
    url = "scripted:?first_token_s=0&rate=0&call=" + quote("files__read:{}")
    tools = [{"type": "namespace", "name": "files", "description": "x", "tools": [TOOL | {"name": "read"}]}]
    async with open_api(model_url=url) as api:
        events = events_of(await create(api, tools=[*tools, {"type": "web_search"}], stream=True))
        response = events[-1]["response"]
        (call,) = response["output"]
        assert (call["namespace"], call["name"]) == ("files", "read")
        added = next(event for event in events if event["type"] == "response.output_item.added")
        assert (added["item"]["namespace"], added["item"]["name"]) == ("files", "read")
        assert response["lastcall"]["tools_left_out"] == ["web_search"]
        turn = await native_turn(api, response)
        assert turn["items"][-1]["name"] == "files__read"
        history = [{"type": "message", "role": "user", "content": "?"}, call]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "text"}
        again = (await create(api, [*history, output], tools=tools)).json
        assert "text" in text_of(again)
        assert (await native_turn(api, again))["items"][1]["name"] == "files__read"


async def test_a_call_of_a_namespace_in_a_history_without_its_tool_is_shown_as_it_was_sent(
    autojump_clock: MockClock,
) -> None:
    call = {"type": "function_call", "namespace": "files", "name": "read", "call_id": "c1", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "text"}
    async with open_api() as api:
        response = (await create(api, [{"role": "user", "content": "?"}, call, output])).json
        items = (await get(api, response["id"], "/input_items?order=asc")).json["data"]
        assert [(item.get("namespace"), item.get("name")) for item in items] == [
            *((None, None), ("files", "read"), (None, None)),
        ]
        again = (await create(api, items)).json
        listed = (await get(api, again["id"], "/input_items?order=asc")).json["data"]
        assert [item | {"id": ""} for item in listed] == [item | {"id": ""} for item in items]


async def test_a_namespace_is_shown_with_a_description_and_what_the_model_knows_of_it(
    autojump_clock: MockClock,
) -> None:
    functions = [{"type": "function", "name": "read"}]
    namespace = {"type": "namespace", "name": "files", "tools": [*functions, {"type": "web_search"}]}
    async with open_api() as api:
        for description in ({}, {"description": None}, {"description": "x"}):
            response = (await create(api, tools=[namespace | description])).json
            told = description.get("description") or ""
            assert response["tools"] == [namespace | {"description": told, "tools": functions}]
            tool = NamespaceTool.model_validate(response["tools"][0], strict=True)
            assert tool.description == told
        refused = await create(api, tools=[namespace | {"description": 3}])
        error_of(refused, 400, "invalid_type", "tools[0].description")


async def test_hosted_tools_may_be_refused_by_a_setting(autojump_clock: MockClock) -> None:
    async with open_api(hosted_tools="refuse") as api:
        error_of(await create(api, tools=[{"type": "web_search"}]), 400, "unsupported_value", "tools[0].type")


# Getting, cancelling, deleting


async def test_a_live_response_is_got_with_its_output_so_far(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        name = (await create(api, background=True)).json["id"]
        await trio.sleep(3.5)
        response = (await get(api, name)).json
        assert response["status"] == response["output"][0]["status"] == "in_progress"
        assert text_of(response) == "0 1 2 3 "


async def test_cancel_ends_any_live_response_and_is_idempotent(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        background = (await create(api, background=True)).json["id"]
        replies = [(await api.call("POST", f"{PATH}/{background}/cancel")).json for _ in range(2)]
        assert replies[0] == replies[1]
        assert replies[0]["status"] == "cancelled"
        streams: list[Reply] = []

        async def stream() -> None:
            streams.append(await create(api, stream=True, conversation="conv_-mine"))

        await api.new_session(id="mine")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            await trio.sleep(3)
            head = (await api.call("GET", "/sessions/mine")).json["head"]
            cancelled = (await api.call("POST", f"{PATH}/resp_{head.removeprefix('turn_')}/cancel")).json
        assert (cancelled["status"], cancelled["lastcall"]["reason"]) == ("incomplete", "requested")
        told = events_of(streams[0])[-2:]
        assert [(event["type"], event.get("code")) for event in told] == [
            ("response.incomplete", None),
            ("error", "cancelled"),
        ]


async def test_a_deleted_response_is_gone_and_those_that_follow_it_stay(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        first = (await create(api, "secret")).json
        second = (await create(api, previous_response_id=first["id"])).json
        deleted = await api.call("DELETE", f"{PATH}/{first['id']}")
        assert (deleted.status, deleted.json) == (200, {"id": first["id"], "object": "response", "deleted": True})
        error_of(await get(api, first["id"]), 404, "response_not_found")
        error_of(await get(api, first["id"], "?stream=true"), 404, "response_not_found")
        error_of(await get(api, first["id"], "/input_items"), 404, "response_not_found")
        error_of(await api.call("DELETE", f"{PATH}/{first['id']}"), 404, "response_not_found")
        error_of(await api.call("POST", f"{PATH}/{first['id']}/cancel"), 404, "response_not_found")
        refused = await create(api, previous_response_id=first["id"])
        error_of(refused, 400, "previous_response_not_found", "previous_response_id")
        assert (await get(api, second["id"])).json == second
        third = (await create(api, previous_response_id=second["id"])).json
        assert third["status"] == "completed"
        messages = (await api.call("GET", f"/sessions/{first['lastcall']['session_id']}/messages")).json["data"]
        assert "secret" not in json.dumps(messages)
        assert (await api.call("DELETE", f"{PATH}/{third['id']}")).status == 200
        error_of(await get(api, third["id"]), 404, "response_not_found")


async def sessions_of(api: Api) -> list[str]:
    return [session["id"] for session in (await api.call("GET", "/sessions")).json["data"]]


async def delete(api: Api, *names: str) -> None:
    for name in names:
        assert (await api.call("DELETE", f"{PATH}/{name}")).json["deleted"] is True


async def test_a_deleted_response_changes_nothing_of_those_that_follow_it(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        first = (await create(api, "The weather?", tools=[TOOL], instructions="secret")).json
        (call,) = first["output"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "4 °C"}
        second = (await create(api, [output], previous_response_id=first["id"], tools=[TOOL])).json
        items = (await get(api, second["id"], "/input_items")).json
        await delete(api, first["id"])
        assert (await get(api, second["id"], "/input_items")).json == items
        assert (await get(api, second["id"])).json == second
        emptied = (await api.call("GET", f"/sessions/{first['lastcall']['session_id']}/turns")).json["data"][0]
        assert "secret" not in json.dumps(emptied)
        assert (emptied["state"], emptied["text"], "items" in emptied) == ("completed", "", False)
        third = (await create(api, "And?", previous_response_id=second["id"])).json
        assert third["status"] == "completed"


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"background": True}])
async def test_the_key_of_a_deleted_response_that_others_follow_is_spent(
    more: dict[str, Any], autojump_clock: MockClock
) -> None:
    async with open_api() as api:
        body, key = {"input": "Hi", "model": "scripted"} | more, {"Idempotency-Key": "k"}
        assert (await api.call("POST", PATH, body, headers=key)).status == 200
        await trio.sleep(100)
        first = f"resp_{(await native_head(api)).removeprefix('turn_')}"
        second = (await create(api, previous_response_id=first)).json
        await delete(api, first)
        refused = await api.call("POST", PATH, body, headers=key)
        error_of(refused, 410, "idempotency_key_spent", "Idempotency-Key")
        assert (await get(api, second["id"])).json == second
        assert await native_head(api) == f"turn_{second['id'].removeprefix('resp_')}", "nothing more was made"


async def native_head(api: Api) -> str:
    (session,) = await sessions_of(api)
    head: str = (await api.call("GET", f"/sessions/{session}")).json["head"]
    return head


async def test_a_response_that_is_deleted_while_its_request_is_repeated_is_gone_for_the_repetition(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api() as api:
        body, key = {"input": "Hi", "model": "scripted"}, {"Idempotency-Key": "k"}
        first = (await api.call("POST", PATH, body, headers=key)).json["id"]
        await create(api, previous_response_id=first)
        open_events = api.service.sessions.open_events

        async def found_and_deleted(*names: str, **rest: Any) -> Any:
            found = await open_events(*names, **rest)
            await delete(api, first)
            return found

        monkeypatch.setattr(api.service.sessions, "open_events", found_and_deleted)
        refused = await api.call("POST", PATH, body, headers=key)
        error_of(refused, 410, "idempotency_key_spent", "Idempotency-Key")


async def test_a_response_is_not_deleted_while_one_that_follows_it_is_in_progress(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=1&first_token_s=0") as api:
        first = (await create(api)).json
        live = (await create(api, previous_response_id=first["id"], background=True)).json
        refused = await api.call("DELETE", f"{PATH}/{first['id']}")
        assert live["id"] in error_of(refused, 400, "conversation_locked", "conversation")
        assert (await get(api, first["id"])).json == first
        await delete(api, live["id"], first["id"])
        assert await sessions_of(api) == []


async def test_no_session_is_left_of_responses_that_are_all_deleted(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        single = (await create(api)).json["id"]
        await delete(api, single)
        assert await sessions_of(api) == []
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
            names = [(await create(api)).json["id"]]
            for parent in (0, 1, 1):
                names.append((await create(api, previous_response_id=names[parent])).json["id"])
            for index in order:
                assert len(await sessions_of(api)) == 1
                await delete(api, names[index])
                error_of(await get(api, names[index]), 404, "response_not_found")
            assert await sessions_of(api) == []


async def test_a_session_that_a_user_made_or_changed_stays_without_responses(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        conversation = (await api.call("POST", "/v1/conversations", {})).json["id"]
        await delete(api, (await create(api, conversation=conversation)).json["id"])
        assert (await api.call("GET", f"/v1/conversations/{conversation}")).status == 200
        response = (await create(api)).json
        session = f"/sessions/{response['lastcall']['session_id']}"
        fork = (await api.call("POST", f"{session}/fork", {})).json
        await delete(api, f"resp_{fork['head'].removeprefix('turn_')}")
        assert (await api.call("GET", f"/sessions/{fork['id']}")).json["head"] is None
        assert (await api.call("PATCH", session, {"title": "Mine"})).status == 200
        await delete(api, response["id"])
        assert (await api.call("GET", session)).json["head"] is None
        beside = (await create(api)).json
        session = f"/sessions/{beside['lastcall']['session_id']}"
        native = (await api.call("POST", f"{session}/turns", {"input": "Hi", "parent": None})).json
        await delete(api, beside["id"])
        assert (await api.call("GET", f"{session}/turns/{native['id']}")).status == 200


async def test_a_response_that_comes_beside_the_deletion_of_its_previous_one_is_kept_or_refused(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url="scripted:?tokens=2&rate=0&first_token_s=0") as api:
        for deletes_first in (False, True):
            name = (await create(api)).json["id"]
            replies: dict[str, Reply] = {}

            async def follow(name: str = name, replies: dict[str, Reply] = replies) -> None:
                replies["follows"] = await create(api, previous_response_id=name)

            async def leave_out(name: str = name, replies: dict[str, Reply] = replies) -> None:
                replies["deletes"] = await api.call("DELETE", f"{PATH}/{name}")

            async with trio.open_nursery() as nursery:
                for call in (leave_out, follow) if deletes_first else (follow, leave_out):
                    nursery.start_soon(call)
            if replies["follows"].status == 200:
                follower = replies["follows"].json["id"]
                assert (await get(api, follower)).json["status"] == "completed"
                await delete(api, follower, *([] if replies["deletes"].status == 200 else [name]))
            else:
                error_of(replies["follows"], 400, "previous_response_not_found", "previous_response_id")
                assert replies["deletes"].status == 200
            assert await sessions_of(api) == []


async def test_a_deletion_during_a_live_response_ends_its_streams(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        name = (await create(api, background=True)).json["id"]
        streams: list[Reply] = []

        async def stream() -> None:
            streams.append(await get(api, name, "?stream=true"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            await trio.sleep(3)
            assert (await api.call("DELETE", f"{PATH}/{name}")).status == 200
        last, error = events_of(streams[0])[-2:]
        assert (last["type"], last["response"]["lastcall"]["state"]) == ("response.incomplete", "cancelled")
        assert (error["type"], error["code"]) == ("error", "cancelled")
        error_of(await get(api, name), 404, "response_not_found")


async def test_an_unknown_response_is_404_for_each_call(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        for name in (UNKNOWN, "resp_x", "x", "turn_" + 32 * "a", "resp_%C3%BC", "a" * 500):
            for method, rest in (("GET", ""), ("GET", "?stream=true"), ("GET", "/input_items"), ("DELETE", "")):
                error_of(await api.call(method, f"{PATH}/{name}{rest}"), 404, "response_not_found")
            error_of(await api.call("POST", f"{PATH}/{name}/cancel"), 404, "response_not_found")


async def test_input_items_are_paged_in_both_orders(autojump_clock: MockClock) -> None:
    texts = [f"text {number}" for number in range(5)]
    async with open_api() as api:
        name = (await create(api, [{"role": "user", "content": text} for text in texts])).json["id"]
        for order, expected in (("asc", texts), ("desc", texts[::-1]), (None, texts[::-1])):
            listed: list[str] = []
            query = "?limit=2" + (f"&order={order}" if order else "")
            after = ""
            while True:
                page = (await get(api, name, f"/input_items{query}{after}")).json
                assert page["object"] == "list"
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                listed += [item["content"][0]["text"] for item in page["data"]]
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
            assert listed == expected
        error_of(await get(api, name, "/input_items?after=msg_x"), 400, "invalid_value", "after")
        for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("x=1", "x")):
            assert (await get(api, name, f"/input_items?{query}")).json["error"]["param"] == param


async def test_responses_belong_to_the_owner_of_the_key(autojump_clock: MockClock) -> None:
    keys = [{"name": name, "key": f"the-key-of-{name}-0123456789"} for name in ("blue", "red")]
    blue, red = ({"Authorization": f"Bearer {key['key']}"} for key in keys)
    async with open_api(api_keys=keys, model_url="scripted:?tokens=2&rate=0") as api:
        response = (await api.call("POST", PATH, {"input": "Hi"}, headers=blue)).json
        path = f"{PATH}/{response['id']}"
        for method, rest in (("GET", ""), ("GET", "?stream=true"), ("GET", "/input_items"), ("DELETE", "")):
            error_of(await api.call(method, path + rest, headers=red), 404, "response_not_found")
        error_of(await api.call("POST", f"{path}/cancel", headers=red), 404, "response_not_found")
        body = {"input": "Hi", "previous_response_id": response["id"]}
        refused = await api.call("POST", PATH, body, headers=red)
        error_of(refused, 400, "previous_response_not_found", "previous_response_id")
        assert (await api.call("GET", path, headers=blue)).json == response


# What is refused


async def test_a_failure_of_the_model_server_is_an_error_for_a_client_that_waits(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=0&fail_after=2&fail_code=upstream_error") as api:
        reply = await create(api)
        error_of(reply, 502, "upstream_error")
        assert reply.json["error"]["lastcall"]["state"] == "failed"
        response = (await api.call("GET", reply.headers["location"])).json
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
        *_, failed, error = events_of(await create(api, stream=True))
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert (error["type"], error["code"]) == ("error", "upstream_error")
    async with open_api(model_url="scripted:?fail_after=0&fail_code=context_too_long") as api:
        error_of(await create(api), 400, "context_length_exceeded")


async def test_truncation_decides_whether_the_oldest_turns_may_be_left_out(autojump_clock: MockClock) -> None:
    """The scripted model quotes the input, so that a conversation of these turns does not fit."""
    async with open_api(prompt_bytes_max=2560, input_bytes_max=1024) as api:
        first = (await create(api, "a" * 1000)).json
        second = (await create(api, "b" * 1000, previous_response_id=first["id"], truncation="disabled")).json
        assert (second["status"], second["truncation"]) == ("completed", "disabled")
        follow = {"input_": "c" * 1000, "previous_response_id": second["id"]}
        for store in (True, False):
            refused = await create(api, **follow, truncation="disabled", store=store)
            assert "(prompt_bytes_max)" in error_of(refused, 400, "context_length_exceeded")
            assert refused.json["error"]["type"] == "invalid_request_error"
        *_, told, error = events_of(await create(api, **follow, truncation="disabled", stream=True))
        assert (error["type"], error["code"]) == ("error", "context_length_exceeded")
        assert (told["type"], told["response"]["error"]["code"]) == ("response.failed", "invalid_prompt")
        assert told["response"]["lastcall"]["code"] == "context_too_long"
        assert "left_out" not in told["response"]["lastcall"]
        for given in ({}, {"truncation": None}, {"truncation": "auto"}):
            response = (await create(api, **follow, **given)).json
            assert (response["status"], response["truncation"]) == ("completed", "auto")
            assert response["lastcall"]["left_out"]["items"] == 2


@pytest.mark.parametrize("conversation", [None, "conv_-mine"])
async def test_a_reply_that_another_call_cuts_is_an_error_for_a_client_that_waits(
    autojump_clock: MockClock, conversation: str | None
) -> None:
    """With a 200 a framework would take the text so far for the whole reply; the response has it."""
    async with open_api(model_url=SLOW) as api:
        replies: list[Reply] = []

        async def wait() -> None:
            replies.append(await create(api, conversation=conversation))

        await api.new_session(id="mine")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(3)
            listed = (await api.call("GET", "/sessions")).json["data"]
            (head,) = {it["head"] for it in listed} - {None}
            await api.call("POST", f"{PATH}/resp_{head.removeprefix('turn_')}/cancel")
        (reply,) = replies
        error_of(reply, 500, "cancelled")
        assert reply.json["error"]["lastcall"] == {"state": "cancelled", "reason": "requested", "code": None}
        assert reply.headers["x-should-retry"] == "false"
        response = (await api.call("GET", reply.headers["location"])).json
        assert (response["status"], text_of(response)) == ("incomplete", "0 1 2 3 ")


async def test_a_parameter_that_the_model_server_refuses_is_told_by_its_name_here() -> None:
    asked: list[dict[str, Any]] = []

    async def refuse(connection: Connection) -> None:
        asked.append((await connection.receive_request()).json)
        member = {"message": "response_format is not supported", "param": "response_format"}
        await connection.send_response(400, {"error": member})

    form = {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": True}
    async with open_raw_server(refuse) as upstream, open_api(model_url=upstream.url, model="m") as api:
        refused = await create(api, text={"format": form, "verbosity": "low"}, top_p=0.5, reasoning={"effort": "low"})
        error_of(refused, 400, "parameter_refused", "text.format")
        response = (await api.call("GET", refused.headers["location"])).json
    assert asked[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
    }
    assert (asked[0]["verbosity"], asked[0]["top_p"], asked[0]["reasoning_effort"]) == ("low", 0.5, "low")
    assert response["text"] == {"format": form | {"description": None}, "verbosity": "low"}
    assert response["lastcall"]["param"] == "text_format"


@pytest.mark.parametrize("ending", ["", "&fail_after=2&fail_code=upstream_error"], ids=["completed", "failed"])
async def test_a_response_that_is_gone_with_its_end_has_no_location(ending: str, autojump_clock: MockClock) -> None:
    async with open_api(model_url=f"scripted:?tokens=5&rate=0{ending}") as api:
        status = 502 if ending else 200
        gone, kept = await create(api, store=False), await create(api)
        assert (gone.status, gone.headers.get("location")) == (status, None)
        assert (kept.status, (await api.call("GET", kept.headers["location"])).status) == (status, 200)


async def test_a_failure_is_not_repeated_where_that_would_bring_the_input_twice(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=0&fail_after=2&fail_code=upstream_error") as api:
        await api.new_session(id="s")
        assert "x-should-retry" not in (await create(api)).headers
        assert (await create(api, conversation="conv_-s")).headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": None}, 400, "missing_required_parameter", "input"),
        ({"input": ""}, 400, "missing_required_parameter", "input"),
        ({"input": []}, 400, "missing_required_parameter", "input"),
        ({"input": 3}, 400, "invalid_type", "input"),
        ({"input": [{"role": "user", "content": ""}]}, 400, "invalid_value", "input"),
        ({"input": [3]}, 400, "invalid_type", "input[0]"),
        ({"input": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value", "input"),
        ({"input": [{"role": "system", "content": "x"}]}, 400, "invalid_value", "input"),
        ({"input": "\ud800"}, 400, "invalid_value", "input"),
        ({"input": "a\0b"}, 400, "invalid_value", "input"),
        ({"instructions": "x" * 2000}, 413, "input_too_large", "instructions"),
        ({"colour": 1}, 400, "unknown_parameter", "colour"),
        ({"text": {"colour": 1}}, 400, "unknown_parameter", "text.colour"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_type", "temperature"),
        ({"prompt": {"id": "pmpt_1"}}, 400, "unsupported_parameter", "prompt"),
        ({"background_options": {"continuation_id": "x"}}, 400, "unsupported_parameter", "background_options"),
        ({"context_management": [{"type": "compaction"}]}, 400, "unsupported_parameter", "context_management"),
        ({"moderation": {"model": "x"}}, 400, "unsupported_parameter", "moderation"),
        ({"service_tier": "flex"}, 400, "unsupported_parameter", "service_tier"),
        ({"top_logprobs": 2}, 400, "unsupported_parameter", "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, 400, "unsupported_parameter", "include"),
        ({"include": ["everything"]}, 400, "invalid_value", "include[0]"),
        ({"reasoning": {"mode": "pro"}}, 400, "unsupported_parameter", "reasoning.mode"),
        ({"prompt_cache_options": {"prewarm": True}}, 400, "unsupported_parameter", "prompt_cache_options.prewarm"),
        ({"text": {"format": {"type": "grammar"}}}, 400, "invalid_value", "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, 400, "missing_required_parameter", "text.format.name"),
        ({"background": True, "store": False}, 400, "invalid_value", "store"),
        ({"stream_options": {}}, 400, "invalid_value", "stream_options"),
        ({"tool_choice": {"type": "web_search"}}, 400, "unsupported_value", "tool_choice"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            400,
            "unsupported_value",
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 404, "item_not_found", "input[0].id"),
        ({"input": [{"type": "item_reference", "id": 3}]}, 400, "invalid_type", "input[0].id"),
        ({"input": [{"type": "item_reference"}]}, 400, "invalid_type", "input[0].id"),
        ({"input": [{"type": "item_reference", "id": "x", "x": 1}]}, 400, "unknown_parameter", "input[0].x"),
        ({"metadata": {"a": 1}}, 400, "invalid_type", "metadata.a"),
    ],
)
async def test_a_wrong_body_is_refused_by_its_name(
    body: dict[str, Any], status: int, code: str, param: str, autojump_clock: MockClock
) -> None:
    async with open_api(input_bytes_max=1024) as api:
        error_of(await api.call("POST", PATH, {"input": "Hi"} | body), status, code, param)
        assert (await api.call("GET", "/sessions")).json["data"] == []


async def test_two_outputs_of_one_call_are_refused(autojump_clock: MockClock) -> None:
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    async with open_api() as api:
        error_of(await create(api, [output, output]), 400, "invalid_value", "input")
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        assert (await create(api, [call, output, call, output])).status == 200


async def test_empty_and_default_values_are_accepted(autojump_clock: MockClock) -> None:
    defaults = {
        "include": [],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "truncation": "disabled",
        "text": {"format": {"type": "text"}},
        "stream_options": None,
        "metadata": {},
        "top_logprobs": 0,
        "background": False,
        "store": True,
        "service_tier": "auto",
        "context_management": [],
        "prompt": None,
        "reasoning": {"effort": None, "summary": "auto"},
        "max_tool_calls": None,
        "user": "u",
        "moderation": None,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "client_metadata": {"a": {"b": 1}},
        "access_programs": {},
        "conversation": None,
        "previous_response_id": None,
        "instructions": None,
        "prompt_cache_options": {},
        "background_options": {},
        "prompt_cache_retention": "24h",
        "temperature": None,
        "top_p": None,
    }
    async with open_api() as api:
        assert (await create(api, **defaults)).json["status"] == "completed"
        streamed = await create(api, **defaults | {"stream": True, "stream_options": {"include_obfuscation": True}})
        assert events_of(streamed)[-1]["type"] == "response.completed"


async def test_a_query_is_read_strictly_and_lists_in_every_form(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        name = (await create(api)).json["id"]
        for query in ("include[]=reasoning.encrypted_content", "include=code_interpreter_call.outputs", "include[0]=x"):
            status = 400 if query.endswith("=x") else 200
            assert (await get(api, name, f"?{query}&{query}")).status == status
        error_of(await get(api, name, "?starting_after=1"), 400, "invalid_value", "starting_after")
        error_of(await get(api, name, "?stream=true&starting_after=-1"), 400, "invalid_value", "starting_after")
        error_of(await get(api, name, "?stream=maybe"), 400, "invalid_value", "stream")
        error_of(await get(api, name, "?limit=1"), 400, "unknown_parameter", "limit")
        error_of(await api.call("POST", f"{PATH}/{name}/cancel?x=1"), 400, "unknown_parameter", "x")


async def test_a_stream_of_which_all_was_seen_ends_at_once(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        events = events_of(await create(api, stream=True))
        name, last = events[-1]["response"]["id"], events[-1]["sequence_number"]
        reply = await get(api, name, f"?stream=true&starting_after={last}")
        assert (reply.status, reply.body) == (200, b"data: [DONE]\n\n")


async def test_a_stream_after_an_event_that_there_is_not_is_refused(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=5&rate=1") as api:
        name = (await create(api, background=True)).json["id"]
        error_of(await get(api, name, "?stream=true&starting_after=9999"), 400, "invalid_value", "starting_after")
        events = events_of(await get(api, name, "?stream=true"))
        assert events[-1]["response"]["status"] == "completed"
        for number in (len(events), 1 << 30):
            reply = await get(api, name, f"?stream=true&starting_after={number}")
            assert str(number) in error_of(reply, 400, "invalid_value", "starting_after")


@pytest.mark.processes  # the client asks the system for its name
async def test_a_stream_that_is_cut_is_an_error_for_the_sdk(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Replay, seq: int) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreError("It hangs.")

    async with open_api(model_url="scripted:?tokens=2000&rate=0&first_token_s=0") as api:
        name = (await create(api)).json["id"]
        monkeypatch.setattr(Replay, "load_after", fail)
        reply = await get(api, name, "?stream=true")
    assert reply.body.endswith(CUT)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=reply.body, headers={"content-type": "text/event-stream"})

    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as http,
        openai.OpenAI(api_key="x", base_url="http://test/v1", http_client=http) as client,
    ):
        stream = client.responses.retrieve(name, stream=True)
        assert next(stream).type == "response.created"
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert (raised.value.code, raised.value.type) == ("stream_cut", "server_error")


@pytest.mark.parametrize("path", ["/v1/responses/compact", "/v1/responses/input_tokens"])
async def test_calls_that_are_not_there_yet_are_not_taken_for_responses(path: str) -> None:
    async with open_api() as api:
        reply = await api.call("POST", path, {"model": "x"})
        error_of(reply, 404, "not_found")
        assert "allow" not in reply.headers
        error_of(await api.call("GET", path), 404, "response_not_found")


async def _first(api: Api, *, cancelled: bool, **body: object) -> str:
    """A first response, which has ended: cancelled, or complete."""
    name: str = (await create(api, background=cancelled, **body)).json["id"]
    if cancelled:
        assert (await api.call("POST", f"{PATH}/{name}/cancel")).json["status"] == "cancelled"
    return name


async def _titled_session(api: Api, response: dict[str, Any]) -> dict[str, Any]:
    """The session of a response that is complete, and whether more was paid than its turns."""
    assert response["status"] == "completed"
    await trio.sleep(60)
    path = f"/sessions/{response['lastcall']['session_id']}"
    session: dict[str, Any] = (await api.call("GET", path)).json
    turns = (await api.call("GET", f"{path}/turns")).json["data"]
    paid = sum(turn["usage"]["output_tokens"] for turn in turns if turn["usage"])
    assert (session["usage"]["output_tokens"] > paid) == (session["title"] is not None)
    return session


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_session_that_is_made_for_a_response_gets_no_title_and_costs_no_call(
    autojump_clock: MockClock, cancelled: bool
) -> None:
    async with open_api(model_url=STEADY, title_model="titles") as api:
        name = await _first(api, cancelled=cancelled)
        for _ in range(2):
            response = (await create(api, previous_response_id=name)).json
            assert (await _titled_session(api, response))["title"] is None
            name = response["id"]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_conversation_gets_a_title_by_the_first_response_that_completes(
    autojump_clock: MockClock, cancelled: bool
) -> None:
    async with open_api(model_url=STEADY, title_model="titles") as api:
        conversation = (await api.call("POST", "/v1/conversations", {})).json["id"]
        name = await _first(api, cancelled=cancelled, conversation=conversation)
        response = (await create(api, previous_response_id=name)).json
        assert (await _titled_session(api, response))["title"]


async def test_a_native_session_gets_a_title_by_a_response_that_follows_its_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url=STEADY, title_model="titles") as api:
        await api.call("POST", "/sessions", {"id": "me"})
        turn = (await api.call("POST", "/sessions/me/turns", {"input": "Hi", "background": True})).json
        assert (await api.call("POST", f"/sessions/me/turns/{turn['id']}/cancel")).json["state"] == "cancelled"
        response = (await create(api, previous_response_id=turn["id"].replace("turn_", "resp_"))).json
        assert (await _titled_session(api, response))["title"]
