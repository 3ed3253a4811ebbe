"""A service that is killed at any moment loses nothing that it acknowledged."""

from pathlib import Path

import pytest
import trio

from tests.storage.sqlite.crash import Facts, compare, run_and_kill


@pytest.mark.processes
async def test_nothing_that_clients_have_seen_is_lost_in_a_crash(path: Path) -> None:
    facts = Facts()
    with trio.fail_after(120):
        for seed in range(3):
            await trio.to_thread.run_sync(run_and_kill, path, seed, facts)
            await compare(path, facts)
    assert sum(told.end is not None for told in facts.turns.values()) > 0
