"""A reload of our master under load: no client is refused, reset or kept waiting, and streams end by their events."""

import json
import signal
import ssl
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trustme

from bench.plan import LoadResult
from bench.server_process import Gone, ServerProcess, python_command
from tests.machine import Machine
from tests.process.lastcall import (
    CAP_S,
    CONFIGURED_2,
    assert_all_ended_properly,
    assert_log_is_clean,
    open_lastcall,
    open_under_load,
    prober,
    reports,
    turn,
    wait_gone,
)

RELOADS = 2
WAIT_MAX_S = 0.25
"""A promise: the longest wait of a new request during a reload."""
SILENT_MAX_S = 2
"""Bound on the wait of the requests that were on their way when the clients stopped. A reload takes longer."""
SERVE_2 = python_command("-m", "service", "serve", "--workers", "2")


@dataclass
class Reloaded:
    """A server under load that was reloaded several times, and then stopped."""

    server: ServerProcess
    gone: Gone
    result: LoadResult
    first_at: float
    stopped_at: float


async def reload(server: ServerProcess, *, times: int) -> None:
    """Reload, and wait until so many reloads are complete in all, and the old workers have ended."""
    server.signal_main(signal.SIGHUP)
    with trio.fail_after(4 * CAP_S):
        await server.wait_logged("reloaded: 2 new workers serve", times=times)
        await server.wait_logged('"shutdown report"', times=2 * times)
        await server.wait_workers(2)


async def stop_cleanly(server: ServerProcess) -> None:
    server.signal_main(signal.SIGTERM)
    gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)


async def reload_under_load(folder: Path, argv: list[str]) -> Reloaded:
    """Reload a server with open streams and continuous requests on new connections; each stream outlives a reload."""
    probers = [prober(), prober("/readyz", "GET")]
    probers = [msgspec.structs.replace(it, interval_s=0.02) for it in probers]
    async with open_under_load(CONFIGURED_2, folder, turn(count=4), *probers, argv=argv, drain_timeout_s=1) as (
        server,
        load,
    ):
        await trio.sleep(0.2)
        first_at = server.signal_main(0)
        for number in range(RELOADS):
            await reload(server, times=number + 1)
        result = await load.stop()
        stopped_at = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    return Reloaded(server, gone, result, first_at, stopped_at)


@pytest.mark.parallel
@pytest.mark.parametrize("argv", [CONFIGURED_2.argv(), SERVE_2], ids=["configured-2", "serve-2"])
async def test_under_load_reloads_refuse_and_reset_no_client(tmp_path: Path, machine: Machine, argv: list[str]) -> None:
    reloaded = await reload_under_load(tmp_path, argv)
    assert_log_is_clean(reloaded.server)
    assert_all_ended_properly(reloaded.result)
    assert (reloaded.gone.exit_code, reloaded.gone.strays) == (0, ())
    silent = [probe.at for probe in reloaded.result.probes if probe.outcome == "silent"]
    waited_s = [machine.free_s(at, reloaded.stopped_at) for at in silent]
    assert all(it < SILENT_MAX_S for it in waited_s), "only the last ones are not answered yet"
    assert {(p.group, p.outcome, p.status) for p in reloaded.result.probes if p.outcome != "silent"} == {
        ("/sessions", "answered", 201),
        ("/readyz", "answered", 200),
    }
    assert len(reports(reloaded.server)) == 2 * RELOADS + 2
    assert all(it["faults"] == [] and it["connections_aborted"] == 0 for it in reports(reloaded.server)[: 2 * RELOADS])


