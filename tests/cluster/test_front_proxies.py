"""nginx and HAProxy as in ``deploy/``: streams are not held back, nothing is sent twice, a stop reaches no client."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from bench.database import open_database
from tests.cluster.calls import Answer, call, open_call
from tests.cluster.chaos import have_database
from tests.cluster.cluster import KEY, Door, open_cluster
from tests.cluster.deployed_front import PROXIES, needed_program, open_front
from tests.cluster.history import History
from tests.postgres_server import needed_binaries

pytestmark = pytest.mark.processes

CAP_S = 200
STREAMS = 6
TOKENS = 60
"""Of each stream. It comes one a second until a replica stops, and then twenty a second: however slow the machine is,
the streams run at that moment."""
SLOW = 20
LAME_DUCK_S = {"nginx": "3", "haproxy": "8"}
"""As deploy/haproxy.cfg asks for, and more for a check that comes late on a busy machine."""
AUTH = {"Authorization": f"Bearer {KEY}"}


class CuttingServer:
    """Reads requests and closes without an answer, but for checks. Counts the requests by method."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            request = b""
            while b"\r\n\r\n" not in request:
                if not (part := await stream.receive_some()):
                    return
                request += part
            if request.startswith(b"GET /readyz"):
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                self.asked[request.split()[0].decode()] += 1


@asynccontextmanager
async def open_cutting_servers(server: CuttingServer) -> AsyncIterator[list[Door]]:
    async with trio.open_nursery() as nursery:
        doors = []
        for _ in range(3):
            [listener] = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
            doors.append(Door("127.0.0.1", listener.socket.getsockname()[1]))
        yield doors
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_post_that_was_sent_is_sent_to_no_other_replica(proxy: str, tmp_path: Path) -> None:
    server = CuttingServer()
    with trio.fail_after(CAP_S):
        async with open_cutting_servers(server) as doors, open_front(proxy, doors, tmp_path) as front:
            answer = await call(front, "POST", "/sessions/s/turns", body={"input": "hi"})
            assert answer.status == 502
            assert server.asked == {"POST": 1}


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_replica_that_stops_or_dies_behind_a_proxy_costs_no_stream_and_no_call(
    proxy: str, tmp_path: Path
) -> None:
    needed_program(proxy)
    cluster_of = partial(open_cluster, LAME_DUCK_TIMEOUT_S=LAME_DUCK_S[proxy], DRAIN_TIMEOUT_S="20")
    with open_database(needed_binaries()) as database, trio.fail_after(CAP_S):
        await have_database(database)
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(cluster_of(database, tmp_path, History()))
            front = await stack.enter_async_context(open_front(proxy, cluster.doors, tmp_path))
            stopping, dying, _ = cluster.replicas

            async def stop() -> None:
                stopping.stop()
                await cluster.upstream.set_pace(1)

            await cluster.upstream.set_pace(SLOW)
            process = stopping.process
            assert process is not None
            refused = await _have_streams_while(front, stop)
            await process.wait_gone()  # the next one may serve already
            assert '"turns_interrupted": 0' in stopping.log
            if proxy == "haproxy":
                assert refused == [], "the check has taken it out before it refused work"
            assert all(it.status == 503 and int(it.headers["retry-after"]) > 0 for it in refused)
            await stopping.wait_serving()

            dying.rest()
            dying.kill()
            await dying.wait_gone()
            for _ in range(10):
                assert (await call(front, "POST", "/sessions", AUTH, {})).status == 201


async def _have_streams_while(front: Door, stop: Callable[[], Awaitable[None]]) -> list[Answer]:
    """Have streams end, with new sessions made meanwhile. Returns the answers that were refusals."""
    refused: list[Answer] = []
    all_run, all_ended = trio.Event(), trio.Event()
    running = ended = 0

    async def stream(number: int) -> None:
        nonlocal running, ended
        session = msgspec.json.decode((await call(front, "POST", "/sessions", AUTH, {})).body)["id"]
        body = {"input": f"s{number} tokens={TOKENS} rate=20"}
        headers = AUTH | {"Accept": "text/event-stream"}
        kinds: Counter[str] = Counter()
        async with open_call(front, "POST", f"/sessions/{session}/turns", headers, body) as opened:
            async for event in opened.events(silence_s=10):
                kinds[event.type] += 1
                if kinds["turn.delta"] == 1 and event.type == "turn.delta":
                    told = msgspec.json.decode((await call(front, "GET", f"/sessions/{session}", AUTH)).body)
                    assert told["status"] == "running", "the first token was held back until the turn had ended"
                    running += 1
                    if running == STREAMS:
                        all_run.set()
        assert kinds == {"turn.started": 1, "turn.delta": kinds["turn.delta"], "turn.completed": 1}
        ended += 1
        if ended == STREAMS:
            all_ended.set()

    async def make_sessions() -> None:
        while not all_ended.is_set():
            answer = await call(front, "POST", "/sessions", AUTH, {})
            if answer.status != 201:
                refused.append(answer)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for number in range(STREAMS):
            nursery.start_soon(stream, number)
        await all_run.wait()
        nursery.start_soon(make_sessions)
        await stop()
    return refused
