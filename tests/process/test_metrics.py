"""The metrics of real servers: every count of a known load is exact, and no sum falls, whatever becomes of a worker."""

import os
import signal
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from bench.server_process import ServerProcess, python_command
from tests.kept_log import lines_of
from tests.process.clients import Stream, all_begun, new_session, open_client, owner_of, wait_until
from tests.process.lastcall import CAP_S, CONFIGURED_4, SERVE, Host, assert_log_is_clean, open_lastcall, wait_gone
from tests.telemetry.scrape import Samples, fallen, samples_of, turns_by_end

pytestmark = pytest.mark.parallel

TOKENS = 9
QUICK = f"scripted:?tokens={TOKENS}&rate=0&first_token_s=0"
SLOW = "scripted:?tokens=100000&rate=5&first_token_s=0"
TURNS = 20
SERVE_4 = python_command("-m", "service", "serve", "--workers", "4")


async def scrape(client: httpx.AsyncClient, path: str = "/metrics") -> Samples:
    reply = await client.get(path)
    assert reply.status_code == 200, reply.text
    return samples_of(reply.text)


async def scrape_often(client: httpx.AsyncClient, scrapes: list[Samples]) -> None:
    """Scrape until cancelled, after the scrapes that are there. No count may fall from one scrape to the next one."""
    while True:
        told = await scrape(client)
        assert fallen(scrapes[-1], told) == []
        scrapes.append(told)
        await trio.sleep(0.1)


@pytest.mark.parametrize(("host", "argv"), [(SERVE, None), (CONFIGURED_4, SERVE_4)], ids=["one", "four"])
async def test_every_count_of_a_known_load_is_exact(host: Host, argv: list[str] | None, tmp_path: Path) -> None:
    async with (
        open_lastcall(host, tmp_path, argv=argv, model_url=QUICK, metrics_bind="127.0.0.1:0") as server,
        open_client(server) as [client],
    ):
        before = await scrape(client)
        streams = [Stream() for _ in range(TURNS)]
        async with trio.open_nursery() as nursery:
            for number, stream in enumerate(streams):
                body = {"session_id": f"s{number}", "message": "go"}
                nursery.start_soon(stream.run, client, "POST", "/chat", body)
        await wait_until(partial(has, client, "lastcall_sessions", "state=idle", TURNS))
        # Each is counted a moment after a client has seen it.
        await wait_until(partial(has, client, "lastcall_streams_total", "end=ended,face=native", TURNS))
        await wait_until(partial(has, client, "lastcall_upstream_calls_total", "result=ok,upstream=scripted", TURNS))
        after = await scrape(client)
        [alone] = {line["bind"] for line in lines_of(server.log(), "metrics are served")}
        told = await scrape(client, f"http://{alone}/metrics")
        assert (await client.get(f"http://{alone}/sessions")).status_code == 404
        await expect_one_answer_a_connection(alone)
        server.signal_main(signal.SIGTERM)
        assert (await wait_gone(server)).exit_code == 0
    assert turns_by_end(told) == turns_by_end(after)
    assert {stream.end[0] for stream in streams} == {"turn.completed"}
    assert turns_by_end(before) == {}
    assert turns_by_end(after) == {"outcome=completed,reason=stop": TURNS}
    of_upstream, of_model = "upstream=scripted", "model=bench,upstream=scripted"
    assert after["lastcall_turns_accepted_total", "origin=new"] == TURNS
    assert after["lastcall_turn_first_token_seconds_count", of_upstream] == TURNS
    assert after["lastcall_turn_token_gap_seconds_count", of_upstream] == TURNS * (TOKENS - 1)
    assert after["lastcall_turn_duration_seconds_count", "outcome=completed"] == TURNS
    assert after["lastcall_output_tokens_total", of_model] == TURNS * TOKENS
    assert after["lastcall_streams_total", "end=ended,face=native"] == TURNS
    assert after["lastcall_upstream_calls_total", "result=ok,upstream=scripted"] == TURNS
    assert after["lastcall_streams", "face=native"] == 0
    assert after["lastcall_workers", ""] == host.processes
    assert fallen(before, after) == []
    assert_log_is_clean(server)


