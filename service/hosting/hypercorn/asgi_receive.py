"""ASGI's ``receive``: delivers hypercorn's messages to a request without a task and an event loop round for each.

hypercorn sends the messages through a channel, and Quart-Trio reads the channel in a task of its own. This takes five
steps of the event loop for every request and two for every end: a fifth of the time of a shutdown of hundreds of
streams. The queue here hands a message over inside of the call that puts it.
Proven by ``tests/hosting/hypercorn/test_asgi_receive.py``.
"""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, Scope

from service.api.http.end_of_input import LEAVES_AT_END

CHECKPOINT_MESSAGES = 16
"""Messages after which other tasks get a turn: one packet can hold a body in many pieces of one byte."""


class ReceiveQueue:
    """ASGI's ``receive`` of one request. After :meth:`deliver_to` it passes each message on at once.

    Args:
        kept_max: Messages that are kept for ``receive``. With so many kept, :meth:`put` waits.
    """

    def __init__(self, *, kept_max: int) -> None:
        self._kept_max = kept_max
        self._kept: list[ASGIReceiveEvent] = []  # they are few, and an empty deque takes 700 bytes
        self._last: ASGIReceiveEvent | None = None
        self._changed: trio.Event | None = None
        self._take: Callable[[Any], None] | None = None
        self._count = 0
        self._is_over = False
        self._over: trio.Event | None = None

    async def __call__(self) -> ASGIReceiveEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._kept:
            if self._last is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()  # an application may ask again and again
                return self._last
            await self._wait_for_change()
        message = self._kept.pop(0)
        self._note_change()
        return message

    def deliver_to(self, take: Callable[[Any], None]) -> None:
        """Give the messages that are kept, and all later ones, to ``take``."""
        self._take = take
        while self._kept:
            take(self._kept.pop(0))
        if self._last is not None:
            take(self._last)
        self._note_change()

    async def put(self, message: ASGIReceiveEvent) -> None:
        """Add a message. Called by the server."""
        self._count += 1
        if self._count % CHECKPOINT_MESSAGES == 0:
            await trio.lowlevel.checkpoint()
        while self._take is None and len(self._kept) >= self._kept_max:
            await self._wait_for_change()
        if self._take is not None:
            self._take(message)
        else:
            self._kept.append(message)
            self._note_change()

    def put_last(self, message: ASGIReceiveEvent) -> None:
        """Add the message that ends the others, also if there is no room. Only the first call counts."""
        if self._last is None:
            self._last = message
            if self._take is not None:
                self._take(message)
            self._note_change()

    async def _wait_for_change(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()

    def _note_change(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def note_over(self) -> None:
        """Note that the request is over, or that an end of its input ends it (:data:`LEAVES_AT_END`)."""
        self._is_over = True
        if self._over is not None:
            self._over.set()

    async def wait_over(self) -> None:
        """Return once :meth:`note_over` was called."""
        if not self._is_over:
            self._over = trio.Event()
            await self._over.wait()


class ConnectionTaskGroup(TaskGroup):
    """hypercorn's task group of a connection, with a :class:`ReceiveQueue` for each request.

    Attributes:
        newest: The queue of the connection's latest request.
    """

    newest: ReceiveQueue | None = None

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Start the application's task for one request. Returns the function that sends messages to it."""
        receive_queue = self.newest = ReceiveQueue(kept_max=config.max_app_queue_size)
        cast("dict[str, Any]", scope)[LEAVES_AT_END] = receive_queue.note_over
        assert self._nursery is not None
        self._nursery.start_soon(_run_app, app, config, scope, receive_queue, send)
        return receive_queue.put

    def cancel(self) -> None:
        """End the connection whose tasks these are."""
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    # hypercorn's method returns nothing, so a cancellation of the nursery would go on to the server and end it.
    async def __aexit__(  # type: ignore[override]
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._nursery_manager is not None
        return await self._nursery_manager.__aexit__(kind, error, traceback)  # noqa: ASYNC102  no cleanup: the wait


async def _run_app(
    app: AppWrapper,
    config: Config,
    scope: Scope,
    receive_queue: ReceiveQueue,
    send: Callable[[ASGISendEvent | None], Awaitable[None]],
) -> None:
    try:
        await _handle(app, config, scope, receive_queue, send, trio.to_thread.run_sync, trio.from_thread.run)
    finally:
        receive_queue.note_over()
