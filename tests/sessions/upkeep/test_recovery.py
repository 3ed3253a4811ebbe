"""The recovery loop in the service: when it runs."""

import pytest
import trio
import trio.testing

from service.sessions.sessions import Sessions
from service.sessions.upkeep import recovery
from service.settings import Settings
from service.supervisor import open_service


async def test_the_recovery_begins_at_once_when_this_process_has_taken_another_one_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "INTERVAL_S", 3600)
    begun = trio.Event()

    async def note(_: Sessions) -> None:
        await trio.lowlevel.checkpoint()
        begun.set()

    monkeypatch.setattr(Sessions, "adopt_waiting", note)
    with trio.fail_after(20):
        async with open_service(Settings(store_url="memory:")) as service:
            await trio.testing.wait_all_tasks_blocked()
            assert not begun.is_set()
            service.store.standing.taken_over.ring()
            await begun.wait()
