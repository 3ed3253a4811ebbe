"""What goes wrong in a cluster: each fault begins, lasts, and is mended again, and is noted in the history."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

import trio

from tests.cluster.cluster import Cluster, Replica
from tests.cluster.history import Fault
from tests.cluster.network import Link, LinkState

DATABASE, UPSTREAM = "database", "upstream"
MEND_S = 90
"""Bound on the mending of a fault: a process or the database starts anew."""
SLOW = 10
"""How many times slower a slow model server is."""


KINDS: Mapping[str, float] = {
    "kill": 0,
    "stop": 0,
    "freeze": 12,
    "link refused": 10,
    "link silent": 12,
    "link slow": 6,
    "peers refused": 8,
    "peers silent": 8,
    "database killed": 8,
    "database frozen": 8,
    "connections cut": 0,
    "upstream slow": 5,
    "upstream killed": 0,
}
"""The faults, and how long each lasts at most."""
OF_REPLICAS = ("kill", "stop", "freeze", "link refused", "link silent", "link slow", "peers refused", "peers silent")

_STATES: Mapping[str, LinkState] = {
    "link refused": "refused",
    "link silent": "silent",
    "link slow": "slow",
    "peers refused": "refused",
    "peers silent": "silent",
}


class Faults:
    """Lets faults of the :data:`KINDS` begin, and mends them. Its choices depend on ``luck`` alone."""

    def __init__(self, cluster: Cluster, luck: Random | None = None) -> None:
        self._cluster = cluster
        self._luck = luck or Random(0)
        self._busy: set[str] = set()

    async def run(self, *, most: int = 2, pause_s: float = 3, is_over: Callable[[], bool]) -> None:
        """Let faults begin by chance, so many at once at most."""
        slots = trio.Semaphore(most)
        async with trio.open_nursery() as nursery:
            while not is_over():
                await trio.sleep(self._luck.uniform(0.2, 2 * pause_s))
                await slots.acquire()
                nursery.start_soon(self._have_one, self._luck.choice(list(KINDS)), slots)

    async def _have_one(self, kind: str, slots: trio.Semaphore) -> None:
        try:
            target = self._target(kind)
            if target is None:
                return
            self._busy.add(target)
            try:
                await self.have(kind, target, self._luck.uniform(0.1, 1) * KINDS[kind])
            finally:
                self._busy.discard(target)
        finally:
            slots.release()

    def _target(self, kind: str) -> str | None:
        """What the fault is to hit; None if all of that is hit by another one."""
        if kind in OF_REPLICAS:
            free = sorted({it.name for it in self._cluster.replicas} - self._busy)
            return self._luck.choice(free) if free else None
        target = UPSTREAM if kind.startswith("upstream") else DATABASE
        return None if target in self._busy else target

    async def have(self, kind: str, target: str, lasts_s: float) -> None:
        """Have one fault from its beginning to its mending."""
        began_at = time.monotonic()
        try:
            async with self._begin(kind, target):
                await trio.sleep(lasts_s)
        finally:
            # Noted at its end, when that is known. No process ends between both that the checker would judge wrongly:
            # it sorts by time.
            self._cluster.history.add(Fault(at=began_at, kind=kind, target=target, until=time.monotonic()))

    def _begin(self, kind: str, target: str) -> AbstractAsyncContextManager[None]:
        cluster = self._cluster
        replica = next((it for it in cluster.replicas if it.name == target), cluster.replicas[0])
        if kind in _STATES:
            return _link(replica.peers_link if kind.startswith("peers") else replica.link, _STATES[kind])
        return {
            "kill": lambda: _killed(replica),
            "stop": lambda: _stopped(replica),
            "freeze": lambda: _frozen(replica),
            "database killed": lambda: _database_killed(cluster),
            "database frozen": lambda: _database_frozen(cluster),
            "connections cut": lambda: _connections_cut(cluster),
            "upstream slow": lambda: _upstream_slow(cluster),
            "upstream killed": lambda: _upstream_killed(cluster),
        }[kind]()


@asynccontextmanager
async def _killed(replica: Replica) -> AsyncIterator[None]:
    replica.kill()
    yield
    await _serving_again(replica)


@asynccontextmanager
async def _stopped(replica: Replica) -> AsyncIterator[None]:
    replica.stop()
    yield
    await _serving_again(replica)


async def _serving_again(replica: Replica) -> None:
    ended = replica.process
    with trio.move_on_after(MEND_S):
        await replica.wait_gone()
        while replica.process is ended:  # noqa: ASYNC110  each process has an event of its own
            await trio.sleep(0.02)
        await replica.wait_serving()


@asynccontextmanager
async def _frozen(replica: Replica) -> AsyncIterator[None]:
    replica.freeze()
    try:
        yield
    finally:
        replica.thaw()


@asynccontextmanager
async def _link(link: Link, state: LinkState) -> AsyncIterator[None]:
    await link.set(state)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            await link.set("up")


@asynccontextmanager
async def _database_killed(cluster: Cluster) -> AsyncIterator[None]:
    await cluster.database.stop("immediate")
    try:
        yield
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + MEND_S):
            await cluster.database.start()


@asynccontextmanager
async def _database_frozen(cluster: Cluster) -> AsyncIterator[None]:
    cluster.database.freeze()
    try:
        yield
    finally:
        cluster.database.thaw()


@asynccontextmanager
async def _connections_cut(cluster: Cluster) -> AsyncIterator[None]:
    await trio.to_thread.run_sync(cluster.database.cut_connections)
    yield


@asynccontextmanager
async def _upstream_slow(cluster: Cluster) -> AsyncIterator[None]:
    await cluster.upstream.set_pace(SLOW)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await cluster.upstream.set_pace(1)


@asynccontextmanager
async def _upstream_killed(cluster: Cluster) -> AsyncIterator[None]:
    cluster.upstream.kill()
    yield
