"""A window of time in a load: the tokens that clients received in it, their delays, and the processor time it took."""

import time
from dataclasses import dataclass

import trio

from bench.peers import LoadClient
from bench.plan import LoadResult
from bench.rows import spread
from bench.server_process import ServerProcess


@dataclass(frozen=True)
class Window:
    """What happened between two moments, ``time.monotonic()``."""

    since: float
    until: float
    used_s: float | None  # processor time of the server; None: there is none
    result: LoadResult

    @property
    def received_per_s(self) -> float:
        """The tokens received a second; 0 if the load client was too busy to count twice."""
        first, last = self._samples()
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    @property
    def cpu_share(self) -> float | None:
        """The use of one core by all processes of the server."""
        return None if self.used_s is None else self.used_s / (self.until - self.since)

    @property
    def cpu_us(self) -> float | None:
        """Their processor time for each received token."""
        received = self.received_per_s
        return None if self.cpu_share is None or not received else self.cpu_share * 1e6 / received

    def delays_ms(self, group: str) -> tuple[float, float, float] | None:
        """Return p50, p99 and maximum of the delays of these tokens; None without tokens.

        The group is the only one of its load: delays are kept in the order of receipt, so the count of the received
        tokens says which delays they are.
        """
        first, last = self._samples()
        return spread([delay / 1e6 for delay in self.result.delays_ns.get(group, ())[first[1] : last[1]]])

    def _samples(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """The load client's counts nearest to the two moments."""
        samples = self.result.tokens_by_second
        first, last = (min(samples, key=lambda sample: abs(sample[0] - at)) for at in (self.since, self.until))
        return first, last


async def watch(load: LoadClient, window_s: float, server: ServerProcess | None = None) -> Window:
    """Let a load on a server, or on none, go on for so long, and stop it."""
    before_s, since = server.cpu_seconds() if server else 0.0, time.monotonic()
    await trio.sleep(window_s)
    used_s, until = server.cpu_seconds() - before_s if server else None, time.monotonic()
    return Window(since, until, used_s, await load.stop())
