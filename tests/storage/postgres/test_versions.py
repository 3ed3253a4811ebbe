"""Versions side by side: tables that an earlier version wrote are read, and its statements work on the newest tables.

``fixtures/version_N.sql`` is a dump of a store that the last code of schema N has filled, ``version_N.json`` what that
code read from it, and ``statements_N.jsonl`` what it executed and received: first the texts, each in a line, and then
``[connection, index of the text, parameters, rows]``. These files never change.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from service.errors import RepeatedError
from service.storage.postgres import open_postgres_store, schema
from service.storage.postgres.schema import quoted
from service.storage.records import EndResult, IdempotencyKey
from tests.postgres_server import PostgresServer
from tests.storage.rows import T0, a_turn, at, contents, ended, said

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = [1]
OPEN = {"open": "Hello world", "queued": ""}
"""The turns that were open in the dump, and what their checkpoints have kept."""


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def old_schema(postgres: PostgresServer, version: int) -> Iterator[str]:
    """A schema with the tables and rows of an earlier version."""
    dump = (FIXTURES / f"version_{version}.sql").read_text()
    with postgres.new_schema() as name:
        postgres.run(dump.replace("{s}", name))
        yield name


def test_there_are_fixtures_of_each_version_but_the_newest() -> None:
    assert [*range(1, len(schema.SCRIPTS))] == VERSIONS


async def test_a_store_of_an_earlier_version_is_read_as_that_version_read_it(
    postgres: PostgresServer, old_schema: str, version: int
) -> None:
    expected = json.loads((FIXTURES / f"version_{version}.json").read_bytes())
    async with open_postgres_store(postgres.url, schema_name=old_schema) as store:
        assert postgres.run(f"SELECT version FROM {old_schema}.store") == [(len(schema.SCRIPTS),)]
        _check_has(msgspec.to_builtins(await contents(store, now=T0)), expected, at="contents")
        found = await store.search_sessions("word", limit=100, after=None, status=None, now=T0)
        assert {match.session.id for match in found.data} == {"s", "copy", "ann/s", "x"}
        with pytest.raises(RepeatedError):
            await store.check_key(IdempotencyKey(caller="ann", key="a", fingerprint=b"\x00f"), now=T0)


async def test_a_store_of_an_earlier_version_goes_on(postgres: PostgresServer, old_schema: str) -> None:
    async with open_postgres_store(postgres.url, schema_name=old_schema) as store:
        assert await store.recover(now=at(9)) == len(OPEN)
        for turn_id, text in OPEN.items():
            turn = await store.get_turn("x", turn_id, now=at(9))
            assert (turn.state, turn.reason, turn.text) == ("interrupted", "crash", text)
        await store.begin_turn(a_turn("new", "x"), now=at(9))
        assert await store.end_turn(ended(a_turn("new", "x")), runs=said("Hi"), now=at(9)) is EndResult.KEPT
        await store.fork_session("ann/s", at="long", copy_id="fork", now=at(9))
        await store.delete_turns("s", "a", now=at(9))
        await store.delete_expired(now=at(10**6), limit=10**6)


def test_the_statements_of_an_earlier_version_work_on_the_newest_tables(postgres: PostgresServer, version: int) -> None:
    lines = [json.loads(line) for line in (FIXTURES / f"statements_{version}.jsonl").read_text().splitlines()]
    texts = [line for line in lines if isinstance(line, str)]
    with postgres.new_schema() as name, ExitStack() as connections:

        @cache
        def connection(_: int) -> psycopg.Connection[Any]:
            opened = connections.enter_context(psycopg.connect(postgres.url, autocommit=True))
            opened.execute("SET lock_timeout = '10s'")
            return opened

        schema.prepare(connection(0), name, place="here")
        for number, index, parameters, rows in lines[len(texts) :]:
            statement = texts[index].replace("{s}", quoted(name)).encode()
            cursor = connection(number).execute(statement, _decoded(parameters), binary=parameters is not None)
            if rows == "opening":
                cursor.set_result(-1)
                assert cursor.description is None or cursor.fetchone() is not None, "it is a living owner"
            elif isinstance(rows, list):
                told = sorted(map(repr, map(list, cursor.fetchall())))
                assert told == sorted(map(repr, map(list, _decoded(rows)))), texts[index]
            elif rows is not None:
                assert cursor.rowcount == rows, texts[index]


def _decoded(value: Any) -> Any:
    match value:
        case {"bytes": str(text), **others} if not others:
            return bytes.fromhex(text)
        case dict():
            return {name: _decoded(it) for name, it in value.items()}
        case list():
            return [_decoded(it) for it in value]
        case _:
            return value


def _check_has(found: Any, expected: Any, *, at: str) -> None:
    """Check that all that is expected was found. Fields that a later version has added may be there besides."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            _check_has(found.get(name), value, at=f"{at}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for number, (it, value) in enumerate(zip(found, expected, strict=True)):
            _check_has(it, value, at=f"{at}[{number}]")
    else:
        assert found == expected, at
