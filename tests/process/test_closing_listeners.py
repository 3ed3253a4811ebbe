"""From the notice to the very end every new connection gets a whole answer or an immediate refusal."""

import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
import trio

from bench.plan import LoadResult, ProbeResult, Streams
from tests.process.clients import owner_of
from tests.process.lastcall import (
    CAP_S,
    CONFIGURED_4,
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
    prober,
    turn,
    wait_gone,
)

NOTICE_S = 0.05
"""25 ms for the notice, and 25 ms for differences between the workers of one server."""
SILENT_S = 0.1
USUAL_TIMES = 3
"""An answer after the signal may take this multiple of the longest one before: a busy machine slows everything."""
GATED = (SERVE, HYPERCORN_1, HYPERCORN_2, HYPERCORN_4)


def told(probes: list[ProbeResult], signalled: float) -> str:
    """The probes for the message of a failed test: time, outcome, duration."""
    return "\n".join(
        f"{p.at - signalled:+.3f} {p.outcome} {p.status} after {p.waited_s:.3f}, late {p.late_s:.3f}" for p in probes
    )


def assert_none_was_left_standing(probes: list[ProbeResult], signalled: float) -> None:
    """Check that each probe got a whole answer or a refusal within 100 ms more than ``USUAL_TIMES`` the usual time."""
    usual_s = max(p.waited_s for p in probes if signalled - 0.5 < p.at < signalled - 0.05)
    during = [p for p in probes if p.at > signalled]
    most_s = USUAL_TIMES * usual_s + SILENT_S
    bad = [p for p in during if p.outcome not in ("answered", "refused") or p.waited_s > most_s + p.late_s]
    assert not bad, f"{len(bad)} of {len(during)}, {usual_s:.3f} before the signal:\n{told(bad, signalled)}"


async def stopped_while_probed(
    host: Host, folder: Path, streams: Streams, drain_timeout_s: float
) -> tuple[LoadResult, float]:
    """Probe before, during and after a stop. Returns the clients' observations and the time of the signal."""
    async with open_under_load(host, folder, streams, prober(), drain_timeout_s=drain_timeout_s) as (server, load):
        await trio.sleep(0.5)
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        await trio.sleep(0.1)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    return result, signalled


@pytest.mark.parametrize("host", GATED, ids=str)
async def test_no_new_connection_is_reset_or_silent_while_turns_drain(tmp_path: Path, host: Host) -> None:
    result, signalled = await stopped_while_probed(host, tmp_path, chat(count=20), drain_timeout_s=1)
    assert_none_was_left_standing(result.probes, signalled)
    assert {p.status for p in result.probes if p.at < signalled - 0.5} == {201}
    answered = [p for p in result.probes if p.at > signalled + NOTICE_S and p.outcome == "answered"]
    assert len(answered) > 50
    assert all(p.status == 503 and p.retry_after and p.connection_close for p in answered), told(answered, signalled)
    refused = [p for p in result.probes if p.outcome == "refused"]
    assert refused
    assert all(p.at > signalled + 1 for p in refused), told(refused, signalled)


@pytest.mark.parametrize("host", GATED, ids=str)
async def test_no_new_connection_is_reset_or_silent_when_many_streams_end(tmp_path: Path, host: Host) -> None:
    result, signalled = await stopped_while_probed(host, tmp_path, chat(count=100), drain_timeout_s=0)
    assert_none_was_left_standing(result.probes, signalled)


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_2], ids=str)
async def test_while_the_lame_duck_lasts_everything_works_but_readiness(tmp_path: Path, host: Host) -> None:
    groups = (chat(count=2), prober(), prober("/readyz", "GET"))
    async with open_under_load(host, tmp_path, *groups, lame_duck_timeout_s=1, drain_timeout_s=0) as (server, load):
        await trio.sleep(0.2)
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert ends(result)["chat"] == {"interrupted"}

    def statuses(path: str, since: float, until: float) -> set[int | None]:
        return {p.status for p in result.probes if p.group == path and since < p.at - signalled < until}

    assert statuses("/sessions", NOTICE_S, 0.9) == {201}
    assert statuses("/readyz", -1, -0.1) == {200}
    assert statuses("/readyz", NOTICE_S, 0.9) == {503}


@pytest.mark.parametrize("host", GATED, ids=str)
async def test_reads_go_on_during_the_drain(tmp_path: Path, host: Host) -> None:
    groups = (chat(count=4), prober("/sessions", "GET"))
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=1) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        await wait_gone(server)
        result = await load.stop()
    during = [p.status for p in result.probes if signalled < p.at < signalled + 0.9]
    assert set(during) == {200}
    assert len(during) > 50


@pytest.mark.parametrize("host", [HYPERCORN_2, CONFIGURED_4], ids=str)
async def test_while_one_worker_drains_the_others_take_new_clients_until_all_stop(tmp_path: Path, host: Host) -> None:
    groups = (turn(count=4, message="rate=20"), prober(), prober("/readyz", "GET"))
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=2) as (server, load):
        await trio.sleep(0.5)
        alone_at = time.monotonic()
        os.kill(owner_of(tmp_path / "lastcall.db", "/sessions/turn0"), signal.SIGTERM)
        await trio.sleep(1)
        all_at = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    alone = [p for p in result.probes if alone_at + NOTICE_S < p.at < all_at - NOTICE_S]
    assert len(alone) > 50
    assert {(p.group, p.status) for p in alone} == {("/sessions", 201), ("/readyz", 200)}, told(alone, alone_at)
    probes = [p for p in result.probes if p.group == "/sessions"]
    assert_none_was_left_standing(probes, all_at)
    answered = [p for p in probes if p.at > all_at + NOTICE_S and p.outcome == "answered"]
    assert len(answered) > 50
    assert {p.status for p in answered} == {503}, told(answered, all_at)


@pytest.mark.parametrize("host", [HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_in_a_reload_of_hypercorns_own_new_work_is_refused_in_the_drain_and_then_waits_for_the_next_workers(
    tmp_path: Path, host: Host
) -> None:
    gently = msgspec.structs.replace(prober(), interval_s=0.05)  # bare hypercorn's backlog is 100
    async with open_under_load(host, tmp_path, turn(count=4), gently, drain_timeout_s=1) as (server, load):
        await trio.sleep(0.5)
        reloaded_at = server.signal_main(signal.SIGHUP)
        with trio.fail_after(CAP_S):
            await server.wait_logged('"serving"', times=2 * host.processes)
        await trio.sleep(1)
        result = await load.stop()
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)
    assert_all_ended_properly(result)
    assert {p.outcome for p in result.probes[:-5]} == {"answered"}, told(result.probes, reloaded_at)
    drained = [p for p in result.probes if reloaded_at + NOTICE_S < p.at < reloaded_at + 0.9]
    assert {(p.status, p.retry_after) for p in drained} == {(503, True)}, told(drained, reloaded_at)
    assert {p.status for p in result.probes[-10:-5]} == {201}, told(result.probes, reloaded_at)
