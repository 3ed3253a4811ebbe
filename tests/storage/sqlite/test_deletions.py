"""Deletions of turns and items in the file: what is left of them, and for how long a step holds the writer."""

from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from service.errors import ItemNotFoundError, StoreError
from service.storage.pieces import STARTED, Run
from service.storage.sqlite import deletions, forks, maintenance, open_sqlite_store, turns
from service.storage.sqlite.reclaim import reclaim_some
from tests.storage.rows import T0, a_session, a_turn, ended, said
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_deletions import a_tree, found_by

LONG = "secret " * 50_000


def texts_in(path: Path) -> str:
    """All that the rows of a file have of texts."""
    db = apsw.Connection(str(path))
    columns = {"turns": "input || output", "event_pages": "CAST(text AS TEXT)", "outputs": "items"}
    rows = (row for table, column in columns.items() for row in db.execute(f"SELECT {column} FROM {table}"))
    found = "".join(str(text) for (text,) in rows)
    db.close()
    return found


async def test_deleted_texts_leave_the_rows_and_the_pages_of_long_turns_are_reclaimed(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        for name in ("long", "longer"):
            turn = a_turn(name, parent="b")
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn, text=LONG), runs=(Run(STARTED), *said(LONG)), now=T0)
        assert "secret" in texts_in(path)
        await store.delete_item("s", "long-out", now=T0)
        await store.delete_turns("s", "longer", now=T0)
        await store.delete_turns("s", "b2", now=T0)
        while await store._writing.call(reclaim_some):
            pass
        assert "secret" not in texts_in(path)
        assert "answer d" not in texts_in(path)
        assert "answer c" in texts_in(path)
        assert maintenance.check(path) == []
    with apsw.Connection(str(path)) as db:
        assert db.execute("SELECT count(*) FROM sessions").get == 1
        assert db.execute("SELECT count(*) FROM turns").get == 5
        assert db.execute("SELECT count(*) FROM documents WHERE turn NOT IN (SELECT key FROM turns)").get == 0


async def test_a_store_that_is_killed_after_a_deletion_has_all_of_it(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        await store.delete_turns("s", "b", now=T0)
        with apsw.Connection(str(path)) as db:
            assert db.execute("SELECT count(*) FROM turns JOIN sessions ON sessions.key = session").get == 6
            assert db.execute("SELECT group_concat(input) FROM turns WHERE session <> 1").get == "[],[]"
    async with open_sqlite_store(path) as store:
        assert await store.recover(now=T0) == 0
        while await store._writing.call(reclaim_some):
            pass
    assert maintenance.check(path) == []
    with apsw.Connection(str(path)) as db:
        assert db.execute("SELECT count(*) FROM turns").get == 4


async def test_an_item_is_found_by_steps_however_old_its_turn_is(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        for first in range(0, 2000, 500):
            turns = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(first, first + 500)]
            await store.add_turns(turns, now=T0)
        search = deletions.ItemSearch("s", "t0-out", T0)
        while not search.is_complete:
            await store._reading.call(search.read_some)
        assert search.turn is not None
        assert search.turn.id == "t0"
        await store.delete_item("s", "t0-out", now=T0)
        assert (await store.get_turn("s", "t0", now=T0)).output == ()


async def test_an_item_that_is_deleted_twice_at_the_same_time_counts_once(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        missing: list[str] = []

        async def delete(item_id: str) -> None:
            try:
                await store.delete_item("s", item_id, now=T0)
            except ItemNotFoundError as error:
                missing.append(error.item_id)

        async with trio.open_nursery() as nursery:
            for item_id in ("c-out", "c-out", "c-in-0", "d-out"):
                nursery.start_soon(delete, item_id)
        assert missing == ["c-out"]
        assert (await store.get_session("s", now=T0)).message_count == 9


async def test_a_reply_that_ends_while_an_item_of_its_input_is_deleted_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(path) as owner, open_sqlite_store(path) as other:
        await owner.create_session(a_session(), now=T0)
        turn = a_turn("t", texts=["question"])
        await owner.begin_turn(turn, now=T0)
        write = other._writing.call
        ends = 0

        async def write_late(*args: Any, **more: Any) -> Any:
            nonlocal ends
            ends += 1
            if ends == 1:  # the search has found the turn open
                await owner.end_turn(ended(turn, text="answer"), runs=(Run(STARTED), *said("answer")), now=T0)
            return await write(*args, **more)

        monkeypatch.setattr(other._writing, "call", write_late)
        await other.delete_item("s", "t-in-0", now=T0)
        assert ends == 2, "the search began anew"
        kept = await other.get_turn("s", "t", now=T0)
        assert (kept.input, kept.text) == ((), "answer")
        assert await found_by(other, "answer") == ["t"]
        assert await found_by(other, "question") == []


@pytest.mark.parametrize("path_of", [turns.PathRead, turns.PathPage])
async def test_a_long_read_of_a_path_begins_anew_after_a_deletion(
    path: Path, monkeypatch: pytest.MonkeyPatch, path_of: type[turns.PathRead | turns.PathPage]
) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)  # one turn in each step

    def begin() -> turns.PathRead | turns.PathPage:
        if path_of is turns.PathRead:
            return turns.PathRead("s", "c", None)
        return turns.PathPage("s", "c", limit=9, first=None, bytes_max=None)

    async with open_sqlite_store(path) as store:
        await a_tree(store)
        edited, lost = begin(), begin()
        for walk in (edited, lost):
            await store._reading.call(walk.read_some)
            assert not walk.is_complete
        await store.delete_item("s", "c-out", now=T0)
        while not edited.is_complete:
            await store._reading.call(edited.read_some)
        assert [(turn.id, turn.text) for turn in edited.turns] == [("a", "answer a"), ("b", "answer b"), ("c", "")]
        await store.delete_turns("s", "b", now=T0)
        while not lost.is_complete:
            await store._reading.call(lost.read_some)
        assert list(lost.turns) == [], "and not a path without its end"


async def test_a_fork_of_what_was_deleted_meanwhile_is_refused_in_each_of_its_steps(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "STEP_S", 0)
    async with open_sqlite_store(path) as store:
        await a_tree(store)
        plans = [forks.Plan("s", "c", copy_id="copy", fence=store.fence, now=T0) for _ in range(2)]
        await store._reading.call(plans[0].read_some)
        while not plans[1].is_complete:
            await store._reading.call(plans[1].read_some)
        await store.delete_item("s", "a-out", now=T0)
        with pytest.raises(StoreError, match="deleted while it was copied"):
            await store._reading.call(plans[0].read_some)
        build = partial(forks.build, fork=plans[1].fork, progress=None, fence=store.fence, now=T0)
        with pytest.raises(StoreError, match="deleted while it was copied"):
            await store._writing.call(build)
        copy = await store.fork_session("s", at="c", copy_id="copy", now=T0)
        assert copy.message_count == 5
