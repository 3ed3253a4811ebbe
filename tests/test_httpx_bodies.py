"""The body of an httpx request in tests, and what httpx does by itself."""

import gc

import httpx
import pytest
import trio

from tests.httpx_bodies import HTTPX_OWN
from tests.upstreams.raw_server import Connection, open_raw_server

CAP_S = 60
"""Bound of a test."""
LONG = b"x" * 16_000_000
"""A body that no socket's buffers hold."""


async def resets_within_the_body(connection: Connection) -> None:
    await connection.stream.receive_some(1)
    connection.reset_when_closed()


async def break_off_within_a_body() -> None:
    with trio.fail_after(CAP_S):
        async with open_raw_server(resets_within_the_body) as server, httpx.AsyncClient() as client:
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await client.post(server.url, content=LONG)
    gc.collect()


async def test_a_request_that_breaks_off_within_its_body_leaves_no_generator() -> None:
    await break_off_within_a_body()


async def test_httpx_itself_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.ByteStream, "__aiter__", HTTPX_OWN)
    with pytest.warns(ResourceWarning, match="ByteStream.__aiter__"):
        await break_off_within_a_body()


async def test_a_body_is_sent_whole_each_time() -> None:
    body = httpx.ByteStream("two times, ünd whole".encode())
    for _ in range(2):
        assert b"".join([piece async for piece in body]) == "two times, ünd whole".encode()
