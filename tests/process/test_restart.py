"""After a stop, the next start finds the store without any setting, and the turns that were interrupted."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.server_process import ROOT, Launch, ServerProcess, open_server, python_command
from tests.kept_log import said_in
from tests.process.lastcall import (
    CAP_S,
    HYPERCORN_1,
    HYPERCORN_4,
    SERVE,
    SSE,
    Host,
    assert_clean,
    open_lastcall,
    wait_gone,
)
from tests.upstreams.raw_server import Connection, delta, finish, open_raw_server

pytestmark = pytest.mark.parallel

LAST_STOP = 'lastcall_last_shutdown_timestamp_seconds{result="clean"}'


def without_settings(host: Host, folder: Path) -> Launch:
    """The launch of this host in this folder; its only setting is a free port."""
    argv = python_command("-m", "service", "serve", "--bind", "127.0.0.1:0") if host is SERVE else host.argv()
    return Launch(argv, env={"PYTHONPATH": str(ROOT)}, workers=host.processes, folder=folder)


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1, HYPERCORN_4], ids=str)
async def test_without_any_settings_sessions_and_the_result_of_the_stop_outlive_the_process(
    tmp_path: Path, host: Host
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    launch = without_settings(host, folder)
    seen: list[Any] = []
    with trio.fail_after(4 * CAP_S):
        for name in ("first", "second"):
            async with open_server(launch, log_path=tmp_path / f"{name}.log") as server:
                await server.wait_logged('"serving"', times=host.processes)
                assert server.log().count(f'"store": "sqlite:{folder}/lastcall.db"') == host.processes
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client:
                    if name == "first":
                        body = {"message": "Hello", "session_id": "kept"}
                        assert (await client.post("/chat", json=body)).text.count("turn.completed") == 1
                    else:
                        while LAST_STOP not in (await client.get("/metrics")).text:  # noqa: ASYNC110  read beside the start
                            await trio.sleep(0.05)
                    seen.append((await client.get("/sessions/kept")).json())
                    seen.append((await client.get("/sessions/kept/messages")).json())
                server.signal_main(signal.SIGTERM)
                gone = await wait_gone(server)
            assert_clean(host, server, gone)
    assert seen[:2] == seen[2:]
    assert (seen[0]["message_count"], seen[0]["idle_timeout_s"]) == (2, 30 * 24 * 3600)
    beside = {f"lastcall.db-{it}" for it in ("owners", "reserve", "shutdowns")}
    left = {it.name for it in folder.iterdir()} - {"lastcall.db", *beside}
    # Where several processes close the store at the same moment, SQLite may take none of them for the last one.
    assert not left or (host.processes > 1 and left <= {"lastcall.db-wal", "lastcall.db-shm"})
    assert {"lastcall.db", *beside} <= {it.name for it in folder.iterdir()}


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_folder_that_cannot_be_written_to_refuses_the_start_in_a_line(tmp_path: Path, host: Host) -> None:
    folder = Path("/sys")  # not even root can make a file there
    server = ServerProcess(without_settings(host, folder), tmp_path / "server.log")
    gone = await wait_gone(server)
    said = said_in(server.log())
    assert len(said) == 1, server.log()
    assert said[0].startswith("The store sqlite:/sys/lastcall.db cannot be opened: ")
    assert said[0].endswith(" (LASTCALL_STORE_URL names another).")
    assert "Traceback" not in server.log()
    assert gone.exit_code == (78 if host is SERVE else 0)  # hypercorn's own master loses the code


async def test_interrupted_turn_keeps_its_partial_reply_and_its_session_takes_the_next_one(tmp_path: Path) -> None:
    prompts: list[Any] = []

    async def reply(connection: Connection) -> None:
        """The first reply never ends, the second one does."""
        prompts.append((await connection.receive_request()).json["messages"])
        await connection.send_head()
        await connection.send_event(delta("Half a" if len(prompts) == 1 else "The rest."))
        if len(prompts) == 1:
            await connection.wait_closed()
        await connection.send_event(finish())
        await connection.end_body()

    async with open_raw_server(reply) as upstream:
        settings: dict[str, Any] = {
            "store_url": f"sqlite:{tmp_path}/lastcall.db",
            "model_url": upstream.url,
            "drain_timeout_s": 0,
        }
        folders = [tmp_path / "first", tmp_path / "second"]
        for folder in folders:
            folder.mkdir()
        async with (
            open_lastcall(SERVE, folders[0], **settings) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client,
        ):
            assert (await client.post("/sessions", json={"id": "s"})).status_code == 201
            async with client.stream("POST", "/sessions/s/turns", json={"input": "Go."}, headers=SSE) as response:
                events = []
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        events.append(json.loads(line.removeprefix("data: ")))
                        if events[-1]["type"] == "turn.delta":
                            server.signal_main(signal.SIGTERM)
            assert_clean(SERVE, server, await wait_gone(server))
        assert (events[-1]["type"], events[-1]["reason"]) == ("turn.interrupted", "shutdown")
        turn = f"/sessions/s/turns/{events[0]['turn_id']}"

        async with (
            open_lastcall(SERVE, folders[1], **settings) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client,
        ):
            record = (await client.get(turn)).json()
            assert (record["state"], record["reason"], record["text"]) == ("interrupted", "shutdown", "Half a")
            replayed = (await client.get(f"{turn}/events")).text
            assert [
                json.loads(line.removeprefix("data: ")) for line in replayed.splitlines() if line.startswith("data: ")
            ] == events
            following = (await client.post("/sessions/s/turns", json={"input": "Go on."})).json()
            assert (following["state"], following["text"]) == ("completed", "The rest.")
            assert following["parent"] == record["id"]
    assert prompts[1] == [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "Half a"},
        {"role": "user", "content": "Go on."},
    ]
