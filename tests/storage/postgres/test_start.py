"""The start of a PostgreSQL store: the tables are made once, and what stands against it is said in words."""

import sys
import threading
from functools import partial

import psycopg
import pytest
import structlog
import trio

from service.errors import StartupError
from service.settings import Settings
from service.storage.postgres import durability, open_postgres_store, schema
from service.storage.postgres.faults import startup_error
from service.supervisor import open_service
from tests.postgres_server import PASSWORD, PostgresServer
from tests.storage.postgres.locks import until_something_waits
from tests.storage.rows import T0, a_session


async def _open_once(url: str, *, schema_name: str = "never", close_timeout_s: float = 5) -> None:
    async with open_postgres_store(url, schema_name=schema_name, close_timeout_s=close_timeout_s):
        pass


async def _refusal(url: str, *, schema_name: str = "never") -> str:
    """What the store says that cannot be opened."""
    with pytest.raises(StartupError) as refused:
        await _open_once(url, schema_name=schema_name)
    return str(refused.value)


async def test_of_stores_that_start_at_once_one_makes_the_tables(postgres: PostgresServer) -> None:
    secrets: set[bytes] = set()
    fences: set[int] = set()

    async def open_one(schema_name: str) -> None:
        async with open_postgres_store(postgres.url, schema_name=schema_name) as store:
            secrets.add(store.peer_secret)
            fences.add(store.fence)

    with postgres.new_schema() as name, trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(open_one, name)
        assert postgres.run(f"SELECT count(*) FROM {name}.store") == [(1,)]
    assert len(secrets) == 1
    assert len(fences) == 5


async def test_what_is_kept_is_there_after_a_new_start_and_apart_from_another_schema(postgres: PostgresServer) -> None:
    with postgres.new_schema() as name, postgres.new_schema() as other:
        async with open_postgres_store(postgres.url, schema_name=name) as store:
            await store.create_session(a_session(), now=T0)
        async with (
            open_postgres_store(postgres.url, schema_name=name) as store,
            open_postgres_store(postgres.url, schema_name=other) as empty,
        ):
            assert await store.get_session("s", now=T0) == a_session()
            assert await empty.count_sessions(status=None, now=T0) == 0


async def test_a_user_who_may_make_no_schema_uses_one_that_was_made_for_it(postgres: PostgresServer) -> None:
    url = postgres.url_of("mortal")
    with postgres.new_schema() as name:
        assert "let it create a schema, or make the schema for it" in await _refusal(url, schema_name=name)
        postgres.run(f"CREATE SCHEMA {name} AUTHORIZATION mortal")
        await _open_once(url, schema_name=name)


async def test_the_password_is_asked_for_and_told_to_nobody(postgres: PostgresServer) -> None:
    with postgres.new_schema() as name:
        postgres.run(f"CREATE SCHEMA {name} AUTHORIZATION guarded")
        right = postgres.url_of(f"guarded:{PASSWORD}")
        async with open_postgres_store(right, schema_name=name) as store:
            assert PASSWORD not in store.name
            assert "guarded:********@" in store.name
    wrong = "open-barley"
    refusal = await _refusal(postgres.url_of(f"guarded:{wrong}"))
    assert "refuses the user or the password" in refusal
    assert wrong not in refusal


async def test_an_open_store_and_its_settings_show_no_password(postgres: PostgresServer) -> None:
    with postgres.new_schema() as name:
        postgres.run(f"CREATE SCHEMA {name} AUTHORIZATION guarded")
        settings = Settings(store_url=postgres.url_of(f"guarded:{PASSWORD}"), store_schema=name)
        async with open_service(settings) as service:
            assert PASSWORD not in f"{service} {service.store.name} {service.store!r}"


@pytest.mark.parametrize(
    ("user", "database", "words"),
    [
        ("stranger", "postgres", "there is no such user or database"),
        ("lastcall", "nowhere", "there is no such user or database"),
        ("guarded", "postgres", "asks for a password"),
    ],
)
async def test_a_user_or_a_database_that_is_not_there_is_named(
    postgres: PostgresServer, user: str, database: str, words: str
) -> None:
    refusal = await _refusal(postgres.url_of(user, database, entrance=postgres.directory))
    assert words in refusal
    assert str(postgres.directory) in refusal


