"""Several processes on one database: whichever a connection lands on, the answer is the owner's."""

import json
import os
import signal
import socket
import sqlite3
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.server_process import ServerProcess
from tests.process.lastcall import (
    CAP_S,
    HYPERCORN_2,
    HYPERCORN_4,
    SERVE,
    SSE,
    Host,
    assert_clean,
    assert_log_is_clean,
    open_lastcall,
    wait_gone,
)

CONFIGURED_2 = Host("configured-2", 2, config="python:service.hosting.hypercorn_config")
SLOW = "scripted:?tokens=10000&rate=20"
MANY = 12


@asynccontextmanager
async def open_client(*servers: ServerProcess) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client of each server, with a new connection for each request."""
    async with AsyncExitStack() as clients:
        yield [
            await clients.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{server.port}",
                    timeout=CAP_S,
                    limits=httpx.Limits(max_keepalive_connections=0),
                )
            )
            for server in servers
        ]


async def new_session(client: httpx.AsyncClient, session_id: str) -> str:
    assert (await client.post("/sessions", json={"id": session_id})).status_code == 201
    return f"/sessions/{session_id}"


async def start(client: httpx.AsyncClient, session: str, **fields: Any) -> str:
    """Start a turn in the background; its path."""
    started = await client.post(f"{session}/turns", json={"input": "go", "background": True, **fields})
    assert started.status_code == 202, started.text
    return started.headers["location"]


class Stream:
    """What one client sees of a turn."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.begun = trio.Event()
        self.scope = trio.CancelScope()

    async def run(self, client: httpx.AsyncClient, method: str, path: str, body: object = None) -> None:
        """Read it to its end, or until ``scope`` is cancelled: the client leaves then."""
        with self.scope:
            async with client.stream(method, path, json=body, headers=SSE) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        self.events.append(json.loads(line.removeprefix("data: ")))
                        if self.events[-1]["type"] == "turn.delta":
                            self.begun.set()

    @property
    def end(self) -> tuple[str, str | None]:
        return self.events[-1]["type"], self.events[-1].get("reason")

    @property
    def seqs(self) -> list[int]:
        return [event["seq"] for event in self.events]


async def all_begun(streams: list[Stream]) -> None:
    for stream in streams:
        await stream.begun.wait()


def forwarded(server: ServerProcess, session: str, method: str = "GET") -> int:
    """How many such requests about a session were passed on to its owner."""
    lines = [json.loads(line) for line in server.log().splitlines() if "asking the owner" in line]
    return sum((line["session_id"], line["method"]) == (session.rpartition("/")[2], method) for line in lines)


def owner_of(path: Path, session: str) -> int:
    """The process that runs a session's turns: the one that listens at the address that its owner left."""
    with closing(sqlite3.connect(path)) as db:
        query = "SELECT address FROM sessions JOIN owners ON fence = owner WHERE id = ?"
        (address,) = db.execute(query, (session.rpartition("/")[2],)).fetchone()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"\0{address[1:]}")
        return int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


@asynccontextmanager
async def reaching_others(
    server: ServerProcess, folder: Path, session: str, method: str = "GET", *, requests: int
) -> AsyncIterator[None]:
    """Have other workers accept the requests that are begun inside, and pass them on: the session's owner is halted."""
    owner = owner_of(folder / "lastcall.db", session)
    before = forwarded(server, session, method)
    os.kill(owner, signal.SIGSTOP)
    try:
        yield

        async def passed_on() -> bool:
            return forwarded(server, session, method) - before >= requests

        await wait_until(passed_on)
    finally:
        os.kill(owner, signal.SIGCONT)


def on_file(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"store_url": f"sqlite:{folder}/lastcall.db", "log_level": "debug", "drain_timeout_s": 0} | settings


async def state_of(client: httpx.AsyncClient, turn: str) -> tuple[str, str | None]:
    record = (await client.get(turn)).json()
    return record["state"], record["reason"]


async def are(client: httpx.AsyncClient, session: str, states: list[str]) -> bool:
    turns = (await client.get(f"{session}/turns")).json()["data"]
    return [f"{turn['state']} {turn['reason']}" for turn in turns] == states


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(CAP_S):
        while not await condition():  # noqa: ASYNC110  it is in another process
            await trio.sleep(0.02)


@pytest.mark.parametrize("host", [HYPERCORN_2, HYPERCORN_4], ids=str)
async def test_every_worker_streams_every_event_and_the_end(tmp_path: Path, host: Host) -> None:
    settings = on_file(tmp_path, model_url="scripted:?tokens=30&rate=20")
    async with open_lastcall(host, tmp_path, **settings) as server, open_client(server) as [client]:
        session = await new_session(client, "s")
        turn = await start(client, session)
        streams = [Stream() for _ in range(MANY)]
        texts = []
        async with trio.open_nursery() as nursery:
            async with reaching_others(server, tmp_path, session, requests=MANY):
                for stream in streams:
                    nursery.start_soon(stream.run, client, "GET", f"{turn}/events")
            await all_begun(streams)
            for _ in range(MANY):
                record = (await client.get(turn)).json()
                assert record["state"] == "running"
                texts.append(record["text"])
        assert all(len(one) <= len(next_one) for one, next_one in pairwise(texts)), texts
        assert texts[-1]
        assert {json.dumps(stream.events) for stream in streams} == {json.dumps(streams[0].events)}
        assert streams[0].end == ("turn.completed", None)
        assert streams[0].seqs == list(range(1, 33))
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(host, server, gone)


