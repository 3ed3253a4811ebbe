"""Calls with one idempotency key: races between the first call, its repetitions, its cancellation and the store."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    KeyReusedError,
    LastcallError,
    MadeIsGoneError,
    OwnedElsewhereError,
    RepeatedError,
    ShuttingDownError,
    StoreError,
    TurnInProgressError,
)
from service.sessions.commands import NewItems, NewSession, NewTurn, OnConflict, text_input
from service.sessions.turns.turn import Turn, Watch
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import BegunTurn, IdempotencyKey
from service.storage.sqlite import open_sqlite_store
from tests.sessions.late_store import LateStore, Outcome, open_late_store
from tests.sessions.puppet import IN_A_FILE, Stage, open_stage
from tests.sessions.unreliable_store import UnreliableStore

TIMEOUT_S = 5.0
KEY = IdempotencyKey(caller="", key="k", fingerprint=b"f")
OTHER_REQUEST = IdempotencyKey(caller="", key="k", fingerprint=b"g")

outcomes = pytest.mark.parametrize("outcome", ["lands", "is lost"])


class Barrier:
    """Tasks wait here for each other."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._all_here = trio.Event()

    async def wait(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._all_here.set()
        await self._all_here.wait()


class Calls:
    """Callers that start a turn with the key, and what each of them got."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.started: dict[str, tuple[Turn, Watch]] = {}
        self.told: dict[str, str] = {}
        """The turn of each call, also of one that had ended before."""
        self.refused: dict[str, LastcallError] = {}
        self.took_s: dict[str, float] = {}
        self.scopes: dict[str, trio.CancelScope] = {}

    async def start(
        self, name: str, session: str = "s", key: IdempotencyKey | None = KEY, on_conflict: OnConflict = "reject"
    ) -> None:
        asked_at = trio.current_time()
        new = NewTurn(items=text_input("Hi"), key=key, on_conflict=on_conflict, creates_session=True)
        with trio.CancelScope() as self.scopes[name]:
            try:
                self.started[name] = await self.stage.sessions.start_turn(session, new)
                self.told[name] = self.turn(name).id
            except RepeatedError as repeated:
                self.told[name] = repeated.turn_id or ""
            except LastcallError as error:
                self.refused[name] = error
        self.took_s[name] = trio.current_time() - asked_at

    def turn(self, name: str) -> Turn:
        return self.started[name][0]

    async def leave(self, name: str) -> None:
        """The client of this call leaves: the turn is cancelled if no other one watches it."""
        self.started.pop(name)[1].release()
        await wait_all_tasks_blocked()

    async def turns(self, session: str = "s") -> list[str]:
        return [turn.id for turn in (await self.stage.sessions.list_turns(session, limit=100)).data]


@asynccontextmanager
async def open_late_stage(**settings: object) -> AsyncIterator[tuple[Stage, LateStore, Calls]]:
    async with (
        open_late_store() as store,
        open_stage(store, store_timeout_s=TIMEOUT_S, cleanup_timeout_s=TIMEOUT_S, **settings) as stage,
    ):
        yield stage, store, Calls(stage)


async def test_repetitions_that_come_during_the_commit_share_the_turn(autojump_clock: MockClock) -> None:
    async with open_late_stage(live_turns_max=1) as (stage, store, calls):
        store.late, store.late_s = "begin_turn", 3.0  # more than callers wait for each other
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(calls.start, f"{number}")
                await trio.sleep(0.01)
        assert calls.refused == {}
        assert {turn for turn, _ in calls.started.values()} == {calls.turn("0")}
        assert await calls.turns() == [calls.turn("0").id]
        await stage.puppet.next_reply()
        assert len(stage.puppet.asked) == 1


async def test_a_turn_whose_first_caller_leaves_in_the_commit_goes_on_for_those_that_wait(
    autojump_clock: MockClock,
) -> None:
    async with open_late_stage() as (stage, store, calls), trio.open_nursery() as nursery:
        store.late, store.late_s = "begin_turn", 1.0
        nursery.start_soon(calls.start, "first")
        await trio.sleep(0.1)
        nursery.start_soon(calls.start, "second")
        await trio.sleep(0.1)
        calls.scopes["first"].cancel()
        await trio.sleep(2)
        await calls.leave("first")  # the commit is shielded; then the request ends, and its watch with it
        assert calls.turn("second").end is None
        await calls.leave("second")
        assert calls.refused == {}
        [turn] = (await stage.sessions.list_turns("s", limit=9)).data
        assert (turn.state, turn.reason) == ("cancelled", "disconnected")


async def test_a_repetition_that_is_cancelled_while_it_waits_holds_no_watch(autojump_clock: MockClock) -> None:
    async with open_late_stage() as (stage, store, calls), trio.open_nursery() as nursery:
        store.late, store.late_s = "begin_turn", 1.0
        nursery.start_soon(calls.start, "first")
        await wait_all_tasks_blocked()
        nursery.start_soon(calls.start, "second")
        nursery.start_soon(calls.start, "third")
        await wait_all_tasks_blocked()
        calls.scopes["second"].cancel()
        await trio.sleep(2)
        assert calls.started.keys() == {"first", "third"}
        await calls.leave("first")
        assert calls.turn("third").end is None
        await calls.leave("third")
        [turn] = (await stage.sessions.list_turns("s", limit=9)).data
        assert turn.state == "cancelled"


async def test_a_repetition_that_is_cancelled_in_the_moment_of_the_acceptance_gives_its_watch_back(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        calls, goes_on = Calls(stage), trio.Event()
        begin = stage.store.begin_turn

        async def begin_and_cancel(*args: object, **rest: object) -> object:
            begun = await begin(*args, **rest)  # type: ignore[arg-type]
            await goes_on.wait()
            calls.scopes["second"].cancel()  # it is delivered once the first call has returned
            return begun

        stage.store.begin_turn = begin_and_cancel  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.start, "first")
            await wait_all_tasks_blocked()
            nursery.start_soon(calls.start, "second")
            await wait_all_tasks_blocked()
            goes_on.set()
        assert calls.started.keys() == {"first"}
        first = calls.turn("first")
        assert first.end is None
        await calls.leave("first")
        assert first.end is not None


async def test_another_request_with_the_key_waits_and_is_refused_once_the_first_is_accepted(
    autojump_clock: MockClock,
) -> None:
    async with open_late_stage() as (_, store, calls), trio.open_nursery() as nursery:
        store.late, store.late_s = "begin_turn", 1.0
        nursery.start_soon(calls.start, "first")
        await wait_all_tasks_blocked()
        nursery.start_soon(calls.start, "other", "s", OTHER_REQUEST)
        await wait_all_tasks_blocked()
        assert calls.refused == {}
        await trio.sleep(2)
        assert calls.started.keys() == {"first"}
        assert isinstance(calls.refused["other"], KeyReusedError)


async def test_the_repetitions_of_a_call_that_is_refused_are_decided_anew(autojump_clock: MockClock) -> None:
    async with open_late_stage() as (stage, store, calls):
        await calls.start("in the way", key=None)
        store.late, store.late_s = "check_key", 1.0
        async with trio.open_nursery() as nursery:
            for name, key in (("first", KEY), ("second", KEY), ("other", OTHER_REQUEST)):
                nursery.start_soon(calls.start, name, "s", key)
                await wait_all_tasks_blocked()
        assert {name: type(error) for name, error in calls.refused.items()} == dict.fromkeys(
            ("first", "second", "other"), TurnInProgressError
        )
        (await stage.puppet.next_reply()).finish()
        await calls.turn("in the way").wait_ended()
        await wait_all_tasks_blocked()
        await calls.start("later", key=OTHER_REQUEST)
        assert calls.turn("later").end is None


@pytest.mark.parametrize("on_conflict", ["reject", "queue", "supersede"])
async def test_a_repetition_meets_neither_the_turn_of_its_key_nor_a_limit(
    on_conflict: OnConflict, autojump_clock: MockClock
) -> None:
    async with open_stage(live_turns_max=1, queued_turns_max=1) as stage:
        calls = Calls(stage)
        for name in ("first", "second", "third"):
            await calls.start(name, on_conflict=on_conflict)
        assert calls.refused == {}
        assert {turn for turn, _ in calls.started.values()} == {calls.turn("first")}
        assert calls.turn("first").end is None


async def test_a_repetition_does_not_supersede_the_turn_that_came_after_the_one_of_its_key(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        calls = Calls(stage)
        await calls.start("first", on_conflict="supersede")
        await calls.start("next", key=None, on_conflict="supersede")
        await wait_all_tasks_blocked()
        await calls.start("again", on_conflict="supersede")
        assert calls.told["again"] == calls.turn("first").id
        assert calls.turn("next").end is None


async def test_each_of_many_repetitions_is_answered_in_time_while_the_store_hangs(autojump_clock: MockClock) -> None:
    async with open_late_stage() as (_, store, calls):
        store.late, store.late_s = "begin_turn", 100.0
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(calls.start, f"{number}")
                await trio.sleep(0.1)
        assert {type(error) for error in calls.refused.values()} == {StoreError}
        assert max(calls.took_s.values()) <= TIMEOUT_S + 0.001
        await trio.sleep(200)


async def test_a_repetition_that_waited_has_the_rest_of_its_own_time(autojump_clock: MockClock) -> None:
    async with open_late_stage() as (_, store, calls):
        await calls.start("in the way", key=None)
        store.late, store.late_s = "check_key", 2.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.start, "first")
            await wait_all_tasks_blocked()
            nursery.start_soon(calls.start, "second", "s", KEY, "supersede")
            await trio.sleep(1.5)
            store.late, store.late_s = "begin_turn", 100.0
        assert isinstance(calls.refused["first"], TurnInProgressError)
        assert isinstance(calls.refused["second"], StoreError)
        assert calls.took_s["second"] <= TIMEOUT_S + 0.001
        await trio.sleep(200)


# Outcomes that are not known


@outcomes
async def test_the_repetition_of_a_start_with_an_unknown_outcome_finds_out(
    outcome: Outcome, autojump_clock: MockClock
) -> None:
    async with open_late_stage() as (stage, store, calls):
        store.late, store.outcome = "begin_turn", outcome
        await calls.start("first")
        assert isinstance(calls.refused["first"], StoreError)
        await calls.start("second")  # before the write is over
        assert calls.took_s["second"] <= TIMEOUT_S
        await trio.sleep(TIMEOUT_S)
        await calls.start("third")
        [turn_id] = await calls.turns()
        assert calls.told["third"] == calls.told["second"] == turn_id
        if outcome == "lands":
            assert (await stage.sessions.get_turn("s", turn_id)).state == "failed"
            assert stage.puppet.asked == []
        else:
            assert calls.turn("third").end is None
            await stage.puppet.next_reply()
            assert len(stage.puppet.asked) == 1


async def _create(stage: Stage) -> object:
    return (await stage.sessions.create_session(NewSession(), key=KEY)).id


async def _fork(stage: Stage) -> object:
    return (await stage.sessions.fork_session("source", key=KEY)).id


async def _add(stage: Stage) -> object:
    new = NewItems(items=text_input("Hi"), key=KEY)
    return [turn.id for turn in await stage.sessions.add_items("source", new)]


MAKES: dict[str, tuple[str, Callable[[Stage], Awaitable[object]]]] = {
    "create": ("create_session", _create),
    "fork": ("fork_session", _fork),
    "add": ("add_turns", _add),
}


@outcomes
@pytest.mark.parametrize("make", MAKES)
async def test_the_repetition_of_a_write_with_an_unknown_outcome_finds_out(
    make: str, outcome: Outcome, autojump_clock: MockClock
) -> None:
    step, call = MAKES[make]
    async with open_late_stage() as (stage, store, _):
        await stage.sessions.create_session(NewSession(id="source"))
        store.late, store.outcome = step, outcome
        with pytest.raises(StoreError):
            await call(stage)
        first = await call(stage)
        assert await call(stage) == first
        assert await stage.sessions.count_sessions() == (1 if make == "add" else 2)
        assert len((await stage.sessions.list_turns("source", limit=9)).data) == (1 if make == "add" else 0)


@pytest.mark.parametrize("make", MAKES)
async def test_the_repetition_of_a_write_whose_caller_has_left_finds_out(make: str, autojump_clock: MockClock) -> None:
    step, call = MAKES[make]
    async with open_late_stage() as (stage, store, _):
        await stage.sessions.create_session(NewSession(id="source"))
        store.late, store.late_s = step, 1.0
        made: list[object] = []

        async def keep() -> None:
            made.append(await call(stage))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.5):
                nursery.start_soon(keep)
                await trio.lowlevel.checkpoint()
                scope = nursery.cancel_scope
                await call(stage)
            nursery.start_soon(keep)
            assert not scope.cancel_called
        assert made[0] == made[1]
        assert await stage.sessions.count_sessions() == (1 if make == "add" else 2)


# Ends


async def test_the_key_of_a_turn_that_has_ended_tells_this_turn(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        calls = Calls(stage)
        await calls.start("first")
        (await stage.puppet.next_reply()).finish()
        await calls.turn("first").wait_ended()
        await wait_all_tasks_blocked()
        await calls.start("in the way", key=None)
        await calls.start("again")
        assert calls.told["again"] == calls.turn("first").id
        assert len(await calls.turns()) == 2


async def test_the_key_of_a_session_that_has_expired_is_spent(autojump_clock: MockClock) -> None:
    async with open_stage(idle_timeout_s=100) as stage:
        first = await stage.sessions.create_session(NewSession(), key=KEY)
        stage.clock.advance(99)
        assert await stage.sessions.create_session(NewSession(), key=KEY) == first
        stage.clock.advance(2)
        with pytest.raises(MadeIsGoneError, match=first.id):
            await stage.sessions.create_session(NewSession(), key=KEY)


async def test_the_key_of_a_session_that_is_being_deleted_is_spent(autojump_clock: MockClock) -> None:
    async with open_late_stage() as (stage, store, calls), trio.open_nursery() as nursery:
        await calls.start("first")
        store.late, store.late_s = "mark_deleted", 1.0
        nursery.start_soon(stage.sessions.delete_session, "s")
        await wait_all_tasks_blocked()
        await calls.start("second")
        await trio.sleep(2)
        assert isinstance(calls.refused["second"], MadeIsGoneError)
        await calls.start("third")
        assert isinstance(calls.refused["third"], MadeIsGoneError)


async def test_in_a_drain_a_repetition_joins_the_turn_of_its_key_and_a_new_key_is_refused(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        calls = Calls(stage)
        await calls.start("first")
        stage.stop.enter(Phase.DRAINING)
        await calls.start("again")
        assert calls.turn("again") is calls.turn("first")
        await calls.start("new", "other", IdempotencyKey(caller="", key="new", fingerprint=b"f"))
        assert isinstance(calls.refused["new"], ShuttingDownError)


# Two processes


@pytest.mark.parametrize("sessions", [("s", "s"), ("new", "newer")], ids=["one session", "a new session each"])
@pytest.mark.parametrize("first", ["here", "there"])
async def test_of_two_processes_that_start_a_turn_with_one_key_at_once_one_does(
    tmp_path: Path, sessions: tuple[str, str], first: str
) -> None:
    """Both have looked for the session, which has no owner, before either of them begins."""
    both_look = Barrier(2)
    async with (
        open_sqlite_store(tmp_path / "lastcall.db", address="unix:here") as here,
        open_sqlite_store(tmp_path / "lastcall.db", address="unix:there") as there,
        open_stage(cast("MemoryStore", here), **IN_A_FILE) as one,
        open_stage(cast("MemoryStore", there), **IN_A_FILE) as other,
    ):
        await one.sessions.create_session(NewSession(id="s"))
        stages = {"here": (one, here, sessions[0]), "there": (other, there, sessions[1])}
        begun, looked = trio.Event(), trio.Event()
        told: dict[str, str] = {}

        async def start(name: str) -> None:
            stage, store, session = stages[name]
            begin = store.begin_turn

            async def begin_in_order(*args: Any, **rest: Any) -> BegunTurn:
                await both_look.wait()
                if name != first:
                    await begun.wait()
                result = await begin(*args, **rest)
                begun.set()
                return result

            store.begin_turn = begin_in_order  # type: ignore[method-assign]
            new = NewTurn(text="Hi", key=KEY, creates_session=True, session_is_new=session != "s")
            try:
                turn, watch = await stage.sessions.start_turn(session, new)
            except RepeatedError as repeated:
                told[name] = repeated.turn_id or ""
                with pytest.raises(OwnedElsewhereError) as elsewhere:
                    await stage.sessions.open_events(repeated.session_id, told[name])
                assert elsewhere.value.address == f"unix:{first}"
                looked.set()
            else:
                told[name] = turn.id
                assert name == first
                with watch:
                    await stage.puppet.next_reply()
                    await looked.wait()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(start, "here")
                nursery.start_soon(start, "there")
        assert len(set(told.values())) == 1
        assert await here.count_sessions(status=None, now=one.clock()) == (1 if sessions == ("s", "s") else 2)
        assert len(one.puppet.asked) + len(other.puppet.asked) == 1


# Anything at any time


@pytest.mark.parametrize("seed", range(40))
async def test_calls_with_one_key_make_one_turn_whatever_the_store_and_the_clients_do(
    seed: int, autojump_clock: MockClock
) -> None:
    random = Random(seed)
    store = UnreliableStore(random, faulty=True)
    async with open_stage(cast("MemoryStore", store), store_timeout_s=TIMEOUT_S) as stage:
        calls = Calls(stage)

        async def come_and_go(name: str) -> None:
            await trio.sleep(random.choice([0, 0.5, random.random() * 20]))
            with trio.move_on_after(random.choice([0, 0.5, random.random() * 10, inf])):
                await calls.start(name, on_conflict=random.choice(["reject", "queue", "supersede"]))
            if name in calls.started and random.random() < 0.5:
                await trio.sleep(random.random() * 3)
                calls.started[name][1].release()

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(come_and_go, f"{number}")
        store.quick = True
        await trio.sleep(200)  # writes that hang are over
        await calls.start("last")
        assert "last" in calls.told
        assert {turn for name, turn in calls.told.items()} == {calls.told["last"]}
        assert store.inner._turns.keys() == {calls.told["last"]}
        assert len(stage.puppet.asked) <= 1
        assert not stage.sessions._keyed_calls._first
