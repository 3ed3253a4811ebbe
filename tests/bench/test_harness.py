"""The harness judges rightly: it detects each known misbehaviour of a server."""

import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from bench import tree_server
from bench.load import Load
from bench.peers import open_load, open_upstream
from bench.plan import (
    Calls,
    Idle,
    LoadResult,
    Plan,
    Prober,
    ProbeResult,
    Request,
    Streams,
    Unfinished,
)
from bench.server_process import Launch, ServerFailedError, ServerProcess, open_server, python_command
from bench.wire import StreamEnd

MISBEHAVING = str(Path(__file__).with_name("misbehaving.py"))
CAP_S = 120
"""Bound of every wait: each process takes a moment to start, and many times that on a busy machine."""


@asynccontextmanager
async def open_misbehaving(tmp_path: Path, *arguments: str) -> AsyncIterator[ServerProcess]:
    launch = Launch(python_command(MISBEHAVING, *arguments))
    with trio.fail_after(CAP_S):
        async with open_server(launch, log_path=tmp_path / "server.log") as server:
            yield server


async def judge(tmp_path: Path, *groups: Streams | Idle | Unfinished | Prober, watch_s: float = 0.3) -> LoadResult:
    """The load client's judgement of a server that gets SIGTERM meanwhile."""
    async with (
        open_misbehaving(tmp_path, "--delay", str(watch_s)) as server,
        open_load(Plan(port=server.port, groups=groups)) as load,
    ):
        await load.wait_ready()
        server.signal_main(signal.SIGTERM)
        await server.wait_gone()
        return await load.stop()


ENDS = {
    "terminal": (StreamEnd.TERMINAL, "interrupted"),
    "terminal-in-pieces": (StreamEnd.TERMINAL, "interrupted"),
    "clean": (StreamEnd.CLEAN, None),
    "truncated": (StreamEnd.TRUNCATED, None),
    "terminal-without-last-chunk": (StreamEnd.TRUNCATED, "interrupted"),
    "cut-in-chunk": (StreamEnd.TRUNCATED, None),
    "reset": (StreamEnd.RESET, None),
    "garbage": (StreamEnd.BROKEN, None),
    "refuse": (StreamEnd.REFUSED, None),
    "reset-at-once": (StreamEnd.UNANSWERED, None),
    "close-at-once": (StreamEnd.UNANSWERED, None),
}


async def test_each_end_of_a_stream_is_judged_rightly(tmp_path: Path) -> None:
    groups = [Streams(name=path, count=2, stream=Request(path=f"/{path}")) for path in ENDS]
    result = await judge(tmp_path, *groups)
    seen = {(s.group, s.number): (s.end, s.terminal) for s in result.streams}
    assert seen == {(path, number): expected for path, expected in ENDS.items() for number in range(2)}
    # A server that exits closes its sockets, so a stream that hangs there is cut and not open.
    assert all(stream.ended_at is not None for stream in result.streams)


async def test_a_stream_on_which_nothing_happened_is_open(tmp_path: Path) -> None:
    async with open_misbehaving(tmp_path, "--delay", "20") as server:
        group = Streams(name="open", count=1, stream=Request(path="/open"))
        async with open_load(Plan(port=server.port, groups=(group,))) as load:
            await load.wait_ready()
            server.signal_main(signal.SIGTERM)
            (stream,) = (await load.stop()).streams
    assert stream.end is StreamEnd.OPEN
    assert stream.tokens == 2


async def test_a_half_closed_client_still_judges_its_stream(tmp_path: Path) -> None:
    group = Streams(name="half", count=1, stream=Request(path="/terminal"), half_close=True)
    (stream,) = (await judge(tmp_path, group)).streams
    assert stream.end is StreamEnd.TERMINAL


async def test_lost_and_doubled_tokens_and_a_second_terminal_event_are_counted(tmp_path: Path) -> None:
    paths = ("lost-token", "doubled-token", "two-terminals", "terminal-in-pieces")
    result = await judge(tmp_path, *(Streams(name=path, count=1, stream=Request(path=f"/{path}")) for path in paths))
    seen = {s.group: (s.tokens, s.gaps, s.terminals) for s in result.streams}
    assert seen == {
        "lost-token": (3, 1, 1),
        "doubled-token": (3, 1, 1),
        "two-terminals": (2, 0, 2),
        "terminal-in-pieces": (3, 0, 1),
    }


