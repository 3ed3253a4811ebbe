"""Pages of rows, bounded in rows and in bytes."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import trio

from service.sessions.messages import MessageRecord
from service.storage.records import Page, SessionRecord, TurnRecord

PAGE_BYTES_MAX = 4 * 1024 * 1024
"""A page ends once its rows have this many bytes. The rows of its last step may exceed the bound."""
_STEP = 10
_LONG_BYTES = 64 * 1024
"""Encoding a longer row takes up to milliseconds, so other tasks get a turn after it."""

R = TypeVar("R", SessionRecord, TurnRecord, MessageRecord)


class Listing(Protocol[R]):
    """Reads one page."""

    async def __call__(self, *, limit: int, after: str | None) -> Page[R]: ...


async def read_page(
    listing: Listing[R], shown: Callable[[R], msgspec.Struct], *, limit: int, after: str | None
) -> Page[msgspec.Raw]:
    """Read a page of at most ``limit`` rows, each encoded as JSON, in steps of a few rows to save memory.

    Args:
        shown: Makes the wire type of a row.

    Raises the errors of ``listing``.
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
