"""The adoption of suspended turns in PostgreSQL: after a stop many sessions come at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from service.errors import StoreError
from service.storage.postgres import PostgresStore, reader, segments
from service.storage.postgres.connections import Db, Opening
from service.storage.records import AdoptedTurn
from tests.postgres_server import PostgresServer
from tests.storage.postgres.locks import until_something_waits
from tests.storage.postgres.test_locked_sessions import locked
from tests.storage.rows import at
from tests.storage.test_store_suspended import YES, a_lasting_turn, begin, so_far


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a thread has sent and waited for: single statements, and pipelines."""
    made: list[str] = []
    inner = 0
    execute, pipeline = Db.execute, Db.pipeline

    def count_statement(self: Db, statement: str, parameters: Any = None) -> Any:
        if not inner:
            made.append(statement)
        return execute(self, statement, parameters)

    @contextmanager
    def count_pipeline(self: Db) -> Iterator[None]:
        nonlocal inner
        made.append("pipeline")
        inner += 1
        try:
            with pipeline(self):
                yield
        finally:
            inner -= 1

    monkeypatch.setattr(Db, "execute", count_statement)
    monkeypatch.setattr(Db, "pipeline", count_pipeline)
    return made


@pytest.mark.parametrize("turns", [1, 5])
async def test_an_adoption_waits_for_the_database_twice_between_its_begin_and_its_commit(
    store: PostgresStore, trips: list[str], turns: int
) -> None:
    first, *others = (a_lasting_turn(f"t{number}") for number in range(turns))
    await begin(store, first, *others)
    suspended = [so_far(first, "Hel", "lo"), *(so_far(turn, "Hi") for turn in others)]
    assert list(await store.suspend_turns(suspended, now=at(1))) == []
    trips.clear()
    adopted = await store.adopt_turns("s", now=at(2), continues=YES)
    assert [it.turn.id for it in adopted] == [f"t{number}" for number in range(turns)]
    assert adopted[0].turn.text == "Hello"
    assert trips == ["pipeline", "pipeline"]


async def test_an_adoption_waits_for_another_step_on_its_session(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    await store.suspend_turns([so_far(turn, "Hello")], now=at(1))
    adopted: list[AdoptedTurn] = []

    async def adopt() -> None:
        adopted.extend(await store.adopt_turns("s", now=at(2), continues=YES))

    async with trio.open_nursery() as nursery:
        with locked(postgres, store):
            nursery.start_soon(adopt)
            await until_something_waits(postgres)
    assert [it.turn.text for it in adopted] == ["Hello"]


async def test_an_adoption_that_fails_at_its_last_statement_changes_nothing(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    await store.suspend_turns([so_far(turn, "Hello")], now=at(1))
    with monkeypatch.context() as broken:
        broken.setattr(segments, "_ADD", "SELECT 1 / 0 AS id, %(owner)s, %(ids)s, %(afters)s, %(ends)s, %(body)s")
        with pytest.raises(StoreError):
            await store.adopt_turns("s", now=at(2), continues=YES)
    (adopted,) = await store.adopt_turns("s", now=at(2), continues=YES)
    assert (adopted.turn.text, adopted.turn.attempt) == ("Hello", 2)


async def test_a_turn_without_its_texts_is_read_in_one_statement(
    store: PostgresStore, trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    await store.suspend_turns([so_far(turn, "Hello")], now=at(1))
    begun: list[str] = []

    def note(*statements: str) -> Opening:
        begun.extend(statements)
        return Opening(*statements)

    monkeypatch.setattr(reader, "Opening", note)
    trips.clear()
    assert (await store.get_turn("s", "t", now=at(2), with_texts=False)).is_open
    assert (len(trips), begun) == (1, [])
