"""Measures how many tokens a second one core relays, and how much later they arrive.

``paced``: tokens come one by one, each in a frame and a write of its own; one core's capacity follows from their
processor time. ``half``: the same at half of that capacity; it shows the delay that the server adds to a token.
``coalesced``: eight frames come in one write. ``flood``: the model sends eight frames at a time, as fast as the server
reads; the core and all buffers are full, so the delay means nothing.
The control, ``direct``, is the load client on the model server itself: no row can be better.
"""

import time
from functools import partial

import msgspec
import trio

from bench.contenders import Contender
from bench.peers import LoadClient, open_upstream
from bench.plan import LoadResult
from bench.stage import (
    Place,
    Stage,
    chat_streams,
    cpu_seconds,
    direct_streams,
    open_direct_load,
    open_stage,
    spread,
    tokens_per_s,
)
from bench.table import Table, number, triple

STREAMS = (1, 50, 200)
WARM_UP_S = 1.0
WINDOW_S = 4.0
PAD = 60
BURST = 8
PACED_TOKENS_PER_S = 3000.0
COALESCED_TOKENS_PER_S = 8000.0
_ROOM = {
    "LASTCALL_REPLY_BYTES_MAX": str(1 << 30),
    "LASTCALL_LOG_BYTES_MAX": str(1 << 30),
    "LASTCALL_HELD_BYTES_MAX": str(1 << 33),
}


class RelayRow(msgspec.Struct, kw_only=True):
    """The measurement of one load on one server."""

    kind: str = "relay"
    contender: str
    label: str
    repeat: int
    mode: str
    streams: int
    offered_per_s: float | None  # tokens; None: as fast as the server reads
    received_per_s: float
    cpu_share: float | None = None  # the server's use of one core
    capacity_per_s: float | None = None  # received tokens per core-second of the server
    delay_ms: tuple[float, float, float] | None = (
        None  # p50, p99, max from the model's send to the receipt; None for a flood
    )


TABLE = Table(
    "Relay: tokens a second through one core",
    "capacity: tokens received by the seconds of processor time they cost the server. delay: from the model server's "
    "send to the client's receipt, p50 / p99 / max. direct: without any server between.",
    (
        ("mode", lambda row: row.mode),
        ("streams", lambda row: str(row.streams)),
        ("server", lambda row: row.label),
        ("offered/s", lambda row: number(row.offered_per_s, 0)),
        ("received/s", lambda row: number(row.received_per_s, 0)),
        ("core", lambda row: "-" if row.cpu_share is None else f"{row.cpu_share:.0%}"),
        ("capacity/s", lambda row: number(row.capacity_per_s, 0)),
        ("delay ms", lambda row: triple(row.delay_ms, 2)),
    ),
)


async def measure_contender(
    contender: Contender, place: Place, *, repeat: int, streams: tuple[int, ...], window_s: float
) -> list[RelayRow]:
    """Measure all modes on one contender, with a new server for each."""
    measure = partial(_measure, contender, place, repeat=repeat, window_s=window_s)
    rows = []
    for count in streams:
        paced = await measure("paced", count, offered=PACED_TOKENS_PER_S)
        rows += [paced, await measure("coalesced", count, offered=COALESCED_TOKENS_PER_S)]
        rows += [await measure("flood", count, offered=None)]
        if paced.capacity_per_s is not None:
            rows += [await measure("half", count, offered=paced.capacity_per_s / 2)]
    return rows


async def measure_direct(place: Place, *, repeat: int, streams: tuple[int, ...], window_s: float) -> list[RelayRow]:
    """Measure the control: the load client on the model server itself."""
    rows = []
    for count in streams:
        for mode, offered in (("paced", PACED_TOKENS_PER_S), ("coalesced", COALESCED_TOKENS_PER_S), ("flood", None)):
            async with open_upstream(cpus=place.client_cpus) as upstream:
                group = direct_streams("s", count, _message(mode, count, offered), keep_delays=True)
                async with open_direct_load(upstream, place, group) as load:
                    received, result = await _watch(load, window_s, warm_up_s=WARM_UP_S)
            row = RelayRow(
                contender="direct", label="direct", repeat=repeat, mode=mode, streams=count,
                offered_per_s=offered, received_per_s=received, delay_ms=None if offered is None else _delays(result),
            )  # fmt: skip
            rows.append(row)
    return rows


async def _measure(
    contender: Contender, place: Place, mode: str, count: int, *, offered: float | None, repeat: int, window_s: float
) -> RelayRow:
    async with open_stage(contender, place, **_ROOM) as stage:
        group = chat_streams("s", count, _message(mode, count, offered), keep_delays=True)
        async with stage.open_load(group) as load:
            received, result, used_s = await _watch_stage(load, stage, window_s)
    return RelayRow(
        contender=contender.name,
        label=contender.label,
        repeat=repeat,
        mode=mode,
        streams=count,
        offered_per_s=offered,
        received_per_s=received,
        cpu_share=used_s / window_s,
        capacity_per_s=received * window_s / used_s if used_s else None,
        delay_ms=None if offered is None else _delays(result),
    )


async def _watch_stage(load: LoadClient, stage: Stage, window_s: float) -> tuple[float, LoadResult, float]:
    await trio.sleep(WARM_UP_S)
    before_s = cpu_seconds(stage.server)
    received, result = await _watch(load, window_s, warm_up_s=0)
    return received, result, cpu_seconds(stage.server) - before_s


async def _watch(load: LoadClient, window_s: float, *, warm_up_s: float) -> tuple[float, LoadResult]:
    await trio.sleep(warm_up_s)
    since = time.monotonic()
    await trio.sleep(window_s)
    until = time.monotonic()
    result = await load.stop()
    return tokens_per_s(result, since, until), result


def _message(mode: str, count: int, offered_per_s: float | None) -> str:
    burst = 1 if mode in ("paced", "half") else BURST
    return f"rate={0 if offered_per_s is None else offered_per_s / count:.3f} burst={burst} pad={PAD}"


def _delays(result: LoadResult) -> tuple[float, float, float] | None:
    figures = [delay / 1e6 for delay in result.delays_ns.get("s", ())]
    return spread(figures[len(figures) // 5 :])  # the first fifth belongs to the opening
