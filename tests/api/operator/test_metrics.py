"""The call for metrics: what a known number of events adds up to, and who may read it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from service.api.http.app_state import LOOPBACK_HOST_ONLY, METRICS_ONLY, held_bytes_of
from service.api.http.held_bytes import SMALL_BYTES
from service.errors import ModelError, StoreError
from service.models.client import ModelRequest
from service.models.retrying import RetryingClient
from service.sessions.events.streams import Streams
from service.steps import at_once
from service.stop_state import Phase, StopState
from service.telemetry.metrics import families
from service.telemetry.metrics.exposition import exposed
from service.telemetry.metrics.metrics import Metrics
from tests.api.inprocess import SSE, Api, open_api
from tests.api.operator.locked_database import locked
from tests.sessions.puppet import Puppet
from tests.telemetry.scrape import Samples, promtool, samples_of, turns_by_end

KEYS = {name: f"{name}-key-0123456789" for name in ("plain", "monitor", "root", "reader")}
NAMED = (
    KEYS["plain"],
    {"name": "monitor", "key": KEYS["monitor"], "may": ["metrics"]},
    {"name": "root", "key": KEYS["root"], "may": ["administer"]},
    {"name": "reader", "key": KEYS["reader"], "may": ["read", "talk"]},
)


async def scrape(api: Api) -> Samples:
    reply = await api.call("GET", "/metrics")
    assert reply.status == 200
    return samples_of(reply.body.decode())


async def store_pending_writes(api: Api) -> None:
    pending = api.service.sessions.pending_writes
    with trio.fail_after(30):
        while pending.turns:
            try:
                await pending.retry()
            except StoreError:
                await trio.sleep(0.01)


async def test_turns_are_counted_by_outcome_and_reason_with_their_tokens(autojump_clock: object) -> None:
    model_url = "scripted:?tokens=7&rate=10"
    async with open_api(model_url=model_url, expiry_interval_s=3600, turn_timeout_s=30) as api:
        before = await scrape(api)
        session = await api.new_session()
        input_tokens = 0
        for _ in range(3):
            reply = await api.call("POST", f"/sessions/{session}/turns", {"input": "a"}, headers=SSE)
            assert reply.events[-1]["type"] == "turn.completed"
            input_tokens += reply.events[-1]["usage"]["input_tokens"]
        path = f"/sessions/{session}/turns"
        first = await api.call("POST", path, {"input": "a", "background": True})
        queued = await api.call("POST", path, {"input": "b", "background": True, "on_conflict": "queue"})
        during = await scrape(api)
        for turn in (queued, first):
            await api.call("POST", f"{turn.headers['location']}/cancel")
        await api.call("POST", path, {"input": "c", "model": "of-a-caller", "max_output_tokens": 2})
        after = await scrape(api)
    assert turns_by_end(before) == {}
    assert turns_by_end(after) == {
        "outcome=completed,reason=stop": 3,
        "outcome=completed,reason=length": 1,
        "outcome=cancelled,reason=requested": 2,
    }
    assert [during["lastcall_turns", f"state={state}"] for state in ("running", "queued")] == [1, 1]
    assert [during["lastcall_sessions", f"state={state}"] for state in ("running", "idle")] == [1, 0]
    assert [after["lastcall_sessions", f"state={state}"] for state in ("running", "idle")] == [0, 1]
    assert after["lastcall_turns_accepted_total", "origin=new"] == 6
    assert during["lastcall_event_log_bytes", ""] > 0
    assert after["lastcall_event_log_bytes", ""] == 0
    told = "model=scripted,upstream=scripted"
    assert after["lastcall_output_tokens_total", told] == 3 * 7
    assert after["lastcall_input_tokens_total", told] == input_tokens
    assert after["lastcall_output_tokens_total", "model=other,upstream=scripted"] == 2
    assert after["lastcall_turn_first_token_seconds_count", "upstream=scripted"] == 4
    assert after["lastcall_turn_token_gap_seconds_count", "upstream=scripted"] == 3 * 6 + 1
    assert after["lastcall_turn_token_gap_seconds_sum", "upstream=scripted"] == pytest.approx(1.9)
    assert after["lastcall_turn_duration_seconds_count", "outcome=completed"] == 4
    assert after["lastcall_streams_total", "end=ended,face=native"] == 3
    assert after["lastcall_streams", "face=native"] == 0
    assert after["lastcall_upstream_calls_total", "result=ok,upstream=scripted"] == 4


async def test_a_failed_turn_has_its_code_and_a_stream_is_open_while_it_is(autojump_clock: object) -> None:
    silent = "scripted:?tokens=5&rate=0.001"
    async with open_api(model_url=silent, next_token_timeout_s=9, first_token_timeout_s=9) as api:
        async with api.open("POST", "/v1/chat/completions", headers={"Content-Type": "application/json"}) as stream:
            await stream.send(b'{"model": "scripted", "stream": true, "messages": [{"role": "user", "content": "a"}]}')
            await stream.send_complete()
            await trio.sleep(1)
            during = await scrape(api)
            with trio.fail_after(100):
                while True:
                    try:
                        await stream.receive()
                    except trio.EndOfChannel:
                        break
        after = await scrape(api)
    assert during["lastcall_streams", "face=chat_completions"] == 1
    assert after["lastcall_streams", "face=chat_completions"] == 0
    [(labels, count)] = turns_by_end(after).items()
    assert count == 1
    assert labels in ("outcome=failed,reason=first_token_timeout", "outcome=failed,reason=next_token_timeout")


async def test_an_end_that_the_store_refuses_is_counted_and_pending_until_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    async with open_api(store_url=f"sqlite:{path}", model_url="scripted:?tokens=1000&rate=1") as api:
        session = await api.new_session()
        started = await api.call("POST", f"/sessions/{session}/turns", {"input": "a", "background": True})
        with locked(path):
            await api.call("POST", f"{started.headers['location']}/cancel")
            during = await scrape(api)
        await store_pending_writes(api)
        after = await scrape(api)
    assert during["lastcall_turn_ends_not_stored_total", ""] == 1
    assert during["lastcall_turn_ends_pending", ""] == 1
    assert during["lastcall_store_refusing", ""] == 1
    assert after["lastcall_turn_ends_not_stored_total", ""] == 1
    assert after["lastcall_turn_ends_pending", ""] == 0
    assert after["lastcall_store_refusing", ""] == 0
    assert after["lastcall_store_commit_seconds_count", ""] > 2
    assert after["lastcall_sqlite_wal_bytes", ""] > 0


async def test_a_turn_whose_caller_got_an_error_is_no_turn_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    async with open_api(store_url=f"sqlite:{path}") as api:
        sessions = [await api.new_session() for _ in range(2)]
        with locked(path):
            for session, on_interrupt in zip(sessions, ("fail", "continue"), strict=True):
                turn = {"input": "a", "on_interrupt": on_interrupt}
                assert (await api.call("POST", f"/sessions/{session}/turns", turn)).status == 503
            during = await scrape(api)
        await store_pending_writes(api)
        after = await scrape(api)
    assert during["lastcall_turn_ends_pending", ""] == 2
    for samples in (during, after):
        assert turns_by_end(samples) == {}
        assert samples["lastcall_turns_accepted_total", "origin=new"] == 0
        assert samples["lastcall_turn_ends_not_stored_total", ""] == 0
        assert samples["lastcall_turns_without_terminal_event_total", ""] == 0
        assert samples["lastcall_turn_duration_seconds_count", "outcome=failed"] == 0


async def test_refused_requests_are_counted_by_code() -> None:
    async with open_api(streams_max=1) as api:
        for _ in range(2):
            (await api.call("GET", "/sessions/none")).problem(404, "session_not_found")
        (await api.call("GET", "/nowhere")).problem(404, "not_found")
        told = await scrape(api)
    assert told["lastcall_refusals_total", "code=session_not_found"] == 2
    assert told["lastcall_refusals_total", "code=not_found"] == 1


async def test_the_metrics_are_told_where_all_room_for_answers_is_taken() -> None:
    async with open_api() as api:
        for number in range(200):
            api.service.gauges.metrics.add(families.REFUSALS, f"a_code_that_makes_the_answer_large_{number}")
        held, more = held_bytes_of(api.app), 2 * api.service.settings.held_bytes_max
        held.bytes += more
        reply = await api.call("GET", "/metrics")
        assert (reply.status, len(reply.body) > SMALL_BYTES) == (200, True)
        assert held.bytes == more, "the answer counted while it was sent"


@pytest.mark.parametrize(
    ("key", "status"), [("monitor", 200), ("root", 200), ("reader", 403), ("plain", 403), ("wrong", 401), (None, 401)]
)
async def test_a_key_may_read_metrics_if_it_says_so_or_administers(key: str | None, status: int) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {KEYS.get(key, 'wrong-key-0123456789')}"}
    async with open_api(api_keys=NAMED, model_url="scripted:") as api:
        for method in ("GET", "HEAD"):
            assert (await api.call(method, "/metrics", headers=headers)).status == status
        if key == "monitor":
            (await api.call("GET", "/sessions", headers=headers)).problem(403, "not_permitted")


async def test_without_keys_this_machine_reads_them_and_no_one_behind_a_proxy() -> None:
    async with open_api() as api:
        assert (await api.call("GET", "/metrics")).status == 200
        far = {"client": ("192.0.2.1", 5000)}
        (await api.call("GET", "/metrics", scope=far)).problem(403, "loopback_only")
        proxied = await api.call("GET", "/metrics", headers={"X-Forwarded-For": "192.0.2.1"})
        proxied.problem(403, "proxied_without_keys")


async def test_the_listener_of_its_own_serves_the_metrics_to_all_and_nothing_else() -> None:
    only = {METRICS_ONLY: True, "client": ("192.0.2.1", 5000)}
    async with open_api(api_keys=NAMED, model_url="scripted:") as api:
        told = await api.call("GET", "/metrics", scope=only)
        assert (told.status, told.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert told.headers["cache-control"] == "no-store"
        head = await api.call("HEAD", "/metrics", scope=only)
        assert (head.status, head.headers["content-type"]) == (200, told.headers["content-type"])
        for path in ("/", "/healthz", "/sessions", "/docs", "/openapi.json", "/nowhere", "/v1/models"):
            assert (await api.call("GET", path, scope=only)).status == 404
        assert (await api.call("POST", "/metrics", {}, scope=only)).status == 405


async def test_on_a_loopback_address_the_listener_of_its_own_serves_no_page_with_a_foreign_name() -> None:
    here = {METRICS_ONLY: True, LOOPBACK_HOST_ONLY: True}
    async with open_api(api_keys=NAMED, model_url="scripted:") as api:
        for host in ("127.0.0.1:9464", "localhost:9464", "[::1]:9464", ""):
            assert (await api.call("GET", "/metrics", scope=here, headers={"Host": host})).status == 200
        rebound = {"Host": "evil.example.com:9464"}
        problem = (await api.call("GET", "/metrics", scope=here, headers=rebound)).problem(403, "loopback_only")
        assert "metrics_bind" in problem["detail"]
        assert (await api.call("GET", "/metrics", scope={METRICS_ONLY: True}, headers=rebound)).status == 200


async def test_the_store_may_hang_and_the_metrics_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_api(store_url=f"sqlite:{tmp_path}/lastcall.db") as api:
        monkeypatch.setattr("service.gauges.COUNT_TIMEOUT_S", 0.05)

        async def hang(**_: object) -> int:
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(api.service.store, "count_sessions", hang)
        with trio.fail_after(60):
            assert (await scrape(api))["lastcall_workers", ""] == 1


@pytest.mark.processes
async def test_promtool_has_no_complaint() -> None:
    program = promtool()
    async with open_api() as api:
        session = await api.new_session()
        await api.call("POST", f"/sessions/{session}/turns", {"input": "a"})
        text = (await api.call("GET", "/metrics")).body
    check = [program, "check", "metrics"]
    done = await trio.run_process(check, stdin=text, capture_stdout=True, capture_stderr=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_a_client_that_cannot_go_on_where_it_stopped_is_a_resume_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_api() as api:
        end_turn = api.service.store.end_turn

        async def lose_events(turn: Any, **rest: Any) -> Any:
            return await end_turn(turn, **rest | {"runs": ()})

        monkeypatch.setattr(api.service.store, "end_turn", lose_events)
        session = await api.new_session()
        turn = await api.call("POST", f"/sessions/{session}/turns", {"input": "a"})
        assert (await scrape(api))["lastcall_resume_gaps_total", ""] == 0
        (await api.call("GET", f"{turn.headers['location']}/events")).problem(410, "events_lost")
        assert (await scrape(api))["lastcall_resume_gaps_total", ""] == 1


async def test_a_stop_counts_its_phases_and_what_it_leaves() -> None:
    async with open_api(model_url="scripted:?tokens=1000&rate=1") as api:
        session = await api.new_session()
        await api.call("POST", f"/sessions/{session}/turns", {"input": "a", "background": True})
        service, metrics = api.service, api.service.gauges.metrics
        service.shutdown.notice("test")
        service.shutdown.hurry()
        with trio.fail_after(30):
            await service.shutdown.reached(Phase.RELEASING)
    service.shutdown.report(tasks_left=2).count(metrics)
    told = samples_of(at_once(exposed(metrics.memory)).decode())
    assert turns_by_end(told) == {"outcome=interrupted,reason=shutdown": 1}
    assert told["lastcall_shutdown_tasks_left_total", ""] == 2
    assert told["lastcall_shutdowns_total", "result=faults"] == 1
    phases = {labels for name, labels in told if name == "lastcall_shutdown_phase_seconds_count"}
    assert {f"phase={name}" for name in ("notice", "draining", "interrupting", "releasing", "total")} <= phases


async def test_a_stream_whose_client_leaves_in_the_drain_was_not_aborted_by_the_stop() -> None:
    metrics, stop = Metrics(), StopState()
    streams = Streams(streams_max=9, heartbeat_interval_s=15, stop=stop, metrics=metrics)
    aborted = []

    def told() -> Mapping[tuple[str, str], float]:
        return samples_of(at_once(exposed(metrics.memory)).decode())

    for phase in (Phase.SERVING, Phase.DRAINING, Phase.INTERRUPTING):
        stop.enter(phase)
        streams.open_stream().close()
        aborted.append(told()["lastcall_shutdown_streams_aborted_total", ""])
    assert aborted == [0, 0, 1]
    assert told()["lastcall_streams_total", "end=aborted,face=native"] == 3


async def test_attempts_at_an_upstream_and_their_repetitions_are_counted(autojump_clock: object) -> None:
    puppet, metrics = Puppet(), Metrics()
    client = RetryingClient(puppet, retries_max=2, metrics=metrics)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin, client)
        for _ in range(2):
            reply = await puppet.next_reply()
            reply.fail(ModelError("rate_limited", "busy", retryable=True))
        reply = await puppet.next_reply()
        reply.say("text")
    told = samples_of(at_once(exposed(metrics.memory)).decode())
    name = puppet.name
    assert told["lastcall_upstream_calls_total", f"result=rate_limited,upstream={name}"] == 2
    assert told["lastcall_upstream_calls_total", f"result=ok,upstream={name}"] == 1
    assert told["lastcall_upstream_retries_total", f"code=rate_limited,upstream={name}"] == 2


async def test_an_upstream_that_is_silent_up_to_a_deadline_has_failed_and_one_whose_caller_leaves_has_not(
    autojump_clock: object,
) -> None:
    model_url = "scripted:?tokens=1&first_token_s=1000"
    async with open_api(model_url=model_url, first_token_timeout_s=20, turn_timeout_s=100) as api:
        session = await api.new_session()
        path = f"/sessions/{session}/turns"
        reply = await api.call("POST", path, {"input": "a"})
        assert reply.json["error"]["code"] == "first_token_timeout"
        reply = await api.call("POST", path, {"input": "a", "background": True})
        await trio.sleep(1)
        await api.call("POST", f"{reply.headers['location']}/cancel")
        told = await scrape(api)
    calls = {labels: value for (name, labels), value in told.items() if name == "lastcall_upstream_calls_total"}
    assert calls == {
        "result=first_token_timeout,upstream=scripted": 1,
        "result=abandoned,upstream=scripted": 1,
    }


async def begin(client: RetryingClient) -> None:
    async with client.stream(ModelRequest(model="m", prompt=())) as stream:
        await stream.receive()
