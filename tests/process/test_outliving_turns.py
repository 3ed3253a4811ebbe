"""Turns that outlive their process, with real signals: a restart, a reload, and the death of one of two workers.

The model is a script that replies the same to every prompt, so that the text which a client has in the end can be
compared with that of a run without a stop.
"""

import json
import os
import signal
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.hosting.hosts import command
from tests.postgres_server import PostgresServer
from tests.process.clients import new_session, open_client, owner_of, start
from tests.process.lastcall import (
    CONFIGURED_2,
    SERVE,
    SSE,
    assert_clean,
    assert_log_is_clean,
    open_lastcall,
    reports,
    wait_gone,
)

pytestmark = pytest.mark.parallel

TOKENS = 60
SHORT = f"scripted:?tokens={TOKENS}&rate=10&first_token_s=0"
LONG = "scripted:?tokens=5000&rate=10&first_token_s=0"
"""Longer than any test takes: its turns are cancelled."""


def whole(tokens: int = 5000) -> str:
    """The text of an uninterrupted run."""
    return "".join(f"{number} " for number in range(tokens))


STREAMS = 50
TERMINAL = ("turn.completed", "turn.failed", "turn.cancelled", "turn.interrupted")


class Resuming:
    """A client that follows a turn to its terminal event, wherever it goes on.

    Args:
        asks: The body of a chat that starts the turn.

    Attributes:
        text: The text that the client shows.
        ends: The terminal events that it was told.
        modes: How its turn went on, each time.
        refusals: The statuses of the answers that were no streams.
        moves: How many streams said that the turn goes on elsewhere.
    """

    def __init__(self, path: str = "", *, asks: dict[str, Any] | None = None) -> None:
        self.text = ""
        self.ends: list[dict[str, Any]] = []
        self.modes: list[str] = []
        self.refusals: list[int] = []
        self.moves = 0
        self.seqs: list[int] = [0]
        self.begun = trio.Event()
        self.grown = trio.Event()
        """Set once the turn has gone on somewhere else, and has said more."""
        self.path = path
        self._asks = asks

    async def follow(self, client: httpx.AsyncClient, *, again: bool = True) -> None:
        """Follow the turn to its end; without ``again`` only as far as one stream goes."""
        while not self.ends:
            try:
                async with self._open(client) as response:
                    self.path = response.headers.get("location", self.path)
                    if response.status_code != 200:
                        self.refusals.append(response.status_code)
                    async for line in response.aiter_lines():
                        self.moves += line == ": moved"
                        if line.startswith("data: ") and response.status_code == 200:
                            self._take(json.loads(line.removeprefix("data: ")))
            except httpx.TransportError:
                pass  # its process died, or has closed its listener
            if not again:
                return
            await trio.sleep(0.05)

    def _open(self, client: httpx.AsyncClient) -> AbstractAsyncContextManager[httpx.Response]:
        if not self.path:
            return client.stream("POST", "/chat", headers=SSE, json=self._asks)
        headers = SSE | {"Last-Event-ID": str(self.seqs[-1])}
        return client.stream("GET", f"{self.path}/events", headers=headers)

    def _take(self, event: dict[str, Any]) -> None:
        assert event["seq"] > self.seqs[-1]
        self.seqs.append(event["seq"])
        match event["type"]:
            case "turn.delta":
                self.text += event["text"]
                self.begun.set()
                if self.modes:
                    self.grown.set()
            case "turn.resumed":
                self.text = self.text[: event["text_length"]]
                self.modes.append(event["mode"])
            case kind if kind in TERMINAL:
                self.ends.append(event)


