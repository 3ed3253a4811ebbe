"""Several processes on one database: whichever process accepts a connection, the session's owner decides."""

import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import trio

from bench.server_process import ServerProcess
from tests.process.clients import Stream, all_begun, new_session, open_client, owner_of, start, wait_stored, wait_until
from tests.process.lastcall import (
    CAP_S,
    CONFIGURED_2,
    HYPERCORN_2,
    HYPERCORN_4,
    SERVE,
    SSE,
    Host,
    assert_clean,
    assert_log_is_clean,
    open_lastcall,
    reports,
    wait_gone,
)
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

pytestmark = pytest.mark.parallel

SLOW = "scripted:?tokens=10000&rate=20"
MANY = 12


class Held:
    """A model server that begins each reply with some tokens, and sends the rest once the test lets it go on."""

    TOKENS = 30

    def __init__(self) -> None:
        self.goes_on = trio.Event()

    async def reply(self, connection: Connection) -> None:
        while True:
            await connection.receive_request()
            await connection.send_head()
            for number in range(self.TOKENS):
                if number == self.TOKENS // 2:
                    await self.goes_on.wait()
                await connection.send_event(delta(f"{number} "))
                await trio.sleep(0.02)
            await connection.send_event(finish())
            await connection.send_event(DONE)
            await connection.end_body()


@asynccontextmanager
async def open_held() -> AsyncIterator[tuple[Held, str]]:
    """A model server that waits for the test, and its URL."""
    held = Held()
    async with open_raw_server(held.reply) as upstream:
        yield held, upstream.url


def forwarded(server: ServerProcess, session: str, method: str = "GET") -> int:
    """How many requests with this method were forwarded to the session's owner."""
    lines = [json.loads(line) for line in server.log().splitlines() if "asking the owner" in line]
    return sum((line["session_id"], line["method"]) == (session.rpartition("/")[2], method) for line in lines)


async def halt(worker: int, folder: Path) -> None:
    """Halt a worker, at a moment when it has no lock that other workers need."""
    with closing(sqlite3.connect(folder / "lastcall.db", timeout=0.1, isolation_level=None)) as db:
        with trio.fail_after(CAP_S):
            while True:
                os.kill(worker, signal.SIGSTOP)
                try:
                    db.execute("BEGIN IMMEDIATE")
                    db.execute("ROLLBACK")
                    break
                except sqlite3.OperationalError:
                    os.kill(worker, signal.SIGCONT)
                    await trio.sleep(0.01)


@asynccontextmanager
async def halted(worker: int, folder: Path) -> AsyncIterator[None]:
    """Inside, the worker is halted, at a moment when it has no lock that other workers need."""
    await halt(worker, folder)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


@asynccontextmanager
async def reaching_others(
    server: ServerProcess, folder: Path, *sessions: str, method: str = "GET", requests: int
) -> AsyncIterator[None]:
    """Inside, other workers accept the new requests and forward them: the sessions' owner is halted.

    Args:
        requests: The number of requests about each session.
    """
    [owner] = {owner_of(folder / "lastcall.db", session) for session in sessions}
    before = {session: forwarded(server, session, method) for session in sessions}

    async def passed_on() -> bool:
        return all(forwarded(server, session, method) - before[session] >= requests for session in sessions)

    async with halted(owner, folder):
        yield
        await wait_until(passed_on)


def on_file(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"store_url": f"sqlite:{folder}/lastcall.db", "log_level": "debug", "drain_timeout_s": 0} | settings


async def state_of(client: httpx.AsyncClient, turn: str) -> tuple[str, str | None]:
    record = (await client.get(turn)).json()
    return record["state"], record["reason"]


async def are(client: httpx.AsyncClient, session: str, states: list[str]) -> bool:
    turns = (await client.get(f"{session}/turns")).json()["data"]
    return [f"{turn['state']} {turn['reason']}" for turn in turns] == states


