"""Measures how much later the first token comes than from the model server itself.

One client asks many times, each time on a new connection, alone or beside 200 others that stream. The server's part is
the difference to the same question sent to the model server directly.
"""

from collections.abc import Awaitable, Callable

import msgspec
import trio

from bench.contenders import Contender
from bench.pairs import Pairing
from bench.peers import open_upstream
from bench.plan import LoadResult
from bench.rows import spread
from bench.stage import Place, chat_streams, direct_streams, open_direct_load, open_stage
from bench.table import Table, triple
from bench.upstream import ReplyBook

Books = Callable[[], Awaitable[list[ReplyBook]]]

ASKED = 100
BESIDE = (0, 200)
_MESSAGE = "rate=100 tokens=2"
_TIME_MAX_S = 60.0


class FirstTokenRow(msgspec.Struct, kw_only=True):
    """The measured times to the first token."""

    kind: str = "first-token"
    contender: str
    label: str
    repeat: int
    beside: int  # other streams, 20 tokens a second each
    asked: int
    first_ms: tuple[float, float, float] | None  # p50, p99, max


TABLE = Table(
    "First token: from the request to the first token",
    f"{ASKED} questions one after another, each on a new connection; ms, p50 / p99 / max. Subtract the direct row: "
    "the rest is what the server adds.",
    (
        ("streams beside", lambda row: str(row.beside)),
        ("server", lambda row: row.label),
        ("n", lambda row: str(row.asked)),
        ("first token ms", lambda row: triple(row.first_ms, 2)),
    ),
)
PAIRING = Pairing(
    lambda row: f"{row.beside} streams beside",
    (
        ("first token p50 ms", lambda row: row.first_ms and row.first_ms[0]),
        ("first token p99 ms", lambda row: row.first_ms and row.first_ms[1]),
    ),
)


async def measure_contender(contender: Contender, place: Place, beside: int, *, repeat: int) -> FirstTokenRow:
    async with open_stage(contender, place) as stage:
        groups = [chat_streams("others", beside, "rate=20")] if beside else []
        async with stage.open_load(*groups):
            await trio.sleep(1)
            async with stage.open_load(chat_streams("asked", 1, _MESSAGE, repeat=ASKED)) as load:
                await _wait_finished(stage.upstream.books, ASKED)
                result = await load.stop()
    return _row(contender.name, contender.label, repeat, beside, result)


async def measure_direct(place: Place, *, repeat: int) -> FirstTokenRow:
    """Measure the control: the same questions to the model server itself."""
    async with open_upstream(cpus=place.client_cpus) as upstream:
        group = direct_streams("asked", 1, _MESSAGE, repeat=ASKED)
        async with open_direct_load(upstream, place, group) as load:
            await _wait_finished(upstream.books, ASKED)
            result = await load.stop()
    return _row("direct", "direct", repeat, 0, result)


async def _wait_finished(books: Books, count: int) -> None:
    with trio.move_on_after(_TIME_MAX_S):
        while sum(book.finished for book in await books()) < count:  # noqa: ASYNC110  another process
            await trio.sleep(0.2)
        await trio.sleep(0.2)


def _row(contender: str, label: str, repeat: int, beside: int, result: LoadResult) -> FirstTokenRow:
    asked = [s for s in result.streams if s.group == "asked"]
    took = [(s.first_at - s.sent_at) * 1000 for s in asked if s.first_at is not None and s.sent_at is not None]
    return FirstTokenRow(
        contender=contender, label=label, repeat=repeat, beside=beside, asked=len(took), first_ms=spread(took)
    )
