"""A raw server and the real client of it, opened together."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import trio
import trustme

from service.clock import Clock, wall_clock
from service.errors import ModelError
from service.models.client import ModelClient
from service.models.http.read_poller import open_read_poller
from service.models.openai_compatible import OpenAICompatibleClient, open_openai_compatible
from tests.models.replies import Reply, asking, take
from tests.upstreams.raw_server import Behaviour, RawServer, open_raw_server

WAIT_S = 60
"""Bound on every wait: long enough for a busy machine; no passing test waits so long."""
API_KEY = "sk-4f7a9c2b-do-not-show"


@dataclass
class Upstream:
    server: RawServer
    client: ModelClient


class Wire:
    """How the servers of a test are reached: with TLS or without. Tests that open an upstream run over both."""

    has_tls = False


@cache
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's side of TLS, with an authority that only they know."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@asynccontextmanager
async def open_pair(behave: Behaviour, **options: Any) -> AsyncIterator[tuple[RawServer, OpenAICompatibleClient]]:
    """A server and its client, over the wire of this test."""
    for_server, for_client = tls_contexts() if Wire.has_tls else (None, None)
    path = options.pop("path", "")
    async with (
        open_raw_server(behave, ssl_context=for_server) as server,
        open_read_poller() as poller,
        open_openai_compatible(server.url + path, ssl_context=for_client, poller=poller, **options) as client,
    ):
        yield server, client


@asynccontextmanager
async def open_upstream(behave: Behaviour, *, path: str = "", clock: Clock = wall_clock) -> AsyncIterator[Upstream]:
    """On exit it checks that the client left no connection open, and that the server saw the end of each."""
    for_server, for_client = tls_contexts() if Wire.has_tls else (None, None)
    with trio.fail_after(WAIT_S):
        async with open_raw_server(behave, ssl_context=for_server) as server:
            url = server.url + path
            async with (
                open_read_poller() as poller,
                open_openai_compatible(
                    url, api_key=API_KEY, clock=clock, ssl_context=for_client, poller=poller
                ) as client,
            ):
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