@pytest.mark.parametrize("host", [HYPERCORN_2, HYPERCORN_4], ids=str)
async def test_every_worker_streams_every_event_and_the_end(tmp_path: Path, host: Host) -> None:
    async with (
        open_held() as (model, model_url),
        open_lastcall(host, tmp_path, **on_file(tmp_path, model_url=model_url)) as server,
        open_client(server) as [client],
    ):
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
            model.goes_on.set()
        assert all(len(one) <= len(next_one) for one, next_one in pairwise(texts)), texts
        assert texts[-1]
        assert {json.dumps(stream.events) for stream in streams} == {json.dumps(streams[0].events)}
        assert streams[0].end == ("turn.completed", None)
        assert streams[0].seqs == list(range(1, model.TOKENS + 3))
        assert "".join(it.get("text", "") for it in streams[0].events) == "".join(f"{n} " for n in range(model.TOKENS))
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
            trio.open_nursery() as nursery,  # the outer one: the requests are answered once the owner goes on
            reaching_others(server, tmp_path, session, method="POST", requests=MANY),
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
                async with reaching_others(server, tmp_path, session, method="POST", requests=8):
                    for _ in range(8):
                        nursery.start_soon(partial(client.post, f"{session}/turns", json=body, headers=headers))
                await wait_until(partial(are, client, session, ["running None", *["queued None"] * 8]))
                nursery.cancel_scope.cancel()
            await wait_until(partial(are, client, session, ["running None", *["cancelled disconnected"] * 8]))
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(HYPERCORN_2, server, gone)


@pytest.mark.parametrize(
    ("host", "whom", "drain_timeout_s", "model_url", "end"),
    [
        (HYPERCORN_4, "main", 0, SLOW, ("turn.interrupted", "shutdown")),
        (HYPERCORN_4, "group", 2, SLOW, ("turn.interrupted", "shutdown")),
        (HYPERCORN_2, "group", 0, SLOW, ("turn.interrupted", "shutdown")),
        (HYPERCORN_2, "main", 2, SLOW, ("turn.interrupted", "shutdown")),
        (HYPERCORN_4, "main", CAP_S, None, ("turn.completed", None)),
    ],
    ids=str,
)
async def test_a_stop_ends_proxied_streams(
    tmp_path: Path,
    *,
    host: Host,
    whom: Literal["main", "group"],
    drain_timeout_s: float,
    model_url: str | None,
    end: tuple[str, str | None],
) -> None:
    """Without a URL, a model server completes the running turns once the drain has begun."""
    streams, answers = [Stream() for _ in range(3 * MANY)], []
    async with (
        open_held() as (model, held_url),
        open_lastcall(
            host, tmp_path, **on_file(tmp_path, drain_timeout_s=drain_timeout_s, model_url=model_url or held_url)
        ) as server,
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
        async with reaching_others(server, tmp_path, session, method="POST", requests=8):
            for _ in range(8):
                nursery.start_soon(wait)
        await all_begun(streams)

        async def all_queued() -> bool:
            return len((await client.get("/sessions/waited/turns")).json()["data"]) == 9

        await wait_until(all_queued)
        assert await state_of(client, waited) == ("running", None)
        if whom == "main":
            server.signal_main(signal.SIGTERM)
        else:
            server.signal_group(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            while len(answers) < 8:  # noqa: ASYNC110  the drain begins with the end of the turns that wait
                await trio.sleep(0.02)
        model.goes_on.set()
        gone = await wait_gone(server)
    assert {stream.end for stream in streams} == {end}
    assert all(stream.seqs == list(range(1, len(stream.seqs) + 1)) for stream in streams)
    assert {(answer.get("state"), answer.get("reason")) for answer in answers} == {("interrupted", "shutdown")}
    assert_clean(host, server, gone)


async def forwarded_turns(
    server: ServerProcess, client: httpx.AsyncClient, folder: Path, nursery: trio.Nursery
) -> tuple[int, dict[str, Stream], Stream]:
    """Start, with two workers, turns of one worker whose only client is connected to the other one.

    Returns the other worker, the streams by session, and one more stream, of a turn of the other worker itself.
    """
    turns: dict[str, str] = {}
    owners: dict[str, int] = {}
    while len(set(owners.values())) < 2 or len(owners) < 4:
        session = await new_session(client, f"s{len(owners)}")
        turns[session] = await start(client, session)
        owners[session] = owner_of(folder / "lastcall.db", session)
    numbers = list(owners.values())
    owner = max(numbers, key=numbers.count)
    [leaving] = set(numbers) - {owner}
    theirs = [session for session in owners if owners[session] == owner][:2]
    streams = {session: Stream() for session in theirs}
    body = {"input": "x", "on_conflict": "supersede"}
    async with reaching_others(server, folder, *theirs, method="POST", requests=1):
        for session, stream in streams.items():
            nursery.start_soon(until_cut, stream, client, "POST", f"{session}/turns", body)
    own = Stream()
    [turn] = [turns[session] for session in owners if owners[session] == leaving][:1]
    nursery.start_soon(until_cut, own, client, "GET", f"{turn}/events")
    await all_begun([own, *streams.values()])
    return leaving, streams, own


async def assert_turns_wait_for_their_clients(client: httpx.AsyncClient, streams: dict[str, Stream]) -> None:
    """Two streams were cut: the first one's client comes back and misses nothing; the second one's stays away."""
    (session, stream), (given_up, cut) = streams.items()
    turn = f"{session}/turns/{stream.events[0]['turn_id']}"
    abandoned = f"{given_up}/turns/{cut.events[0]['turn_id']}"
    back = Stream()
    assert await state_of(client, turn) == ("running", None)
    assert await state_of(client, abandoned) == ("running", None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(back.run, client, "GET", f"{turn}/events?after={stream.seqs[-1]}")
        await back.begun.wait()

        async def is_given_up() -> bool:
            return await state_of(client, abandoned) == ("cancelled", "disconnected")

        await wait_until(is_given_up)
        assert await state_of(client, turn) == ("running", None)
        assert (await client.post(f"{turn}/cancel")).status_code == 200
    assert back.end == ("turn.cancelled", "requested")
    seqs = stream.seqs + back.seqs
    assert seqs == list(range(1, len(seqs) + 1))


@pytest.mark.parametrize("drain_timeout_s", [0, 2])
async def test_a_worker_that_stops_alone_ends_its_own_turns_and_no_others(
    tmp_path: Path, drain_timeout_s: float
) -> None:
    settings = on_file(tmp_path, model_url=SLOW, drain_timeout_s=drain_timeout_s)
    async with open_lastcall(HYPERCORN_2, tmp_path, **settings) as server, open_client(server) as [client]:
        async with trio.open_nursery() as nursery:
            leaving, streams, own = await forwarded_turns(server, client, tmp_path, nursery)
            seen = [len(stream.events) for stream in streams.values()]
            os.kill(leaving, signal.SIGTERM)
        assert own.end == ("turn.interrupted", "shutdown")
        assert {stream.end[0] for stream in streams.values()} == {"turn.delta"}
        more = [len(stream.events) - before for stream, before in zip(streams.values(), seen, strict=True)]
        # There are twenty a second, and without the drain none needs to come.
        assert min(more) >= 5 or not drain_timeout_s, "the streams are passed on while the worker drains"
        await assert_turns_wait_for_their_clients(client, streams)
        with trio.fail_after(CAP_S):
            await server.wait_logged("Running on ", times=3)  # hypercorn's master starts another worker in its place
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)
    assert all(report["faults"] == [] for report in reports(server))


async def test_the_death_of_a_worker_leaves_the_turns_of_others_to_their_clients(tmp_path: Path) -> None:
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, **on_file(tmp_path, model_url=SLOW)) as server,
        open_client(server) as [client],
    ):
        async with trio.open_nursery() as nursery:
            leaving, streams, _ = await forwarded_turns(server, client, tmp_path, nursery)
            os.kill(leaving, signal.SIGKILL)
        await assert_turns_wait_for_their_clients(client, streams)
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)


