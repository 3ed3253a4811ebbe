"""Measures the memory of sessions, turns and streams, and the time of a start with many stored sessions."""

import time

import msgspec
import trio

from bench.contenders import Contender
from bench.plan import Calls, Request
from bench.server_process import open_server
from bench.stage import Place, Stage, chat_streams, open_stage
from bench.stored_sessions import fill, open_store
from bench.table import Table, number


class IdleRow(msgspec.Struct, kw_only=True):
    """One figure: the cost of ``count`` things of one kind."""

    kind: str = "idle"
    what: str
    repeat: int
    count: int
    total: float
    each: float | None
    unit: str


TABLE = Table(
    "Idle: what it costs to be there",
    "Growth of the server's resident memory over a server that has nothing to do, for so many and for each; and "
    "the time from the start of the process until it listens.",
    (
        ("what", lambda row: row.what),
        ("count", lambda row: f"{row.count:,}"),
        ("in all", lambda row: f"{number(row.total, 2)} {row.unit.partition(' ')[0]}"),
        ("each", lambda row: "-" if row.each is None else f"{number(row.each, 2)} {row.unit.partition(' ')[2]}"),
    ),
)


async def measure_memory(
    contender: Contender, place: Place, *, repeat: int, sessions: int, turns: int
) -> list[IdleRow]:
    """Measure the memory of stored sessions, of sessions with a running turn, and of live streams."""
    rows = []
    create = Calls(name="create", count=20, requests=(Request(path="/sessions", body="{}"),), repeat=sessions // 20)
    begin = (
        Request(path="/sessions", body='{"id": "t$n"}'),
        Request(path="/sessions/t$n/turns", body='{"input": "t$n rate=1", "background": true}'),
    )
    run = Calls(name="run", count=turns, requests=begin)
    stream = chat_streams("s", turns, "rate=1")
    for what, count, group in (
        ("stored session, memory store", sessions, create),
        ("session with a running turn", turns, run),
        ("session with a running turn and a live stream", turns, stream),
    ):
        async with open_stage(contender, place, LASTCALL_STORE_URL="memory:") as stage:
            before = await _resident_bytes(stage)
            async with stage.open_load(group):
                grown = await _resident_bytes(stage) - before
        rows.append(_memory_row(what, repeat, count, grown))
    return rows


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
    return IdleRow(what="start, SQLite", repeat=repeat, count=sessions, total=took_s, each=None, unit="s")


async def _resident_bytes(stage: Stage) -> int:
    await trio.sleep(1)
    return stage.server.resident_bytes()


def _memory_row(what: str, repeat: int, count: int, grown: int) -> IdleRow:
    return IdleRow(
        what=what, repeat=repeat, count=count, total=grown / 2**20, each=grown / count / 1024, unit="MiB KiB"
    )
