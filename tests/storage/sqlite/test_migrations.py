"""Every released schema is migrated to the newest, with a copy of the file from before.

``schemas/N.sql`` is a database of version N with rows of every kind, as ``python -m
tests.storage.sqlite.test_migrations`` wrote it when that was the newest.
"""

import sqlite3
import tempfile
import threading
from contextlib import closing
from io import StringIO
from pathlib import Path

import apsw
import msgspec
import pytest
import trio
from apsw import shell

from service.errors import StartupError
from service.storage.pieces import STARTED, Run
from service.storage.records import SEQ_AFTER_CRASH, IdempotencyKey, LeftOut, SessionPatch
from service.storage.sqlite import database, open_sqlite_store
from service.storage.sqlite.schema import APPLICATION_ID, SCRIPTS
from tests.storage.rows import T0, a_session, a_turn, all_sessions, at, contents, ended, said, told
from tests.storage.test_store_owners import a_checkpoint

SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = range(1, len(SCRIPTS) + 1)
NEXT = "ALTER TABLE sessions ADD COLUMN colour TEXT;"


def _restore(path: Path, version: int) -> None:
    with closing(apsw.Connection(str(path))) as db:
        db.execute((SCHEMAS / f"{version}.sql").read_text())
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_database_of_every_version_is_read_and_goes_on(path: Path, version: int) -> None:
    _restore(path, version)
    async with open_sqlite_store(path) as store:
        assert await store.recover(now=at(1)) == 1
        found = {session.id: session for session in await all_sessions(store, now=at(1))}
        assert found.keys() == {"s", "other"}
        assert (found["s"].title, found["s"].metadata, found["s"].head) == ("é", {"a": "b"}, "t2")
        turn = await store.get_turn("s", "t", now=at(1))
        assert (turn.state, turn.text, turn.last_seq) == ("completed", "Hi", 3)
        assert turn.left_out == (None if version == 1 else LeftOut(1, 2))
        assert await store.measure_path("s", "t2") == LeftOut(4, 15)
        assert await told(store, "s", "t") == ["Hi"]
        page = await store.read_events("s", "t")
        assert (page.runs[0], page.kept, page.text_length) == (Run(STARTED), 2, 2)
        crashed = await store.get_turn("s", "t2", now=at(1))
        assert (crashed.state, crashed.text, crashed.last_seq) == ("interrupted", "Hel", SEQ_AFTER_CRASH)
        assert await told(store, "s", "t2") == ["Hel"]
        assert (await store.fork_session("s", at=None, copy_id="copy", now=at(1))).head is not None
        assert [texts for _, texts in (await contents(store, now=at(1)))["copy"][1]] == [["Hi"], ["Hel"]]
        await store.mark_deleted("copy", now=at(1))
        await store.remove_deleted("copy")
        await store.begin_turn(a_turn("t3", parent="t2"), now=at(1))


@pytest.mark.parametrize("version", [1, 2, 3])
async def test_a_migration_counts_the_reasoning_of_turns_that_have_ended(path: Path, version: int) -> None:
    _restore(path, version)
    with closing(sqlite3.connect(path)) as db:
        usage = '{"input_tokens":1,"output_tokens":9,"reasoning_tokens":7}'
        db.execute("UPDATE turns SET usage = ? WHERE id = 't'", (usage,))
        db.commit()
    async with open_sqlite_store(path) as store:
        found = {session.id: session.reasoning_tokens for session in await all_sessions(store, now=at(1))}
        assert found == {"s": 7, "other": 0}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_released_version_makes_the_schema_that_its_scripts_make(path: Path, version: int) -> None:
    _restore(path, version)

    def schema(db: apsw.Connection) -> set[str]:
        return {row[0] for row in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}

    with closing(apsw.Connection(str(path))) as db, closing(apsw.Connection(":memory:")) as made:
        for script in SCRIPTS[:version]:
            made.execute(script)
        assert schema(db) == schema(made), "a script was changed after its release"


def test_no_migration_adds_a_column_to_the_turns() -> None:
    """In a STRICT table SQLite reads all rows for that, with all texts of the file."""
    for script in SCRIPTS[3:]:
        assert "ALTER TABLE turns" not in script
        assert "ALTER TABLE event_pages" not in script


