"""Every signal that tells a server to stop, and every signal that may follow it."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.server_process import ServerFailedError
from tests.machine import Machine
from tests.process.lastcall import (
    CAP_S,
    HYPERCORN_1,
    HYPERCORN_2,
    HYPERCORN_4,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    assert_log_is_clean,
    chat,
    ends,
    open_under_load,
    outcome_of,
    prober,
    reports,
    rude,
    wait_gone,
    well_behaved,
)


@pytest.mark.parallel
@pytest.mark.parametrize("host", [HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_the_masters_sudden_death_stops_its_workers_properly(tmp_path: Path, host: Host) -> None:
    bounds: dict[str, Any] = {"drain_timeout_s": 0, "release_timeout_s": 2}
    async with open_under_load(host, tmp_path, *well_behaved(), *rude(), **bounds) as (server, load):
        server.signal_main(signal.SIGKILL)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_log_is_clean(server)
    assert gone.exit_code == -signal.SIGKILL
    assert gone.strays == ()
    assert [report["faults"] for report in reports(server)] == [[]] * host.processes


@pytest.mark.parallel
@pytest.mark.parametrize("host", [HYPERCORN_2, HYPERCORN_4], ids=str)
async def test_a_signal_to_one_worker_ends_its_streams_properly(tmp_path: Path, host: Host) -> None:
    async with open_under_load(host, tmp_path, chat(count=20), drain_timeout_s=0) as (server, load):
        os.kill(server.workers()[0], signal.SIGTERM)
        with trio.fail_after(CAP_S):
            await server.wait_logged("shutdown report")
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_log_is_clean(server)


@pytest.mark.parallel
@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_more_signals_during_the_drain_change_nothing(tmp_path: Path, host: Host) -> None:
    short_turns = chat(count=6, message="rate=20 tokens=80")
    async with open_under_load(host, tmp_path, short_turns, drain_timeout_s=CAP_S) as (server, load):
        server.signal_main(signal.SIGTERM)
        for _ in range(5):
            await trio.sleep(0.1)
            server.signal_group(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert ends(result) == {"chat": {"completed"}}


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_a_second_ctrl_c_skips_the_drain(tmp_path: Path, machine: Machine, host: Host) -> None:
    """Send the signal as a terminal does: to the whole group."""
    async with open_under_load(host, tmp_path, chat(count=6), drain_timeout_s=60) as (server, load):
        server.signal_group(signal.SIGINT)
        await trio.sleep(0.7)
        assert server.gone is None, "the first Ctrl+C counted as two"
        second = server.signal_group(signal.SIGINT)
        with trio.move_on_after(1.5):
            await server.wait_gone()
        with suppress(ServerFailedError):  # it has ended: usually the second one is enough
            server.signal_group(signal.SIGINT)  # the second one may be seen right after the first, which was late
        gone = await wait_gone(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    assert machine.free_s(second, gone.at) < 1


@pytest.mark.parallel
async def test_a_worker_that_reaches_max_requests_ends_its_streams_properly(tmp_path: Path) -> None:
    argv = [*HYPERCORN_1.argv(), "--max-requests", "20"]
    groups = (chat(count=3), prober("/healthz", "GET"))
    async with open_under_load(HYPERCORN_1, tmp_path, *groups, argv=argv, drain_timeout_s=0) as (server, load):
        with trio.fail_after(CAP_S):
            await server.wait_logged("Running on ", times=2)  # hypercorn replaces a worker that ends with 0
        assert reports(server)[0]["reason"] == "max requests"
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_log_is_clean(server)


@pytest.mark.parametrize("host", [HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_during_a_reload_no_connection_is_reset(tmp_path: Path, host: Host) -> None:
    groups = (chat(count=6), prober("/healthz", "GET"))
    # A hundred connections a second wait for the next worker: on a busy machine more than hypercorn's backlog of 100.
    argv = [*host.argv(), "--backlog", "1024"]
    async with open_under_load(host, tmp_path, *groups, argv=argv, drain_timeout_s=0.5) as (server, load):
        before = set(server.workers())
        reloaded = server.signal_main(signal.SIGHUP)
        with trio.fail_after(CAP_S):
            await server.wait_logged("Running on ", times=2 * host.processes)
        await trio.sleep(0.3)
        assert before.isdisjoint(server.workers())
        stopped = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_log_is_clean(server)
    assert gone.exit_code == 0
    during = [p for p in result.probes if reloaded < p.at < stopped - 0.1]
    assert {outcome_of(p) for p in during} - {"sent late"} == {"answered"}, during
    assert max(p.waited_s for p in during) < CAP_S
