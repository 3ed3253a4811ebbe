"""Every host, every signal: each client that streams gets the end of its turn, and nothing of the server is left."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.plan import Group
from bench.server_process import ServerProcess
from tests.machine import Machine
from tests.process.lastcall import (
    HOSTS,
    HYPERCORN_1,
    HYPERCORN_2,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    chat,
    ends,
    open_under_load,
    reports,
    rude,
    stalled,
    wait_gone,
    well_behaved,
)

SIGNALS: dict[str, Callable[[ServerProcess], float]] = {
    "TERM": lambda server: server.signal_main(signal.SIGTERM),
    "TERM to the group": lambda server: server.signal_group(signal.SIGTERM),
    "INT": lambda server: server.signal_main(signal.SIGINT),
    "INT to the group": lambda server: server.signal_group(signal.SIGINT),
}
RUDE = {group.name: group for group in rude()}


@pytest.mark.parallel
@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("host", HOSTS, ids=str)
async def test_all_streams_end_properly_beside_rude_clients(tmp_path: Path, host: Host, how: str) -> None:
    bounds: dict[str, Any] = {"drain_timeout_s": 0, "release_timeout_s": 2}
    async with open_under_load(host, tmp_path, *well_behaved(), *rude(), **bounds) as (server, load):
        SIGNALS[how](server)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)  # a stop beyond its bounds ends with another exit code
    found = ends(result)
    for group in ("chat", "turn", "queued", "replay", "http2"):
        assert found[group] == {"interrupted"}, found
    assert {client.state for client in result.rude} <= {"closed", "reset", "answered"}


@pytest.mark.parametrize("who", RUDE)
@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_one_rude_client_harms_no_other_client(tmp_path: Path, machine: Machine, host: Host, who: str) -> None:
    groups: tuple[Group, ...] = (chat(count=5), RUDE[who])
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=0, release_timeout_s=1) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    # The other streams do not wait for the client that has to be cut off.
    ended_at = max(s.ended_at or 0 for s in result.streams if s.group == "chat")
    assert machine.free_s(signalled, ended_at) < 0.5
    assert machine.free_s(signalled, gone.at) < (1.5 if who == "stalled" else 0.5)


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_a_stalled_reader_is_cut_off_after_half_of_the_release(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    groups = (chat(), stalled())
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=0, release_timeout_s=3) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    assert gone.at - signalled >= 1.5
    assert machine.free_s(signalled, gone.at) < 2.5


@pytest.mark.parallel
@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_the_report_says_what_the_clients_saw(tmp_path: Path, host: Host) -> None:
    groups = (chat("chat", 7), chat("finishing", 4, "rate=20 tokens=60"), stalled())
    bounds: dict[str, Any] = {"drain_timeout_s": 8, "release_timeout_s": 2, "reply_bytes_max": 4 << 20}
    async with open_under_load(host, tmp_path, *groups, **bounds) as (server, load):
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    assert ends(result)["finishing"] == {"completed"}

    def total(field: str) -> int:
        return sum(report[field] for report in reports(server))

    assert total("turns_interrupted") == 8
    assert total("turns_finished") == 4
    assert total("streams_ended") == 11
    assert total("streams_aborted") == 1
    assert total("connections_aborted") == 1
    assert total("clients_closed") == host.processes
    assert all(report["reason"] for report in reports(server))


@pytest.mark.parametrize("host", HOSTS, ids=str)
async def test_a_server_without_work_is_gone_at_once(tmp_path: Path, machine: Machine, host: Host) -> None:
    """The drain could take 30 s; without work it takes no time."""
    async with open_under_load(host, tmp_path, drain_timeout_s=30) as (server, _):
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(host, server, gone)
    assert machine.free_s(signalled, gone.at) < 1


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_2], ids=str)
async def test_turns_that_fit_into_the_drain_are_completed(tmp_path: Path, machine: Machine, host: Host) -> None:
    load_of_short_turns = chat(count=10, message="rate=20 tokens=20")
    async with open_under_load(host, tmp_path, load_of_short_turns, drain_timeout_s=10) as (server, load):
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert ends(result) == {"chat": {"completed"}}
    assert {stream.tokens for stream in result.streams} == {20}
    ended_at = max(stream.ended_at or 0 for stream in result.streams)
    assert machine.free_s(ended_at, gone.at) < 1
