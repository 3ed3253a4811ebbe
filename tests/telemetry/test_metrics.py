"""Metrics are counted in memory that workers share: the sum never falls, whatever becomes of a worker."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.steps import at_once
from service.telemetry.metrics import families, memory
from service.telemetry.metrics.exposition import exposed
from service.telemetry.metrics.families import FAMILIES, TOKEN_GAP, Family
from service.telemetry.metrics.memory import _SERIES_A_STEP, Memory
from service.telemetry.metrics.metrics import Metrics
from tests.telemetry.scrape import samples_of


class Workers:
    """Workers that share their metrics, in this process: the locks are those of their own descriptors."""

    def __init__(self) -> None:
        self._file = os.memfd_create("shared")
        self._stack = ExitStack()
        self._stack.callback(os.close, self._file)

    def start(self) -> Metrics:
        """Start a worker. It dies with ``memory.close()``, as it does when it is killed."""
        worker = Metrics(Memory(os.open(f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_CLOEXEC)))
        self._stack.callback(_close, worker)
        return worker

    def end(self) -> None:
        self._stack.close()


def _close(worker: Metrics) -> None:
    with suppress(ValueError):  # it has died already
        worker.memory.close()


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.end()


def value(worker: Metrics, family: Family, *labels: str) -> list[float]:
    return at_once(worker.memory.read(FAMILIES))[family][labels]


def test_each_worker_tells_the_sum_of_all(workers: Workers) -> None:
    first, second, third = workers.start(), workers.start(), workers.start()
    for worker in (first, first, second):
        worker.add(families.TURNS, "completed", "stop")
    third.add(families.TURNS, "failed", "turn_timeout", by=2)
    for worker in (first, second, third):
        assert value(worker, families.TURNS, "completed", "stop") == [3]
        assert value(worker, families.TURNS, "failed", "turn_timeout") == [2]
        assert worker.memory.processes == 3


def test_a_worker_goes_on_with_the_counts_of_the_one_before_it_and_not_with_its_gauges(workers: Workers) -> None:
    first, second = workers.start(), workers.start()
    for worker in (first, second):
        worker.add(families.EXPIRED, by=5)
        worker.set(families.TASKS, to=7)
        worker.observe(families.TURN_QUEUE, value=0.2)
    first.memory.close()
    assert value(second, families.EXPIRED) == [10], "a count falls, which Prometheus takes for a restart"
    assert value(second, families.TASKS) == [7]
    third = workers.start()
    for worker in (second, third):
        assert value(worker, families.EXPIRED) == [10]
        assert value(worker, families.TASKS) == [7], "the gauge of a dead worker"
    third.add(families.EXPIRED)
    third.observe(families.TURN_QUEUE, value=0.2)
    assert value(second, families.EXPIRED) == [11]
    queue = dict(zip([*families.TURN_QUEUE.bounds, "inf", "sum"], value(second, families.TURN_QUEUE), strict=True))
    assert queue.pop("sum") == pytest.approx(0.6)
    assert queue == dict.fromkeys(queue, 0) | {0.5: 3}


def test_a_gauge_that_only_the_worker_before_had_is_not_told(workers: Workers) -> None:
    stays, old = workers.start(), workers.start()
    old.set(families.BUILD, "0.1.0", "3.11.7", to=1)
    old.add(families.STREAMS_OPEN, "responses", by=4)
    old.memory.close()
    new = workers.start()
    new.set(families.BUILD, "0.2.0", "3.11.7", to=1)
    new.add(families.STREAMS_OPEN, "responses")
    for worker in (stays, new):
        read = at_once(worker.memory.read(FAMILIES))
        assert read[families.BUILD] == {("0.2.0", "3.11.7"): [1]}
        assert read[families.STREAMS_OPEN]["responses",] == [1]
        assert read[families.STREAMS_OPEN]["native",] == [0]
        assert b"NaN" not in at_once(exposed(worker.memory))


def test_slots_are_used_again(workers: Workers) -> None:
    stays = workers.start()
    for _ in range(20):
        leaves = workers.start()
        leaves.add(families.EXPIRED)
        leaves.memory.close()
    assert value(stays, families.EXPIRED) == [20]
    assert len(stays.memory._others) == 1


def test_gauges_are_summed_or_the_largest_or_those_of_the_worker_that_answers(workers: Workers) -> None:
    first, second = workers.start(), workers.start()
    for worker, number in ((first, 3), (second, 5)):
        worker.set(families.TASKS, to=number)
        worker.set(families.WAL_BYTES, to=number)
        worker.set(families.SESSIONS, "idle", to=number)
    assert [value(it, families.TASKS) for it in (first, second)] == [[8], [8]]
    assert [value(it, families.WAL_BYTES) for it in (first, second)] == [[5], [5]]
    assert [value(it, families.SESSIONS, "idle") for it in (first, second)] == [[3], [5]]


def test_a_worker_of_another_version_is_no_trouble(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have other metrics, other buckets, or another form of the memory."""
    first = workers.start()
    unknown = Family("lastcall_of_tomorrow_total", "Not known here")
    changed = Family(families.TURN_QUEUE.name, "Other buckets", "histogram", bounds=(1, 2))
    first.add(unknown)
    first.observe(changed, value=1)
    second = workers.start()
    second.add(families.EXPIRED)
    assert value(first, families.EXPIRED) == [1]
    assert value(second, families.TURN_QUEUE)[-1] == 0
    monkeypatch.setattr(memory, "_FORMAT", 2)
    third = workers.start()
    third.add(families.EXPIRED)
    assert value(third, families.EXPIRED) == [1], "the slots of the others are not read"


