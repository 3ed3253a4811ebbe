"""The adoption of suspended turns in PostgreSQL: after a stop many sessions come at once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import psycopg
import pytest
import trio

from service.errors import StoreError
from service.storage.postgres import PostgresStore, reader, segments
from service.storage.postgres.connections import Db, Opening
from service.storage.postgres.open_turns import OpenTurns
from service.storage.records import AdoptedTurn, OpenTurn
from service.storage.rules import NOBODY
from tests.postgres_server import PostgresServer
from tests.storage.postgres.locks import until_something_waits
from tests.storage.postgres.test_locked_sessions import locked
from tests.storage.rows import T0, a_turn, adopt, at, ended, said
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
    adopted = await adopt(store, "s", now=at(2))
    assert [it.turn.id for it in adopted] == [f"t{number}" for number in range(turns)]
    assert adopted[0].turn.text == "Hello"
    assert trips == ["pipeline", "pipeline"]


async def test_an_adoption_of_many_sessions_waits_for_the_database_no_more_often(
    store: PostgresStore, trips: list[str]
) -> None:
    turns = [a_lasting_turn(f"t{number}", f"s{number}") for number in range(40)]
    await begin(store, *turns)
    assert list(await store.suspend_turns([so_far(turn, "Hel", "lo") for turn in turns], now=at(1))) == []
    trips.clear()
    commits = store.writer.commits
    adoptions = await store.adopt_turns(
        [turn.session_id for turn in turns], now=at(2), continues=YES, path_bytes_max=lambda _: None
    )
    assert (trips, store.writer.commits - commits) == (["pipeline", "pipeline"], 1)
    for turn in turns:
        (adopted,) = adoptions[turn.session_id].turns
        assert adopted.turn.text == "Hello"
        assert adopted.path is not None
        assert [it.id for it in adopted.path] == [turn.id]


async def test_the_path_that_comes_with_an_adopted_turn_is_the_one_that_is_read(store: PostgresStore) -> None:
    first = a_turn("first")
    await begin(store, first)
    await store.end_turn(ended(first, text="Hi there"), runs=said("Hi ", "there"), now=T0)
    turn = msgspec.structs.replace(a_lasting_turn(), parent="first")
    await store.begin_turn(turn, now=T0)
    await store.suspend_turns([so_far(turn, "Hel", "lo")], now=at(1))
    (adopted,) = await adopt(store, path_bytes_max=lambda _: 10_000)
    read = await store.read_path("s", "t", bytes_max=10_000)
    assert adopted.path is not None
    seen = [[(it.id, it.state, it.input, it.output) for it in path] for path in (adopted.path, read)]
    assert seen[0] == seen[1]
    assert [it.text for it in adopted.path] == ["Hi there", ""]


async def test_an_adoption_of_several_sessions_leaves_out_those_that_others_have(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    turns = [a_lasting_turn("t", "s"), a_lasting_turn("t1", "s1")]
    await begin(store, *turns)
    await store.suspend_turns([so_far(turn, "Hello") for turn in turns], now=at(1))
    with locked(postgres, store):
        adoptions = await store.adopt_turns(["s", "s1"], now=at(2), continues=YES)
        assert {it: [turn.turn.id for turn in adoptions[it].turns] for it in adoptions} == {"s1": ["t1"]}
    assert [it.turn.text for it in await adopt(store, now=at(2))] == ["Hello"]


async def test_a_look_for_a_turn_is_answered_after_another_one_has_failed_that_had_taken_it_along(
    store: PostgresStore,
) -> None:
    looks = OpenTurns()

    class Failing:
        def execute(self, *_: object) -> None:
            raise psycopg.OperationalError("lost")

    lost: Any = Failing()
    with looks.asking("s", "never", me=1) as first, looks.asking("s", "never", me=1) as second:
        with pytest.raises(psycopg.OperationalError):
            first(lost)
        assert await store._look(second) is None


def test_a_look_whose_caller_leaves_while_another_statement_looks_for_its_turn_leaves_nothing_behind() -> None:
    looks = OpenTurns()
    with looks.asking("s", "t", me=1) as look, ExitStack() as others:
        for number in range(10):
            others.enter_context(looks.asking("s", f"t{number}", me=1))

        class Slow:
            def execute(self, *_: object) -> "Slow":
                others.close()
                return self

            def fetchall(self) -> list[tuple[Any, ...]]:
                return [("s", "t", NOBODY, NOBODY, None, None)]

        slow: Any = Slow()
        found = look(slow)
    assert found == OpenTurn(is_suspended=True)
    assert not any(vars(looks).values())


async def test_an_adoption_waits_for_another_step_on_its_session(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    await store.suspend_turns([so_far(turn, "Hello")], now=at(1))
    adopted: list[AdoptedTurn] = []

    async def adopt_one() -> None:
        adopted.extend(await adopt(store, "s", now=at(2)))

    async with trio.open_nursery() as nursery:
        with locked(postgres, store):
            nursery.start_soon(adopt_one)
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
            await adopt(store, "s", now=at(2))
    (adopted,) = await adopt(store, "s", now=at(2))
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
