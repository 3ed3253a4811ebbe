"""Pages that are bounded in bytes as well as in rows."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import trio

from service.sessions.messages import MessageRecord
from service.storage.records import Page, SessionRecord, TurnRecord

PAGE_BYTES_MAX = 4 * 1024 * 1024
"""A page ends where its rows have reached this. What one step reads may be beyond it."""
_STEP = 10
_LONG_BYTES = 64 * 1024
"""Encoding a longer row takes up to milliseconds: others have their turn then."""

R = TypeVar("R", SessionRecord, TurnRecord, MessageRecord)


class Listing(Protocol[R]):
    """Reads one page."""

    async def __call__(self, *, limit: int, after: str | None) -> Page[R]: ...


async def read_page(
    listing: Listing[R], shown: Callable[[R], msgspec.Struct], *, limit: int, after: str | None
) -> Page[msgspec.Raw]:
    """A page of at most ``limit`` rows, each as JSON already, read in steps of a few: all are in memory at once.

    Args:
        shown: The row as it is shown.

    Raises: What ``listing`` does.
    """
    rows: list[msgspec.Raw] = []
    size = 0
    while True:
        step = await listing(limit=min(_STEP, limit - len(rows)), after=after)
        for record in step.data:
            row = msgspec.json.encode(shown(record))
            rows.append(msgspec.Raw(row))
            size += len(row)
            if len(row) > _LONG_BYTES:
                await trio.lowlevel.checkpoint()
        after = step.next
        if after is None or len(rows) >= limit or size >= PAGE_BYTES_MAX:
            return Page(data=tuple(rows), next=after)
