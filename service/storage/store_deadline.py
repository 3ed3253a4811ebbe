"""The bound on every wait for the store."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from service.errors import StoreError
from service.freezes import forgiving


@contextmanager
def answered_within(timeout_s: float) -> Iterator[Callable[[], None]]:
    """Bound what is awaited inside to ``timeout_s`` seconds (``store_timeout_s``).

    What it gives begins the time anew: for a call of many steps, of which each may take so long. Where this process was
    frozen, so was the store's side of it: there is time for the answer.

    Raises:
        StoreError: The time is over. Whether a write that was under way has happened is unknown.
    """
    try:
        with trio.fail_after(timeout_s) as scope, forgiving(scope, timeout_s=timeout_s) as deadline:
            yield deadline.begin_anew
    except trio.TooSlowError as error:
        raise StoreError(f"The store did not answer within {timeout_s:g} s.") from error


@asynccontextmanager
async def answered_in_turn(lock: trio.Lock, timeout_s: float) -> AsyncIterator[None]:
    """Hold a lock that was waited for no longer than ``timeout_s``. Raises: StoreError, where it was."""
    with answered_within(timeout_s):
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()
