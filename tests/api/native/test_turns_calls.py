"""Starting turns in three ways, following and cancelling them, as a client sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from quart import request
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http.request_body import kept_body
from service.errors import OwnedElsewhereError, StoreError
from service.sessions.sessions import Sessions
from service.sessions.turns.turn import Turn
from tests.api.inprocess import CAP_S, SSE, Api, leave, open_api

SLOW = "scripted:?tokens=100&rate=1"


async def test_a_waiting_call_answers_with_the_finished_turn(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session_id = await api.new_session()
        reply = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi"})
        assert reply.status == 200
        turn = reply.json
        assert (turn["state"], turn["finish_reason"], turn["input"]) == ("completed", "stop", "Hi")
        assert turn["text"]
        assert turn["ended_at"].endswith("Z")
        assert reply.headers["location"] == f"/sessions/{session_id}/turns/{turn['id']}"
        assert (await api.call("GET", reply.headers["location"])).json == turn
        assert (await api.call("GET", f"/sessions/{session_id}/turns")).json == {"data": [turn], "next": None}


async def test_every_answer_says_that_the_store_did_not_take_an_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(model_url=SLOW) as api:

        async def refuse(*_: object, **__: object) -> bool:
            await trio.lowlevel.checkpoint()
            raise StoreError("The disk is full.")

        session_id = await api.new_session()
        path = f"/sessions/{session_id}/turns"
        with monkeypatch.context() as full:
            full.setattr(api.service.store, "end_turn", refuse)
            waiting = (await api.call("POST", path, {"input": "Hi"})).json
            assert (waiting["state"], waiting["stored"]) == ("completed", False)
            other = await api.new_session()
            running = (await api.call("POST", f"/sessions/{other}/turns", {"input": "Hi", "background": True})).json
            assert "stored" not in running, "the acceptance is stored"
            cancelled = (await api.call("POST", f"/sessions/{other}/turns/{running['id']}/cancel")).json
            assert (cancelled["state"], cancelled["stored"]) == ("cancelled", False)
            assert (await api.call("GET", f"{path}/{waiting['id']}")).json == waiting
            assert (await api.call("GET", path)).json["data"] == [waiting]
            replay = (await api.call("GET", f"{path}/{waiting['id']}/events")).events
            assert replay[-1]["stored"] is False
        await api.service.sessions.pending_writes.retry()
        del waiting["stored"]
        assert (await api.call("GET", f"{path}/{waiting['id']}")).json == waiting
        assert (await api.call("GET", path)).json["data"] == [waiting]
        assert "stored" not in (await api.call("GET", f"{path}/{waiting['id']}/events")).events[-1]


async def test_a_streaming_call_answers_with_the_events(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        session_id = await api.new_session()
        reply = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi"}, headers=SSE)
        assert reply.status == 200
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["cache-control"] == "no-store, no-transform"
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.body.startswith(b"retry: 1000\nid: 1\n")
        kinds = [event["type"] for event in reply.events]
        assert kinds == ["turn.started", *["turn.delta"] * (len(kinds) - 2), "turn.completed"]
        assert [event["seq"] for event in reply.events] == list(range(1, len(kinds) + 1))
        turn = (await api.call("GET", reply.headers["location"])).json
        assert "".join(event.get("text", "") for event in reply.events) == turn["text"]
        assert api.service.sessions.statistics().streams_ended == 1
        assert api.service.sessions.statistics().streams_open == 0


async def test_a_turn_and_its_terminal_event_say_how_much_did_not_go_to_the_model(autojump_clock: MockClock) -> None:
    async with open_api(prompt_bytes_max=2560, input_bytes_max=1024, model_url="scripted:?tokens=1") as api:
        turns = f"/sessions/{await api.new_session()}/turns"
        first = await api.call("POST", turns, {"input": "é" * 500})
        assert first.json["left_out"] is None
        second = await api.call("POST", turns, {"input": "b" * 1000}, headers=SSE)
        assert "left_out" not in second.events[-1]
        third = await api.call("POST", turns, {"input": "c" * 1000}, headers=SSE)
        assert third.events[-1]["left_out"] == {"items": 2, "bytes": 1002}
        assert (await api.call("GET", third.headers["location"])).json["left_out"] == {"items": 2, "bytes": 1002}
        replay = await api.call("GET", third.headers["location"] + "/events", headers=SSE)
        assert replay.events == third.events
        fourth = await api.call("POST", turns, {"input": "d"})
        assert fourth.json["left_out"] == {"items": 2, "bytes": 1002}


async def test_a_background_call_answers_at_once_and_the_turn_runs_on(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        session_id = await api.new_session()
        body = {"input": "Hi", "background": True}
        reply = await api.call("POST", f"/sessions/{session_id}/turns", body, headers=SSE)
        assert reply.status == 202
        assert reply.json["state"] == "running"
        assert trio.current_time() == 0
        events = await api.call("GET", f"{reply.headers['location']}/events")
        assert events.events[-1]["type"] == "turn.completed"
        assert len(events.events) == 102


async def test_a_finished_turn_is_replayed_from_any_event(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        path, all_events = await _finished(api)
        last = all_events[-1]["seq"]
        for seq in range(last):
            assert (await api.call("GET", f"{path}/events?after={seq}")).events == all_events[seq:]
            header = await api.call("GET", f"{path}/events?after=1", headers={"Last-Event-ID": str(seq)})
            assert header.events == all_events[seq:]
            for query in (f"after=1&lastEventId={seq}", f"Last-Event-ID={seq}&_=17&_=18"):
                assert (await api.call("GET", f"{path}/events?{query}")).events == all_events[seq:]
        for seq in (last, last + 1, 10**15):
            reply = await api.call("GET", f"{path}/events?after={seq}")
            assert (reply.status, reply.body) == (204, b"")
            assert "content-type" not in reply.headers
        for after in ("-1", "x", "9999999999999999", "2.0", "2e0", "+2", "%202", "%C2%B2", ""):
            (await api.call("GET", f"{path}/events?after={after}")).problem(422, "invalid_request", "after")
        bad = await api.call("GET", f"{path}/events", headers={"Last-Event-ID": "x"})
        bad.problem(422, "invalid_request", "Last-Event-ID")


async def _finished(api: Api) -> tuple[str, list[dict[str, Any]]]:
    session_id = await api.new_session()
    reply = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi"}, headers=SSE)
    return reply.headers["location"], reply.events


async def test_a_seq_beyond_a_running_turn_is_refused(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        session_id = await api.new_session()
        reply = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi", "background": True})
        beyond = await api.call("GET", f"{reply.headers['location']}/events?after=50")
        beyond.problem(422, "invalid_request", "after")
        resumed = await api.call("GET", f"{reply.headers['location']}/events", headers={"Last-Event-ID": "50"})
        resumed.problem(422, "invalid_request", "Last-Event-ID")
        polyfilled = await api.call("GET", f"{reply.headers['location']}/events?after=1&lastEventId=50")
        polyfilled.problem(422, "invalid_request", "lastEventId")


async def test_a_head_request_for_events_streams_nothing(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        session_id = await api.new_session()
        reply = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi", "background": True})
        head = await api.call("HEAD", f"{reply.headers['location']}/events")
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
        assert trio.current_time() == 0
        assert api.service.sessions.statistics().streams_aborted == 0


async def test_a_cancel_whose_turn_ends_late_names_the_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(model_url=SLOW, store_timeout_s=2, cleanup_timeout_s=1) as api:
        session_id = await api.new_session()
        path = f"/sessions/{session_id}/turns"
        turn = (await api.call("POST", path, {"input": "Hi", "background": True})).json
        hung = trio.Event()

        async def hang(*_: object, **__: object) -> None:
            with trio.CancelScope(shield=True):
                await hung.wait()

        with monkeypatch.context() as late:
            late.setattr(api.service.store, "end_turn", hang)
            answer = await api.call("POST", f"{path}/{turn['id']}/cancel")
        problem = answer.problem(503, "turn_ending")
        assert (problem["turn_id"], problem["retry_after_s"]) == (turn["id"], 1)
        assert answer.headers["location"] == f"{path}/{turn['id']}"
        assert answer.headers["retry-after"] == "1"
        hung.set()
        assert (await api.call("POST", f"{path}/{turn['id']}/cancel")).json["state"] == "cancelled"


async def test_cancel_waits_for_the_end_and_is_idempotent(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        session_id = await api.new_session()
        started = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "Hi", "background": True})
        path = started.headers["location"]
        await trio.sleep(10.5)
        cancelled = await api.call("POST", f"{path}/cancel")
        assert (cancelled.status, cancelled.json["state"], cancelled.json["reason"]) == (200, "cancelled", "requested")
        assert cancelled.json["text"]
        assert (await api.call("POST", f"{path}/cancel")).json == cancelled.json


@pytest.mark.parametrize("headers", [{}, SSE])
async def test_a_call_whose_client_leaves_releases_its_turn(headers: dict[str, str], autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        session_id = await api.new_session()
        path = f"/sessions/{session_id}/turns"
        connection = api.open("POST", path, headers=headers | {"Content-Type": "application/json"})
        async with connection:
            await connection.send(b'{"input": "Hi"}')
            await connection.send_complete()
            await trio.sleep(10.5)
            await leave(connection)
        (turn,) = (await api.call("GET", path)).json["data"]
        assert (turn["state"], turn["reason"]) == ("cancelled", "disconnected")
        assert trio.current_time() == 10.5
        statistics = api.service.sessions.statistics()
        assert statistics.streams_open == 0
        assert statistics.streams_aborted == (1 if headers else 0)


async def test_a_client_that_leaves_before_the_stream_has_begun_releases_all(autojump_clock: MockClock) -> None:
    """The response's body is never opened then, so the body cannot be the part that releases the resources."""
    async with open_api(model_url=SLOW) as api:
        session_id = await api.new_session()
        path = f"/sessions/{session_id}/turns"
        connection = api.open("POST", path, headers=SSE | {"Content-Type": "application/json"})

        async def hang(message: dict[str, Any]) -> None:
            await trio.sleep_forever()

        connection._asgi_send = hang  # type: ignore[method-assign]
        async with connection:
            await connection.send(b'{"input": "Hi"}')
            await connection.send_complete()
            await wait_all_tasks_blocked()
            assert api.service.sessions.statistics().streams_open == 1
            await leave(connection)
            assert api.service.sessions.statistics().streams_open == 0
        (turn,) = (await api.call("GET", path)).json["data"]
        assert (turn["state"], turn["reason"]) == ("cancelled", "disconnected")


