"""An operator's commands for the file: vacuum, backup, check, export and import."""

import json
import os
import resource
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from service.cli.session_export import ExportedSession, read_exported
from service.errors import SessionExistsError, SessionNotFoundError, StartupError
from service.models.client import Usage
from service.storage.pieces import STARTED, Run
from service.storage.records import Item, LeftOut, SessionPatch, Siblings, TurnRecord, TurnState
from service.storage.sqlite import SqliteStore, database, maintenance, open_sqlite_store, sessions, turns
from service.storage.sqlite.reclaim import reclaim_some
from tests.storage.rows import T0, Contents, a_session, a_turn, at, contents, ended, said
from tests.storage.sqlite import file_exports

T1, T2, T3, T4 = (f"turn_{n:032x}" for n in range(1, 5))


def _a_turn(turn_id: str, *, parent: str | None = None, state: TurnState = "running") -> TurnRecord:
    item = Item(id=turn_id.replace("turn", "msg"), role="user", text="Hello")
    return msgspec.structs.replace(a_turn(turn_id, parent=parent, state=state), input=(item,))


def _ended(turn: TurnRecord, text: str = "é") -> TurnRecord:
    item = Item(id=turn.id.replace("turn_0", "msg_f"), role="assistant", text=text)
    end = ended(turn, usage=Usage(input_tokens=1, output_tokens=2))
    return msgspec.structs.replace(end, output=(item,), left_out=LeftOut(3, 40))


async def _fill(store: SqliteStore) -> None:
    await store.create_session(a_session(), now=T0)
    await store.update_session("s", SessionPatch(title="é", system_message="be brief", metadata={"a": "b"}), now=T0)
    parent = None
    for name in (T1, T2, T3):
        turn = _a_turn(name, parent=parent)
        await store.begin_turn(turn, now=T0)
        await store.end_turn(_ended(turn), runs=(Run(STARTED), *said("é")), now=T0)
        parent = name


def _import(path: Path, exported: bytes) -> None:
    file_exports.import_session(path, read_exported(exported), now=T0)


