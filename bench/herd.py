"""Measures a herd: many chats begin at the same moment, as after a deploy; the model is silent after its first token.

So all work is that of the starts. Meanwhile another process asks ``GET /healthz`` on a new connection 20 times a
second, as a balancer does: an answer that comes late takes the server out of service when it is needed most.
"""

from collections import Counter

import msgspec
import trio

from bench.contenders import Contender
from bench.pairs import Pairing
from bench.peers import open_upstream
from bench.plan import LoadResult, Prober, Request
from bench.relay import PAD
from bench.rows import spread
from bench.stage import Place, chat_streams, direct_streams, open_direct_load, open_stage
from bench.table import Table, number, triple
from bench.wire import StreamEnd

CHATS = (1000, 300)
_MESSAGE = f"rate=20 silent_after=1 pad={PAD}"
_PROBE_INTERVAL_S = 0.05
_ANSWER_MAX_S = 1.0


class HerdRow(msgspec.Struct, kw_only=True):
    """The measurement of one herd on one server."""

    kind: str = "herd"
    contender: str
    label: str
    repeat: int
    chats: int
    began: int  # chats that got their first token
    first_ms: tuple[float, float, float] | None  # p50, p99, max; from the connect to the first token
    errors: dict[str, int] = {}  # the ends of the others
    start_us: float | None = None  # processor time of all processes of the server, by chats
    healthz: int = 0  # probes that began before the last first token
    healthz_ms: tuple[float, float, float] | None = None
    healthz_errors: int = 0  # probes without an answer, or with another status than 200
    client_late_ms: float | None = None  # the load client's own worst delay of a probe


TABLE = Table(
    "Herd: chats that begin at the same moment",
    "first token: from the connect to the first token, p50 / p99 / max of those that began. CPU a start: processor "
    "time of all processes of the server from the first connect to the last first token, by chats. healthz: the "
    "answers to GET /healthz meanwhile, each on a new connection; late: how late the client itself was. direct: "
    "without any server between.",
    (
        ("chats", lambda row: str(row.chats)),
        ("server", lambda row: row.label),
        ("began", lambda row: str(row.began)),
        ("others", lambda row: ", ".join(f"{count} {end}" for end, count in row.errors.items()) or "-"),
        ("first token ms", lambda row: triple(row.first_ms, 0)),
        ("CPU a start us", lambda row: number(row.start_us, 0)),
        ("healthz", lambda row: f"{row.healthz}" + (f", {row.healthz_errors} failed" if row.healthz_errors else "")),
        ("healthz ms", lambda row: triple(row.healthz_ms, 0)),
        ("late ms", lambda row: number(row.client_late_ms, 0)),
    ),
)
PAIRING = Pairing(
    lambda row: f"{row.chats} chats",
    (
        ("CPU us a start", lambda row: row.start_us),
        ("first token p50 ms", lambda row: row.first_ms and row.first_ms[0]),
        ("first token p99 ms", lambda row: row.first_ms and row.first_ms[1]),
        ("healthz max ms", lambda row: row.healthz_ms and row.healthz_ms[2]),
    ),
)


async def measure_contender(contender: Contender, place: Place, chats: int, *, repeat: int) -> HerdRow:
    """Measure one herd on a new server."""
    prober = Prober(request=Request(method="GET", path="/healthz"), interval_s=_PROBE_INTERVAL_S)
    async with open_stage(contender, place) as stage, stage.open_load(prober) as probing:
        before_s = stage.server.cpu_seconds()
        async with stage.open_load(chat_streams("herd", chats, _MESSAGE, at_once=True)) as load:
            used_s = stage.server.cpu_seconds() - before_s
            result = await load.stop()
            await trio.sleep(_ANSWER_MAX_S)  # for the probes that have no answer yet
            probes = await probing.stop()
    row = _row(contender.name, contender.label, repeat, chats, result)
    row.start_us = used_s * 1e6 / chats
    _add_probes(row, result, probes)
    return row


async def measure_direct(place: Place, chats: int, *, repeat: int) -> HerdRow:
    """Measure the control: the same herd on the model server itself."""
    async with open_upstream(cpus=place.client_cpus) as upstream:
        group = direct_streams("herd", chats, _MESSAGE, at_once=True)
        async with open_direct_load(upstream, place, group) as load:
            result = await load.stop()
    return _row("direct", "direct", repeat, chats, result)


def _row(contender: str, label: str, repeat: int, chats: int, result: LoadResult) -> HerdRow:
    took, errors = [], Counter[str]()
    for stream in result.streams:
        if stream.first_at is not None and stream.began_at is not None:
            took.append((stream.first_at - stream.began_at) * 1000)
        else:
            end = "silent" if stream.end is StreamEnd.OPEN else stream.end.value
            errors[end if stream.status is None else f"{end} ({stream.status})"] += 1
    return HerdRow(
        contender=contender,
        label=label,
        repeat=repeat,
        chats=chats,
        began=len(took),
        first_ms=spread(took),
        errors=dict(errors),
    )


def _add_probes(row: HerdRow, herd: LoadResult, probes: LoadResult) -> None:
    """Take the probes that were sent while the chats began."""
    since = min((stream.began_at for stream in herd.streams if stream.began_at is not None), default=0.0)
    until = max((stream.first_at for stream in herd.streams if stream.first_at is not None), default=float("inf"))
    meanwhile = [probe for probe in probes.probes if since <= probe.at <= until]
    answered = [probe for probe in meanwhile if probe.outcome == "answered" and probe.status == 200]
    row.healthz = len(meanwhile)
    row.healthz_errors = len(meanwhile) - len(answered)
    row.healthz_ms = spread([probe.waited_s * 1000 for probe in answered])
    row.client_late_ms = max((probe.late_s * 1000 for probe in answered), default=None)
