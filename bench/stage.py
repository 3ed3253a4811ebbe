"""The setup of a scenario: a server under test, a model server behind it, and a load client."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from bench.contenders import CHAT, COMPLETIONS, RESPONSES, Contender
from bench.peers import LoadClient, UpstreamProcess, open_load, open_upstream
from bench.plan import Group, Plan, Request, Streams
from bench.server_process import ServerProcess, open_server

OPENING_MAX_S = 60.0


@dataclass(frozen=True)
class Place:
    """The cores of the processes, and the folder for their logs and stores."""

    folder: Path
    server_cpus: str | None
    client_cpus: str | None


@dataclass(frozen=True)
class Stage:
    """The running processes of a scenario."""

    place: Place
    upstream: UpstreamProcess
    server: ServerProcess
    store: Path  # the path of the contender's store, if it has one

    @asynccontextmanager
    async def open_load(self, *groups: Group, opening_max_s: float = OPENING_MAX_S) -> AsyncIterator[LoadClient]:
        """Open a load, and wait until all its clients are ready or have failed, for at most so long."""
        async with open_load(Plan(port=self.server.port, groups=groups), cpus=self.place.client_cpus) as load:
            with trio.move_on_after(opening_max_s):
                await load.wait_ready()
            yield load


@asynccontextmanager
async def open_stage(contender: Contender, place: Place, **settings: str) -> AsyncIterator[Stage]:
    """Start a contender, with more settings than its own, and its model server.

    Raises:
        ServerFailedError: The contender does not start.
    """
    prepared = replace(contender, env={**contender.env, **settings})
    path = place.folder / f"{contender.name}-{os.urandom(4).hex()}"
    store = path.with_suffix(".db")
    async with open_upstream(cpus=place.client_cpus) as upstream:
        launch = prepared.launch(upstream_url=upstream.url, store=store, cpus=place.server_cpus)
        async with open_server(launch, log_path=path.with_suffix(".log")) as server:
            yield Stage(place, upstream, server, store)


def chat_streams(name: str, count: int, message: str, *, path: str = CHAT, **options: object) -> Streams:
    """Streams on ``/chat`` or on another path; the message is ``NAME$n`` and words for the model server.

    On a path of OpenAI's API the reply must not end: the events of an end repeat its text.
    """
    request = Request(path=path, headers={"Accept": "text/event-stream"}, body=_body(path, f"{name}$n {message}"))
    return msgspec.structs.replace(Streams(name=name, count=count, stream=request), **options)


def direct_streams(name: str, count: int, message: str, **options: object) -> Streams:
    """Streams that ask the model server itself."""
    request = Request(path=COMPLETIONS, body=_body(COMPLETIONS, f"{name}$n {message}"))
    return msgspec.structs.replace(Streams(name=name, count=count, stream=request), **options)


def _body(path: str, message: str) -> str:
    """The body of a request for a stream on this path."""
    streamed = {"model": "bench", "stream": True}
    bodies: dict[str, dict[str, object]] = {
        CHAT: {"message": message},
        RESPONSES: {**streamed, "input": message},
        COMPLETIONS: {**streamed, "messages": [{"role": "user", "content": message}]},
    }
    return msgspec.json.encode(bodies[path]).decode()


@asynccontextmanager
async def open_direct_load(
    upstream: UpstreamProcess, place: Place, *groups: Group, opening_max_s: float = OPENING_MAX_S
) -> AsyncIterator[LoadClient]:
    """Open a load on the model server itself: the control of every scenario about delay. As ``Stage.open_load``."""
    async with open_load(Plan(port=upstream.port, groups=groups), cpus=place.client_cpus) as load:
        with trio.move_on_after(opening_max_s):
            await load.wait_ready()
        yield load
