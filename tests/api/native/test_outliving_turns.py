"""Turns that outlive their process, in the native API: ``on_interrupt``, the ends of streams and calls in a stop, and
what a client that comes back gets. The processes are services on one store, one after the other."""

from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http.callers import CALLER
from service.api.http.proxy import PEER
from service.sessions.turns.turn import RETURN_S
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from tests.api.inprocess import SSE, Api, Reply, open_api

MODEL = "scripted:?tokens=30&rate=10&first_token_s=0"
"""A reply of 30 tokens, which takes three seconds."""
LONG = "scripted:?tokens=100&rate=1&first_token_s=0"
SLOW = "scripted:?tokens=30&rate=1&first_token_s=0"
"""The same reply in half a minute, which is longer than a turn waits for its clients."""
WHOLE = "".join(f"{number} " for number in range(30))


async def stop(api: Api) -> None:
    """Stop a service: it drains for no time."""
    api.service.shutdown.notice("test")
    with trio.fail_after(100):
        await api.service.shutdown.reached(Phase.RELEASING)


async def ask(api: Api, replies: list[Reply], method: str, path: str, body: object = None, **headers: str) -> None:
    replies.append(await api.call(method, path, body, headers=headers))


async def cut(
    body: dict[str, Any], *, model: str = MODEL, after_s: float = 1.0, sse: bool = True, **settings: object
) -> Reply:
    """The answer of a turn of session ``s`` whose process stops after some seconds."""
    replies: list[Reply] = []
    async with open_api(model_url=model, drain_timeout_s=0, **settings) as api, trio.open_nursery() as nursery:
        await api.new_session(id="s")
        headers = SSE if sse else {}
        nursery.start_soon(lambda: ask(api, replies, "POST", "/sessions/s/turns", {"input": "Hi"} | body, **headers))
        await trio.sleep(after_s)
        await stop(api)
        assert api.service.shutdown.report(tasks_left=0).faults == ()
    [reply] = replies
    return reply


async def resumed(path: str, seen: int) -> list[dict[str, Any]]:
    """The events that a client gets which has come back to the next process."""
    async with open_api(model_url=MODEL) as api:
        reply = await api.call("GET", f"{path}/events", headers={"Last-Event-ID": str(seen)})
        assert reply.status == 200
        return reply.events


async def ended(api: Api, path: str, query: str, *, pause_s: float, **passed_on: Any) -> Any:
    """The turn once it has ended, for a client that asks for it again and again."""
    while True:
        turn = (await api.call("GET", f"{path}{query}", **passed_on)).json
        if turn["ended_at"] is not None:
            return turn
        await trio.sleep(pause_s)


def text_of(events: list[dict[str, Any]]) -> str:
    text = ""
    for event in events:
        if event["type"] == "turn.delta":
            text += event["text"]
        elif event["type"] == "turn.resumed":
            text = text[: event["text_length"]]
    return text


