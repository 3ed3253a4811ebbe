"""Measures how many streams one core carries: each at 20 tokens a second, with a delay whose p99 stays below 100 ms.

Found by doubling, and then by halving the gap between a number that the server carries and one that it does not. Each
number is tried on a new server. A number that fails is tried once more, so that one hiccup of the machine decides
nothing. The control, ``direct``, is the load client on the model server itself: where it carries no more than a server,
the clients were the limit.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import trio

from bench.contenders import Contender
from bench.pairs import Pairing
from bench.peers import open_upstream
from bench.relay import LIVE_TOKENS_PER_S, PAD, ROOM
from bench.stage import Place, chat_streams, direct_streams, open_direct_load, open_stage
from bench.table import Table, number, triple
from bench.window import Window, watch

DELAY_P99_MAX_MS = 100.0
RECEIVED_SHARE_MIN = 0.95
"""A server that passes on less than this share of the tokens falls behind, however it spreads the delay."""
TRIES = 2
"""Failures of a number, one after another, that count as one."""
_OPENING_MAX_S = 20.0
_MESSAGE = f"rate={LIVE_TOKENS_PER_S:.0f} pad={PAD}"


@dataclass(frozen=True)
class Extent:
    """The size of the search."""

    lowest: int  # the first number of streams
    highest: int
    precision: float  # the search ends at a gap of this share of the carried number
    settle_s: float
    window_s: float
    time_max_s: float  # for each server; then the gap is left as wide as it is


QUICK = Extent(lowest=100, highest=1600, precision=0.25, settle_s=0.5, window_s=1.5, time_max_s=60)
USUAL = Extent(lowest=200, highest=2400, precision=0.05, settle_s=2, window_s=5, time_max_s=240)


class Probe(msgspec.Struct, kw_only=True):
    """The measurement of one number of streams."""

    streams: int
    received_share: float = 0  # of the tokens due
    delay_ms: tuple[float, float, float] | None = None  # p50, p99, max
    cpu_share: float | None = None
    cpu_us: float | None = None  # for each received token
    fault: str = ""  # why the server does not carry so many; empty: it does


class CapacityRow(msgspec.Struct, kw_only=True):
    """The most streams that one server carried, and the fewest that it did not."""

    kind: str = "capacity"
    contender: str
    label: str
    repeat: int
    carried: Probe | None  # None: not even one stream, or none of the numbers that were tried
    failed: Probe | None  # None: it carried the highest number
    probes: int
    out_of_time: bool = False


def _of(row: CapacityRow) -> str:
    if row.failed is None:
        return "at least" if row.carried else "-"
    return "out of time" if row.out_of_time else ""


def _p99(probe: Probe | None) -> str:
    if probe is None:
        return "-"
    p99 = "-" if probe.delay_ms is None else number(probe.delay_ms[1], 1)
    return f"{probe.streams}: {p99}" + (f" ({probe.fault})" if probe.fault not in ("", "too late") else "")


TABLE = Table(
    f"Capacity: streams that one core carries, {LIVE_TOKENS_PER_S:.0f} tokens a second each",
    f"The most streams whose delay has a p99 below {DELAY_P99_MAX_MS:.0f} ms while {RECEIVED_SHARE_MIN:.0%} of the "
    "tokens arrive; core, us/token and delay (p50 / p99 / max) at that number; and the p99 at the fewest that failed, "
    "twice. us/token: processor time of all processes of the server. direct: without any server between.",
    (
        ("server", lambda row: row.label),
        ("streams", lambda row: str(row.carried.streams if row.carried else 0)),
        ("", _of),
        (
            "core",
            lambda row: "-" if not row.carried or row.carried.cpu_share is None else f"{row.carried.cpu_share:.0%}",
        ),
        ("us/token", lambda row: number(row.carried and row.carried.cpu_us, 0)),
        ("delay ms", lambda row: triple(row.carried and row.carried.delay_ms, 1)),
        ("failed: p99 ms", lambda row: _p99(row.failed)),
        ("probes", lambda row: str(row.probes)),
    ),
)
PAIRING = Pairing(
    lambda row: f"{LIVE_TOKENS_PER_S:.0f} tokens/s",  # noqa: ARG005  every row measures the same
    (
        ("streams", lambda row: row.carried and float(row.carried.streams)),
        ("CPU us a token", lambda row: row.carried and row.carried.cpu_us),
    ),
)


async def measure_contender(contender: Contender, place: Place, extent: Extent, *, repeat: int) -> CapacityRow:
    async def probe(count: int) -> Probe:
        return await _probe_contender(contender, place, extent, count)

    return await search(probe, extent, contender=contender.name, label=contender.label, repeat=repeat)


async def measure_direct(place: Place, extent: Extent, *, repeat: int) -> CapacityRow:
    """Measure the control: the load client on the model server itself."""

    async def probe(count: int) -> Probe:
        return await _probe_direct(place, extent, count)

    return await search(probe, extent, contender="direct", label="direct", repeat=repeat)


async def search(
    probe: Callable[[int], Awaitable[Probe]], extent: Extent, *, contender: str, label: str, repeat: int
) -> CapacityRow:
    """Find the most streams without a fault. The row has the gap that was left when the search ended."""
    row = CapacityRow(contender=contender, label=label, repeat=repeat, carried=None, failed=None, probes=0)
    deadline = trio.current_time() + extent.time_max_s
    count: int | None = extent.lowest
    failures = 0
    while count is not None:
        if trio.current_time() >= deadline:
            row.out_of_time = True
            break
        tried = await probe(count)
        row.probes += 1
        if not tried.fault:
            row.carried, failures = tried, 0
        elif (failures := failures + 1) == TRIES:
            row.failed, failures = tried, 0
        if not failures:
            count = _next_count(row, extent)
    return row


def _next_count(row: CapacityRow, extent: Extent) -> int | None:
    """Return the number to try next; None: the gap is small enough, or there is none."""
    carried = row.carried.streams if row.carried else 0
    if row.failed is None:
        return min(2 * carried, extent.highest) if carried < extent.highest else None
    gap = row.failed.streams - carried
    return carried + gap // 2 if gap > max(1, extent.precision * carried) else None


async def _probe_contender(contender: Contender, place: Place, extent: Extent, count: int) -> Probe:
    async with open_stage(contender, place, **ROOM) as stage:
        group = chat_streams("s", count, _MESSAGE, keep_delays=True)
        async with stage.open_load(group, opening_max_s=_OPENING_MAX_S) as load:
            await trio.sleep(extent.settle_s)
            window = await watch(load, extent.window_s, stage.server)
    return judge(window, count)


async def _probe_direct(place: Place, extent: Extent, count: int) -> Probe:
    async with open_upstream(cpus=place.client_cpus) as upstream:
        group = direct_streams("s", count, _MESSAGE, keep_delays=True)
        async with open_direct_load(upstream, place, group, opening_max_s=_OPENING_MAX_S) as load:
            await trio.sleep(extent.settle_s)
            window = await watch(load, extent.window_s)
    return judge(window, count)


def judge(window: Window, count: int) -> Probe:
    """Return the figures of a window, and the first fault in them."""
    probe = Probe(
        streams=count,
        received_share=window.received_per_s / (count * LIVE_TOKENS_PER_S),
        delay_ms=window.delays_ms("s"),
        cpu_share=window.cpu_share,
        cpu_us=window.cpu_us,
    )
    streams = window.result.streams
    if silent := sum(stream.first_at is None for stream in streams) + count - len(streams):
        probe.fault = f"{silent} streams without a token"
    elif ended := sum(stream.ended_at is not None for stream in streams):
        probe.fault = f"{ended} streams have ended"
    elif probe.received_share < RECEIVED_SHARE_MIN:
        probe.fault = f"{probe.received_share:.0%} of the tokens"
    elif probe.delay_ms is None or probe.delay_ms[1] >= DELAY_P99_MAX_MS:
        probe.fault = "too late"
    return probe