async def test_a_request_before_the_stream_gives_it_its_values(tmp_path: Path) -> None:
    before = Request(path="/json", capture={"session": "id"})
    good = Streams(name="good", count=1, before=(before,), stream=Request(path="/terminal", body='{"s": "$session"}'))
    bad = Streams(name="bad", count=1, before=(Request(path="/refuse"),), stream=Request(path="/terminal"))
    result = await judge(tmp_path, good, bad)
    assert {s.group: s.end for s in result.streams} == {"good": StreamEnd.TERMINAL, "bad": StreamEnd.REFUSED}


async def test_a_stalled_reader_stalls_the_server(tmp_path: Path) -> None:
    """A little data is enough: the server cannot send 200 KiB to such a reader."""
    group = Streams(name="stalled", count=1, stream=Request(path="/flood"), stalled=True)
    (stream,) = (await judge(tmp_path, group)).streams
    assert "were taken" not in (tmp_path / "server.log").read_text()
    assert stream.end in (StreamEnd.TRUNCATED, StreamEnd.RESET)
    assert stream.status == 200


async def test_idle_and_unfinished_connections_are_watched_to_their_end(tmp_path: Path) -> None:
    groups = (
        Idle(count=2, request=Request(method="GET", path="/json")),
        Unfinished(name="head", count=1, kind="head"),
        Unfinished(name="body", count=1, kind="body"),
        Unfinished(name="tls", count=1, kind="tls"),
    )
    result = await judge(tmp_path, *groups)
    assert sorted(r.group for r in result.rude) == ["body", "head", "idle", "idle", "tls"]
    assert {r.state for r in result.rude} <= {"closed", "reset"}
    assert all(r.ended_at is not None for r in result.rude)


@asynccontextmanager
async def probing(port: int, path: str) -> AsyncIterator[LoadResult]:
    """A load client in this process that probes this path: its probes so far."""
    load = Load(Plan(port=port, groups=(Prober(request=Request(method="GET", path=path)),)))
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(load.run, on_ready=lambda: None, stop=stop))  # noqa: ASYNC113  its probes are waited for
        yield load.result
        stop.set()


async def ended_probes(load: LoadResult, *, since: float) -> list[ProbeResult]:
    """The probes that began after this moment and have ended, once there are some."""
    while len(ended := [p for p in load.probes if p.at > since and p.outcome != "silent"]) < 5:  # noqa: ASYNC110
        await trio.sleep(0.01)
    return ended


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/refuse", "answered"),
        ("/half-refuse", "incomplete"),
        ("/reset-at-once", "reset"),
        ("/close-at-once", "closed"),
        ("/silent", "answered"),
    ],
)
async def test_a_probe_has_the_answer_to_a_new_connection(tmp_path: Path, path: str, outcome: str) -> None:
    async with open_misbehaving(tmp_path, "--delay", "600") as server, probing(server.port, path) as load:
        during = await ended_probes(load, since=server.signal_main(signal.SIGTERM))
        server.signal_main(signal.SIGKILL)
        gone = await server.wait_gone()
        after = await ended_probes(load, since=gone.at)
    assert {p.outcome for p in during} == {outcome}
    assert (min(p.waited_s for p in during) >= 0.3) is (path == "/silent"), "it waits 0.3 s there"
    if path == "/refuse":
        assert all(p.status == 503 and p.retry_after and p.connection_close for p in during)
    assert {p.outcome for p in after} == {"refused"}


