"""Calls with an ``Idempotency-Key``: what a repetition gets, in each call that makes something."""

import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.api.http.test_callers import open_callers
from tests.api.inprocess import SSE, Api, Reply, leave, open_api

SLOW = "scripted:?tokens=100&rate=1"
ITEMS = [
    {"type": "message", "role": "user", "text": "What is a nursery?"},
    {"type": "message", "role": "assistant", "text": "A block that waits for its tasks."},
    {"type": "message", "role": "user", "text": "And a scope?"},
]
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "session": ("/sessions", {"title": "T"}),
    "session of a chosen id": ("/sessions", {"id": "chosen"}),
    "turn": ("/sessions/me/turns", {"input": "Hi"}),
    "background": ("/sessions/me/turns", {"input": "Hi", "background": True}),
    "chat": ("/chat", {"message": "Hi"}),
    "chat in a session": ("/chat", {"message": "Hi", "session_id": "me"}),
    "chat in a new session": ("/chat", {"message": "Hi", "session_id": "new"}),
    "fork": ("/sessions/me/fork", {}),
    "fork of a chosen id": ("/sessions/me/fork", {"id": "copy"}),
    "messages": ("/sessions/me/messages", {"items": ITEMS}),
}
MADE = {
    "session": (1, 0),
    "session of a chosen id": (1, 0),
    "turn": (0, 1),
    "background": (0, 1),
    "chat": (1, 1),
    "chat in a session": (0, 1),
    "chat in a new session": (1, 1),
    "fork": (1, 0),
    "fork of a chosen id": (1, 0),
    "messages": (0, 2),
}
"""How many sessions and turns each call makes."""
each_call = pytest.mark.parametrize("call", CALLS)


async def ask(api: Api, call: str, key: str = "k", *, seen: int | None = None, **changes: object) -> Reply:
    path, body = CALLS[call]
    headers = {"Idempotency-Key": key} | ({} if seen is None else {"Last-Event-ID": str(seen)})
    return await api.call("POST", path, body | changes, headers=(SSE if "chat" in call else {}) | headers)


async def made(api: Api) -> tuple[int, int]:
    """How many sessions and turns there are."""
    sessions = (await api.call("GET", "/sessions?limit=100")).json["data"]
    turns = [(await api.call("GET", f"/sessions/{it['id']}/turns?limit=100")).json["data"] for it in sessions]
    return len(sessions), sum(map(len, turns))


