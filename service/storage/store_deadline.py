"""The bound on every wait for the store."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from service.errors import StoreError
from service.freezes import ScopeDeadline, extended_when_late


@contextmanager
def answered_within(timeout_s: float, *, shield: bool = False) -> Iterator[ScopeDeadline]:
    """Bound the awaits in the body to ``timeout_s`` seconds (``store_timeout_s``).

    Gives the deadline: a call of many steps restarts it, if each step may take the whole time. After a freeze of this
    process the deadline moves, because the store's threads were frozen, too.

    Args:
        shield: Whether the body is shielded from cancellation from outside, until this deadline.

    Raises:
        StoreError: The time is over. The outcome of a write in the body is unknown.
    """
    try:
        with (
            trio.fail_after(timeout_s, shield=shield) as scope,
            extended_when_late(scope, timeout_s=timeout_s) as deadline,
        ):
            yield deadline
    except trio.TooSlowError as error:
        raise StoreError("The store did not answer in time.") from error


@asynccontextmanager
async def answered_in_turn(lock: trio.Lock, timeout_s: float) -> AsyncIterator[None]:
    """Hold a lock. A free lock is taken without a checkpoint.

    Raises:
        StoreError: The wait for the lock took longer than ``timeout_s``.
    """
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        with answered_within(timeout_s):
            await lock.acquire()
    try:
        yield
    finally:
        lock.release()
