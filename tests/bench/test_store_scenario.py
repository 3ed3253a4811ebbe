"""The store scenario: its two contenders, and the comparison of their rows."""

from pathlib import Path

import pytest

from bench.contenders import choose
from bench.database import Database
from bench.stage import Place
from bench.store import Kind, _keeping, _time_fsyncs
from bench.store_rows import StoreRow, compared


@pytest.mark.parametrize(
    ("kind", "store_url"),
    [
        (Kind("memory"), "memory:"),
        (Kind("sqlite"), "sqlite:/there/replies.db"),
        (
            Kind("postgresql", Database(Path("/there"), Path("/here"), None)),
            "postgresql://lastcall@/postgres?host=/here",
        ),
    ],
    ids=lambda it: it.name if isinstance(it, Kind) else "",
)
def test_the_same_server_is_on_each_store_and_has_the_script_for_a_model(kind: Kind, store_url: str) -> None:
    (lastcall,) = choose(["lastcall-config"])
    contender = _keeping(lastcall, kind, Place(Path("/there"), None, None), "scripted:?rate=0")
    launch = contender.launch(upstream_url="http://127.0.0.1:9/v1", store=Path("/there/replies.db"), cpus=None)
    assert launch.argv == lastcall.argv
    assert launch.env["LASTCALL_STORE_URL"] == store_url
    assert launch.env["LASTCALL_MODEL_URL"] == "scripted:?rate=0"
    assert (contender.count_replies is None) == (kind.name == "memory")


def row(store: str, **figures: object) -> StoreRow:
    return StoreRow(what="x", store=store, repeat=0, n=1, **figures)  # type: ignore[arg-type]


def test_turns_are_compared_by_their_ratio() -> None:
    it = compared(row("sqlite", per_s=700.0, took_ms=(2, 3, 4)), row("memory", per_s=1000.0, took_ms=(1, 2, 3)))
    assert (it.of_memory, it.added_ms, it.beside) == (0.7, (), "0.70")


def test_first_tokens_are_compared_by_the_difference_of_p50_and_p99() -> None:
    it = compared(row("sqlite", took_ms=(3.5, 9, 99)), row("memory", took_ms=(2, 10, 11)))
    assert (it.added_ms, it.beside) == ((1.5, -1), "+1.50 / -1.00 ms")


def test_stops_are_compared_by_the_difference_of_the_time_to_be_gone() -> None:
    it = compared(row("sqlite", gone_ms=150.0), row("memory", gone_ms=100.0))
    assert (it.added_ms, it.beside) == ((50,), "+50.00 ms")


def test_a_missing_measurement_is_not_compared() -> None:
    assert compared(row("sqlite", gone_ms=150.0), row("memory")).beside == "-"
    assert compared(row("sqlite", per_s=5.0), row("memory", per_s=0.0)).beside == "-"


def test_each_fsync_is_timed(tmp_path: Path) -> None:
    took_ms = _time_fsyncs(tmp_path)
    assert len(took_ms) == 200
    assert min(took_ms) > 0
