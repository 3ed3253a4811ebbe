"""Parts of the process itself hang or break, such as a thread or the store's disk: every stream still gets its end."""

import signal
from pathlib import Path

import pytest
import trio

from tests.hosting.hosts import command
from tests.machine import Machine
from tests.process.clients import Stream, new_session, open_client
from tests.process.lastcall import (
    CAP_S,
    CONFIGURED_2,
    HYPERCORN_1,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    ends,
    open_under_load,
    reports,
    wait_gone,
    well_behaved,
)

BOUNDS = {"drain_timeout_s": 0, "cleanup_timeout_s": 1, "release_timeout_s": 1}
TOTAL_S = 3
"""The bound of a stop with these settings."""
LATER_S = 20
"""A bound of the watchdog that a stop does not reach whose phases have the bounds above, whatever else runs."""


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_a_thread_that_never_returns_is_left_behind(tmp_path: Path, machine: Machine, host: Host) -> None:
    argv = command(str(host), broken="with_a_stuck_thread")
    async with open_under_load(host, tmp_path, *well_behaved(), argv=argv, drain_timeout_s=0) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    assert machine.free_s(signalled, gone.at) < 1


@pytest.mark.parametrize("host", [SERVE, CONFIGURED_2], ids=str)
async def test_a_thread_that_the_tree_waits_for_costs_the_total(tmp_path: Path, machine: Machine, host: Host) -> None:
    argv = command(str(host), broken="waiting_for_a_stuck_thread")
    async with open_under_load(host, tmp_path, *well_behaved(), argv=argv, **BOUNDS) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert set.union(*ends(result).values()) == {"interrupted"}
    assert machine.free_s(signalled, max(stream.ended_at or 0 for stream in result.streams)) < 1
    assert gone.exit_code == 70
    assert machine.free_s(signalled, gone.at) < TOTAL_S
    assert "waiting_for_a_stuck_thread (apps.py" in server.log()


@pytest.mark.parametrize("host", [SERVE, CONFIGURED_2], ids=str)
async def test_a_disk_that_hangs_costs_the_bounds_of_the_phases_and_is_a_fault(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    """When the stop comes, no commit returns any more. So no end can be stored, and each terminal event says so."""
    trigger, stream = tmp_path / "hang", Stream()
    argv = command(str(host), broken="on_a_hanging_disk")
    settings = {"store_url": f"sqlite:{tmp_path}/lastcall.db", "HANG": trigger, "checkpoint_interval_s": 0.1}
    settings |= {**BOUNDS, "shutdown_timeout_s": LATER_S}
    async with (
        open_under_load(host, tmp_path, *well_behaved(), argv=argv, **settings) as (server, load),
        open_client(server) as [client],
        trio.open_nursery() as nursery,
    ):
        session = await new_session(client, "s")
        nursery.start_soon(stream.run, client, "POST", f"{session}/turns", {"input": "rate=20"})
        await stream.begun.wait()
        trigger.touch()
        with trio.fail_after(CAP_S):
            await server.wait_logged("the disk hangs")  # each other process waits for the lock of this process
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert set.union(*ends(result).values()) == {"interrupted"}
    assert stream.end == ("turn.interrupted", "shutdown")
    assert stream.events[-1]["stored"] is False
    assert gone.exit_code == 75
    assert machine.free_s(signalled, gone.at) < TOTAL_S
    closing = "closing the store took longer than release_timeout_s"
    for report in reports(server):
        if turns := report["turns_interrupted"]:
            assert report["faults"] == [closing, f"the end of {turns} turns is not in the store"]
        else:  # a worker to which no client has come may have nothing that its disk is to keep
            assert report["faults"] in ([], [closing])


@pytest.mark.parametrize("host", [SERVE, CONFIGURED_2], ids=str)
async def test_listeners_that_do_not_close_are_a_fault_and_hold_up_no_client(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    argv = command(str(host), broken="with_listeners_that_do_not_close")
    async with open_under_load(host, tmp_path, *well_behaved(), argv=argv, drain_timeout_s=0) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert gone.exit_code == 75
    assert machine.free_s(signalled, gone.at) < 1
    for report in reports(server):
        assert report["faults"] == ["closing the listeners: RuntimeError('they are stuck')"]
        assert report["connections_aborted"] == 0
