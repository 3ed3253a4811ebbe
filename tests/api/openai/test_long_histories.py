"""Requests that bring a whole conversation: how large they may be, what they hold, and that they hold up nobody."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.app import _HISTORY_PATHS, create_app
from service.api.http.app_state import held_bytes_of
from service.api.http.held_bytes import HeldBytes
from service.api.http.operations import operation_of
from service.api.openai.chat_requests import CreateChatCompletion
from service.api.openai.requests import CreateResponse
from tests.api.inprocess import Api, Reply, leave, open_api
from tests.api.stalled_call import StalledCall
from tests.longest_step import STEP_MAX_S, watching_steps
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

KIB, MIB = 1024, 1024 * 1024
RESPONSES, COMPLETIONS = "/v1/responses", "/v1/chat/completions"
QUICK = "scripted:?tokens=1&rate=0&first_token_s=0"
SLOW = "scripted:?tokens=100&rate=1&first_token_s=0"
MODERATE = "scripted:?tokens=5&rate=1&first_token_s=0"
TRIES = 3
"""Caches and a shared core cost processor time, too."""


def history(count: int, text: str) -> list[dict[str, Any]]:
    """So many messages in the form that agents send, the user's last."""
    kinds = {"user": "input_text", "assistant": "output_text"}
    roles = ["user" if (count - index) % 2 else "assistant" for index in range(count)]
    return [
        {"type": "message", "role": role, "content": [{"type": kinds[role], "text": f"{index} {text}"}]}
        for index, role in enumerate(roles)
    ]


