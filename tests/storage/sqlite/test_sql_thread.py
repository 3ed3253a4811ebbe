"""A thread that hangs: steps of callers that have left hold nothing, the queue is bounded, a late open is closed."""

import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import apsw
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from service.errors import StoreError
from service.storage import sql_thread
from service.storage.sql_thread import SqlThread, Step


class Hanging:
    """Batches of which the first hangs until ``goes_on`` is set."""

    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.goes_on = threading.Event()

    def open(self) -> None:
        pass

    def run(self, arriving: Iterator[Step[apsw.Connection, Any]]) -> Sequence[Sequence[Step[apsw.Connection, Any]]]:
        steps = [next(arriving)]
        self.hangs.set()
        assert self.goes_on.wait(20)
        steps += arriving
        with apsw.Connection(":memory:") as db:
            for step in steps:
                step.run(db)
        return (steps,)

    def run_housekeeping(self, *, idle: bool) -> None:
        return None

    def close(self) -> None:
        pass


@asynccontextmanager
async def open_hanging_thread() -> AsyncIterator[tuple[SqlThread[apsw.Connection], Callable[[], None]]]:
    """A thread that hangs in a step until the function is called, or the context is left."""
    batches = Hanging()
    thread = SqlThread("hanging", batches)
    await thread.open()
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(thread.call, lambda _: None)
                await trio.to_thread.run_sync(batches.hangs.wait)
                try:
                    yield thread, batches.goes_on.set
                finally:
                    batches.goes_on.set()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 20):
            await thread.close()


class Input:
    """What a step would write."""

    def write(self, _: apsw.Connection) -> None:
        raise AssertionError("the step of a caller that has left runs")


async def test_a_step_whose_caller_has_left_holds_nothing_while_the_thread_hangs() -> None:
    async with open_hanging_thread() as (thread, _):
        given = Input()
        kept = weakref.ref(given)
        async with trio.open_nursery() as leaving:
            leaving.start_soon(thread.call, given.write)
            del given
            await wait_all_tasks_blocked()
            leaving.cancel_scope.cancel()
        gc.collect()
        assert kept() is None


async def test_a_bounded_number_of_steps_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_thread, "STEPS_MAX", 5)
    done: list[int] = []
    async with open_hanging_thread() as (thread, go_on), trio.open_nursery() as nursery:
        async with trio.open_nursery() as leaving:
            for _ in range(3):
                leaving.start_soon(thread.call, Input().write)
            await wait_all_tasks_blocked()
            leaving.cancel_scope.cancel()
        for number in range(2):
            nursery.start_soon(thread.call, partial(lambda number, _: done.append(number), number))
            await wait_all_tasks_blocked()
        try:
            with pytest.raises(StoreError, match="5 steps wait"), trio.fail_after(60):
                await thread.call(Input().write)
            assert done == []
        finally:
            go_on()
    assert done == [0, 1]


class OpensLate(Hanging):
    """Batches whose connection is made only when ``goes_on`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def open(self) -> None:
        self.hangs.set()
        assert self.goes_on.wait(20)
        self.opened.append("connection")

    def close(self) -> None:
        self.opened.remove("connection")


def test_a_connection_that_is_made_when_the_event_loop_is_gone_is_closed() -> None:
    batches = OpensLate()

    async def leave_the_start() -> None:
        thread = SqlThread("opens late", batches)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.open)
            await trio.to_thread.run_sync(batches.hangs.wait)
            nursery.cancel_scope.cancel()

    trio.run(leave_the_start)
    (thread,) = (it for it in threading.enumerate() if it.name == "opens late")
    batches.goes_on.set()
    thread.join(20)
    assert not thread.is_alive()
    assert batches.opened == []
