"""What the client in Python promises beyond the scenarios that it shares with the one in JavaScript."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import trio
from lastcall_client import Client, Waiting

from tests.clients.scenarios import (
    RETRY,
    STARTED,
    TEXT,
    TURN,
    WHOLE,
    Act,
    Exchange,
    Scenario,
    hangs,
    no_answer,
    replays,
    says,
    serve_scenario,
)
from tests.httpx_bodies import HTTPX_OWN
from tests.upstreams.raw_server import Connection, RawServer, open_raw_server

CAP_S = 60
"""Bound of a test; not a promise of the client."""


@asynccontextmanager
async def open_acting(*acts: Act) -> AsyncIterator[tuple[RawServer, list[Exchange]]]:
    """A server that does these acts, and what it was asked."""
    seen: list[Exchange] = []
    with trio.fail_after(CAP_S):
        async with open_raw_server(partial(serve_scenario, Scenario(acts, [], []), seen=seen)) as server:
            yield server, seen


async def test_a_loop_that_is_left_without_a_word_is_closed_with_the_client() -> None:
    async with open_acting(hangs(RETRY + STARTED)) as (server, _):
        async with Client(server.url) as client:
            async for event in client.stream("me", "Hi"):
                assert event.type == "turn.started"
                break
            assert server.connections_open == 1
        await server.wait_idle()


async def test_a_read_that_was_cancelled_closes_the_connection_and_the_next_one_goes_on() -> None:
    waits: list[Waiting] = []
    async with open_acting(hangs(RETRY + STARTED), replays(WHOLE)) as (server, seen):
        async with Client(server.url, on_wait=waits.append) as client, client.stream("me", "Hi") as stream:
            await anext(stream)
            with trio.move_on_after(0):
                await anext(stream)
            await seen[0].closed.wait()
            assert [event.seq async for event in stream] == [2, 3, 4]
            assert stream.text == TEXT
        assert seen[1].request.headers["last-event-id"] == "1"
        assert waits == []


async def test_more_streams_than_httpx_has_connections_for_hold_up_no_call() -> None:
    count = 101  # one more than httpx opens by itself
    acts = [hangs(RETRY + STARTED)] * count
    async with open_acting(*acts, says({"id": "me"})) as (server, _), Client(server.url) as client:
        streams = [client.stream("me", "Hi") for _ in range(count)]
        for stream in streams:
            await anext(stream)
        assert (await client.get_session("me"))["id"] == "me"


async def test_an_httpx_client_of_the_caller_stays_open_and_the_key_is_asked_for_before_each_request() -> None:
    keys = iter(["first", "second"])
    async with open_acting(says({"id": "me"})) as (server, seen), httpx.AsyncClient() as http:
        async with Client(server.url, http=http, api_key=lambda: next(keys)) as client:
            await client.get_session("me")
            await client.get_session("me")
        assert not http.is_closed
        assert [it.request.headers["authorization"] for it in seen] == ["Bearer first", "Bearer second"]


async def test_a_turn_is_not_cancelled_before_the_stream_knows_it() -> None:
    async with open_acting(hangs(RETRY + STARTED)) as (server, seen), Client(server.url) as client:
        stream = client.stream("me", "Hi")
        try:
            await stream.cancel()
        except RuntimeError:
            assert seen == []
        else:
            raise AssertionError("a turn that is not known was cancelled")
        await anext(stream)
        assert (stream.session_id, stream.turn_id) == ("me", TURN)


async def test_a_call_that_breaks_off_within_its_body_leaves_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks_off(connection: Connection) -> None:
        await connection.stream.receive_some(1)
        if connection.number == 0:
            connection.reset_when_closed()
        else:
            scope.cancel()
            await trio.sleep_forever()

    monkeypatch.setattr(httpx.ByteStream, "__aiter__", HTTPX_OWN)
    waits: list[Waiting] = []
    with trio.fail_after(CAP_S):
        async with open_raw_server(breaks_off) as server, Client(server.url, on_wait=waits.append) as client:
            with trio.CancelScope() as scope:
                await client.start_turn("me", "x" * 16_000_000)
            assert scope.cancelled_caught
    assert [it.error.code for it in waits] == ["unreachable"]


async def test_a_body_is_sent_whole_in_each_attempt() -> None:
    acts = [no_answer, says({"id": TURN})]
    async with open_acting(*acts) as (server, seen), Client(server.url) as client:
        await client.start_turn("me", "Grüße")
    assert [it.request.json["input"] for it in seen] == ["Grüße"] * 2
