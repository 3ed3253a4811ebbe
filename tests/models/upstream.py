"""A raw server and the real client of it, opened together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from service.clock import Clock, wall_clock
from service.errors import ModelError
from service.models.client import ModelClient
from service.models.openai_compatible import open_openai_compatible
from tests.models.replies import Reply, asking, take
from tests.upstreams.raw_server import Behaviour, RawServer, open_raw_server

WAIT_S = 20
"""Bound on every wait: long enough for a busy machine; no passing test waits so long."""
API_KEY = "sk-4f7a9c2b-do-not-show"


@dataclass
class Upstream:
    server: RawServer
    client: ModelClient


@asynccontextmanager
async def open_upstream(behave: Behaviour, *, path: str = "", clock: Clock = wall_clock) -> AsyncIterator[Upstream]:
    """On exit it checks that the client left no connection open, and that the server saw the end of each."""
    with trio.fail_after(WAIT_S):
        async with open_raw_server(behave) as server:
            async with open_openai_compatible(server.url + path, api_key=API_KEY, clock=clock) as client:
                yield Upstream(server, client)
            assert server.established == 0
            await server.wait_idle()


async def failure_of(client: ModelClient, reply: Reply | None = None) -> ModelError:
    """Ask, expect a failure and return its error; ``reply`` gets the events from before the error."""

    async def ask() -> None:
        async with client.stream(asking()) as stream:
            await take(stream, reply)

    with trio.fail_after(WAIT_S), pytest.raises(ModelError) as caught:
        await ask()
    assert API_KEY not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()
    return caught.value
