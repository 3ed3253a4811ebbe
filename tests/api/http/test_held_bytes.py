"""The bytes of requests and answers are bounded in all, and none is counted once its request is over."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from service.api.http.app_state import held_bytes_of
from service.api.http.face_frames import EndedTurn
from service.api.http.held_bytes import SMALL_BYTES, TINY_BYTES, HeldBytes, HeldBytesLimitError, RequestBytes
from service.api.http.long_json import encode_json
from service.api.http.request_body import BoundedBody
from service.api.native import turns
from service.errors import EventsLostError, ShuttingDownError
from service.storage.records import Item, TurnRecord
from tests.api.inprocess import SSE, Api, leave, open_api
from tests.api.stalled_call import StalledCall

MIB = 1024 * 1024
UPLOAD = 400_000
JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def open_small(**settings: Any) -> AsyncIterator[Api]:
    bounds = {"input_bytes_max": 65536, "reply_bytes_max": 65536, "held_bytes_max": 2 * MIB, "body_timeout_s": 30}
    async with open_api(**bounds | {"model_url": "scripted:?tokens=2"} | settings) as api:
        yield api
        assert held_bytes_of(api.app).bytes == 0


@asynccontextmanager
async def upload_of(api: Api, size: int, *, announced: bool) -> AsyncIterator[Any]:
    """An upload that stops one byte before its end."""
    headers = JSON | ({"Content-Length": str(size)} if announced else {})
    async with api.open("POST", "/sessions", headers=headers) as connection:
        for part in range(0, size - 1, 50_000):
            await connection.send(b" " * min(50_000, size - 1 - part))
        await trio.testing.wait_all_tasks_blocked()
        yield connection


@pytest.mark.parametrize("made_at_once", [2, 40])
async def test_answers_with_long_texts_are_refused_beyond_the_bound_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch, made_at_once: int
) -> None:
    """Such an answer is made in steps, between which others begin."""
    being_made = most = 0

    async def encode_slowly(body: Any) -> bytes:
        nonlocal being_made, most
        being_made += 1
        most = max(most, being_made)
        await trio.testing.wait_all_tasks_blocked()
        being_made -= 1
        return await encode_json(body)

    async with open_small(input_bytes_max=262_144, prompt_bytes_max=MIB) as api:
        await api.new_session(id="s")
        started = await api.call("POST", "/sessions/s/turns", {"input": "x" * 250_000, "background": True})
        monkeypatch.setattr(turns, "encode_json", encode_slowly)
        statuses: list[int] = []

        async def get() -> None:
            statuses.append((await api.call("GET", started.headers["location"])).status)

        async with trio.open_nursery() as nursery:
            for _ in range(made_at_once):
                nursery.start_soon(get)
        assert most == min(made_at_once, 2 * MIB // 250_000)
        assert (503 in statuses) == (made_at_once > most)


async def answer_of(connection: Any) -> tuple[int, bytes]:
    body = b""
    while True:
        try:
            body += await connection.receive()
        except trio.EndOfChannel:
            assert connection.status_code is not None
            return connection.status_code, body


@pytest.mark.parametrize("announced", [False, True])
async def test_uploads_are_refused_beyond_the_bound_and_taken_again_below_it(
    autojump_clock: MockClock, announced: bool
) -> None:
    async with open_small() as api, AsyncExitStack() as uploads:
        held = held_bytes_of(api.app)
        open_ones = [await uploads.enter_async_context(upload_of(api, UPLOAD, announced=announced)) for _ in range(5)]
        assert held.bytes == 5 * (UPLOAD - 1)
        async with upload_of(api, UPLOAD, announced=announced) as one_more:
            status, body = await answer_of(one_more)
            assert (status, b'"held_bytes_limit"' in body) == (503, True)
            assert one_more.headers["retry-after"] == "1"
        assert held.bytes == 5 * (UPLOAD - 1)
        (await api.call("GET", "/sessions")).problem(503, "held_bytes_limit")
        session_id = await api.new_session(system_message="x" * (SMALL_BYTES // 2))
        assert (await api.call("GET", "/healthz")).status == 200
        assert (await api.call("GET", f"/sessions/{session_id}")).status == 200
        reply = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "hi"}, headers=SSE)
        assert reply.events[-1]["type"] == "turn.completed"
        await open_ones[0].send(b"{")
        await open_ones[0].send_complete()
        assert (await answer_of(open_ones[0]))[0] == 400
        assert (await api.call("GET", "/sessions", headers=JSON)).status == 503, "a page needs more room"
        async with upload_of(api, UPLOAD, announced=announced) as again:
            await again.send(b"{")
            await again.send_complete()
            assert (await answer_of(again))[0] == 400
        await trio.sleep(31)
        assert held.bytes == 0, "the others were ended by body_timeout_s"
        assert [(await answer_of(it))[0] for it in open_ones[1:]] == [408] * 4
        assert (await api.call("GET", "/sessions")).status == 200


async def test_an_announced_body_without_room_is_refused_before_it_is_sent(autojump_clock: MockClock) -> None:
    async with open_small() as api, AsyncExitStack() as uploads:
        for _ in range(5):
            await uploads.enter_async_context(upload_of(api, UPLOAD, announced=True))
        async with api.open("POST", "/sessions", headers=JSON | {"Content-Length": str(UPLOAD)}) as connection:
            assert (await answer_of(connection))[0] == 503


async def test_a_client_that_leaves_in_the_middle_of_an_upload_holds_nothing(autojump_clock: MockClock) -> None:
    async with open_small() as api, upload_of(api, UPLOAD, announced=False) as connection:
        assert held_bytes_of(api.app).bytes == UPLOAD - 1
        await leave(connection)
        assert held_bytes_of(api.app).bytes == 0


async def test_answers_that_are_not_read_are_bounded_and_an_answer_of_a_change_is_not_refused(
    autojump_clock: MockClock,
) -> None:
    async with open_small() as api, trio.open_nursery() as nursery:
        held = held_bytes_of(api.app)
        session_id = await api.new_session(system_message="x" * 60_000)
        for _ in range(11):
            await api.new_session(system_message="x" * 60_000)
        stalled = [StalledCall(api, "GET", "/sessions") for _ in range(2)]
        for call in stalled:
            nursery.start_soon(call.run)
            await trio.testing.wait_all_tasks_blocked()
        page = held.bytes // 2
        assert page > 12 * 60_000
        (await api.call("GET", "/sessions")).problem(503, "held_bytes_limit")
        (await api.call("GET", "/sessions?limit=1")).problem(503, "held_bytes_limit")
        # What is left is less than a page, and more than a session.
        assert (await api.call("GET", f"/sessions/{session_id}")).status == 200
        more = [StalledCall(api, "GET", f"/sessions/{session_id}") for _ in range((2 * MIB - held.bytes) // 60_000 + 2)]
        for call in more:
            nursery.start_soon(call.run)
        await trio.testing.wait_all_tasks_blocked()
        assert {call.status for call in more} == {200, 503}
        assert held.bytes <= 2 * MIB
        patch = await api.call("PATCH", f"/sessions/{session_id}", {"title": "new"})
        patch.problem(503, "held_bytes_limit")
        change = StalledCall(api, "POST", f"/sessions/{session_id}/fork", b"{}")
        nursery.start_soon(change.run)
        await trio.testing.wait_all_tasks_blocked()
        assert change.status == 201, "it could not be repeated"
        assert held.bytes > 2 * MIB, "but it counts"
        for call in (change, *more, *stalled):
            call.read()
        await trio.testing.wait_all_tasks_blocked()
        assert len(stalled[0].body) == page
        assert held.bytes == 0
        again = await api.call("PATCH", f"/sessions/{session_id}", {"title": "new"})
        assert (again.status, again.json["title"]) == (200, "new")
        nursery.cancel_scope.cancel()


async def test_an_answer_to_a_post_that_can_be_repeated_is_refused_without_room(autojump_clock: MockClock) -> None:
    async with open_small() as api:
        session_id = await api.new_session()
        turns = f"/sessions/{session_id}/turns"
        turn = (await api.call("POST", turns, {"input": "x" * 60_000})).json
        others = RequestBytes(held_bytes_of(api.app))
        others.add(2 * MIB)
        for path, body, headers in (
            (f"{turns}/{turn['id']}/cancel", None, JSON),
            (turns, {"input": "x" * 60_000}, JSON | {"Last-Event-ID": "1"}),
        ):
            (await api.call("POST", path, body, headers=headers)).problem(503, "held_bytes_limit")
            others.release()
            again = await api.call("POST", path, body, headers=headers)
            assert (again.status, again.json["id"]) == (200, turn["id"])
            others.add(2 * MIB)
        started = await api.call("POST", turns, {"input": "x" * (SMALL_BYTES - 100)})
        assert len(started.body) > SMALL_BYTES
        assert started.status == 200, "it could not be repeated"
        others.release()


async def test_a_problem_with_the_text_of_a_turn_counts_and_is_refused_without_room(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(*_: object, **__: object) -> None:
        raise EventsLostError(turn_id, after=1, state="interrupted", text="x" * 60_000)

    turn_id = "turn_" + "a" * 32
    async with open_small() as api, trio.open_nursery() as nursery:
        held = held_bytes_of(api.app)
        monkeypatch.setattr(api.service.sessions, "open_events", lose)
        path = f"/sessions/s/turns/{turn_id}/events"
        stalled = StalledCall(api, "GET", path)
        nursery.start_soon(stalled.run)
        await trio.testing.wait_all_tasks_blocked()
        assert stalled.status == 410
        assert held.bytes > 60_000
        others = RequestBytes(held)
        others.add(2 * MIB)
        (await api.call("GET", path)).problem(503, "held_bytes_limit")
        others.release()
        stalled.read()


@pytest.mark.parametrize("store", ["memory:", "sqlite"])
async def test_a_body_counts_no_longer_than_it_is_kept(tmp_path: Path, store: str) -> None:
    """With a shared store the raw body is kept until it is known that this process answers."""
    url = f"sqlite:{tmp_path}/a.db" if store == "sqlite" else store
    with trio.fail_after(60):
        async with open_small(store_url=url, model_url="scripted:?tokens=5&rate=10") as api:
            session_id = await api.new_session()
            raw = b'{"input": "' + b"x" * 60_000 + b'"}'
            async with api.open("POST", f"/sessions/{session_id}/turns", headers=JSON | SSE) as connection:
                await connection.send(raw[:-1])
                await trio.testing.wait_all_tasks_blocked()
                assert held_bytes_of(api.app).bytes == len(raw) - 1
                await connection.send(raw[-1:])
                await connection.send_complete()
                assert await connection.receive()
                assert held_bytes_of(api.app).bytes == 0
                assert b"turn.completed" in (await answer_of(connection))[1]


def test_small_requests_have_a_reserve_and_tiny_ones_are_never_refused() -> None:
    held = HeldBytes(bytes_max=100 * SMALL_BYTES)
    large = RequestBytes(held)
    large.take(100 * SMALL_BYTES)
    with pytest.raises(HeldBytesLimitError):
        large.take(1)
    small = [RequestBytes(held) for _ in range(25)]
    for request in small:
        request.take(SMALL_BYTES)
    last = RequestBytes(held)
    with pytest.raises(HeldBytesLimitError):
        last.take(SMALL_BYTES)
    last.take(TINY_BYTES)
    for request in (last, small[0]):
        with pytest.raises(HeldBytesLimitError):
            request.take(1)
    assert held.bytes == 125 * SMALL_BYTES + TINY_BYTES
    for request in (large, *small, last, last):
        request.release()
    assert held.bytes == 0


async def test_a_flood_of_small_answers_that_are_not_read_is_bounded_and_probes_are_answered(
    autojump_clock: MockClock,
) -> None:
    async with open_small() as api, trio.open_nursery() as nursery:
        held = held_bytes_of(api.app)
        session_id = await api.new_session(system_message="x" * (SMALL_BYTES - 1000))
        calls = [StalledCall(api, "GET", f"/sessions/{session_id}") for _ in range(200)]
        for call in calls:
            nursery.start_soon(call.run)
        await trio.testing.wait_all_tasks_blocked()
        assert {call.status for call in calls} == {200, 503}
        assert 2 * MIB < held.bytes < 2.6 * MIB
        assert (await api.call("GET", "/healthz")).status == 200
        assert (await api.call("GET", "/readyz")).status == 200
        for call in calls:
            call.read()
        await trio.testing.wait_all_tasks_blocked()
        assert held.bytes == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_complete", [False, True])
async def test_a_dropped_body_gives_its_bytes_back_and_takes_no_more(is_complete: bool) -> None:
    held = HeldBytes(bytes_max=100_000)
    body = BoundedBody(None, 1_000_000)
    body.count_in(RequestBytes(held), expected=0)
    body.append(b"x" * 90_000)
    if is_complete:
        body.set_complete()
    body.drop()
    body.append(b"x" * 90_000)
    body.drop()
    assert (held.bytes, len(body._arrived)) == (0, 0)


async def test_a_body_that_cannot_be_parsed_is_not_counted_while_its_answer_is_sent(autojump_clock: MockClock) -> None:
    async with open_small() as api, trio.open_nursery() as nursery:
        malformed = StalledCall(api, "POST", "/sessions", b" " * UPLOAD + b"{")
        nursery.start_soon(malformed.run)
        await trio.testing.wait_all_tasks_blocked()
        assert malformed.status == 400
        assert held_bytes_of(api.app).bytes < 1000, "the answer alone"
        malformed.read()


async def test_a_refused_body_gives_its_bytes_back_and_takes_no_more() -> None:
    held = HeldBytes(bytes_max=100_000)
    body = BoundedBody(None, 1_000_000)
    body.count_in(RequestBytes(held), expected=0)
    body.append(b"x" * 90_000)
    assert held.bytes == 90_000
    body.refuse(ShuttingDownError())
    body.append(b"x" * 90_000)
    assert held.bytes == 0
    with pytest.raises(ShuttingDownError):
        await body.read()


async def test_streams_of_ended_responses_that_are_not_read_are_refused_beyond_the_bound(
    autojump_clock: MockClock,
) -> None:
    """Each holds the response's record as long as it lives."""
    async with open_small(held_bytes_max=4 * MIB) as api, trio.open_nursery() as nursery:
        held = held_bytes_of(api.app)
        response = (await api.call("POST", "/v1/responses", {"input": "Hi", "instructions": "x" * 48_000})).json
        path = f"/v1/responses/{response['id']}?stream=true"
        calls = [StalledCall(api, "GET", path) for _ in range(40)]
        for call in calls:
            nursery.start_soon(call.run)
        await trio.testing.wait_all_tasks_blocked()
        statuses = [call.status for call in calls]
        streams = statuses.count(200)
        assert streams + statuses.count(503) == len(calls)
        assert 5 <= streams < 20
        assert held.bytes > 5 * 48_000 * streams
        assert (await api.call("GET", path)).json["error"]["code"] == "held_bytes_limit"
        for call in calls:
            call.read()
        await trio.testing.wait_all_tasks_blocked()
        assert held.bytes == 0
        assert (await api.call("GET", path)).body.endswith(b"data: [DONE]\n\n")
        nursery.cancel_scope.cancel()