STREAMS = 4
"""Streams of each turn, beside one of which it is certain which worker it reaches."""


async def test_the_death_of_a_worker_ends_its_own_turns_and_no_others(tmp_path: Path) -> None:
    settings = on_file(tmp_path, model_url=SLOW)
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server, open_client(server) as [client]:
        turns: dict[str, str] = {}
        owners: dict[str, int] = {}
        while len(set(owners.values())) < 2 or len(turns) < 6:
            session = await new_session(client, f"s{len(turns)}")
            turns[session] = await start(client, session)
            owners[session] = owner_of(tmp_path / "lastcall.db", session)
        # The victim is the worker with fewer turns: then the other worker carries streams of both workers' turns.
        victim = min(set(owners.values()), key=list(owners.values()).count)
        lost = [session for session in turns if owners[session] == victim]
        streams = {(session, n): Stream() for session in turns for n in range(STREAMS)}
        through_the_other = {session: Stream() for session in turns}
        passed_on = [through_the_other[session] for session in lost]
        async with trio.open_nursery() as nursery:
            async with reaching_others(server, tmp_path, *lost, requests=1):
                for session, stream in through_the_other.items():
                    nursery.start_soon(until_cut, stream, client, "GET", f"{turns[session]}/events")
                await all_begun([through_the_other[session] for session in turns if session not in lost])
            for (session, _), stream in streams.items():
                # A client of the victim itself just loses its connection.
                nursery.start_soon(until_cut, stream, client, "GET", f"{turns[session]}/events")
            streams |= {(session, STREAMS): stream for session, stream in through_the_other.items()}
            await all_begun(list(streams.values()))
            await trio.sleep(1.2)  # some of the events that the clients have seen are in a checkpoint, some are not
            os.kill(victim, signal.SIGKILL)

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
            await wait_until(partial(all_ended, passed_on))
            for session in turns:
                assert (await client.delete(session)).status_code == 204
        told = [stream for stream in ended if stream.end[0] == "turn.interrupted"]
        assert {id(stream) for stream in passed_on} <= {id(stream) for stream in told}
        for stream in told:
            assert stream.end == ("turn.interrupted", "crash")
            assert stream.seqs[:-1] == list(range(1, len(stream.seqs)))
            assert stream.seqs[-1] > len(stream.seqs)
        others = [stream for (session, _), stream in streams.items() if session not in lost]
        assert {stream.end for stream in others if stream.end[0] != "turn.delta"} == {
            ("turn.cancelled", "session_deleted")
        }
        await stop_once_replaced(server)


