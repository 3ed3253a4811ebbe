"""A call's cost does not grow with the stored data: every statement finds its rows by an index."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import apsw
import msgspec
import pytest

from service.errors import RepeatedError, SessionNotFoundError
from service.storage.page_cursor import TurnPosition, encode_cursor
from service.storage.records import IdempotencyKey, Item, Places, SessionPatch, Siblings, TurnRecord
from service.storage.rules import revision_of
from service.storage.sqlite import SqliteStore, database, open_sqlite_store, reclaim
from service.storage.sqlite.reclaim import reclaim_some
from service.storage.sqlite.writer import Writer
from tests.storage.rows import T0, a_session, a_turn, at, ended, said
from tests.storage.sqlite.many_rows import TREE, fill, fill_tree
from tests.storage.test_store_added_turns import a_beginning, an_added_turn
from tests.storage.test_store_owners import a_checkpoint

LATE = at(3601)
A_KEY = IdempotencyKey(caller="", key="k", fingerprint=b"f")


async def _delete(store: SqliteStore, session: str) -> None:
    await store.mark_deleted(session, now=T0)
    await store.remove_deleted(session)


async def _fork_over_an_expired_one(store: SqliteStore) -> None:
    await store.update_session("copy", SessionPatch(idle_timeout_s=7200), now=T0)
    await store.fork_session("copy", at=None, copy_id="sess_000001", now=LATE)


def _ephemeral(session: str) -> TurnRecord:
    return msgspec.structs.replace(a_turn(f"e-{session}", session), ephemeral=True)


FOR_ONE_TURN = msgspec.structs.replace(a_session("alone"), ephemeral=True)


async def _second_page(store: SqliteStore) -> object:
    first = await store.list_sessions(limit=10, after=None, status=None, now=T0)
    return await store.list_sessions(limit=10, after=first.next, status=None, now=T0)


async def _title(store: SqliteStore) -> None:
    await store.create_session(a_session("untitled"), now=T0)
    session = await store.get_session("untitled", now=T0)
    assert await store.keep_title(session, "x", usage=None, now=T0)


async def _check_key(store: SqliteStore) -> None:
    with pytest.raises(RepeatedError):
        await store.check_key(A_KEY, now=T0)


async def _search(store: SqliteStore) -> object:
    """Two pages of a search that finds two titles."""
    for name in ("sess_000100", "sess_000103"):
        await store.update_session(name, SessionPatch(title="a title"), now=T0)
    first = await store.search_sessions("a title", limit=1, after=None, status=None, now=T0)
    assert first.next is not None
    return await store.search_sessions("a title", limit=1, after=first.next, status=None, now=T0)


async def _pages_by_metadata(store: SqliteStore) -> object:
    pairs = {"team": "blue", "vip": "yes"}
    for name in ("sess_000100", "sess_000103"):
        await store.update_session(name, SessionPatch(metadata=pairs), now=T0)
    first = await store.list_sessions(limit=1, after=None, status=None, metadata=pairs, now=T0)
    assert first.next is not None
    return await store.list_sessions(limit=1, after=first.next, status=None, metadata=pairs, now=T0)


async def _delete_a_call(store: SqliteStore) -> None:
    call = an_added_turn("call", parent="turn_000105_1", asked="Hi", replied="")
    made = (Item(id="c", type="function_call", role="assistant", text="{}", call_id="1", name="f"),)
    brought = (Item(id="r", type="function_call_output", role="user", text="x", call_id="1"),)
    turns = (
        msgspec.structs.replace(call, output=made),
        msgspec.structs.replace(an_added_turn("answer", parent="call"), input=brought),
    )
    await store.add_turns([msgspec.structs.replace(it, session_id="sess_000105") for it in turns], now=T0)
    await store.delete_item("sess_000105", "c", now=T0)


async def _create_with_turns(store: SqliteStore) -> None:
    session, added = a_beginning(an_added_turn("begun"), session_id="begun")
    await store.create_session(session, now=T0, added=added)


async def _delete_a_turn_alone(store: SqliteStore) -> None:
    """The last turn of a session, which goes too, with the emptied turns above it."""
    chain = [an_added_turn(f"one{n}", parent=f"one{n - 1}" if n else None) for n in range(3)]
    await store.create_session(a_session("one"), now=T0)
    await store.add_turns([msgspec.structs.replace(turn, session_id="one") for turn in chain], now=T0)
    revision = revision_of(await store.get_session("one", now=T0))
    for turn in chain:
        await store.delete_turn("one", turn.id, now=T0, session_revisions=[revision])
    with pytest.raises(SessionNotFoundError):
        await store.get_session("one", now=T0)


CALLS: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
    "create": lambda store: store.create_session(a_session("new"), now=T0),
    "create over an expired one": lambda store: store.create_session(a_session("sess_000000"), now=LATE),
    "create with turns": _create_with_turns,
    "fork": lambda store: store.fork_session("sess_000102", at="turn_000102_0", copy_id="copy", now=T0),
    "fork over an expired one": _fork_over_an_expired_one,
    "get": lambda store: store.get_session("sess_000100", now=T0),
    "update": lambda store: store.update_session("sess_000100", SessionPatch(title="x"), now=T0),
    "title": _title,
    "delete": lambda store: _delete(store, "sess_000101"),
    "begin": lambda store: store.begin_turn(a_turn("new", "sess_000100", parent="turn_000100_1"), now=T0),
    "begin with its session": lambda store: store.begin_turn(a_turn("new1", "new1"), now=T0, creates=a_session("new1")),
    "begin and read its path": lambda store: store.begin_turn(
        a_turn("new2", "sess_000100", parent="turn_000100_1"), now=T0, path_bytes_max=None
    ),
    "add": lambda store: store.add_turns(
        [msgspec.structs.replace(an_added_turn("added", parent="turn_000100_1"), session_id="sess_000100")], now=T0
    ),
    "begin a branch": lambda store: store.begin_turn(
        a_turn("new3", "sess_000103", parent="turn_000103_0"), now=T0, branches=True
    ),
    "begin one more branch": lambda store: store.begin_turn(
        a_turn("new4", "sess_000103", parent="turn_000103_0"), now=T0, branches=True
    ),
    "move the head": lambda store: store.update_session("sess_000104", SessionPatch(head="turn_000104_0"), now=T0),
    "places": lambda store: store.find_places("sess_000103", ["new4", "turn_000103_0"]),
    "siblings": lambda store: store.list_turns("sess_000103", limit=2, after=None, now=T0, parent="turn_000103_0"),
    "tree": lambda store: store.list_tree("sess_000103", limit=2, after=None, now=T0),
    "start": lambda store: store.start_turn("new", now=T0),
    "checkpoint": lambda store: store.checkpoint_turns([a_checkpoint("new", "x", session="sess_000100")]),
    "end": lambda store: store.end_turn(ended(a_turn("new", "sess_000100")), runs=said("Hi"), now=T0),
    "begin an ephemeral turn": lambda store: store.begin_turn(_ephemeral("sess_000100"), now=T0),
    "end an ephemeral turn": lambda store: store.end_turn(ended(_ephemeral("sess_000100")), runs=(), now=T0),
    "begin with an ephemeral session": lambda store: store.begin_turn(
        _ephemeral("alone"), now=T0, creates=FOR_ONE_TURN
    ),
    "end an ephemeral session": lambda store: store.end_turn(ended(_ephemeral("alone")), runs=(), now=T0),
    "delete an item": lambda store: store.delete_item("sess_000100", "added-out", now=T0),
    "delete a call": _delete_a_call,
    "delete a turn that another follows": lambda store: store.delete_turn("sess_000106", "turn_000106_0", now=T0),
    "delete a turn alone": _delete_a_turn_alone,
    "delete turns": lambda store: store.delete_turns("sess_000100", "added", now=T0),
    "get turn": lambda store: store.get_turn("sess_000100", "turn_000100_1", now=T0),
    "events": lambda store: store.read_events("sess_000100", "turn_000100_1"),
    "path": lambda store: store.read_path("sess_000100", "turn_000100_1", bytes_max=None),
    "measure": lambda store: store.measure_path("sess_000100", "turn_000100_1"),
    "path in pages": lambda store: store.list_path("sess_000100", "turn_000100_1", limit=1, first=None),
    "turns": lambda store: store.list_turns("sess_000100", limit=1, after=None, now=T0),
    "owner": lambda store: store.find_owner("sess_000100"),
    "first page": lambda store: store.list_sessions(limit=10, after=None, status=None, now=T0),
    "second page": _second_page,
    "idle page": lambda store: store.list_sessions(limit=10, after=None, status="idle", now=T0),
    "running page": lambda store: store.list_sessions(limit=10, after=None, status="running", now=T0),
    "create of an owner": lambda store: store.create_session(a_session("ann/new"), now=T0),
    "page of an owner": lambda store: store.list_sessions(limit=10, after=None, status=None, owner="ann", now=T0),
    "idle page of an owner": lambda store: store.list_sessions(
        limit=10, after=None, status="idle", owner="ann", now=T0
    ),
    "running page of an owner": lambda store: store.list_sessions(
        limit=10, after=None, status="running", owner="ann", now=T0
    ),
    "page without an owner": lambda store: store.list_sessions(limit=10, after=None, status=None, owner="", now=T0),
    "count of an owner": lambda store: store.count_sessions(status=None, owner="ann", now=T0),
    "count of an owner, idle": lambda store: store.count_sessions(status="idle", owner="bob", now=T0),
    "search": _search,
    "page by metadata": _pages_by_metadata,
    "expire": lambda store: store.delete_expired(now=LATE, limit=10),
    "recover": lambda store: store.recover(now=T0),
    "create with a key": lambda store: store.create_session(a_session("new3"), now=T0, key=A_KEY),
    "begin with a key": lambda store: store.begin_turn(
        a_turn("new4", "sess_000100", parent="turn_000100_1"), now=T0, key=msgspec.structs.replace(A_KEY, key="other")
    ),
    "check a key": _check_key,
    "forget keys": lambda store: store.forget_keys(now=LATE, limit=10),
    "reclaim": lambda store: store._writing.call(reclaim_some),
}


async def _die_at_work(path: Path) -> None:
    """Leave the open turns and marked sessions of a dead owner."""
    async with open_sqlite_store(path) as store:
        for name in ("s1", "s2"):
            await store.create_session(a_session(name), now=T0)
            await store.begin_turn(a_turn(f"{name}-t", name), now=T0)
        await store.mark_deleted("s2", now=T0)


class Counted:
    """The statements that a store runs, and their cost in hundreds of instructions of SQLite's machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statements: set[str] = set()
        self.hundreds = 0
        connect = database.connect

        def connect_and_count(path: Path, *, query_only: bool = False) -> apsw.Connection:
            db = connect(path, query_only=query_only)
            db.exec_trace = self._note
            db.set_progress_handler(self._count, 100)
            return db

        monkeypatch.setattr(database, "connect", connect_and_count)
        monkeypatch.setattr(reclaim, "STEP_S", 60)  # all of it, on a slow machine as well
        monkeypatch.setattr(Writer, "run_housekeeping", lambda _, *, idle: None)  # noqa: ARG005  only the calls are counted

    def _note(self, _cursor: object, sql: str, _bindings: object) -> bool:
        self.statements.add(sql)
        return True

    def _count(self) -> bool:
        self.hundreds += 1
        return False


