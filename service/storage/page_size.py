"""Where a page ends that is bounded in bytes: the same rule for every store."""

from collections.abc import Iterable


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
