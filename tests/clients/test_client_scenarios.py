"""Both clients in ``clients/`` get through what a server and the network may do to them: one table, three drivers."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import trio

from tests.clients.drivers import Drive, drive_all
from tests.clients.scenarios import BOUNDS, SCENARIOS, Exchange, Scenario, serve_scenario
from tests.upstreams.raw_server import Connection, open_raw_server

CAP_S = 40
"""Bound of a scenario; not a promise of the clients."""


@pytest.mark.parametrize("name", SCENARIOS)
async def test_each_client_gets_through(name: str) -> None:
    scenario = SCENARIOS[name]

    async def run(_: str, drive: Drive) -> None:
        seen: list[Exchange] = []

        async def behave(connection: Connection) -> None:
            await serve_scenario(scenario, connection, seen)

        async with open_raw_server(behave) as server:
            bounds = {**BOUNDS, **scenario.bounds}
            results = await drive(f"{server.url}{scenario.prefix}", scenario.steps, bounds, scenario.options)
            await server.wait_idle()  # the client has closed all connections
        for result, expected in zip(results, scenario.expect, strict=True):
            check_result(result, expected)
        check_requests(seen, scenario)

    with trio.fail_after(CAP_S):
        await drive_all(run)


def check_result(result: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare a result with what was expected of it. ``waits_at_least`` and the like look at the pauses."""
    if "error" not in expected:
        assert "error" not in result
    for name, value in expected.items():
        match name:
            case "error":
                assert {it: result["error"][it] for it in value} == value
            case "wait_codes":
                assert len(result["waits"]) == len(value)
                assert all(code in one.split("|") for (_, code), one in zip(result["waits"], value, strict=True))
            case "waits_at_least":
                assert all(delay_s >= value for delay_s, _ in result["waits"])
            case "waits_at_most":
                assert all(delay_s <= value for delay_s, _ in result["waits"])
            case "retry_after_at_least":
                assert result["error"]["retry_after_s"] >= value
            case "text_length":
                assert len(result["text"]) == value
            case _:
                assert result[name] == value, name


def check_requests(seen: Sequence[Exchange], scenario: Scenario) -> None:
    """Check what the server was sent."""
    if scenario.requests is not None:
        assert [f"{it.request.method} {it.request.target}" for it in seen] == list(scenario.requests)
    for number, headers in scenario.headers.items():
        had = seen[number].request.headers
        assert {name: had.get(name) for name in headers} == headers
    posts = [it.request for it in seen if it.request.method == "POST"]
    assert len(posts) > 1 or not (scenario.same or scenario.differ)
    for name in scenario.differ:
        assert len({post.headers[name] for post in posts}) == len(posts)
    for name in scenario.same:
        assert len({(post.headers[name], post.body) for post in posts}) == 1
