"""Pages that are bounded in bytes as well as in rows."""

from typing import Protocol, TypeVar

from service.storage.records import Page, SessionRecord, TurnRecord

PAGE_BYTES_MAX = 4 * 1024 * 1024
"""A page ends where its texts have reached this. What one step reads may be beyond it."""
_STEP = 10

R = TypeVar("R", SessionRecord, TurnRecord)


class Listing(Protocol[R]):
    """Reads one page."""

    async def __call__(self, *, limit: int, after: str | None) -> Page[R]: ...


async def read_page(listing: Listing[R], *, limit: int, after: str | None) -> Page[R]:
    """A page of at most ``limit`` rows, read in steps of a few: they may be large, and are all in memory at once.

    Raises: What ``listing`` does.
    """
    data: list[R] = []
    size = 0
    while True:
        step = await listing(limit=min(_STEP, limit - len(data)), after=after)
        data += step.data
        size += sum(map(_bytes_of, step.data))
        after = step.next
        if after is None or len(data) >= limit or size >= PAGE_BYTES_MAX:
            return Page(data=tuple(data), next=after)


def _bytes_of(record: SessionRecord | TurnRecord) -> int:
    """The size of its texts in UTF-8; everything else about it is small."""
    if isinstance(record, SessionRecord):
        return len((record.system_message or "").encode())
    return sum(len(item.text.encode()) for item in (*record.input, *record.output))
