"""Every way in, every signal: whoever streams gets the end of their turn, and nothing is left of the server."""

import signal
from pathlib import Path

import pytest
import trio

from bench.load import LoadResult, Plan
from bench.peers import open_load, open_upstream
from bench.server_process import Gone, ServerProcess
from tests.process.lastcall import (
    CAP_S,
    HOSTS,
    HYPERCORN_1,
    HYPERCORN_2,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    chat,
    ends,
    open_lastcall,
    reports,
    rude,
    well_behaved,
)

SIGNALS = {
    "TERM": lambda server: server.signal_main(signal.SIGTERM),
    "TERM to the group": lambda server: server.signal_group(signal.SIGTERM),
    "INT": lambda server: server.signal_main(signal.SIGINT),
    "INT to the group": lambda server: server.signal_group(signal.SIGINT),
}
TOTAL_S = 3
"""What the settings of these tests allow a stop to take: cleanup 1, release 1, and 1."""


async def stop_under_load(
    host: Host, folder: Path, how: str, groups: tuple, **settings: object
) -> tuple[ServerProcess, Gone, LoadResult, float]:
    """Start it, put it under this load, signal; the server, its end, what the clients saw, and how long it took."""
    async with open_upstream() as upstream:
        settings = {"drain_timeout_s": 0, "model_url": upstream.url, "model": "bench", **settings}
        async with open_lastcall(host, folder, **settings) as server:
            async with open_load(Plan(port=server.port, groups=groups)) as load:
                await load.wait_ready()
                signalled = SIGNALS[how](server)
                with trio.fail_after(CAP_S):
                    gone = await server.wait_gone()
                result = await load.stop()
    return server, gone, result, gone.at - signalled


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("host", HOSTS, ids=str)
async def test_all_streams_end_properly_whoever_else_is_in_the_way(tmp_path: Path, host: Host, how: str) -> None:
    server, gone, result, took_s = await stop_under_load(host, tmp_path, how, (*well_behaved(), *rude()))
    assert_all_ended_properly(result)
    assert_clean(server, gone, workers=max(host.workers or 1, 1))
    assert took_s < TOTAL_S
    found = ends(result)
    for group in ("chat", "turn", "queued", "replay", "http2"):
        assert found[group] == {"interrupted"}, found
    assert {rude.state for rude in result.rude} <= {"closed", "reset", "answered"}


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1, HYPERCORN_2], ids=str)
async def test_the_report_says_what_the_clients_saw(tmp_path: Path, host: Host) -> None:
    groups = (chat("chat", 7), chat("finishing", 4, "rate=20 tokens=15"), *rude()[:1])
    server, gone, result, _ = await stop_under_load(host, tmp_path, "TERM", groups, drain_timeout_s=1.5)
    assert_clean(server, gone, workers=max(host.workers or 1, 1))
    assert_all_ended_properly(result)
    assert ends(result)["finishing"] == {"completed"}

    def total(field: str) -> int:
        return sum(report[field] for report in reports(server))

    before = sum(s.ended_at is not None and s.ended_at < gone.at - 1.6 for s in result.streams)
    assert before == 0
    assert total("turns_interrupted") == 8
    assert total("turns_finished") == 4
    assert total("streams_ended") == 11
    assert total("streams_aborted") == 1
    assert all(report["reason"] for report in reports(server))


@pytest.mark.parametrize("host", HOSTS, ids=str)
async def test_a_server_without_work_is_gone_at_once(tmp_path: Path, host: Host) -> None:
    """Whatever the drain may take."""
    server, gone, _, took_s = await stop_under_load(host, tmp_path, "TERM", (), drain_timeout_s=30)
    assert_clean(server, gone, workers=max(host.workers or 1, 1))
    assert took_s < 1


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_2], ids=str)
async def test_turns_that_fit_into_the_drain_are_completed(tmp_path: Path, host: Host) -> None:
    groups = (chat(count=10, message="rate=20 tokens=20"),)
    server, gone, result, _ = await stop_under_load(host, tmp_path, "TERM", groups, drain_timeout_s=10)
    assert_clean(server, gone, workers=max(host.workers or 1, 1))
    assert ends(result) == {"chat": {"completed"}}
    assert {stream.tokens for stream in result.streams} == {20}
    last = max(stream.ended_at for stream in result.streams if stream.ended_at is not None)
    assert gone.at - last < 1
