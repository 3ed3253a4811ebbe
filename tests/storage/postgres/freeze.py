"""Writes down what this version does with a store, before a release: ``just freeze`` writes ``fixtures/``.

Later versions are held to these files (:mod:`tests.storage.postgres.test_versions`): ``version_N.sql`` is a dump of a
store that this code has filled, ``version_N.json`` what this code reads from it, and ``statements_N.jsonl`` what this
code executes and receives, on which connection. N is the number of the schema. The files of a version that was released
never change; those of one that was not may be written again.
"""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import trio

from bench.database import binaries
from service.storage.pieces import run_of
from service.storage.postgres import PostgresStore, connections, event_pages, open_postgres_store, owners, schema
from service.storage.records import (
    Checkpoint,
    IdempotencyKey,
    Item,
    SessionPatch,
    SessionStatus,
    SuspendedTurn,
    TitleSource,
    TurnRecord,
)
from tests.postgres_server import PostgresServer, start_server
from tests.storage.rows import T0, a_session, a_turn, adopt, at, contents, ended, said

FIXTURES = Path(__file__).parent / "fixtures"
KEY = IdempotencyKey(caller="ann", key="a", fingerprint=b"\x00f")
SEARCHED, FOUND = "word", {"s", "copy", "ann/s", "x"}
OPEN = {"open": "Hello world", "queued": ""}
"""The turns that are open in the dump, and what their checkpoints have kept."""
_LONG_ROW = 4096
"""The longest turn in one row while the store is filled, so that a turn of several rows is short."""
_LEFT_OUT = re.compile(r"--.*|\\.*|SET .*|SELECT pg_catalog\.set_config.*|\s*")
"""Lines of a dump that say nothing of the store."""


class Recorder:
    """Notes each statement with its parameters and its rows, in the order of all connections."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.lines: list[list[Any]] = []
        self._numbers: dict[int, int] = {}
        self._connections: list[object] = []
        self._lock = threading.Lock()

    def note(self, connection: object, text: str, parameters: Any, result: Any) -> None:
        with self._lock:
            if id(connection) not in self._numbers:
                self._numbers[id(connection)] = len(self._numbers)
                self._connections.append(connection)  # so that no other one gets its id
            if text not in self.texts:
                self.texts.append(text)
            given = None if parameters is None else _encoded(parameters)
            self.lines.append([self._numbers[id(connection)], self.texts.index(text), given, result])

    def write(self) -> str:
        return "".join(msgspec.json.encode(line).decode() + "\n" for line in (*self.texts, *self.lines))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Note what stores do that are opened in the context."""
        db = connections.Db
        execute, start, commit, roll_back = db.execute, db.start, db.commit, db.roll_back

        def noting_execute(it: connections.Db, statement: str, parameters: Any = None) -> connections.Cursor:
            cursor = execute(it, statement, parameters)
            rows: Any = cursor.rowcount
            if cursor.description is not None:
                rows = _encoded(cursor.fetchall())
                if rows:
                    cursor.scroll(0, mode="absolute")
            self.note(it, statement, parameters, rows)
            return cursor

        def noting_start(it: connections.Db) -> None:
            opening = it._opening
            start(it)
            if opening is not None:
                self.note(it, opening.text, None, "opening" if opening.checked is not None else None)

        def noting_end(end: Callable[[connections.Db], None], text: str) -> Callable[[connections.Db], None]:
            def noting(it: connections.Db) -> None:
                was_open = it.is_open
                end(it)
                if was_open:
                    self.note(it, text, None, None)

            return noting

        with (
            mock.patch.object(db, "execute", noting_execute),
            mock.patch.object(db, "start", noting_start),
            mock.patch.object(db, "commit", noting_end(commit, "COMMIT")),
            mock.patch.object(db, "roll_back", noting_end(roll_back, "ROLLBACK")),
            mock.patch.object(db, "pipeline", _one_by_one),
            mock.patch.object(owners, "BEAT_S", 3600),
            mock.patch.object(event_pages, "ROW_LENGTH_MAX", _LONG_ROW),
        ):
            yield


@contextmanager
def _one_by_one(it: connections.Db) -> Iterator[None]:
    """In place of a pipeline: so each statement has its rows when it is noted."""
    it.start()
    yield


