"""The figures of the scenarios follow from what was observed: the window of a load, the search, a herd, and pairs."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from bench.capacity import DELAY_P99_MAX_MS, CapacityRow, Extent, Probe, judge, measure_direct, search
from bench.capacity import TABLE as CAPACITY_TABLE
from bench.herd import HerdRow, _add_probes, _row
from bench.pairs import Pairing, compare, ratio_table
from bench.plan import LoadResult, ProbeResult
from bench.relay import offered_per_s
from bench.scenarios import Programme
from bench.stage import Place, chat_streams
from bench.window import Window
from bench.wire import StreamEnd, StreamResult


def loaded(*, streams: int = 2, per_s: float = 40.0, delay_ms: float = 5.0) -> LoadResult:
    """A load that received its tokens evenly for ten seconds; the delays of the first two are a second more."""
    samples = [(at / 2, int(per_s * at / 2)) for at in range(21)]
    late = int(per_s * 2)
    delays = [int((delay_ms + 1000) * 1e6)] * late + [int(delay_ms * 1e6)] * (int(per_s * 10) - late)
    results = [StreamResult(group="s", number=n, began_at=0.0, first_at=0.1) for n in range(streams)]
    return LoadResult(streams=results, tokens_by_second=samples, delays_ns={"s": delays})


def test_a_window_has_the_tokens_and_the_delays_of_its_own_time_only() -> None:
    window = Window(since=2.0, until=6.0, used_s=0.8, result=loaded())
    assert window.received_per_s == 40
    assert window.delays_ms("s") == (5, 5, 5)
    assert window.cpu_share == pytest.approx(0.2)
    assert window.cpu_us == pytest.approx(5000)
    earlier = Window(since=1.0, until=2.0, used_s=None, result=loaded())
    assert earlier.delays_ms("s") == (1005, 1005, 1005)
    assert (earlier.cpu_share, earlier.cpu_us) == (None, None)


def test_a_load_client_that_counted_once_in_the_window_has_received_nothing() -> None:
    window = Window(since=2.0, until=2.1, used_s=0.1, result=loaded())
    assert (window.received_per_s, window.cpu_us, window.delays_ms("s")) == (0, None, None)


def test_a_server_that_received_nothing_has_no_cost_for_each_token() -> None:
    window = Window(since=2.0, until=6.0, used_s=0.8, result=loaded(per_s=0))
    assert (window.received_per_s, window.cpu_us, window.delays_ms("s")) == (0, None, None)


@pytest.mark.parametrize(
    ("result", "count", "fault"),
    [
        (loaded(), 2, ""),
        (loaded(delay_ms=DELAY_P99_MAX_MS), 2, "too late"),
        (loaded(per_s=37), 2, "92% of the tokens"),
        (loaded(streams=1), 2, "1 streams without a token"),
        (loaded(streams=0), 2, "2 streams without a token"),
    ],
)
def test_a_number_of_streams_is_carried_if_all_tokens_come_in_time(result: LoadResult, count: int, fault: str) -> None:
    assert judge(Window(since=3.0, until=9.0, used_s=0.5, result=result), count).fault == fault


def test_a_stream_that_has_ended_is_a_fault() -> None:
    result = loaded()
    result.streams[1].ended_at = 4.0
    assert judge(Window(since=3.0, until=9.0, used_s=0.5, result=result), 2).fault == "1 streams have ended"


EXTENT = Extent(lowest=100, highest=1600, precision=0.05, settle_s=0, window_s=1, time_max_s=1000)


async def search_with(limit: int, *, extent: Extent = EXTENT, hiccups: int = 0) -> tuple[CapacityRow, list[int]]:
    """Search on a server that carries ``limit`` streams, and fails so many of the other probes."""
    tried: list[int] = []

    async def probe(count: int) -> Probe:
        await trio.sleep(10)
        tried.append(count)
        hiccup = len(tried) <= 2 * hiccups and len(tried) % 2
        return Probe(streams=count, fault="too late" if count > limit or hiccup else "")

    return await search(probe, extent, contender="x", label="X", repeat=0), tried


@pytest.mark.parametrize("limit", [1, 7, 99, 100, 101, 250, 799, 1599])
async def test_the_search_ends_in_a_small_gap_around_the_limit(autojump_clock: MockClock, limit: int) -> None:
    row, tried = await search_with(limit)
    assert row.carried is not None
    assert row.failed is not None
    assert row.carried.streams <= limit < row.failed.streams
    assert row.failed.streams - row.carried.streams <= max(1, 0.05 * row.carried.streams)
    assert (row.probes, row.out_of_time) == (len(tried), False)
    assert len(tried) <= 24


async def test_a_server_that_carries_the_highest_number_has_no_failure(autojump_clock: MockClock) -> None:
    row, tried = await search_with(5000)
    assert row.carried is not None
    assert (row.carried.streams, row.failed, tried) == (1600, None, [100, 200, 400, 800, 1600])


async def test_a_server_that_carries_nothing_has_no_number(autojump_clock: MockClock) -> None:
    row, tried = await search_with(0)
    assert row.failed is not None
    assert (row.carried, row.failed.streams) == (None, 1)
    assert len(tried) <= 16


async def test_one_hiccup_of_the_machine_decides_nothing(autojump_clock: MockClock) -> None:
    row, tried = await search_with(5000, hiccups=5)
    assert row.carried is not None
    assert (row.carried.streams, row.failed) == (1600, None)
    assert tried == [100, 100, 200, 200, 400, 400, 800, 800, 1600, 1600]


async def test_a_search_without_time_says_how_far_it_came(autojump_clock: MockClock) -> None:
    row, tried = await search_with(250, extent=replace(EXTENT, time_max_s=35))
    assert row.carried is not None
    assert row.failed is not None
    assert (row.carried.streams, row.failed.streams, row.out_of_time) == (200, 400, True)
    assert len(tried) == 4
    assert "out of time" in CAPACITY_TABLE.write([row])


def test_a_herd_has_the_time_from_the_connect_and_names_what_did_not_begin() -> None:
    streams = [
        StreamResult(group="herd", number=0, began_at=1.0, sent_at=1.5, first_at=2.0),
        StreamResult(group="herd", number=1, began_at=1.0, end=StreamEnd.OPEN),
        StreamResult(group="herd", number=2, began_at=1.0, end=StreamEnd.REFUSED, status=503),
        StreamResult(group="herd", number=3, began_at=1.0, end=StreamEnd.REFUSED, status=503),
    ]
    row = _row("x", "X", 0, 4, LoadResult(streams=streams))
    assert (row.began, row.first_ms) == (1, (1000, 1000, 1000))
    assert row.errors == {"silent": 1, "refused (503)": 2}


def test_only_the_probes_of_the_herds_time_count_and_those_without_an_answer_are_failures() -> None:
    herd = LoadResult(streams=[StreamResult(group="herd", began_at=1.0, first_at=2.0)])
    probes = [
        ProbeResult(group="prober", at=0.5, outcome="answered", status=200, answered_at=5.0),
        ProbeResult(group="prober", at=1.1, outcome="answered", status=200, answered_at=1.4, late_s=0.01),
        ProbeResult(group="prober", at=1.2, outcome="answered", status=503, answered_at=1.3),
        ProbeResult(group="prober", at=1.3),
        ProbeResult(group="prober", at=2.5, outcome="answered", status=200, answered_at=9.0),
    ]
    row = HerdRow(contender="x", label="X", repeat=0, chats=1, began=1, first_ms=None)
    _add_probes(row, herd, LoadResult(probes=probes))
    assert (row.healthz, row.healthz_errors) == (3, 2)
    assert row.healthz_ms == pytest.approx((300, 300, 300))
    assert row.client_late_ms == pytest.approx(10)


class Row(msgspec.Struct):
    contender: str
    repeat: int
    load: str
    cost: float | None


PAIRING = Pairing(lambda row: row.load, (("cost", lambda row: row.cost),))


def test_measurements_of_one_load_and_repeat_are_a_pair_and_the_ratio_is_that_of_the_pairs() -> None:
    """The medians of both are equal here; each pair says that the second costs more."""
    rows = [Row("a", n, "load", cost) for n, cost in enumerate((1.0, 2.0, 4.0))]
    rows += [Row("b", n, "load", cost) for n, cost in enumerate((2.0, 3.0, 5.0))]
    rows += [Row("c", 0, "load", 9.0), Row("b", 7, "load", 9.0), Row("b", 0, "other", 9.0)]
    (comparison,) = compare(rows, PAIRING, "a", "b")
    assert comparison.medians == (2.0, 3.0)
    assert comparison.ratios == [1.25, 1.5, 2.0]
    assert "| load | cost | 2.00 | 3.00 | 1.50 | 1.25 - 2.00 | 3 |" in ratio_table("a", "b").write([comparison])


def test_a_figure_that_one_of_both_lacks_is_no_pair_and_nothing_is_divided_by_zero() -> None:
    rows = [Row("a", 0, "x", None), Row("b", 0, "x", 1.0), Row("a", 0, "y", 0.0), Row("b", 0, "y", 1.0)]
    (comparison,) = compare(rows, PAIRING, "a", "b")
    assert (comparison.load, comparison.ratios) == ("y", [])
    assert "| y | cost | 0.00 | 1.00 | - | - | 0 |" in ratio_table("a", "b").write([comparison])


def test_each_stream_of_the_live_load_gets_twenty_tokens_a_second() -> None:
    assert offered_per_s("live", 200) == 4000
    assert offered_per_s("flood", 200) is None
    assert offered_per_s("half", 200) is None
    assert offered_per_s("half", 200, capacity_per_s=5000) == 2500


def test_each_repeat_begins_with_another_server_and_the_first_is_compared_with_the_others() -> None:
    programme = Programme("relay", "usual", only=["lastcall", "lastcall-config", "trio"], repeats=2)
    assert [contender.name for contender in programme.in_turn(1)] == ["lastcall-config", "trio", "lastcall"]
    assert [(first.name, second.name) for first, second in programme.pairs] == [
        ("lastcall-config", "lastcall"),
        ("trio", "lastcall"),
    ]
    assert Programme("relay", "usual", only=["lastcall", "trio"], repeats=1).pairs == []


def test_each_face_is_measured_after_its_server_and_compared_with_its_native_api() -> None:
    programme = Programme(
        "relay", "usual", only=["lastcall", "trio"], faces=["responses", "chat-completions"], repeats=2
    )
    assert [(contender.name, contender.path) for contender in programme.in_turn(1)] == [
        ("lastcall-responses", "/v1/responses"),
        ("lastcall-chat-completions", "/v1/chat/completions"),
        ("trio", "/chat"),
        ("lastcall", "/chat"),
    ]
    assert [(first.name, second.name) for first, second in programme.pairs] == [
        ("trio", "lastcall"),
        ("lastcall", "lastcall-responses"),
        ("lastcall", "lastcall-chat-completions"),
    ]


def test_lastcall_is_measured_with_all_telemetry_after_it_is_without() -> None:
    programme = Programme("relay", "usual", only=["lastcall", "trio"], telemetry=True, repeats=2)
    told, _, plain = programme.in_turn(1)
    assert [told.name, plain.name] == ["lastcall-telemetry", "lastcall"]
    assert [(first.name, second.name) for first, second in programme.pairs] == [
        ("trio", "lastcall"),
        ("lastcall", "lastcall-telemetry"),
    ]
    with_it, without = (
        it.launch(upstream_url="http://127.0.0.1:9/v1", store=Path("a.db"), cpus=None).env for it in (told, plain)
    )
    assert dict(with_it) == {
        **without,
        "LASTCALL_ACCESS_LOG": "on",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    }


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/chat", {"message": "s$n rate=20"}),
        ("/v1/responses", {"model": "bench", "stream": True, "input": "s$n rate=20"}),
        (
            "/v1/chat/completions",
            {"model": "bench", "stream": True, "messages": [{"role": "user", "content": "s$n rate=20"}]},
        ),
    ],
)
def test_a_face_is_asked_for_a_stream_of_the_same_message(path: str, asked: object) -> None:
    request = chat_streams("s", 1, "rate=20", path=path).stream
    assert (request.path, msgspec.json.decode(request.body)) == (path, asked)


async def test_the_control_that_cannot_carry_a_load_is_a_fault_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load client is never ready: its model does not answer. It is stopped before it has read what to do."""
    monkeypatch.setattr("bench.capacity._MESSAGE", "mute=1")
    monkeypatch.setattr("bench.capacity._OPENING_MAX_S", 0.0)
    extent = replace(EXTENT, lowest=1, highest=1, settle_s=0, window_s=0.0)
    with trio.fail_after(120):
        row = await measure_direct(Place(tmp_path, None, None), extent, repeat=0)
    assert row.failed is not None
    assert (row.carried, row.failed.fault) == (None, "1 streams without a token")