@pytest.mark.parametrize("on_disconnect", ["continue", "cancel"])
@pytest.mark.parametrize(
    ("path", "body"), [("/sessions/s/turns", {"input": "Hi"}), ("/chat", {"message": "Hi", "session_id": "s"})]
)
async def test_a_turn_says_whether_it_goes_on_without_its_client(
    autojump_clock: MockClock, path: str, body: dict[str, str], on_disconnect: str
) -> None:
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        connection = api.open("POST", path, headers=SSE | {"Content-Type": "application/json"})
        async with connection:
            await connection.send(json.dumps(body | {"on_disconnect": on_disconnect}).encode())
            await connection.send_complete()
            await trio.sleep(10.5)
            await leave(connection)
        (turn,) = (await api.call("GET", "/sessions/s/turns")).json["data"]
        assert turn["state"] == ("running" if on_disconnect == "continue" else "cancelled")


async def test_a_running_turn_is_kept_with_its_start_and_a_queued_one_without(autojump_clock: MockClock) -> None:
    """After a crash the store has of a turn what its acceptance has stored."""
    async with open_api(model_url=SLOW) as api:
        await api.new_session(id="s")
        kept = {}
        for number in ("first", "second"):
            body = {"input": number, "background": True, "on_conflict": "queue"}
            turn_id = (await api.call("POST", "/sessions/s/turns", body)).json["id"]
            kept[number] = await api.service.store.get_turn("s", turn_id, now=api.service.sessions._clock())
        assert (kept["first"].state, kept["first"].started_at) == ("running", kept["first"].created_at)
        assert (kept["second"].state, kept["second"].started_at) == ("queued", None)
        told = (await api.call("GET", f"/sessions/s/turns/{kept['first'].id}")).json
        assert told["started_at"] == told["created_at"]


