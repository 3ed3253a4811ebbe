"""New turns of a session whose turns run in a process that stops, asked for by a process that serves on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http import proxy
from service.api.http.proxy import PEER, SUCCESSORS
from service.cluster.peer_transport import PeerTransport
from service.errors import StoreError
from service.sessions.active.acceptance import MAKE_WAY_MAX_S
from service.stop_state import Phase
from service.storage.records import EndResult
from tests.api.inprocess import Api, Reply, open_api

TURN_S = 9
MOMENT_S = 0.1


@asynccontextmanager
async def open_stopping(**settings: Any) -> AsyncIterator[tuple[Api, str]]:
    """An application that stops while a turn of session ``s`` runs in it; gives the turn's path."""
    settings = {
        "model_url": f"scripted:?tokens={TURN_S + 1}&rate=1&first_token_s=0",
        "drain_timeout_s": 2 * TURN_S,
    } | settings
    async with open_api(**settings) as api:
        await api.new_session(id="s")
        started = await api.call("POST", "/sessions/s/turns", {"input": "x", "background": True})
        assert started.status == 202
        await trio.sleep(0.5)
        api.service.shutdown.enter(Phase.DRAINING)
        yield api, started.headers["location"]


async def ask(api: Api, on_conflict: str, *, path: str = "turns", peer: bool = True, background: bool = False) -> Reply:
    """Ask for another turn, as a process that takes this one for the session's owner."""
    body = {"input": "y", "on_conflict": on_conflict, "background": background} if path == "turns" else {}
    return await api.call("POST", f"/sessions/s/{path}", body, scope={PEER: lambda: False} if peer else {})


def assert_left_to_the_peer(reply: Reply) -> None:
    reply.problem(503, "shutting_down")
    assert reply.headers["lastcall-untouched"] == "1"


@pytest.mark.parametrize("background", [False, True])
async def test_a_turn_that_would_be_rejected_anyway_gets_its_409(autojump_clock: MockClock, background: bool) -> None:
    async with open_stopping() as (api, path):
        problem = (await ask(api, "reject", background=background)).problem(409, "turn_in_progress")
        assert path.endswith(problem["turn_id"])


async def test_a_queued_turn_is_left_to_the_peer_once_the_turns_before_it_have_ended(autojump_clock: MockClock) -> None:
    async with open_stopping() as (api, path):
        while (await api.call("GET", path)).json["state"] == "running":
            began = trio.current_time()
            assert_left_to_the_peer(await ask(api, "queue"))
            assert trio.current_time() > began
        assert trio.current_time() == pytest.approx(TURN_S, abs=MOMENT_S), "the answer came with the turn's end"
        assert (await api.call("GET", path)).json["state"] == "completed"
        assert len((await api.call("GET", "/sessions/s/turns")).json["data"]) == 1


async def test_a_caller_that_waits_for_a_turn_is_asked_to_come_again_after_a_moment(autojump_clock: MockClock) -> None:
    async with open_stopping() as (api, path):
        began = trio.current_time()
        assert_left_to_the_peer(await ask(api, "queue"))
        assert trio.current_time() - began == pytest.approx(MAKE_WAY_MAX_S, abs=MOMENT_S)
        assert (await api.call("GET", path)).json["state"] == "running"


async def test_a_superseding_turn_cancels_the_turns_before_it_and_is_left_to_the_peer(
    autojump_clock: MockClock,
) -> None:
    async with open_stopping() as (api, path):
        began = trio.current_time()
        assert_left_to_the_peer(await ask(api, "supersede"))
        assert trio.current_time() - began == pytest.approx(0, abs=MOMENT_S)
        superseded = (await api.call("GET", path)).json
        assert (superseded["state"], superseded["reason"]) == ("cancelled", "superseded")


