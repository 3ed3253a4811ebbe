"""The contenders: servers with the same wire behaviour, each a small program of its own.

All take ``POST /chat {"message": …}`` and answer with an event stream of ``turn.delta`` events and a terminal
event, if they get so far. The benchmark knows only the table below of them.
"""

import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from bench.server_process import ROOT, Launch, python_command

CHAT = "/chat"
RESPONSES = "/v1/responses"
COMPLETIONS = "/v1/chat/completions"
FACES: Mapping[str, str] = {"responses": RESPONSES, "chat-completions": COMPLETIONS}
"""The paths of OpenAI's API, by their names for ``--faces``."""


@dataclass(frozen=True)
class Contender:
    """One way to serve a chat.

    Args:
        name: The name for ``--only`` and the raw rows.
        label: The name for tables and plots.
        argv: The command.
        env: Its settings.
        workers: How many processes serve.
        relays: Whether there is a model server behind it; otherwise it makes its own tokens.
        needs: Modules it imports beyond the service's own.
        store_env: Names the environment variable that takes a store, and turns a path into its value.
        count_replies: Counts the non-empty replies in that store afterwards.
        keeps_sessions: Whether it has ``POST /sessions`` and ``GET /sessions/{id}``.
        faces: The paths of OpenAI's API by which it can be asked as well, by their names for ``--faces``.
        path: The path by which it is asked.
        folder: Where its program lies.
        traces: Whether it sends traces to the model server's process, which takes them and keeps none.
    """

    name: str
    label: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    relays: bool = True
    needs: Sequence[str] = ()
    store_env: tuple[str, Callable[[Path], str]] | None = None
    count_replies: Callable[[Path], Awaitable[int]] | None = None
    keeps_sessions: bool = False
    faces: Mapping[str, str] = field(default_factory=dict)
    path: str = CHAT
    folder: Path = ROOT
    traces: bool = False

    @property
    def missing(self) -> str | None:
        """The modules that the contender needs and that are not installed."""
        if not shutil.which(self.argv[0]):
            return self.argv[0]
        return next((module for module in self.needs if find_spec(module) is None), None)

    def through(self, faces: Sequence[str]) -> "list[Contender]":
        """Return this server once for each of these faces that it has."""
        return [
            replace(self, name=f"{self.name}-{face}", label=f"{self.label}, {self.faces[face]}", path=self.faces[face])
            for face in faces
            if face in self.faces
        ]

    def with_telemetry(self) -> "list[Contender]":
        """Return this server with all its telemetry on, access log and traces beside the metrics; none if it has none.

        The libraries of traces have to be installed: the command line refuses to begin without them.
        """
        if not self.is_lastcall:
            return []
        telling = replace(
            self,
            name=f"{self.name}-telemetry",
            label=f"{self.label}, all telemetry",
            env={**self.env, "LASTCALL_ACCESS_LOG": "on"},
            needs=(*self.needs, "opentelemetry"),
            traces=True,
        )
        return [telling]

    @property
    def is_lastcall(self) -> bool:
        return "LASTCALL_MODEL" in self.env

    def launch(self, *, upstream_url: str, store: Path, cpus: str | None) -> Launch:
        env = {"BENCH_UPSTREAM": upstream_url, "LASTCALL_MODEL_URL": upstream_url}
        if self.traces:
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = upstream_url.removesuffix("/v1")
        if self.store_env is not None:
            env[self.store_env[0]] = self.store_env[1](store)
        return Launch(self.argv, env=env | dict(self.env), workers=self.workers, cpus=cpus, folder=self.folder)


async def _count_rows(store: Path) -> int:
    database = sqlite3.connect(store)
    try:
        return int(database.execute("SELECT count(*) FROM replies WHERE text != ''").fetchone()[0])
    finally:
        database.close()


async def _count_turns(store: Path) -> int:
    """Count the replies through the store itself, as a restarted service would see them."""
    from service.storage.sqlite import open_sqlite_store  # noqa: PLC0415  the floors need none of the service

    now = datetime.now(UTC)
    count = 0
    async with open_sqlite_store(str(store), close_timeout_s=5) as turns_store:
        after: str | None = None
        while True:
            sessions = await turns_store.list_sessions(limit=100, after=after, status=None, now=now)
            for session in sessions.data:
                turns = await turns_store.list_turns(session.id, limit=100, after=None, now=now)
                count += sum(bool(turn.text) and not turn.is_open for turn in turns.data)
            if (after := sessions.next) is None:
                return count


def _lastcall(name: str, label: str, argv: Sequence[str], *, drain_timeout_s: float, workers: int = 1) -> Contender:
    env = {
        "LASTCALL_DRAIN_TIMEOUT_S": str(drain_timeout_s),
        "LASTCALL_MODEL": "bench",
        "LASTCALL_BIND": "127.0.0.1:0",
        "LASTCALL_LIVE_TURNS_MAX": "4000",
    }
    return Contender(
        name,
        label,
        argv,
        env=env,
        workers=workers,
        store_env=("LASTCALL_STORE_URL", "sqlite:{}".format),
        count_replies=_count_turns,
        keeps_sessions=True,
        faces=FACES,
    )


