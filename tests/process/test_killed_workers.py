"""Workers die, one or one after another: with our configuration of hypercorn's master only their own clients see it."""

import os
import signal
from pathlib import Path

import pytest
import trio

from bench.peers import open_load
from bench.plan import Plan
from bench.server_process import ServerProcess
from bench.wire import StreamEnd
from service.hosting.master import REPLACEMENTS_MAX
from tests.process.clients import owner_of
from tests.process.lastcall import (
    CAP_S,
    CONFIGURED_4,
    assert_all_ended_properly,
    assert_log_is_clean,
    ends,
    open_under_load,
    reports,
    turn,
    wait_gone,
)
from tests.process.test_workers import halt

pytestmark = pytest.mark.parallel


def owners(folder: Path, name: str, count: int) -> set[int]:
    """The workers that own this group's sessions: they also have the streams' connections and the turns."""
    return {owner_of(folder / "lastcall.db", f"/sessions/{name}{number}") for number in range(count)}


async def serving(server: ServerProcess, times: int) -> None:
    """Wait until, since the start, so many workers have logged that they serve."""
    with trio.fail_after(CAP_S):
        await server.wait_logged('"serving"', times=times)


async def test_a_killed_worker_takes_only_its_own_streams_along(tmp_path: Path) -> None:
    async with open_under_load(
        CONFIGURED_4,
        tmp_path,
        turn("first", 1),
        drain_timeout_s=0,
        checkpoint_interval_s=60,  # a halted worker must keep no lock
    ) as (server, first):
        [victim] = owners(tmp_path, "first", 1)
        await halt(victim, tmp_path)  # so that the next streams are on other workers
        async with open_load(Plan(port=server.port, groups=(turn("others", 12),))) as load:
            with trio.fail_after(CAP_S):
                await load.wait_ready()
            others = owners(tmp_path, "others", 12)
            assert victim not in others
            os.kill(victim, signal.SIGKILL)
            await serving(server, 5)
            assert len(server.workers()) == 4
            assert others < set(server.workers())
            server.signal_main(signal.SIGTERM)
            gone = await wait_gone(server)
            result = await load.stop()
        [cut] = (await first.stop()).streams
    assert cut.end in (StreamEnd.TRUNCATED, StreamEnd.RESET)
    assert_all_ended_properly(result)
    assert ends(result) == {"others": {"interrupted"}}
    assert gone.exit_code == 0
    assert_log_is_clean(server)
    assert len(reports(server)) == 4
    assert sum(report["turns_interrupted"] for report in reports(server)) == 12


async def test_workers_that_die_again_and_again_end_the_service_properly(tmp_path: Path) -> None:
    """After so many deaths another start would not help. Each client of a live worker gets the end of its stream."""
    async with open_under_load(CONFIGURED_4, tmp_path, turn(count=2), drain_timeout_s=0) as (server, load):
        busy = owners(tmp_path, "turn", 2)
        for number in range(REPLACEMENTS_MAX + 1):
            await serving(server, 4 + number)
            os.kill(min(set(server.workers()) - busy), signal.SIGKILL)
        gone = await wait_gone(server)
        result = await load.stop()
    assert gone.exit_code == 128 + signal.SIGKILL
    assert "giving up" in server.log()
    assert_all_ended_properly(result)
    assert ends(result) == {"turn": {"interrupted"}}
    assert_log_is_clean(server)
    assert len(reports(server)) == 3
