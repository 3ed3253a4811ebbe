"""Measures the time from a turn's end to the close of its model connection. Until the close, tokens cost money.

``client gone``: the client closes its connection in mid-stream. ``cancel``: the client cancels the turn.
``deadline``: the model server has been silent for the longest time allowed, counted from the send of its last token.
"""

from collections.abc import Sequence

import msgspec
import trio

from bench.contenders import Contender
from bench.pairs import Pairing
from bench.plan import LoadResult, Streams
from bench.rows import spread
from bench.stage import Place, Stage, chat_streams, open_stage
from bench.table import Table, triple
from bench.upstream import ReplyBook

TURNS = 200
_TOKENS_BEFORE = 10
_SILENCE_S = 1.0
_TIME_MAX_S = 30.0


class EndRow(msgspec.Struct, kw_only=True):
    """The times of all turns that end by one cause."""

    kind: str = "end"
    contender: str
    label: str
    repeat: int
    cause: str
    turns: int
    closed: int  # model connections that closed before the measurement ended
    closed_ms: tuple[float, float, float] | None  # p50, p99, max


TABLE = Table(
    "End: from a cause to the model server's connection closed",
    f"{TURNS} turns at 20 tokens a second each, all at once; ms, p50 / p99 / max.",
    (
        ("cause", lambda row: row.cause),
        ("server", lambda row: row.label),
        ("turns", lambda row: str(row.turns)),
        ("closed", lambda row: str(row.closed)),
        ("closed after ms", lambda row: triple(row.closed_ms, 2)),
    ),
)
PAIRING = Pairing(
    lambda row: row.cause,
    (
        ("closed p50 ms", lambda row: row.closed_ms and row.closed_ms[0]),
        ("closed p99 ms", lambda row: row.closed_ms and row.closed_ms[1]),
    ),
)


async def measure_contender(contender: Contender, place: Place, *, repeat: int, turns: int = TURNS) -> list[EndRow]:
    """Measure every cause that the contender supports."""
    rows = []
    async with open_stage(contender, place) as stage:
        gone = chat_streams("gone", turns, "rate=20", leave_after_tokens=_TOKENS_BEFORE)
        result, books = await _watch(stage, gone)
        left = {f"gone{s.number}": s.ended_at for s in result.streams if s.note == "left" and s.ended_at is not None}
        rows.append(_row(contender, repeat, "client gone", turns, _waits(books, left)))
    if not contender.name.startswith("lastcall"):
        return rows
    async with open_stage(contender, place) as stage:
        cancel = chat_streams("cancel", turns, "rate=20", cancel_after_tokens=_TOKENS_BEFORE)
        result, books = await _watch(stage, cancel)
        asked = {f"cancel{s.number}": s.cancelled_at for s in result.streams if s.cancelled_at is not None}
        rows.append(_row(contender, repeat, "cancel", turns, _waits(books, asked)))
    async with open_stage(contender, place, LASTCALL_NEXT_TOKEN_TIMEOUT_S=str(_SILENCE_S)) as stage:
        silent = chat_streams("deadline", turns, f"rate=20 silent_after={_TOKENS_BEFORE}")
        _, books = await _watch(stage, silent)
        due = {book.message.split()[0]: book.last_at + _SILENCE_S for book in books if book.last_at is not None}
        rows.append(_row(contender, repeat, "deadline", turns, _waits(books, due)))
    return rows


async def _watch(stage: Stage, group: Streams) -> tuple[LoadResult, list[ReplyBook]]:
    """Wait until all connections are closed, with a bound."""
    async with stage.open_load(group) as load:
        with trio.move_on_after(_TIME_MAX_S):
            while not all(book.closed_at for book in await stage.upstream.books()):  # noqa: ASYNC110  another process
                await trio.sleep(0.1)
        books = await stage.upstream.books()
        return await load.stop(), books


def _waits(books: Sequence[ReplyBook], causes: dict[str, float]) -> list[float]:
    closed = {book.message.split()[0]: book.closed_at for book in books}
    return [(at - causes[name]) * 1000 for name, at in closed.items() if at is not None and name in causes]


def _row(contender: Contender, repeat: int, cause: str, turns: int, waits_ms: Sequence[float]) -> EndRow:
    return EndRow(
        contender=contender.name,
        label=contender.label,
        repeat=repeat,
        cause=cause,
        turns=turns,
        closed=len(waits_ms),
        closed_ms=spread(waits_ms),
    )
