"""hypercorn's messages to a request, with and without a task for each."""

from collections import Counter
from typing import Any, cast

import hypercorn.trio.tcp_server
import pytest
import trio
import trio.testing
from hypercorn.trio.task_group import TaskGroup
from quart_trio import QuartTrio

from service.api.http.request_body import BoundedRequest
from service.hosting.hypercorn.asgi_receive import CHECKPOINT_MESSAGES, ConnectionTaskGroup, ReceiveQueue
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
from tests.hosting.conftest import Serve

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def message(number: int) -> Any:
    return {"type": "http.request", "body": b"%d" % number, "more_body": True}


async def test_messages_are_received_in_order() -> None:
    receive_queue = ReceiveQueue(kept_max=10)
    for number in range(10):
        await receive_queue.put(message(number))
    assert [await receive_queue() for _ in range(10)] == [message(number) for number in range(10)]


async def test_kept_messages_are_handed_over_first() -> None:
    receive_queue = ReceiveQueue(kept_max=10)
    taken: list[Any] = []
    await receive_queue.put(message(0))
    receive_queue.deliver_to(taken.append)
    await receive_queue.put(message(1))
    assert taken == [message(0), message(1)]


async def test_a_sender_waits_while_the_queue_is_full() -> None:
    receive_queue = ReceiveQueue(kept_max=1)
    taken: list[Any] = []

    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for number in range(3):
                await receive_queue.put(message(number))

        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        receive_queue.deliver_to(taken.append)
    assert taken == [message(number) for number in range(3)]


async def test_the_last_message_needs_no_room_and_is_received_again_and_again() -> None:
    receive_queue = ReceiveQueue(kept_max=1)
    await receive_queue.put(message(0))
    receive_queue.put_last(message(1))
    receive_queue.put_last(message(2))
    assert [await receive_queue() for _ in range(3)] == [message(0), message(1), message(1)]


async def test_the_last_message_wakes_all_that_wait_for_one() -> None:
    receive_queue = ReceiveQueue(kept_max=1)
    received: list[Any] = []

    async def receive() -> None:
        received.append(await receive_queue())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        receive_queue.put_last(message(0))
    assert received == [message(0)] * 2


async def test_kept_messages_and_the_last_one_are_handed_over_in_order() -> None:
    receive_queue = ReceiveQueue(kept_max=2)
    taken: list[Any] = []
    await receive_queue.put(message(0))
    receive_queue.put_last(message(1))
    receive_queue.deliver_to(taken.append)
    assert taken == [message(0), message(1)]


async def test_many_messages_do_not_have_the_event_loop_for_themselves() -> None:
    receive_queue = ReceiveQueue(kept_max=10)
    receive_queue.deliver_to(lambda _: None)
    with trio.CancelScope() as scope:
        scope.cancel()
        for number in range(CHECKPOINT_MESSAGES):
            await receive_queue.put(message(number))
    assert scope.cancelled_caught


class Steps(trio.abc.Instrument):
    """Counts the tasks that start."""

    def __init__(self) -> None:
        self.spawned = Counter[str]()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.spawned[task.name] += 1


async def tasks_of_a_request(serve: Serve) -> int:
    app = QuartTrio("test")
    app.asgi_http_class = AsgiRequest
    app.request_class = BoundedRequest

    @app.get("/")
    async def index() -> str:
        return "here"

    steps = Steps()
    async with serve(app) as server, await server.connect() as stream:
        await trio.testing.wait_all_tasks_blocked(0.05)
        trio.lowlevel.add_instrument(steps)
        await stream.send_all(GET)
        with trio.fail_after(10):
            answer = b"".join([part async for part in stream])
        trio.lowlevel.remove_instrument(steps)
    assert answer.endswith(b"here")
    return steps.spawned.total()


async def test_a_request_is_one_task(serve: Serve, connections: Connections) -> None:
    assert await tasks_of_a_request(serve) == 1


@pytest.mark.removal
async def test_hypercorns_task_group_still_lets_its_own_cancellation_out() -> None:
    """This test fails once hypercorn's group absorbs it; then ConnectionTaskGroup.__aexit__ is no longer needed."""
    comes_out = False
    try:
        async with TaskGroup() as tasks:
            tasks.spawn(trio.sleep_forever)
            assert tasks._nursery is not None
            tasks._nursery.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()
    except trio.Cancelled:  # noqa: ASYNC103
        comes_out = True  # outside its cancel scope: a caller would have to re-raise it, and no scope catches it
    assert comes_out


async def test_our_task_group_keeps_its_own_cancellation() -> None:
    async with ConnectionTaskGroup() as tasks:
        tasks.spawn(trio.sleep_forever)
        cast("ConnectionTaskGroup", tasks).cancel()
        await trio.lowlevel.checkpoint()


@pytest.mark.removal
async def test_the_receive_queue_is_still_needed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test fails once Quart-Trio and hypercorn need only one task themselves; then ReceiveQueue is not needed."""
    monkeypatch.setattr(hypercorn.trio.tcp_server, "TaskGroup", TaskGroup)
    assert await tasks_of_a_request(serve) > 1