async def test_conflicts_queues_and_parents(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, queued_turns_max=1) as api:
        session_id = await api.new_session()
        path = f"/sessions/{session_id}/turns"
        first = (await api.call("POST", path, {"input": "1", "background": True})).json
        problem = (await api.call("POST", path, {"input": "2"})).problem(409, "turn_in_progress")
        assert problem["turn_id"] == first["id"]
        queued = await api.call("POST", path, {"input": "2", "background": True, "on_conflict": "queue"})
        assert queued.json["state"] == "queued"
        full = await api.call("POST", path, {"input": "3", "on_conflict": "queue"})
        assert full.problem(429, "queue_full")["retry_after_s"] == int(full.headers["retry-after"])
        latest = await api.call("POST", path, {"input": "4", "on_conflict": "supersede", "parent": first["id"]})
        assert (latest.json["state"], latest.json["parent"]) == ("completed", first["id"])
        states = [turn["state"] for turn in (await api.call("GET", path)).json["data"]]
        assert states == ["cancelled", "cancelled", "completed"]
        root = await api.call("POST", path, {"input": "5", "parent": None})
        assert root.json["parent"] is None
        stranger = await api.call("POST", path, {"input": "6", "parent": "turn_" + "0" * 32})
        stranger.problem(422, "invalid_request", "parent")


