"""A reload of our master as a process: what fails, what is left, and when. Its decisions: ``test_master.py``."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import trio

from bench.server_process import Gone, ServerProcess
from tests.hosting.hosts import open_host

CAP_S = 60
TOLD = "the reload failed, 2 old workers serve on: worker [0-9]+ "
FAULTS = {
    "import": r"could not start \(code 78: ImportError\('no module of that name'\)\)",
    "refuse": r"could not start \(code 78: the store cannot be opened\)",
    "die": r"could not start \(code 137\)",
}


async def stop(server: ServerProcess) -> Gone:
    server.signal_main(signal.SIGTERM)
    with trio.fail_after(CAP_S):
        return await server.wait_gone()


async def reload(server: ServerProcess, logged: str, *, times: int = 1) -> None:
    """Reload, and wait until this has been logged so many times in all."""
    server.signal_main(signal.SIGHUP)
    with trio.fail_after(CAP_S):
        await server.wait_logged(logged, times=times)


async def wait_for_workers(server: ServerProcess, count: int) -> list[int]:
    with trio.fail_after(CAP_S):
        return await server.wait_workers(count)


async def test_a_reload_that_fails_leaves_the_old_workers_serving_and_says_why_in_a_line(tmp_path: Path) -> None:
    fault, config = tmp_path / "fault", tmp_path / "lastcall.toml"
    fault.write_text("")
    config.write_text("streams_max = 5\n")
    settings: dict[str, Any] = {"FAULT": fault, "config_file": config}
    async with open_host(tmp_path, "configured-2", broken="faulty_as_told()", **settings) as server:
        await server.wait_logged('"serving"', times=2)
        before = server.workers()

        async def fail_to_reload(why: str) -> None:
            said = len(re.findall(TOLD, server.log()))
            await reload(server, TOLD + why)
            await wait_for_workers(server, 2)
            assert server.workers() == before
            assert len(re.findall(TOLD, server.log())) == said + 1
            assert "the next start" not in server.log()
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client:
                assert (await client.post("/sessions", json={})).status_code == 201

        for kind, why in FAULTS.items():
            fault.write_text(kind)
            await fail_to_reload(why)
        fault.write_text("")
        config.write_text("streams_max = -5\n")
        await fail_to_reload(r"could not start \(code 78: .*streams_max")
        config.write_text('streams_max = 5\nmetrics_bind = "127.0.0.1:0"\n')
        await fail_to_reload(r"could not start \(code 78: metrics_bind has changed")
        config.write_text("streams_max = 6\n")
        await reload(server, "reloaded: 2 new workers serve, 2 old ones drain")
        after = await wait_for_workers(server, 2)
        assert set(before).isdisjoint(after)
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "Traceback" not in server.log()


async def test_a_stop_during_a_reload_ends_old_and_new_workers(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    async with open_host(tmp_path, "configured-2", broken="slow_to_open_again", SLOW=slow) as server:
        await server.wait_logged('"serving"', times=2)
        slow.touch()
        await reload(server, "opening")
        assert len(server.workers()) == 3
        gone = await stop(server)
    assert gone.exit_code == 0
    assert gone.strays == ()
    assert {code for _, code, _ in gone.exits} == {0}
    assert server.log().count('"shutdown report"') == 3
    assert "Traceback" not in server.log()


async def test_a_reload_of_a_terminal_leaves_the_workers_to_the_master(tmp_path: Path) -> None:
    """A terminal and ``kill -HUP -PGID`` signal all processes; workers that drained at once would refuse clients."""
    async with open_host(tmp_path, "configured-2") as server:
        await server.wait_logged('"serving"', times=2)
        server.signal_group(signal.SIGHUP)
        with trio.fail_after(CAP_S):
            await server.wait_logged("reloaded: 2 new workers serve, 2 old ones drain")
            await server.wait_logged('"shutdown report"', times=2)
        gone = await stop(server)
    assert gone.exit_code == 0
    assert server.log().count('"reason": "the master reloads"') == 2


async def test_workers_that_have_answered_enough_leave_once_others_serve(tmp_path: Path) -> None:
    async with open_host(tmp_path, "configured-2", "--max-requests", "20") as server:
        await server.wait_logged('"serving"', times=2)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client:
            with trio.fail_after(CAP_S):
                while server.log().count('"reason": "max requests"') < 2:  # noqa: ASYNC110
                    assert (await client.get("/readyz", headers={"Connection": "close"})).status_code == 200
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "Traceback" not in server.log()


async def test_new_work_on_a_connection_to_an_old_worker_is_done_by_a_new_one(tmp_path: Path) -> None:
    """The old worker drains for long, because a turn runs there; the connection was opened before the reload."""
    settings: dict[str, Any] = {
        "drain_timeout_s": 30,
        "release_timeout_s": 1,
        "model_url": "scripted:?first_token_s=60",
    }
    async with open_host(tmp_path, "configured-2", **settings) as server:
        await server.wait_logged('"serving"', times=2)
        before = server.workers()
        limits = httpx.Limits(max_connections=1)
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=CAP_S) as kept:
            assert (await kept.post("/sessions", json={"id": "held"})).status_code == 201
            started = await kept.post("/sessions/held/turns", json={"input": "go", "background": True})
            assert started.status_code == 202
            await reload(server, "reloaded: 2 new workers serve, 2 old ones drain")
            await wait_for_workers(server, 3)  # the old worker without a turn has ended
            with trio.fail_after(CAP_S):
                while "connection" not in (answer := await kept.post("/sessions", json={})).headers:
                    assert answer.status_code == 201, answer.text
            assert (answer.status_code, answer.headers["connection"]) == (201, "close"), answer.text
            new = f"/sessions/{answer.json()['id']}"
            assert (await kept.post(f"{new}/turns", json={"input": "go", "background": True})).status_code == 202
            assert (await kept.get("/sessions/held/turns")).json()["data"][0]["state"] == "running"
            [old] = set(before) & set(server.workers())
            os.kill(old, signal.SIGKILL)  # the new ones serve on, and it is not replaced
            await server.wait_logged("ended with code 137, after it was told to end")
            assert len(server.workers()) == 2
        gone = await stop(server)
    assert gone.exit_code == 0
    assert "Traceback" not in server.log()
