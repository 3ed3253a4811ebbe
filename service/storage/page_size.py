"""Where a page ends that is bounded in bytes: the same rule for every store."""

from collections.abc import Iterable, Sequence

from service.storage.page_cursor import SessionPosition, encode_cursor
from service.storage.records import Page, SessionRecord


def fitting(sizes: Iterable[int], *, bytes_max: int | None, rows_min: int = 1) -> int:
    """The number of rows that fit on a page, from the first on: ``rows_min`` at least, if there are so many.

    Args:
        sizes: The size of each row. No size is taken after that of the first row that does not fit.
    """
    rows = 0
    total = 0
    for size in sizes:
        total += size
        if bytes_max is not None and total > bytes_max and rows >= rows_min:
            break
        rows += 1
    return rows


def page_of_sessions(
    found: Sequence[SessionRecord],
    *,
    limit: int,
    bytes_max: int | None,
    rest: SessionPosition | None = None,
    partial: bool = False,
) -> Page[SessionRecord]:
    """The page of a listing, newest session first.

    Args:
        found: The sessions that were found: one more than ``limit`` if there are so many.
        rest: The last place at which was looked, if the search ended before it had found so many.
    """
    data = tuple(found[: fitting((session.text_bytes for session in found[:limit]), bytes_max=bytes_max)])
    cursors = tuple(encode_cursor(SessionPosition(session.created_at, session.id)) for session in data)
    if len(data) < len(found):
        following: str | None = cursors[-1]
    else:
        following = None if rest is None else encode_cursor(rest)
    return Page(data, following, cursors, partial=partial)