async def test_every_statement_of_every_call_searches_an_index(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    await _die_at_work(path)
    async with open_sqlite_store(path) as store:
        await store._writing.call(lambda db: fill(db, 200))
        counted.statements.clear()
        for call in CALLS.values():
            await call(store)
    db = apsw.Connection(str(path))
    plans = {sql: _plan(db, sql) for sql in counted.statements if re.match("SELECT|INSERT|UPDATE|DELETE", sql)}
    db.close()
    assert len(plans) > 20
    scans = {sql: plan for sql, plan in plans.items() if any(_is_scan(sql, step) for step in plan)}
    assert scans == {}
    by_id = {sql: plan for sql, plan in plans.items() if re.search("turns .*WHERE id = [?:]", sql)}
    assert by_id
    assert all("turns_by_id" in plan[0] for plan in by_id.values()), by_id


def _plan(db: apsw.Connection, sql: str) -> list[str]:
    names = set(re.findall(r":(\w+)", sql))
    bindings: object = dict.fromkeys(names, 1) if names else (1,) * sql.count("?")
    return [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", bindings)]  # type: ignore[arg-type]


def _is_scan(sql: str, step: str) -> bool:
    if "TEMP B-TREE" in step:
        return True
    if not step.startswith("SCAN") or re.search("VIRTUAL TABLE INDEX [0-9]+:.", step):
        return False
    # There are only as many owners as processes, few sessions run, and few turns wait in ``unindexed``. A listing walks
    # an index in its order and stops at its limit.
    few = "owners" in step or "INDEX running_sessions_by_age" in step or "unindexed" in step
    return not few and not (re.search("USING (COVERING )?INDEX", step) and "LIMIT" in sql)


async def test_the_work_of_a_call_is_the_same_with_a_thousand_and_with_a_hundred_thousand_sessions(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)

    async def work(path: Path, sessions: int) -> dict[str, int]:
        await _die_at_work(path)
        async with open_sqlite_store(path) as store:
            await store._writing.call(lambda db: fill(db, sessions))
            found = {}
            for name, call in CALLS.items():
                counted.hundreds = 0
                await call(store)
                found[name] = counted.hundreds
            return found

    few = await work(path, 1000)
    many = await work(path.with_name("many.db"), 100_000)
    assert {name: (few[name], many[name]) for name in CALLS if many[name] > few[name] + 1} == {}


LISTINGS: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
    f"{status or 'page'} of {owner!r}": lambda store, status=status, owner=owner: store.list_sessions(  # type: ignore[misc]
        limit=10, after=None, status=status, owner=owner, now=T0
    )
    for status in (None, "idle", "running")
    for owner in ("", "bob", None)
}
COUNTS: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
    f"count of {owner!r}, {status}": lambda store, status=status, owner=owner: store.count_sessions(  # type: ignore[misc]
        status=status, owner=owner, now=T0
    )
    for status in (None, "idle", "running")
    for owner in ("", "bob")
}


