"""The counts of one process: what the parts of the service call where something has happened."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence

from service.telemetry.metrics.families import FAMILIES, OTHER_MODEL, TOKEN_GAP, Family
from service.telemetry.metrics.memory import Memory

_SORTED_MAX = 256
"""So many times between pieces are sorted together: of more, each takes longer."""


class Gaps:
    """The times between the pieces of replies of one upstream, since they were last added to the metrics.

    A turn adds to these by itself, with each piece, and sorts nothing into buckets: that is done for many at once.

    Attributes:
        times: Seconds between pieces that came one after the other.
        together: How many further pieces have come together with another one: no time was between them.
    """

    __slots__ = ("times", "together")

    def __init__(self) -> None:
        self.times: list[float] = []
        self.together = 0


class Metrics:
    """Counts what happens in this process. Every call takes about a microsecond, and may be made in any thread.

    Args:
        memory: Where the numbers are kept; only in this process unless given.
        models: The models that may be values of a label.
    """

    def __init__(self, memory: Memory | None = None, *, models: Collection[str] = ()) -> None:
        self.memory = memory or Memory()
        self._models = frozenset(models)
        self._gaps: dict[str, Gaps] = {}
        for family in FAMILIES:
            for labels in family.starts or ([()] if not family.labels and family.across == "sum" else []):
                self.memory.make(family, labels)

    def __repr__(self) -> str:
        return f"<Metrics in {self.memory!r}>"

    def add(self, family: Family, *labels: str, by: float = 1) -> None:
        """Add to a counter, or to a gauge that is kept by its changes."""
        self.memory.add(family, labels, by)

    def set(self, family: Family, *labels: str, to: float) -> None:
        """Set a gauge."""
        self.memory.set(family, labels, to)

    def observe(self, family: Family, *labels: str, value: float) -> None:
        """Add one observation to a histogram."""
        self.memory.add_to_buckets(family, labels, bisect_left(family.bounds, value), value)

    def model(self, name: str) -> str:
        """A model as the value of a label: a name that only a caller knows is none."""
        return name if name in self._models else OTHER_MODEL

    def gaps_of(self, upstream: str) -> Gaps:
        """Where the turns of an upstream put the times between the pieces of their replies."""
        gaps = self._gaps.get(upstream)
        if gaps is None:
            gaps = self._gaps[upstream] = Gaps()
            self.memory.make(TOKEN_GAP, (upstream,))
        return gaps

    def add_gaps(self) -> None:
        """Add the times between pieces that were noted since the last call. In the event loop."""
        for upstream, gaps in self._gaps.items():
            if gaps.times or gaps.together:
                counts = _bucketed(gaps.times, TOKEN_GAP.bounds)
                counts[0] += gaps.together
                self.memory.add_all(TOKEN_GAP, (upstream,), counts, sum(gaps.times))
                gaps.times.clear()
                gaps.together = 0


def _bucketed(values: Sequence[float], bounds: Sequence[float]) -> list[int]:
    """How many of the values are in each bucket, infinity the last.

    To sort them and to look for the bounds among them takes less time than to look for each value among the bounds.
    """
    counts = [0] * (len(bounds) + 1)
    for begin in range(0, len(values), _SORTED_MAX):
        ordered = sorted(values[begin : begin + _SORTED_MAX])
        below = 0
        for bucket, bound in enumerate(bounds):
            up_to = bisect_right(ordered, bound, below)
            counts[bucket] += up_to - below
            below = up_to
        counts[-1] += len(ordered) - below
    return counts