async def test_over_a_restart_a_turn_goes_on_as_it_was_asked_to(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "store_url": f"sqlite:{tmp_path}/lastcall.db",
        "model_url": SHORT,
        "drain_timeout_s": 0.2,
    }
    clients: dict[str, Resuming] = {}
    async with (
        open_lastcall(SERVE, tmp_path, **settings) as server,
        open_client(server) as [client],
        trio.open_nursery() as nursery,
    ):
        for on_interrupt in ("continue", "retry", "fail"):
            session = await new_session(client, on_interrupt)
            path = await start(client, session, on_interrupt=on_interrupt)
            clients[on_interrupt] = Resuming(path)
            nursery.start_soon(partial(clients[on_interrupt].follow, client, again=False))
        for it in clients.values():
            await it.begun.wait()
        server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(SERVE, server, gone)
    [report] = reports(server)
    assert (report["turns_suspended"], report["turns_interrupted"]) == (2, 1)
    assert [len(it.ends) for it in clients.values()] == [0, 0, 1]
    assert whole(TOKENS).startswith(clients["continue"].text)
    failed = clients["fail"].text
    next_start = tmp_path / "next"
    next_start.mkdir()
    async with (
        open_lastcall(SERVE, next_start, **settings) as server,
        open_client(server) as [client],
        trio.open_nursery() as nursery,
    ):
        for it in clients.values():
            nursery.start_soon(it.follow, client)
    assert [it.text for it in clients.values()] == [whole(TOKENS), whole(TOKENS), failed]
    assert [it.modes for it in clients.values()] == [["continue"], ["retry"], []]
    assert [[end["type"] for end in it.ends] for it in clients.values()] == [
        ["turn.completed"],
        ["turn.completed"],
        ["turn.interrupted"],
    ]
    for name in ("continue", "retry"):
        assert clients[name].seqs == list(range(len(clients[name].seqs))), "an orderly stop leaves no gap"


async def test_a_long_gap_between_two_processes_does_not_count_against_the_clients_of_turns(tmp_path: Path) -> None:
    """Both turns are cancelled without clients, and their clients are cut off by the stop. One client comes back.

    The next process is there an hour after the stop, by its clock, and serves for longer than a turn waits that needs
    no client. The process after it waits for clients only for a moment.
    """
    settings: dict[str, Any] = {
        "store_url": f"sqlite:{tmp_path}/lastcall.db",
        "model_url": f"scripted:?tokens={TOKENS}&rate=200&first_token_s=0",
        "drain_timeout_s": 0,
        "turn_timeout_s": 7200,
    }
    slow = settings | {"model_url": f"scripted:?tokens={TOKENS}&rate=2&first_token_s=0"}
    comes_back, stays_away = (
        Resuming(asks={"message": "go", "session_id": name, "on_interrupt": "continue"}) for name in ("back", "away")
    )
    async with (
        open_lastcall(SERVE, tmp_path, **slow) as server,
        open_client(server) as [client],
        trio.open_nursery() as nursery,
    ):
        for it in (comes_back, stays_away):
            nursery.start_soon(partial(it.follow, client, again=False))
        for it in (comes_back, stays_away):
            await it.begun.wait()
        runs_on = await start(client, await new_session(client, "stays"), on_interrupt="continue")
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
    assert [report["turns_suspended"] for report in reports(server)] == [3]
    assert (comes_back.moves, stays_away.moves) == (1, 1)

    argv = command(str(SERVE), broken="an_hour_later")
    (tmp_path / "later").mkdir()
    async with (
        open_lastcall(SERVE, tmp_path / "later", argv=argv, **settings) as server,
        open_client(server) as [client],
    ):
        await server.wait_logged(f'"turn adopted: .*{runs_on.rpartition("/")[2]}')
        assert "disconnected" not in server.log()
        await comes_back.follow(client)
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
    assert (comes_back.text, comes_back.modes) == (whole(TOKENS), ["continue"])
    assert [end["type"] for end in comes_back.ends] == ["turn.completed"]
    assert comes_back.seqs == list(range(len(comes_back.seqs)))

    argv = command(str(SERVE), broken="where_no_client_has_time_to_come_back")
    (tmp_path / "last").mkdir()
    async with (
        open_lastcall(SERVE, tmp_path / "last", argv=argv, **settings) as server,
        open_client(server) as [client],
    ):
        await server.wait_logged('"turn ended".*"disconnected"')
        before = stays_away.text
        await stays_away.follow(client)
        again = Resuming(comes_back.path)
        await again.follow(client)
    assert stays_away.text == before
    assert [(end["type"], end["reason"]) for end in stays_away.ends] == [("turn.cancelled", "disconnected")]
    assert [end["type"] for end in again.ends] == ["turn.completed"]