@pytest.mark.serial
async def test_the_time_to_gone_and_the_exit_code_are_right(tmp_path: Path) -> None:
    """It is after the moment at which the process leaves, by its own clock, and not much later.

    What the machine adds is no error of the harness, so the smallest error of three counts.
    """
    errors_s = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with open_misbehaving(folder, "--delay", "0.2", "--exit-code", "75", "--tell") as server:
            signalled = server.signal_main(signal.SIGTERM)
            gone = await server.wait_gone()
            over = time.monotonic()
        [left] = map(float, re.findall(r"leaves at ([0-9.]+)", server.log()))
        assert signalled + 0.2 <= left <= gone.at <= over
        assert (gone.exit_code, gone.strays) == (75, ())
        errors_s.append(gone.at - left)
    assert min(errors_s) < 0.1


async def test_the_group_is_gone_with_its_last_process_and_zombies_do_not_count(tmp_path: Path) -> None:
    async with open_misbehaving(tmp_path, "--linger", "600") as server:
        server.signal_main(signal.SIGTERM)
        while server.pid in server.members():  # noqa: ASYNC110  another process sets no event
            await trio.sleep(0.01)
        [lingers] = server.members()
        assert server.gone is None
        killed = time.monotonic()
        os.kill(lingers, signal.SIGKILL)
        gone = await server.wait_gone()
    assert gone.exit_code == 0
    assert [pid for pid, _, _ in gone.exits] == [server.pid, lingers]
    assert gone.at == gone.exits[1][2] >= killed
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, 0)


async def test_a_process_that_left_the_group_is_named(tmp_path: Path) -> None:
    async with open_misbehaving(tmp_path, "--stray") as server:
        server.signal_main(signal.SIGTERM)
        gone = await server.wait_gone()
    (stray,) = gone.strays
    os.kill(stray, signal.SIGKILL)
    os.waitpid(stray, 0)  # noqa: ASYNC222  it has been killed


async def test_a_server_that_ends_before_it_listens_has_failed_to_start(tmp_path: Path) -> None:
    launch = Launch(python_command("-c", "import sys; print('no such setting'); sys.exit(78)"))
    with trio.fail_after(CAP_S), pytest.raises(ServerFailedError) as failed:
        async with open_server(launch, log_path=tmp_path / "server.log"):
            pass
    assert failed.value.exit_code == 78
    assert "no such setting" in failed.value.log