async def test_at_the_bound_on_turns_the_answer_is_503(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, live_turns_max=1) as api:
        first, second = await api.new_session(), await api.new_session()
        await api.call("POST", f"/sessions/{first}/turns", {"input": "1", "background": True})
        refused = await api.call("POST", f"/sessions/{second}/turns", {"input": "1"}, headers=SSE)
        refused.problem(503, "turn_limit")
        assert int(refused.headers["retry-after"]) >= 1
        statistics = api.service.sessions.statistics()
        assert (statistics.streams_open, statistics.streams_ended, statistics.streams_aborted) == (0, 0, 0)


async def test_at_the_bound_on_streams_no_turn_is_started_and_nothing_read(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(model_url=SLOW, streams_max=1) as api:
        session_id = await api.new_session()
        started = await api.call("POST", f"/sessions/{session_id}/turns", {"input": "1", "background": True})
        path = f"{started.headers['location']}/events"
        connection = api.open("GET", path)
        async with connection:
            await connection.send_complete()
            await connection.receive()
            other = await api.new_session()
            refused = await api.call("POST", f"/sessions/{other}/turns", {"input": "1"}, headers=SSE)
            refused.problem(503, "stream_limit")
            monkeypatch.setattr(api.service.sessions, "open_events", None)
            (await api.call("GET", path)).problem(503, "stream_limit")
            (await api.call("POST", "/chat", {"session_id": "me", "message": "1"})).problem(503, "stream_limit")
            (await api.call("GET", "/sessions/me")).problem(404, "session_not_found")
            assert (await api.call("GET", f"/sessions/{other}/turns")).json["data"] == []
            await leave(connection)


async def test_a_stream_that_is_begun_anew_takes_one_place(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(streams_max=1) as api:
        path, events = await _finished(api)
        open_events = api.service.sessions.open_events
        gone = [OwnedElsewhereError("a", fence=1, address="@lastcall-nobody")]

        async def refuse_first(*args: Any, **kwargs: Any) -> Any:
            if gone:
                raise gone.pop()
            return await open_events(*args, **kwargs)

        monkeypatch.setattr(api.service.sessions, "open_events", refuse_first)
        assert (await api.call("GET", f"{path}/events")).events == events
        assert api.service.sessions.statistics().streams_open == 0


async def test_chat_makes_the_session_once_and_streams(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        for round_ in (1, 2):
            reply = await api.call("POST", "/chat", {"session_id": "me", "message": "Hi"})
            assert reply.status == 200
            assert reply.events[0]["session_id"] == "me"
            assert reply.events[-1]["type"] == "turn.completed"
            assert reply.headers["location"].startswith("/sessions/me/turns/turn_")
            assert (await api.call("GET", "/sessions/me")).json["message_count"] == 2 * round_
        fresh = await api.call("POST", "/chat", {"message": "Hi"})
        assert fresh.events[0]["session_id"].startswith("sess_")
        (await api.call("POST", "/chat", {"session_id": "a/b", "message": "Hi"})).problem(
            422, "invalid_request", "session_id"
        )


async def test_chat_leaves_no_session_behind_when_its_turn_is_refused(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, live_turns_max=1) as api:
        old = await api.new_session(id="old")
        await api.call("POST", f"/sessions/{old}/turns", {"input": "1", "background": True})
        for code in ("turn_limit", "shutting_down"):
            for body in ({"session_id": "new"}, {}):
                (await api.call("POST", "/chat", {"message": "Hi"} | body)).problem(503, code)
            assert [session["id"] for session in (await api.call("GET", "/sessions")).json["data"]] == ["old"]
            api.service.shutdown.notice("test")


async def test_chat_whose_client_leaves_at_any_moment_leaves_no_session_without_a_turn(
    autojump_clock: MockClock,
) -> None:
    """Moments are rounds of the event loop."""
    async with open_api(model_url=SLOW) as api:
        made = []
        for moment in range(60):
            session_id = f"me-{moment}"
            await _chat_and_leave(api, session_id, moment)
            reply = await api.call("GET", f"/sessions/{session_id}")
            made.append(reply.status == 200)
            if made[-1]:
                (turn,) = (await api.call("GET", f"/sessions/{session_id}/turns")).json["data"]
                assert (turn["state"], turn["reason"]) == ("cancelled", "disconnected")
        assert set(made) == {False, True}
        assert api.service.sessions.statistics().streams_open == 0


def _is_no_disconnect(error: BaseException) -> bool:
    return not isinstance(error, ExceptionGroup) and type(error).__name__ != "ClientDisconnectedError"


async def _chat_and_leave(api: Api, session_id: str, moment: int) -> None:
    scope = api.open("POST", "/chat", headers={"Content-Type": "application/json"}).scope
    client, application = trio.open_memory_channel[dict[str, Any]](2)

    async def drop(message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()

    async def answer() -> None:
        try:
            await api.app.asgi_app(scope, application.receive, drop)
        except* Exception as group:
            # Quart 0.23 raises an error to the server when the client has left.
            if group.subgroup(_is_no_disconnect) is not None:
                raise

    body = json.dumps({"message": "Hi", "session_id": session_id}).encode()
    client.send_nowait({"type": "http.request", "body": body, "more_body": False})
    with trio.fail_after(CAP_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            for _ in range(moment):
                await trio.lowlevel.checkpoint()
            client.send_nowait({"type": "http.disconnect"})
    await wait_all_tasks_blocked()


@pytest.mark.parametrize(("store", "kept"), [("memory:", b""), ("sqlite:shared.db", b'{"input": "Hi"}')])
async def test_a_body_is_kept_for_another_process_only_until_its_turn_is_accepted(
    store: str, kept: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, bytes] = {}

    def note(name: str, call: Any) -> Any:
        async def noted(*args: Any) -> Any:
            seen[name] = kept_body(request)
            return await call(*args)

        return noted

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sessions, "start_turn", note("start", Sessions.start_turn))
    monkeypatch.setattr(Turn, "wait_ended", note("wait", Turn.wait_ended))
    async with open_api(store_url=store, model_url="scripted:?tokens=1&rate=0&first_token_s=0") as api:
        path = f"/sessions/{await api.new_session()}/turns"
        assert (await api.call("POST", path, {"input": "Hi"})).json["state"] == "completed"
    assert seen == {"start": kept, "wait": b""}
