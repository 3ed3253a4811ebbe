"""The bound on every wait for the store."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from service.errors import StoreError


@contextmanager
def answered_within(timeout_s: float) -> Iterator[None]:
    """Bound what is awaited inside to ``timeout_s`` seconds (``store_timeout_s``).

    Raises:
        StoreError: The time is over. Whether a write that was under way has happened is unknown.
    """
    try:
        with trio.fail_after(timeout_s):
            yield
    except trio.TooSlowError as error:
        raise StoreError(f"The store did not answer within {timeout_s:g} s.") from error
