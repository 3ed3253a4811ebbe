"""Both clients in ``clients/`` get through what a server and the network may do to them: one table, three drivers."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio

from tests.clients.client_driver import Job, Results
from tests.clients.drivers import DRIVERS, Drive, drive_all, in_node
from tests.clients.scenarios import (
    BOUNDS,
    HEARTBEATS,
    POST,
    SCENARIOS,
    SEEN_ALL,
    SEND,
    Exchange,
    Scenario,
    sends_while_the_client_is_held_up,
    serve_scenario,
)
from tests.upstreams.raw_server import open_raw_server

pytestmark = pytest.mark.processes

CAP_S = 180
"""Bound of a scenario; not a promise of the clients."""


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_client_gets_through_all_scenarios(driver: str) -> None:
    with trio.fail_after(CAP_S):
        await run_scenarios(DRIVERS[driver])


async def test_heartbeats_keep_a_stream_without_events() -> None:
    async def run(_: str, drive: Drive) -> None:
        await run_scenarios(drive, {"heartbeats": HEARTBEATS})

    with trio.fail_after(CAP_S):
        await drive_all(run)


async def test_events_that_came_while_the_event_loop_was_held_up_are_read_before_the_silence_counts() -> None:
    scenario = Scenario(
        [sends_while_the_client_is_held_up], [{**SEND, "block_ms": 4500}], [SEEN_ALL | {"waits": []}], [POST]
    )
    with trio.fail_after(CAP_S):
        await run_scenarios(in_node, {"held up": replace(scenario, bounds={"silence_s": 2.5})})


async def run_scenarios(drive: Drive, scenarios: Mapping[str, Scenario] = SCENARIOS) -> None:
    """Run scenarios at the same time, each with a server of its own. An error says which scenario it is of."""
    seen: dict[str, list[Exchange]] = {name: [] for name in scenarios}
    jobs: list[Job] = []
    async with AsyncExitStack() as stack:
        servers = []
        for name, scenario in scenarios.items():
            behave = partial(serve_scenario, scenario, seen=seen[name])
            server = await stack.enter_async_context(open_raw_server(behave))
            servers.append(server)
            bounds = {**BOUNDS, **scenario.bounds}
            jobs.append(Job(f"{server.url}{scenario.prefix}", scenario.steps, bounds, scenario.options))
        results = await drive(jobs)
        for server in servers:
            await server.wait_idle()  # the client has closed all connections
    for (name, scenario), had in zip(scenarios.items(), results, strict=True):
        try:
            check(had, seen[name], scenario)
        except Exception as error:
            error.add_note(f"the scenario: {name}")
            raise


def check(results: Results, seen: Sequence[Exchange], scenario: Scenario) -> None:
    for result, expected in zip(results, scenario.expect, strict=True):
        check_result(result, expected)
    check_requests(seen, scenario)


def check_result(result: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare a result with what was expected of it. ``waits_at_least`` and the like look at the pauses."""
    if "error" not in expected:
        assert "error" not in result
    for name, value in expected.items():
        match name:
            case "error":
                assert {it: result["error"][it] for it in value} == value
            case "wait_codes":
                assert [code for _, code in result["waits"]] == value
            case "wait_kinds":
                assert {code for _, code in result["waits"]} == value
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
