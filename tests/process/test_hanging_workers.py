"""A worker that is stopped and not dead, and a worker that was stopped itself: what waits for another worker."""

import json
import signal
from pathlib import Path

import httpx
import pytest
import trio

from tests.process.clients import Stream, open_client, owner_of, wait_until
from tests.process.lastcall import CONFIGURED_2, open_lastcall, reports, wait_gone
from tests.process.test_workers import (
    SLOW,
    assert_turns_wait_for_their_clients,
    forwarded_turns,
    halted,
    on_file,
    reaching_others,
    state_of,
)

pytestmark = pytest.mark.parallel

LISTENING_S = 1.5
"""After this time the workers listen to each other's beats."""
FROZEN_S = 4.5
"""Longer than an owner may be silent."""


async def test_what_waits_for_a_worker_that_hangs_is_answered_and_goes_on_once_the_worker_does(tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, **on_file(tmp_path, model_url=SLOW)) as server,
        open_client(server) as [client],
    ):
        async with trio.open_nursery() as nursery:
            _, streams, own = await forwarded_turns(server, client, tmp_path, nursery)
            own.scope.cancel()
            session, stream = next(iter(streams.items()))
            [owner] = {owner_of(tmp_path / "lastcall.db", session) for session in streams}

            async def wait_for_turn() -> None:
                body = {"input": "x", "on_conflict": "queue"}
                answers.append(await client.post(f"{session}/turns", json=body))

            async def is_queued() -> bool:
                turns = (await client.get(f"{session}/turns")).json()["data"]
                return bool(turns[-1]["state"] == "queued")

            async def nothing_waits() -> bool:
                return not nursery.child_tasks

            async def is_heard_again() -> bool:
                return (await client.get(answers[0].headers["Location"])).status_code == 200

            async with reaching_others(server, tmp_path, session, method="POST", requests=1):
                nursery.start_soon(wait_for_turn)
            await wait_until(is_queued)
            await trio.sleep(LISTENING_S)
            async with halted(owner, tmp_path):
                await wait_until(nothing_waits)
                events = f"{session}/turns/{stream.events[0]['turn_id']}/events?after={stream.seqs[-1]}"
                refused = await client.get(events)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert {stream.end[0] for stream in streams.values()} == {"turn.delta"}
        [answer] = answers
        assert (answer.status_code, answer.json()["code"]) == (504, "owner_hangs")
        await wait_until(is_heard_again)  # until then the answer is 503
        assert await state_of(client, answer.headers["Location"]) == ("queued", None)
        await assert_turns_wait_for_their_clients(client, streams)
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert "Traceback" not in server.log()
    assert all(report["faults"] == [] for report in reports(server))


async def test_a_worker_that_was_frozen_itself_passes_the_streams_of_others_on_as_before(tmp_path: Path) -> None:
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, **on_file(tmp_path, model_url=SLOW)) as server,
        open_client(server) as [client],
    ):
        async with trio.open_nursery() as nursery:
            frozen, streams, _ = await forwarded_turns(server, client, tmp_path, nursery)
            await trio.sleep(LISTENING_S)
            async with halted(frozen, tmp_path):
                await trio.sleep(FROZEN_S)
            seen = [len(stream.events) for stream in streams.values()]

            async def all_go_on() -> bool:
                more = [len(stream.events) - before for stream, before in zip(streams.values(), seen, strict=True)]
                return min(more) > 10 * FROZEN_S

            await wait_until(all_go_on)
            for session, stream in streams.items():
                assert (await client.post(f"{session}/turns/{stream.events[0]['turn_id']}/cancel")).status_code == 200
            await wait_until(lambda: all_ended(list(streams.values())))
            nursery.cancel_scope.cancel()
        for stream in streams.values():
            assert stream.end == ("turn.cancelled", "requested")
            assert stream.seqs == list(range(1, len(stream.seqs) + 1))
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    silent = [line for line in server.log().splitlines() if "another worker hangs" in line]
    assert frozen not in [json.loads(line)["pid"] for line in silent]


async def all_ended(streams: list[Stream]) -> bool:
    return all(stream.end[0] == "turn.cancelled" for stream in streams)
