"""A service that is killed at any moment loses nothing that it acknowledged."""

from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import trio

from service.clock import wall_clock
from service.storage.sqlite import SqliteStore, database, maintenance, open_sqlite_store
from tests.storage.sqlite import test_indexing
from tests.storage.sqlite.crash import Facts, compare, forks_in, run_and_kill
from tests.storage.test_store_search import found


@pytest.mark.processes
async def test_nothing_that_clients_have_seen_is_lost_in_a_crash(path: Path) -> None:
    facts = Facts()
    with trio.fail_after(300):
        for seed in count():
            await trio.to_thread.run_sync(run_and_kill, path, seed, facts)
            await compare(path, facts)
            if seed >= 2 and any(told.end is not None for told in facts.turns.values()):
                break  # on a busy machine a killed process may have ended no turn


@pytest.mark.processes
async def test_a_file_of_schema_3_gets_whole_indexes_although_the_process_is_killed_meanwhile(path: Path) -> None:
    sessions, turns = 40, 100
    test_indexing.write(path, sessions=sessions, turns=turns, long=False)
    facts = Facts()
    with trio.fail_after(300):
        left = []
        for seed in range(2):
            await trio.to_thread.run_sync(run_and_kill, path, seed, facts)
            with closing(database.connect(path)) as db:
                left.append(db.execute("SELECT kind, key FROM unindexed").fetchall())
        assert left[0], "the first process was killed before the indexes were whole"
        async with open_sqlite_store(path) as store:
            await test_indexing.index_whole(store)
            assert maintenance.check(path) == []
            for session in (1, sessions // 2, sessions):
                for n in (0, turns // 2, turns - 1):
                    asked = f"question {session}q{n}"
                    assert sorted(await found(store, asked)) == sorted(
                        [f"s{session}", *await _forks_with(store, path, asked)]
                    )


async def _forks_with(store: SqliteStore, path: Path, asked: str) -> list[str]:
    """The forks that the killed processes made of turns with this question."""
    return [
        fork
        for fork in forks_in(path)
        for turn in (await store.list_turns(fork, limit=100, after=None, now=wall_clock())).data
        if turn.input[0].text == asked
    ]
