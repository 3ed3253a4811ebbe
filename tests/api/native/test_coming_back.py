"""A POST with ``Last-Event-ID`` is a client that has come back: it goes on with its turn, and never starts another one.

fetch-event-source and event-source-plus repeat their whole request after a cut, the latter also after each stream that
has ended. `just clients` runs both.
"""

from datetime import timedelta
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.api.inprocess import SSE, Api, Reply, leave, open_api

SLOW = "scripted:?tokens=100&rate=1"
ME: dict[str, object] = {"session_id": "me", "message": "Hi"}


async def come_back(api: Api, seq: int | str, path: str = "/chat", **body: object) -> Reply:
    return await api.call("POST", path, body or ME, headers=SSE | {"Last-Event-ID": str(seq)})


async def turns_of(api: Api, session_id: str = "me") -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = (await api.call("GET", f"/sessions/{session_id}/turns")).json["data"]
    return turns


async def cut_after(
    api: Api, seconds: float, path: str = "/chat", body: bytes = b'{"session_id":"me","message":"Hi"}'
) -> None:
    """Begin a stream, and cut it after this time."""
    connection = api.open("POST", path, headers=SSE | {"Content-Type": "application/json"})
    async with connection:
        await connection.send(body)
        await connection.send_complete()
        await trio.sleep(seconds)
        await leave(connection)


@pytest.mark.parametrize("path", ["/chat", "/sessions/me/turns"])
async def test_the_rest_of_the_turn_is_replayed_from_any_event(path: str, autojump_clock: MockClock) -> None:
    body: dict[str, object] = ME if path == "/chat" else {"input": "Hi"}
    async with open_api() as api:
        await api.new_session(id="me")
        first = await api.call("POST", path, body, headers=SSE)
        last = first.events[-1]["seq"]
        for seq in range(last):
            again = await come_back(api, seq, path, **body)
            assert (again.status, again.events) == (200, first.events[seq:])
            assert again.headers["location"] == first.headers["location"]
        assert len(await turns_of(api)) == 1
        statistics = api.service.sessions.statistics()
        assert (statistics.streams_open, statistics.streams_ended) == (0, 1 + last)


@pytest.mark.parametrize("path", ["/chat", "/sessions/me/turns"])
async def test_where_no_event_is_left_the_answer_is_a_bare_204(path: str, autojump_clock: MockClock) -> None:
    """event-source-plus comes back after each completed turn, at once if the answer is an empty stream."""
    body: dict[str, object] = ME if path == "/chat" else {"input": "Hi"}
    async with open_api() as api:
        await api.new_session(id="me")
        first = await api.call("POST", path, body, headers=SSE)
        again = await come_back(api, first.events[-1]["seq"], path, **body)
        assert (again.status, again.body) == (204, b"")
        assert again.headers["location"] == first.headers["location"]
        assert not {"content-type", "content-length"} & again.headers.keys()
        assert len(await turns_of(api)) == 1
        assert api.service.sessions.statistics().streams_open == 0


async def test_a_turn_that_runs_goes_on_live_and_keeps_running_while_its_client_is_there(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url=SLOW, disconnect_grace_s=5) as api:
        await cut_after(api, 10.5)
        await trio.sleep(3)
        again = await come_back(api, 7)
        assert [event["seq"] for event in again.events] == list(range(8, 103))
        assert again.events[-1]["type"] == "turn.completed"
        [turn] = await turns_of(api)
        assert turn["state"] == "completed"


async def test_without_a_grace_the_client_that_comes_back_is_told_that_the_cut_ended_the_turn(
    autojump_clock: MockClock,
) -> None:
    async with open_api(model_url=SLOW) as api:
        await cut_after(api, 10.5)
        again = await come_back(api, 7)
        assert again.events[-1] == again.events[-1] | {"type": "turn.cancelled", "reason": "disconnected"}
        assert len(await turns_of(api)) == 1


async def test_a_queued_turn_is_resumed(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="me")
        path = "/sessions/me/turns"
        await api.call("POST", path, {"input": "before", "background": True})
        body = b'{"input":"Hi","on_conflict":"queue","on_disconnect":"continue"}'
        await cut_after(api, 1, path, body)
        again = await come_back(api, 1, path, input="Hi")
        assert [event["type"] for event in again.events[:2]] == ["turn.started", "turn.delta"]
        assert again.events[-1]["type"] == "turn.completed"


