"""Trouble in the server's surroundings: its output, its model server, its own many starts."""

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.peers import open_load
from bench.plan import Plan
from service.hosting.hypercorn.patches import LOG_INTERVAL_S
from tests.machine import Machine
from tests.process.lastcall import (
    CONFIGURED_2,
    HYPERCORN_1,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    chat,
    ends,
    open_lastcall,
    open_under_load,
    stalled,
    wait_gone,
)

STARTS = int(os.environ.get("LASTCALL_TEST_STARTS", "5"))
"""How often a server is started and stopped; 50 before a release."""


@pytest.mark.parametrize("what", ["full", "closed"])
@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_output_without_a_reader_changes_nothing(tmp_path: Path, machine: Machine, host: Host, what: str) -> None:
    async with open_lastcall(host, tmp_path, stderr_pipe=True, drain_timeout_s=0) as server:
        assert server.stderr_pipe is not None
        message = "rate=20 never heard of by the scripted model, which takes its time with this many words to repeat"
        async with open_load(Plan(port=server.port, groups=(chat(count=4, message=message, ready_at="head"),))) as load:
            await load.wait_ready()
            if what == "full":
                server.stderr_pipe.fill()
            else:
                server.stderr_pipe.close()
            signalled = server.signal_main(signal.SIGTERM)
            gone = await wait_gone(server)
            result = await load.stop()
    assert_all_ended_properly(result)
    assert gone.exit_code == 0
    assert machine.free_s(signalled, gone.at) < 2


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_a_model_server_that_never_answers_is_left_at_once(tmp_path: Path, machine: Machine, host: Host) -> None:
    groups = (chat("mute", 5, "mute=1", ready_at="head"), chat("silent", 5, "rate=20 silent_after=2"))
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=0) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    assert ends(result) == {"mute": {"interrupted"}, "silent": {"interrupted"}}
    assert machine.free_s(signalled, gone.at) < 1


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_a_model_server_that_ignores_the_close_is_left_at_once(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    async with open_under_load(host, tmp_path, chat(count=5, message="rate=50 deaf=1"), drain_timeout_s=0) as (
        server,
        load,
    ):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    assert machine.free_s(signalled, gone.at) < 1


@pytest.mark.parallel
async def test_many_starts_and_stops_under_load_leave_nothing_behind(tmp_path: Path) -> None:
    for number in range(STARTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        bounds: dict[str, Any] = {"drain_timeout_s": 0, "release_timeout_s": 2}
        async with open_under_load(HYPERCORN_1, folder, chat(count=10), stalled(), **bounds) as (server, load):
            await trio.sleep(number % 5 / 50)
            server.signal_group((signal.SIGTERM, signal.SIGINT)[number % 2])
            gone = await wait_gone(server)
            result = await load.stop()
        assert_all_ended_properly(result)
        assert_clean(HYPERCORN_1, server, gone)


@pytest.mark.parallel
@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1, CONFIGURED_2], ids=str)
async def test_a_server_without_descriptors_left_stops_as_ever(tmp_path: Path, host: Host) -> None:
    spare = 10
    async with open_under_load(host, tmp_path, chat(count=3), drain_timeout_s=0.5) as (server, load):
        processes = server.workers() or [server.pid]
        for process in processes:
            most = max(int(it.name) for it in Path(f"/proc/{process}/fd").iterdir()) + 1 + spare  # noqa: ASYNC240
            resource.prlimit(process, resource.RLIMIT_NOFILE, (most, most))
        began_at = time.monotonic()
        idle = [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(len(processes) * 2 * spare)]
        await server.wait_logged("accept returned EMFILE", times=len(processes))
        await trio.sleep(0.5)
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
        for client in idle:
            await client.aclose()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    lines_max = (gone.at - began_at) / LOG_INTERVAL_S + 1
    assert server.log().count("accept returned EMFILE") <= lines_max * len(processes)
