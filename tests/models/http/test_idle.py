"""The connections that wait for a next request."""

import trio
from trio.testing import MockClock

from service.models.http.idle import IdleConnections
from tests.models.http.scripted_connection import ScriptedConnection


def some(count: int) -> list[ScriptedConnection]:
    return [ScriptedConnection() for _ in range(count)]


async def test_the_last_one_is_used_first_and_one_too_many_closes_the_oldest() -> None:
    idle = IdleConnections(connections_max=2, expiry_s=4)
    _, second, third = added = some(3)
    for connection in added:
        idle.add(connection)
    assert [connection.is_closed for connection in added] == [True, False, False]
    assert [idle.take(), idle.take(), idle.take()] == [third, second, None]
    assert [connection.is_closed for connection in added] == [True, False, False]


async def test_expired_connections_are_closed_when_one_is_added_or_taken(mock_clock: MockClock) -> None:
    idle = IdleConnections(connections_max=9, expiry_s=4)
    first, second, third = some(3)
    idle.add(first)
    mock_clock.jump(2)
    idle.add(second)
    mock_clock.jump(2)
    idle.add(third)
    assert [connection.is_closed for connection in (first, second, third)] == [True, False, False]
    mock_clock.jump(4)
    assert idle.take() is None
    assert second.is_closed
    assert third.is_closed


async def test_a_connection_that_its_peer_has_ended_is_closed_and_the_next_one_is_taken() -> None:
    idle = IdleConnections(connections_max=9, expiry_s=4)
    well, ended = some(2)
    ended.is_fine = False
    idle.add(well)
    idle.add(ended)
    assert idle.take() is well
    assert ended.is_closed


async def test_closing_closes_all() -> None:
    idle = IdleConnections(connections_max=9, expiry_s=4)
    added = some(3)
    for connection in added:
        idle.add(connection)
    idle.close()
    assert all(connection.is_closed for connection in added)
    assert idle.take() is None
    await trio.lowlevel.checkpoint()