async def test_a_stream_ends_after_a_comment_and_goes_on_in_the_next_process_as_if_nothing_had_happened(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    reply = await cut({"on_interrupt": "continue"})
    assert reply.status == 200
    assert reply.body.endswith(b"\n: moved\n")
    first = reply.events
    assert {event["type"] for event in first} == {"turn.started", "turn.delta"}
    rest = await resumed(reply.headers["location"], first[-1]["seq"])
    assert rest[0] == {
        "type": "turn.resumed",
        "seq": len(first) + 1,
        "attempt": 2,
        "mode": "continue",
        "text_length": len(text_of(first)),
    }
    assert text_of([*first, *rest]) == WHOLE
    assert rest[-1]["type"] == "turn.completed"
    assert rest[-1]["text_length"] == len(WHOLE)


async def test_a_retry_says_that_it_begins_anew(autojump_clock: MockClock, shared: MemoryStore) -> None:
    reply = await cut({"on_interrupt": "retry"})
    rest = await resumed(reply.headers["location"], reply.events[-1]["seq"])
    assert (rest[0]["mode"], rest[0]["text_length"]) == ("retry", 0)
    assert text_of([*reply.events, *rest]) == WHOLE


async def test_a_turn_in_memory_gets_its_end_because_no_process_can_go_on_with_it(autojump_clock: MockClock) -> None:
    reply = await cut({"on_interrupt": "continue"})
    assert reply.events[-1]["type"] == "turn.interrupted"


async def test_a_turn_that_fails_gets_its_end_as_ever(autojump_clock: MockClock, shared: MemoryStore) -> None:
    reply = await cut({})
    assert reply.events[-1]["type"] == "turn.interrupted"
    assert b"moved" not in reply.body


async def test_a_call_that_waits_is_told_where_its_turn_is(autojump_clock: MockClock, shared: MemoryStore) -> None:
    reply = await cut({"on_interrupt": "continue"}, sse=False)
    problem = reply.problem(503, "turn_moved")
    assert reply.headers["retry-after"] == "1"
    assert problem["turn_id"] in reply.headers["location"]
    async with open_api(model_url=MODEL) as api:
        turn = (await api.call("GET", f"{reply.headers['location']}?wait=60")).json
        assert (turn["state"], turn["text"], turn["on_interrupt"], turn["attempt"]) == (
            "completed",
            WHOLE,
            "continue",
            2,
        )


async def test_a_client_that_was_told_where_its_turn_is_keeps_it_running_while_it_asks(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    for query, pause_s in (("?wait=60", 0), ("?wait=4", 1), ("", 2)):
        reply = await cut({"on_interrupt": "continue"}, model=SLOW, sse=False)
        reply.problem(503, "turn_moved")
        async with open_api(model_url=SLOW) as api:
            began = trio.current_time()
            turn = await ended(api, reply.headers["location"], query, pause_s=pause_s)
            assert (turn["state"], turn["text"], turn["attempt"]) == ("completed", WHOLE, 2)
            assert trio.current_time() - began > 2 * RETURN_S
            await api.call("DELETE", "/sessions/s")


async def test_a_client_that_asks_no_more_has_its_turn_cancelled_after_some_seconds(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    reply = await cut({"on_interrupt": "continue"}, model=LONG, sse=False)
    async with open_api(model_url=LONG) as api:
        path = reply.headers["location"]
        asked = (await api.call("GET", f"{path}?wait=40")).json
        assert asked["state"] == "running"
        left_at = trio.current_time()
        [turn] = api.service.sessions.open_turns()
        record = await turn.wait_ended()
        assert (record.state, record.reason) == ("cancelled", "disconnected")
        assert trio.current_time() - left_at == pytest.approx(RETURN_S)


async def test_a_caller_behind_another_process_keeps_its_turn_running_if_it_may_talk(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    """The other process passes the call on, and closes the connection in whatever way."""
    for may, state in (("read talk", "completed"), ("read", "cancelled")):
        reply = await cut({"on_interrupt": "continue"}, model=LONG, sse=False)
        async with open_api(model_url=LONG) as api:
            passed_on: dict[str, Any] = {"headers": {CALLER.decode(): f"{may};"}, "scope": {PEER: bool}}
            turn = await ended(api, reply.headers["location"], "?wait=4", pause_s=1, **passed_on)
            assert turn["state"] == state
            await api.call("DELETE", "/sessions/s")


async def test_a_call_that_is_repeated_with_its_key_gets_the_same_turn(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    replies: list[Reply] = []
    body = {"input": "Hi", "on_interrupt": "continue"}
    async with open_api(model_url=MODEL, drain_timeout_s=0) as api, trio.open_nursery() as nursery:
        await api.new_session(id="s")
        post = ("POST", "/sessions/s/turns", body)
        nursery.start_soon(lambda: ask(api, replies, *post, **{"Idempotency-Key": "k"}))
        await trio.sleep(1)
        await stop(api)
    moved = replies[0].problem(503, "turn_moved")
    async with open_api(model_url=MODEL) as api:
        turn = (await api.call(*post, headers={"Idempotency-Key": "k"})).json
        assert (turn["id"], turn["state"], turn["text"]) == (moved["turn_id"], "completed", WHOLE)


async def test_a_client_that_comes_back_by_post_goes_on_with_the_suspended_turn(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    reply = await cut({"on_interrupt": "continue"})
    seen = reply.events[-1]["seq"]
    async with open_api(model_url=MODEL) as api:
        headers = SSE | {"Last-Event-ID": str(seen)}
        again = await api.call("POST", "/sessions/s/turns", {"input": "Hi"}, headers=headers)
        assert again.headers["location"] == reply.headers["location"]
        assert text_of([*reply.events, *again.events]) == WHOLE


async def test_the_setting_decides_about_turns_that_do_not_say_so(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    reply = await cut({}, on_interrupt="retry")
    async with open_api(model_url=MODEL) as api:
        turn = (await api.call("GET", reply.headers["location"])).json
        assert (turn["state"], turn["on_interrupt"], turn["attempt"]) == ("running", "retry", 2)
        retried = await api.call(
            "POST", f"{reply.headers['location']}/retry", {"on_interrupt": "continue", "background": True}
        )
        assert retried.json["on_interrupt"] == "continue"
        plain = await api.call("POST", "/chat", {"message": "Hi", "session_id": "other"})
        shown = (await api.call("GET", plain.headers["location"])).json
        assert not {"on_interrupt", "attempt"} & set(shown)


async def test_other_words_are_refused(autojump_clock: MockClock) -> None:
    async with open_api(model_url=MODEL) as api:
        await api.new_session(id="s")
        for word in ("resume", None, 1):
            reply = await api.call("POST", "/sessions/s/turns", {"input": "Hi", "on_interrupt": word})
            reply.problem(422, "invalid_request", "on_interrupt")


async def test_a_look_at_a_turn_that_moves_shows_it_as_it_stands(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    replies: list[Reply] = []
    async with open_api(model_url=MODEL, drain_timeout_s=0) as api, trio.open_nursery() as nursery:
        await api.new_session(id="s")
        body = {"input": "Hi", "background": True, "on_interrupt": "retry"}
        path = (await api.call("POST", "/sessions/s/turns", body)).headers["location"]
        nursery.start_soon(ask, api, replies, "GET", f"{path}?wait=60")
        await trio.sleep(1)
        await stop(api)
    turn = replies[0].json
    assert (replies[0].status, turn["state"]) == (200, "running")
    assert WHOLE.startswith(turn["text"])
    assert turn["text"]


async def test_a_process_that_stops_adopts_nothing_and_its_callers_try_elsewhere(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    reply = await cut({"on_interrupt": "continue"})
    path = reply.headers["location"]
    async with open_api(model_url=MODEL, lame_duck_timeout_s=0, drain_timeout_s=10) as api:
        api.service.shutdown.notice("test")
        await wait_all_tasks_blocked()
        for method, at in (("GET", f"{path}/events"), ("POST", f"{path}/cancel"), ("GET", f"{path}?wait=1")):
            refused = await api.call(method, at)
            refused.problem(503, "shutting_down")
            assert refused.headers["retry-after"] == "1"
        assert (await api.call("GET", path)).json["state"] == "running"


async def test_the_report_counts_suspended_turns_and_the_log_has_one_line_of_them(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    async with open_api(model_url=MODEL, drain_timeout_s=0) as api:
        for number in range(20):
            body = {"input": "Hi", "background": True, "on_interrupt": "retry"}
            await api.new_session(id=f"s{number}")
            await api.call("POST", f"/sessions/s{number}/turns", body)
        await trio.sleep(1)
        with capture_logs() as lines:
            await stop(api)
        report = api.service.shutdown.report(tasks_left=0)
        assert (report.turns_suspended, report.turns_interrupted, report.faults) == (20, 0, ())
    assert [line["turns"] for line in lines if line["event"].startswith("turns suspended")] == [20]
