"""Measures the cost of one sweep of the expiry loop, and the longest time for which it holds up other tasks.

The service's own sweep runs in this process: N sessions are stored, 1 000 of them have expired. A task that wakes up
each millisecond sees the event loop's pauses; the same task without a sweep is the control.
"""

import time
from pathlib import Path

import msgspec
import trio

from bench.stored_sessions import fill, open_store
from bench.table import Table, number
from service.clock import wall_clock
from service.sessions.upkeep.expiry import sweep

EXPIRED = 1_000
_TICK_S = 0.001
_CONTROL_S = 0.5


class ExpiryRow(msgspec.Struct, kw_only=True):
    """The measurement of one sweep."""

    kind: str = "expiry"
    store: str
    repeat: int
    sessions: int
    removed: int
    sweep_ms: float
    pause_ms: float  # the event loop's longest pause during the sweep
    control_pause_ms: float  # the longest pause without a sweep


TABLE = Table(
    "Expiry: one sweep",
    f"{EXPIRED} of the sessions have expired. pause: the longest time for which the event loop did nothing else.",
    (
        ("store", lambda row: row.store),
        ("sessions", lambda row: f"{row.sessions:,}"),
        ("removed", lambda row: str(row.removed)),
        ("sweep ms", lambda row: number(row.sweep_ms)),
        ("longest pause ms", lambda row: number(row.pause_ms, 2)),
        ("control ms", lambda row: number(row.control_pause_ms, 2)),
    ),
)


async def measure(kind: str, sessions: int, folder: Path, *, repeat: int) -> ExpiryRow:
    """Fill a store and sweep it once."""
    async with open_store(kind, folder / f"expiry-{sessions}-{repeat}.db") as store:
        await fill(store, sessions, expired=EXPIRED)
        control = _Pauses()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.run)
            await trio.sleep(_CONTROL_S)
            nursery.cancel_scope.cancel()
        pauses = _Pauses()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pauses.run)
            await trio.sleep(10 * _TICK_S)
            began = time.perf_counter()
            removed = await sweep(store, clock=wall_clock, store_timeout_s=60)
            took_s = time.perf_counter() - began
            await trio.sleep(10 * _TICK_S)
            nursery.cancel_scope.cancel()
    return ExpiryRow(
        store=kind,
        repeat=repeat,
        sessions=sessions,
        removed=removed,
        sweep_ms=took_s * 1000,
        pause_ms=pauses.longest_s * 1000,
        control_pause_ms=control.longest_s * 1000,
    )


class _Pauses:
    """Wake up each millisecond and note the delay."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await trio.sleep(_TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - due)