async def test_each_response_can_be_streamed_however_small_the_bound_is(autojump_clock: MockClock) -> None:
    async with open_small(held_bytes_max=MIB, input_bytes_max=MIB // 8) as api:
        tool = {"type": "function", "name": "f", "parameters": {"title": "x" * 110_000}, "strict": True}
        body = {"input": "Hi", "instructions": "x" * 5_000, "tools": [tool]}
        response = (await api.call("POST", "/v1/responses", body)).json
        for _ in range(3):
            reply = await api.call("GET", f"/v1/responses/{response['id']}?stream=true")
            assert reply.body.endswith(b"data: [DONE]\n\n")


def test_the_texts_of_an_ended_turn_and_what_its_face_keeps_count_for_its_stream() -> None:
    record = TurnRecord(
        id="turn_" + 32 * "a",
        session_id="s",
        parent=None,
        state="completed",
        model="m",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        input=(Item(id="msg_" + 32 * "b", role="user", text="x" * 9_000_000),),
    )
    empty = EndedTurn(record).held_bytes
    assert 0 < empty < 10_000
    reply = Item(id="msg_" + 32 * "c", role="assistant", text="x" * 1000, encrypted="y" * 500)
    face = {"openai": msgspec.Raw(b'"%s"' % (b"z" * 2000))}
    record = msgspec.structs.replace(record, output=(reply,), face=face)
    assert EndedTurn(record).held_bytes >= empty + 5 * 3500
    assert EndedTurn(record).record().input == ()