async def test_any_worker_decides_about_a_session(tmp_path: Path) -> None:
    """Conflicts, queue, supersede, cancel and delete."""
    async with (
        open_lastcall(HYPERCORN_4, tmp_path, **on_file(tmp_path, model_url=SLOW)) as server,
        open_client(server) as [client],
    ):
        session = await new_session(client, "s")
        first = await start(client, session)

        async def be_refused() -> None:
            refused = await client.post(f"{session}/turns", json={"input": "x"})
            assert (refused.status_code, refused.json()["code"]) == (409, "turn_in_progress")

        async with (
            trio.open_nursery() as nursery,  # the outer one: they are answered once the owner goes on
            reaching_others(server, tmp_path, session, "POST", requests=MANY),
        ):
            for _ in range(MANY):
                nursery.start_soon(be_refused)
        queued = [await start(client, session, on_conflict="queue") for _ in range(8)]
        refused = await client.post(f"{session}/turns", json={"input": "x", "on_conflict": "queue"})
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert [turn["state"] for turn in (await client.get(f"{session}/turns")).json()["data"]] == [
            "running",
            *["queued"] * 8,
        ]
        for turn in queued[:4]:
            cancelled = await client.post(f"{turn}/cancel")
            assert (cancelled.json()["state"], cancelled.json()["reason"]) == ("cancelled", "requested")
        latest = first
        for _ in range(4):
            latest = await start(client, session, on_conflict="supersede")
        assert {await state_of(client, turn) for turn in (first, *queued[4:])} == {("cancelled", "superseded")}
        assert await state_of(client, latest) == ("running", None)

        stream, deletions = Stream(), []

        async def delete() -> None:
            deletions.append((await client.delete(session)).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.run, client, "GET", f"{latest}/events")
            await stream.begun.wait()
            for _ in range(4):
                nursery.start_soon(delete)
        assert stream.end == ("turn.cancelled", "session_deleted")
        assert 204 in deletions
        assert set(deletions) <= {204, 404}
        assert (await client.get(latest)).status_code == 404
        assert await new_session(client, "s")
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(HYPERCORN_4, server, gone)


async def test_a_client_that_leaves_any_worker_cancels_its_turn(tmp_path: Path) -> None:
    async with (
        open_lastcall(HYPERCORN_2, tmp_path, **on_file(tmp_path, model_url=SLOW)) as server,
        open_client(server) as [client],
    ):
        for name, headers in (("streaming", SSE), ("waiting", {})):
            session = await new_session(client, name)
            await start(client, session)
            async with trio.open_nursery() as nursery:
                body = {"input": "x", "on_conflict": "queue"}
                async with reaching_others(server, tmp_path, session, "POST", requests=8):
                    for _ in range(8):
                        nursery.start_soon(partial(client.post, f"{session}/turns", json=body, headers=headers))
                await wait_until(partial(are, client, session, ["running None", *["queued None"] * 8]))
                nursery.cancel_scope.cancel()
            await wait_until(partial(are, client, session, ["running None", *["cancelled disconnected"] * 8]))
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(HYPERCORN_2, server, gone)


@pytest.mark.parametrize(
    ("drain_timeout_s", "model_url", "end"),
    [
        (0, SLOW, ("turn.interrupted", "shutdown")),
        (8, "scripted:?tokens=50&rate=20", ("turn.completed", None)),
    ],
)
async def test_a_stop_ends_what_is_passed_on(
    tmp_path: Path, drain_timeout_s: float, model_url: str, end: tuple[str, str | None]
) -> None:
    settings = on_file(tmp_path, drain_timeout_s=drain_timeout_s, model_url=model_url)
    streams, answers = [Stream() for _ in range(3 * MANY)], []
    async with (
        open_lastcall(HYPERCORN_4, tmp_path, **settings) as server,
        open_client(server) as [client],
        trio.open_nursery() as nursery,
    ):
        for index in range(3):
            session = await new_session(client, f"s{index}")
            turn = await start(client, session)
            async with reaching_others(server, tmp_path, session, requests=MANY):
                for stream in streams[index::3]:
                    nursery.start_soon(stream.run, client, "GET", f"{turn}/events")
        session = await new_session(client, "waited")
        waited = await start(client, session)

        async def wait() -> None:
            answers.append((await client.post("/sessions/waited/turns", json=queue)).json())

        queue = {"input": "x", "on_conflict": "queue"}
        async with reaching_others(server, tmp_path, session, "POST", requests=8):
            for _ in range(8):
                nursery.start_soon(wait)
        await all_begun(streams)

        async def all_queued() -> bool:
            return len((await client.get("/sessions/waited/turns")).json()["data"]) == 9

        await wait_until(all_queued)
        assert await state_of(client, waited) == ("running", None)
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert {stream.end for stream in streams} == {end}
    assert all(stream.seqs == list(range(1, len(stream.seqs) + 1)) for stream in streams)
    assert {(answer.get("state"), answer.get("reason")) for answer in answers} == {("interrupted", "shutdown")}
    assert_clean(HYPERCORN_4, server, gone)