async def test_the_work_of_a_listing_does_not_grow_with_the_sessions_of_other_owners(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)

    async def work(path: Path, sessions: int) -> dict[str, int]:
        async with open_sqlite_store(path) as store:
            await store._writing.call(lambda db: fill(db, sessions, turns=1))
            await store._writing.call(
                lambda db: db.execute("UPDATE sessions SET owner_name = 'ann', id = 'ann/' || id")
            )
            for name in ("s", "bob/s"):
                await store.create_session(a_session(name, created=-1e6, idle_timeout_s=2e6), now=T0)
            found = {}
            for name, call in (LISTINGS | COUNTS).items():
                counted.hundreds = 0
                await call(store)
                found[name] = counted.hundreds
            return found

    few = await work(path, 100)
    many = await work(path.with_name("many.db"), 10_000)
    assert {name: (few[name], many[name]) for name in LISTINGS | COUNTS if many[name] > few[name] + 1} == {}


MIDDLE = 40
"""A turn in the middle of the smaller one of the two sessions."""


async def _delete_alone(store: SqliteStore) -> None:
    """A turn that another one follows, and then the other one, with what is left of the first."""
    for name, parent in (("first", f"turn_{MIDDLE}"), ("second", "first")):
        await store.add_turns([_in_tree(an_added_turn(name, parent=parent))], now=T0)
    revision = revision_of(await store.get_session(TREE, now=T0))
    for name in ("first", "second"):
        await store.delete_turn(TREE, name, now=T0, session_revisions=[revision])


