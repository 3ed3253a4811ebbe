"""The real server on every host, the loads on it, and the checks of each stop."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import trio

from bench.peers import LoadClient, open_load_without_plan, open_upstream
from bench.plan import Group, Http2Streams, Idle, LoadResult, Plan, Prober, ProbeResult, Request, Streams, Unfinished
from bench.server_process import Gone, Launch, ServerProcess, open_server, python_command
from bench.wire import StreamEnd
from service.hosting.hypercorn.http1_connection import FIRST_REQUEST_S

APPLICATION = "service.asgi:app"
SSE = {"Accept": "text/event-stream"}
CAP_S = 30
"""Bound of every wait in these tests; not a promise of the server."""
PATIENT = {"LASTCALL_CLEANUP_TIMEOUT_S": "10", "LASTCALL_RELEASE_TIMEOUT_S": "10"}
START_S = 2 * CAP_S
"""Bound of a start, with up to five processes that share the processors with other tests."""


@dataclass(frozen=True)
class Host:
    """A way to start the server. ``workers`` is None for our own entry point, 0 for hypercorn in one process."""

    name: str
    workers: int | None
    config: str | None = None

    def argv(self, application: str = APPLICATION) -> list[str]:
        if self.workers is None:
            return python_command("-m", "service", "serve")
        config = ["--config", self.config] if self.config else []
        return python_command(
            *("-m", "hypercorn", "--worker-class", "trio", *config),
            *("--bind", "127.0.0.1:0", "--workers", str(self.workers), application),
        )

    @property
    def processes(self) -> int:
        """How many processes run a service."""
        return self.workers or 1

    def __str__(self) -> str:
        return self.name


SERVE = Host("serve", None)
HYPERCORN_0, HYPERCORN_1, HYPERCORN_2, HYPERCORN_4 = (Host(f"hypercorn-{n}", n) for n in (0, 1, 2, 4))
CONFIGURED_2, CONFIGURED_4 = (Host(f"configured-{n}", n, "python:service.hosting.hypercorn_config") for n in (2, 4))
HOSTS = (SERVE, HYPERCORN_0, HYPERCORN_1, HYPERCORN_2, HYPERCORN_4, CONFIGURED_4)


@asynccontextmanager
async def open_lastcall(
    host: Host, folder: Path, *, argv: list[str] | None = None, stderr_pipe: bool = False, **settings: Any
) -> AsyncIterator[ServerProcess]:
    """A running server with these settings (``drain_timeout_s=0``), within the cap.

    The bounds of its stop are such that no pause of the machine reaches them: tests of a bound set it.
    """
    store_url = "memory:" if host.processes == 1 else f"sqlite:{folder}/lastcall.db"
    env = {"LASTCALL_BIND": "127.0.0.1:0", "LASTCALL_STORE_URL": store_url}
    env |= {"LASTCALL_LOG_FORMAT": "json", "LASTCALL_MODEL": "bench", **PATIENT}
    env |= {name if name.isupper() else f"LASTCALL_{name.upper()}": str(value) for name, value in settings.items()}
    launch = Launch(argv or host.argv(), env=env, workers=host.processes, stderr_pipe=stderr_pipe)
    with trio.fail_after(4 * CAP_S):
        async with open_server(launch, log_path=folder / "server.log", start_timeout_s=START_S) as server:
            yield server


@asynccontextmanager
async def open_under_load(
    host: Host, folder: Path, *groups: Group, argv: list[str] | None = None, **settings: Any
) -> AsyncIterator[tuple[ServerProcess, LoadClient]]:
    """A running server with a model server behind it and a load on it; every client of the load is ready."""
    async with (
        open_load_without_plan() as load,
        open_upstream() as upstream,
        open_lastcall(host, folder, argv=argv, model_url=upstream.url, **settings) as server,
    ):
        with trio.fail_after(CAP_S):
            await load.begin(Plan(port=server.port, groups=groups))
            await load.wait_ready()
        yield server, load


async def wait_gone(server: ServerProcess) -> Gone:
    """Wait, within the cap, for the whole group to be gone."""
    with trio.fail_after(CAP_S):
        return await server.wait_gone()


# Loads


def chat(name: str = "chat", count: int = 3, message: str = "rate=20", **options: Any) -> Streams:
    """Streams on ``/chat``, which the model feeds as ``message`` says."""
    request = Request(path="/chat", headers=SSE, body=json.dumps({"message": f"{name}$n {message}"}))
    return Streams(name=name, count=count, stream=request, **options)


def turn(name: str = "turn", count: int = 3, message: str = "rate=20", **options: Any) -> Streams:
    """Streams on turns of sessions of their own."""
    return Streams(name=name, count=count, before=(_session(name),), stream=_turn(name, message), **options)


def queued(name: str = "queued", count: int = 2) -> Streams:
    """Streams on turns that wait behind a running one."""
    before = (_session(name), _turn(name, "rate=20", background=True))
    stream = _turn(name, "rate=20", on_conflict="queue")
    return Streams(name=name, count=count, before=before, stream=stream, ready_at="head")


def replay(name: str = "replay", count: int = 2) -> Streams:
    """Streams on the events of running turns that other requests have started."""
    started = _turn(name, "rate=20", background=True)
    before = (_session(name), msgspec.structs.replace(started, capture={"turn": "id"}))
    stream = Request(method="GET", path=f"/sessions/{name}$n/turns/$turn/events", headers=SSE)
    return Streams(name=name, count=count, before=before, stream=stream)


def http2(name: str = "http2", count: int = 2) -> Http2Streams:
    """Streams on ``/chat`` in one HTTP/2 connection."""
    request = Request(path="/chat", headers=SSE, body=json.dumps({"message": f"{name}$n rate=20"}))
    return Http2Streams(name=name, count=count, stream=request)


def stalled(name: str = "stalled", count: int = 1) -> Streams:
    """Streams whose client does not read, however much the model sends."""
    return chat(name, count, "rate=400 pad=400", stalled=True)


def well_behaved() -> tuple[Streams | Http2Streams, ...]:
    """A few of every kind of stream that must end properly."""
    return (chat(), turn(), queued(), replay(), http2())


def rude() -> tuple[Streams | Idle | Unfinished, ...]:
    """A few of every kind of client that could delay a stop.

    One of them closes its sending side: for hypercorn this client is gone.
    """
    return (
        stalled(),
        chat("half-closed", 1, half_close=True),
        chat("sends ahead", 1, sends_ahead=True),
        Idle(count=3, request=Request(method="GET", path="/healthz")),
        Unfinished(name="half-sent", count=2, kind="head"),
        Unfinished(name="slow upload", count=2, kind="body"),
        Unfinished(name="TLS handshake", count=2, kind="tls"),
    )


def prober(path: str = "/sessions", method: str = "POST") -> Prober:
    """New connections that ask for new work, or send a GET."""
    return Prober(name=path, request=Request(method=method, path=path, body="{}" if method == "POST" else ""))


def outcome_of(probe: ProbeResult) -> str:
    """The outcome of a probe; ``sent late`` if its connection may have been closed because the request came late.

    A client that has connected when the listeners close has ``FIRST_REQUEST_S`` for its request. A load client that was
    held up itself may have sent the request later.
    """
    is_late = (probe.sent_at or probe.answered_at or inf) - probe.at > FIRST_REQUEST_S
    return "sent late" if probe.outcome in ("closed", "reset") and is_late else probe.outcome


def _session(name: str) -> Request:
    return Request(path="/sessions", body=json.dumps({"id": f"{name}$n"}))


def _turn(name: str, message: str, **fields: object) -> Request:
    body = json.dumps({"input": f"{name}$n {message}", **fields})
    headers = {} if fields.get("background") else SSE
    return Request(path=f"/sessions/{name}$n/turns", headers=headers, body=body)


# Checks of a stop


def reports(server: ServerProcess) -> list[dict[str, Any]]:
    """The shutdown report of each process that ran a service."""
    lines = [line for line in server.log().splitlines() if '"shutdown report"' in line]
    return [json.loads(line) for line in lines]


TOLD = ('"message": "turn ended"', '"message": "requests refused"', '"logger": "lastcall.process"')
"""Lines of the log that a test's own actions cause: turns that fail, requests that are refused, workers that die."""


