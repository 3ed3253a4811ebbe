"""The main scenario: the server gets SIGTERM while N people stream. Measures how the streams end, and how fast."""

import os
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from bench.contenders import Contender
from bench.machine import busy_share
from bench.pairs import Pairing
from bench.plan import Group, Idle, LoadResult, Request
from bench.server_process import ServerFailedError
from bench.stage import Place, Stage, chat_streams, open_stage
from bench.upstream import ReplyBook
from bench.wire import StreamEnd

CAP_S = 20.0
"""After this time the process group is killed, and the row says so."""


@dataclass(frozen=True)
class Case:
    """A load. ``stalled`` of the ``streams`` do not read; ``message`` tells the model how to reply."""

    name: str
    label: str
    streams: int
    message: str = "rate=20"
    stalled: int = 0
    idle: int = 0
    settle_s: float = 1.0  # from the moment all is open to the signal

    def groups(self) -> tuple[Group, ...]:
        groups: list[Group] = []
        if self.streams > self.stalled:
            groups.append(chat_streams("streams", self.streams - self.stalled, self.message))
        if self.stalled:
            groups.append(chat_streams("stalled", self.stalled, "rate=400 pad=400", stalled=True))
        if self.idle:
            groups.append(Idle(count=self.idle, request=Request(method="GET", path="/healthz")))
        return tuple(groups)


def steady(streams: int) -> Case:
    """Return a load of endless turns at 20 tokens a second."""
    return Case(f"steady-{streams}", f"{streams} streams", streams)


