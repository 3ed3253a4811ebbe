"""``lastcall export`` and ``lastcall import`` for a PostgreSQL store, beside services and between kinds of stores."""

import json
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from service.cli.main import main
from service.cli.store_copy import copy_store
from service.clock import wall_clock
from service.setting_types import shown_store_url
from service.storage.postgres import open_postgres_store
from service.storage.sqlite import open_sqlite_store
from service.storage.store import Store
from tests.cli.test_import import fill as fill_with_turns
from tests.cli.test_store_copy import fill
from tests.postgres_server import PostgresServer
from tests.storage.rows import T0, a_session, a_turn, all_turns, at, contents, told

Output = pytest.CaptureFixture[str]
LATER = at(2)


@pytest.fixture
def schema(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with postgres.new_schema() as name:
        monkeypatch.setenv("LASTCALL_STORE_URL", postgres.url)
        monkeypatch.setenv("LASTCALL_STORE_SCHEMA", name)
        yield name


async def run(*arguments: str) -> int:
    return await trio.to_thread.run_sync(main, arguments)


async def kept(store: Store, session: str) -> object:
    """All that readers see of a session whose turns have ended."""
    now = wall_clock()
    record = await store.get_session(session, now=now)
    turns = await all_turns(store, session, now=now)
    tree = (await store.list_tree(session, limit=99, after=None, now=now)).data
    events = [await told(store, session, turn.id) for turn in turns]
    found = await store.search_sessions("line", limit=99, after=None, status=None, now=now)
    searched = {match.turn_id for match in found.data if match.session.id == session}
    assert searched
    return record, turns, tree, events, searched


@pytest.fixture
async def file(tmp_path: Path, postgres: PostgresServer, schema: str) -> Path:
    """A store in a file with turns of every kind of end, which the database has, too."""
    path = tmp_path / "lastcall.db"
    await fill_with_turns(path)
    copy = partial(copy_store, source_schema="", target_schema=schema, now=wall_clock())
    await trio.to_thread.run_sync(copy, f"sqlite:{path}", postgres.url)
    return path


@pytest.fixture
async def exported(file: Path, capsys: Output) -> Path:
    """The session ``s`` of the database, exported."""
    capsys.readouterr()
    assert await run("export", "s") == 0
    of_database = capsys.readouterr().out
    assert await run("export", "s", "--store", f"sqlite:{file}") == 0
    assert of_database == capsys.readouterr().out, "it is the same export as that of the file"
    path = file.with_name("exported.json")
    path.write_text(of_database)
    return path


async def test_a_session_is_exported_and_imported_beside_services_with_all_that_it_has(
    postgres: PostgresServer, file: Path, exported: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(file) as store:
        expected = await kept(store, "s")
    with postgres.new_schema() as other:
        monkeypatch.setenv("LASTCALL_STORE_SCHEMA", other)
        assert await run("import", str(exported)) == 0, "it makes the tables"
        async with open_postgres_store(postgres.url, schema_name=other) as copy:
            assert await kept(copy, "s") == expected
            assert await run("import", str(exported)) == 1
            assert "A session 's' is in " in capsys.readouterr().err
            assert await kept(copy, "s") == expected
            assert await run("import", "--owner", "bob", str(exported)) == 1
            assert "A turn of this session is in " in capsys.readouterr().err
            assert list(await contents(copy, now=wall_clock())) == ["s"]


async def test_an_expired_session_makes_room_and_open_turns_are_left_out(
    postgres: PostgresServer, schema: str, tmp_path: Path, capsys: Output
) -> None:
    turn = f"turn_{32 * 'b'}"
    now = wall_clock()
    async with open_postgres_store(postgres.url, schema_name=schema) as store:
        await store.create_session(msgspec.structs.replace(a_session("x"), created_at=now, expires_at=now), now=now)
        session = msgspec.structs.replace(a_session("y"), expires_at=now + timedelta(hours=1))
        await store.create_session(session, now=now)
        await store.begin_turn(a_turn(turn, "y"), now=now)
        capsys.readouterr()
        assert await run("export", "y") == 0
        exported = capsys.readouterr().out
        assert [it["turn"]["state"] for it in json.loads(exported)["turns"]] == ["running"]
        path = tmp_path / "exported.json"
        for old, new in (('"id":"y"', '"id":"x"'), ('n_id":"y"', 'n_id":"x"'), (f"{turn}-in-0", f"msg_{32 * 'c'}")):
            exported = exported.replace(old, new)
        path.write_text(exported)
        assert await run("import", str(path)) == 0, capsys.readouterr().err
        assert (await store.get_session("x", now=now)).head is None
        assert await all_turns(store, "x", now=now) == []


async def test_two_deployments_in_one_database_never_meet(
    postgres: PostgresServer, schema: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres.new_schema() as other:
        async with (
            open_postgres_store(postgres.url, schema_name=schema) as store,
            open_postgres_store(postgres.url, schema_name=other) as beside,
        ):
            await fill(beside)
            before = await contents(beside, now=T0)
            assert await contents(store, now=T0) == {}
            assert await store.recover(now=LATER) == 0
            assert await store.beat() == 0
            await fill(store)  # the same ids and the same idempotency keys
            assert await store.delete_expired(now=at(10**6), limit=100) == 2
            assert await contents(beside, now=T0) == before
            assert store.peer_secret != beside.peer_secret
            monkeypatch.setenv("LASTCALL_STORE_SCHEMA", schema)
            assert await run("export", "s") == 1
            monkeypatch.setenv("LASTCALL_STORE_SCHEMA", other)
            assert await run("export", "s") == 0


async def test_what_cannot_be_exported_is_said_in_one_line(
    postgres: PostgresServer, schema: str, capsys: Output
) -> None:
    place = f"{shown_store_url(postgres.url)} (schema {schema})"
    assert await run("export", "s") == 78
    assert capsys.readouterr().err.endswith(f"There is no store in {place}.\n")
    async with open_postgres_store(postgres.url, schema_name=schema):
        assert await run("export", "s") == 1
        assert f"There is no session 's' in {place}.\n" in capsys.readouterr().err
    postgres.run(f"UPDATE {schema}.store SET version = 1")
    assert await run("export", "s") == 78
    assert "was written by an older version; run lastcall migrate" in capsys.readouterr().err