async def test_a_migration_leaves_a_copy_from_before_and_happens_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _restore(path, len(SCRIPTS))
    monkeypatch.setattr(database, "SCRIPTS", (*SCRIPTS, NEXT))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(4):  # several workers start at once
                nursery.start_soon(_open, path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(SCRIPTS) + 1,)
        assert db.execute("SELECT colour FROM sessions LIMIT 1").fetchall() == [(None,)]
    with closing(sqlite3.connect(f"{path}.schema-{len(SCRIPTS)}")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(SCRIPTS),)
        assert db.execute("SELECT count(*) FROM sessions").fetchone() == (3,)


async def test_workers_that_start_together_wait_for_the_one_that_migrates_a_large_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _restore(path, len(SCRIPTS))
    all_wait = threading.Event()
    copies: list[Path] = []
    waiting: set[int] = set()
    back_up = database.back_up

    def copy_slowly(source: Path, copy: Path, *, replace: bool) -> None:
        copies.append(copy)
        assert all_wait.wait(20)
        monkeypatch.setattr(database, "_LOCK_WAIT_S", 5)
        back_up(source, copy, replace=replace)

    class Logger:
        def info(self, event: str, **_: object) -> None:
            if "another process holds the lock" in event:
                waiting.add(threading.get_ident())
                if len(waiting) == 3:
                    all_wait.set()

    monkeypatch.setattr(database, "logger", Logger())
    monkeypatch.setattr(database, "SCRIPTS", (*SCRIPTS, NEXT))
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.05)
    monkeypatch.setattr(database, "back_up", copy_slowly)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(_open, path)
    assert len(copies) == 1


def test_a_lock_that_a_stranger_holds_is_waited_for_within_a_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of an old file is longer than that of a new one, and both have an end."""
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.01)
    monkeypatch.setattr(database, "_UPGRADE_WAIT_S", 0.05)
    for version in (len(SCRIPTS) - 1, len(SCRIPTS)):
        name = path.with_name(f"{version}.db")
        _restore(name, version)
        with (
            closing(database.connect(name)) as stranger,
            database.transaction(stranger),
            pytest.raises(StartupError, match="another process holds its lock"),
        ):
            trio.run(_open, name)


async def _open(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        assert len(await all_sessions(store, now=T0)) == 2


async def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _restore(path, len(SCRIPTS))
    monkeypatch.setattr(database, "SCRIPTS", (*SCRIPTS, NEXT + "CREATE TABLE sessions (id);"))
    with pytest.raises(StartupError, match="already exists"):
        await _open(path)
    monkeypatch.undo()
    await _open(path)


async def test_a_file_is_not_migrated_while_another_server_uses_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        monkeypatch.setattr(database, "SCRIPTS", (*SCRIPTS, NEXT))
        with pytest.raises(StartupError, match="in use by an older version"):
            await _open(path)
        monkeypatch.undo()
        assert (await store.get_session("s", now=T0)).id == "s"


async def _make(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.update_session("s", SessionPatch(title="é", metadata={"a": "b"}), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        end = msgspec.structs.replace(ended(a_turn()), left_out=LeftOut(1, 2))
        await store.end_turn(end, runs=(Run(STARTED), *said("Hi")), now=T0)
        await store.begin_turn(a_turn("t2", parent="t"), now=T0)
        await store.checkpoint_turns([a_checkpoint("t2", "Hel")])
        await store.create_session(a_session("other"), now=T0, key=IdempotencyKey(caller="", key="k", fingerprint=b"f"))
        await store.create_session(a_session("marked"), now=T0)
        await store.mark_deleted("marked", now=T0)


def write_newest() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "lastcall.db")
        trio.run(_make, path)
        with closing(apsw.Connection(str(path))) as db, StringIO() as dumped:
            shell.Shell(stdout=dumped, db=db).process_command(".dump")  # type: ignore[no-untyped-call]
            lines = [line for line in dumped.getvalue().splitlines() if line and not line.startswith("--")]
            (SCHEMAS / f"{len(SCRIPTS)}.sql").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_newest()