async def test_during_a_reload_no_request_waits_long(tmp_path: Path, machine: Machine) -> None:
    reloaded = await reload_under_load(tmp_path, CONFIGURED_2.argv())
    answered = [p for p in reloaded.result.probes if p.outcome == "answered"]
    waits = sorted(machine.free_s(p.at, p.answered_at or p.at) - p.late_s for p in answered)
    p99 = waits[len(waits) * 99 // 100]
    sys.stderr.write(
        f"n={len(waits)} median={1000 * statistics.median(waits):.1f} ms p99={1000 * p99:.1f} ms "
        f"max={1000 * waits[-1]:.1f} ms\n"
    )
    assert waits[-1] < WAIT_MAX_S


@asynccontextmanager
async def asking_again_and_again(client: httpx.AsyncClient) -> AsyncIterator[list[int]]:
    """Ask for new sessions, one after the other. Yields the statuses of the answers; a broken connection raises."""
    statuses: list[int] = []
    over = False

    async def ask() -> None:
        while not over:
            statuses.append((await client.post("/sessions", json={})).status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        yield statuses
        over = True


@pytest.mark.parallel
async def test_reloads_refuse_nothing_on_connections_that_are_kept_and_on_tls(tmp_path: Path) -> None:
    """A kept connection to an old worker gets its answer and is closed; a handshake that has begun is completed."""
    authority = trustme.CA()
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    tls: dict[str, Any] = {"tls_certfile": certificate, "tls_keyfile": key}
    async with open_lastcall(CONFIGURED_2, tmp_path, drain_timeout_s=1, model_url="scripted:", **tls) as server:
        url = f"https://127.0.0.1:{server.port}"
        async with (
            httpx.AsyncClient(base_url=url, verify=context, timeout=CAP_S) as kept,
            httpx.AsyncClient(
                base_url=url, verify=context, timeout=CAP_S, limits=httpx.Limits(max_keepalive_connections=0)
            ) as anew,
            asking_again_and_again(kept) as on_kept,
            asking_again_and_again(anew) as on_new,
        ):
            for number in range(RELOADS):
                await reload(server, times=number + 1)
            assert len(on_kept) > 10
            assert len(on_new) > 5
            assert set(on_kept) == set(on_new) == {201}
        await stop_cleanly(server)


@pytest.mark.parallel
async def test_a_new_turn_of_a_session_whose_turn_runs_in_an_old_worker_is_accepted_by_a_new_one(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"drain_timeout_s": 60, "model_url": "scripted:?tokens=500&rate=10"}
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=CAP_S, headers={"Connection": "close"}) as anew,
            httpx.AsyncClient(base_url=url, timeout=CAP_S) as kept,
        ):
            earlier: dict[str, str] = {}
            answers: dict[str, httpx.Response] = {}

            async def ask(client: httpx.AsyncClient, session: str, on_conflict: str) -> httpx.Response:
                body = {"input": "x", "on_conflict": on_conflict, "background": True, "max_output_tokens": 2}
                answers[session] = await client.post(f"/sessions/{session}/turns", json=body)
                return answers[session]

            for session in ("queued", "kept", "superseded", "refused"):
                assert (await kept.post("/sessions", json={"id": session})).status_code == 201
                started = await kept.post(f"/sessions/{session}/turns", json={"input": "x", "background": True})
                earlier[session] = started.headers["location"]
            server.signal_main(signal.SIGHUP)
            await server.wait_logged('"shutdown report"')  # of the old worker without a turn
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, kept, "kept", "queue")
                nursery.start_soon(ask, anew, "queued", "queue")
                assert (await ask(anew, "refused", "reject")).json()["code"] == "turn_in_progress"
                assert (await ask(anew, "superseded", "supersede")).status_code == 202
                for session in ("kept", "queued", "refused"):
                    assert (await anew.post(f"{earlier[session]}/cancel")).status_code == 200
            assert {session: answer.status_code for session, answer in answers.items()} == {
                "queued": 202,
                "kept": 202,
                "superseded": 202,
                "refused": 409,
            }
            superseded = (await anew.get(earlier["superseded"])).json()
            assert (superseded["state"], superseded["reason"]) == ("cancelled", "superseded")
            for session in ("queued", "kept", "superseded"):
                events = await anew.get(answers[session].headers["location"] + "/events")
                assert '"type":"turn.completed"' in events.text
            await server.wait_logged('"shutdown report"', times=2)
        await stop_cleanly(server)


@pytest.mark.parallel
async def test_a_stream_that_an_old_worker_begins_after_the_reload_is_passed_on_to_its_end(tmp_path: Path) -> None:
    """The old worker has no turn, so nothing but the upload holds its drain; the turn runs in a new worker."""
    settings: dict[str, Any] = {
        "drain_timeout_s": 20,
        "cleanup_timeout_s": 0.5,
        "release_timeout_s": 20,
        "model_url": "scripted:?tokens=20&rate=10",
    }
    body = b'{"message": "x"}'
    head = (
        f"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as client:
            await client.send_all(head.encode() + b"\r\n" + body[:-1])
            server.signal_main(signal.SIGHUP)
            await server.wait_logged('"shutdown report"')  # of the other old worker, which has no client
            await client.send_all(body[-1:])
            answer = b"".join([piece async for piece in client])
        assert b'"type":"turn.completed"' in answer
        assert answer.endswith(b"0\r\n\r\n")
        await server.wait_logged('"shutdown report"', times=2)
        await stop_cleanly(server)


@pytest.mark.parallel
async def test_a_turn_goes_on_in_an_old_worker_while_new_ones_answer_for_it(tmp_path: Path) -> None:
    """The turn belongs to the old worker; requests about the turn reach the new ones, which pass them on."""
    settings: dict[str, Any] = {"drain_timeout_s": 20, "model_url": "scripted:?tokens=100&rate=20"}
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, timeout=CAP_S, headers={"Connection": "close"}) as client:
            assert (await client.post("/sessions", json={"id": "held"})).status_code == 201
            started = await client.post("/sessions/held/turns", json={"input": "go", "background": True})
            turn_path = started.headers["location"]
            server.signal_main(signal.SIGHUP)
            await server.wait_logged('"shutdown report"')  # of the old worker without a turn
            events = await client.get(f"{turn_path}/events", headers={"Accept": "text/event-stream"})
            kinds = [json.loads(line[6:])["type"] for line in events.text.splitlines() if line.startswith("data: ")]
            assert kinds[-1] == "turn.completed"
            ended = await client.post("/sessions/held/turns", json={"input": "again", "background": True})
            assert ended.status_code == 202
        await stop_cleanly(server)
