"""A store that is slow, refuses and hangs, before or after its work."""

from collections.abc import Callable
from functools import wraps
from random import Random
from typing import Any

import trio

from service.errors import StoreError
from service.storage.memory import MemoryStore

HANG_S = 100.0


class UnreliableStore:
    """A memory store behind a bad line. ``random`` decides what happens to each call.

    Attributes:
        faulty: Whether calls are also refused and hang, instead of only being slow.
    """

    def __init__(self, random: Random, *, faulty: bool) -> None:
        self.inner = MemoryStore()
        self.faulty = faulty
        self.quick = False
        self._random = random

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        return self._on_a_bad_line(method) if callable(method) else method

    def _on_a_bad_line(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._trouble()
            result = await method(*args, **kwargs)
            await self._trouble()
            return result

        return call

    async def _trouble(self) -> None:
        if self.quick:
            return
        if self.faulty and self._random.random() < 0.05:
            if self._random.random() < 0.3:
                await trio.sleep(HANG_S)
            raise StoreError("The line is bad.")
        await trio.sleep(self._random.choice([0, 0, 0, 0, 1]))