def special(streams: int) -> tuple[Case, ...]:
    """Return the loads with a difficulty: stalled clients, idle connections, turns that need time, a silent model."""
    return (
        Case(f"stalled-{streams}", f"{streams} streams, 1 in 100 stalled", streams, stalled=max(streams // 100, 1)),
        Case(f"idle-{streams}", f"{streams} idle keep-alive connections", 0, idle=streams),
        # Every turn ends a second after the signal, within a drain or a grace period of two.
        Case(f"finishing-{streams}", f"{streams} turns that need 1 s more", streams, "rate=20 tokens=60", settle_s=2.0),
        Case(f"silent-{streams}", f"{streams} streams, the model silent", streams, "rate=20 silent_after=3"),
    )


_REQUEST_LINE = re.compile(r'\\?"(GET|HEAD|POST|DELETE|PATCH) \S+ (HTTP/)?[\d.]+\\?" \d{3}\b|"message": "turn ended"')
"""A line of an access log (uvicorn's, hypercorn's or in the usual combined form; plain or JSON), or of a turn's end."""


class ShutdownRow(msgspec.Struct, kw_only=True):
    """The measurement of one run. Seconds count from the signal."""

    kind: str = "shutdown"
    contender: str
    label: str
    case: str
    streams: int
    repeat: int
    settings: Mapping[str, str]
    command: Sequence[str]
    failed: str | None = None  # why there is no measurement
    gone_s: float | None = None  # the whole process group; None: killed at the cap
    last_stream_s: float | None = None  # the last well-behaved stream's end
    exit_code: int | None = None
    killed: bool = False
    strays: int = 0
    streaming: int = 0  # well-behaved streams that had begun when the signal came
    ends: dict[str, int] = {}  # the ends of the streams in ``streaming``
    terminals: dict[str, int] = {}
    stalled_ends: dict[str, int] = {}
    too_late: dict[str, int] = {}  # the ends of streams without a token at the signal
    gaps: int = 0
    tokens_lost: int | None = None  # tokens that the model sent and no client received
    upstream_closed_s: float | None = None  # the close of the last connection to the model server
    replies_kept: int | None = None  # turns whose non-empty reply is in the store; None: no durable store
    phases_ms: dict[str, float] = {}  # from the contender's own shutdown report, if it writes one
    log_lines: int = 0  # without the lines of single requests
    log_request_lines: int = 0
    log_tracebacks: int = 0
    log_cancelled: int = 0
    rss_idle_mib: float = 0
    rss_loaded_mib: float = 0
    busy_before: float = 0  # the share of the machine that other processes used
    load_average: float = 0


PAIRING = Pairing(
    lambda row: row.case,
    (
        ("gone s", lambda row: row.gone_s),
        ("last stream s", lambda row: row.last_stream_s),
        ("memory under load MiB", lambda row: row.rss_loaded_mib or None),
    ),
)


async def run_case(contender: Contender, case: Case, place: Place, *, repeat: int, cap_s: float = CAP_S) -> ShutdownRow:
    """Start the processes, let them stream, signal, and watch. A contender's failure does not raise."""
    row = ShutdownRow(
        contender=contender.name,
        label=contender.label,
        case=case.name,
        streams=case.streams,
        repeat=repeat,
        settings={n: v for n, v in contender.env.items() if not n.endswith(("_BIND", "_MODEL"))},
        command=[Path(contender.argv[0]).name, *contender.argv[1:]],
        busy_before=await busy_share(),
        load_average=os.getloadavg()[0],
    )
    try:
        async with open_stage(contender, place) as stage:
            await _stop_under_load(stage, case, row, cap_s, relays=contender.relays)
    except ServerFailedError as error:
        row.failed = str(error)[-2000:]
        return row
    _add_log(row, stage.server.log())
    if contender.count_replies is not None and case.streams:
        row.replies_kept = await contender.count_replies(stage.store)
    return row


async def _stop_under_load(stage: Stage, case: Case, row: ShutdownRow, cap_s: float, *, relays: bool) -> None:
    server = stage.server
    row.rss_idle_mib = server.resident_bytes() / 2**20
    async with stage.open_load(*case.groups()) as load:
        await trio.sleep(case.settle_s)
        row.rss_loaded_mib = server.resident_bytes() / 2**20
        signalled = server.signal_main(signal.SIGTERM)
        with trio.move_on_after(cap_s):
            await server.wait_gone()
        if server.gone is None:
            row.killed = True
            server.signal_group(signal.SIGKILL)
        gone = await server.wait_gone()
        books = await stage.upstream.books()
        result = await load.stop()
    row.exit_code = gone.exit_code
    row.gone_s = None if row.killed else gone.at - signalled
    row.strays = len(gone.strays)
    _add_streams(row, result, signalled)
    _add_books(row, result, books, signalled, relays=relays)


def _add_streams(row: ShutdownRow, result: LoadResult, signalled: float) -> None:
    opened = [stream for stream in result.streams if stream.group == "streams"]
    behaved = [stream for stream in opened if stream.first_at is not None and stream.first_at < signalled]
    row.streaming = len(behaved)
    row.too_late = dict(Counter(str(stream.end) for stream in opened if stream not in behaved))
    row.ends = dict(Counter(stream.end.value for stream in behaved))
    row.terminals = dict(Counter(stream.terminal for stream in behaved if stream.terminal))
    row.stalled_ends = dict(Counter(stream.end.value for stream in result.streams if stream.group == "stalled"))
    row.gaps = sum(stream.gaps for stream in behaved)
    ended = [stream.ended_at for stream in behaved if stream.ended_at is not None and stream.end is not StreamEnd.OPEN]
    row.last_stream_s = max(ended) - signalled if ended else None


def _add_books(
    row: ShutdownRow, result: LoadResult, books: Sequence[ReplyBook], signalled: float, *, relays: bool
) -> None:
    if not relays or not books:
        return
    received = {f"streams{stream.number}": stream.tokens for stream in result.streams if stream.group == "streams"}
    sent = {book.message.split()[0]: book.tokens for book in books}
    row.tokens_lost = sum(sent[name] - tokens for name, tokens in received.items() if name in sent)
    row.upstream_closed_s = max(book.closed_at or float("inf") for book in books) - signalled


def _add_log(row: ShutdownRow, log: str) -> None:
    lines = log.splitlines()
    for line in lines:
        if '"shutdown report"' in line:
            row.phases_ms = msgspec.json.decode(line)["phases_ms"]
    row.log_request_lines = sum(_REQUEST_LINE.search(line) is not None for line in lines)
    row.log_lines = len(lines) - row.log_request_lines
    row.log_tracebacks = sum("Traceback (most recent call last)" in line for line in lines)
    row.log_cancelled = sum(re.search(r"\bCancelled(Error)?\b", line) is not None for line in lines)
