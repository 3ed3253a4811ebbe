"""A store that does its writes in the order of the calls, and one of them later than its caller waits.

It behaves as a store with threads or a network: a caller that gives up a write which has begun does not stop it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal

import trio

from service.errors import StoreError
from service.storage.memory import MemoryStore

WRITES = (
    *("create_session", "fork_session", "update_session", "keep_title", "mark_deleted", "is_marked", "remove_deleted"),
    *(
        "delete_expired",
        "check_key",
        "begin_turn",
        "add_turns",
        "delete_turns",
        "delete_item",
        "start_turn",
        "checkpoint_turns",
        "end_turn",
    ),
)
Outcome = Literal["lands", "is lost"]


class LateStore(MemoryStore):
    """Made by :func:`open_late_store`.

    Attributes:
        late: The name of the one slow write, set before the call; the call clears it.
        late_s: How long the slow write takes.
        outcome: Whether the slow write happens in the end.
    """

    def __init__(self, jobs: trio.MemorySendChannel["_Job"]) -> None:
        super().__init__()
        self.late: str | None = None
        self.late_s = 6.5
        self.outcome: Outcome = "lands"
        self._jobs = jobs
        for name in WRITES:
            setattr(self, name, partial(self._in_order, name, getattr(self, name)))

    async def _in_order(self, name: str, write: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        job = _Job(partial(write, *args, **kwargs))
        if self.late == name:
            self.late = None
            job.late_s, job.is_lost = self.late_s, self.outcome == "is lost"
        await self._jobs.send(job)
        try:
            await job.done.wait()
        except trio.Cancelled:
            job.given_up = True
            raise
        if job.error is not None:
            raise job.error
        return job.result


class _Job:
    def __init__(self, write: Callable[[], Awaitable[Any]]) -> None:
        self.write = write
        self.done = trio.Event()
        self.late_s = 0.0
        self.is_lost = self.given_up = False
        self.result: Any = None
        self.error: Exception | None = None

    async def run(self) -> None:
        if self.given_up:
            return  # given up before the write began
        await trio.sleep(self.late_s)
        try:
            if self.is_lost:
                raise StoreError("It did not work out in the end.")
            self.result = await self.write()
        except Exception as error:  # noqa: BLE001  the caller gets the error
            self.error = error
        self.done.set()


@asynccontextmanager
async def open_late_store() -> AsyncIterator[LateStore]:
    send, receive = trio.open_memory_channel[_Job](100)

    async def work() -> None:
        async for job in receive:
            await job.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        yield LateStore(send)
        nursery.cancel_scope.cancel()
