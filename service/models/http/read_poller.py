"""One task that waits for many sockets and calls a function where there is something to read.

A task that waits by itself costs more than the rest of a token's way: Trio registers its socket anew for each wait, and
then runs the task through all of its callers. Here each socket is registered once, with an epoll of the poller's own,
and the data of all sockets that are ready is taken in the same step. The task to which a socket belongs sleeps
meanwhile, and can be cancelled at this wait as at any other.
"""

import select
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from service.freezes import FreezeWatch, current_watch
from service.steps import STEP_S

CALLS_MAX = 64
"""How many functions are called in one step; other tasks get a turn after it. A token takes some 30 microseconds, and
what has come meanwhile in a full event loop takes longer: a step ends after :data:`~service.steps.STEP_S`, too."""


class ReadPoller:
    """See the module. :meth:`run` must run while tasks wait."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._waiting: dict[int, _Waiting] = {}

    def __repr__(self) -> str:
        return f"<ReadPoller: {len(self._waiting)} wait>"

    async def call_while_readable(self, fileno: int, on_readable: Callable[[], bool]) -> None:
        """Call ``on_readable`` each time there is something to read, until it returns False. May be cancelled.

        Once ``on_readable`` has returned False, or this task was cancelled, it is not called again. It is called in
        another task, with the context variables of this one, and seldom for nothing. It must not close the socket. If
        the system takes no more sockets to wait for, this returns at once.

        Raises:
            Exception: What ``on_readable`` has raised.
        """
        waiting = _Waiting(trio.lowlevel.current_task(), on_readable)
        assert fileno not in self._waiting, "two tasks wait for one socket"
        try:
            self._epoll.register(fileno, select.EPOLLIN)
        except OSError:
            return
        self._waiting[fileno] = waiting

        def leave(_: object) -> trio.lowlevel.Abort:
            self._forget(fileno)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)
        if waiting.error is not None:
            raise waiting.error

    async def run(self) -> None:
        """Call the functions of waiting tasks, until cancelled. No function's failure ends this task."""
        watch = current_watch()
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            await self._call_all(watch)

    async def _call_all(self, watch: FreezeWatch | None) -> None:
        """Call the functions of the sockets that are ready, in steps. A socket is called again after all others."""
        began = watch.now() if watch is not None else 0.0
        while True:
            ready = self._epoll.poll(0, CALLS_MAX)
            step_end = time.perf_counter() + STEP_S
            for index, (fileno, _) in enumerate(ready, 1):
                self._call(fileno)
                is_over = index == len(ready) < CALLS_MAX
                if not is_over and (index == CALLS_MAX or time.perf_counter() >= step_end):
                    await trio.lowlevel.checkpoint()
                    if watch is not None:
                        watch.note_busy(began)
                    step_end = time.perf_counter() + STEP_S
            if len(ready) < CALLS_MAX:
                return

    def _call(self, fileno: int) -> None:
        waiting = self._waiting.get(fileno)
        if waiting is None:
            return  # its task was cancelled after the epoll had named it
        try:
            goes_on = waiting.call()
        except Exception as error:  # noqa: BLE001  it is raised in the task that waits
            waiting.error = error
            goes_on = False
        if not goes_on and self._waiting.get(fileno) is waiting:
            self._forget(fileno)
            trio.lowlevel.reschedule(waiting.task)

    def _forget(self, fileno: int) -> None:
        del self._waiting[fileno]
        self._epoll.unregister(fileno)

    def close(self) -> None:
        """Close the epoll. No task may wait any more."""
        self._epoll.close()


class _Waiting:
    """A task that waits."""

    __slots__ = ("error", "on_readable", "task")

    def __init__(self, task: trio.lowlevel.Task, on_readable: Callable[[], bool]) -> None:
        self.task = task
        self.on_readable = on_readable
        self.error: Exception | None = None

    def call(self) -> bool:
        return self.task.context.run(self.on_readable)


@asynccontextmanager
async def open_read_poller() -> AsyncIterator[ReadPoller | None]:
    """Open a poller; None on a system without epoll, where each task has to wait by itself."""
    if not hasattr(select, "epoll"):
        yield None
        return
    poller = ReadPoller()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run, name="read poller")
            yield poller
            nursery.cancel_scope.cancel()
    finally:
        poller.close()
