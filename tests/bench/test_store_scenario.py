"""The store scenario: its two contenders, and the comparison of their rows."""

from pathlib import Path

import pytest

from bench.contenders import choose
from bench.store import StoreRow, _compared, _keeping, _time_fsyncs


@pytest.mark.parametrize(("kind", "store_url"), [("memory", "memory:"), ("sqlite", "sqlite:/there/replies.db")])
def test_the_same_server_is_on_either_store_and_has_the_script_for_a_model(kind: str, store_url: str) -> None:
    (lastcall,) = choose(["lastcall-config"])
    contender = _keeping(lastcall, kind, "scripted:?rate=0")
    launch = contender.launch(upstream_url="http://127.0.0.1:9/v1", store=Path("/there/replies.db"), cpus=None)
    assert launch.argv == lastcall.argv
    assert launch.env["LASTCALL_STORE_URL"] == store_url
    assert launch.env["LASTCALL_MODEL_URL"] == "scripted:?rate=0"
    assert (contender.count_replies is None) == (kind == "memory")


def row(store: str, **figures: object) -> StoreRow:
    return StoreRow(what="x", store=store, repeat=0, n=1, **figures)  # type: ignore[arg-type]


def test_turns_are_compared_by_their_ratio() -> None:
    compared = _compared(row("sqlite", per_s=700.0, took_ms=(2, 3, 4)), row("memory", per_s=1000.0, took_ms=(1, 2, 3)))
    assert (compared.of_memory, compared.added_ms, compared.beside) == (0.7, (), "0.70")


def test_first_tokens_are_compared_by_the_difference_of_p50_and_p99() -> None:
    compared = _compared(row("sqlite", took_ms=(3.5, 9, 99)), row("memory", took_ms=(2, 10, 11)))
    assert (compared.added_ms, compared.beside) == ((1.5, -1), "+1.50 / -1.00 ms")


def test_stops_are_compared_by_the_difference_of_the_time_to_be_gone() -> None:
    compared = _compared(row("sqlite", gone_ms=150.0), row("memory", gone_ms=100.0))
    assert (compared.added_ms, compared.beside) == ((50,), "+50.00 ms")


def test_a_missing_measurement_is_not_compared() -> None:
    assert _compared(row("sqlite", gone_ms=150.0), row("memory")).beside == "-"
    assert _compared(row("sqlite", per_s=5.0), row("memory", per_s=0.0)).beside == "-"


def test_each_fsync_is_timed(tmp_path: Path) -> None:
    took_ms = _time_fsyncs(tmp_path)
    assert len(took_ms) == 200
    assert min(took_ms) > 0
