"""Measures JSON requests: 16 clients ask one after another, each on a connection that stays open.

``GET /sessions/{id}`` reads a session from SQLite; ``GET /healthz`` does nothing but answer.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import msgspec
import trio

from bench.contenders import Contender
from bench.pairs import Pairing
from bench.plan import Calls, Request
from bench.rows import spread
from bench.stage import Place, Stage, open_stage
from bench.table import Table, number, triple

CLIENTS = 16
WARM_UP_S = 1.0
WINDOW_S = 4.0
_FOR_EVER = 1_000_000


class RequestsRow(msgspec.Struct, kw_only=True):
    """The measurement of one kind of request on one server."""

    kind: str = "requests"
    contender: str
    label: str
    repeat: int
    what: str
    clients: int
    n: int  # answers in the window
    lost: int  # clients that got no answer, or no success
    per_s: float
    cpu_share: float  # the use of one core by all processes of the server
    cpu_us: float | None  # their processor time for each answer
    took_ms: tuple[float, float, float] | None  # p50, p99, max


TABLE = Table(
    "Requests: small answers in JSON",
    f"{CLIENTS} clients in a closed loop, each on one connection. us/request: processor time of all processes of the "
    "server by answers. Where the server's core is not full, the clients were the limit, and only us/request compares.",
    (
        ("request", lambda row: row.what),
        ("server", lambda row: row.label),
        ("n", lambda row: f"{row.n:,}"),
        ("lost", lambda row: str(row.lost)),
        ("requests/s", lambda row: number(row.per_s, 0)),
        ("core", lambda row: f"{row.cpu_share:.0%}"),
        ("us/request", lambda row: number(row.cpu_us, 0)),
        ("took ms", lambda row: triple(row.took_ms, 2)),
    ),
)
PAIRING = Pairing(
    lambda row: row.what,
    (
        ("requests/s", lambda row: row.per_s),
        ("CPU us a request", lambda row: row.cpu_us),
        ("p99 ms", lambda row: row.took_ms and row.took_ms[1]),
    ),
)


async def measure_contender(contender: Contender, place: Place, *, repeat: int, window_s: float) -> list[RequestsRow]:
    """Measure all requests that the contender answers, on one server."""
    new_row = partial(RequestsRow, contender=contender.name, label=contender.label, repeat=repeat)
    rows = []
    async with open_stage(contender, place) as stage:
        if contender.keeps_sessions:
            create = Request(path="/sessions", body='{"id": "s$n"}')
            async with stage.open_load(Calls(name="create", count=CLIENTS, requests=(create,))):
                pass
            asked = Request(method="GET", path="/sessions/s$n")
            rows += [await _measure(stage, partial(new_row, what="GET /sessions/{id}"), asked, window_s)]
        asked = Request(method="GET", path="/healthz")
        rows += [await _measure(stage, partial(new_row, what="GET /healthz"), asked, window_s)]
    return rows


async def _measure(stage: Stage, new_row: Callable[..., RequestsRow], asked: Request, window_s: float) -> RequestsRow:
    group = Calls(name="asking", count=CLIENTS, requests=(asked,), repeat=_FOR_EVER, ready_at="first")
    async with stage.open_load(group) as load:
        await trio.sleep(min(WARM_UP_S, window_s))
        used_s, since = -stage.server.cpu_seconds(), time.monotonic()
        await trio.sleep(window_s)
        used_s, until = used_s + stage.server.cpu_seconds(), time.monotonic()
        clients = (await load.stop()).calls
    took = [
        (at - before) * 1000 for client in clients for before, at in pairwise(client.answered_at) if since <= at < until
    ]
    return new_row(
        clients=CLIENTS,
        n=len(took),
        lost=sum(bool(client.note) for client in clients) + CLIENTS - len(clients),
        per_s=len(took) / (until - since),
        cpu_share=used_s / (until - since),
        cpu_us=used_s * 1e6 / len(took) if took else None,
        took_ms=spread(took),
    )
