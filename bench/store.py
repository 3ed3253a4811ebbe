"""Measures the cost of a durable store: SQLite and PostgreSQL beside memory, on the same server, in turn.

The model is the service's own script, so only the service and its store take part. ``turns``: many clients, each in its
own session, start one turn after another and wait for its end. ``next turn`` and ``new session``: one client asks and
reads the stream, many times. ``checkpoints``: turns run, and no client calls. ``shutdown``: all turns are in the middle
of a reply when SIGTERM comes. Then several processes on one store (:mod:`bench.replicas`), and pages of many sessions
(:mod:`bench.many_sessions`). The time of one fsync in the same file system is measured too, and PostgreSQL's folder is
there.
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

from bench import many_sessions, replicas
from bench.contenders import Contender
from bench.database import Database, binaries, new_database
from bench.machine import busy_share
from bench.plan import Calls, Request, Streams
from bench.rows import spread
from bench.shutdown import Case, run_case
from bench.stage import Place, Stage, chat_streams, open_stage
from bench.store_rows import StoreRow, compared

NewRow = Callable[..., "StoreRow"]

_PROBE = "scripted:?tokens=1000000&rate=20&first_token_s=0"
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
    running: tuple[int, ...]  # the numbers of turns whose checkpoints are measured
    running_s: float
    replicas: tuple[tuple[str, bool], ...]  # the kinds of store, and whether processes reach each other by TLS
    processes: int  # on one store
    forwarded: int  # streams
    keyed: int  # groups of equal calls
    listed: int  # sessions of which pages are read
    pages: int  # how often each page is read


QUICK = Extent(
    sessions=50,
    warm_up_s=0.5,
    window_s=1,
    asked=20,
    interrupted=100,
    running=(20,),
    running_s=1,
    processes=2,
    forwarded=2,
    replicas=(("postgresql", True),),
    keyed=3,
    listed=2_000,
    pages=5,
)
USUAL = Extent(
    sessions=50,
    warm_up_s=1,
    window_s=4,
    asked=200,
    interrupted=1000,
    running=(50, 500),
    running_s=15,
    processes=3,
    forwarded=10,
    replicas=(("memory", False), ("sqlite", False), ("postgresql", False), ("postgresql", True)),
    keyed=50,
    listed=1_000_000,
    pages=100,
)


@dataclass(frozen=True)
class Kind:
    """A kind of store. ``database`` is the server of PostgreSQL, or of no other kind."""

    name: str
    database: Database | None = None

    def new_env(self, folder: Path) -> dict[str, str]:
        """The settings of a store that is not there yet."""
        fresh = os.urandom(4).hex()
        if self.database is not None:
            return {"LASTCALL_STORE_URL": self.database.url, "LASTCALL_STORE_SCHEMA": f"bench_{fresh}"}
        return {"LASTCALL_STORE_URL": "memory:" if self.name == "memory" else f"sqlite:{folder / fresh}.db"}


async def measure(contender: Contender, place: Place, extent: Extent, *, repeat: int) -> AsyncGenerator[StoreRow, None]:
    """Run each measurement once, in the order memory, SQLite, PostgreSQL; the last one if there is a server's program.

    What no repeat changes (several processes, and pages) is measured in the first one.
    """
    took_ms = await trio.to_thread.run_sync(_time_fsyncs, place.folder)
    yield StoreRow(what="fsync", store="-", repeat=repeat, n=len(took_ms), took_ms=spread(took_ms))
    kinds = await _find_kinds()
    try:
        for measured in (_measure_answers, _measure_shutdown):
            by_kind = [await measured(contender, kind, place, extent, repeat) for kind in kinds]
            for memory, *kept in zip(*by_kind, strict=True):
                yield memory
                for row in kept:
                    yield compared(row, memory)
        for kind in kinds[1:]:
            for row in await _measure_checkpoints(contender, kind, place, extent, repeat):
                yield row
        if repeat > 0:
            return
        for row in await _measure_replicas(contender, kinds, place, extent):
            yield row
        pages = [
            await many_sessions.measure(
                kind.name, extent.listed, place.folder, kind.database, times=extent.pages, repeat=repeat
            )
            for kind in kinds
        ]
        for memory, *kept in zip(*pages, strict=True):
            yield memory
            for row in kept:
                yield compared(row, memory)
    finally:
        for kind in kinds:
            if kind.database is not None:
                kind.database.remove()


async def _find_kinds() -> list[Kind]:
    """The kinds of store of this machine. A server of PostgreSQL runs, with its data on the disk of the others."""
    kinds = [Kind("memory"), Kind("sqlite")]
    programs = binaries()
    if programs is None:
        return kinds
    database = new_database(programs, within=None)
    try:
        await trio.to_thread.run_sync(database.make)
        # The defaults of PostgreSQL, but for its memory, and for checkpoints within the measurement.
        await database.start(
            fsync="on", full_page_writes="on", shared_buffers="1GB", max_wal_size="8GB", checkpoint_timeout="1h"
        )
    except BaseException:
        database.remove()
        raise
    return [*kinds, Kind("postgresql", database)]


async def _measure_replicas(contender: Contender, kinds: list[Kind], place: Place, extent: Extent) -> list[StoreRow]:
    measured = [
        await replicas.measure(
            contender,
            place,
            kind.new_env(place.folder),
            kind=kind.name,
            tls=tls,
            count=1 if name == "memory" else extent.processes,
            keyed=extent.keyed,
            streams=extent.forwarded,
            window_s=extent.running_s,
        )
        for name, tls in extent.replicas
        for kind in kinds
        if kind.name == name and (not tls or replicas.makes_namespaces())
    ]
    return [row for rows in measured for row in rows]


async def _measure_answers(
    contender: Contender, kind: Kind, place: Place, extent: Extent, repeat: int
) -> list[StoreRow]:
    """Measure first tokens on a server with little load, then as many turns as the server can do."""
    create = Calls(name="create", count=extent.sessions, requests=(Request(path="/sessions", body='{"id": "s$n"}'),))
    times = _ASKED_FIRST + extent.asked
    following = Streams(name="next turn", count=1, stream=_NEXT_STREAMED, repeat=times, ready_at="end")
    opening = chat_streams("new session", 1, "Well?", repeat=times, ready_at="end")
    new_row = partial(StoreRow, store=kind.name, repeat=repeat, busy_before=await busy_share())
    async with open_stage(_keeping(contender, kind, place, _UNPACED), place) as stage:
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


async def _measure_shutdown(
    contender: Contender, kind: Kind, place: Place, extent: Extent, repeat: int
) -> list[StoreRow]:
    count = extent.interrupted
    case = Case(f"interrupted-{count}", f"{count} turns", count, message="Well?")
    row = await run_case(_keeping(contender, kind, place, _SLOW), case, place, repeat=repeat)
    interrupted = row.terminals.get("interrupted", 0)
    return [
        StoreRow(
            what="shutdown",
            store=kind.name,
            repeat=repeat,
            n=interrupted,
            lost=count - interrupted,
            gone_ms=None if row.gone_s is None else row.gone_s * 1000,
            phases_ms=row.phases_ms,
            kept=row.replies_kept,
            busy_before=row.busy_before,
        )
    ]


async def _measure_checkpoints(
    contender: Contender, kind: Kind, place: Place, extent: Extent, repeat: int
) -> list[StoreRow]:
    """Measure what running turns cost the store while no client calls: one row for each number of turns."""
    rows = []
    if kind.database is not None:
        # The log has what autovacuum does: it has nothing to do for the turns that were measured before.
        await trio.to_thread.run_sync(kind.database.run, "VACUUM (ANALYZE)")
    for running in extent.running:
        requests = (
            Request(path="/sessions", body='{"id": "r$n"}'),
            Request(path="/sessions/r$n/turns", body='{"input": "Well?", "background": true}'),
        )
        busy = await busy_share()
        async with open_stage(_keeping(contender, kind, place, _PROBE), place) as stage:
            async with stage.open_load(Calls(name="start", count=running, requests=requests)) as load:
                lost = sum(bool(call.note) for call in (await load.stop()).calls)
            await trio.sleep(2)  # the checkpoints have their pace, and the cost of the starts is behind
            before, used_s, since = _written(kind, stage), stage.server.cpu_seconds(), time.monotonic()
            await trio.sleep(extent.running_s)
            after, took_s = _written(kind, stage), time.monotonic() - since
            used_s = stage.server.cpu_seconds() - used_s
        rows.append(
            StoreRow(
                what=f"checkpoints, {running} turns",
                store=kind.name,
                repeat=repeat,
                n=running - lost,
                lost=lost,
                cpu_share=used_s / took_s,
                commits_per_s=(after[0] - before[0]) / took_s if kind.database is not None else None,
                log_bytes=(after[1] - before[1]) / took_s / max(running - lost, 1),
                busy_before=busy,
            )
        )
    return rows


def _written(kind: Kind, stage: Stage) -> tuple[int, int]:
    """The number of writing transactions so far, which only PostgreSQL tells, and the bytes that were written."""
    if kind.database is None:
        return 0, stage.server.written_bytes()
    query = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
    [(transactions, written)] = kind.database.run(query)
    return int(transactions), int(written)


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


def _keeping(contender: Contender, kind: Kind, place: Place, model_url: str) -> Contender:
    """The contender on a new store of this kind, with a script for a model."""
    scripted = replace(contender, env={**contender.env, "LASTCALL_MODEL_URL": model_url}, relays=False)
    if kind.name == "sqlite":
        return scripted  # with a file that the stage names
    env = kind.new_env(place.folder)
    counts = None if kind.database is None else partial(_count_replies, kind.database, env["LASTCALL_STORE_SCHEMA"])
    return replace(scripted, env={**scripted.env, **env}, count_replies=counts)


async def _count_replies(database: Database, schema: str, _: Path) -> int:
    """The turns of a schema that have ended with a part of a reply."""
    query = f"SELECT count(*) FROM {schema}.turns WHERE owner IS NULL AND length(output) > 2"
    [(count,)] = await trio.to_thread.run_sync(database.run, query)
    return int(count)
