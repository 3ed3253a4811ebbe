"""Versions side by side: tables that an earlier version wrote are read, and its statements work on the newest tables.

``fixtures/version_N.sql`` is a dump of a store that the last code of schema N has filled, ``version_N.json`` what that
code read from it, and ``statements_N.jsonl`` what it executed and received: first the texts, each in a line, and then
``[connection, index of the text, parameters, rows]``. The files of a version that was released never change. ``just
freeze`` writes those of this version (:mod:`tests.storage.postgres.freeze`); what it would write now is tested, too.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest
import trio

from service.errors import RepeatedError
from service.storage.postgres import open_postgres_store, schema
from service.storage.postgres.schema import quoted
from service.storage.records import EndResult
from tests.postgres_server import PostgresServer, running
from tests.storage.postgres.freeze import FIXTURES, FOUND, KEY, OPEN, SEARCHED, record
from tests.storage.rows import T0, a_turn, at, contents, ended, said

NOW = "now"
VERSIONS = sorted(int(path.stem.rpartition("_")[2]) for path in FIXTURES.glob("version_*.sql"))


class Frozen(NamedTuple):
    """What was written down of a version."""

    dump: str
    read: Any
    lines: list[Any]


def _frozen(dump: str, read: bytes, statements: str) -> Frozen:
    return Frozen(dump, json.loads(read), [json.loads(line) for line in statements.splitlines()])


@pytest.fixture(scope="module")
def written_now(request: pytest.FixtureRequest) -> Frozen:
    """What would be written down of this version."""
    if request.config.getoption("postgres_programs") or request.config.getoption("postgres_pooler"):
        pytest.skip("the dump is made by the program pg_dump of this machine, from its own server")
    server = running(request.config)
    with server.new_schema() as name:
        return _frozen(*trio.run(record, server, name))


@pytest.fixture(params=[*VERSIONS, pytest.param(NOW, marks=pytest.mark.processes)])
def frozen(request: pytest.FixtureRequest, postgres: PostgresServer) -> Frozen:
    if request.param == NOW:
        written: Frozen = request.getfixturevalue("written_now")
        return written
    number = request.param
    return _frozen(
        (FIXTURES / f"version_{number}.sql").read_text(),
        (FIXTURES / f"version_{number}.json").read_bytes(),
        (FIXTURES / f"statements_{number}.jsonl").read_text(),
    )


@pytest.fixture
def old_schema(postgres: PostgresServer, frozen: Frozen) -> Iterator[str]:
    """A schema with the tables and rows of an earlier version."""
    with postgres.new_schema() as name:
        postgres.run(frozen.dump.replace("{s}", name))
        yield name


def test_there_are_fixtures_of_each_version_but_the_newest() -> None:
    """A new script needs them of the version before: ``just freeze`` in a checkout of that version."""
    assert VERSIONS in ([*range(1, len(schema.SCRIPTS))], [*range(1, len(schema.SCRIPTS) + 1)])


@pytest.mark.parametrize("number", VERSIONS)
def test_the_scripts_of_a_version_still_make_its_tables(number: int, postgres: PostgresServer) -> None:
    """A script that was released never changes: the tables that it made are there."""
    with postgres.new_schema() as made, postgres.new_schema() as kept:
        postgres.run(f"CREATE SCHEMA {made}", *(it.replace("{s}", made) for it in schema.SCRIPTS[:number]))
        postgres.run((FIXTURES / f"version_{number}.sql").read_text().replace("{s}", kept))
        assert _tables(postgres, made) == _tables(postgres, kept)


def _tables(postgres: PostgresServer, name: str) -> set[str]:
    """What the catalogs say of the tables of a schema, without its name."""
    columns = postgres.run(
        "SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attstorage, "
        "coalesce(pg_get_expr(adbin, adrelid), ''), coalesce(reloptions::text, '') FROM pg_attribute "
        "JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum "
        f"WHERE relnamespace = '{name}'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped"
    )
    indexes = postgres.run(f"SELECT indexdef FROM pg_indexes WHERE schemaname = '{name}'")
    constraints = postgres.run(
        "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint "
        f"WHERE connamespace = '{name}'::regnamespace"
    )
    return {str(row).replace(f"{name}.", "") for row in (*columns, *indexes, *constraints)}


async def test_a_store_of_an_earlier_version_is_read_as_that_version_read_it(
    postgres: PostgresServer, old_schema: str, frozen: Frozen
) -> None:
    async with open_postgres_store(postgres.url, schema_name=old_schema) as store:
        assert postgres.run(f"SELECT version FROM {old_schema}.store") == [(len(schema.SCRIPTS),)]
        _check_has(msgspec.to_builtins(await contents(store, now=T0)), frozen.read, at="contents")
        found = await store.search_sessions(SEARCHED, limit=100, after=None, status=None, now=T0)
        assert {match.session.id for match in found.data} == FOUND
        with pytest.raises(RepeatedError):
            await store.check_key(KEY, now=T0)


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


def test_the_statements_of_an_earlier_version_work_on_the_newest_tables(
    postgres: PostgresServer, frozen: Frozen
) -> None:
    lines = frozen.lines
    texts = [line for line in lines if isinstance(line, str)]
    with postgres.new_schema() as name, ExitStack() as connections:

        @cache
        def connection(_: int) -> psycopg.Connection[Any]:
            opened = connections.enter_context(psycopg.connect(postgres.url, autocommit=True, prepare_threshold=None))
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