@pytest.mark.parametrize("on_conflict", ["reject", "queue", "supersede"])
async def test_without_a_process_that_serves_on_nothing_is_waited_for_or_cancelled(
    autojump_clock: MockClock, on_conflict: str
) -> None:
    async with open_stopping() as (api, path):
        began = trio.current_time()
        reply = await ask(api, on_conflict, peer=False)
        reply.problem(503, "shutting_down")
        assert "lastcall-untouched" not in reply.headers
        assert trio.current_time() == began
        assert (await api.call("GET", path)).json["state"] == "running"


@pytest.mark.parametrize("scope", [{}, {PEER: lambda: False}], ids=["from a client", "handed over by a peer"])
async def test_a_request_that_another_process_is_to_check_first_cancels_nothing_here(
    autojump_clock: MockClock, scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_stopping() as (api, path):
        monkeypatch.setitem(api.app.extensions, SUCCESSORS, lambda: ["/nowhere"])
        headers = {"lastcall-handed-over": "1"} if scope else {}
        body = {"input": "y", "on_conflict": "supersede", "model": "unknown"}
        (await api.call("POST", "/sessions/s/turns", body, headers=headers, scope=scope)).problem(503, "shutting_down")
        assert (await api.call("GET", path)).json["state"] == "running"


class SilentPeer:
    """The connection to a process that serves on, and waits there for the end of a turn."""

    def __init__(self, *_: object, **__: object) -> None:
        self.has_asked = False
        self.accepted_as = None
        self.is_closed = False

    async def ask(self, *_: object, **__: object) -> None:
        self.has_asked = True
        await trio.sleep_forever()

    def close(self) -> None:
        self.is_closed = True

    async def half_close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("streams", [True, False])
async def test_a_queued_turn_that_is_handed_over_may_wait_for_as_long_as_the_drain(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    ends: list[trio.SocketStream] = []

    async def connect(_: PeerTransport, __: str) -> trio.SocketStream:
        pair = [trio.SocketStream(end) for end in trio.socket.socketpair()]
        ends.extend(pair)
        return pair[0]

    monkeypatch.setattr(PeerTransport, "connect", connect)
    monkeypatch.setattr(proxy, "PeerConnection", SilentPeer)
    async with open_stopping(drain_timeout_s=120) as (api, _):
        monkeypatch.setattr(type(api.service.store), "peer_secret", b"x", raising=False)
        monkeypatch.setitem(api.app.extensions, SUCCESSORS, lambda: ["@new"])
        began = trio.current_time()
        body = {"input": "y", "on_conflict": "queue", "background": not streams}
        headers = {"Accept": "text/event-stream"} if streams else {}
        (await api.call("POST", "/sessions/s/turns", body, headers=headers)).problem(503, "shutting_down")
        assert trio.current_time() - began > 100, "until this process has to stop"
    for end in ends:
        await end.aclose()


@pytest.mark.parametrize("on_conflict", ["reject", "queue", "supersede"])
async def test_a_turn_whose_session_has_no_open_turn_any_more_is_left_to_the_peer_at_once(
    autojump_clock: MockClock, on_conflict: str
) -> None:
    async with open_stopping() as (api, path):
        await api.call("POST", f"{path}/cancel")
        began = trio.current_time()
        assert_left_to_the_peer(await ask(api, on_conflict))
        assert trio.current_time() == began


@pytest.mark.parametrize("on_conflict", ["reject", "queue", "supersede"])
async def test_a_turn_whose_way_is_barred_by_an_end_that_the_store_does_not_take_gets_a_503(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, on_conflict: str
) -> None:
    """No other process may accept a turn before that end is stored, so this is not left to the peer."""

    async def refuse(*_: object, **__: object) -> EndResult:
        await trio.lowlevel.checkpoint()
        raise StoreError("The disk is full.")

    async with open_stopping() as (api, path):
        with monkeypatch.context() as full:
            full.setattr(api.service.store, "end_turn", refuse)
            if on_conflict != "supersede":
                await api.call("POST", f"{path}/cancel")
            reply = await ask(api, on_conflict)
            reply.problem(503, "store_unavailable")
            assert "lastcall-untouched" not in reply.headers
            assert "retry-after" in reply.headers
            assert api.service.sessions.pending_writes.turns == 1
        assert_left_to_the_peer(await ask(api, on_conflict))
        assert api.service.sessions.pending_writes.turns == 0
        ended = (await api.call("GET", path)).json
        assert (ended["state"], "stored" in ended) == ("cancelled", False)


async def test_the_answer_comes_in_time_while_the_store_is_slow_to_take_many_ends(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that asks does not wait as long as each of the ends may take."""
    end_s: float = 60

    async with open_api(model_url="scripted:?rate=1", store_timeout_s=5, cleanup_timeout_s=1) as api:
        await api.new_session(id="s")
        body = {"input": "x", "on_conflict": "queue", "background": True}
        turns = [(await api.call("POST", "/sessions/s/turns", body)).headers["location"] for _ in range(2)]
        with monkeypatch.context() as hanging:
            end_turn = api.service.store.end_turn

            async def slow(*arguments: Any, **named: Any) -> EndResult:
                await trio.sleep(end_s)
                return await end_turn(*arguments, **named)

            hanging.setattr(api.service.store, "end_turn", slow)
            for turn in turns:
                await api.call("POST", f"{turn}/cancel")
            assert api.service.sessions.pending_writes.turns == 2
            api.service.shutdown.enter(Phase.DRAINING)
            end_s = 4
            began = trio.current_time()
            (await ask(api, "queue")).problem(503, "store_unavailable")
            assert trio.current_time() - began == pytest.approx(5, abs=MOMENT_S)
            assert api.service.sessions.pending_writes.turns == 1
        assert_left_to_the_peer(await ask(api, "queue"))


async def test_a_branch_waits_for_the_turns_and_cancels_none(autojump_clock: MockClock) -> None:
    async with open_stopping(branches_max=2) as (api, path), trio.open_nursery() as nursery:
        body = {"input": "y", "parent": None, "on_conflict": "supersede"}
        branch = partial(api.call, "POST", "/sessions/s/turns", body, scope={PEER: lambda: False})
        for _ in range(2):
            began = trio.current_time()
            assert_left_to_the_peer(await branch())
            assert trio.current_time() - began == pytest.approx(MAKE_WAY_MAX_S, abs=MOMENT_S)
        assert (await api.call("GET", path)).json["state"] == "running"
        nursery.start_soon(branch)
        await wait_all_tasks_blocked()
        (await branch()).problem(429, "branch_limit")
        assert (await api.call("GET", f"{path}?wait=30")).json["state"] == "completed"
        assert_left_to_the_peer(await branch())


async def test_callers_that_wait_count_as_queued_and_as_open_turns(autojump_clock: MockClock) -> None:
    async with open_stopping(queued_turns_max=2) as (api, _), trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(ask, api, "queue")
        await wait_all_tasks_blocked()
        assert api.service.sessions.statistics().callers_waiting == 2
        assert not api.service.sessions.drain.is_idle
        (await ask(api, "queue")).problem(429, "queue_full")
    async with open_stopping(live_turns_max=2) as (api, _), trio.open_nursery() as nursery:
        nursery.start_soon(ask, api, "queue")
        await wait_all_tasks_blocked()
        (await ask(api, "queue")).problem(503, "turn_limit")


async def test_the_owner_answers_a_fork_of_its_open_turn_while_it_stops(autojump_clock: MockClock) -> None:
    async with open_stopping() as (api, path):
        problem = (await ask(api, "", path="fork")).problem(409, "turn_in_progress")
        assert path.endswith(problem["turn_id"])
        await api.call("POST", f"{path}/cancel")
        assert_left_to_the_peer(await ask(api, "", path="fork"))
        (await ask(api, "", path="fork", peer=False)).problem(503, "shutting_down")
