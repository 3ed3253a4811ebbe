"""Compares two servers of one run in pairs: the measurements of the same load that were made just after each other.

A machine that others use, or that changes its clock, makes both figures of a pair larger. So their ratio is steadier
than the figures, and the table has the median of the ratios, with the smallest and the largest one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.table import Table, number


@dataclass(frozen=True)
class Pairing:
    """The figures of a scenario's rows that can be compared.

    Args:
        load: What a row measures, in words: rows of two servers with the same words and the same repeat are a pair.
        figures: Names, and functions that take a row and return a figure, or None without one.
    """

    load: Callable[[Any], str]
    figures: tuple[tuple[str, Callable[[Any], float | None]], ...]


@dataclass(frozen=True)
class Comparison:
    """One figure of one load on two servers, in all pairs."""

    load: str
    figure: str
    pairs: tuple[tuple[float, float], ...]

    @property
    def medians(self) -> tuple[float, float]:
        """The median on each server, of all pairs."""
        return median(first for first, _ in self.pairs), median(second for _, second in self.pairs)

    @property
    def ratios(self) -> list[float]:
        """The second by the first of each pair, ascending; without pairs whose first is 0."""
        return sorted(second / first for first, second in self.pairs if first)


def compare(rows: Iterable[Any], pairing: Pairing, first: str, second: str) -> list[Comparison]:
    """Return the figures that two servers have in pairs, in the order of the first's rows."""
    of_first: dict[tuple[str, int], Any] = {}
    of_second: dict[tuple[str, int], Any] = {}
    for row in rows:
        if row.contender in (first, second):
            (of_first if row.contender == first else of_second)[pairing.load(row), row.repeat] = row
    comparisons = []
    for load in dict.fromkeys(load for load, _ in of_first):
        both = [(row, of_second[key]) for key, row in of_first.items() if key[0] == load and key in of_second]
        for name, figure in pairing.figures:
            found = [(figure(a), figure(b)) for a, b in both]
            pairs = tuple((a, b) for a, b in found if a is not None and b is not None)
            if pairs:
                comparisons.append(Comparison(load, name, pairs))
    return comparisons


def ratio_table(first: str, second: str) -> Table:
    """Return the table for the comparisons of two servers, named by their labels."""
    return Table(
        f"{second} beside {first}",
        f"Medians, and the ratio ({second} by {first}) of the two measurements of each pair: the median of n ratios, "
        "the smallest and the largest one.",
        (
            ("load", lambda row: row.load),
            ("figure", lambda row: row.figure),
            (first, lambda row: number(row.medians[0], 2)),
            (second, lambda row: number(row.medians[1], 2)),
            ("ratio", lambda row: f"{median(row.ratios):.2f}" if row.ratios else "-"),
            ("range", lambda row: f"{row.ratios[0]:.2f} - {row.ratios[-1]:.2f}" if row.ratios else "-"),
            ("n", lambda row: str(len(row.ratios))),
        ),
    )
