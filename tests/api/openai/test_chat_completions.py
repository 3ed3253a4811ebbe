"""Chat completions over the whole application: streams, ends, failures before and after the start, and what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from service.storage.memory import MemoryStore
from tests.api.http.test_proxy import HEAD, chunk, open_owner, stop_beside
from tests.api.inprocess import Api, Reply, leave, open_api

PATH = "/v1/chat/completions"
FAST = "rate=0&first_token_s=0"
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | more


def chunks(reply: Reply) -> list[Any]:
    """The JSON of each chunk, and the words of other frames."""
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    assert reply.body.endswith(b"\n\n")
    lines = [line for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    data = [line.removeprefix("data: ") for line in lines]
    return [json.loads(line) if line.startswith("{") else line for line in data]


def text_of(told: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for it in told if isinstance(it, dict) for choice in it.get("choices", ())
    )


def is_empty(api: Api) -> bool:
    """Whether the store has no turn and no session."""
    store = api.service.store
    assert isinstance(store, MemoryStore)
    return not (store._turns or store._sessions)


async def test_a_whole_reply(autojump_clock: MockClock) -> None:
    async with open_api(model_url=f"scripted:?tokens=3&{FAST}") as api:
        reply = await api.call("POST", PATH, body())
        assert reply.status == 200
        told = reply.json
        assert told["choices"][0]["message"]["content"] == "0 1 2 "
        assert told["choices"][0]["finish_reason"] == "stop"
        assert (told["object"], told["model"], told["usage"]["completion_tokens"]) == ("chat.completion", "m", 3)
        assert is_empty(api)


async def test_a_stream_says_the_same_as_the_whole_reply(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=30&reasoning=2&rate=20") as api:
        told = chunks(await api.call("POST", PATH, body(stream=True, stream_options={"include_usage": True})))
        whole = (await api.call("POST", PATH, body())).json
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(told) == whole["choices"][0]["message"]["content"]
    reasoning = [it["choices"][0]["delta"].get("reasoning_content", "") for it in told[:-2]]
    assert "".join(reasoning) == whole["choices"][0]["message"]["reasoning_content"]
    assert told[-3]["choices"][0]["finish_reason"] == "stop"
    assert (told[-2]["choices"], told[-2]["usage"], told[-1]) == ([], whole["usage"], "[DONE]")
    assert len({it["id"] for it in told[:-1]}) == 1


async def test_nothing_is_kept_and_no_list_shows_the_session_meanwhile(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=30&rate=10") as api:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.call, "POST", PATH, body(stream=True))
            await trio.sleep(1)
            assert api.service.sessions.open_turns()
            assert (await api.call("GET", "/sessions?count=true")).json == {"data": [], "next": None, "count": 0}
        assert not api.service.sessions.open_turns()
        assert is_empty(api)


async def test_calls_in_a_reply_and_their_results_in_the_next_request(autojump_clock: MockClock) -> None:
    async with open_api(model_url=f'scripted:?call=get:{{"city":"Oslo"}}&call=get:{{}}&{FAST}') as api:
        told = chunks(await api.call("POST", PATH, body(stream=True, tools=[TOOL])))
        first = (await api.call("POST", PATH, body(tools=[TOOL]))).json["choices"][0]
        assert (first["finish_reason"], first["message"]["content"]) == ("tool_calls", None)
        calls = first["message"]["tool_calls"]
        results = [{"role": "tool", "tool_call_id": it["id"], "content": f"result {n}"} for n, it in enumerate(calls)]
        messages = [*body()["messages"], first["message"], *results]
        answer = (await api.call("POST", PATH, body(messages=messages, tools=[TOOL]))).json["choices"][0]
    streamed: dict[int, str] = {}
    for it in told[:-1]:
        for call in it["choices"][0]["delta"].get("tool_calls", ()):
            streamed[call["index"]] = streamed.get(call["index"], "") + call["function"]["arguments"]
    assert list(streamed.values()) == [it["function"]["arguments"] for it in calls] == ['{"city":"Oslo"}', "{}"]
    assert answer["finish_reason"] == "stop"
    assert "result 1" in answer["message"]["content"]


async def test_a_reply_that_was_cut_for_its_length_says_so(autojump_clock: MockClock) -> None:
    async with open_api(model_url=f"scripted:?tokens=9&{FAST}") as api:
        choice = (await api.call("POST", PATH, body(max_completion_tokens=2))).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("0 1 ", "length")


# Failures


def error_of(reply: Reply, status: int, code: str) -> dict[str, Any]:
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply
    error: dict[str, Any] = reply.json["error"]
    assert error["code"] == code
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        ("context_too_long", (400, "context_length_exceeded", "invalid_request_error")),
        ("rate_limited", (429, "rate_limit_exceeded", "rate_limit_error")),
        ("upstream_error", (502, "upstream_error", "server_error")),
        ("upstream_auth", (502, "upstream_auth", "server_error")),
    ],
)
async def test_a_failure_before_the_first_token_has_its_own_status_also_for_a_stream(
    failure: str, shown: tuple[int, str, str], stream: bool, autojump_clock: MockClock
) -> None:
    status, code, kind = shown
    async with open_api(model_url=f"scripted:?fail_after=0&fail_code={failure}", model_retries_max=0) as api:
        error = error_of(await api.call("POST", PATH, body(stream=stream)), status, code)
        assert error["type"] == kind
        assert error["lastcall"] == {"state": "failed", "reason": None, "code": failure}
        assert api.service.sessions.streams.open == 0
        assert is_empty(api)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refused", "param", "asked"),
    [
        ("max_output_tokens", "max_completion_tokens", {"max_tokens": 9}),
        ("text_format", "response_format", {"response_format": {"type": "json_object"}}),
        ("tools", "tools", {"tools": [TOOL]}),
    ],
)
async def test_a_parameter_that_the_model_server_refuses_is_told_by_its_name_here(
    refused: str, param: str, asked: dict[str, Any], stream: bool, autojump_clock: MockClock
) -> None:
    async with open_api(model_url=f"scripted:?tokens=1&{FAST}&refuse={refused}") as api:
        error = error_of(await api.call("POST", PATH, body(stream=stream, **asked)), 400, "parameter_refused")
        assert error["param"] == param
        assert (await api.call("POST", PATH, body())).status == 200


async def test_a_failure_in_mid_reply_ends_a_stream_with_an_error_and_without_done(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=9&fail_after=4&rate=10", model_retries_max=0) as api:
        told = chunks(await api.call("POST", PATH, body(stream=True)))
        assert text_of(told) == "0 1 2 3 "
        assert told[-1]["error"]["code"] == "upstream_error"
        assert all(it["choices"][0]["finish_reason"] is None for it in told[:-1])
        error_of(await api.call("POST", PATH, body()), 502, "upstream_error")
        assert is_empty(api)


async def test_a_deadline_is_an_error_and_is_not_repeated_by_the_sdk(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1000&rate=1", turn_timeout_s=30) as api:
        reply = await api.call("POST", PATH, body())
        error_of(reply, 504, "turn_timeout")
        assert reply.headers["x-should-retry"] == "false"
        told = chunks(await api.call("POST", PATH, body(stream=True)))
        assert told[-1]["error"]["lastcall"]["code"] == "turn_timeout"
        assert text_of(told)


async def test_a_stop_cuts_a_reply_off_and_the_client_is_told(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1000&rate=10", drain_timeout_s=1) as api:
        replies: dict[bool, Reply] = {}

        async def ask(stream: bool) -> None:
            replies[stream] = await api.call("POST", PATH, body(stream=stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, True)
            nursery.start_soon(ask, False)
            await trio.sleep(2)
            api.service.shutdown.notice("test")
        told = chunks(replies[True])
        assert text_of(told)
        assert told[-1]["error"]["lastcall"] == {"state": "interrupted", "reason": "shutdown", "code": None}
        assert error_of(replies[False], 503, "interrupted")["lastcall"]["reason"] == "shutdown"
        assert is_empty(api)


async def test_a_reply_that_another_caller_cancels_is_an_error(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1000&rate=10") as api:
        replies: list[Reply] = []

        async def ask() -> None:
            replies.append(await api.call("POST", PATH, body()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1)
            (turn,) = api.service.sessions.open_turns()
            await api.service.sessions.cancel_turn(turn.session_id, turn.id)
        assert error_of(replies[0], 500, "cancelled")["lastcall"]["reason"] == "requested"
        assert replies[0].headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_s", [0.1, 3.0], ids=["before the first token", "in mid reply"])
async def test_a_client_that_leaves_cancels_its_reply(stream: bool, after_s: float, autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1000&rate=10&first_token_s=1") as api:
        headers = {"Content-Type": "application/json"}
        connection = api.open("POST", PATH, headers=headers)
        async with connection:
            await connection.send(json.dumps(body(stream=stream)).encode())
            await connection.send_complete()
            await trio.sleep(after_s)
            assert len(api.service.sessions.open_turns()) == 1
            await leave(connection)
        await trio.testing.wait_all_tasks_blocked()
        assert not api.service.sessions.open_turns()
        assert is_empty(api)


async def test_a_slow_model_gets_a_stream_with_heartbeats(autojump_clock: MockClock) -> None:
    url = "scripted:?tokens=2&rate=1&first_token_s=40"
    async with open_api(model_url=url, heartbeat_interval_s=10) as api:
        reply = await api.call("POST", PATH, body(stream=True))
    assert text_of(chunks(reply)) == "0 1 "
    assert reply.body.count(b": heartbeat") >= 2


async def test_a_failure_after_the_head_was_sent_is_in_the_stream(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?silent_after=0", heartbeat_interval_s=10, first_token_timeout_s=30) as api:
        told = chunks(await api.call("POST", PATH, body(stream=True)))
    assert told[-1]["error"]["code"] == "first_token_timeout"


@pytest.mark.parametrize("streams", [True, False])
async def test_a_reply_that_another_process_may_have_ended_before_its_first_piece_is_an_error(
    streams: bool, autojump_clock: MockClock
) -> None:
    async with open_api(model_url="scripted:?silent_after=0") as api, trio.open_nursery() as nursery:
        replies: list[Reply] = []

        async def ask() -> None:
            replies.append(await api.call("POST", PATH, body(stream=streams)))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        api.service.store.standing.is_lost = True
        api.service.sessions.lose_turns()
    assert (replies[0].status, replies[0].json["error"]["code"]) == (503, "turn_moved")


async def test_a_stream_whose_end_another_process_may_have_told_ends_with_an_error(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?silent_after=3") as api, trio.open_nursery() as nursery:
        replies: list[Reply] = []

        async def ask() -> None:
            replies.append(await api.call("POST", PATH, body(stream=True)))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        api.service.store.standing.is_lost = True
        api.service.sessions.lose_turns()
    told = chunks(replies[0])
    assert text_of(told[:-1])
    assert told[-1]["error"]["code"] == "interrupted"


async def test_a_stream_of_a_process_that_dies_ends_with_an_error_in_the_process_that_passed_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_owner(tmp_path) as (api, other):
        stop_beside(api, other, monkeypatch)
        async with api.open("POST", PATH, headers={"Content-Type": "application/json"}) as client:
            await client.send(json.dumps(body(stream=True)).encode())
            await client.send_complete()
            stream, _ = await other.take()
            begun = 'data: {"choices":[]}\n\n'
            await stream.send_all(HEAD + chunk(begun))
            assert await client.receive() == begun.encode()
            await other.die(stream)
            rest = b""
            while piece := await client.receive():
                rest += piece
    error = json.loads(rest.removeprefix(b"data: "))["error"]
    assert (error["code"], error["lastcall"]["reason"]) == ("interrupted", "crash")


# Limits and keys


async def test_limits_and_refusals_have_the_shape_of_openai(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=99&rate=10", live_turns_max=1, streams_max=1) as api:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.call, "POST", PATH, body(stream=True))
            await trio.sleep(1)
            error_of(await api.call("POST", PATH, body(stream=True)), 503, "stream_limit")
            refused = await api.call("POST", PATH, body())
            error_of(refused, 503, "turn_limit")
            assert "retry-after" in refused.headers
        error_of(await api.call("POST", PATH, body(foo=1)), 400, "unknown_parameter")
        assert error_of(await api.call("POST", PATH, body(n=2)), 400, "unsupported_parameter")["param"] == "n"
        error_of(await api.call("GET", PATH), 405, "method_not_allowed")
        error_of(await api.call("POST", PATH, raw=b"{", headers={"Content-Type": "application/json"}), 400,
                 "malformed_body")  # fmt: skip
        error_of(await api.call("POST", PATH, raw=b"{}"), 415, "unsupported_media_type")
        error_of(await api.call("POST", f"{PATH}?x=1", body()), 400, "unknown_parameter")


async def test_several_upstreams_refuse_a_model_that_none_of_them_has(autojump_clock: MockClock) -> None:
    upstreams = [{"name": "a", "url": f"scripted:?tokens=1&{FAST}", "models": ["m"]}]
    async with open_api(upstreams=upstreams) as api:
        assert (await api.call("POST", PATH, body())).status == 200
        refused = error_of(await api.call("POST", PATH, body(model="other")), 400, "model_not_found")
        assert refused["param"] == "model"
        assert is_empty(api)
