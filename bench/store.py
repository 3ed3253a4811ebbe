"""Measures the cost of a durable store: SQLite beside memory, on the same server, in turn.

The model is the service's own script, so only the service and its store take part. ``turns``: many clients, each in its
own session, start one turn after another and wait for its end. ``next turn`` and ``new session``: one client asks and
reads the stream, many times. ``shutdown``: all turns are in the middle of a reply when SIGTERM comes. The time of one
fsync in the same file system is measured too.
"""

import os
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import trio

from bench.contenders import Contender
from bench.machine import busy_share
from bench.plan import Calls, Request, Streams
from bench.rows import spread
from bench.shutdown import Case, run_case
from bench.stage import Place, Stage, chat_streams, open_stage
from bench.table import Table, number, triple

NewRow = Callable[..., "StoreRow"]

STORES = ("memory", "sqlite")
_UNPACED = "scripted:?tokens=20&rate=0&first_token_s=0"
_SLOW = "scripted:?tokens=1000000&rate=1&first_token_s=0"
_NEXT = Request(path="/sessions/s$n/turns", body='{"input": "Well?"}')
_NEXT_STREAMED = msgspec.structs.replace(_NEXT, headers={"Accept": "text/event-stream"})
_FOR_EVER = 1_000_000
_ASKED_FIRST = 10  # first requests, which are not counted
_FSYNCS = 200
_FSYNC_BYTES = 4096


@dataclass(frozen=True)
class Extent:
    """The size of the measurement."""

    sessions: int  # sessions at once, fewer than the load client's 64 connections
    warm_up_s: float
    window_s: float
    asked: int
    interrupted: int


QUICK = Extent(sessions=50, warm_up_s=0.5, window_s=1, asked=50, interrupted=100)
USUAL = Extent(sessions=50, warm_up_s=1, window_s=4, asked=200, interrupted=1000)


class StoreRow(msgspec.Struct, kw_only=True):
    """The measurement of one load on one store, or of the disk's own time."""

    kind: str = "store"
    what: str
    store: str
    repeat: int
    n: int  # the number of turns, first tokens, interrupted turns or fsyncs
    lost: int = 0  # clients and streams that met an error
    took_ms: tuple[float, float, float] | None = None  # p50, p99, max: a turn, a first token, an fsync
    per_s: float | None = None
    cpu_share: float | None = None  # the server's use of one core
    gone_ms: float | None = None  # from the signal to the end of all processes
    phases_ms: dict[str, float] = {}  # from the shutdown report
    kept: int | None = None  # interrupted turns whose partial reply is in the store
    of_memory: float | None = None  # turns a second, divided by the memory row's of this repeat
    added_ms: tuple[float, ...] = ()  # the difference to that row's p50 and p99, or to its ``gone_ms``
    busy_before: float | None = None  # the share of the machine that other processes used

    @property
    def beside(self) -> str:
        """The comparison with the memory row."""
        if self.of_memory is not None:
            return f"{self.of_memory:.2f}"
        return " / ".join(f"{added:+.2f}" for added in self.added_ms) + " ms" if self.added_ms else "-"


TABLE = Table(
    "Store: SQLite beside memory",
    f"took: a turn from the request to the answer, a first token, or an append of {_FSYNC_BYTES} bytes and its fsync "
    "in the same file system; p50 / p99 / max. gone: from the signal until the whole process group is gone; "
    "interrupting: the phase in it that stores the ends. beside memory: turns a second over those of the memory row "
    "above; or what is added to its p50 and p99; or to its time to be gone. others: what they used of the machine just "
    "before.",
    (
        ("what", lambda row: row.what),
        ("store", lambda row: row.store),
        ("n", lambda row: f"{row.n:,}"),
        ("lost", lambda row: str(row.lost)),
        ("turns/s", lambda row: number(row.per_s, 0)),
        ("core", lambda row: "-" if row.cpu_share is None else f"{row.cpu_share:.0%}"),
        ("took ms", lambda row: triple(row.took_ms, 2)),
        ("gone ms", lambda row: number(row.gone_ms, 0)),
        ("interrupting ms", lambda row: number(row.phases_ms.get("interrupting"), 0)),
        ("beside memory", lambda row: row.beside),
        ("others", lambda row: "-" if row.busy_before is None else f"{row.busy_before:.0%}"),
    ),
)


async def measure(contender: Contender, place: Place, extent: Extent, *, repeat: int) -> AsyncGenerator[StoreRow, None]:
    """Run each measurement once, in the order memory, SQLite, memory, SQLite."""
    took_ms = await trio.to_thread.run_sync(_time_fsyncs, place.folder)
    yield StoreRow(what="fsync", store="-", repeat=repeat, n=len(took_ms), took_ms=spread(took_ms))
    answered = [await _measure_answers(contender, kind, place, extent, repeat) for kind in STORES]
    for memory, sqlite in zip(*answered, strict=True):
        yield memory
        yield _compared(sqlite, memory)
    memory, sqlite = [await _measure_shutdown(contender, kind, place, extent, repeat) for kind in STORES]
    yield memory
    yield _compared(sqlite, memory)


