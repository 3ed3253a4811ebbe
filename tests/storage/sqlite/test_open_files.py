"""The file is deleted, moved or replaced under a store: the store acknowledges nothing that would be lost."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path

import apsw
import pytest
import structlog
import trio

from service.errors import StartupError, StoreError
from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.stop_state import Phase
from service.storage.sqlite import database, open_files, open_sqlite_store
from service.storage.sqlite.store import SqliteStore
from service.supervisor import open_service
from tests.sessions.puppet import frames_of
from tests.storage.rows import T0, a_session, a_turn, all_sessions, ended, said

FAULT = "its file was deleted or replaced"
ENDINGS = ("", "-wal", "-shm", "-owners")


@pytest.fixture
def log() -> Iterator[list[structlog.typing.EventDict]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


@asynccontextmanager
async def open_and_lose(path: Path) -> AsyncIterator[SqliteStore]:
    """A store whose file is lost by the time of its close; then the close raises, a fault of the shutdown."""
    try:
        async with open_sqlite_store(path) as store:
            yield store
    except StoreError as error:
        assert "replaced while it was open" in str(error)  # noqa: PT017
    else:
        pytest.fail("its loss was not told")


def files_of(path: Path) -> list[Path]:
    return [path.with_name(path.name + ending) for ending in ENDINGS]


def remove(path: Path) -> None:
    for file in files_of(path):
        file.unlink()


def replace_by_copy(path: Path) -> None:
    """Replace the file as an operator does who restores a backup without a stop."""
    copy = path.with_name("copy")
    database.back_up(path, copy)
    copy.replace(path)


def replace_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("before"))
    path.parent.mkdir()


LOSSES: dict[str, Callable[[Path], object]] = {
    "all deleted": remove,
    "deleted": Path.unlink,
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "restored": replace_by_copy,
    "folder replaced": replace_folder,
    **{f"{ending} deleted": lambda path, ending=ending: Path(f"{path}{ending}").unlink() for ending in ENDINGS[1:]},  # type: ignore[misc]
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A path in a folder that a test may replace."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "lastcall.db"


@pytest.fixture
def lose(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return LOSSES[request.param]


@pytest.mark.parametrize("lose", LOSSES, indirect=True)
async def test_nothing_is_written_once_the_file_is_not_there_any_more_and_reads_go_on(
    path: Path, lose: Callable[[Path], object], log: list[structlog.typing.EventDict]
) -> None:
    async with open_and_lose(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        lose(path)
        for number in range(2):
            with pytest.raises(StoreError, match=FAULT) as refused:
                await store.create_session(a_session(f"s{number}"), now=T0)
            assert refused.value.retry_after_s is not None
            assert str(path) not in str(refused.value)
            with pytest.raises(StoreError, match=FAULT):
                await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0)
            with pytest.raises(StoreError, match=FAULT):
                await store.recover(now=T0)
        assert [session.id for session in await all_sessions(store, now=T0)] == ["s"]
        assert (await store.get_turn("s", "t", now=T0)).is_open
    (line,) = log
    assert line["log_level"] == "critical"
    assert line["store"] == f"sqlite:{path}"


@pytest.mark.usefixtures("one_commit")
@pytest.mark.parametrize("lose", LOSSES, indirect=True)
async def test_a_commit_into_a_file_that_was_removed_meanwhile_is_not_acknowledged(
    path: Path, lose: Callable[[Path], object]
) -> None:
    async with open_and_lose(path) as store:
        refused: list[str] = []

        async def create(session_id: str) -> None:
            with pytest.raises(StoreError, match=FAULT):
                await store.create_session(a_session(session_id), now=T0)
            refused.append(session_id)

        # In the middle of a transaction that many calls share.
        await store.create_session(a_session(), now=T0)
        other = apsw.Connection(str(path))
        other.set_busy_timeout(5000)
        other.execute("BEGIN IMMEDIATE")
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(create, f"s{number}")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(_call, store, lambda _: lose(path))
            await trio.testing.wait_all_tasks_blocked()
            other.execute("ROLLBACK")
        other.close()
        assert sorted(refused) == ["s0", "s1", "s2"]


async def _call(store: SqliteStore, step: Callable[[apsw.Connection], object]) -> None:
    with pytest.raises(StoreError):
        await store._writing.call(step)


async def test_a_file_that_is_put_back_takes_writes_again(path: Path, log: list[structlog.typing.EventDict]) -> None:
    away = path.parent / "away"
    away.mkdir()
    async with open_sqlite_store(path) as store:
        for number in range(2):
            for file in files_of(path):
                file.rename(away / file.name)
            with pytest.raises(StoreError, match=FAULT):
                await store.create_session(a_session("refused"), now=T0)
            for file in files_of(away / path.name):
                file.rename(path.parent / file.name)
            await store.create_session(a_session(f"s{number}"), now=T0)
    assert [line["log_level"] for line in log] == ["critical", "warning"] * 2
    async with open_sqlite_store(path) as store:
        assert {session.id for session in await all_sessions(store, now=T0)} == {"s0", "s1"}


async def test_a_path_that_cannot_be_inspected_takes_no_writes_until_it_can(
    path: Path, monkeypatch: pytest.MonkeyPatch, log: list[structlog.typing.EventDict]
) -> None:
    def refuse(name: Path) -> open_files.Identity:
        raise OSError(5, "Input/output error", str(name))

    async with open_sqlite_store(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(open_files, "_identity", refuse)
            for _ in range(2):
                with pytest.raises(StoreError, match="cannot be inspected"):
                    await store.create_session(a_session(), now=T0)
        await store.create_session(a_session(), now=T0)
    assert [line["log_level"] for line in log] == ["critical", "warning"]


@pytest.mark.parametrize("level", ["file", "folder"])
async def test_a_link_that_is_made_to_lead_elsewhere_takes_the_file_away(path: Path, level: str) -> None:
    for folder in ("a", "b"):
        (path.parent / folder).mkdir()
        async with open_sqlite_store(path.parent / folder / "kept.db") as store:
            await store.create_session(a_session(folder), now=T0)
    link = path.parent / ("link.db" if level == "file" else "current")
    name = link if level == "file" else link / "kept.db"

    def lead_to(folder: str) -> None:
        link.unlink(missing_ok=True)
        link.symlink_to(path.parent / folder / ("kept.db" if level == "file" else ""))

    lead_to("a")
    async with open_sqlite_store(name) as store:
        await store.create_session(a_session("before"), now=T0)
        lead_to("b")
        with pytest.raises(StoreError, match=FAULT):
            await store.create_session(a_session("after"), now=T0)
        with pytest.raises(StartupError, match="still serves the file that was there before"):
            async with open_sqlite_store(name):
                pytest.fail("another worker has another truth")
        async with open_sqlite_store(path.parent / "b" / "kept.db") as other:  # by its name this is another store
            assert [session.id for session in await all_sessions(other, now=T0)] == ["b"]
        lead_to("a")
        async with open_sqlite_store(name) as other:
            assert len(await all_sessions(other, now=T0)) == 2


@pytest.mark.parametrize("lose", LOSSES, indirect=True)
async def test_a_start_is_refused_while_others_serve_the_file_that_was_there(
    path: Path, lose: Callable[[Path], object]
) -> None:
    async with open_and_lose(path):
        lose(path)
        before = {file: file.stat().st_ino for file in path.parent.iterdir()}  # noqa: ASYNC240
        for _ in range(2):
            with pytest.raises(StartupError, match="still serves the file that was there before"):
                async with open_sqlite_store(path):
                    pytest.fail("it has another truth")
        assert {file: file.stat().st_ino for file in path.parent.iterdir()} == before, "nothing was made"  # noqa: ASYNC240
    async with open_sqlite_store(path) as store:
        assert [session.id for session in await all_sessions(store, now=T0)] == []


async def test_a_start_goes_on_while_another_process_makes_the_same_files(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(path):
        pass  # the last close removes the log file, so the next opening makes a new one
    files, other = open_files.OpenFiles(path), open_files.OpenFiles(path)
    looks: list[tuple[open_files.Identity, ...]] = []
    with ExitStack() as opened:
        other.refuse_others()

        def look_then_let_the_other_open() -> tuple[open_files.Identity, ...]:
            looks.append(open_files.OpenFiles._look(files))
            if len(looks) == 1:
                db = opened.enter_context(closing(database.connect(path)))
                with database.transaction(db):
                    other.note_opened(db)
            return looks[-1]

        monkeypatch.setattr(files, "_look", look_then_let_the_other_open)
        files.refuse_others()
        files.close()
        other.close()
    assert None in looks[0]
    assert None not in looks[-1]


@pytest.mark.processes
def test_the_file_of_a_dead_process_can_be_served_again(path: Path) -> None:
    script = """