@pytest.mark.parametrize(("steps_max_s", "said"), [(60, "the server has ended"), (0, "does not write its steps")])
async def test_a_server_that_writes_no_steps_has_failed(
    steps_max_s: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal that asks for them ends this server."""
    monkeypatch.setattr(tree_server, "STEPS_MAX_S", steps_max_s)
    async with open_misbehaving(tmp_path) as server:
        with pytest.raises(ServerFailedError, match=said):
            await tree_server.ask_steps(server, tmp_path / "steps.json")


async def test_a_server_that_ignores_its_signal_is_killed_on_leaving(tmp_path: Path) -> None:
    async with open_misbehaving(tmp_path, "--delay", "60") as server:
        server.signal_main(signal.SIGTERM)
        await trio.sleep(0.1)
        assert server.gone is None
    assert server.gone is not None
    assert server.gone.exit_code == -signal.SIGKILL


async def test_calls_in_a_row_are_noted_until_the_first_that_fails(tmp_path: Path) -> None:
    good = Calls(name="good", count=2, requests=(Request(path="/json"),), repeat=3)
    bad = Calls(name="bad", count=1, requests=(Request(path="/json"), Request(path="/refuse")), repeat=3)
    began = time.monotonic()
    async with open_misbehaving(tmp_path) as server, open_load(Plan(port=server.port, groups=(good, bad))) as load:
        await load.wait_ready()
        done = time.monotonic()
        result = await load.stop()
    assert sorted((calls.group, len(calls.answered_at)) for calls in result.calls) == [
        ("bad", 1),
        ("good", 3),
        ("good", 3),
    ]
    assert {calls.group for calls in result.calls if calls.note} == {"bad"}
    for calls in result.calls:
        assert [began, *calls.answered_at, done] == sorted([began, *calls.answered_at, done])


async def test_calls_go_on_after_the_last_answer_of_a_connection(tmp_path: Path) -> None:
    group = Calls(name="all", count=2, requests=(Request(path="/json"), Request(path="/last-json")), repeat=3)
    async with open_misbehaving(tmp_path) as server, open_load(Plan(port=server.port, groups=(group,))) as load:
        await load.wait_ready()
        result = await load.stop()
    assert [(len(calls.answered_at), calls.note) for calls in result.calls] == [(6, ""), (6, "")]


async def test_calls_without_an_end_are_ready_at_their_first_answer(tmp_path: Path) -> None:
    """A measurement that began before would count the start of the load client."""
    ever = Calls(name="ever", count=2, requests=(Request(path="/json"),), repeat=1_000_000, ready_at="first")
    bad = Calls(name="bad", count=1, requests=(Request(path="/refuse"),), ready_at="first")
    async with open_misbehaving(tmp_path) as server, open_load(Plan(port=server.port, groups=(ever, bad))) as load:
        await load.wait_ready()
        result = await load.stop()
    assert all(calls.answered_at for calls in result.calls if calls.group == "ever")
    assert sorted((calls.group, bool(calls.note)) for calls in result.calls) == [
        ("bad", True),
        ("ever", False),
        ("ever", False),
    ]


async def test_a_client_that_is_ready_at_the_end_has_read_all_its_streams(tmp_path: Path) -> None:
    body = '{"model": "m", "stream": true, "messages": [{"role": "user", "content": "s$n rate=100 tokens=10"}]}'
    request = Request(path="/v1/chat/completions", body=body)
    group = Streams(name="direct", count=2, stream=request, repeat=3, ready_at="end")
    with trio.fail_after(CAP_S):
        async with open_upstream() as upstream, open_load(Plan(port=upstream.port, groups=(group,))) as load:
            await load.wait_ready()
            result = await load.stop()
    assert [(stream.end, stream.tokens) for stream in result.streams] == [(StreamEnd.CLEAN, 10)] * 6


async def test_output_through_a_pipe_can_be_filled_and_closed(tmp_path: Path) -> None:
    script = (  # which says in one write that it listens: a second one may meet the closed pipe
        "import sys, time, signal\n"
        "print('Running on http://127.0.0.1:1\\n', end='', flush=True)\n"
        "signal.sigwait({signal.SIGUSR1})\n"
        "try: print('x' * 10, flush=True)\n"
        "except BrokenPipeError: sys.stdout = None; time.sleep(0.1); import os; os._exit(7)\n"
    )
    launch = Launch(
        python_command("-c", f"import signal; signal.pthread_sigmask(0, [signal.SIGUSR1])\n{script}"), stderr_pipe=True
    )
    for deed in ("fill", "close"):
        with trio.fail_after(CAP_S):
            async with open_server(launch, log_path=tmp_path / f"{deed}.log") as server:
                assert server.stderr_pipe is not None
                getattr(server.stderr_pipe, deed)()
                server.signal_main(signal.SIGUSR1)
                if deed == "close":
                    assert (await server.wait_gone()).exit_code == 7
                else:
                    with trio.move_on_after(0.5):
                        await server.wait_gone()
                    assert server.gone is None


@pytest.mark.serial
async def test_a_thousand_tokens_a_second_are_all_received_and_none_is_invented(tmp_path: Path) -> None:
    """The load client reads from the model server: two parts of the harness that share only the poller."""
    body = '{"model": "m", "stream": true, "messages": [{"role": "user", "content": "s$n rate=100 tokens=50"}]}'
    with trio.fail_after(CAP_S):
        async with open_upstream() as upstream:
            request = Request(path="/v1/chat/completions", body=body)
            group = Streams(name="direct", count=20, stream=request, keep_delays=True, ready_at="end")
            began = time.monotonic()
            async with open_load(Plan(port=upstream.port, groups=(group,))) as load:
                await load.wait_ready()
                books = await upstream.books()
                result = await load.stop()
            took = time.monotonic() - began
    assert {(s.end, s.tokens, s.gaps) for s in result.streams} == {(StreamEnd.CLEAN, 50, 0)}
    assert {book.tokens for book in books} == {50}
    assert len(result.delays_ns["direct"]) == 1000
    assert min(result.delays_ns["direct"]) > 0
    assert took > 0.49