def told(reply: Reply) -> object:
    """What a reply says of the thing that was made, and not of its state."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        return reply.events
    return reply.json.get("id") or reply.json


@each_call
async def test_a_repetition_gets_the_answer_of_the_first_call_and_makes_nothing(
    call: str, autojump_clock: MockClock
) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        first = await ask(api, call)
        assert first.status in (200, 201, 202)
        before = await made(api)
        for key in ("k", '"k"', " k "):
            again = await ask(api, call, key)
            assert (again.status, again.headers["location"]) == (first.status, first.headers["location"])
            assert told(again) == told(first)
        assert await made(api) == before
        changes: dict[str, Any] = {"id": "chosen-2"} if "chosen" in call else {}
        other = await ask(api, call, "other", **changes)
        if call != "background":
            assert other.status == first.status
            assert other.headers["location"] != first.headers["location"]


@each_call
async def test_calls_at_the_same_time_make_one_thing(call: str, autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, live_turns_max=3) as api:
        await api.new_session(id="me")
        before = await made(api)
        replies: list[Reply] = []

        async def repeat() -> None:
            replies.append(await ask(api, call))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(repeat)
        assert len({(reply.status, reply.headers["location"]) for reply in replies}) == 1
        assert all(told(reply) == told(replies[0]) for reply in replies)
        sessions, turns = await made(api)
        assert (sessions - before[0], turns - before[1]) == MADE[call]
        assert api.service.sessions.statistics().streams_open == 0


@each_call
async def test_the_key_of_another_request_is_refused(call: str, autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        await ask(api, call)
        before = await made(api)
        for other in CALLS:
            if other != call:
                (await ask(api, other)).problem(422, "idempotency_key_reused", "Idempotency-Key")
        assert await made(api) == before
        assert (await ask(api, call)).status < 300


@each_call
async def test_the_key_of_a_thing_that_was_deleted_is_spent(call: str, autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        first = await ask(api, call)
        session = first.headers["location"].split("/")[2]
        assert (await api.call("DELETE", f"/sessions/{session}")).status == 204
        problem = (await ask(api, call)).problem(410, "idempotency_key_spent", "Idempotency-Key")
        assert session in problem["detail"]
        other = next(name for name in CALLS if name != call)
        (await ask(api, other)).problem(422, "idempotency_key_reused", "Idempotency-Key")


async def test_a_refused_call_keeps_no_key(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        (await ask(api, "turn")).problem(404, "session_not_found")
        await api.new_session(id="me")
        running = await ask(api, "background", "other")
        (await ask(api, "turn")).problem(409, "turn_in_progress")
        (await ask(api, "messages")).problem(409, "turn_in_progress")
        await api.call("POST", f"{running.headers['location']}/cancel")
        assert (await ask(api, "messages")).status == 201
        (await ask(api, "turn")).problem(422, "idempotency_key_reused", "Idempotency-Key")
        assert (await ask(api, "turn", "fresh")).status == 200
        await api.new_session(id="chosen")
        (await ask(api, "session of a chosen id", "s")).problem(409, "session_exists")
        await api.call("DELETE", "/sessions/chosen")
        assert (await ask(api, "session of a chosen id", "s")).status == 201


@pytest.mark.parametrize("key", ["", '""', '"', "k" * 256, "a\x7fb", "a,b"])
@each_call
async def test_a_bad_key_is_refused(call: str, key: str) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        before = await made(api)
        (await ask(api, call, key)).problem(400, "invalid_idempotency_key", "Idempotency-Key")
        assert await made(api) == before


async def test_several_keys_are_refused() -> None:
    async with open_api() as api:
        connection = api.open("POST", "/sessions", headers={"Content-Type": "application/json"})
        several = [(b"idempotency-key", b"a"), (b"idempotency-key", b"a")]
        connection.scope["headers"] = [*connection.scope["headers"], *several]
        async with connection:
            await connection.send(b"{}")
            await connection.send_complete()
            body = await connection.receive()
        assert connection.status_code == 400
        assert "2 headers Idempotency-Key" in json.loads(body)["detail"]


@pytest.mark.parametrize("call", ["turn", "background", "chat", "messages"])
async def test_the_key_of_a_turn_that_was_deleted_is_spent(call: str, autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        first = await ask(api, call)
        await trio.sleep(100)
        assert (await api.call("DELETE", first.headers["location"])).status == 204
        problem = (await ask(api, call)).problem(410, "idempotency_key_spent", "Idempotency-Key")
        assert first.headers["location"].rpartition("/")[2] in problem["detail"]


async def test_a_retry_with_a_key_is_done_once(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, branches_max=2) as api:
        await api.new_session(id="me")
        asked = await ask(api, "background", "first")
        path = f"{asked.headers['location']}/retry"
        replies: list[Reply] = []

        async def retry(headers: dict[str, str], **body: object) -> None:
            replies.append(await api.call("POST", path, body, headers={"Idempotency-Key": "k"} | headers))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(retry, {})
                nursery.start_soon(retry, SSE)
        assert {reply.status for reply in replies} == {200}
        assert len({reply.headers["location"] for reply in replies}) == 1
        assert await made(api) == (1, 2)
        replies.clear()
        await retry({}, temperature=1)
        replies[0].problem(422, "idempotency_key_reused", "Idempotency-Key")
        await api.call("DELETE", "/sessions/me")
        replies.clear()
        await retry({})
        replies[0].problem(410, "idempotency_key_spent", "Idempotency-Key")


# Streams, waits and kinds of answers


async def test_a_repetition_joins_the_stream_from_its_start_or_after_the_event_that_was_seen(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url="scripted:?tokens=20&rate=1") as api:
        replies: dict[int | None, Reply] = {}

        async def repeat(seen: int | None) -> None:
            replies[seen] = await ask(api, "chat", seen=seen)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(repeat, None)
            await trio.sleep(10.5)
            for seen in (0, 3, 7):
                nursery.start_soon(repeat, seen)
        whole = replies[None].events
        assert {seen: reply.events for seen, reply in replies.items()} == {
            None: whole,
            0: whole,
            3: whole[3:],
            7: whole[7:],
        }
        last = whole[-1]["seq"]
        done = await ask(api, "chat", seen=last)
        assert (done.status, done.headers["location"]) == (204, replies[None].headers["location"])
        problem = (await ask(api, "chat", seen=last + 1)).problem(409, "resume_conflict", "Last-Event-ID")
        assert "Idempotency-Key" in problem["detail"]
        assert await made(api) == (1, 1)


async def test_an_event_id_with_a_key_that_made_nothing_starts_nothing(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        (await ask(api, "chat", seen=2)).problem(409, "resume_conflict", "session_id")
        (await ask(api, "turn", seen=2)).problem(409, "resume_conflict", "Last-Event-ID")
        assert await made(api) == (1, 0)


async def test_each_repetition_gets_the_kind_of_answer_that_it_accepts(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="me")
        path, body = CALLS["turn"]
        key = {"Idempotency-Key": "k"}
        replies: list[Reply] = []

        async def repeat(headers: dict[str, str]) -> None:
            replies.append(await api.call("POST", path, body, headers=key | headers))

        async with trio.open_nursery() as nursery:
            for headers in ({}, SSE, {"Last-Event-ID": "0"}, SSE | {"Last-Event-ID": "2"}):
                nursery.start_soon(repeat, headers)
                await trio.sleep(5)
        assert {reply.headers["location"] for reply in replies} == {replies[0].headers["location"]}
        kinds = sorted(reply.headers["content-type"].partition(";")[0] for reply in replies)
        assert kinds == ["application/json"] * 2 + ["text/event-stream"] * 2
        assert await made(api) == (1, 1)


@pytest.mark.parametrize("on_conflict", ["reject", "queue", "supersede"])
async def test_a_repetition_meets_no_conflict_with_the_turn_of_its_own_key(
    on_conflict: str, autojump_clock: MockClock
) -> None:
    async with open_api(model_url=SLOW, live_turns_max=1, queued_turns_max=1) as api:
        await api.new_session(id="me")
        changes: dict[str, Any] = {"on_conflict": on_conflict}
        first = await ask(api, "background", **changes)
        for _ in range(3):
            again = await ask(api, "background", **changes)
            assert (again.status, again.json["id"], again.json["state"]) == (202, first.json["id"], "running")
        assert await made(api) == (1, 1)


async def test_a_repetition_that_joins_keeps_a_turn_running_whose_first_client_leaves(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url=SLOW) as api:
        replies: list[Reply] = []

        async def repeat() -> None:
            replies.append(await ask(api, "chat"))

        headers = SSE | {"Content-Type": "application/json", "Idempotency-Key": "k"}
        connection = api.open("POST", "/chat", headers=headers)
        async with trio.open_nursery() as nursery, connection:
            await connection.send(b'{"message":"Hi"}')
            await connection.send_complete()
            await trio.sleep(10.5)
            nursery.start_soon(repeat)
            await wait_all_tasks_blocked()
            await leave(connection)
        assert replies[0].events[-1]["type"] == "turn.completed"
        assert await made(api) == (1, 1)


async def test_the_key_of_a_turn_that_was_cut_off_answers_this_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        headers = SSE | {"Content-Type": "application/json", "Idempotency-Key": "k"}
        connection = api.open("POST", "/chat", headers=headers)
        async with connection:
            await connection.send(b'{"message":"Hi"}')
            await connection.send_complete()
            await trio.sleep(10.5)
            await leave(connection)
        again = await ask(api, "chat")
        assert again.events[-1] == again.events[-1] | {"type": "turn.cancelled", "reason": "disconnected"}
        assert await made(api) == (1, 1)


async def test_the_key_of_a_turn_that_failed_answers_this_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?fail_after=0") as api:
        await api.new_session(id="me")
        first = await ask(api, "turn")
        assert first.json["state"] == "failed"
        assert (await ask(api, "turn")).json == first.json
        assert await made(api) == (1, 1)


@pytest.mark.parametrize("call", ["turn", "background", "retry"])
async def test_the_key_of_a_turn_of_which_a_part_was_deleted_answers_the_rest(
    call: str, autojump_clock: MockClock
) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        path, body = CALLS["turn" if call == "retry" else call]
        if call == "retry":
            path, body = f"{(await api.call('POST', path, body)).headers['location']}/retry", {}
        key = {"Idempotency-Key": "k"}
        first = await api.call("POST", path, body, headers=key)
        turn = first.headers["location"]
        await api.call("GET", f"{turn}?wait=60")
        _, reply = (await api.call("GET", "/sessions/me/messages")).json["data"]
        assert (await api.call("DELETE", f"/sessions/me/messages/{reply['id']}")).status == 204
        (await api.call("GET", f"{turn}/events")).problem(410, "events_deleted")
        now = (await api.call("GET", turn)).json
        assert now["text"] == ""
        for headers in ({}, {"Last-Event-ID": "0"}, {"Last-Event-ID": "2"}):
            again = await api.call("POST", path, body, headers=key | headers)
            assert (again.status, again.headers["location"], again.json) == (first.status, turn, now)
        if call != "background":  # which is never a stream
            (await api.call("POST", path, body, headers=key | SSE)).problem(410, "events_deleted")
        assert await made(api) == (1, 2 if call == "retry" else 1)
        assert (await api.call("DELETE", turn)).status == 204
        (await api.call("POST", path, body, headers=key)).problem(410, "idempotency_key_spent", "Idempotency-Key")


@pytest.mark.parametrize("headers", [{}, SSE, {"Last-Event-ID": "2"}])
async def test_the_key_of_a_turn_of_which_all_was_deleted_is_spent(
    headers: dict[str, str], autojump_clock: MockClock
) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        turn = (await ask(api, "turn")).headers["location"]
        for message in (await api.call("GET", "/sessions/me/messages")).json["data"]:
            assert (await api.call("DELETE", f"/sessions/me/messages/{message['id']}")).status == 204
        assert (await api.call("GET", turn)).json["text"] == ""
        path, body = CALLS["turn"]
        again = await api.call("POST", path, body, headers={"Idempotency-Key": "k"} | headers)
        again.problem(410, "idempotency_key_spent", "Idempotency-Key")
        assert await made(api) == (1, 1)


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}])
async def test_a_client_that_comes_back_without_a_stream_gets_its_turn_though_the_events_are_gone(
    key: dict[str, str], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api() as api:
        end_turn = api.service.store.end_turn

        async def lose_events(turn: Any, **rest: Any) -> Any:
            return await end_turn(turn, **rest | {"runs": ()})

        monkeypatch.setattr(api.service.store, "end_turn", lose_events)
        await api.new_session(id="me")
        path, body = CALLS["turn"]
        first = await api.call("POST", path, body, headers=key)
        (await api.call("GET", f"{first.headers['location']}/events")).problem(410, "events_lost")
        for seen in ({"Last-Event-ID": "1"}, key):
            if seen:
                again = await api.call("POST", path, body, headers=key | seen)
                assert (again.status, again.json) == (200, first.json)
        (await api.call("POST", path, body, headers=SSE | key | {"Last-Event-ID": "1"})).problem(410, "events_lost")
        assert await made(api) == (1, 1)


async def test_a_retry_is_answered_again_after_the_input_of_the_turn_that_it_retried_was_deleted(
    autojump_clock: MockClock,
) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        asked = (await ask(api, "turn", "first")).headers["location"]
        said, _ = (await api.call("GET", "/sessions/me/messages")).json["data"]
        first = await api.call("POST", f"{asked}/retry", {}, headers={"Idempotency-Key": "k"})
        assert (await api.call("DELETE", f"/sessions/me/messages/{said['id']}")).status == 204
        for headers in ({}, SSE):
            again = await api.call("POST", f"{asked}/retry", {}, headers={"Idempotency-Key": "k"} | headers)
            assert (again.status, again.headers["location"]) == (200, first.headers["location"])
        changed = await api.call("POST", f"{asked}/retry", {"temperature": 1}, headers={"Idempotency-Key": "k"})
        changed.problem(422, "idempotency_key_reused", "Idempotency-Key")
        for headers in ({}, {"Idempotency-Key": "other"}):
            refused = await api.call("POST", f"{asked}/retry", {}, headers=headers)
            refused.problem(422, "invalid_request", "turn_id")
        assert await made(api) == (1, 2)


async def test_a_page_may_send_a_key_from_another_origin() -> None:
    async with open_api(cors_origins=("https://a.example",)) as api:
        headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        reply = await api.call("OPTIONS", "/chat", headers=headers)
        assert "Idempotency-Key" in reply.headers["access-control-allow-headers"]


async def test_the_keys_of_two_owners_never_meet(autojump_clock: MockClock) -> None:
    async with open_callers() as call:
        made: dict[str, set[str]] = {}
        for name in ("ann", "bob", "plain"):
            for _ in range(2):
                reply = await call(name, "POST", "/chat", {"message": "Hi", "session_id": "s"}, Idempotency_Key="k")
                made.setdefault(name, set()).add(reply.headers["location"])
        assert [len(turns) for turns in made.values()] == [1, 1, 1]
        assert len(set().union(*made.values())) == 3
        for owner in ("ann", "bob"):  # the owner for whom an administrator acts counts
            again = await call(
                "root", "POST", "/chat", {"message": "Hi", "session_id": "s"}, owner=owner, Idempotency_Key="k"
            )
            assert {again.headers["location"]} == made[owner]
        await call("ann", "DELETE", "/sessions/s")
        gone = await call("ann", "POST", "/chat", {"message": "Hi", "session_id": "s"}, Idempotency_Key="k")
        assert "session 's'" in gone.problem(410, "idempotency_key_spent", "Idempotency-Key")["detail"]
