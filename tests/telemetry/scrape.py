"""Metrics as a real parser of Prometheus' text format reads them."""

import os
import shutil
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[tuple[str, str], float]
"""The value of each sample, by its name and its labels: ``a=1,b=2``, in the order of the labels' names."""


def samples_of(text: str) -> Samples:
    """The samples of a scrape. Each series is there once, and each metric has a type and a text of help."""
    samples: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.type != "unknown", family.name
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert (sample.name, labels) not in samples, "a series is there twice"
            samples[sample.name, labels] = sample.value
    return samples


def turns_by_end(samples: Samples) -> dict[str, float]:
    """How many turns have ended, by the labels of ``lastcall_turns_total``."""
    return {labels: value for (name, labels), value in samples.items() if name == "lastcall_turns_total"}


def fallen(before: Samples, after: Samples) -> list[tuple[str, str]]:
    """The counters, and those of histograms, that are less than they were, or gone: Prometheus takes that for a
    restart."""
    counted = ("_total", "_bucket", "_count", "_sum")
    return [key for key, value in before.items() if key[0].endswith(counted) and after.get(key, float("-inf")) < value]


def promtool() -> str:
    """The program, of Debian's package prometheus. A test is skipped where there is none, and fails in CI."""
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs promtool (apt install prometheus)")
        pytest.skip("needs promtool (apt install prometheus)")
    return program
