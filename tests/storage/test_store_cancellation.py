"""A store call that is cancelled, at whichever wait, leaves its whole step behind or nothing."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import trio

from service.models.client import Usage
from service.storage import fork_path
from service.storage.postgres import forks as postgres_forks
from service.storage.records import SessionPatch, SuspendedTurn, TurnRecord
from service.storage.rules import revision_of
from service.storage.sqlite import forks as sqlite_forks
from service.storage.sqlite import tree_changes
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, Contents, a_session, a_turn, adopt, at, contents, ended, said, told
from tests.storage.test_store_added_turns import a_beginning, an_added_turn
from tests.storage.test_store_suspended import a_lasting_turn, so_far

WAITS_MAX = 500
"""More waits than any single call has."""


class CancelAtWait(trio.abc.Instrument):
    """Cancels the current task's scope at the moment when the task begins its ``nth`` wait."""

    def __init__(self, nth: int, scope: trio.CancelScope) -> None:
        self._left = nth
        self._scope = scope
        self._task = trio.lowlevel.current_task()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


async def _called_and_cancelled(call: Callable[[], Awaitable[object]], nth: int) -> bool:
    """Make a call and cancel it at its ``nth`` wait (0: before it begins). Returns whether the call was cancelled."""
    with trio.CancelScope() as scope:
        if nth == 0:
            scope.cancel()
        instrument = CancelAtWait(nth, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


@dataclass
class Everything:
    """The contents of a store: the visible ones, and those of hidden sessions."""

    visible: Contents
    earlier: Contents
    counts: list[int]
    hidden: list[object]
    removable: int


async def _look(store: Store) -> Everything:
    """Read everything from a store. Use it last: the read also removes expired sessions."""
    now = at(IDLE_TIMEOUT_S)
    hidden: list[object] = []
    for session_id, turn_id in [
        ("old", "told"),
        ("s", "t"),
        ("s", "queued"),
        ("s", "new"),
        ("marked", "tm"),
        ("waits", "w1"),
    ]:
        hidden += [
            list(await store.read_path(session_id, turn_id, bytes_max=None)),
            await told(store, session_id, turn_id),
        ]
    return Everything(
        visible=await contents(store, now=now),
        earlier=await contents(store, now=T0),
        counts=[await store.count_sessions(status=status, now=now) for status in (None, "idle", "running")],
        hidden=hidden,
        removable=await store.delete_expired(now=now, limit=100),
    )


async def _prepare(store: Store) -> None:
    """``old`` and ``older`` have expired by the time of the calls, ``s`` has open turns, ``marked`` is deleted, and the
    turns of ``waits`` are suspended."""
    for name in ("old", "older", "s", "marked"):
        await store.create_session(a_session(name), now=T0)
    for turn in (a_turn("told", "old"), a_turn("tm", "marked")):
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn), runs=said("H", "i"), now=T0)
    for name, parent in (("first", None), ("second", "first")):
        await store.begin_turn(a_turn(name, parent=parent), now=T0)
        await store.end_turn(ended(a_turn(name, parent=parent)), runs=said("H", "i"), now=T0)
    await store.begin_turn(a_turn("t"), now=T0)
    await store.begin_turn(a_turn("queued", state="queued", parent="t"), now=T0)
    await store.mark_deleted("marked", now=T0)
    await store.create_session(a_session("waits"), now=T0)
    waiting = [a_lasting_turn(name, "waits") for name in ("w1", "w2")]
    for turn in waiting:
        await store.begin_turn(turn, now=T0)
    await store.suspend_turns([so_far(turn, "Hel", "lo") for turn in waiting], now=T0)