async def test_a_server_that_is_not_there_is_said_so(tmp_path: object) -> None:
    for place in (f"@/lastcall?host={tmp_path}", "@127.0.0.1:1/lastcall"):
        assert "no server listens there" in await _refusal(f"postgresql://lastcall{place}")
    assert "there is no host of this name" in await _refusal("postgresql://lastcall@no-such-host.invalid/lastcall")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            'connection to server on socket "/run/postgresql/.s.PGSQL.5432" failed: Permission denied',
            "this process may not open the server's socket; see unix_socket_permissions",
        ),
        (
            'connection to server at "192.0.2.1", port 5432 failed: Permission denied',
            "this machine does not let this process connect there",
        ),
        (
            'connection to server at "192.0.2.1", port 5432 failed: FATAL: permission denied for database "d"',
            "the user of store_url may not do this; let it create a schema",
        ),
        ("permission denied for database lastcall", "the user of store_url may not do this; let it create a schema"),
    ],
)
def test_a_place_that_may_not_be_opened_is_told_from_a_missing_privilege(line: str, words: str) -> None:
    error = psycopg.OperationalError(f"connection is bad: {line}\n\tIs the server running locally?")
    assert f"The place cannot be used: {words}" in str(startup_error("The place", error))


async def test_a_parameter_that_the_driver_does_not_know_is_named(postgres: PostgresServer) -> None:
    assert 'invalid URI query parameter: "sslmod"' in await _refusal(f"{postgres.url}&sslmod=require")


async def test_a_server_that_is_too_old_is_refused(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SERVER_VERSION_MIN", 990000)
    assert "Lastcall needs PostgreSQL 99 or a later one" in await _refusal(postgres.url)


async def test_a_database_without_unicode_is_refused(postgres: PostgresServer) -> None:
    postgres.run("DROP DATABASE IF EXISTS latin", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    assert "make a database with the encoding UTF8" in await _refusal(postgres.url_of("lastcall", "latin"))


async def test_tables_of_a_later_version_that_needs_later_code_are_refused(postgres: PostgresServer) -> None:
    with postgres.new_schema() as name:
        await _open_once(postgres.url, schema_name=name)
        known = len(schema.SCRIPTS)
        postgres.run(f"UPDATE {name}.store SET version = {known + 3}, oldest = {known + 1}")
        refusal = await _refusal(postgres.url, schema_name=name)
        assert f"it has version {known + 3}, which works with code that knows version {known + 1} or a later" in refusal
        assert "Run a later version." in refusal


async def test_tables_of_a_later_version_that_work_with_this_code_are_used_and_stay(postgres: PostgresServer) -> None:
    with postgres.new_schema() as name:
        await _open_once(postgres.url, schema_name=name)
        later = (len(schema.SCRIPTS) + 1, len(schema.SCRIPTS))
        postgres.run(f"UPDATE {name}.store SET version = {later[0]}, oldest = {later[1]}")
        await _open_once(postgres.url, schema_name=name)
        assert postgres.run(f"SELECT version, oldest FROM {name}.store") == [later]


async def test_a_migration_that_fails_leaves_nothing(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    known = len(schema.SCRIPTS)
    with postgres.new_schema() as name:
        await _open_once(postgres.url, schema_name=name)
        scripts = (*schema.SCRIPTS, "CREATE TABLE {s}.new (key int); SELECT 1 / 0")
        monkeypatch.setattr(schema, "SCRIPTS", scripts)
        assert "division by zero" in await _refusal(postgres.url, schema_name=name)
        assert postgres.run(f"SELECT to_regclass('{name}.new'), version FROM {name}.store") == [(None, known)]
        monkeypatch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS[:-1], "CREATE TABLE {s}.new (key int)"))
        await _open_once(postgres.url, schema_name=name)
        assert postgres.run(f"SELECT version FROM {name}.store") == [(known + 1,)]


async def test_a_start_waits_for_the_process_that_brings_the_tables_up_and_says_so(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres.new_schema() as name, trio.fail_after(60), structlog.testing.capture_logs() as logged:
        await _open_once(postgres.url, schema_name=name)
        monkeypatch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS, "ALTER TABLE {s}.turns ADD COLUMN another int"))
        opened = trio.Event()

        async def open_one() -> None:
            await _open_once(postgres.url, schema_name=name)
            opened.set()

        async with trio.open_nursery() as nursery:
            with psycopg.connect(postgres.url) as other:
                other.execute(schema._LOCK.encode(), (name,))
                nursery.start_soon(open_one)
                await until_something_waits(postgres)
                assert not opened.is_set()
    assert opened.is_set()
    assert [it["event"] for it in logged if it["log_level"] == "info"] == [
        "the tables are to be brought up: waiting for the processes that use them",
        "the tables are brought up",
    ]