async def expect_one_answer_a_connection(address: str) -> None:
    """Expect that no client keeps its connection to the listener of the metrics, whatever it asks for."""
    host, _, port = address.rpartition(":")
    for asked in ("HEAD /nowhere", "GET /metrics", "POST /metrics", "GET http://[/"):
        request = f"{asked} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n".encode()
        with trio.fail_after(CAP_S):
            async with await trio.open_tcp_stream(host, int(port)) as connection:
                await connection.send_all(request)
                answer = b"".join([piece async for piece in connection])
        assert b"\r\nconnection: close\r\n" in answer.lower()
    foreign = {"Host": "evil.example.com"}
    async with httpx.AsyncClient(timeout=CAP_S) as page:
        assert (await page.get(f"http://{address}/metrics", headers=foreign)).json()["code"] == "loopback_only"


async def has(client: httpx.AsyncClient, name: str, labels: str, value: float) -> bool:
    return (await scrape(client)).get((name, labels)) == value


async def test_no_sum_falls_when_a_worker_is_killed_or_all_are_replaced(tmp_path: Path) -> None:
    async with (
        open_lastcall(CONFIGURED_4, tmp_path, model_url=SLOW) as server,
        open_client(server) as [client],
    ):
        streams = [Stream() for _ in range(TURNS)]
        async with trio.open_nursery() as nursery:
            for number, stream in enumerate(streams):
                session = await new_session(client, f"s{number}")
                nursery.start_soon(run_until_cut, stream, client, f"{session}/turns")
            with trio.fail_after(CAP_S):
                await all_begun(streams)
            await wait_until(partial(has, client, "lastcall_turns", "state=running", TURNS))
            during = await scrape(client)
            scrapes = [during]
            nursery.start_soon(scrape_often, client, scrapes)
            victim = owner_of(tmp_path / "lastcall.db", "/sessions/s0")
            its = sum(owner_of(tmp_path / "lastcall.db", f"/sessions/s{number}") == victim for number in range(TURNS))
            os.kill(victim, signal.SIGKILL)
            crashed = "outcome=interrupted,reason=crash"
            await wait_until(partial(has, client, "lastcall_turns_total", crashed, its))
            await wait_until(partial(has, client, "lastcall_workers", "", 4))
            await reload(server)
            shut_down = "outcome=interrupted,reason=shutdown"
            await wait_until(partial(has, client, "lastcall_turns_total", shut_down, TURNS - its))
            await wait_until(partial(has, client, "lastcall_shutdowns_total", "result=clean", 4))
            await wait_until(partial(has, client, "lastcall_workers", "", 4))
            nursery.cancel_scope.cancel()
        after = await scrape(client)
        server.signal_main(signal.SIGTERM)
        assert (await wait_gone(server)).exit_code == 0
    assert during["lastcall_streams", "face=native"] == TURNS
    assert during["lastcall_turns_accepted_total", "origin=new"] == TURNS
    assert len(scrapes) > 3
    assert fallen(scrapes[-1], after) == []
    assert turns_by_end(after) == {crashed: its, shut_down: TURNS - its}
    assert after["lastcall_turns_accepted_total", "origin=new"] == TURNS
    assert [after["lastcall_turns", f"state={state}"] for state in ("running", "queued")] == [0, 0]
    assert after["lastcall_streams", "face=native"] == 0
    for name in ("turns_without_terminal_event", "turn_ends_not_stored", "shutdown_tasks_left", "turns_crashed"):
        assert after[f"lastcall_{name}_total", ""] == 0


async def run_until_cut(stream: Stream, client: httpx.AsyncClient, path: str) -> None:
    """Follow a new turn to its end, or until its worker is killed."""
    try:
        await stream.run(client, "POST", path, {"input": "go"})
    except httpx.TransportError:
        pass


async def reload(server: ServerProcess) -> None:
    server.signal_main(signal.SIGHUP)
    with trio.fail_after(4 * CAP_S):
        await server.wait_logged("reloaded: 4 new workers serve")
        await server.wait_logged('"shutdown report"', times=4)
