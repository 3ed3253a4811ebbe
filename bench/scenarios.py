"""The scenarios: their measurements, their order and their sizes. Each yields its rows one by one."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench import end, expiry, first_token, idle, relay, store
from bench.contenders import Contender, choose
from bench.shutdown import CAP_S, Case, run_case, special, steady
from bench.stage import Place

Size = Literal["quick", "usual", "full"]

MAIN = (
    "lastcall",
    "lastcall-config",
    "lastcall-drain",
    "cooperative",
    "sse-starlette",
    "fastapi-2s",
    "fastapi-plain",
    "tuned",
    "quart-trio",
    "node",
)
QUICK = ("lastcall", "lastcall-config", "cooperative", "fastapi-2s", "quart-trio", "node")
RELAYS = ("lastcall", "tuned", "fastapi-plain", "fastapi")


@dataclass(frozen=True)
class Programme:
    """The choices of the command line."""

    scenario: str
    size: Size
    only: Sequence[str] = ()
    streams: Sequence[int] = ()
    repeats: int | None = None
    cap_s: float = CAP_S

    @property
    def chosen(self) -> list[Contender]:
        """Return the contenders by name, or else the scenario's own list."""
        if self.only:
            return choose(self.only)
        if self.scenario == "shutdown":
            return choose({"quick": QUICK, "usual": MAIN, "full": ()}[self.size])
        return choose(RELAYS)

    @property
    def contenders(self) -> list[Contender]:
        """Return the chosen contenders that can run on this machine."""
        return [contender for contender in self.chosen if contender.missing is None]

    @property
    def times(self) -> int:
        """Return how often each measurement is repeated."""
        if self.repeats is not None:
            return self.repeats
        return {"quick": 1, "usual": 3, "full": 5}[self.size] if self.scenario in ("shutdown", "store") else 1

    def steps(self) -> int | None:
        """Return the number of rows to come, if it is known."""
        if self.scenario == "shutdown":
            return len(self.contenders) * len(self.cases()) * self.times
        return None

    def cases(self) -> list[Case]:
        """The loads of the shutdown scenario."""
        counts = (
            self.streams
            or {"quick": (0, 50, 200), "usual": (0, 100, 500, 1000), "full": (0, 10, 100, 500, 1000)}[self.size]
        )
        cases = [steady(count) for count in counts]
        return [*cases, *special(200)] if self.size == "full" and not self.streams else cases


async def measure(programme: Programme, place: Place) -> AsyncGenerator[Any, None]:
    """The rows of a programme, one after another."""
    for repeat in range(programme.times):
        rows = _SCENARIOS[programme.scenario](programme, place, repeat)
        async for row in rows:
            yield row


async def _measure_shutdown(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    """Yield the runs interleaved: each repeat has all runs, and begins with another contender."""
    contenders = programme.contenders
    start = repeat % len(contenders)
    if repeat == 0:
        for contender in contenders:  # the first start fills byte code and page cache: it is not measured
            await run_case(contender, steady(0), place, repeat=-1, cap_s=programme.cap_s)
    for case in programme.cases():
        for contender in [*contenders[start:], *contenders[:start]]:
            yield await run_case(contender, case, place, repeat=repeat, cap_s=programme.cap_s)


async def _measure_relay(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    counts = tuple(programme.streams) or ((50,) if programme.size == "quick" else relay.STREAMS)
    window_s = 1.0 if programme.size == "quick" else relay.WINDOW_S
    for row in await relay.measure_direct(place, repeat=repeat, streams=counts, window_s=window_s):
        yield row
    for contender in programme.contenders:
        for row in await relay.measure_contender(contender, place, repeat=repeat, streams=counts, window_s=window_s):
            yield row


async def _measure_first_token(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    beside = tuple(programme.streams) or ((0,) if programme.size == "quick" else first_token.BESIDE)
    for row in await first_token.measure_direct(place, repeat=repeat):
        yield row
    for contender in programme.contenders:
        for row in await first_token.measure_contender(contender, place, repeat=repeat, beside=beside):
            yield row


async def _measure_idle(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    (lastcall,) = choose(["lastcall"])
    sessions = {"quick": 1_000, "usual": 100_000, "full": 100_000}[programme.size]
    for row in await idle.measure_memory(lastcall, place, repeat=repeat, sessions=min(sessions, 10_000), turns=500):
        yield row
    for row in await idle.measure_start(lastcall, place, repeat=repeat, sessions=sessions):
        yield row


async def _measure_expiry(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    largest = {"quick": 4, "usual": 5, "full": 6}[programme.size]
    for kind in ("memory", "sqlite"):
        for power in range(3, largest + 1):
            yield await expiry.measure(kind, 10**power, place.folder, repeat=repeat)


async def _measure_store(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    (contender,) = choose(["lastcall-config"])
    measured = store.QUICK if programme.size == "quick" else store.USUAL
    if programme.streams:
        measured = replace(measured, interrupted=programme.streams[0])
    async for row in store.measure(contender, place, measured, repeat=repeat):
        yield row


async def _measure_end(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    turns = 20 if programme.size == "quick" else end.TURNS
    for contender in programme.contenders:
        for row in await end.measure_contender(contender, place, repeat=repeat, turns=turns):
            yield row


_SCENARIOS = {
    "shutdown": _measure_shutdown,
    "relay": _measure_relay,
    "first-token": _measure_first_token,
    "idle": _measure_idle,
    "expiry": _measure_expiry,
    "end": _measure_end,
    "store": _measure_store,
}
NAMES = tuple(_SCENARIOS)
TABLES = {
    "relay": relay.TABLE,
    "first-token": first_token.TABLE,
    "idle": idle.TABLE,
    "expiry": expiry.TABLE,
    "end": end.TABLE,
    "store": store.TABLE,
}