def _hypercorn(application: str, *, workers: int = 1) -> list[str]:
    return python_command(
        "-m", "hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:0", "--workers", str(workers), application
    )


_FASTAPI = ("fastapi", "uvicorn", "sse_starlette")


def _uvicorn(
    name: str,
    label: str,
    module: str,
    *options: str,
    needs: Sequence[str] = _FASTAPI,
    keeps_sessions: bool = False,
    **env: str,
) -> Contender:
    return Contender(
        name,
        label,
        python_command("-m", "uvicorn", f"bench.contenders.{module}:app", "--port", "0", *options),
        env=env,
        needs=needs,
        store_env=("BENCH_STORE", str),
        count_replies=_count_rows,
        keeps_sessions=keeps_sessions,
    )


def _alone(name: str, label: str, argv: Sequence[str]) -> Contender:
    """Contenders to compare with the floors: they make their own tokens, and keep their sessions in memory."""
    env = {
        "LASTCALL_DRAIN_TIMEOUT_S": "0",
        "LASTCALL_STORE_URL": "memory:",
        "LASTCALL_BIND": "127.0.0.1:0",
        "LASTCALL_LIVE_TURNS_MAX": "4000",
        "LASTCALL_MODEL_URL": "scripted:?tokens=1000000&rate=20&first_token_s=0",
    }
    return Contender(name, label, argv, env=env, relays=False)


_GRACE = ("--timeout-graceful-shutdown", "2")
_SERVICE = _hypercorn("service.asgi:app")
_CONFIGURED = python_command(
    "-m", "hypercorn", "--config", "python:service.hosting.hypercorn_config", "service.asgi:app"
)

CONTENDERS: tuple[Contender, ...] = (
    _lastcall("lastcall", "Lastcall, hypercorn, 1 worker", _SERVICE, drain_timeout_s=0),
    _lastcall(
        "lastcall-2",
        "Lastcall, hypercorn, 2 workers",
        _hypercorn("service.asgi:app", workers=2),
        drain_timeout_s=0,
        workers=2,
    ),
    _lastcall("lastcall-config", "Lastcall, hypercorn with our --config", _CONFIGURED, drain_timeout_s=0),
    _lastcall("lastcall-serve", "Lastcall, just serve", python_command("-m", "service", "serve"), drain_timeout_s=0),
    _lastcall("lastcall-drain", "Lastcall, hypercorn, 1 worker, 2 s drain", _SERVICE, drain_timeout_s=2),
    _uvicorn(
        "cooperative", "sse-starlette, cooperative", "sse_starlette_cooperative", "--timeout-graceful-shutdown", "5"
    ),
    _uvicorn("sse-starlette", "sse-starlette, README", "sse_starlette_readme"),
    _uvicorn("sse-starlette-2s", "sse-starlette, README, graceful 2 s", "sse_starlette_readme", *_GRACE),
    _uvicorn("fastapi", "FastAPI, uvicorn", "fastapi_documented"),
    _uvicorn("fastapi-2s", "FastAPI, uvicorn, graceful 2 s", "fastapi_documented", *_GRACE),
    _uvicorn(
        "fastapi-plain",
        "FastAPI, plain StreamingResponse, graceful 2 s",
        "fastapi_plain",
        *_GRACE,
        keeps_sessions=True,
    ),
    _uvicorn(
        "tuned",
        "Starlette, aiohttp, orjson, uvloop, graceful 2 s",
        "tuned",
        *(*_GRACE, "--loop", "uvloop", "--http", "httptools", "--no-access-log"),
        needs=("starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "orjson"),
        keeps_sessions=True,
    ),
    _uvicorn("origin-1", "old back end, 1st", "origin", ORIGIN_VERSION="1"),
    _uvicorn("origin-1-2s", "old back end, 1st, graceful 2 s", "origin", *_GRACE, ORIGIN_VERSION="1"),
    _uvicorn("origin-2", "old back end, 2nd", "origin", ORIGIN_VERSION="2"),
    _uvicorn("origin-2-2s", "old back end, 2nd, graceful 2 s", "origin", *_GRACE, ORIGIN_VERSION="2"),
    Contender(
        "quart-trio",
        "Quart-Trio, hypercorn, 1 worker",
        _hypercorn("bench.contenders.quart_trio_plain:app"),
        store_env=("BENCH_STORE", str),
        count_replies=_count_rows,
    ),
    _alone("lastcall-alone", "Lastcall, own tokens, memory store", _SERVICE),
    _alone("lastcall-alone-config", "Lastcall, own tokens, memory store, our --config", _CONFIGURED),
    Contender("node", "floor: bare node", ["node", "bench/contenders/node_floor.mjs"], relays=False),
    Contender("trio", "floor: bare Trio", python_command("-m", "bench.contenders.trio_floor"), relays=False),
)


def choose(names: Sequence[str]) -> list[Contender]:
    """Return the named contenders, in that order; all without names. Raises KeyError for an unknown name."""
    known = {contender.name: contender for contender in CONTENDERS}
    return [known[name] for name in names] if names else list(CONTENDERS)
