"""What the expiry loop counts of a sweep that ends early."""

from functools import partial

import trio
from trio.testing import MockClock

from service.errors import StoreError
from service.sessions.upkeep.expiry import run_expiry
from service.sessions.upkeep.run_every import RUN_MAX_S
from service.steps import at_once
from service.storage.memory import MemoryStore
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics
from tests.sessions.puppet import TestClock

RESULTS = ("ok", "failed")


class Scripted(MemoryStore):
    """Removes ``batches`` of a hundred sessions, then does as ``then`` says, and of keys as ``then_of_keys`` says."""

    batches = 2
    then = ""
    then_of_keys = ""

    async def delete_expired(self, **_: object) -> int:
        if self.batches:
            self.batches -= 1
            return 100
        await _do(self.then)
        return 0

    async def forget_keys(self, **_: object) -> bool:
        await _do(self.then_of_keys)
        return False


async def _do(what: str) -> None:
    if what == "fail":
        raise StoreError("locked")
    if what == "hang":
        await trio.sleep_forever()


async def counts_after(store: MemoryStore, *, for_s: float, store_timeout_s: float = 5) -> tuple[list[float], float]:
    """The results of the sweeps that began within so many seconds, and the sessions that they have removed."""
    metrics = Metrics()
    run = partial(
        run_expiry, store, clock=TestClock(), interval_s=300, store_timeout_s=store_timeout_s, metrics=metrics
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: run(store_timeout_s=store_timeout_s, task_status=task_status))
        await trio.sleep(for_s)
        nursery.cancel_scope.cancel()
    read = at_once(metrics.memory.read([families.SWEEPS, families.EXPIRED]))
    return [read[families.SWEEPS][it,][0] for it in RESULTS], read[families.EXPIRED][()][0]


async def test_a_sweep_that_fails_has_removed_whole_batches(autojump_clock: MockClock) -> None:
    store = Scripted()
    store.then = "fail"
    assert await counts_after(store, for_s=301) == ([0, 1], 200)


async def test_a_sweep_that_a_stop_cancels_has_not_failed(autojump_clock: MockClock) -> None:
    store = Scripted()
    store.then = "hang"
    assert await counts_after(store, for_s=301) == ([0, 0], 200)


async def test_a_sweep_that_takes_too_long_has_failed(autojump_clock: MockClock) -> None:
    store = Scripted()
    store.then = "hang"
    assert await counts_after(store, for_s=301 + RUN_MAX_S, store_timeout_s=2 * RUN_MAX_S) == ([0, 1], 200)


async def test_keys_that_cannot_be_forgotten_are_no_success(autojump_clock: MockClock) -> None:
    store = Scripted()
    store.then_of_keys = "fail"
    assert await counts_after(store, for_s=301) == ([0, 1], 200)
    assert await counts_after(Scripted(), for_s=301) == ([1, 0], 200)