async def test_an_exported_session_is_the_same_when_it_is_imported_elsewhere(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await contents(store, now=T0)
        exported = await trio.to_thread.run_sync(file_exports.export_session, path, "s")
    there = path.with_name("there.db")
    async with open_sqlite_store(there) as store:
        await trio.to_thread.run_sync(_import, there, exported)
        assert await contents(store, now=T0) == before
        # The imported session takes new turns.
        session = (await store.begin_turn(_a_turn(T4, parent=T3), now=T0)).session
        assert (session.head, session.message_count) == (T4, 7)
        with pytest.raises(SessionExistsError):
            _import(there, exported)


async def test_a_turn_after_an_open_turn_is_imported_without_the_open_one(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(_a_turn(T1), now=T0)
        await store.end_turn(_ended(_a_turn(T1)), runs=(), now=T0)
        await store.begin_turn(_a_turn(T2, parent=T1), now=T0)
        await store.begin_turn(_a_turn(T3, parent=T2), now=T0)
        await store.end_turn(_ended(_a_turn(T3, parent=T2)), runs=(), now=T0)
        exported = [file_exports.export_session(path, "s")]
        await store.begin_turn(_a_turn(T4, parent=T2), now=T0)
        exported.append(file_exports.export_session(path, "s"))
    for n, head in enumerate((T3, T1)):
        there = path.with_name(f"{n}.db")
        async with open_sqlite_store(there) as store:
            _import(there, exported[n])
            session = await store.get_session("s", now=T0)
            assert (session.head, session.open_turns, session.message_count) == (head, 0, 4)
            assert (session.input_tokens, session.output_tokens) == (2, 4)
            assert [turn.id for turn in await store.list_path("s", T3, limit=9, first=None)] == [T1, T3]
            assert (await store.fork_session("s", at=None, copy_id="copy", now=T0)).head is not None
        assert maintenance.check(there) == []


async def test_an_expired_session_is_replaced_by_one_that_is_imported(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        exported = file_exports.export_session(path, "s")
        file_exports.import_session(path, read_exported(exported), now=at(61))
        assert len((await contents(store, now=T0))["s"][1]) == 3


BROKEN: dict[str, Callable[[Any, Any], object]] = {
    "its id '..' is not a valid session id": lambda session, _: session.update(id=".."),
    "its id 'a b/c' is not a valid session id": lambda session, _: session.update(id="a b/c"),
    "its id 'a\\x00b' is not a valid session id": lambda session, _: session.update(id="a\0b"),
    "its id '' is not a valid session id": lambda session, _: session.update(id=""),
    f"its id '{'z' * 79}… is not a valid session id": lambda session, _: session.update(id="z" * 300),
    "created_at '2026-01-01T00:00:00' of the session has no zone": lambda session, _: session.update(
        created_at="2026-01-01T00:00:00"
    ),
    "expires_at '0001-01-01T00:00:00+05:00' of the session has no zone, or is out of range": (
        lambda session, _: session.update(expires_at="0001-01-01T00:00:00+05:00")
    ),
    f"the head '{T4}' of the session is not one of its turns": lambda session, _: session.update(head=T4),
    "the id 'foo' is not a valid turn id": lambda _, turns: turns[0]["turn"].update(id="foo"),
    f"turn '{T1}' is in it twice": lambda _, turns: turns.append(turns[0]),
    f"the parent '{T1}' of turn '{T1}' is not a turn before it": lambda _, turns: turns[0]["turn"].update(parent=T1),
    f"the parent '{T3}' of turn '{T1}' is not a turn before it": lambda _, turns: turns[0]["turn"].update(parent=T3),
    f"the parent '{T4}' of turn '{T1}' is not a turn before it": lambda _, turns: turns[0]["turn"].update(parent=T4),
    f"the session 'other' of turn '{T2}' is not 's'": lambda _, turns: turns[1]["turn"].update(session_id="other"),
    f"ended_at '2026-01-01T00:00:00' of turn '{T1}' has no zone": lambda _, turns: turns[0]["turn"].update(
        ended_at="2026-01-01T00:00:00"
    ),
    f"ended_at null of turn '{T1}' is no time": lambda _, turns: turns[0]["turn"].update(ended_at=None),
    "the id 'x' of turn": lambda _, turns: turns[0]["turn"]["output"][0].update(id="x"),
    f"item 'msg_{1:032x}' of turn '{T2}' is in it twice": lambda _, turns: turns[1]["turn"].update(
        input=turns[0]["turn"]["input"]
    ),
    f"last_seq -1 of turn '{T1}' is not between": lambda _, turns: turns[0]["turn"].update(last_seq=-1),
    f"last_seq 1{'0' * 30} of turn '{T1}' is not between": lambda _, turns: turns[0]["turn"].update(last_seq=10**30),
    f"left_out.bytes -1 of turn '{T1}' is not between": lambda _, turns: turns[0]["turn"]["left_out"].update(bytes=-1),
    f"output_tokens -1 of turn '{T1}' is not between": lambda _, turns: turns[0]["turn"]["usage"].update(
        output_tokens=-1
    ),
}


@pytest.mark.parametrize("problem", BROKEN)
async def test_a_session_that_no_store_can_have_is_refused_with_the_reason(path: Path, problem: str) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
    whole = json.loads(file_exports.export_session(path, "s"))
    BROKEN[problem](whole["session"], whole["turns"])
    with pytest.raises(StartupError) as refused:
        read_exported(json.dumps(whole).encode())
    assert str(refused.value).startswith(f"This is not an exported session: {problem}")
    assert len(str(refused.value).splitlines()) == 1


WRONG_PLACES = {
    "one is missing": "DELETE FROM siblings WHERE place = 2",
    "all are missing": "DELETE FROM siblings",
    "one is wrong": "UPDATE siblings SET place = 3 WHERE place = 2",
    "one too many": "INSERT INTO siblings SELECT session, parent, 99, 3 FROM siblings WHERE place = 2",
}


async def test_an_imported_session_has_the_places_of_its_turns_and_a_check_finds_wrong_ones(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.begin_turn(_a_turn(T4, parent=T2), now=T0)
        await store.end_turn(_ended(_a_turn(T4, parent=T2)), runs=(), now=T0)
    imported = path.with_name("imported.db")
    file_exports.import_session(imported, read_exported(file_exports.export_session(path, "s")), now=T0)
    async with open_sqlite_store(imported) as store:
        assert (await store.find_places("s", [T2, T3, T4])).siblings == {
            T2: Siblings(),
            T3: Siblings(1, 2),
            T4: Siblings(2, 2),
        }
    assert maintenance.check(imported) == []
    for name, broken in WRONG_PLACES.items():
        copy = path.with_name(f"{name}.db")
        maintenance.backup(imported, copy)
        with closing(sqlite3.connect(copy)) as db:
            db.execute(broken)
            db.commit()
        assert maintenance.check(copy) == [f"session 's': the places of the turns with the parent {T2!r} are wrong"], (
            name
        )


async def test_a_circle_of_turns_ends_every_read_and_is_found_by_a_check(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.create_session(a_session("self"), now=T0)
        await store.begin_turn(a_turn("t", "self"), now=T0)
        await store.end_turn(ended(a_turn("t", "self")), runs=(), now=T0)
    assert maintenance.check(path) == []
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE turns SET parent = ? WHERE id = ?", (T3, T1))
        db.execute("UPDATE turns SET parent = 't' WHERE id = 't'")
        db.execute("UPDATE sessions SET head = 'nowhere' WHERE id = 'self'")
        db.commit()
    with trio.fail_after(60):
        async with open_sqlite_store(path) as store:
            for session, turn, whole in (("s", T3, [T1, T2, T3]), ("self", "t", ["t"])):
                assert [it.id for it in await store.read_path(session, turn, bytes_max=None)] == whole
                assert [it.id for it in await store.list_path(session, turn, limit=9, first=None)] == whole
                assert await store.list_path(session, turn, limit=9, first="nowhere") == []
                copy = await store.fork_session(session, at=turn, copy_id=f"copy of {session}", now=T0)
                assert copy.message_count == 2 * len(whole)
    assert maintenance.check(path) == [
        "session 'self': the head 'nowhere' is not one of its turns",
        f"session 's': the parent '{T3}' of turn '{T1}' is not a turn before it",
        "session 'self': the parent 't' of turn 't' is not a turn before it",
    ]


async def test_a_missing_session_and_a_file_that_is_no_export_are_refused(path: Path) -> None:
    with pytest.raises(StartupError, match="not there"):
        file_exports.export_session(path, "s")
    async with open_sqlite_store(path):
        pass
    with pytest.raises(SessionNotFoundError):
        file_exports.export_session(path, "s")
    for exported in (b"", b"{}", b"[]", b'{"x": ' + b"[" * 100_000, b'"\xff"', b'{"session": {"id": "\\ud800"}}'):
        with pytest.raises(StartupError, match="not an exported session"):
            read_exported(exported)
    newer = msgspec.json.encode(ExportedSession(format=2, session=a_session(), turns=()))
    with pytest.raises(StartupError, match="format 2"):
        read_exported(newer)


async def test_a_backup_is_taken_while_the_store_is_written_to_and_is_whole(path: Path) -> None:
    copy = path.with_name("copy.db")
    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await contents(store, now=T0)
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(lambda n: store.create_session(a_session(f"more-{n}"), now=T0), n)
            await trio.to_thread.run_sync(maintenance.backup, path, copy)
        with pytest.raises(StartupError, match="exists already"):
            maintenance.backup(path, copy)
    assert maintenance.check(copy) == []
    async with open_sqlite_store(copy) as store:
        assert (await contents(store, now=T0))["s"] == before["s"]


async def test_vacuum_gives_back_what_was_removed(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.begin_turn(a_turn("large"), now=T0)
        await store.end_turn(ended(a_turn("large"), text="x" * 3_000_000), runs=said(*["x" * 1_000_000] * 3), now=T0)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
    before = path.stat().st_size  # noqa: ASYNC240
    assert maintenance.vacuum(path) > 2_500_000
    assert path.stat().st_size < before - 2_500_000  # noqa: ASYNC240
    assert maintenance.check(path) == []
    async with open_sqlite_store(path) as store:
        assert await contents(store, now=T0) == {}


async def test_a_vacuum_beside_a_service_tells_what_it_gave_back_and_not_what_came_in(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.begin_turn(a_turn("large"), now=T0)
        await store.end_turn(ended(a_turn("large"), text="x" * 1_000_000), runs=said("x" * 1_000_000), now=T0)
        before = path.stat().st_size  # noqa: ASYNC240
        assert await trio.to_thread.run_sync(maintenance.vacuum, path) == 0
        assert path.stat().st_size > before  # noqa: ASYNC240


def _rebuild_without_auto_vacuum(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA auto_vacuum = NONE")
        db.execute("VACUUM")


async def test_a_vacuum_of_a_file_that_cannot_shrink_ends_and_says_how_it_can(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
    _rebuild_without_auto_vacuum(path)
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.update_session("s", SessionPatch(title="x" * 100_000), now=T0)
        await store.update_session("s", SessionPatch(title=None), now=T0)
    with trio.fail_after(60):
        with pytest.raises(StartupError, match="rebuilt without auto_vacuum") as refused:
            await trio.to_thread.run_sync(maintenance.vacuum, path, abandon_on_cancel=True)
        statement = str(refused.value).split("'")[-2]
        with closing(sqlite3.connect(path)) as db:
            db.executescript(statement)
        assert await trio.to_thread.run_sync(maintenance.vacuum, path, abandon_on_cancel=True) == 0


def test_an_empty_file_is_no_store_and_stays_empty(path: Path) -> None:
    path.touch()
    for look in (maintenance.check, maintenance.vacuum):
        with pytest.raises(StartupError, match="is empty: it is not a store"):
            look(path)
    assert path.read_bytes() == b""


async def test_a_backup_that_fails_leaves_nothing_behind(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.update_session("s", SessionPatch(title="x" * 1_000_000), now=T0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(StartupError):
            maintenance.backup(path, path.with_name("copy.db"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {it.name for it in path.parent.iterdir()} == {path.name, f"{path.name}-owners", f"{path.name}-reserve"}  # noqa: ASYNC240


@pytest.mark.parametrize("with_links", [True, False])
async def test_a_backup_never_takes_the_place_of_anything(
    path: Path, with_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: os.link("", ""))  # like a file system without this call
    async with open_sqlite_store(path):
        pass
    mine = path.with_name("copy.db.unfinished")
    mine.write_text("mine")
    copy, link = path.with_name("copy.db"), path.with_name("link.db")
    link.symlink_to("nowhere")
    maintenance.backup(path, copy)
    assert (maintenance.check(copy), stat.S_IMODE(copy.stat().st_mode)) == ([], 0o600)
    assert mine.read_text() == "mine"
    for taken in (mine, link):
        with pytest.raises(StartupError, match="exists already"):
            maintenance.backup(path, taken)
        with pytest.raises(FileExistsError):  # a file that appeared during the copy
            database.back_up(path, taken)
    assert mine.read_text() == "mine"
    assert link.readlink() == Path("nowhere")
    assert list(path.parent.glob(".lastcall-*")) == []


def test_a_new_file_is_not_made_through_a_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(OSError, match="symbolic link"):
        database.create_file(path)


async def test_a_check_says_what_is_wrong(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM sessions")
        db.commit()
    assert any("turns row" in problem for problem in maintenance.check(path))


class Died(BaseException):
    """The process died here."""


@pytest.mark.parametrize("cleans_up", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2])
async def test_an_import_that_ends_in_the_middle_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: int, *, cleans_up: bool
) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        exported = file_exports.export_session(path, "s")
        expired = await contents(store, now=T0)
    insert, steps = turns.insert_ended, 0

    def insert_or_die(*args: Any, **more: Any) -> int:
        nonlocal steps
        if steps == step:
            raise Died
        steps += 1
        return insert(*args, **more)

    monkeypatch.setattr(maintenance, "_TURNS_AT_ONCE", 1)
    with monkeypatch.context() as patched:
        patched.setattr(turns, "insert_ended", insert_or_die)
        if not cleans_up:
            patched.setattr(sessions, "remove_deleted", lambda *_: False)
        with pytest.raises(Died):
            file_exports.import_session(path, read_exported(exported), now=at(61))
    async with open_sqlite_store(path) as store:
        assert await contents(store, now=T0) == expired, "not even the session that expires is replaced"
        await store.recover(now=T0)
        while await store._writing.call(reclaim_some):
            pass
        count = await store._writing.call(lambda db: db.execute("SELECT count(*) FROM turns").get)
        assert count == 3
        owners = await store._writing.call(lambda db: db.execute("SELECT count(*) FROM owners").get)
        assert owners == 1
    file_exports.import_session(path, read_exported(exported), now=at(61))
    assert maintenance.check(path) == []


async def test_an_import_lets_others_write_between_its_steps_and_shows_nothing_before_the_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = path.with_name("there.db")
    async with open_sqlite_store(path) as store, open_sqlite_store(there) as other:
        await _fill(store)
        exported = file_exports.export_session(path, "s")
        pauses: list[Contents] = []

        def pause() -> None:
            trio.from_thread.run(look)

        async def look() -> None:
            await other.recover(now=T0)  # the builder lives
            await other.create_session(a_session(f"beside-{len(pauses)}"), now=T0)
            pauses.append(await contents(other, now=T0))

        monkeypatch.setattr(maintenance, "_TURNS_AT_ONCE", 1)
        monkeypatch.setattr(maintenance, "_let_others_write", pause)
        await trio.to_thread.run_sync(lambda: file_exports.import_session(there, read_exported(exported), now=T0))
        assert len(pauses) == 3
        assert all("s" not in found for found in pauses)
        assert (await contents(other, now=T0))["s"] == (await contents(store, now=T0))["s"]