async def test_another_input_is_409_and_names_the_newest_turn(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        first = await api.call("POST", "/chat", ME)
        for path, body, field in (
            ("/chat", {"session_id": "me", "message": "Hi "}, "message"),
            ("/sessions/me/turns", {"input": "hi"}, "input"),
        ):
            refused = await come_back(api, 1, path, **body)
            problem = refused.problem(409, "resume_conflict", field)
            assert refused.headers["location"] == first.headers["location"]
            assert problem["turn_id"] == first.headers["location"].rpartition("/")[2]
            assert "Without Last-Event-ID" in problem["detail"]
        assert len(await turns_of(api)) == 1


async def test_the_newest_turn_counts_though_an_earlier_one_has_this_input(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.call("POST", "/chat", ME)
        newest = await api.call("POST", "/chat", {"session_id": "me", "message": "And then?"})
        refused = await come_back(api, 1)
        refused.problem(409, "resume_conflict", "message")
        assert refused.headers["location"] == newest.headers["location"]
        branch = await api.call("POST", "/sessions/me/turns", {"input": "Hi", "parent": None}, headers=SSE)
        assert (await come_back(api, 1)).events == branch.events[1:]


@pytest.mark.parametrize("model_url", ["scripted:", SLOW])
async def test_an_id_beyond_the_turns_events_is_409(model_url: str, autojump_clock: MockClock) -> None:
    async with open_api(model_url=model_url) as api:
        await api.new_session(id="me")
        started = await api.call("POST", "/sessions/me/turns", {"input": "Hi", "background": model_url == SLOW})
        await trio.sleep(1)
        for seq in (50, 10**14):
            refused = await come_back(api, seq)
            problem = refused.problem(409, "resume_conflict", "Last-Event-ID")
            assert str(seq) in problem["detail"]
            assert refused.headers["location"] == started.headers["location"]
        assert len(await turns_of(api)) == 1
        assert api.service.sessions.statistics().streams_open == 0


async def test_without_a_session_there_is_nothing_to_resume(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        for body in ({"message": "Hi"}, {"message": "Hi", "session_id": None}):
            problem = (await come_back(api, 1, **body)).problem(409, "resume_conflict", "session_id")
            assert "turn_id" not in problem
        assert (await api.call("GET", "/sessions")).json["data"] == []


async def test_a_session_without_turns_is_409_and_one_that_is_not_there_404_and_is_not_made(
    autojump_clock: MockClock,
) -> None:
    async with open_api() as api:
        (await come_back(api, 1)).problem(404, "session_not_found")
        (await api.call("GET", "/sessions/me")).problem(404, "session_not_found")
        await api.new_session(id="me")
        refused = await come_back(api, 1)
        refused.problem(409, "resume_conflict", "Last-Event-ID")
        assert "location" not in refused.headers
        assert await turns_of(api) == []


async def test_a_session_that_was_deleted_or_has_expired_is_404(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        for session_id in ("deleted", "expired"):
            await api.new_session(id=session_id, idle_timeout_s=3600)
            await api.call("POST", "/chat", {"session_id": session_id, "message": "Hi"})
        assert (await api.call("DELETE", "/sessions/deleted")).status == 204
        clock = api.service.sessions._clock
        api.service.sessions._clock = lambda: clock() + timedelta(days=1)
        for session_id in ("deleted", "expired"):
            again = await come_back(api, 1, session_id=session_id, message="Hi")
            again.problem(404, "session_not_found")


@pytest.mark.parametrize("seq", ["x", "-1", "1.0", " 1x", "1" * 16, "²", "turn_1"])
async def test_an_invalid_event_id_is_refused_and_starts_no_turn(seq: str, autojump_clock: MockClock) -> None:
    async with open_api() as api:
        await api.new_session(id="me")
        (await come_back(api, seq)).problem(422, "invalid_request", "Last-Event-ID")
        (await come_back(api, seq, "/sessions/me/turns", input="Hi")).problem(422, "invalid_request", "Last-Event-ID")
        assert await turns_of(api) == []


async def test_an_empty_id_is_that_of_a_client_that_has_seen_nothing(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        assert (await come_back(api, "")).events[-1]["type"] == "turn.completed"


async def test_only_the_input_is_compared(autojump_clock: MockClock) -> None:
    """The other fields were decided when the turn was accepted; its model, for example, may not be served any more."""
    async with open_api() as api:
        first = await api.call("POST", "/chat", ME)
        more = {"model": "another", "temperature": 1, "on_conflict": "supersede", "parent": "turn_" + 32 * "0"}
        again = await come_back(api, 2, "/sessions/me/turns", input="Hi", **more)
        assert again.events == first.events[2:]


async def test_a_call_that_asks_for_the_turn_gets_the_turn(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="me")
        path, back = "/sessions/me/turns", {"Last-Event-ID": "1"}
        started = await api.call("POST", path, {"input": "Hi", "background": True})
        at_once = await api.call("POST", path, {"input": "Hi", "background": True}, headers=back)
        assert (at_once.status, at_once.json["state"]) == (202, "running")
        assert trio.current_time() == 0
        waited = await api.call("POST", path, {"input": "Hi"}, headers=back)
        assert (waited.status, waited.json["state"]) == (200, "completed")
        assert {reply.headers["location"] for reply in (started, at_once, waited)} == {started.headers["location"]}
        assert (await api.call("POST", path, {"input": "Hi"}, headers={"Last-Event-ID": "102"})).json == waited.json
        (await api.call("POST", path, {"input": "?"}, headers=back)).problem(409, "resume_conflict", "input")
        assert len(await turns_of(api)) == 1


async def test_a_client_may_come_back_while_no_new_work_is_accepted(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, drain_timeout_s=20, disconnect_grace_s=20) as api:
        await cut_after(api, 90.5)
        api.service.shutdown.notice("test")
        (await api.call("POST", "/chat", {"session_id": "other", "message": "Hi"})).problem(503, "shutting_down")
        assert (await come_back(api, 90)).events[-1]["type"] == "turn.completed"


async def test_at_the_bound_on_streams_a_client_that_comes_back_is_told_to_wait(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, streams_max=1) as api:
        connection = api.open("POST", "/chat", headers={"Content-Type": "application/json"})
        async with connection:
            await connection.send(b'{"session_id":"me","message":"Hi"}')
            await connection.send_complete()
            await connection.receive()
            (await come_back(api, 1)).problem(503, "stream_limit")
            await leave(connection)