@pytest.mark.parametrize("held", ["the lock", "a table"])
def test_the_wait_for_others_has_a_bound(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    monkeypatch.setattr(schema, "TABLE_LOCK_S", 0.05)
    monkeypatch.setattr(schema, "_PAUSE_S", 0.01)
    with postgres.new_schema() as name, psycopg.connect(postgres.url, autocommit=True) as connection:
        schema.prepare(connection, name, place="here")
        monkeypatch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS, "ALTER TABLE {s}.turns ADD COLUMN another int"))
        with psycopg.connect(postgres.url) as other:
            if held == "the lock":
                other.execute(schema._LOCK.encode(), (name,))
            else:
                other.execute(f"SELECT FROM {name}.turns".encode())
            with pytest.raises(StartupError, match=r"could not be brought up within 0\.3 s: another process changes"):
                schema.prepare(connection, name, place="here", wait_max_s=0.3)
        assert schema.prepare(connection, name, place="here", wait_max_s=0).before == len(schema.SCRIPTS) - 1


async def test_a_start_that_waits_can_be_cancelled(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres.new_schema() as name, psycopg.connect(postgres.url) as other, trio.fail_after(60):
        await _open_once(postgres.url, schema_name=name)
        monkeypatch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS, "ALTER TABLE {s}.turns ADD COLUMN another int"))
        other.execute(schema._LOCK.encode(), (name,))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(_open_once, postgres.url, schema_name=name, close_timeout_s=0.1))
            await until_something_waits(postgres)
            nursery.cancel_scope.cancel()
        (writer,) = (it for it in threading.enumerate() if it.name == "postgres writer")
        other.rollback()
        await trio.to_thread.run_sync(writer.join)  # the thread goes on without the start, and closes its connection


async def test_without_the_driver_the_service_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "service.storage.postgres", None)
    with pytest.raises(StartupError, match=r"pip install '\.\[postgres\]' in the folder of the code") as refused:
        async with open_service(Settings(store_url=f"postgresql://u:{PASSWORD}@h/d")):
            pass
    assert PASSWORD not in str(refused.value)


async def test_a_failed_start_leaves_no_connection(postgres: PostgresServer) -> None:
    # A pooler would keep its connections.
    url = postgres.url_of("lastcall", entrance=postgres.directory) + "&application_name=fails"
    with postgres.new_schema() as name:
        await _open_once(url, schema_name=name)
        postgres.run(f"DROP TABLE {name}.owners")
        await _refusal(url, schema_name=name)
        with trio.fail_after(60):
            while _connections(postgres):  # noqa: ASYNC110  no event tells it
                await trio.sleep(0.01)


def _connections(server: PostgresServer) -> list[tuple[object, ...]]:
    return server.run("SELECT pid FROM pg_stat_activity WHERE application_name = 'fails'")


@pytest.mark.parametrize(
    ("commit", "names", "standbys", "words"),
    [
        ("on", "", 0, None),
        ("on", "", 1, "a failover may lose what was acknowledged"),
        ("on", "ANY 1 (*)", 1, None),
        ("local", "ANY 1 (*)", 1, "a failover may lose what was acknowledged"),
        ("off", "", 0, "a crash of the database may lose what was acknowledged"),
    ],
)
def test_a_database_that_may_lose_what_it_acknowledged_is_warned_of(
    commit: str, names: str, standbys: int, words: str | None
) -> None:
    with structlog.testing.capture_logs() as logged:
        durability.warn_of_losses(_Answering((commit, names, standbys)), place="here")  # type: ignore[arg-type]
    assert [it["event"].partition(":")[0] for it in logged] == ([] if words is None else [words])


class _Answering:
    """A connection of a server with such settings."""

    def __init__(self, row: tuple[object, ...]) -> None:
        self._row = row

    def execute(self, _: bytes) -> "_Answering":
        return self

    def fetchone(self) -> tuple[object, ...]:
        return self._row


async def test_the_start_looks_at_what_the_database_promises(postgres: PostgresServer) -> None:
    with postgres.new_schema() as name, structlog.testing.capture_logs() as logged:
        await _open_once(postgres.url, schema_name=name)
    assert any("its synchronous_commit is off" in it["event"] for it in logged), "that of the tests is"
