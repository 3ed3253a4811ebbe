"""Turns ended at random moments by every cause there is, over real sockets on both sides."""

import random
import select
from collections import Counter
from functools import partial

import trio

from service.sessions.events.events import TerminalEvent
from service.sessions.turns.turn import Turn
from service.settings import Settings
from tests.service.serving import Serving, serving
from tests.sessions.puppet import read_all
from tests.upstreams.raw_server import Connection, open_raw_server

TURNS = 200
AT_ONCE = 20
CAUSES = ("client", "cancel", "delete", "supersede", "deadline", "completion")


class Upstream:
    """Answers slowly, and knows which connection serves which prompt."""

    def __init__(self) -> None:
        self.connections: dict[str, trio.SocketStream] = {}

    async def behave(self, connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            messages = request.json["messages"]
            assert isinstance(messages, list)
            prompt = messages[-1]["content"]
            assert isinstance(connection.stream, trio.SocketStream)
            self.connections[prompt] = connection.stream
            await connection.send_head()
            cause = prompt.split()[-1]
            for number in range(30 if cause == "completion" else 10_000):
                await connection.send_event({"choices": [{"index": 0, "delta": {"content": f"{number} "}}]})
                await trio.sleep(random.uniform(0, 0.01))
                if cause == "deadline" and number == 10:
                    await connection.wait_closed()
                    return
            await connection.send_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            await connection.send_event(b"[DONE]")
            await connection.end_body()

    def client_has_closed(self, prompt: str) -> bool:
        """Whether the kernel has got the client's end of this connection. True if it was never opened."""
        connection = self.connections.get(prompt)
        if connection is None or connection.socket.fileno() == -1:
            return True
        poll = select.poll()
        poll.register(connection.socket.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))


async def one_turn(served: Serving, upstream: Upstream, index: int, cause: str, ended: list[str]) -> None:
    sessions = served.service.sessions
    session_id = f"session-{index}"
    prompt = f"turn {index} {cause}"
    turn_path = f"/sessions/{session_id}/turns"
    await served.call("POST", "/sessions", {"id": session_id})
    client = await served.connect("POST", turn_path, {"input": prompt}, accept="text/event-stream")
    received = b""
    while b"turn.started" not in received:
        data = await client.receive_some()
        assert data, received.decode()
        received += data
    turn_id = received.split(b'"turn_id":"')[1].split(b'"')[0].decode()
    turn = sessions._find_turn(session_id, turn_id)
    assert turn is not None

    await trio.sleep(random.uniform(0, 0.15))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_the_end, turn, upstream, prompt)
        if cause == "client":
            await client.aclose()
        elif cause == "cancel":
            status, _ = await served.call("POST", f"{turn_path}/{turn_id}/cancel", {})
            assert status == 200
        elif cause == "delete":
            status, _ = await served.call("DELETE", f"/sessions/{session_id}")
            assert status == 204
        elif cause == "supersede":
            status, _ = await served.call(
                "POST", turn_path, {"input": f"{prompt} instead completion", "on_conflict": "supersede"}
            )
            assert status == 200
    ended.append(turn.record().state + ":" + str(turn.record().reason or ""))
    if cause != "client":
        while data := await client.receive_some():
            received += data
        assert received.endswith(b"\r\n0\r\n\r\n"), "the stream has no last chunk"
        assert received.count(b'"text_length"') == 1
    await client.aclose()
    if cause != "delete":
        await check_record(served, session_id, turn_id)
        status, body = await served.call("POST", turn_path, {"input": f"{prompt} again completion"})
        assert (status, body["state"]) == (200, "completed")


async def watch_the_end(turn: Turn, upstream: Upstream, prompt: str) -> None:
    with trio.fail_after(20):
        while not turn.log.closed:
            await turn.log.wait_beyond(turn.log.last_seq)
    # No checkpoint between the look at the log and the look at the connection.
    if turn.record().state != "completed":
        assert upstream.client_has_closed(prompt), f"{prompt}: the end was published while the model call went on"


async def check_record(served: Serving, session_id: str, turn_id: str) -> None:
    status, body = await served.call("GET", f"/sessions/{session_id}/turns/{turn_id}")
    assert status == 200
    replay, _ = await served.service.sessions.open_events(session_id, turn_id)
    events = await read_all(replay)
    terminal = [event for event in events if isinstance(event, TerminalEvent)]
    assert terminal == events[-1:]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert terminal[0].text_length == len(str(body["text"]))


async def test_turns_ended_at_random_moments_leave_nothing() -> None:
    upstream = Upstream()
    ended: list[str] = []
    limit = trio.CapacityLimiter(AT_ONCE)

    async def bounded(served: Serving, index: int) -> None:
        async with limit:
            with trio.fail_after(60):
                await one_turn(served, upstream, index, CAUSES[index % len(CAUSES)], ended)

    async with open_raw_server(upstream.behave) as server:
        settings = Settings(store_url="memory:", model_url=server.url, model="any", next_token_timeout_s=1.5)
        async with serving(settings) as served:
            async with trio.open_nursery() as nursery:
                for index in range(TURNS):
                    nursery.start_soon(partial(bounded, served, index))
            statistics = served.service.sessions.statistics()
            assert (statistics.turns_running, statistics.turns_queued, statistics.sessions_live) == (0, 0, 0)
            assert (statistics.ends_not_stored, statistics.streams_open) == (0, 0)
        assert server.established == 0
    assert len(ended) == TURNS
    kinds = Counter(ended)
    assert set(kinds) >= {
        "cancelled:disconnected",
        "cancelled:requested",
        "cancelled:session_deleted",
        "cancelled:superseded",
        "failed:",
        "completed:",
    }
