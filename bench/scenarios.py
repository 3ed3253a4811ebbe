"""The scenarios: their measurements, their order and their sizes. Each yields its rows one by one."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench import capacity, end, expiry, first_token, herd, idle, relay, requests, shutdown, store, store_rows, tree
from bench.contenders import Contender, choose
from bench.pairs import Pairing
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
SERVED = ("lastcall-config", "tuned", "fastapi-plain")
"""For many connections at once: a bare hypercorn has a backlog of 100, and the others have 2048."""
IDLE = ("lastcall", "lastcall-2", "tuned", "fastapi-plain")
REPEATS_COMPARED = 5


@dataclass(frozen=True)
class Programme:
    """The choices of the command line."""

    scenario: str
    size: Size
    only: Sequence[str] = ()
    streams: Sequence[int] = ()
    repeats: int | None = None
    cap_s: float = CAP_S
    modes: Sequence[str] = relay.MODES
    faces: Sequence[str] = ()  # of relay: paths of OpenAI's API that are measured beside the native one
    telemetry: bool = False  # each Lastcall is measured with all telemetry, too
    compared: tuple[Contender, Contender] | None = None  # one service from two commits: no other server takes part

    @property
    def chosen(self) -> list[Contender]:
        """Return the contenders by name, or else the scenario's own list."""
        if self.compared:
            return list(self.compared)
        if self.only:
            return choose(self.only)
        if self.scenario == "shutdown":
            return choose({"quick": QUICK, "usual": MAIN, "full": ()}[self.size])
        if self.scenario == "idle":
            return choose(IDLE)
        return choose(SERVED if self.scenario in ("herd", "requests") else RELAYS)

    @property
    def contenders(self) -> list[Contender]:
        """Return the chosen contenders that can run on this machine, each followed by its variants."""
        return [one for contender in self._native for one in (contender, *self._variants_of(contender))]

    def _variants_of(self, contender: Contender) -> list[Contender]:
        """Return the same server by its faces, and with all telemetry, as far as that is asked for."""
        telling = contender.with_telemetry() if self.telemetry and not self.compared else []
        return [*contender.through(self.faces), *telling]

    @property
    def _native(self) -> list[Contender]:
        return [contender for contender in self.chosen if contender.missing is None]

    @property
    def times(self) -> int:
        """Return how often each measurement is repeated."""
        if self.repeats is not None:
            return self.repeats
        if self.compared:
            return REPEATS_COMPARED
        return {"quick": 1, "usual": 3, "full": 5}[self.size] if self.scenario in ("shutdown", "store") else 1

    @property
    def pairs(self) -> list[tuple[Contender, Contender]]:
        """Return the servers to compare, if there are several repeats.

        These are the first contender beside each other one, and each variant of a server beside the server itself.
        """
        if self.compared:
            return [self.compared]
        if self.times == 1:
            return []
        servers = [(other, self._native[0]) for other in self._native[1:]]
        return servers + [(native, it) for native in self._native for it in self._variants_of(native)]

    def in_turn(self, repeat: int) -> list[Contender]:
        """Return the contenders in the order of this repeat: each repeat begins with another one."""
        start = 0 if self.compared else repeat % max(len(self.contenders), 1)
        return [*self.contenders[start:], *self.contenders[:start]]

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
    if repeat == 0:
        for contender in programme.contenders:  # the first start fills byte code and page cache: it is not measured
            await run_case(contender, steady(0), place, repeat=-1, cap_s=programme.cap_s)
    for case in programme.cases():
        for contender in programme.in_turn(repeat):
            yield await run_case(contender, case, place, repeat=repeat, cap_s=programme.cap_s)