async def _measure_answers(
    contender: Contender, kind: str, place: Place, extent: Extent, repeat: int
) -> list[StoreRow]:
    """Measure first tokens on a server with little load, then as many turns as the server can do."""
    create = Calls(name="create", count=extent.sessions, requests=(Request(path="/sessions", body='{"id": "s$n"}'),))
    times = _ASKED_FIRST + extent.asked
    following = Streams(name="next turn", count=1, stream=_NEXT_STREAMED, repeat=times, ready_at="end")
    opening = chat_streams("new session", 1, "Well?", repeat=times, ready_at="end")
    new_row = partial(StoreRow, store=kind, repeat=repeat, busy_before=await busy_share())
    async with open_stage(_keeping(contender, kind, _UNPACED), place) as stage:
        async with stage.open_load(create):
            pass
        return [
            await _measure_first_tokens(stage, following, new_row),
            await _measure_first_tokens(stage, opening, new_row),
            await _measure_turns(stage, extent, new_row),
        ]


async def _measure_first_tokens(stage: Stage, group: Streams, new_row: NewRow) -> StoreRow:
    async with stage.open_load(group) as load:
        streams = (await load.stop()).streams[_ASKED_FIRST:]
    took = [(s.first_at - s.sent_at) * 1000 for s in streams if s.first_at is not None and s.sent_at is not None]
    lost = sum(stream.terminal != "completed" for stream in streams)
    return new_row(what=f"first token, {group.name}", n=len(took), lost=lost, took_ms=spread(took))


async def _measure_turns(stage: Stage, extent: Extent, new_row: NewRow) -> StoreRow:
    group = Calls(name="turns", count=extent.sessions, requests=(_NEXT,), repeat=_FOR_EVER, ready_at="first")
    async with stage.open_load(group) as load:
        await trio.sleep(extent.warm_up_s)
        used_s = -stage.server.cpu_seconds()
        since = time.monotonic()
        await trio.sleep(extent.window_s)
        used_s += stage.server.cpu_seconds()
        until = time.monotonic()
        clients = (await load.stop()).calls
    took = [
        (at - before) * 1000 for client in clients for before, at in pairwise(client.answered_at) if since <= at < until
    ]
    return new_row(
        what=f"turns, {extent.sessions} sessions",
        n=len(took),
        lost=sum(bool(client.note) for client in clients),
        took_ms=spread(took),
        per_s=len(took) / (until - since),
        cpu_share=used_s / (until - since),
    )


async def _measure_shutdown(contender: Contender, kind: str, place: Place, extent: Extent, repeat: int) -> StoreRow:
    count = extent.interrupted
    case = Case(f"interrupted-{count}", f"{count} turns", count, message="Well?")
    row = await run_case(_keeping(contender, kind, _SLOW), case, place, repeat=repeat)
    interrupted = row.terminals.get("interrupted", 0)
    return StoreRow(
        what="shutdown",
        store=kind,
        repeat=repeat,
        n=interrupted,
        lost=count - interrupted,
        gone_ms=None if row.gone_s is None else row.gone_s * 1000,
        phases_ms=row.phases_ms,
        kept=row.replies_kept,
        busy_before=row.busy_before,
    )


def _time_fsyncs(folder: Path) -> list[float]:
    """Return the time of each fsync, in milliseconds."""
    took = []
    with (folder / "fsync").open("ab", buffering=0) as file:
        for _ in range(_FSYNCS):
            began = time.perf_counter()
            file.write(bytes(_FSYNC_BYTES))
            os.fsync(file.fileno())
            took.append((time.perf_counter() - began) * 1000)
    return took


def _keeping(contender: Contender, kind: str, model_url: str) -> Contender:
    """The contender on one of the stores, with a script for a model."""
    scripted = replace(contender, env={**contender.env, "LASTCALL_MODEL_URL": model_url}, relays=False)
    if kind == "sqlite":
        return scripted
    return replace(scripted, env={**scripted.env, "LASTCALL_STORE_URL": "memory:"}, count_replies=None)


def _compared(sqlite: StoreRow, memory: StoreRow) -> StoreRow:
    if sqlite.per_s is not None and memory.per_s:
        sqlite.of_memory = sqlite.per_s / memory.per_s
    elif sqlite.gone_ms is not None and memory.gone_ms is not None:
        sqlite.added_ms = (sqlite.gone_ms - memory.gone_ms,)
    elif sqlite.took_ms is not None and memory.took_ms is not None:
        sqlite.added_ms = tuple(ours - theirs for ours, theirs in zip(sqlite.took_ms, memory.took_ms, strict=True))[:2]
    return sqlite
