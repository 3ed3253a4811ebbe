"""From the notice to the very end every new connection gets a whole answer or an immediate refusal."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import pytest
import trio

from bench.plan import ProbeResult
from bench.server_process import Gone, ServerFailedError, ServerProcess
from tests.machine import Machine
from tests.process.clients import new_session, open_client, owner_of
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
    outcome_of,
    prober,
    reports,
    turn,
    wait_gone,
)

WAIT_S = 60
"""Bound of a lame duck or a drain, which the tests end when they have seen enough."""
SECOND = 100
"""So many probes of one prober are sent in a second."""
PROBES_MIN = 10
"""So many probes show what those of a second do: the notice may be late."""
LEAVES_S = 0.5
"""Time for a worker that knows of its stop to leave new clients to others."""
SILENT_S = 0.1
USUAL_TIMES = 3
"""An answer after the signal may take this multiple of the longest one before: a busy machine slows everything."""
GATED = (SERVE, HYPERCORN_1, HYPERCORN_2, HYPERCORN_4)


def told(probes: list[ProbeResult], signalled: float) -> str:
    """The probes for the message of a failed test: time, outcome, duration."""
    return "\n".join(
        f"{p.at - signalled:+.3f} {p.outcome} {p.status} after {p.waited_s:.3f}, late {p.late_s:.3f}" for p in probes
    )


@dataclass(frozen=True)
class WorkerStop:
    """When a worker's stop went on, by the worker's own report, on the clock of the probes.

    Attributes:
        noticed_at: The worker knew of the stop: in a lame duck it is not ready, otherwise it refuses new work.
        refuses_at: The worker refuses new work.
    """

    pid: int
    noticed_at: float
    refuses_at: float


def stops_of(server: ServerProcess) -> list[WorkerStop]:
    """The stop of each worker, in the order of their reports."""
    clocks_differ_s = time.time() - time.monotonic()
    stops = []
    for report in reports(server):
        reported_at = datetime.fromisoformat(report["timestamp"]).timestamp() - clocks_differ_s
        phases_ms = report["phases_ms"]
        noticed_at = reported_at - (phases_ms["total"] - phases_ms["notice"]) / 1000
        stops.append(WorkerStop(report["pid"], noticed_at, noticed_at + phases_ms["lame_duck"] / 1000))
    return stops


def answered(probes: list[ProbeResult], *, sent_after: float = 0, before: float = float("inf")) -> list[ProbeResult]:
    """The probes that were sent after one moment, and had their whole answers before another one."""
    return [
        it for it in probes if it.outcome == "answered" and it.at > sent_after and (it.answered_at or before) < before
    ]


def assert_none_was_left_standing(machine: Machine, probes: list[ProbeResult], signalled: float) -> None:
    """Check that each probe got a whole answer or a refusal within 100 ms more than ``USUAL_TIMES`` the usual time."""

    def waited_s(probe: ProbeResult) -> float:
        return probe.waited_s if probe.answered_at is None else machine.free_s(probe.at, probe.answered_at)

    usual_s = max(map(waited_s, answered(probes, sent_after=signalled - 0.5, before=signalled)), default=0)
    during = [p for p in probes if p.at > signalled]
    most_s = USUAL_TIMES * usual_s + SILENT_S
    proper = ("answered", "refused", "sent late")
    bad = [p for p in during if outcome_of(p) not in proper or waited_s(p) > most_s + p.late_s]
    assert not bad, f"{len(bad)} of {len(during)}, {usual_s:.3f} before the signal:\n{told(bad, signalled)}"


async def end_the_wait(server: ServerProcess) -> tuple[float, Gone]:
    """End the lame duck or the drain, as a second Ctrl+C does. Returns the time of the signal, and the end.

    A signal that is seen right after the first one, which was late, does not count: so it is sent again.
    """
    ended_at = server.signal_group(signal.SIGINT)
    with trio.fail_after(CAP_S):
        while server.gone is None:
            with trio.move_on_after(1):
                await server.wait_gone()
            with suppress(ServerFailedError):  # it has ended
                server.signal_group(signal.SIGINT)
        return ended_at, await server.wait_gone()


@pytest.mark.parametrize("host", GATED, ids=str)
async def test_no_new_connection_is_reset_or_silent_while_turns_drain(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    async with open_under_load(host, tmp_path, chat(count=20), prober(), drain_timeout_s=WAIT_S) as (server, load):
        await load.wait_probes(SECOND)
        signalled = server.signal_main(signal.SIGTERM)
        await load.wait_probes(SECOND)
        ended_at, gone = await end_the_wait(server)
        await trio.sleep(0.1)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    assert_none_was_left_standing(machine, result.probes, signalled)
    assert {p.status for p in answered(result.probes, before=signalled)} == {201}
    drained = answered(result.probes, sent_after=max(stop.noticed_at for stop in stops_of(server)))
    assert len(drained) > PROBES_MIN
    assert all(p.status == 503 and p.retry_after and p.connection_close for p in drained), told(drained, signalled)
    refused = [p for p in result.probes if p.outcome == "refused"]
    assert refused
    assert all((p.answered_at or 0) > ended_at for p in refused), told(refused, signalled)


@pytest.mark.parametrize("host", GATED, ids=str)
async def test_no_new_connection_is_reset_or_silent_when_many_streams_end(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    async with open_under_load(host, tmp_path, chat(count=100), prober(), drain_timeout_s=0) as (server, load):
        await load.wait_probes(SECOND)
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        await trio.sleep(0.1)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    assert_none_was_left_standing(machine, result.probes, signalled)


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_2], ids=str)
async def test_while_the_lame_duck_lasts_everything_works_but_readiness(tmp_path: Path, host: Host) -> None:
    groups = (chat(count=2), prober(), prober("/readyz", "GET"))
    async with open_under_load(host, tmp_path, *groups, lame_duck_timeout_s=WAIT_S, drain_timeout_s=0) as (
        server,
        load,
    ):
        await load.wait_probes(2 * SECOND)
        signalled = server.signal_main(signal.SIGTERM)
        await load.wait_probes(2 * SECOND)
        _, gone = await end_the_wait(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert ends(result)["chat"] == {"interrupted"}

    noticed_at = max(stop.noticed_at for stop in stops_of(server))
    refuses_at = min(stop.refuses_at for stop in stops_of(server))

    def statuses(path: str, since: float, until: float) -> set[int | None]:
        return {p.status for p in answered(result.probes, sent_after=since, before=until) if p.group == path}

    assert statuses("/sessions", noticed_at, refuses_at) == {201}
    assert statuses("/readyz", 0, signalled) == {200}
    assert statuses("/readyz", noticed_at, refuses_at) == {503}


@pytest.mark.parametrize("host", GATED, ids=str)
async def test_reads_go_on_during_the_drain(tmp_path: Path, host: Host) -> None:
    groups = (chat(count=4), prober("/sessions", "GET"))
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=WAIT_S) as (server, load):
        signalled = server.signal_main(signal.SIGTERM)
        await load.wait_probes(SECOND)
        ended_at, _ = await end_the_wait(server)
        result = await load.stop()
    during = answered(result.probes, sent_after=signalled, before=ended_at)
    assert {p.status for p in during} == {200}
    assert len(during) > PROBES_MIN
    failed = [p for p in result.probes if p.outcome != "answered" and p.answered_at and p.answered_at < ended_at]
    assert not failed, told(failed, signalled)


@pytest.mark.parametrize("host", [HYPERCORN_2, CONFIGURED_4], ids=str)
async def test_while_one_worker_drains_the_others_take_new_clients_until_all_stop(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    groups = (turn(count=4, message="rate=20"), prober(), prober("/readyz", "GET"))
    async with open_under_load(host, tmp_path, *groups, drain_timeout_s=WAIT_S) as (server, load):
        await load.wait_probes(SECOND)
        first = owner_of(tmp_path / "lastcall.db", "/sessions/turn0")
        os.kill(first, signal.SIGTERM)
        await load.wait_probes(3 * SECOND)
        all_at = server.signal_main(signal.SIGTERM)
        await load.wait_probes(2 * SECOND)
        _, gone = await end_the_wait(server)
        result = await load.stop()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    noticed_at = {stop.pid: stop.noticed_at for stop in stops_of(server)}
    alone = answered(result.probes, sent_after=noticed_at[first] + LEAVES_S, before=all_at)
    assert len(alone) > PROBES_MIN
    assert {(p.group, p.status) for p in alone} == {("/sessions", 201), ("/readyz", 200)}, told(alone, all_at)
    probes = [p for p in result.probes if p.group == "/sessions"]
    assert_none_was_left_standing(machine, probes, all_at)
    drained = answered(probes, sent_after=max(noticed_at.values()))
    assert len(drained) > PROBES_MIN
    assert {p.status for p in drained} == {503}, told(drained, all_at)


@pytest.mark.parametrize("host", [HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_in_a_reload_of_hypercorns_own_new_work_is_refused_in_the_drain_and_then_waits_for_the_next_workers(
    tmp_path: Path, host: Host
) -> None:
    gently = msgspec.structs.replace(prober(), interval_s=0.05)  # bare hypercorn's backlog is 100
    async with open_under_load(host, tmp_path, turn(count=4), gently, drain_timeout_s=3) as (server, load):
        await trio.sleep(0.5)
        reloaded_at = server.signal_main(signal.SIGHUP)
        with trio.fail_after(CAP_S):
            await server.wait_logged('"serving"', times=2 * host.processes)
        serve_at = time.monotonic()
        async with open_client(server) as [client]:
            await new_session(client, "after-all-that-waited")
        await trio.sleep(1)
        result = await load.stop()
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)
    assert_all_ended_properly(result)
    waited = [p for p in result.probes if p.at < serve_at]
    assert {outcome_of(p) for p in waited} - {"sent late"} == {"answered"}, told(waited, reloaded_at)
    noticed_at = max(stop.noticed_at for stop in stops_of(server)[: host.processes])
    drained = answered(result.probes, sent_after=noticed_at, before=reloaded_at + 3)
    assert {(p.status, p.retry_after) for p in drained} == {(503, True)}, told(drained, reloaded_at)
    assert {p.status for p in answered(result.probes, sent_after=serve_at)} == {201}, told(result.probes, reloaded_at)