def assert_log_is_clean(server: ServerProcess) -> None:
    log = "\n".join(line for line in server.log().splitlines() if not any(told in line for told in TOLD))
    for word in (r"Traceback", r"\bCancelled\b", r"(?i)\bwarning\b", r"(?i)\bexception\b", r"never awaited"):
        assert not re.search(word, log), f"{word} in the log:\n{log}"


def assert_clean(host: Host, server: ServerProcess, gone: Gone) -> None:
    """Check that the stop left nothing behind and logged nothing but its reports, one from each worker."""
    assert_log_is_clean(server)
    assert gone.exit_code == 0, server.log()
    assert {code for _, code, _ in gone.exits} == {0}
    assert gone.strays == ()
    assert len(reports(server)) == host.processes, server.log()
    assert all(report["faults"] == [] and report["tasks_left"] == 0 for report in reports(server))


def assert_all_ended_properly(result: LoadResult, *, except_for: tuple[str, ...] = ("stalled", "half-closed")) -> None:
    """Check that every stream whose client could read had one terminal event, its last chunk and every token before."""
    for stream in result.streams:
        if stream.group in except_for:
            continue
        assert stream.end is StreamEnd.TERMINAL, stream
        assert stream.terminals == 1, stream
        assert stream.gaps == 0, stream


def ends(result: LoadResult) -> Mapping[str, set[str]]:
    """The terminal events by group."""
    found: dict[str, set[str]] = {}
    for stream in result.streams:
        found.setdefault(stream.group, set()).add(stream.terminal or str(stream.end))
    return found
