"""Raw rows: kept as lines of JSON, and summarised without a mean."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec


class RowFile:
    """A file to which each row is appended at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self.path = path

    def append(self, row: Any) -> None:
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a file, in order."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


@dataclass(frozen=True)
class Summary:
    """The summary of a set of figures."""

    n: int
    p50: float
    p99: float
    max: float

    def __str__(self) -> str:
        return " / ".join(f"{value:.3f}" for value in (self.p50, self.p99, self.max))


def summarize(figures: Iterable[float | None]) -> Summary | None:
    """Return n, p50, p99 and max of the figures; None without figures."""
    known = sorted(figure for figure in figures if figure is not None)
    if not known:
        return None
    return Summary(n=len(known), p50=percentile(known, 50), p99=percentile(known, 99), max=known[-1])


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Return the percentile of the figures by the nearest rank."""
    return ascending[max(math.ceil(len(ascending) * percent / 100) - 1, 0)]


def spread(figures: Iterable[float]) -> tuple[float, float, float] | None:
    """Return p50, p99 and the maximum; None without figures."""
    ascending = sorted(figures)
    return (percentile(ascending, 50), percentile(ascending, 99), ascending[-1]) if ascending else None
