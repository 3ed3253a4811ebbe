"""The search index of SQLite: its parts are merged between commits, and queries go through it block by block."""

from pathlib import Path

import pytest
import trio

from service.storage.records import SessionPatch
from service.storage.sqlite import SqliteStore, documents, maintenance, open_sqlite_store, search
from tests.storage.rows import T0, a_session
from tests.storage.test_store_search import add_session, found


async def parts_of(store: SqliteStore) -> int:
    query = "SELECT count(DISTINCT segid) FROM search_idx"
    return await store._writing.call(lambda db: db.execute(query).get)


async def test_the_parts_that_commits_add_are_merged_between_them(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session("a"), now=T0)
        for n in range(5 * documents.SEGMENTS_MAX):
            await store.update_session("a", SessionPatch(title=f"title {n}"), now=T0)
        with trio.fail_after(60):
            while store.writer._unmerged >= documents.SEGMENTS_MAX:  # noqa: ASYNC110  no event tells the end
                await trio.sleep(0.001)
        assert await parts_of(store) < 2 * documents.SEGMENTS_MAX
        assert await found(store, "title") == ["a"]
        assert await found(store, f"title {5 * documents.SEGMENTS_MAX - 1}") == ["a"]
        assert await found(store, "title 1") == []


async def test_vacuum_merges_the_parts(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        for n in range(documents.SEGMENTS_MAX - 2):
            await add_session(store, f"s{n}", "title")
        before = await parts_of(store)
        maintenance.vacuum(path)
        assert await parts_of(store) < before
        assert len(await found(store, "title")) == documents.SEGMENTS_MAX - 2


async def test_a_query_for_several_words_finds_the_same_in_many_blocks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BITS", 1)
    monkeypatch.setattr(search, "BLOCK_BITS", 1)
    async with open_sqlite_store(path) as store:
        names = [f"s{n}" for n in range(15)]
        for n, name in enumerate(names):
            await add_session(store, name, "one two" if n % 3 else "one")
        for limit in (1, 2, 20):
            assert await found(store, "two one", limit=limit) == [it for n, it in enumerate(names) if n % 3][::-1]
            assert await found(store, "one", limit=limit) == names[::-1]
