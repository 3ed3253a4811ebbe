"""The pace of requests that begin turns or streams."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.http.pacing import Pace, is_paced
from tests.api.inprocess import LOOPBACK, open_api


class Arrivals:
    """Tasks that wait for a pace, in the order of their names."""

    def __init__(self, nursery: trio.Nursery, pace: Pace) -> None:
        self.begun: list[int] = []
        self._nursery = nursery
        self._pace = pace

    async def arrive(self, names: range) -> list[trio.CancelScope]:
        return [await self._nursery.start(self.run, name) for name in names]

    async def run(self, name: int, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await self._pace.wait()
            self.begun.append(name)


async def test_no_more_than_a_few_begin_in_a_round_of_the_event_loop() -> None:
    pace = Pace(at_once=3)
    async with trio.open_nursery() as nursery:
        begun = 0

        async def one() -> None:
            nonlocal begun
            await pace.wait()
            begun += 1

        for _ in range(30):
            nursery.start_soon(one)
        rounds = 0
        while begun < 30:
            before = begun
            await trio.lowlevel.checkpoint()
            rounds += 1
            assert begun - before <= 3
            assert rounds < 100
    assert rounds >= 10
    assert repr(pace) == "<Pace: 3 free, 0 wait>"


async def test_the_first_that_came_begins_first(autojump_clock: MockClock) -> None:
    pace = Pace(at_once=1)
    async with trio.open_nursery() as nursery:
        arrivals = Arrivals(nursery, pace)
        await arrivals.arrive(range(20))
        await wait_all_tasks_blocked()
    assert arrivals.begun == list(range(20))


async def test_a_request_that_leaves_holds_up_no_other() -> None:
    pace = Pace(at_once=1)
    for nth in range(8):
        async with trio.open_nursery() as nursery:
            arrivals = Arrivals(nursery, pace)
            scopes = await arrivals.arrive(range(4))
            for _ in range(nth):
                await trio.lowlevel.checkpoint()
            for scope in scopes[:3]:
                scope.cancel()
            with trio.fail_after(60):
                while 3 not in arrivals.begun:
                    await trio.lowlevel.checkpoint()
        assert repr(pace) == "<Pace: 1 free, 0 wait>"


@pytest.mark.parametrize(
    ("method", "path", "waits"),
    [
        ("POST", "/chat", True),
        ("POST", "/prefix/sessions/a/turns", True),
        ("GET", "/sessions/a/turns/b/events", True),
        ("POST", "/sessions/a/turns/b/retry", True),
        ("GET", "/sessions/a/turns", False),
        ("POST", "/sessions/a/turns/b/cancel", False),
        ("GET", "/healthz", False),
        ("BREW", "/chat", False),
    ],
)
def test_only_requests_that_begin_turns_or_streams_wait(method: str, path: str, waits: bool) -> None:
    assert is_paced({"type": "http", "method": method, "path": path}) == waits
    assert not is_paced({"type": "websocket", "path": path})


async def test_a_probe_is_answered_before_most_of_the_chats_that_came_with_it() -> None:
    async with open_api(model_url="scripted:?silent_after=0") as api, trio.open_nursery() as nursery:

        async def call(method: str, path: str, body: bytes = b"") -> None:
            messages = [{"type": "http.request", "body": body}]

            async def receive() -> Any:
                if not messages:
                    await trio.sleep_forever()
                return messages.pop()

            async def send(_message: Any) -> None:
                pass

            headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
            scope: Any = {"type": "http", "http_version": "1.1", "scheme": "http", "path": path, "query_string": b""}
            await api.app(scope | LOOPBACK | {"method": method, "headers": headers}, receive, send)

        for _ in range(200):
            nursery.start_soon(call, "POST", "/chat", b'{"message": "Hi"}')
        await trio.lowlevel.checkpoint()
        await call("GET", "/readyz")
        assert api.service.sessions.streams.open < 100
        await wait_all_tasks_blocked()
        assert api.service.sessions.streams.open == 200
        nursery.cancel_scope.cancel()
