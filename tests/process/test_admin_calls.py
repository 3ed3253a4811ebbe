"""The calls for operators on a real server with two workers: each shows the tree of the other, and one stops both."""

import json
import os
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from service.api.operator.tree import VIEWERS_MAX
from service.telemetry.shutdown_history import read_history
from tests.process.clients import wait_until
from tests.process.lastcall import CAP_S, CONFIGURED_2, SERVE, open_lastcall, wait_gone

pytestmark = pytest.mark.parallel


async def test_two_workers_show_each_other_and_a_drain_stops_both(tmp_path: Path) -> None:
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, drain_timeout_s=5) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client,
    ):
        workers: list[dict[str, Any]] = []
        while len(workers) < 2 or {it["status"] for it in workers} != {"serving"}:
            workers = (await client.get("/admin/tree")).json()["workers"]
            await trio.sleep(0.05)  # the other one needs the processor for its start
        pids = {worker["pid"] for worker in workers}
        for pid in pids:
            snapshot = (await client.get(f"/admin/tree?worker={pid}")).json()
            assert snapshot["worker"]["pid"] == pid
            assert snapshot["nodes"][0]["name"] == f"process {pid}"
            etag = (await client.get(f"/admin/tree?worker={pid}")).headers["etag"]
            assert etag.strip('"').startswith(snapshot["id"].partition("-")[0])
        assert (await client.get("/admin/tree?worker=1")).json()["code"] == "worker_not_found"
        ends = {}
        async with trio.open_nursery() as nursery:
            ready = {pid: trio.Event() for pid in pids}

            async def follow(pid: int) -> None:
                async with client.stream("GET", f"/admin/tree/events?worker={pid}") as stream:
                    assert stream.status_code == 200
                    name = ""
                    async for line in stream.aiter_lines():
                        if line.startswith("event: "):
                            name = line.removeprefix("event: ")
                        elif line.startswith("data: ") and name == "snapshot":
                            assert json.loads(line.removeprefix("data: "))["worker"]["pid"] == pid
                            ready[pid].set()
                        elif line.startswith("data: ") and name == "end":
                            ends[pid] = json.loads(line.removeprefix("data: "))["reason"]

            for pid in pids:
                nursery.start_soon(follow, pid)
            for event in ready.values():
                await event.wait()
            answer = await client.post("/admin/drain", json={})
            assert answer.status_code == 202
            assert answer.json()["workers"] == 2
            assert answer.json()["reason"] in ("", "admin drain")
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert ends.keys() == pids
    assert set(ends.values()) <= {"shutdown", "gone"}, "a stream through the other worker may end with that worker"
    reports = [line for line in (tmp_path / "server.log").read_text().splitlines() if "shutdown report" in line]
    assert {json.loads(line)["reason"] for line in reports} == {"admin drain"}
    assert len(reports) == 2
    history = [it.line for it in read_history(tmp_path / "lastcall.db-shutdowns", limit=50)]
    assert {line.of.pid for line in history} == pids
    for line in history:
        assert line.at is not None
        assert line.at > line.of.started_at
        assert line.report is not None
        assert (line.report["reason"], line.exit_code) == ("admin drain", 0)
        assert line.bounds_ms is not None
        assert line.bounds_ms["draining"] == 5000


async def test_a_drain_stops_both_workers_also_where_the_one_that_is_asked_stops_alone(tmp_path: Path) -> None:
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, drain_timeout_s=30, model_url="scripted:?tokens=100000&rate=5") as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client,
    ):
        pid = (await client.get("/admin/tree?nodes=10")).json()["worker"]["pid"]
        assert (await client.post("/sessions", json={"id": "s"})).status_code == 201
        turn = await client.post("/sessions/s/turns", json={"input": "Hi", "background": True})
        assert turn.status_code == 202
        os.kill(pid, signal.SIGTERM)
        with trio.fail_after(CAP_S):
            assert await statuses_by_another(server.port, pid) == {"draining", "serving"}, (
                "no master has told it of this"
            )
        answer = await client.post("/admin/drain", json={})
        assert answer.status_code == 202
        with trio.fail_after(CAP_S):
            await server.wait_logged('"shutdown report"')  # of the other worker, which has no turn
        assert (await client.post(f"{turn.headers['location']}/cancel")).status_code == 200
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    reports = [line for line in (tmp_path / "server.log").read_text().splitlines() if "shutdown report" in line]
    assert sorted(json.loads(line)["reason"] for line in reports) == ["SIGTERM", "admin drain"]


async def test_viewers_that_read_nothing_do_not_keep_others_out(tmp_path: Path) -> None:
    async with open_lastcall(SERVE, tmp_path, unread_timeout_s=1) as server, AsyncExitStack() as viewers:
        for _ in range(VIEWERS_MAX):
            sock = trio.socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await sock.connect(("127.0.0.1", server.port))
            viewer = await viewers.enter_async_context(trio.SocketStream(sock))
            await viewer.send_all(b"GET /admin/tree/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client:
            with trio.fail_after(CAP_S):
                await server.wait_logged("answers were given up")
            await wait_until(partial(has_room, client))


async def statuses_by_another(port: int, pid: int) -> set[str]:
    """The status of all workers, as another worker than this one shows them once it knows that this one stops."""
    while True:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=CAP_S) as client:
            snapshot = (await client.get("/admin/tree?nodes=10")).json()
        workers = {worker["pid"]: worker["status"] for worker in snapshot["workers"]}
        if snapshot["worker"]["pid"] != pid and workers.get(pid) == "draining":
            return set(workers.values())
        await trio.sleep(0.05)  # a worker that starts or stops needs the processor


async def has_room(client: httpx.AsyncClient) -> bool:
    return (await client.head("/admin/tree/events")).status_code == 200