NOW = at(IDLE_TIMEOUT_S)
BEGUN = a_beginning(an_added_turn("b1"), an_added_turn("b2", parent="b1"), session_id="old")
"""A session over an expired one."""
STEPS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "create": lambda store: store.create_session(a_session("fresh", created=IDLE_TIMEOUT_S), now=NOW),
    "create with turns": lambda store: store.create_session(BEGUN[0], now=NOW, added=BEGUN[1]),
    "fork": lambda store: store.fork_session("s", at="second", copy_id="fresh", now=NOW),
    "fork over an expired one": lambda store: store.fork_session("s", at="second", copy_id="old", now=NOW),
    "create over an expired one": lambda store: store.create_session(a_session("old", created=IDLE_TIMEOUT_S), now=NOW),
    "update": lambda store: store.update_session("s", SessionPatch(title="new", metadata={"a": "b"}), now=NOW),
    "title": lambda store: store.keep_title(a_session(), "new", usage=Usage(input_tokens=1, output_tokens=1), now=NOW),
    "mark": lambda store: store.mark_deleted("s", now=NOW),
    "remove": lambda store: store.remove_deleted("marked"),
    "expire": lambda store: store.delete_expired(now=NOW, limit=10),
    "begin": lambda store: store.begin_turn(a_turn("new", parent="queued", texts=["a", "b"]), now=NOW),
    "begin with its session": lambda store: store.begin_turn(
        a_turn("new", "old"), now=NOW, creates=a_session("old", created=IDLE_TIMEOUT_S), path_bytes_max=None
    ),
    "add": lambda store: store.add_turns(
        [an_added_turn("new", parent="first"), an_added_turn("newer", parent="new")], now=NOW
    ),
    "delete turns": lambda store: store.delete_turns("old", "told", now=T0),
    "delete a turn alone": lambda store: store.delete_turn("s", "first", now=T0),
    "delete the last turn with its session": lambda store: store.delete_turn(
        "old", "told", now=T0, session_revisions=[revision_of(a_session())]
    ),
    "delete an item": lambda store: store.delete_item("old", "told-out", now=T0),
    "start": lambda store: store.start_turn("queued", now=NOW),
    "end": lambda store: store.end_turn(
        ended(a_turn("t"), reasoning="hm", usage=Usage(input_tokens=1, output_tokens=2)),
        runs=said("H", "", "i"),
        now=NOW,
    ),
    "suspend": lambda store: store.suspend_turns(
        [so_far(a_turn("t"), "Hel", "lo"), SuspendedTurn(turn=a_turn("queued", state="queued", parent="t"), runs=())],
        now=NOW,
    ),
    "adopt": lambda store: adopt(store, "waits", now=NOW, continues=lambda turn: turn.id == "w1"),
    "recover": lambda store: store.recover(now=NOW),
}


@pytest.fixture
def _forks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy of a turn has the same id in each store, and copies are built in as many steps as there can be."""
    monkeypatch.setattr(fork_path, "new_item_id", lambda _type: "msg_")
    monkeypatch.setattr(sqlite_forks, "STEP_S", 0)
    monkeypatch.setattr(postgres_forks, "STEP_S", 0)
    monkeypatch.setattr(tree_changes, "STEP_S", 0)
    numbers: dict[str, int] = {}

    def number(path: fork_path.ForkPath, **changes: Any) -> Iterator[TurnRecord]:
        numbers["next"] = 0
        return copies_of(path, **changes)

    def new_turn_id() -> str:
        numbers["next"] += 1
        return f"turn_{numbers['next']}"

    copies_of = fork_path.copies_of
    monkeypatch.setattr(fork_path, "new_turn_id", new_turn_id)
    monkeypatch.setattr(fork_path, "copies_of", number)
    monkeypatch.setattr("service.storage.memory.store.copies_of", number)
    monkeypatch.setattr(sqlite_forks, "copies_of", number)
    monkeypatch.setattr(postgres_forks, "copies_of", number)


@pytest.mark.usefixtures("_forks_alike", "callers_wait")
@pytest.mark.parametrize("step", STEPS)
async def test_a_cancelled_step_leaves_all_or_nothing(open_store: OpenStore, step: str) -> None:
    async with open_store() as store:
        await _prepare(store)
        nothing = await _look(store)
    async with open_store() as store:
        await _prepare(store)
        await STEPS[step](store)
        whole = await _look(store)
    if step != "recover":
        assert whole != nothing, "the step does nothing, so this test would not see half of it"

    for nth in range(WAITS_MAX):
        async with open_store() as store:
            await _prepare(store)
            with trio.fail_after(60):
                hit = await _called_and_cancelled(partial(STEPS[step], store), nth)
            left = await _look(store)
        assert left in (nothing, whole), f"cancelled at wait {nth}"
        if nth == 0:
            assert hit, "a call in a cancelled scope raises"
            assert left == nothing
        if not hit:
            assert left == whole, "a call that returned is acknowledged"
            return
    pytest.fail(f"the step waits more than {WAITS_MAX} times")


READS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "get": lambda store: store.get_session("s", now=NOW),
    "list": lambda store: store.list_sessions(limit=2, after=None, status=None, now=NOW),
    "count": lambda store: store.count_sessions(status=None, now=NOW),
    "search": lambda store: store.search_sessions("hello", limit=2, after=None, status=None, now=NOW),
    "get turn": lambda store: store.get_turn("s", "t", now=NOW),
    "list turns": lambda store: store.list_turns("s", limit=1, after=None, now=NOW),
    "path": lambda store: store.read_path("s", "queued", bytes_max=None),
    "path in pages": lambda store: store.list_path("s", "queued", limit=1, first="t"),
    "events": lambda store: store.read_events("marked", "tm"),
}


@pytest.mark.usefixtures("callers_wait")
@pytest.mark.parametrize("read", READS)
async def test_a_cancelled_read_leaves_the_store_as_it_was(open_store: OpenStore, read: str) -> None:
    async with open_store() as store:
        await _prepare(store)
        expected = await READS[read](store)
        for nth in range(WAITS_MAX):
            with trio.fail_after(60):
                hit = await _called_and_cancelled(partial(READS[read], store), nth)
            assert await READS[read](store) == expected
            if not hit:
                return
    pytest.fail(f"the read waits more than {WAITS_MAX} times")