async def test_the_death_of_a_worker_ends_its_own_turns_and_no_others(tmp_path: Path) -> None:
    settings = on_file(tmp_path, model_url=SLOW)
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server, open_client(server) as [client]:
        turns: dict[str, str] = {}
        owners: dict[str, int] = {}
        while len(set(owners.values())) < 2 or len(turns) < 6:
            session = await new_session(client, f"s{len(turns)}")
            turns[session] = await start(client, session)
            owners[session] = owner_of(tmp_path / "lastcall.db", session)
        victim = owners["/sessions/s0"]
        streams = {(session, n): Stream() for session in turns for n in range(4)}
        async with trio.open_nursery() as nursery:
            for (session, _), stream in streams.items():
                # A client of the victim itself just loses its connection.
                nursery.start_soon(until_cut, stream, client, f"{turns[session]}/events")
            await all_begun(list(streams.values()))
            await trio.sleep(1.2)  # some of what they have seen is in a checkpoint, some is not
            os.kill(victim, signal.SIGKILL)
            lost = [session for session in turns if owners[session] == victim]

            async def all_recovered() -> bool:
                states = {await state_of(client, turns[session]) for session in lost}
                return states == {("interrupted", "crash")}

            await wait_until(all_recovered)
            for session, turn in turns.items():
                if session not in lost:
                    assert await state_of(client, turn) == ("running", None)
            for session in lost:
                assert await start(client, session)
            ended = [stream for (session, _), stream in streams.items() if session in lost and stream.events]
            await wait_until(partial(any_ended, ended))
            for session in turns:
                assert (await client.delete(session)).status_code == 204
        told = [stream for stream in ended if stream.end[0] == "turn.interrupted"]
        assert told, "no stream of the victim's turns came through another worker"
        for stream in told:
            assert stream.end == ("turn.interrupted", "crash")
            assert stream.seqs[:-1] == list(range(1, len(stream.seqs)))
            assert stream.seqs[-1] > len(stream.seqs)
        others = [stream for (session, _), stream in streams.items() if session not in lost]
        assert {stream.end for stream in others if stream.end[0] != "turn.delta"} == {
            ("turn.cancelled", "session_deleted")
        }
        with trio.fail_after(CAP_S):
            await server.wait_logged("another one takes its place")
            await server.wait_logged("Running on ", times=3)
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)


async def until_cut(stream: Stream, client: httpx.AsyncClient, path: str) -> None:
    try:
        await stream.run(client, "GET", path)
    except httpx.RemoteProtocolError:
        pass


async def any_ended(streams: list[Stream]) -> bool:
    return any(stream.end[0] == "turn.interrupted" for stream in streams)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "crash"), (signal.SIGTERM, "shutdown")])
async def test_two_servers_on_one_file_are_two_owners(tmp_path: Path, number: int, reason: str) -> None:
    """One of them stops or dies in mid-turn: the clients of the other see the end, and go on there."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    settings = on_file(tmp_path, model_url=SLOW)
    async with (
        open_lastcall(SERVE, folders[0], **settings) as one,
        open_lastcall(SERVE, folders[1], **settings) as two,
        open_client(one, two) as [first, second],
    ):
        session = await new_session(first, "s")
        turn = await start(first, session)
        other = await start(second, await new_session(second, "other"))
        streams = [Stream() for _ in range(5)]
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(stream.run, second, "GET", f"{turn}/events")
            await all_begun(streams)
            await trio.sleep(1.2)
            one.signal_main(number)
        assert {stream.end for stream in streams} == {("turn.interrupted", reason)}
        for stream in streams:
            assert stream.seqs[:-1] == list(range(1, len(stream.seqs)))
            assert stream.seqs[-1] == (len(stream.seqs) if reason == "shutdown" else 1 << 30)
        assert await state_of(second, turn) == ("interrupted", reason)
        assert (await second.get(turn)).json()["text"]
        assert await state_of(second, other) == ("running", None)
        assert await state_of(second, await start(second, session)) == ("running", None)
        assert forwarded(two, session) == 5
        await wait_gone(one)
        two.signal_main(signal.SIGTERM)
        gone = await wait_gone(two)
    assert_clean(SERVE, two, gone)
