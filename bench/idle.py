"""Measures the memory of sessions, turns and streams, and the time of a start with many stored sessions."""

import time

import msgspec

from bench.contenders import Contender
from bench.plan import Calls, Group, Request
from bench.server_process import open_server
from bench.stage import Place, chat_streams, open_stage
from bench.stored_sessions import fill, open_store
from bench.table import Table, number


class IdleRow(msgspec.Struct, kw_only=True):
    """One figure: the cost of ``count`` things of one kind."""

    kind: str = "idle"
    contender: str
    label: str
    what: str
    repeat: int
    count: int
    total: float
    each: float | None
    unit: str


TABLE = Table(
    "Idle: what it costs to be there",
    "Memory is PSS: a page that several processes share counts in parts. Of a process: all that it has. Of sessions "
    "and streams: the growth of the whole process group over a server that has nothing to do, for so many and for "
    "each. A start is the time from the start of the process until it listens.",
    (
        ("what", lambda row: row.what),
        ("server", lambda row: row.label),
        ("count", lambda row: f"{row.count:,}"),
        ("in all", lambda row: f"{number(row.total, 2)} {row.unit.partition(' ')[0]}"),
        ("each", lambda row: "-" if row.each is None else f"{number(row.each, 2)} {row.unit.partition(' ')[2]}"),
    ),
)
_WARM_UP = 50
_QUIET = "silent_after=1"
"""The model sends one token of an endless reply, and is silent then."""


async def measure_processes(contender: Contender, place: Place, *, repeat: int) -> list[IdleRow]:
    """Measure the memory of the processes of a server that has nothing to do."""
    async with open_stage(contender, place) as stage:
        workers = set(stage.server.workers()) or {stage.server.pid}
        sizes = await stage.server.settled_pss_bytes()
    rows = []
    for what, pids in (("an idle worker", workers), ("an idle server's other processes", set(sizes) - workers)):
        if total := sum(sizes[pid] for pid in pids):
            mib = total / 2**20
            rows.append(_row(contender, what, repeat, len(pids), total=mib, each=mib / len(pids), unit="MiB MiB"))
    return rows


async def measure_streams(contender: Contender, place: Place, *, repeat: int, streams: int) -> list[IdleRow]:
    """Measure the memory of live streams that are quiet, each with a connection to the model server."""
    quiet = chat_streams("q", streams, _QUIET)
    return [
        await _measure_growth(contender, place, "a relayed stream, live and quiet", quiet, repeat=repeat, count=streams)
    ]


async def measure_sessions(
    contender: Contender, place: Place, *, repeat: int, sessions: int, turns: int
) -> list[IdleRow]:
    """Measure the memory of sessions in the memory store, and of running turns without a stream."""
    create = Calls(name="create", count=20, requests=(Request(path="/sessions", body="{}"),), repeat=sessions // 20)
    begin = (
        Request(path="/sessions", body='{"id": "t$n"}'),
        Request(path="/sessions/t$n/turns", body=f'{{"input": "t$n {_QUIET}", "background": true}}'),
    )
    run = Calls(name="run", count=turns, requests=begin)
    kept = await _measure_growth(
        contender,
        place,
        "a stored session, memory store",
        create,
        repeat=repeat,
        count=sessions,
        LASTCALL_STORE_URL="memory:",
    )
    running = "a running turn without a stream"
    return [kept, await _measure_growth(contender, place, running, run, repeat=repeat, count=turns)]


async def _measure_growth(
    contender: Contender, place: Place, what: str, group: Group, *, repeat: int, count: int, **settings: str
) -> IdleRow:
    async with open_stage(contender, place, **settings) as stage:
        async with stage.open_load(chat_streams("w", _WARM_UP, "tokens=2")):
            pass  # what the first requests load is no cost of a stream
        before = sum((await stage.server.settled_pss_bytes()).values())
        async with stage.open_load(group):
            grown = sum((await stage.server.settled_pss_bytes()).values()) - before
    return _row(contender, what, repeat, count, total=grown / 2**20, each=grown / count / 1024, unit="MiB KiB")


async def measure_start(contender: Contender, place: Place, *, repeat: int, sessions: int) -> list[IdleRow]:
    """Measure the time of a start with an empty store and with many sessions in it."""
    path = place.folder / f"start-{repeat}.db"
    rows = [await _measure_start(contender, place, repeat, 0)]
    async with open_store("sqlite", path) as store:
        await fill(store, sessions)
    return [*rows, await _measure_start(contender, place, repeat, sessions)]


async def _measure_start(contender: Contender, place: Place, repeat: int, sessions: int) -> IdleRow:
    launch = contender.launch(
        upstream_url="http://127.0.0.1:9/v1", store=place.folder / f"start-{repeat}.db", cpus=place.server_cpus
    )
    began = time.monotonic()
    async with open_server(launch, log_path=place.folder / f"start-{repeat}-{sessions}.log"):
        took_s = time.monotonic() - began
    return _row(contender, "start, SQLite", repeat, sessions, total=took_s, each=None, unit="s")


def _row(
    contender: Contender, what: str, repeat: int, count: int, *, total: float, each: float | None, unit: str
) -> IdleRow:
    return IdleRow(
        contender=contender.name,
        label=contender.label,
        what=what,
        repeat=repeat,
        count=count,
        total=total,
        each=each,
        unit=unit,
    )