async def _measure_relay(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    counts = tuple(programme.streams) or ((50,) if programme.size == "quick" else relay.STREAMS)
    window_s = 1.0 if programme.size == "quick" else relay.WINDOW_S
    # ``half`` is half of the capacity that ``paced`` shows, which is measured for it if need be.
    modes = [mode for mode in relay.MODES if mode in programme.modes or (mode == "paced" and "half" in programme.modes)]
    for count in counts:
        capacities: dict[str, float | None] = {}
        for mode in modes:
            if mode in relay.DIRECT_MODES and not programme.compared:
                offered = relay.offered_per_s(mode, count)
                yield await relay.measure_direct(place, mode, count, offered=offered, repeat=repeat, window_s=window_s)
            for contender in programme.in_turn(repeat):
                offered = relay.offered_per_s(mode, count, capacity_per_s=capacities.get(contender.name))
                if mode == "half" and offered is None:
                    continue  # it received nothing
                row = await relay.measure_contender(
                    contender, place, mode, count, offered=offered, repeat=repeat, window_s=window_s
                )
                if mode == "paced":
                    capacities[contender.name] = row.capacity_per_s
                yield row


async def _measure_capacity(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    extent = capacity.QUICK if programme.size == "quick" else capacity.USUAL
    if programme.streams:
        extent = replace(extent, lowest=min(programme.streams), highest=max(programme.streams))
    if not programme.compared:
        yield await capacity.measure_direct(place, extent, repeat=repeat)
    for contender in programme.in_turn(repeat):
        yield await capacity.measure_contender(contender, place, extent, repeat=repeat)


async def _measure_herd(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    for chats in programme.streams or ((300,) if programme.size == "quick" else herd.CHATS):
        if not programme.compared:
            yield await herd.measure_direct(place, chats, repeat=repeat)
        for contender in programme.in_turn(repeat):
            yield await herd.measure_contender(contender, place, chats, repeat=repeat)


async def _measure_requests(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    window_s = 1.0 if programme.size == "quick" else requests.WINDOW_S
    for contender in programme.in_turn(repeat):
        for row in await requests.measure_contender(contender, place, repeat=repeat, window_s=window_s):
            yield row


async def _measure_first_token(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    beside = tuple(programme.streams) or ((0,) if programme.size == "quick" else first_token.BESIDE)
    if not programme.compared:
        yield await first_token.measure_direct(place, repeat=repeat)
    for count in beside:
        for contender in programme.in_turn(repeat):
            yield await first_token.measure_contender(contender, place, count, repeat=repeat)


async def _measure_idle(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    """Yield the memory of each server, and then what only Lastcall has."""
    sessions = {"quick": 1_000, "usual": 100_000, "full": 100_000}[programme.size]
    streams = programme.streams[0] if programme.streams else 500
    for contender in programme.in_turn(repeat):
        for row in await idle.measure_processes(contender, place, repeat=repeat):
            yield row
        if contender.workers == 1 and contender.relays:
            for row in await idle.measure_streams(contender, place, repeat=repeat, streams=streams):
                yield row
    (lastcall,) = choose(["lastcall"])
    if lastcall not in programme.contenders:
        return
    for row in await idle.measure_sessions(
        lastcall, place, repeat=repeat, sessions=min(sessions, 10_000), turns=streams
    ):
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
    for contender in programme.in_turn(repeat):
        for row in await end.measure_contender(contender, place, repeat=repeat, turns=turns):
            yield row


async def _measure_tree(programme: Programme, place: Place, repeat: int) -> AsyncGenerator[Any, None]:
    (contender,) = choose(["lastcall"])
    turns = programme.streams[0] if programme.streams else 100 if programme.size == "quick" else tree.TURNS
    window_s = 1.0 if programme.size == "quick" else tree.WINDOW_S
    for row in await tree.measure_contender(contender, place, repeat=repeat, turns=turns, window_s=window_s):
        yield row


_SCENARIOS = {
    "shutdown": _measure_shutdown,
    "relay": _measure_relay,
    "capacity": _measure_capacity,
    "herd": _measure_herd,
    "first-token": _measure_first_token,
    "requests": _measure_requests,
    "idle": _measure_idle,
    "expiry": _measure_expiry,
    "end": _measure_end,
    "store": _measure_store,
    "tree": _measure_tree,
}
NAMES = tuple(_SCENARIOS)
TABLES = {
    "relay": relay.TABLE,
    "capacity": capacity.TABLE,
    "herd": herd.TABLE,
    "first-token": first_token.TABLE,
    "requests": requests.TABLE,
    "idle": idle.TABLE,
    "expiry": expiry.TABLE,
    "end": end.TABLE,
    "store": store_rows.TABLE,
    "tree": tree.TABLE,
}
PAIRINGS: dict[str, Pairing] = {
    "shutdown": shutdown.PAIRING,
    "relay": relay.PAIRING,
    "capacity": capacity.PAIRING,
    "herd": herd.PAIRING,
    "first-token": first_token.PAIRING,
    "requests": requests.PAIRING,
    "end": end.PAIRING,
}
"""The scenarios whose servers can be compared in pairs."""
