"""Callers that wait for each other while the store hangs: counted, and answered within bounds of their own."""

from collections import Counter
from contextlib import suppress
from datetime import datetime

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    EditedMeanwhileError,
    ItemNotFoundError,
    LastcallError,
    StoreError,
    TurnEndingError,
    TurnLimitError,
)
from service.sessions import sessions as sessions_module
from service.sessions.commands import NewSession
from service.storage.memory import MemoryStore
from service.storage.records import BegunTurn, SessionRecord, TurnRecord
from tests.sessions.active.test_acceptance import Hangs
from tests.sessions.puppet import Stage, open_stage
from tests.sessions.turns.test_turns import start
from tests.storage.test_store_added_turns import an_added_turn

TIMEOUT_S = 5.0


class Answers:
    """Callers of one session, each with its answer and the time that the answer took."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.turns: list[str] = []
        self.refusals: Counter[type[LastcallError]] = Counter()
        self.took_s: list[float] = []

    async def call(self, text: str) -> None:
        asked_at = trio.current_time()
        try:
            await start(self.stage.sessions, "s", text, on_conflict="queue")
            self.turns.append(text)
        except LastcallError as error:
            self.refusals[type(error)] += 1
        self.took_s.append(trio.current_time() - asked_at)


@pytest.mark.parametrize("step", ["begin_turn", "get_session"])
@pytest.mark.parametrize("apart_s", [0.0, 0.1])
async def test_each_of_many_callers_is_answered_within_its_own_bound_while_the_store_hangs(
    step: str, apart_s: float, autojump_clock: MockClock
) -> None:
    store = Hangs(step)
    async with open_stage(store, store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        answers = Answers(stage)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(answers.call, f"{number}")
                await trio.sleep(apart_s)
        assert answers.refusals == {StoreError: 20}
        assert max(answers.took_s) == TIMEOUT_S, "callers that did not get to the store are answered sooner"
        assert stage.sessions.statistics().callers_waiting == 0
        store.goes_on.set()
        await stage.sessions.pending_writes.retry()
        await answers.call("and then")
        assert answers.turns == ["and then"]
        (await stage.puppet.next_reply()).finish()


@pytest.mark.parametrize("creates_session", [False, True])
async def test_all_steps_of_an_acceptance_have_one_bound(creates_session: bool, autojump_clock: MockClock) -> None:
    class Slow(Hangs):
        async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
            await trio.sleep(2)
            return await super().get_session(session_id, now=now)

    async with open_stage(Slow("begin_turn"), store_timeout_s=5) as stage:
        if not creates_session:
            await stage.sessions.create_session(NewSession(id="s"))
        with pytest.raises(StoreError):
            await start(stage.sessions, "s", creates_session=creates_session)
        assert trio.current_time() == TIMEOUT_S


async def test_callers_that_wait_count_as_open_turns(autojump_clock: MockClock) -> None:
    store = Hangs("begin_turn")
    async with open_stage(store, live_turns_max=10, queued_turns_max=20) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        answers = Answers(stage)
        for number in range(10):
            nursery.start_soon(answers.call, f"{number}")
            await wait_all_tasks_blocked()
        assert stage.sessions.statistics().callers_waiting == 10
        await answers.call("one too many")
        assert answers.refusals == {TurnLimitError: 1}
        assert answers.took_s == [0], "it does not wait first"
        store.goes_on.set()
        await wait_all_tasks_blocked()
        assert answers.turns == [f"{number}" for number in range(10)], "in the order in which they came"
        assert stage.sessions.statistics().callers_waiting == 0


async def test_callers_that_leave_while_they_wait_leave_nothing(autojump_clock: MockClock) -> None:
    store = Hangs("begin_turn")
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        answers = Answers(stage)
        nursery.start_soon(answers.call, "first")
        await store.reached.wait()
        async with trio.open_nursery() as leaving:
            for number in range(5):
                leaving.start_soon(answers.call, f"leaves {number}")
            await wait_all_tasks_blocked()
            nursery.start_soon(answers.call, "last")
            await wait_all_tasks_blocked()
            assert stage.sessions.statistics().callers_waiting == 7
            leaving.cancel_scope.cancel()
        assert stage.sessions.statistics().callers_waiting == 2
        store.goes_on.set()
        await wait_all_tasks_blocked()
        assert answers.turns == ["first", "last"]


async def test_turns_that_a_slow_store_takes_in_time_are_kept_in_order_and_no_others(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def begin_turn(self, turn: TurnRecord, **rest: object) -> BegunTurn:
            await trio.sleep(1.5)
            return await super().begin_turn(turn, **rest)  # type: ignore[arg-type]

    async with open_stage(Slow(), store_timeout_s=TIMEOUT_S, queued_turns_max=20) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        answers = Answers(stage)
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(answers.call, f"{number}")
                await wait_all_tasks_blocked()
        page = await stage.sessions.list_turns("s", limit=20)
        assert answers.turns == [record.input_text for record in page.data] == ["0", "1"]
        assert answers.refusals == {StoreError: 8}
        assert stage.sessions.pending_writes.refusal is None, "waiting for others says nothing about the store"
        assert trio.current_time() == 3


async def test_deletion_that_takes_long_is_answered_and_goes_on(autojump_clock: MockClock) -> None:
    """The model client takes its time to close."""
    async with open_stage(store_timeout_s=TIMEOUT_S, cleanup_timeout_s=1) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s")
        await stage.puppet.next_reply()
        stage.puppet.close_s = 30
        with pytest.raises(StoreError, match="is being deleted") as caught:
            await stage.sessions.delete_session("s")
        assert caught.value.retry_after_s == 1
        assert trio.current_time() == stage.sessions.deletion_timeout_s == 11
        assert stage.sessions.statistics().callers_waiting == 0
        with pytest.raises(StoreError):
            await stage.sessions.delete_session("s")
        await stage.sessions.delete_session("s")
        assert trio.current_time() == 30
        assert (await turn.wait_ended()).reason == "session_deleted"


@pytest.mark.parametrize("apart_s", [0.0, 1.0])
async def test_each_fork_is_answered_within_its_own_bound_while_the_store_hangs(
    apart_s: float, autojump_clock: MockClock
) -> None:
    store = Hangs("fork_session")
    async with open_stage(store, store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        took_s: list[float] = []

        async def fork() -> None:
            asked_at = trio.current_time()
            with pytest.raises(StoreError):
                await stage.sessions.fork_session("s")
            took_s.append(trio.current_time() - asked_at)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fork)
                await trio.sleep(apart_s)
        assert len(took_s) == 20
        assert max(took_s) == TIMEOUT_S
        assert stage.sessions.statistics().callers_waiting == 0
        store.goes_on.set()
        assert (await stage.sessions.fork_session("s")).id != "s"


async def test_a_fork_that_waited_for_another_has_the_rest_of_its_time(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def fork_session(self, *arguments: object, **named: object) -> SessionRecord:
            await trio.sleep(2)
            return await super().fork_session(*arguments, **named)  # type: ignore[arg-type]

    async with open_stage(Slow(), store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(stage.sessions.fork_session, "s")
        assert trio.current_time() == 4


async def test_a_cancel_whose_turn_ends_late_is_answered_and_the_turn_ends_later(autojump_clock: MockClock) -> None:
    """The model client takes its time to close."""
    async with open_stage(store_timeout_s=TIMEOUT_S, cleanup_timeout_s=1) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s")
        await stage.puppet.next_reply()
        stage.puppet.close_s = 30
        for answered_at in (6, 12):
            with pytest.raises(TurnEndingError) as caught:
                await stage.sessions.cancel_turn("s", turn.id)
            assert (caught.value.session_id, caught.value.turn_id) == ("s", turn.id)
            assert trio.current_time() == answered_at == stage.sessions.cancel_timeout_s * answered_at / 6
        with trio.move_on_after(1):
            await stage.sessions.cancel_turn("s", turn.id)
        assert trio.current_time() == 13, "a caller that leaves does not wait"
        record = await turn.wait_ended()
        assert (record.state, record.reason, record.stored) == ("cancelled", "requested", True)
        assert trio.current_time() == 30
        assert await stage.sessions.cancel_turn("s", turn.id) == record


async def test_a_cancel_that_comes_after_another_end_does_not_say_that_the_turn_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    store = Hangs("end_turn")
    async with open_stage(store, store_timeout_s=TIMEOUT_S, cleanup_timeout_s=10) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s")
        (await stage.puppet.next_reply()).finish()
        await store.reached.wait()
        stage.sessions._settings = stage.sessions._settings.model_copy(update={"cleanup_timeout_s": 1})
        with pytest.raises(TurnEndingError, match="is ending") as caught:
            await stage.sessions.cancel_turn("s", turn.id)
        assert "cancelled" not in str(caught.value)
        store.goes_on.set()
        assert (await stage.sessions.cancel_turn("s", turn.id)).state == "completed"


async def test_a_fork_that_waited_and_had_less_than_its_time_says_nothing_of_the_store(
    autojump_clock: MockClock,
) -> None:
    class Slow(MemoryStore):
        async def fork_session(self, *arguments: object, **named: object) -> SessionRecord:
            await trio.sleep(0.9 * TIMEOUT_S)
            return await super().fork_session(*arguments, **named)  # type: ignore[arg-type]

    async with open_stage(Slow(), store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))

        async def fork_later() -> None:
            await trio.sleep(0.45 * TIMEOUT_S)
            with pytest.raises(StoreError):
                await stage.sessions.fork_session("s")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.sessions.fork_session, "s")
            nursery.start_soon(fork_later)
        assert trio.current_time() == pytest.approx(1.45 * TIMEOUT_S)
        assert stage.sessions.pending_writes.refusal is None


async def test_a_fork_that_had_its_whole_time_or_was_refused_says_that_the_store_takes_no_writes(
    autojump_clock: MockClock,
) -> None:
    store = Hangs("fork_session")
    async with open_stage(store, store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        with pytest.raises(StoreError):
            await stage.sessions.fork_session("s")
        assert stage.sessions.pending_writes.refusal is not None
        store.goes_on.set()
        await stage.sessions.fork_session("s")
        assert stage.sessions.pending_writes.refusal is None


async def test_a_bounded_number_of_callers_waits_for_a_fork(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "FORKS_WAITING_MAX", 3)
    store = Hangs("fork_session")
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        for _ in range(4):
            nursery.start_soon(stage.sessions.fork_session, "s")
        await wait_all_tasks_blocked()
        assert stage.sessions.statistics().callers_waiting == 3
        with pytest.raises(StoreError, match="forks wait already"):
            await stage.sessions.fork_session("s")
        assert trio.current_time() == 0, "it does not wait first"
        store.goes_on.set()


async def test_a_deletion_beside_a_fork_and_a_long_search_for_an_item_say_nothing_of_the_store(
    autojump_clock: MockClock,
) -> None:
    searching = Hangs("delete_item")
    async with open_stage(searching, store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        with pytest.raises(StoreError, match="in time"):
            await stage.sessions.delete_item("s", "none")
        assert stage.sessions.pending_writes.refusal is None
        searching.goes_on.set()

    class EditedBeside(MemoryStore):
        async def _let_others_run(self, source_id: str, *, after: int, edits: int, now: datetime) -> None:
            with suppress(ItemNotFoundError):  # it is deleted once
                await self.delete_item(source_id, "t5-out", now=now)
            await super()._let_others_run(source_id, after=after, edits=edits, now=now)

    store = EditedBeside()
    async with open_stage(store, store_timeout_s=TIMEOUT_S) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        added = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(150)]
        await store.add_turns(added, now=stage.clock())
        with pytest.raises(EditedMeanwhileError):
            await stage.sessions.fork_session("s", at="t149")
        assert stage.sessions.pending_writes.refusal is None