async def test_a_turn_of_a_replica_that_stops_goes_on_in_the_other_one(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    """Two services on one PostgreSQL database. One client comes back to the other one, and one was there already."""
    with postgres.empty_schema() as schema:
        settings: dict[str, Any] = {
            "LASTCALL_STORE_URL": postgres.url,
            "store_schema": schema,
            "model_url": SHORT,
            "drain_timeout_s": 0.2,
        }
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        async with (
            open_lastcall(SERVE, tmp_path / "one", **settings) as one,
            open_lastcall(SERVE, tmp_path / "two", **settings) as two,
            open_client(one) as [at_one],
            open_client(two) as [at_two],
            trio.open_nursery() as nursery,
        ):
            session = await new_session(at_one, "s")
            path = await start(at_one, session, on_interrupt="continue")
            comes_back, stays = Resuming(path), Resuming(path)
            nursery.start_soon(stays.follow, at_two)
            nursery.start_soon(partial(comes_back.follow, at_one, again=False))
            for it in (comes_back, stays):
                await it.begun.wait()
            one.signal_main(signal.SIGTERM)
            assert (await wait_gone(one)).exit_code == 0
            assert (comes_back.moves, comes_back.ends) == (1, [])
            await comes_back.follow(at_two)
        [report] = reports(one)
        assert (report["turns_suspended"], report["turns_interrupted"]) == (1, 0)
        for it in (comes_back, stays):
            assert (it.text, it.modes) == (whole(TOKENS), ["continue"])
            assert [end["type"] for end in it.ends] == ["turn.completed"]
            assert it.seqs == list(range(len(it.seqs)))
        ends = postgres.run(f"SELECT state, owner FROM {schema}.turns")
        assert ends == [("completed", None)]


async def test_the_turns_of_a_killed_worker_go_on_in_the_other_one(tmp_path: Path) -> None:
    """Streams that the other worker passed on go on there, and the clients of the dead worker come back to it."""
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, model_url=LONG, checkpoint_interval_s=0.2) as server,
        open_client(server) as [client],
    ):
        session = await new_session(client, "s")
        path = await start(client, session, on_interrupt="continue")
        clients = [Resuming(path) for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for it in clients:
                nursery.start_soon(it.follow, client)
            for it in clients:
                await it.begun.wait()
            os.kill(owner_of(tmp_path / "lastcall.db", session), signal.SIGKILL)
            for it in clients:
                await it.grown.wait()
            cancelled = (await client.post(f"{path}/cancel")).json()
    assert {it.text for it in clients} == {cancelled["text"]}
    assert whole().startswith(cancelled["text"])
    assert [[end["type"] for end in it.ends] for it in clients] == [["turn.cancelled"]] * 8
    assert all(set(it.refusals) <= {503} for it in clients)
    assert (cancelled["attempt"], cancelled["reason"]) == (2, "requested")


async def test_a_reload_under_streams_shows_in_no_text(tmp_path: Path) -> None:
    async with (
        open_lastcall(CONFIGURED_2, tmp_path, model_url=LONG, drain_timeout_s=0.2) as server,
        open_client(server) as [client],
    ):
        clients = [
            Resuming(asks={"message": "go", "session_id": f"s{number}", "on_interrupt": "continue"})
            for number in range(STREAMS)
        ]
        async with trio.open_nursery() as nursery:
            for it in clients:
                nursery.start_soon(it.follow, client)
            for it in clients:
                await it.begun.wait()
            server.signal_main(signal.SIGHUP)
            await server.wait_logged("reloaded: 2 new workers serve")
            for it in clients:
                await it.grown.wait()
            await server.wait_logged('"shutdown report"', times=2)
            cancelled = [(await client.post(f"{it.path}/cancel")).json()["text"] for it in clients]
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
    assert_log_is_clean(server)
    assert [it.text for it in clients] == cancelled
    for it in clients:
        assert whole().startswith(it.text)
        assert set(it.modes) == {"continue"}
        assert it.seqs == list(range(len(it.seqs))), "an orderly stop leaves no gap"
        assert [(end["type"], end["text_length"]) for end in it.ends] == [("turn.cancelled", len(it.text))]
        assert set(it.refusals) <= {503}
    # The first worker of two that leave may leave a turn to the other one.
    assert sum(report["turns_suspended"] for report in reports(server)) == sum(len(it.modes) for it in clients)
    assert sum(report["turns_interrupted"] for report in reports(server)) == 0
