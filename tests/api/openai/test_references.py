"""References to items in the input of a response: what they stand for, and what is refused."""

from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import trio
from trio.testing import MockClock

from service.api.openai import references
from service.ids import new_item_id, new_turn_id, reply_item_id, turn_id_of_item
from service.storage.memory import MemoryStore
from tests.api.inprocess import Api, Reply, open_api
from tests.api.openai.test_responses_calls import (
    CALLING,
    PATH,
    TOOL,
    add,
    create,
    delete,
    error_of,
    events_of,
    get,
    native_turn,
    text_of,
)
from tests.upstreams.raw_server import DONE, Connection, finish, open_raw_server

USER = {"role": "user", "content": "The weather?"}
SIGNED = {"extra_content": {"google": {"thought_signature": "EjQ="}}}
QUICK = "scripted:?tokens=3&rate=0&first_token_s=0"


def ref(item: dict[str, Any] | str) -> dict[str, Any]:
    return {"type": "item_reference", "id": item if isinstance(item, str) else item["id"]}


def output_of(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": "4 °C"}


async def own_input(api: Api, response: dict[str, Any]) -> list[str]:
    """The types of a response's own input."""
    items = (await get(api, response["id"], "/input_items?order=asc")).json["data"]
    return [item["type"] for item in items]


def test_the_id_of_an_item_of_a_reply_leads_to_its_turn() -> None:
    turn_id = new_turn_id()
    ids = [reply_item_id("message", turn_id, index) for index in (0, 1, 4096)]
    assert len({*ids, turn_id}) == 4
    assert [turn_id_of_item(item_id) for item_id in ids] == [turn_id] * 3
    assert reply_item_id("function_call", turn_id, 0) == f"fc_{ids[0].removeprefix('msg_')}"
    for far in (reply_item_id("message", turn_id, 16**4 - 1), reply_item_id("message", f"turn_{'a' * 32}", 0)):
        assert turn_id_of_item(far) not in (turn_id, f"turn_{'a' * 32}")
    assert turn_id_of_item(new_item_id("message")) != turn_id


async def test_a_history_of_references_is_a_history_of_the_items(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        answer = (await create(api, [USER], tools=[TOOL])).json
        (call,) = answer["output"]
        for reference in (ref(call), {"id": call["id"]}, {"type": None, "id": call["id"]}):
            answer = (await create(api, [USER, reference, output_of(call)], tools=[TOOL])).json
            assert "4 °C" in text_of(answer)
            listed = (await get(api, answer["id"], "/input_items?order=asc")).json["data"]
            assert [item["type"] for item in listed] == ["message", "function_call", "function_call_output"]
            assert listed[1] | {"id": ""} == call | {"id": ""}
            assert listed[1]["id"] != call["id"]
        (text,) = answer["output"]
        again = [USER, ref(call), output_of(call), ref(text), ref(text), {"role": "user", "content": "And?"}]
        events = events_of(await create(api, again, stream=True, store=False))
        assert events[-1]["type"] == "response.completed"
        assert (await create(api, again)).json["status"] == "completed"


async def test_what_a_response_follows_is_not_repeated(autojump_clock: MockClock) -> None:
    async with open_api(model_url=CALLING) as api:
        first = (await create(api, [USER], tools=[TOOL])).json
        (call,) = first["output"]
        (asked,) = (await get(api, first["id"], "/input_items")).json["data"]
        brought = [ref(asked), ref(call), output_of(call)]
        second = (await create(api, brought, previous_response_id=first["id"], tools=[TOOL])).json
        assert await own_input(api, second) == ["function_call_output"]
        assert "4 °C" in text_of(second)
        beside = (await create(api, "Beside", previous_response_id=first["id"])).json
        other = (await create(api, [*brought, ref(second["output"][0]), USER], previous_response_id=beside["id"])).json
        assert await own_input(api, other) == ["function_call_output", "message", "message"]
        nothing = await create(api, [ref(call)], previous_response_id=first["id"])
        assert "nothing to answer" in error_of(nothing, 400, "invalid_value", "input")


async def test_the_items_of_a_conversation_are_not_repeated_and_the_last_one_may_be_answered(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url=QUICK) as api:
        made = (await api.call("POST", "/v1/conversations", {"items": [USER]})).json["id"]
        (item,) = (await api.call("GET", f"/v1/conversations/{made}/items")).json["data"]
        first = (await create(api, [ref(item)], conversation=made)).json
        assert (first["status"], await own_input(api, first)) == ("completed", [])
        await add(api, made, USER)
        again = [ref(item), ref(first["output"][0]), {"role": "user", "content": "Hi"}]
        second = (await create(api, again, conversation=made)).json
        assert await own_input(api, second) == ["message"]
        elsewhere = await create(api, [ref(item)])
        error_of(elsewhere, 404, "item_not_found", "input[0].id")
        unknown = await create(api, [ref(item)], conversation="conv_-none")
        error_of(unknown, 404, "conversation_not_found", "conversation")


async def test_a_reference_to_what_is_not_there_is_refused_by_its_place(autojump_clock: MockClock) -> None:
    keys = [{"name": name, "key": f"the-key-of-{name}-0123456789"} for name in ("blue", "red")]
    blue, red = ({"Authorization": f"Bearer {key['key']}"} for key in keys)
    async with open_api(api_keys=keys, model_url=QUICK) as api:

        async def ask(who: dict[str, str], *items: Any, **body: Any) -> Reply:
            return await api.call("POST", PATH, {"input": [*items, USER]} | body, headers=who)

        kept = (await ask(blue)).json
        gone = (await ask(blue, store=False)).json
        deleted = (await ask(blue)).json
        await api.call("DELETE", f"{PATH}/{deleted['id']}", headers=blue)
        (item,) = kept["output"]
        assert (await ask(blue, ref(item))).status == 200
        assert "not found" in error_of(await ask(red, ref(item)), 404, "item_not_found", "input[0].id")
        for name in (
            *(gone["output"][0]["id"], deleted["output"][0]["id"], item["id"].replace("msg_", "rs_")),
            *(item["id"].replace("msg_", "fc_"), "msg_" + "a" * 32, "x", "", "msg_\u00fc"),
        ):
            refused = await ask(blue, USER, ref(name))
            assert "not found" in error_of(refused, 404, "item_not_found", "input[1].id")


async def test_an_item_of_a_response_in_progress_is_not_taken(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=9&rate=1&first_token_s=0") as api:
        name = (await create(api, background=True)).json["id"]
        await trio.sleep(3)
        (item,) = (await get(api, name)).json["output"]
        assert "not ended" in error_of(await create(api, [ref(item), USER]), 400, "invalid_value", "input[0].id")
        await delete(api, name)
        error_of(await create(api, [ref(item), USER]), 404, "item_not_found", "input[0].id")


async def test_references_are_bounded(autojump_clock: MockClock, monkeypatch: Any) -> None:
    async with open_api(model_url=QUICK, input_bytes_max=1024) as api:
        first = (await create(api, [{"role": "user", "content": "x" * 200}])).json
        monkeypatch.setattr(references, "REFERENCES_MAX", 4)
        error_of(await create(api, [ref(f"msg_{number}") for number in range(5)]), 400, "invalid_value", "input")
        monkeypatch.setattr(references, "SEARCHES_MAX", 1)
        (asked,) = (await get(api, first["id"], "/input_items")).json["data"]
        followed = {"previous_response_id": first["id"]}
        assert (await create(api, [ref(asked), USER], **followed)).status == 200
        refused = await create(api, [ref(asked), ref("msg_" + "a" * 32), USER], **followed)
        error_of(refused, 400, "invalid_value", "input[1].id")
        monkeypatch.setattr(references, "_READ_PER_INPUT", 0)
        refused = await create(api, [ref(first["output"][0]), USER])
        error_of(refused, 413, "input_too_large", "input")


async def test_the_items_themselves_count_as_the_input(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=300&rate=0&first_token_s=0", history_bytes_max=1024) as api:
        (item,) = (await create(api)).json["output"]
        error_of(await create(api, [ref(item), USER]), 413, "input_too_large", "input")


async def test_what_only_one_model_can_read_does_not_go_to_another(autojump_clock: MockClock) -> None:
    url = "scripted:?tokens=3&rate=0&first_token_s=0&encrypted=9"
    async with open_api(upstreams=[{"name": "u", "url": url, "models": ["a", "b"]}]) as api:

        async def taken(*items: Any, **body: Any) -> list[tuple[str, str | None]]:
            """The types of a response's own input, and what only a model can read of it."""
            made = (await create(api, [*items, USER], **body)).json
            listed = await get(api, made["id"], "/input_items?order=asc&include=reasoning.encrypted_content")
            return [(it["type"], it.get("encrypted_content", it.get("extra_content"))) for it in listed.json["data"]]

        sealed, text = (await create(api, model="a")).json["output"]
        assert sealed["type"] == "reasoning"
        kept = [("reasoning", "x" * 9), ("message", None), ("message", None)]
        for body in ({"model": None}, {"model": "a"}):
            same = await taken(ref(sealed), ref(text), **body)
            assert [kind for kind, _ in same] == [kind for kind, _ in kept]
            assert same[0][1]
        assert await taken(ref(sealed), ref(text), model="b") == [("message", None)] * 2

        root = (await create(api, model="a")).json["id"]
        signed = {"type": "function_call", "call_id": "c", "name": "get", "arguments": "{}"} | SIGNED
        words = [{"type": "summary_text", "text": "Hm."}]
        thought = {"type": "reasoning", "summary": words, "encrypted_content": "sealed"}
        brought = [thought, signed, {"type": "function_call_output", "call_id": "c", "output": "4"}]
        one = (await create(api, brought, previous_response_id=root, model="a")).json["id"]
        thought, signed, _ = (await get(api, one, "/input_items?order=asc")).json["data"]
        beside = {
            "previous_response_id": (await create(api, "Beside", previous_response_id=root, model="a")).json["id"]
        }
        names = (ref(thought), ref(signed), brought[2])
        outputs = [("function_call_output", None), ("message", None)]
        told = [("reasoning", "sealed"), ("function_call", SIGNED["extra_content"]), *outputs]
        assert await taken(*names, **beside, model="a") == told
        assert await taken(*names, **beside, model="b") == [("reasoning", None), ("function_call", None), *outputs]


async def test_the_model_of_a_conversation_is_the_one_that_is_asked(autojump_clock: MockClock) -> None:
    url = "scripted:?tokens=3&rate=0&first_token_s=0&encrypted=9"
    async with open_api(upstreams=[{"name": "u", "url": url, "models": ["a", "b"]}]) as api:
        made = (await api.call("POST", "/sessions", {"model": "b"})).json["id"]
        sealed, _ = (await create(api, model="b")).json["output"]
        body = {"conversation": f"conv_{made.removeprefix('sess_')}", "model": None}
        assert await own_input(api, (await create(api, [ref(sealed), USER], **body)).json) == ["reasoning", "message"]
        sealed, _ = (await create(api, model="a")).json["output"]
        assert await own_input(api, (await create(api, [ref(sealed), USER], **body)).json) == ["message"]


async def test_the_inputs_of_the_responses_that_are_referred_to_do_not_count(autojump_clock: MockClock) -> None:
    """Each input of an agent that sends references has copies of all items before it: the sum grows with the square."""
    steps, length = 24, 1000
    async with open_api(model_url=CALLING, history_bytes_max=2 * steps * length) as api:
        history: list[dict[str, Any]] = [USER]
        for step in range(steps):
            answer = (await create(api, history, tools=[TOOL])).json
            assert answer.get("status") == "completed", (step, answer)
            history += [ref(item) for item in answer["output"]]
            calls = [item for item in answer["output"] if item["type"] == "function_call"]
            history += [output_of(call) | {"output": "x" * length} for call in calls]
            history += [] if calls else [{"role": "user", "content": "x" * length}]


async def test_the_reasoning_before_a_signed_call_brings_the_fields_of_the_call() -> None:
    prompts: list[list[dict[str, Any]]] = []

    async def behave(connection: Connection) -> None:
        while True:
            request: dict[str, Any] = (await connection.receive_request()).json
            prompts.append(request["messages"])
            function = {"name": "get", "arguments": "{}"}
            called = {"index": 0, "id": "c1", "type": "function", "function": function} | SIGNED
            await connection.send_head()
            await connection.send_event({"choices": [{"index": 0, "delta": {"tool_calls": [called]}}]})
            await connection.send_event(finish("tool_calls"))
            await connection.send_event(DONE)
            await connection.end_body()

    async with open_raw_server(behave) as upstream:
        served = {"name": "u", "url": upstream.url, "models": ["a", "b"]}
        async with open_api(upstreams=[served], model_retries_max=0) as api:
            ask: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "tools": [TOOL | {"name": "get"}]}
            sealed, call = (await create(api, [USER], model="a", **ask)).json["output"]
            assert (sealed["type"], call["type"]) == ("reasoning", "function_call")
            bare = {name: value for name, value in call.items() if name != "extra_content"}
            histories = ([ref(sealed), ref(call)], [ref(sealed), bare], [ref(call)], [ref(sealed), call])
            for model, fields in (("a", SIGNED), ("b", {})):
                for history in histories[: 4 if model == "a" else 3]:
                    answer = await create(api, [USER, *history, output_of(call)], model=model, **ask)
                    assert answer.status == 200, answer
                    ((sent,),) = [message["tool_calls"] for message in prompts[-1] if "tool_calls" in message]
                    assert {name: sent[name] for name in SIGNED if name in sent} == fields
            other = ref(call["id"].replace("fc_", "msg_"))
            refused = await create(api, [USER, other, ref(call), output_of(call)], model="a")
            error_of(refused, 404, "item_not_found", "input[1].id")


async def test_a_repeated_request_gets_its_response_though_an_item_is_gone(autojump_clock: MockClock) -> None:
    key = {"Idempotency-Key": "one"}
    async with open_api(model_url=QUICK) as api:

        async def ask(item: dict[str, Any], headers: dict[str, str], **body: Any) -> Reply:
            asked = {"model": "scripted", "input": [ref(item), USER]} | body
            return await api.call("POST", PATH, asked, headers=headers)

        first = (await create(api)).json
        made = await ask(first["output"][0], key)
        await delete(api, first["id"])
        assert (await ask(first["output"][0], key)).json["id"] == made.json["id"]
        error_of(await ask(first["output"][0], key, stream=True), 422, "idempotency_key_reused", "Idempotency-Key")
        for other in ({}, {"Idempotency-Key": "other"}):
            error_of(await ask(first["output"][0], other), 404, "item_not_found", "input[0].id")
        await delete(api, made.json["id"])
        assert (await ask(first["output"][0], key)).status == 410

        talk = (await api.call("POST", "/v1/conversations", {"items": [USER]})).json["id"]
        (item,) = (await api.call("GET", f"/v1/conversations/{talk}/items")).json["data"]
        followed = {"conversation": talk, "headers": {"Idempotency-Key": "two"}}
        made = await ask(item, **followed)
        assert (await ask(item, **followed)).json["id"] == made.json["id"]
        await api.call("DELETE", f"/v1/conversations/{talk}")
        assert (await ask(item, **followed)).status == 410


async def test_the_tree_is_not_read_for_what_a_response_follows(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        response = (await create(api)).json
        for _ in range(3):
            response = (await create(api, previous_response_id=response["id"])).json
        with patch.object(MemoryStore, "list_tree", side_effect=AssertionError("the tree is read")):
            again = [ref(response["output"][0]), USER]
            followed = (await create(api, again, previous_response_id=response["id"])).json
        assert await own_input(api, followed) == ["message"]


async def test_too_many_calls_of_namespaces_are_refused_by_the_name_of_what_has_them(autojump_clock: MockClock) -> None:
    calls = [
        {"type": "function_call", "call_id": f"c{n}", "name": f"{n:064}", "namespace": "n" * 64, "arguments": "{}"}
        for n in range(1500)
    ]
    async with open_api(model_url=QUICK) as api:
        words = error_of(await create(api, [*calls, USER]), 400, "invalid_value", "input")
        assert "namespace" in words


async def test_a_call_of_a_namespace_keeps_it(autojump_clock: MockClock) -> None:
    url = "scripted:?first_token_s=0&rate=0&call=" + quote("files__read:{}")
    tools = [{"type": "namespace", "name": "files", "tools": [TOOL | {"name": "read"}]}]
    async with open_api(model_url=url) as api:
        (call,) = (await create(api, [USER], tools=tools)).json["output"]
        answer = (await create(api, [USER, ref(call), output_of(call)])).json
        listed = (await get(api, answer["id"], "/input_items?order=asc")).json["data"]
        assert (listed[1]["namespace"], listed[1]["name"]) == ("files", "read")
        assert (await native_turn(api, answer))["items"][1]["name"] == "files__read"