TREE_CALLS: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
    "follow": lambda store: store.begin_turn(a_turn("f", TREE, parent="turn_newest"), now=T0),
    "retry": lambda store: store.begin_turn(a_turn("r", TREE, parent=f"turn_{MIDDLE}"), now=T0, branches=True),
    "one of many siblings": lambda store: store.begin_turn(a_turn("m", TREE, parent="turn_0"), now=T0, branches=True),
    "end": lambda store: store.end_turn(ended(a_turn("m", TREE, parent="turn_0")), runs=(), now=T0),
    "places": lambda store: store.find_places(TREE, ["m", "turn_newest", "turn_1", f"turn_{MIDDLE}"]),
    "siblings": lambda store: store.list_turns(TREE, limit=20, after=_after(MIDDLE), now=T0, parent="turn_0"),
    "children": lambda store: store.list_turns(TREE, limit=20, after=None, now=T0, parent=f"turn_{MIDDLE}"),
    "tree": lambda store: store.list_tree(TREE, limit=20, after=_after(MIDDLE), now=T0),
    "turns": lambda store: store.list_turns(TREE, limit=20, after=_after(MIDDLE), now=T0),
    "add": lambda store: store.add_turns([_in_tree(an_added_turn("added", parent=f"turn_{MIDDLE}"))], now=T0),
    "delete": lambda store: store.delete_turns(TREE, "added", now=T0),
    "delete alone": _delete_alone,
    "move the head": lambda store: store.update_session(
        TREE, SessionPatch(head="turn_0", seen_head=f"turn_{MIDDLE}"), now=T0
    ),
}


def _in_tree(turn: TurnRecord) -> TurnRecord:
    return msgspec.structs.replace(turn, session_id=TREE)


def _after(ordinal: int) -> str:
    return encode_cursor(TurnPosition(ordinal))


async def test_the_work_of_a_call_is_the_same_in_a_session_of_a_hundred_and_of_a_hundred_thousand_turns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)

    async def work(path: Path, turns: int) -> dict[str, int]:
        async with open_sqlite_store(path) as store:
            await store._writing.call(lambda db: fill_tree(db, turns))
            found = {}
            for name, call in TREE_CALLS.items():
                counted.hundreds = 0
                await call(store)
                found[name] = counted.hundreds
            places = await store.find_places(TREE, ["m"])
            assert places == Places("turn_0", {"m": Siblings(turns // 2 + 2, turns // 2 + 2)})
            return found

    few = await work(path, 100)
    many = await work(path.with_name("many.db"), 100_000)
    assert {name: (few[name], many[name]) for name in TREE_CALLS if many[name] > few[name] + 1} == {}
