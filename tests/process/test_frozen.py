"""A server that is stopped by SIGSTOP for longer than its deadlines, while a model server and clients go on."""

import signal
from pathlib import Path
from typing import Any

import httpx
import trio

from bench.peers import open_upstream
from tests.process.clients import Stream, all_begun, new_session, start
from tests.process.lastcall import CAP_S, SERVE, assert_clean, open_lastcall, wait_gone

DEADLINES: dict[str, Any] = {
    "first_token_timeout_s": 4,
    "next_token_timeout_s": 4,
    "turn_timeout_s": 6,
    "store_timeout_s": 4,
    "disconnect_grace_s": 4,
}
FROZEN_S = 6.2
"""Longer than each of the deadlines, which are seconds longer than what they bound takes on a quiet machine."""


async def test_turns_go_on_whose_tokens_came_in_a_freeze(tmp_path: Path) -> None:
    async with (
        open_upstream() as upstream,
        open_lastcall(SERVE, tmp_path, model_url=upstream.url, **DEADLINES) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=4 * CAP_S) as client,
        trio.open_nursery() as nursery,
    ):
        streamed, left, silent = Stream(), Stream(), Stream()
        sessions = {}
        for stream, said in ((streamed, "tokens=30"), (left, "tokens=50"), (silent, "silent_after=3")):
            session = sessions[stream] = await new_session(client, said.partition("=")[2])
            nursery.start_soon(stream.run, client, "POST", f"{session}/turns", {"input": f"rate=20 {said}"})
        background = await start(client, await new_session(client, "b"), input="rate=20 tokens=45")
        await all_begun([streamed, left, silent])
        left.scope.cancel()
        server.signal_group(signal.SIGSTOP)
        await trio.sleep(FROZEN_S)  # the freeze
        server.signal_group(signal.SIGCONT)
        with trio.fail_after(CAP_S):
            [turn] = (await client.get(f"{sessions[left]}/turns")).json()["data"]
            back = Stream()
            await back.run(client, "GET", f"{sessions[left]}/turns/{turn['id']}/events")
            assert back.end[0] == "turn.completed", "the client was in time again"
            quiet = Stream()
            await quiet.run(client, "GET", f"{background}/events")
            assert quiet.end[0] == "turn.completed", quiet.events[-1]
            while streamed.end[0] != "turn.completed" or silent.end[0] != "turn.failed":  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert silent.events[-1]["error"]["code"] == "next_token_timeout", "the quiet stream had no unread data"


async def test_a_frozen_server_that_is_to_stop_stops_within_its_bound_once_it_goes_on(tmp_path: Path) -> None:
    bounds: dict[str, Any] = {"drain_timeout_s": 0.5, "cleanup_timeout_s": 1.5, "release_timeout_s": 1}
    bounds["shutdown_timeout_s"] = 4
    async with open_upstream() as upstream, open_lastcall(SERVE, tmp_path, model_url=upstream.url, **bounds) as server:
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=4 * CAP_S) as client,
            trio.open_nursery() as nursery,
        ):
            stream = Stream()
            turns = f"{await new_session(client, 's')}/turns"
            nursery.start_soon(stream.run, client, "POST", turns, {"input": "rate=20"})
            await stream.begun.wait()
            server.signal_group(signal.SIGSTOP)
            await trio.sleep(4.5)  # the freeze
            server.signal_main(signal.SIGTERM)
            server.signal_group(signal.SIGCONT)
            gone = await wait_gone(server)
        assert stream.end == ("turn.interrupted", "shutdown")
        assert_clean(SERVE, server, gone)  # a watchdog that counts real time would have ended the server with 70