async def test_branches_run_at_once_through_any_worker_and_end_with_their_owner(tmp_path: Path) -> None:
    settings = on_file(tmp_path, model_url=SLOW, branches_max=MANY)
    async with open_lastcall(CONFIGURED_2, tmp_path, **settings) as server, open_client(server) as [client]:
        session = await new_session(client, "s")
        first = await start(client, session)
        started: list[httpx.Response] = []

        async def retry() -> None:
            started.append(await client.post(f"{first}/retry", json={"background": True}))

        async with (
            trio.open_nursery() as nursery,  # the outer one: the requests are answered once the owner goes on
            reaching_others(server, tmp_path, session, method="POST", requests=MANY),
        ):
            for _ in range(MANY):
                nursery.start_soon(retry)
        accepted = [it for it in started if it.status_code == 202]
        assert sorted(it.json()["siblings"]["place"] for it in accepted) == list(range(2, MANY + 1))
        [refused] = [it for it in started if it.status_code != 202]
        assert (refused.status_code, refused.json()["code"]) == (429, "branch_limit")
        turns = [first, *(it.headers["location"] for it in accepted)]

        async def all_run() -> bool:
            return await are(client, session, ["running None"] * MANY)

        await wait_until(all_run)
        head = (await client.get(session)).json()["head"]
        moved = await client.patch(session, json={"head": None, "seen_head": head})
        assert (moved.status_code, moved.json()["code"]) == (409, "turn_in_progress")
        os.kill(owner_of(tmp_path / "lastcall.db", session), signal.SIGKILL)

        async def all_recovered() -> bool:
            return await are(client, session, ["interrupted crash"] * MANY)

        await wait_until(all_recovered)
        moved = await client.patch(session, json={"head": turns[0].rpartition("/")[2], "seen_head": head})
        assert moved.status_code == 200
        listed = (await client.get(f"{session}/turns?parent=null&limit=100")).json()["data"]
        assert [turn["siblings"] for turn in listed] == [{"place": n, "count": MANY} for n in range(1, MANY + 1)]
        assert [turn["is_head"] for turn in listed] == [True, *[False] * (MANY - 1)]
        await stop_once_replaced(server)


async def stop_once_replaced(server: ServerProcess) -> None:
    """Wait until a third worker serves in the place of one that has died, and stop the server."""
    with trio.fail_after(CAP_S):
        await server.wait_logged("another one takes its place")
        await server.wait_logged("Running on ", times=3)
    server.signal_main(signal.SIGTERM)
    gone = await wait_gone(server)
    assert gone.exit_code == 0
    assert_log_is_clean(server)


async def until_cut(stream: Stream, client: httpx.AsyncClient, *request: Any) -> None:
    with suppress(httpx.RemoteProtocolError, httpx.ReadError):
        await stream.run(client, *request)


async def all_ended(streams: list[Stream]) -> bool:
    return all(stream.end[0] == "turn.interrupted" for stream in streams)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "crash"), (signal.SIGTERM, "shutdown")])
async def test_two_servers_on_one_file_are_two_owners(tmp_path: Path, number: int, reason: str) -> None:
    """One server stops or dies in mid-turn: the other server's clients see the turn's end, and start turns there."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    settings = on_file(tmp_path, model_url=SLOW, checkpoint_interval_s=0.2)
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
            await wait_stored(tmp_path / "lastcall.db", turn.rpartition("/")[2], "0 ")
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
