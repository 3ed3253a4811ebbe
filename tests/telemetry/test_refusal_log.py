"""Refused requests: one line a second for each kind, and none is forgotten."""

from collections import Counter
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import StoreError
from service.telemetry.refusal_log import RefusalLog, causes_of
from tests.kept_log import kept_log, lines_of


def told(log: str) -> list[tuple[str, int]]:
    return [(line["code"], line["count"]) for line in lines_of(log, "requests refused")]


async def test_the_first_of_a_kind_is_logged_at_once_and_the_others_when_the_second_is_over(
    autojump_clock: MockClock,
) -> None:
    with kept_log("json") as read:
        async with trio.open_nursery() as nursery:
            log = RefusalLog()
            await nursery.start(log.run)
            for _ in range(50):
                log.note("turn_in_progress", level="info", status=409)
            log.note("turn_limit", level="warning", status=503)
            assert told(read()) == [("turn_in_progress", 1), ("turn_limit", 1)]
            await trio.sleep(1.5)
            assert told(read())[2:] == [("turn_in_progress", 49)]
            await trio.sleep(1000)
            log.note("turn_in_progress", level="info", status=409)
            assert told(read())[3:] == [("turn_in_progress", 1)]
            nursery.cancel_scope.cancel()
        levels = {line["code"]: line["level"] for line in lines_of(read(), "requests refused")}
    assert levels == {"turn_in_progress": "info", "turn_limit": "warning"}


async def test_refusals_that_were_not_logged_yet_are_logged_at_the_end(autojump_clock: MockClock) -> None:
    with kept_log("json") as read:
        async with trio.open_nursery() as nursery:
            log = RefusalLog()
            await nursery.start(log.run)
            for _ in range(3):
                log.note("queue_full", level="info")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert told(read()) == [("queue_full", 1), ("queue_full", 2)]
        log.note("queue_full", level="info")
        log.flush()
        log.flush()
        assert told(read())[2:] == [("queue_full", 1)]


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["a", "b", "c"])), max_size=60))
def test_every_refusal_is_counted_once_and_no_kind_has_two_lines_within_a_second(
    refusals: list[tuple[int, str]],
) -> None:
    lines: list[tuple[float, str, int]] = []

    class Recording(RefusalLog):
        def _log(self, code: str, kind: Any) -> None:
            lines.append((trio.current_time(), code, kind.count))
            super()._log(code, kind)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            log = Recording()
            await nursery.start(log.run)
            for pause, code in refusals:
                if pause > 15:
                    await trio.sleep((pause - 15) / 8)
                log.note(code, level="info")
            await trio.sleep(5)
            nursery.cancel_scope.cancel()

    with kept_log("json"):
        trio.run(run, clock=MockClock(autojump_threshold=0))
    counts: Counter[str] = Counter()
    last: dict[str, float] = {}
    for at, code, count in lines:
        assert count
        assert at - last.get(code, -10) >= 1
        counts[code] += count
        last[code] = at
    assert counts == Counter(code for _, code in refusals)


def test_all_causes_are_named() -> None:
    assert causes_of(StoreError("refused")) is None
    inner = OSError("no space")
    outer, error = ValueError("full"), StoreError("refused")
    outer.__cause__, error.__cause__ = inner, outer
    assert causes_of(error) == "ValueError: full, from OSError: no space"
