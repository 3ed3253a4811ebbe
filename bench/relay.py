"""Measures how many tokens a second one core relays, at what cost, and how much later they arrive.

``paced``: tokens come one by one, each in a frame and a write of its own; one core's capacity follows from their
processor time. ``live``: each stream gets 20 tokens a second, as from a model. ``coalesced``: eight frames come in one
write. ``flood``: the model sends eight frames at a time, as fast as the server reads; the core and all buffers are
full, so the delay means nothing. ``half``: half of the capacity that ``paced`` has shown; it shows the delay that the
server adds to a token.
``--faces`` measures Lastcall through paths of OpenAI's API as well, each beside its native one.
The control, ``direct``, is the load client on the model server itself: no row can be better.
"""

from collections.abc import Callable
from functools import partial

import msgspec
import trio

from bench.contenders import Contender
from bench.pairs import Pairing
from bench.peers import open_upstream
from bench.stage import Place, chat_streams, direct_streams, open_direct_load, open_stage
from bench.table import Table, number, triple
from bench.window import Window, watch

STREAMS = (1, 50, 200)
MODES = ("paced", "live", "coalesced", "flood", "half")
DIRECT_MODES = ("paced", "live", "coalesced", "flood")
WARM_UP_S = 1.0
WINDOW_S = 4.0
PAD = 60
BURST = 8
PACED_TOKENS_PER_S = 3000.0
LIVE_TOKENS_PER_S = 20.0
COALESCED_TOKENS_PER_S = 8000.0
ROOM = {
    "LASTCALL_REPLY_BYTES_MAX": str(1 << 30),
    "LASTCALL_LOG_BYTES_MAX": str(1 << 30),
    "LASTCALL_HELD_BYTES_MAX": str(1 << 33),
}
"""Settings of a service whose turns never end."""


class RelayRow(msgspec.Struct, kw_only=True):
    """The measurement of one load on one server."""

    kind: str = "relay"
    contender: str
    label: str
    repeat: int
    mode: str
    streams: int
    path: str = ""  # that was asked
    offered_per_s: float | None  # tokens; None: as fast as the server reads
    received_per_s: float
    cpu_share: float | None = None  # the use of one core by all processes of the server
    cpu_us: float | None = None  # their processor time for each received token
    capacity_per_s: float | None = None  # received tokens per core-second of the server
    delay_ms: tuple[float, float, float] | None = (
        None  # p50, p99, max from the model's send to the receipt; None for a flood
    )


TABLE = Table(
    "Relay: tokens a second through one core",
    "us/token: processor time of all processes of the server for each received token; capacity: tokens received by the "
    "seconds of that time. delay: from the model server's send to the client's receipt, p50 / p99 / max. direct: "
    "without any server between.",
    (
        ("mode", lambda row: row.mode),
        ("streams", lambda row: str(row.streams)),
        ("server", lambda row: row.label),
        ("offered/s", lambda row: number(row.offered_per_s, 0)),
        ("received/s", lambda row: number(row.received_per_s, 0)),
        ("core", lambda row: "-" if row.cpu_share is None else f"{row.cpu_share:.0%}"),
        ("us/token", lambda row: number(row.cpu_us, 0)),
        ("capacity/s", lambda row: number(row.capacity_per_s, 0)),
        ("delay ms", lambda row: triple(row.delay_ms, 2)),
    ),
)
PAIRING = Pairing(
    lambda row: f"{row.mode}, {row.streams} streams",
    (
        ("CPU us a token", lambda row: row.cpu_us),
        ("received/s", lambda row: row.received_per_s if row.mode == "flood" else None),
        ("delay p50 ms", lambda row: row.delay_ms and row.delay_ms[0]),
        ("delay p99 ms", lambda row: row.delay_ms and row.delay_ms[1]),
    ),
)


def offered_per_s(mode: str, count: int, *, capacity_per_s: float | None = None) -> float | None:
    """Return the tokens a second that all streams of a load get together; None: as many as the server reads.

    ``half`` needs the capacity that ``paced`` has shown.
    """
    rates = {
        "paced": PACED_TOKENS_PER_S,
        "live": LIVE_TOKENS_PER_S * count,
        "coalesced": COALESCED_TOKENS_PER_S,
        "half": None if capacity_per_s is None else capacity_per_s / 2,
    }
    return rates.get(mode)


async def measure_contender(
    contender: Contender, place: Place, mode: str, count: int, *, offered: float | None, repeat: int, window_s: float
) -> RelayRow:
    """Measure one load on a new server."""
    async with open_stage(contender, place, **ROOM) as stage:
        message = _message(mode, count, offered)
        group = chat_streams("s", count, message, path=contender.path, keep_delays=True)
        async with stage.open_load(group) as load:
            await trio.sleep(WARM_UP_S)
            window = await watch(load, window_s, stage.server)
    new_row = partial(RelayRow, contender=contender.name, label=contender.label, repeat=repeat, mode=mode)
    return _row(partial(new_row, path=group.stream.path), count, offered, window)


async def measure_direct(
    place: Place, mode: str, count: int, *, offered: float | None, repeat: int, window_s: float
) -> RelayRow:
    """Measure the control: the load client on the model server itself."""
    async with open_upstream(cpus=place.client_cpus) as upstream:
        group = direct_streams("s", count, _message(mode, count, offered), keep_delays=True)
        async with open_direct_load(upstream, place, group) as load:
            await trio.sleep(WARM_UP_S)
            window = await watch(load, window_s)
    new_row = partial(RelayRow, contender="direct", label="direct", repeat=repeat, mode=mode)
    return _row(new_row, count, offered, window)


def _row(new_row: Callable[..., RelayRow], count: int, offered: float | None, window: Window) -> RelayRow:
    return new_row(
        streams=count,
        offered_per_s=offered,
        received_per_s=window.received_per_s,
        cpu_share=window.cpu_share,
        cpu_us=window.cpu_us,
        capacity_per_s=1e6 / window.cpu_us if window.cpu_us else None,
        delay_ms=None if offered is None else window.delays_ms("s"),
    )


def _message(mode: str, count: int, offered: float | None) -> str:
    burst = 1 if mode in ("paced", "live", "half") else BURST
    return f"rate={0 if offered is None else offered / count:.3f} burst={burst} pad={PAD}"
