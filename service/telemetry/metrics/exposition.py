"""The metrics as text, in the format that Prometheus scrapes."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from service.steps import Steps
from service.telemetry.metrics.families import FAMILIES, Family
from service.telemetry.metrics.memory import Memory

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def exposed(memory: Memory) -> Steps[bytes]:
    """The numbers of all processes that share this memory."""
    pieces = []
    read = yield from memory.read(FAMILIES)
    for family, series in read.items():
        if series:
            pieces.append(generate_latest(_One(_metric(family, series))))
            yield
    return b"".join(pieces)


class _One(Collector):
    """Collects one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _metric(family: Family, series: dict[tuple[str, ...], list[float]]) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        bounds = [*map(str, map(float, family.bounds)), "+Inf"]
        for labels, (*counts, total) in sorted(series.items()):
            histogram.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
        return histogram
    metric: CounterMetricFamily | GaugeMetricFamily = (
        CounterMetricFamily(family.name, family.help, labels=family.labels)
        if family.kind == "counter"
        else GaugeMetricFamily(family.name, family.help, labels=family.labels)
    )
    for labels, (value,) in sorted(series.items()):
        metric.add_metric(labels, value)
    return metric