def test_series_that_do_not_fit_are_left_out_and_the_others_stay_right(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SLOT_BYTES", 4 * mmap.PAGESIZE)
    worker = workers.start()
    for number in range(1000):
        worker.add(families.REFUSALS, f"code_{number}")
    worker.add(families.REFUSALS, "code_0")
    told = at_once(worker.memory.read(FAMILIES))[families.REFUSALS]
    assert 10 < len(told) < 1000
    assert told[("code_0",)] == [2]
    assert {*map(tuple, told.values())} == {(1,), (2,)}


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(5000):
            metrics.add(families.EXPIRED)
            metrics.observe(families.STORE_COMMIT, value=0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, families.EXPIRED) == [20_000]
    assert sum(value(metrics, families.STORE_COMMIT)[:-1]) == 20_000


def test_no_step_of_a_scrape_grows_with_the_series_or_the_workers(workers: Workers) -> None:
    all_of_them = [workers.start() for _ in range(3)]
    for worker in all_of_them:
        for number in range(200):
            worker.add(families.REFUSALS, f"code_{number}")
    read = all_of_them[0].memory.read([families.REFUSALS])
    assert len(list(read)) > 3 * 200 / _SERIES_A_STEP
    assert value(all_of_them[0], families.REFUSALS, "code_7") == [3]


def test_a_worker_that_makes_a_series_during_a_scrape_spoils_nothing(workers: Workers) -> None:
    first, second = workers.start(), workers.start()
    first.add(families.REFUSALS, "before")
    second.add(families.REFUSALS, "before")
    read = first.memory.read([families.REFUSALS])
    next(read)
    first.add(families.REFUSALS, "later")
    assert value(first, families.REFUSALS, "later") == [1], "another scrape meanwhile"
    assert at_once(read) == {families.REFUSALS: {("before",): [2.0]}}


def test_a_thread_that_makes_a_series_during_a_scrape_doubles_none(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Metrics()
    at_once(worker.memory.read(FAMILIES))
    worker.add(families.TURNS, "completed", "stop")
    decode = msgspec.json.decode
    store = threading.Thread(target=lambda: worker.set(families.WAL_BYTES, to=7))

    def decode_and_let_others_run(*arguments: Any, **rest: Any) -> Any:
        monkeypatch.setattr(msgspec.json, "decode", decode)
        store.start()
        store.join(0.2)  # it waits for the scrape
        return decode(*arguments, **rest)

    monkeypatch.setattr(msgspec.json, "decode", decode_and_let_others_run)
    at_once(worker.memory.read(FAMILIES))
    store.join()
    assert value(worker, families.TURNS, "completed", "stop") == [1]
    assert value(worker, families.WAL_BYTES) == [7]


def test_a_value_is_in_the_bucket_whose_bound_it_does_not_pass() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.01, 0.0100001, 300, 301):
        metrics.observe(families.TURN_QUEUE, value=seconds)
    told = samples_of(at_once(exposed(metrics.memory)).decode())
    name = "lastcall_turn_queue_seconds"
    assert [told[f"{name}_bucket", f"le={le}"] for le in ("0.01", "0.1", "300.0", "+Inf")] == [2, 3, 4, 5]
    assert told[f"{name}_count", ""] == 5
    assert told[f"{name}_sum", ""] == pytest.approx(601.0200001)


def test_what_must_stay_zero_is_told_from_the_start_and_gaps_are_added_in_one_go() -> None:
    metrics = Metrics()
    told = samples_of(at_once(exposed(metrics.memory)).decode())
    assert all(told[family.name, ""] == 0 for family in families.ZERO)
    gaps = metrics.gaps_of("up")
    gaps.together += 3
    gaps.times.append(50)
    metrics.add_gaps()
    metrics.add_gaps()
    assert value(metrics, TOKEN_GAP, "up") == [3, *[0] * 11, 1, 50]
    gaps.together += 2
    metrics.add_gaps()
    assert value(metrics, TOKEN_GAP, "up") == [5, *[0] * 11, 1, 50]


@given(st.lists(st.sampled_from([0.0, *TOKEN_GAP.bounds, 31.0]) | st.floats(0, 40), max_size=8), st.integers(1, 100))
def test_times_that_are_added_in_one_go_are_in_the_buckets_of_those_that_are_added_one_by_one(
    times: list[float], repeats: int
) -> None:
    """More than are sorted together, too."""
    metrics = Metrics()
    for time in times:
        for _ in range(repeats):
            metrics.observe(TOKEN_GAP, "one", value=time)
    metrics.gaps_of("many").times.extend(times * repeats)
    metrics.add_gaps()
    *counts, total = value(metrics, TOKEN_GAP, "many")
    if times:
        *expected, sum_of_all = value(metrics, TOKEN_GAP, "one")
        assert counts == expected
        assert total == pytest.approx(sum_of_all)
    assert sum(counts) == len(times) * repeats
    assert not metrics.gaps_of("many").times


def test_a_model_that_only_a_caller_knows_is_no_label() -> None:
    metrics = Metrics(models={"small"})
    assert (metrics.model("small"), metrics.model('x"} 1\nlastcall_turns_total 5')) == ("small", "other")


def test_label_values_are_escaped() -> None:
    metrics = Metrics()
    metrics.add(families.UPSTREAM_CALLS, 'a"b\\c\nd', "ok")
    assert b'upstream="a\\"b\\\\c\\nd"' in at_once(exposed(metrics.memory))