def body_of(path: str, items: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    if path == RESPONSES:
        return {"model": "scripted", "input": items} | more
    messages = [{"role": it["role"], "content": it["content"][0]["text"]} for it in items]
    return {"model": "scripted", "messages": messages} | more


def code_of(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json["error"]["code"]


def test_the_paths_whose_bodies_may_be_long_are_those_of_the_operations_that_take_a_history() -> None:
    paths = []
    for rule in (app := create_app()).url_map.iter_rules():
        body = operation_of(app.view_functions[rule.endpoint]).body
        if body is not None and body.history:
            paths.append(rule.rule)
    assert sorted(_HISTORY_PATHS) == sorted(paths)


@pytest.mark.parametrize("path", [RESPONSES, COMPLETIONS])
async def test_a_history_of_4096_items_and_of_megabytes_is_taken(path: str, autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        for items in (history(4096, "a" * 500), history(3, "é" * 200_000)):
            assert (await api.call("POST", path, body_of(path, items))).status == 200
        reply = await api.call("POST", path, body_of(path, history(4097, "a")))
        assert (reply.status, reply.json["error"]["param"]) == (400, "input" if path == RESPONSES else "messages")
        reply = await api.call("POST", path, body_of(path, history(3, "a" * 2 * MIB)))
        assert code_of(reply) == (413, "input_too_large")


@pytest.mark.parametrize("path", [RESPONSES, COMPLETIONS])
async def test_the_bound_of_a_history_is_a_setting_and_that_of_other_bodies_stays(
    path: str, autojump_clock: MockClock
) -> None:
    async with open_api(model_url=QUICK, history_bytes_max=300 * KIB, input_bytes_max=4 * KIB) as api:
        assert (await api.call("POST", path, body_of(path, history(3, "a" * 90 * KIB)))).status == 200
        assert code_of(await api.call("POST", path, body_of(path, history(3, "a" * 110 * KIB)))) == (
            413,
            "input_too_large",
        )
        items = [{"role": "user", "content": "a" * 200 * KIB}]
        assert code_of(await api.call("POST", "/v1/conversations", {"items": items}))[0] == 413
        session_id = await api.new_session()
        (await api.call("POST", f"/sessions/{session_id}/turns", {"input": "a" * 5 * KIB})).problem(
            413, "input_too_large", "input"
        )


async def test_a_fault_far_into_an_input_is_told_with_its_place(autojump_clock: MockClock) -> None:
    async with open_api(model_url=QUICK) as api:
        for wrong, code, param in (
            (3, "invalid_type", ""),
            ({"role": "user", "content": [{"type": "input_text", "text": "a\0"}]}, "invalid_value", ".content[0].text"),
            (
                {"role": "user", "content": [{"type": "input_image"}]},
                "unsupported_value",
                ".content[0].type",
            ),
            ({"role": "user", "content": [{"type": "input_text", "text": ""}] * 4097}, "invalid_value", ".content"),
        ):
            items = [*history(1001, "a")[:-1], wrong, *history(1, "a")]
            reply = await api.call("POST", RESPONSES, {"input": items})
            assert code_of(reply) == (400, code), reply
            assert reply.json["error"]["param"] == f"input[1000]{param}"


async def test_functions_in_namespaces_count_as_tools(autojump_clock: MockClock) -> None:
    def tools(count: int) -> list[dict[str, Any]]:
        inner = [{"type": "function", "name": f"f{index}"} for index in range(count)]
        return [{"type": "namespace", "name": "n", "description": "", "tools": inner}]

    async with open_api(model_url=QUICK) as api:
        assert (await api.call("POST", RESPONSES, {"input": "Hi", "tools": tools(1024)})).status == 200
        reply = await api.call("POST", RESPONSES, {"input": "Hi", "tools": tools(1025)})
        assert (reply.status, reply.json["error"]["param"]) == (400, "tools")


async def test_the_items_of_a_large_input_come_in_pages_of_a_mebibyte(autojump_clock: MockClock) -> None:
    items = history(31, "x" * 100_000)
    async with open_api(model_url=QUICK) as api:
        response = (await api.call("POST", RESPONSES, {"input": items})).json
        path = f"{RESPONSES}/{response['id']}/input_items?order=asc&limit=100"
        pages = [(await api.call("GET", path)).json]
        while pages[-1]["has_more"]:
            pages.append((await api.call("GET", f"{path}&after={pages[-1]['last_id']}")).json)
        assert [len(page["data"]) for page in pages] == [10, 10, 10, 1]
        listed = [item["content"][0]["text"] for page in pages for item in page["data"]]
        assert listed == [item["content"][0]["text"] for item in items]


# What is held


def held(api: Api) -> HeldBytes:
    return held_bytes_of(api.app)


async def test_a_large_input_counts_until_the_end_of_its_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        asked = body_of(RESPONSES, history(3, "a" * MIB), background=True)
        response = (await api.call("POST", RESPONSES, asked)).json
        assert held(api).bytes >= 2 * 3 * MIB
        assert (await api.call("POST", f"{RESPONSES}/{response['id']}/cancel")).status == 200
        assert held(api).bytes == 0
        asked["input"] = "short"
        await api.call("POST", RESPONSES, asked)
        assert held(api).bytes == 0, "an input that other calls take as well is bounded by the number of turns"


@pytest.mark.parametrize("path", [RESPONSES, COMPLETIONS])
async def test_a_large_input_that_finds_no_room_is_refused_before_its_turn_begins(
    path: str, autojump_clock: MockClock
) -> None:
    bounds = {"held_bytes_max": 8 * MIB, "reply_bytes_max": MIB, "history_bytes_max": 2 * MIB}
    async with open_api(model_url=SLOW, **bounds) as api:
        asked = body_of(RESPONSES, history(3, "a" * 600 * KIB), background=True)
        first = (await api.call("POST", RESPONSES, asked)).json
        refused = await api.call("POST", path, body_of(path, history(3, "a" * 600 * KIB)))
        for _ in range(3):
            if refused.status == 503:
                break
            refused = await api.call("POST", RESPONSES, asked)
        assert code_of(refused) == (503, "held_bytes_limit")
        assert "retry-after" in refused.headers
        assert (await api.call("POST", f"{RESPONSES}/{first['id']}/cancel")).status == 200


async def test_an_input_that_is_refused_is_not_held(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, live_turns_max=1) as api:
        first = (await api.call("POST", RESPONSES, {"input": "Hi", "background": True})).json
        refused = await api.call("POST", RESPONSES, body_of(RESPONSES, history(3, "a" * MIB)))
        assert refused.status == 503
        assert held(api).bytes == 0
        assert (await api.call("POST", f"{RESPONSES}/{first['id']}/cancel")).status == 200


@pytest.mark.parametrize("kind", ["reasoning", "function_call"])
async def test_what_an_input_has_beside_its_texts_counts(kind: str, autojump_clock: MockClock) -> None:
    parts: dict[str, list[dict[str, Any]]] = {
        "reasoning": [{"type": "reasoning", "encrypted_content": "x" * MIB, "summary": []}],
        "function_call": [
            {
                "type": "function_call",
                "call_id": "c",
                "name": "f",
                "arguments": "{}",
                "extra_content": {"a": "x" * MIB},
            },
            {"type": "function_call_output", "call_id": "c", "output": ""},
        ],
    }
    async with open_api(model_url=SLOW) as api:
        asked = body_of(RESPONSES, [*history(1, "a"), *parts[kind], *history(1, "a")], background=True)
        response = (await api.call("POST", RESPONSES, asked)).json
        assert held(api).bytes >= 2 * MIB
        assert (await api.call("POST", f"{RESPONSES}/{response['id']}/cancel")).status == 200
        assert held(api).bytes == 0


@pytest.mark.parametrize("path", [RESPONSES, COMPLETIONS])
@pytest.mark.parametrize("streams", [False, True])
async def test_the_body_is_not_kept_while_its_response_is_on_its_way(
    path: str, streams: bool, autojump_clock: MockClock
) -> None:
    def kept() -> int:
        gc.collect()
        return sum(
            type(it) in (CreateResponse, CreateChatCompletion) and it.user == "who asks" for it in gc.get_objects()
        )

    async with open_api(model_url=SLOW) as api:
        asked = body_of(path, history(3, "a"), stream=streams, user="who asks")
        connection = api.open("POST", path, headers={"Content-Type": "application/json"})
        async with connection:
            await connection.send(json.dumps(asked).encode())
            await connection.send_complete()
            await wait_all_tasks_blocked()
            assert len(api.service.sessions.open_turns()) == 1
            assert kept() == 0
            await leave(connection)


@pytest.mark.parametrize("reader", ["responses", "completions", "get", "native"])
async def test_a_large_input_counts_while_a_stream_of_its_ended_turn_is_not_read(
    reader: str, autojump_clock: MockClock
) -> None:
    """The stream keeps the turn, which has the input."""
    path = COMPLETIONS if reader == "completions" else RESPONSES
    asked = body_of(path, history(3, "a" * MIB), model="scripted")
    async with open_api(model_url=MODERATE) as api, trio.open_nursery() as nursery:
        if path == RESPONSES and reader != "responses":
            response = (await api.call("POST", path, asked | {"background": True})).json
            place = response["lastcall"]
            url = f"{path}/{response['id']}?stream=true"
            if reader == "native":
                url = f"/sessions/{place['session_id']}/turns/{place['turn_id']}/events"
            stalled = StalledCall(api, "GET", url)
        else:
            stalled = StalledCall(api, "POST", path, json.dumps(asked | {"stream": True}).encode())
        nursery.start_soon(stalled.run)
        await wait_all_tasks_blocked()
        (turn,) = api.service.sessions.open_turns()
        await turn.wait_ended()
        await wait_all_tasks_blocked()
        assert stalled.status == 200
        assert held(api).bytes >= 2 * 3 * MIB
        stalled.read()
        await wait_all_tasks_blocked()
        assert held(api).bytes == 0
        nursery.cancel_scope.cancel()


async def test_a_large_input_counts_while_one_who_may_only_read_keeps_its_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODERATE) as api:
        await api.call("POST", RESPONSES, body_of(RESPONSES, history(3, "a" * MIB), background=True))
        (turn,) = api.service.sessions.open_turns()
        _, watch = await api.service.sessions.open_events(turn.session_id, turn.id, watches=False)
        await turn.wait_ended()
        assert held(api).bytes >= 2 * 3 * MIB
        for _ in range(2):
            watch.release()
            assert held(api).bytes == 0


# The event loop


@pytest.mark.serial
@pytest.mark.parametrize("store", ["memory:", "sqlite:"])
@pytest.mark.parametrize(
    "asked",
    [
        lambda: body_of(RESPONSES, history(4096, 'the quick, brown: "fox"\n' * 30)),
        lambda: body_of(COMPLETIONS, history(4096, 'the quick, brown: "fox"\n' * 30)),
        lambda: body_of(RESPONSES, history(1, "日" + "a" * 3_900_000)),
    ],
    ids=["items", "messages", "one text"],
)
async def test_the_largest_history_does_not_hold_the_event_loop(
    asked: Callable[[], dict[str, Any]], store: str, tmp_path: Path
) -> None:
    body = asked()
    path = RESPONSES if "input" in body else COMPLETIONS
    raw = json.dumps(body, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json"}
    longest: list[float] = []
    received: list[int] = []

    async with trio.open_nursery() as nursery:
        with watching_steps() as watched:

            async def behave(connection: Connection) -> None:
                watched.leave_out()
                received.append(len((await connection.receive_request()).body))
                await connection.send_head()
                await connection.send_event(delta("Hello"))
                await connection.send_event(finish())
                await connection.send_event(DONE)
                await connection.end_body()

            async with (
                open_raw_server(behave) as upstream,
                open_api(
                    store_url=f"{store}{tmp_path / 'lastcall.db'}" if store == "sqlite:" else store,
                    model_url=upstream.url,
                    model="scripted",
                ) as api,
            ):
                for _ in range(TRIES):
                    watched.reset()
                    reply = await api.call("POST", path, raw=raw, headers=headers)
                    assert reply.status == 200
                    longest.append(watched.seconds)
                    if watched.seconds < STEP_MAX_S:
                        break
        nursery.cancel_scope.cancel()
    assert min(received) > 3_400_000
    assert min(longest) < STEP_MAX_S, longest
