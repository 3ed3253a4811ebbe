"""Pages of rows, bounded in rows and in bytes."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import trio

from service.api.http.held_bytes import room_for_answer
from service.api.http.long_json import encode_json
from service.sessions.messages import MessageRecord
from service.storage.records import Match, Page, SessionRecord, TurnRecord

PAGE_BYTES_MAX = 1024 * 1024
"""Bound on the rows of a page, as JSON; a row that is larger comes alone.

No setting: a client has no use for larger pages, because ``next`` carries on. While a page is made, its records take
several times the memory of its JSON, and the JSON is held until the client has read it.
"""
_LONG_BYTES = 64 * 1024
"""Encoding so much takes up to a millisecond, so other tasks get a turn after it."""

R = TypeVar("R", SessionRecord, Match, TurnRecord, MessageRecord)


class Listing(Protocol[R]):
    """Reads one page, which has a cursor for each row."""

    async def __call__(self, *, limit: int, after: str | None, bytes_max: int) -> Page[R]: ...


async def read_page(
    listing: Listing[R], shown: Callable[[R], msgspec.Struct], *, limit: int, after: str | None
) -> Page[msgspec.Raw]:
    """Make the page that the current request asks for, as :func:`make_page`, if there is room for it.

    Raises the errors of ``listing``, and HeldBytesLimitError.
    """
    with room_for_answer(PAGE_BYTES_MAX):
        return await make_page(listing, shown, limit=limit, after=after)


async def make_page(
    listing: Listing[R], shown: Callable[[R], msgspec.Struct], *, limit: int, after: str | None
) -> Page[msgspec.Raw]:
    """Read a page of at most ``limit`` rows, each encoded as JSON; empty only if the listing has no more rows, or
    the page is partial.

    Args:
        shown: Makes the wire type of a row.

    Raises the errors of ``listing``.
    """
    page = await listing(limit=limit, after=after, bytes_max=PAGE_BYTES_MAX)
    while not page.data and page.next is not None and not page.partial:
        page = await listing(limit=limit, after=page.next, bytes_max=PAGE_BYTES_MAX)
    rows: list[msgspec.Raw] = []
    size = paused_at = 0
    for record in page.data:
        row = await encode_json(shown(record))
        size += len(row)
        if rows and size > PAGE_BYTES_MAX:
            return Page(data=tuple(rows), next=page.cursors[len(rows) - 1], partial=page.partial)
        rows.append(msgspec.Raw(row))
        if size - paused_at > _LONG_BYTES:
            paused_at = size
            await trio.lowlevel.checkpoint()
    return Page(data=tuple(rows), next=page.next, partial=page.partial)
