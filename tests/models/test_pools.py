"""Many streams at once, and the cost of their connections."""

from collections.abc import Callable

import httpcore
import pytest
import trio

from service.models import openai_compatible
from service.models.openai_compatible import OpenAICompatibleClient, open_openai_compatible
from tests.models.replies import asking
from tests.models.upstream import WAIT_S
from tests.upstreams.raw_server import Connection, delta, open_raw_server


async def reply_for_ever(connection: Connection) -> None:
    await connection.receive_request()
    await connection.send_head()
    await connection.send_event(delta("x"))
    await connection.wait_closed()


async def run_streams(count: int, *, look: Callable[[OpenAICompatibleClient], None] = lambda _: None) -> None:
    """Begin ``count`` streams, and leave them all at once."""
    begun = 0
    all_begun = trio.Event()

    async def run(client: OpenAICompatibleClient) -> None:
        nonlocal begun
        async with client.stream(asking()) as stream:
            await stream.receive()
            begun += 1
            if begun == count:
                all_begun.set()
            await trio.sleep_forever()

    with trio.fail_after(WAIT_S):
        async with open_raw_server(reply_for_ever) as server, open_openai_compatible(server.url) as client:
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(run, client)
                await all_begun.wait()
                look(client)
                nursery.cancel_scope.cancel()
            look(client)
            await server.wait_idle()


async def test_streams_are_spread_over_pools_that_close_with_their_last_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_compatible, "_POOL_REQUESTS_MAX", 8)
    seen: list[list[int]] = []
    await run_streams(20, look=lambda client: seen.append([pool.requests for pool in client._pools._pools]))
    assert seen == [[8, 8, 4], [0]]


async def looks_at_connections(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    looks = 0
    is_closed = httpcore.AsyncHTTPConnection.is_closed

    def looked(connection: httpcore.AsyncHTTPConnection) -> bool:
        nonlocal looks
        looks += 1
        return is_closed(connection)

    with monkeypatch.context() as patch:
        patch.setattr(httpcore.AsyncHTTPConnection, "is_closed", looked)
        await run_streams(count)
    return looks


async def test_twice_the_streams_cost_about_twice_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_compatible, "_POOL_REQUESTS_MAX", 8)
    assert await looks_at_connections(80, monkeypatch) < 3 * await looks_at_connections(40, monkeypatch)


async def test_in_a_single_pool_they_still_cost_four_times_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """This test fails once httpcore's pool no longer scans all connections at each end; then one pool is enough."""
    monkeypatch.setattr(openai_compatible, "_POOL_REQUESTS_MAX", 1000)
    assert await looks_at_connections(80, monkeypatch) > 3 * await looks_at_connections(40, monkeypatch)
