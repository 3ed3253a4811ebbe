"""Search in PostgreSQL goes through blocks of documents, small and large ones, and finds the same in all of them."""

from collections.abc import Awaitable, Callable
from math import inf

import msgspec
import pytest

from service.steps import at_once
from service.storage import search as any_search
from service.storage.postgres import documents, search
from service.storage.postgres.store import PostgresStore
from service.storage.records import Match, Page
from service.storage.terms import query_terms
from tests.postgres_server import PostgresServer
from tests.storage.memory.test_memory_store import HELLO
from tests.storage.rows import T0
from tests.storage.test_store_search import add_session, add_turn, found, matches

SMALL, MIDDLE, LARGE = (1 << bits for bits in documents.LEVELS)


class Numbers:
    """Sets the number of the next document."""

    def __init__(self, server: PostgresServer, schema: str) -> None:
        self._server = server
        self._sequence = f"{schema}.documents_key_seq"
        [(self.first,)] = server.run(f"SELECT nextval('{self._sequence}')")
        assert isinstance(self.first, int)
        # The first number of a block of every size.
        self.first = (self.first // LARGE + 1) * LARGE

    def go_to(self, offset: int) -> None:
        self._server.run(f"SELECT setval('{self._sequence}', {self.first + offset}, false)")


@pytest.fixture
def numbers(postgres: PostgresServer, store: PostgresStore, schema: str) -> Numbers:
    return Numbers(postgres, schema)


@pytest.fixture(params=["fast", "slow", "as they are"])
def _queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that count as fast, so that large blocks follow, or as slow. A page waits for all of them."""
    monkeypatch.setattr(any_search, "SEARCH_S", inf)
    if request.param == "fast":
        monkeypatch.setattr(search, "_FAST_S", inf)
        monkeypatch.setattr(search, "_SLOW_S", inf)
    if request.param == "slow":
        monkeypatch.setattr(search, "_FAST_S", 0)
        monkeypatch.setattr(search, "_SLOW_S", 0)


EDGES = [0, 1, SMALL - 1, SMALL, SMALL + 1, MIDDLE - 1, MIDDLE, 3 * MIDDLE + 5, LARGE - 1, LARGE, LARGE + SMALL]


@pytest.mark.usefixtures("_queries")
async def test_documents_are_found_in_blocks_of_all_sizes_and_at_their_edges(
    store: PostgresStore, numbers: Numbers
) -> None:
    for offset in EDGES:
        numbers.go_to(offset)
        await add_session(store, f"s{offset}", "one word")
    expected = [f"s{offset}" for offset in reversed(EDGES)]
    for limit in (1, 3, 100):
        assert await found(store, "word one", limit=limit) == expected
    assert await found(store, "word two") == []


@pytest.mark.usefixtures("_queries")
async def test_a_session_comes_once_however_far_its_documents_are_from_each_other(
    store: PostgresStore, numbers: Numbers
) -> None:
    for name in ("a", "b"):
        await add_session(store, name)
    turns: list[str] = []
    for offset in EDGES:
        numbers.go_to(offset)
        turns.append(await add_turn(store, "ab"[offset % 2], f"word {offset}"))
    for limit in (1, 2):
        assert [it.session.id for it in await matches(store, "word", limit=limit)] == ["a", "b"]
    assert (await matches(store, "word"))[0].turn_id == turns[-1]


@pytest.mark.parametrize("at_once", [1, 2, 5])
async def test_a_block_with_many_documents_is_read_in_parts(
    store: PostgresStore, numbers: Numbers, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(search, "_FOUND_MIN", at_once)
    monkeypatch.setattr(search, "_FOUND_MAX", 2 * at_once)
    numbers.go_to(SMALL - 7)
    for n in range(14):
        await add_session(store, f"s{n}", "word")
        await add_turn(store, f"s{n}", "word of a turn")
    expected = [f"s{n}" for n in reversed(range(14))]
    for limit in (1, 4, 100):
        assert await found(store, "word", limit=limit) == expected
        assert await found(store, "turn word", limit=limit) == expected


Between = Callable[[int], Awaitable[None]]


async def page_in_steps(store: PostgresStore, query: str, between: Between) -> Page[Match]:
    """The page of a search in the shortest steps. After each step ``between`` is called with the number of steps."""
    searched = search.Search(msgspec.structs.replace(HELLO, terms=at_once(query_terms(query))))
    for steps in range(1, 100):
        await store._read(searched.read_some)
        if searched.page is not None:
            return searched.page
        await between(steps)
    raise AssertionError("the search has no end")


@pytest.fixture
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "STEP_S", 0)


@pytest.mark.usefixtures("_short_steps")
@pytest.mark.parametrize("moment", range(1, 8))
async def test_a_turn_that_is_deleted_between_two_steps_is_shown_whole_or_not(
    store: PostgresStore, moment: int
) -> None:
    for name in "abcd":
        await add_session(store, name)
        await add_turn(store, name, f"word of {name}", turn_id=f"t{name}")

    async def delete(steps: int) -> None:
        if steps == moment:
            await store.delete_turns("b", "tb", now=T0)
            await add_session(store, "new", "word")

    page = await page_in_steps(store, "word", delete)
    shown = [(match.turn_id, match.snippet) for match in page.data]
    assert [it for it in shown if it[0] != "tb"] == [(f"t{name}", f"word of {name}") for name in "dca"]
    assert [it for it in shown if it[0] == "tb"] in ([], [("tb", "word of b")])


@pytest.mark.usefixtures("_short_steps")
async def test_words_beyond_those_that_the_index_is_asked_for_are_looked_for_in_each_step(store: PostgresStore) -> None:
    words = sorted(f"word{n:02}" for n in range(search.TERMS_MAX + 3))
    for name in "abc":
        await add_session(store, name)
        await add_turn(store, name, " ".join(words[:-1]))
        await add_turn(store, name, " ".join(words))
    last = await add_turn(store, "c", " ".join(words[:-1]))

    async def nothing(steps: int) -> None: ...

    page = await page_in_steps(store, " ".join(words), nothing)
    assert [match.session.id for match in page.data] == ["c", "b", "a"]
    assert last not in [match.turn_id for match in page.data]
    assert await found(store, " ".join(words), limit=1) == ["c", "b", "a"]