import sys, trio
from service.storage.sqlite import open_sqlite_store
from service.stop_state import Phase

async def main():
    async with open_sqlite_store(sys.argv[1]):
        print("open", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""

    async def start() -> str:
        try:
            async with open_sqlite_store(path):
                return "open"
        except StartupError as refused:
            return str(refused)

    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert trio.run(start) == "open", "they share it"
        remove(path)
        assert "still serves" in trio.run(start)
        process.kill()
        process.wait()
        assert trio.run(start) == "open"


async def test_a_store_that_is_closed_leaves_what_others_have_put_in_its_place(path: Path) -> None:
    async with open_and_lose(path) as store:
        await store.create_session(a_session(), now=T0)
        remove(path)
        database.create_file(path)
        other = database.connect(path)
        other.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0
    with closing(other), closing(database.connect(path)) as third:
        assert third.execute("SELECT x FROM t").get == 1
        third.execute("INSERT INTO t VALUES (2)")
        assert other.execute("SELECT count(*) FROM t").get == 2


@pytest.mark.processes
async def test_a_store_that_lost_its_log_writes_nothing_of_it_into_the_file_when_it_is_closed(path: Path) -> None:
    async with open_and_lose(path) as store:
        await store.create_session(a_session(), now=T0)
        for ending in ("-wal", "-shm"):
            Path(f"{path}{ending}").unlink()  # noqa: ASYNC240
        script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('CREATE TABLE t AS SELECT 1 AS x')"
        await trio.run_process([sys.executable, "-c", f"{script}; db.commit(); db.close()", str(path)])
    with closing(database.connect(path)) as other:
        assert other.execute("SELECT x FROM t").get == 1
        assert other.execute("PRAGMA integrity_check").get == "ok"


async def test_a_folder_that_may_not_be_read_is_no_hindrance(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(open_files, "OfdLocks", refuse)
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)


async def test_a_service_notices_without_a_caller_and_tells_no_end_as_stored(path: Path) -> None:
    settings = Settings(store_url=f"sqlite:{path}", model_url="scripted:?tokens=1000000&rate=100&first_token_s=0")
    with trio.fail_after(60):
        async with open_service(settings) as service:
            sessions = service.sessions
            await sessions.create_session(NewSession(id="s"))
            turn, watch = await sessions.start_turn("s", NewTurn(text="hi", background=True))
            watch.release()
            remove(path)
            while sessions.pending_writes.refusal is None:  # noqa: ASYNC110  readiness depends on it
                await trio.sleep(0.05)
            with pytest.raises(StoreError, match=FAULT):
                await sessions.start_turn("s", NewTurn(text="hi", on_conflict="queue"))
            await sessions.cancel_turn("s", turn.id)
            assert not turn.stored
            assert b'"stored":false' in frames_of(turn.log)[-1]
            service.shutdown.notice("test")
            await service.shutdown.reached(Phase.RELEASING)
        faults = service.shutdown.report(tasks_left=0).faults
        assert any("the end of 2 turns is not in the store" in fault for fault in faults)
        assert any("closing the store" in fault and "deleted or replaced" in fault for fault in faults)