def _encoded(value: Any) -> Any:
    match value:
        case bytes() | memoryview():
            return {"bytes": bytes(value).hex()}
        case dict():
            return {name: _encoded(it) for name, it in value.items()}
        case list() | tuple():
            return [_encoded(it) for it in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"a fixture has no {type(value)}")


async def fill(store: PostgresStore) -> None:
    """Make each kind of row, by each kind of step."""

    async def have(turn: TurnRecord, *, text: str = "answer word", **fields: Any) -> None:
        await store.begin_turn(turn, now=T0, head=msgspec.UNSET, path_bytes_max=1000)
        done = ended(turn, text=text, **fields)
        await store.end_turn(done, runs=_runs_of(done), now=T0)

    await store.create_session(a_session("s"), now=T0)
    await have(a_turn("a", "s", texts=("question", "word")), reasoning="hm")
    await have(a_turn("b", "s", parent="a"), reasoning="hm")
    await have(a_turn("b2", "s", parent="a"))
    await have(a_turn("c", "s", parent="b"), text="")
    await store.add_turns([_complete("d", "s", parent="c"), _complete("e", "s", parent="d")], now=T0, key=_key("added"))
    await store.update_session("s", SessionPatch(title="title", metadata={"team": "one"}, head="e"), now=T0)
    await store.fork_session("s", at="b", copy_id="copy", now=T0, key=_key("forked"))
    owned = msgspec.structs.replace(a_session("ann/s"), metadata={"team": "one", "n": "1"})
    await store.begin_turn(a_turn("first", "ann/s"), now=T0, creates=owned, key=KEY)
    first = ended(a_turn("first", "ann/s"))
    await store.end_turn(first, runs=_runs_of(first), now=T0)
    await have(a_turn("long", "ann/s", parent="first"), text=2 * _LONG_ROW // 5 * "word ")
    session = await store.get_session("ann/s", now=T0)
    await store.keep_title(session, "its title", usage=None, now=T0, source=TitleSource.of(first))
    await _suspend_and_adopt(store)
    await _remove(store)
    await _read(store)
    await store.create_session(a_session("x"), now=T0)
    await store.update_session("x", SessionPatch(title="title word"), now=T0)
    await store.begin_turn(a_turn("open", "x"), now=T0)
    await store.start_turn("open", now=T0)
    item = Item(id="open-out", role="assistant", text="")
    for after, text in enumerate(("Hello", " world")):
        checkpoint = Checkpoint(
            session_id="x", turn_id="open", after=after, runs=said(text), text=text, items=(item,) if not after else ()
        )
        await store.checkpoint_turns([checkpoint])
    await store.begin_turn(a_turn("queued", "x", parent="open", state="queued"), now=T0)


async def _suspend_and_adopt(store: PostgresStore) -> None:
    for number, mode in enumerate(("continue", "retry")):
        turn = msgspec.structs.replace(a_turn(f"moved{number}", "moved"), on_interrupt=mode)
        creates = a_session("moved") if number == 0 else None
        await store.begin_turn(turn, now=T0, creates=creates)
        so_far = msgspec.structs.replace(
            turn, output=(Item(id=f"{turn.id}-out", role="assistant", text="so far"),), last_seq=2
        )
        await store.suspend_turns([SuspendedTurn(turn=so_far, runs=said("so", " far"))], now=T0)
        await store.list_suspended(limit=10)
        (adopted,) = await adopt(store, "moved", now=T0, continues=lambda it: it.on_interrupt == "continue")
        text = "so far" if mode == "continue" else "anew"
        done = msgspec.structs.replace(ended(adopted.turn, text=text), last_seq=adopted.turn.last_seq + 1)
        await store.end_turn(done, runs=adopted.runs if mode == "continue" else _runs_of(done), now=T0)


async def _remove(store: PostgresStore) -> None:
    for name in ("gone", "marked"):
        await store.create_session(a_session(name), now=T0, added=[_complete(f"{name}-{n}", name) for n in range(1)])
    for number in range(3):
        turn = a_turn(f"gone{number}", "gone", parent=f"gone{number - 1}" if number else "gone-0")
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    await store.delete_item("gone", "gone2-out", now=T0)
    await store.delete_turn("gone", "gone1", now=T0)
    await store.delete_turns("gone", "gone0", now=T0)
    await store.mark_deleted("marked", now=T0)
    await store.is_marked("marked")
    await store.remove_deleted("marked")
    await store.create_session(a_session("late", idle_timeout_s=1), now=T0)
    await store.delete_expired(now=at(5), limit=10)
    await store.mark_deleted("gone", now=T0)
    await store.remove_deleted("gone")
    await store.forget_keys(now=at(5), limit=10)
    await store.recover(now=T0)


async def _read(store: PostgresStore) -> None:
    statuses: tuple[SessionStatus | None, ...] = (None, "idle", "running")
    for status in statuses:
        await store.list_sessions(limit=2, after=None, status=status, now=T0)
        await store.count_sessions(status=status, now=T0)
    page = await store.list_sessions(limit=1, after=None, status=None, now=T0)
    await store.list_sessions(limit=1, after=page.next, status=None, now=T0, owner="ann")
    await store.list_sessions(limit=5, after=None, status=None, now=T0, metadata={"team": "one", "n": "1"})
    await store.search_sessions("question word", limit=1, after=None, status=None, now=T0)
    await store.search_sessions("word", limit=1, after=None, status=None, now=T0, owner="ann")
    await store.get_turn("s", "a", now=T0, with_texts=False)
    await store.get_reply("s", "a", now=T0)
    await store.find_session_of("a")
    await store.find_item("s", "a-out", now=T0)
    await store.list_turns("s", limit=2, after=None, now=T0, parent="a")
    await store.list_turns("s", limit=2, after=None, now=T0, bytes_max=1)
    await store.list_tree("s", limit=2, after=None, now=T0)
    await store.find_places("s", ["a", "b2"])
    await store.read_path("s", "e", bytes_max=None)
    await store.read_path("s", "e", bytes_max=10)
    await store.measure_path("s", "e")
    await store.find_on_path("s", "e", among=["a", "b2"])
    await store.list_path("s", "e", limit=2, first="b", bytes_max=10)
    await store.read_events("ann/s", "long", after=1, length_max=100)
    await store.find_owner("s")


def _key(name: str) -> IdempotencyKey:
    return IdempotencyKey(caller="", key=name, fingerprint=b"f")


def _complete(name: str, session: str, *, parent: str | None = None) -> TurnRecord:
    return ended(a_turn(name, session, parent=parent), text="added word")


def _runs_of(turn: TurnRecord) -> tuple[Any, ...]:
    return tuple(
        run_of(number, [len(item.text) - len(item.text) // 2, len(item.text) // 2])
        for number, item in enumerate(turn.output)
        if item.text
    )


async def record(server: PostgresServer, name: str) -> tuple[str, bytes, str]:
    """Fill a store in a schema. Returns the dump, what is read from the store, and the statements."""
    recorder = Recorder()
    with recorder.installed():
        async with open_postgres_store(server.url, schema_name=name) as store:
            assert isinstance(store, PostgresStore)
            await fill(store)
            read = msgspec.json.format(msgspec.json.encode(await contents(store, now=T0)), indent=1)
    return await trio.to_thread.run_sync(_dump, server, name), read, recorder.write()


def _dump(server: PostgresServer, name: str) -> str:
    programs = binaries()
    assert programs is not None
    options = ("--inserts", "--rows-per-insert=100", "--no-owner", "--no-privileges", f"--schema={name}")
    command: list[str | Path] = [programs / "pg_dump", *options, server.url_of("lastcall", entrance=server.directory)]
    dumped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept = [line for line in dumped.splitlines() if not _LEFT_OUT.fullmatch(line)]
    return "\n".join(kept).replace(f"{name}.", "{s}.").replace(f"SCHEMA {name};", "SCHEMA {s};") + "\n"


async def main() -> None:
    number = len(schema.SCRIPTS)
    server = start_server(_programs())
    try:
        dump, read, statements = await record(server, "frozen")
    finally:
        server.stop()
    for name, data in (
        (f"version_{number}.sql", dump.encode()),
        (f"version_{number}.json", read),
        (f"statements_{number}.jsonl", statements.encode()),
    ):
        (FIXTURES / name).write_bytes(data)
        sys.stdout.write(f"{FIXTURES / name}: {len(data)} bytes\n")


def _programs() -> Path:
    found = binaries()
    if found is None:
        sys.exit("there is no PostgreSQL server: install the package postgresql")
    return found


if __name__ == "__main__":
    trio.run(main)
