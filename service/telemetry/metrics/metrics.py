"""The counts of one process: what the parts of the service call where something has happened."""

from bisect import bisect_left
from collections.abc import Collection

from service.telemetry.metrics.families import FAMILIES, OTHER_MODEL, TOKEN_GAP, Family
from service.telemetry.metrics.memory import Memory


class Gaps:
    """The times between the pieces of replies of one upstream, since they were last added to the metrics.

    A turn adds to the lists by itself, with each piece: a call would cost more than what it does.

    Attributes:
        bounds: Those of the histogram.
        counts: How many times there are in each bucket, infinity the last.
        total: The sum of all of them, in seconds.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self) -> None:
        self.bounds = TOKEN_GAP.bounds
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0


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
            if any(gaps.counts):
                self.memory.add_all(TOKEN_GAP, (upstream,), gaps.counts, gaps.total)
                gaps.counts[:] = [0] * len(gaps.counts)
                gaps.total = 0.0
