"""``GET …/turns/{turn}?wait=…``: a look at a turn that waits for the turn's end."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.sessions.sessions import Sessions
from tests.api.inprocess import SSE, Api, Reply, leave, open_api

SLOW = "scripted:?tokens=100&rate=1&first_token_s=0"
"""A reply of 100 tokens, one each second."""


async def _start(api: Api, **more: object) -> str:
    """The path of a turn in the background."""
    reply = await api.call("POST", "/sessions/s/turns", {"input": "Hi", "background": True} | more)
    assert reply.status == 202
    return reply.headers["location"]


async def _look(api: Api, replies: list[Reply], path: str, wait: int = 60) -> None:
    replies.append(await api.call("GET", f"{path}?wait={wait}"))


async def test_a_look_that_waits_is_answered_when_the_turn_ends(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=10&rate=1&first_token_s=0") as api:
        await api.new_session(id="s")
        path = await _start(api)
        turn = (await api.call("GET", f"{path}?wait=30")).json
        assert turn["state"] == "completed"
        assert trio.current_time() == pytest.approx(10, abs=1.5)
        began = trio.current_time()
        assert (await api.call("GET", f"{path}?wait=30")).json == turn
        assert trio.current_time() == began, "an ended turn is not waited for"


async def test_a_look_is_answered_after_its_wait_as_the_turn_stands(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        path = await _start(api)
        turn = (await api.call("GET", f"{path}?wait=30")).json
        assert (turn["state"], turn["ended_at"], trio.current_time()) == ("running", None, 30)
        assert turn["text"]
        assert (await api.call("GET", f"{path}?wait=0")).json["state"] == "running"
        assert trio.current_time() == 30
        assert api.service.sessions.statistics().streams_open == 0


async def test_a_look_waits_for_the_end_and_for_no_other_change(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=10&rate=1&first_token_s=0") as api:
        await api.new_session(id="s")
        await _start(api)
        queued = await _start(api, on_conflict="queue")
        turn = (await api.call("GET", f"{queued}?wait=60")).json
        assert turn["state"] == "completed"
        assert trio.current_time() == pytest.approx(20, abs=3)


async def test_a_wait_reads_nothing_meanwhile(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[float] = []
    get_turn = Sessions.get_turn

    async def noted(self: Sessions, *ids: Any, **options: Any) -> Any:
        reads.append(trio.current_time())
        return await get_turn(self, *ids, **options)

    monkeypatch.setattr(Sessions, "get_turn", noted)
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        await api.call("GET", f"{await _start(api)}?wait=30")
    assert reads == [0, 30]


@pytest.mark.parametrize("wait", ["61", "-1", "1.5", "x", "", "1e1", "30&wait=30", "99999999999999999999"])
async def test_a_wait_that_is_no_number_of_seconds_or_too_long_is_refused(wait: str) -> None:
    async with open_api() as api:
        await api.new_session(id="s")
        path = await _start(api)
        (await api.call("GET", f"{path}?wait={wait}")).problem(422, "invalid_request", "wait")
        unknown = "turn_" + 32 * "0"
        (await api.call("GET", f"/sessions/s/turns/{unknown}?wait=30")).problem(404, "turn_not_found")
        (await api.call("GET", f"/sessions/t/turns/{unknown}?wait=30")).problem(404, "session_not_found")


async def test_a_look_keeps_no_turn_alive(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api, trio.open_nursery() as nursery:
        await api.new_session(id="s")
        connection = api.open("POST", "/sessions/s/turns", headers=SSE | {"Content-Type": "application/json"})
        async with connection:
            await connection.send(b'{"input": "Hi"}')
            await connection.send_complete()
            await wait_all_tasks_blocked()
            assert connection.headers is not None
            path = connection.headers["Location"]
            replies: list[Reply] = []
            nursery.start_soon(_look, api, replies, path)
            await trio.sleep(5.5)
            await leave(connection)
        await wait_all_tasks_blocked()
        (reply,) = replies
        assert (reply.json["state"], reply.json["reason"]) == ("cancelled", "disconnected")
        assert trio.current_time() == 5.5


async def test_a_look_that_leaves_ends_no_turn_and_gives_its_place_back(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, streams_max=1) as api:
        await api.new_session(id="s")
        path = await _start(api)
        connection = api.open("GET", f"{path}?wait=30")
        async with connection:
            await connection.send_complete()
            await wait_all_tasks_blocked()
            full = await api.call("GET", f"{path}?wait=30")
            assert full.problem(503, "stream_limit")["retry_after_s"] == 1
            assert (await api.call("GET", path)).status == 200, "a look that does not wait needs no place"
            await leave(connection)
        await wait_all_tasks_blocked()
        statistics = api.service.sessions.statistics()
        assert (statistics.streams_open, statistics.streams_aborted, statistics.turns_running) == (0, 0, 1)
        assert (await api.call("GET", f"{path}?wait=1")).json["state"] == "running"


async def test_a_look_at_a_turn_of_a_session_that_is_deleted_gets_the_end(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api, trio.open_nursery() as nursery:
        await api.new_session(id="s")
        path = await _start(api)
        replies: list[Reply] = []
        nursery.start_soon(_look, api, replies, path)
        await trio.sleep(1.5)
        assert (await api.call("DELETE", "/sessions/s")).status == 204
        await wait_all_tasks_blocked()
        assert (replies[0].json["state"], replies[0].json["reason"]) == ("cancelled", "session_deleted")
        (await api.call("GET", f"{path}?wait=30")).problem(404, "session_not_found")


async def test_a_stop_ends_each_look_with_its_turn(autojump_clock: MockClock) -> None:
    replies: list[Reply] = []
    async with open_api(model_url=SLOW, drain_timeout_s=4) as api, trio.open_nursery() as nursery:
        await api.new_session(id="s")
        path = await _start(api)
        nursery.start_soon(_look, api, replies, path)
        await trio.sleep(1.5)
        api.service.shutdown.notice("test")
        await trio.sleep(1)
        assert replies == []
        nursery.start_soon(_look, api, replies, path)
    assert [(reply.json["state"], reply.json["reason"]) for reply in replies] == [("interrupted", "shutdown")] * 2
    assert trio.current_time() == pytest.approx(5.5, abs=0.2), "the looks are not waited for"
