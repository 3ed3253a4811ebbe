"""Turns that outlive their process: suspended in a stop, and adopted by another process, or after the next start.

Both processes are stages here, on one memory store.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    InvalidRequestError,
    ModelError,
    SessionNotFoundError,
    ShuttingDownError,
    StoreError,
    TurnLimitError,
    TurnMovedError,
)
from service.models.client import ModelClient, Usage
from service.models.scripted import open_scripted
from service.sessions.commands import NewSession, NewTurn, OnConflict
from service.sessions.events import outcome
from service.sessions.events.events import (
    Event,
    TurnCancelled,
    TurnCompleted,
    TurnDelta,
    TurnFailed,
    TurnInterrupted,
    TurnReasoning,
    TurnResumed,
)
from service.sessions.sessions import ADOPTION_PAUSE_S, open_sessions
from service.sessions.turns.turn import CLIENT_RETURNS_S, RETURN_S, Turn, Watch
from service.sessions.turns.turn_task import UNTOLD_MAX_S
from service.sessions.upkeep.checkpoints import checkpoint_turns
from service.sessions.upkeep.recovery import INTERVAL_S, run_recovery
from service.settings import Settings
from service.steps import at_once
from service.stop_state import Phase, StopState
from service.storage.memory import MemoryStore
from service.storage.pieces import Run
from service.storage.records import Adoption, EndResult, OpenTurn, SessionPatch, SuspendedTurn, TurnRecord
from service.storage.rules import HANDED_OVER_ATTEMPTS_MAX
from service.storage.sqlite import open_sqlite_store
from service.telemetry.metrics import families
from service.telemetry.metrics.families import Family
from service.telemetry.metrics.metrics import Metrics
from tests.sessions.puppet import CAP_S, IN_A_FILE, Reply, Stage, TestClock, kinds, open_stage, read_all
from tests.storage.rows import suspended_in
from tests.storage.test_store_owners import take_for_dead

T = TypeVar("T")

CONTINUES = NewTurn(text="Hi", on_interrupt="continue", on_disconnect="continue")
QUEUED = NewTurn(text="And?", on_conflict="queue", on_disconnect="continue")
RETRIES = NewTurn(text="Hi", on_interrupt="retry", on_disconnect="continue")


async def suspend(stage: Stage) -> None:
    """Stop a stage: its turns are interrupted or suspended."""
    stage.stop.enter(Phase.INTERRUPTING)
    stage.sessions.drain.interrupt_all()
    with trio.fail_after(1000):
        await stage.sessions.drain.wait_idle()


async def sweep(stage: Stage) -> None:
    """Let the recovery adopt what has no client: it looks again and again, until no turn waits for its time."""
    while (due_at := await stage.sessions.adopt_waiting()) is not None:  # noqa: ASYNC110  as the loop does
        await trio.sleep_until(min(due_at, trio.current_time() + INTERVAL_S))


@asynccontextmanager
async def open_next(store: MemoryStore, **settings: object) -> AsyncIterator[Stage]:
    """The next process, whose model can continue."""
    async with open_stage(store, **settings) as stage:
        stage.puppet.continues = True
        yield stage


async def begun(stage: Stage, new: NewTurn, *said: str) -> tuple[Turn, Reply]:
    """A turn of session ``s`` that has said something."""
    turn, watch = await stage.sessions.start_turn("s", new)
    reply = await stage.puppet.next_reply()
    reply.say(*said)
    await wait_all_tasks_blocked()
    watch.release()
    return turn, reply


async def suspended(store: MemoryStore, new: NewTurn = CONTINUES, *said: str, usage: Usage | None = None) -> str:
    """The id of a turn of session ``s`` that was suspended after it had said something."""
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, new, *(said or ("Hel", "lo")))
        reply.usage = usage
        await suspend(stage)
        assert turn.is_suspended
        return turn.id


async def suspended_with_client(store: MemoryStore) -> str:
    """The id of a turn of session ``s`` that is cancelled without clients, and was suspended while it had one."""
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, watch = await stage.sessions.start_turn("s", NewTurn(text="Hi", on_interrupt="continue"))
        await stage.puppet.next_reply()
        await suspend(stage)
        watch.release()
        return turn.id


async def events_of(stage: Stage, turn_id: str, *, after: int = 0) -> list[Event]:
    """The events after a seq, to the end of the turn."""
    log, watch = await stage.sessions.open_events("s", turn_id, after=after)
    with watch:
        return await read_all(log, after=after)


def text_told(events: Sequence[Event], before: str = "") -> str:
    """The text that a client has in the end, which cuts its text as ``turn.resumed`` says."""
    text = before
    for event in events:
        if isinstance(event, TurnDelta):
            text += event.text
        elif isinstance(event, TurnResumed):
            text = text[: event.text_length]
    return text


def seqs(events: Sequence[Event]) -> list[int]:
    return [event.seq for event in events]


async def test_a_stop_suspends_a_turn_that_continues_and_closes_its_model_and_its_log_without_an_end(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, CONTINUES, "Hel", "lo")
        with capture_logs() as lines:
            await suspend(stage)
        assert reply.closed.is_set()
        assert turn.log.closed
        assert turn.log.is_moved
        assert kinds(list(turn.log.events())) == ["turn.started", "turn.delta", "turn.delta"]
        kept = await stage.sessions.get_turn("s", turn.id)
        assert (kept.state, kept.text, kept.attempt) == ("running", "Hello", 1)
    assert stage.sessions.statistics().turns_suspended == 1
    assert [line["turns"] for line in lines if "suspended" in line["event"]] == [1]
    assert not [line for line in lines if line["event"] == "turn ended"]


async def test_a_turn_that_fails_is_interrupted_by_a_stop_as_ever(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, _ = await begun(stage, NewTurn(text="Hi", on_disconnect="continue"), "Hello")
        await suspend(stage)
    assert (turn.state, turn.is_suspended, turn.stored) == ("interrupted", False, True)


async def test_a_resumed_stream_goes_on_without_loss_or_repetition_and_the_model_gets_the_text_so_far(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        async with trio.open_nursery() as nursery:
            told: list[Event] = []

            async def read() -> None:
                told.extend(await events_of(other, turn_id, after=2))

            nursery.start_soon(read)
            reply = await other.puppet.next_reply()
            assert reply.request.prefix == "Hello"
            reply.say(" there")
            reply.finish()
        assert kinds(told) == ["turn.delta", "turn.resumed", "turn.delta", "turn.completed"]
        assert seqs(told) == [3, 4, 5, 6]
        assert told[1] == TurnResumed(seq=4, attempt=2, mode="continue", text_length=5)
        assert text_told(told, "Hel") == "Hello there"
        record = await other.sessions.get_turn("s", turn_id)
        assert (record.state, record.text, record.attempt, len(record.output)) == ("completed", "Hello there", 2, 1)
        assert text_told(await events_of(other, turn_id)) == "Hello there"


async def test_a_retry_drops_what_was_said_and_a_cursor_from_before_meets_the_resumption(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    turn_id = await suspended(store, RETRIES)
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", turn_id, after=3)
        reply = await other.puppet.next_reply()
        assert reply.request.prefix == ""
        reply.say("Bye")
        reply.finish()
        told = await read_all(log, after=3)
        watch.release()
        assert told[0] == TurnResumed(seq=4, attempt=2, mode="retry", text_length=0)
        assert text_told(told, "Hello") == "Bye"
        whole = await read_all(log)
        assert kinds(whole) == ["turn.started", "turn.resumed", "turn.delta", "turn.completed"]
        assert seqs(whole) == [1, 4, 5, 6]
        assert [kinds(await read_all(log, after=seen))[0] for seen in (1, 2, 3)] == ["turn.resumed"] * 3
        assert (await other.sessions.get_turn("s", turn_id)).text == "Bye"
        for seen in range(7):  # from the store
            assert await events_of(other, turn_id, after=seen) == [event for event in whole if event.seq > seen]


async def test_a_model_that_cannot_continue_replies_anew(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        other.puppet.continues = False
        log, watch = await other.sessions.open_events("s", turn_id, after=3)
        reply = await other.puppet.next_reply()
        reply.say("Bye")
        reply.finish()
        told = await read_all(log, after=3)
        watch.release()
    assert told[0] == TurnResumed(seq=4, attempt=2, mode="retry", text_length=0)
    assert text_told(told) == "Bye"


async def test_a_reply_that_ended_in_reasoning_or_in_a_call_is_not_continued(autojump_clock: MockClock) -> None:
    for think in (True, False):
        store = MemoryStore()
        async with open_stage(store) as stage:
            await stage.sessions.create_session(NewSession(id="s"))
            turn, reply = await begun(stage, CONTINUES, "Hel")
            reply.think("Hm.") if think else reply.call("call_1", '{"a"')
            await wait_all_tasks_blocked()
            await suspend(stage)
        async with open_next(store) as other:
            log, watch = await other.sessions.open_events("s", turn.id)
            reply = await other.puppet.next_reply()
            assert reply.request.prefix == ""
            reply.say("Bye")
            reply.finish()
            told = await read_all(log)
            watch.release()
            assert kinds(told) == ["turn.started", "turn.resumed", "turn.delta", "turn.completed"]
            record = await other.sessions.get_turn("s", turn.id)
            assert [item.type for item in record.output] == ["message"]


async def test_a_reply_with_a_call_before_its_text_is_not_continued_and_each_call_has_its_own_arguments(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, CONTINUES)
        reply.call("call_1", '{"a": 1}')
        reply.say("So far")
        await wait_all_tasks_blocked()
        await suspend(stage)
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", turn.id)
        reply = await other.puppet.next_reply()
        assert reply.request.prefix == ""
        reply.call("call_2", '{"b"', ": 2}", name="g")
        reply.finish("tool_calls")
        told = await read_all(log)
        watch.release()
        assert kinds(told)[:2] == ["turn.started", "turn.resumed"]
        record = await other.sessions.get_turn("s", turn.id)
        assert [(item.call_id, item.text) for item in record.output] == [("call_2", '{"b": 2}')]


REFUSALS = (
    ModelError("upstream_rejected", "The model server refused the request (HTTP 400).", may_be_continuation=True),
    ModelError(
        "parameter_refused",
        "The model server does not take it.",
        parameter="continue_final_message",
        may_be_continuation=True,
    ),
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda it: it.code)
@pytest.mark.parametrize("at", ["the head", "the first event"])
async def test_a_reply_that_the_model_server_refuses_to_go_on_with_begins_anew(
    autojump_clock: MockClock, refusal: ModelError, at: str
) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        log, watch = await other.sessions.open_events("s", turn_id)
        other.puppet.refuse = refusal if at == "the head" else None
        if at == "the first event":
            (await other.puppet.next_reply()).fail(refusal)
        with capture_logs() as lines:
            told = await read_all(log)
        watch.release()
        assert kinds(told) == ["turn.started", "turn.delta", "turn.delta", "turn.resumed"]
        assert (log.is_moved, other.puppet.open_replies) == (True, 0)
        assert [line["code"] for line in lines if "begins anew" in line["event"]] == [refusal.code]

        other.puppet.refuse = None
        again: list[Event] = []

        async def come_back() -> None:
            again.extend(await events_of(other, turn_id, after=told[-1].seq))

        nursery.start_soon(come_back)
        reply = await other.puppet.next_reply()
        assert reply.request.prefix == ""
        reply.say("Bye")
        reply.finish()
        with trio.fail_after(10):
            record = await other.sessions.wait_turn("s", turn_id)
        assert (record.state, record.text, record.attempt) == ("completed", "Bye", 3)
    assert again[0] == TurnResumed(seq=5, attempt=3, mode="retry", text_length=0)
    assert text_told(again, "Hello") == "Bye"
    assert kinds(again) == ["turn.resumed", "turn.delta", "turn.completed"]


class RefusingStore(MemoryStore):
    """Refuses suspensions while it is told to."""

    refuses = False

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers, self.refused, self.taken = (trio.Event() for _ in range(4))
        self.answers.set()

    async def suspend_turns(self, suspended: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        self.asked.set()
        await self.answers.wait()
        if self.refuses:
            self.refused.set()
            raise StoreError("The store failed: the disk is full.")
        lost = await super().suspend_turns(suspended, now=now)
        self.taken.set()
        return lost


async def test_a_reply_that_is_to_begin_anew_does_so_once_the_store_takes_its_suspension(
    autojump_clock: MockClock,
) -> None:
    store = RefusingStore()
    turn_id = await suspended(store)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_recovery, other.sessions, shared=True))
        other.puppet.refuse = REFUSALS[0]
        store.refuses = True
        with trio.fail_after(100):
            await store.refused.wait()
            store.refuses, store.taken = False, trio.Event()
            await store.taken.wait()
        other.puppet.refuse = None  # the next attempt waits for a look of the recovery
        reply = await other.puppet.next_reply()
        reply.say("Bye")
        reply.finish()
        with trio.fail_after(10):
            record = await other.sessions.wait_turn("s", turn_id)
        nursery.cancel_scope.cancel()
        assert other.sessions.suspensions.not_kept == 0
    assert (record.state, record.text, record.attempt) == ("completed", "Bye", 3)


async def test_a_refusal_for_another_reason_leaves_the_text_so_far(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        other.puppet.refuse = ModelError("upstream_rejected", "The model server is not there (HTTP 404).")
        told = await events_of(other, turn_id)
        record = await store.get_turn("s", turn_id, now=TestClock()())
    assert isinstance(told[-1], TurnFailed)
    assert (record.text, record.attempt, text_told(told)) == ("Hello", 2, "Hello")


async def test_a_prompt_that_was_too_long_first_may_begin_anew_too(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        earlier, reply = await begun(stage, NewTurn(text="old " * 100), "answer")
        reply.finish()
        await earlier.wait_ended()
        turn, _ = await begun(stage, CONTINUES, "Hel", "lo")
        await suspend(stage)
    async with open_next(store) as other:
        await sweep(other)
        (await other.puppet.next_reply()).fail(ModelError("context_too_long", "too long"))
        again = await other.puppet.next_reply()
        assert again.request.prefix == "Hello"
        again.fail(REFUSALS[0])
        await wait_all_tasks_blocked()  # it is suspended
        await sweep(other)
        anew = await other.puppet.next_reply()
        assert anew.request.prefix == ""
        anew.finish()
        with trio.fail_after(10):
            record = await other.sessions.wait_turn("s", turn.id)
    assert (record.state, record.attempt) == ("completed", 3)


async def test_a_reply_for_which_another_turn_waits_does_not_begin_anew(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        await sweep(other)
        reply = await other.puppet.next_reply()
        later, watch = await other.sessions.start_turn("s", QUEUED)
        reply.fail(REFUSALS[0])
        reply = await other.puppet.next_reply()
        error = (await store.get_turn("s", turn_id, now=TestClock()())).error
        assert error is not None
        assert error.code == "upstream_rejected"
        reply.finish()
        with trio.fail_after(10), watch:
            await later.wait_ended()
    assert isinstance(later.end, outcome.Completed)


@pytest.mark.parametrize("refuses", [False, True], ids=["the store takes it", "the store refuses it"])
async def test_a_turn_that_comes_while_a_reply_is_to_begin_anew_waits_for_its_end(
    autojump_clock: MockClock, refuses: bool
) -> None:
    store = RefusingStore()
    turn_id = await suspended(store)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        await sweep(other)
        reply = await other.puppet.next_reply()
        store.refuses, store.answers, store.asked = refuses, trio.Event(), trio.Event()
        reply.fail(REFUSALS[0])
        await store.asked.wait()
        started: list[tuple[Turn, Watch]] = []

        async def start() -> None:
            started.append(await other.sessions.start_turn("s", QUEUED))

        nursery.start_soon(start)
        await wait_all_tasks_blocked()
        assert not started
        store.answers.set()
        reply = await other.puppet.next_reply()
        store.refuses = False
        assert [item.text for item in reply.request.prompt] == ["Hi"]
        if refuses:  # it has the text so far, and is refused once more: nothing was lost, and the new turn waits for it
            assert reply.request.prefix == "Hello"
        reply.say("Bye")
        reply.finish()
        following = await other.puppet.next_reply()
        assert (await store.get_turn("s", turn_id, now=TestClock()())).state == "completed"
        following.finish()
        [(later, watch)] = started
        with trio.fail_after(10), watch:
            await later.wait_ended()
    assert later.record().parent == turn_id


async def test_a_scripted_model_that_would_have_begun_otherwise_begins_anew_and_the_turn_ends_once(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    stop = StopState()
    async with (
        open_scripted("scripted:?text=Quite another text.&first_token_s=0&rate=0") as model,
        open_sessions(
            store=store, client_for=lambda _: model, clock=TestClock(), settings=Settings(), stop=stop
        ) as sessions,
    ):
        with trio.fail_after(100):
            assert (await sessions.wait_turn("s", turn_id)).is_open  # the caller asks again
            record = await sessions.wait_turn("s", turn_id)
        log, watch = await sessions.open_events("s", turn_id)
        with watch:
            told = await read_all(log)
    assert (record.state, record.text, record.attempt) == ("completed", "Quite another text.", 3)
    assert [kind for kind in kinds(told) if kind != "turn.delta"] == ["turn.started", "turn.resumed", "turn.completed"]
    assert text_told(told) == record.text


async def test_a_reply_that_goes_on_and_then_fails_does_not_begin_anew(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", turn_id)
        reply = await other.puppet.next_reply()
        reply.say(" there")
        await wait_all_tasks_blocked()
        reply.fail(REFUSALS[0])
        told = await read_all(log)
        watch.release()
    assert isinstance(told[-1], TurnFailed)
    assert (told[-1].error.code, text_told(told)) == ("upstream_rejected", "Hello there")


async def test_a_refusal_of_the_last_attempt_fails_the_turn(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    for _ in range(HANDED_OVER_ATTEMPTS_MAX - 2):
        async with open_next(store) as other:
            await sweep(other)
            await other.puppet.next_reply()
            await suspend(other)
    async with open_next(store) as other:
        other.puppet.refuse = REFUSALS[0]
        told = await events_of(other, turn_id)
    assert isinstance(told[-1], TurnFailed)
    assert (told[-1].error.code, text_told(told)) == ("upstream_rejected", "Hello")


async def test_reasoning_before_the_text_stays_and_new_reasoning_is_an_item_of_its_own(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, watch = await stage.sessions.start_turn("s", CONTINUES)
        reply = await stage.puppet.next_reply()
        reply.think("Hm.")
        reply.say("Hel")
        await wait_all_tasks_blocked()
        watch.release()
        await suspend(stage)
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", turn.id)
        reply = await other.puppet.next_reply()
        reply.think("So.")
        reply.say("lo")
        reply.finish()
        told = await read_all(log)
        watch.release()
        record = await other.sessions.get_turn("s", turn.id)
        assert [(item.type, item.text) for item in record.output] == [
            ("reasoning", "Hm."),
            ("message", "Hello"),
            ("reasoning", "So."),
        ]
        assert [event.text for event in told if isinstance(event, TurnReasoning)] == ["Hm.", "So."]
        assert await events_of(other, turn.id) == told


async def test_a_turn_that_may_leave_nothing_out_and_give_no_title_may_not_in_another_process_either(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    new = msgspec.structs.replace(CONTINUES, may_leave_out=False, may_title=False)
    turn_id = await suspended(store, new)
    async with open_next(store) as other:
        await sweep(other)
        [turn] = other.sessions.open_turns()
        assert (turn.id, turn.may_leave_out, turn.may_title) == (turn_id, False, False)
        (await other.puppet.next_reply()).finish()
        await turn.wait_ended()


async def test_usage_is_the_sum_of_all_attempts(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store, CONTINUES, "Hel", usage=Usage(input_tokens=10, output_tokens=1))
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", turn_id)
        (await other.puppet.next_reply()).finish()
        told = await read_all(log)
        watch.release()
        end = told[-1]
        assert isinstance(end, TurnCompleted)
        assert end.usage == Usage(input_tokens=11, output_tokens=3)
        assert (await other.sessions.get_session("s")).input_tokens == 11


async def test_the_deadline_counts_from_the_first_start_and_the_wait_with_it(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store, turn_timeout_s=600) as other:
        other.clock.advance(590)
        log, watch = await other.sessions.open_events("s", turn_id)
        at = trio.current_time()
        end = (await read_all(log))[-1]
        watch.release()
        assert isinstance(end, TurnFailed)
        assert end.error.code == "turn_timeout"
        assert trio.current_time() - at == pytest.approx(10)


async def test_a_turn_that_waited_beyond_its_deadline_ends_without_a_model(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store, turn_timeout_s=600) as other:
        other.clock.advance(601)
        log, watch = await other.sessions.open_events("s", turn_id)
        end = (await read_all(log))[-1]
        watch.release()
        assert isinstance(end, TurnFailed)
        assert other.puppet.asked == []


async def test_the_last_attempt_is_interrupted_by_a_stop(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    for attempt in range(2, HANDED_OVER_ATTEMPTS_MAX + 1):
        async with open_next(store) as stage:
            await sweep(stage)
            [turn] = stage.sessions.open_turns()
            assert turn.record().attempt == attempt
            await stage.puppet.next_reply()
            await suspend(stage)
            assert turn.is_suspended == (attempt < HANDED_OVER_ATTEMPTS_MAX)
    async with open_stage(store) as stage:
        end = (await events_of(stage, turn_id))[-1]
        assert isinstance(end, TurnInterrupted)
        assert end.reason == "shutdown"
        assert (await stage.sessions.get_turn("s", turn_id)).text == "Hello"


async def test_the_sweeper_adopts_no_more_turns_than_may_live(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        for number in range(3):
            await stage.sessions.create_session(NewSession(id=f"s{number}"))
            await stage.sessions.start_turn(f"s{number}", CONTINUES)
        await suspend(stage)
    async with open_next(store, live_turns_max=2) as other:
        await sweep(other)
        assert len(other.sessions.open_turns()) == 2


async def test_a_turn_whose_client_does_not_come_back_is_cancelled_if_it_is_to_be(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended_with_client(store)
    async with open_next(store) as other:
        at = trio.current_time()
        await sweep(other)
        assert trio.current_time() - at == pytest.approx(CLIENT_RETURNS_S)
        record = await other.sessions.wait_turn("s", turn_id)
        assert (record.state, record.reason) == ("cancelled", "disconnected")
        assert trio.current_time() - at == pytest.approx(CLIENT_RETURNS_S), "its model is not asked any more"
        assert other.puppet.asked == []


@pytest.mark.parametrize("away_s", [4, 24])
async def test_a_client_that_comes_back_seconds_after_the_next_start_finds_its_turn(
    away_s: float, autojump_clock: MockClock
) -> None:
    """However long no process served: the time counts from the start of the one that does."""
    store = MemoryStore()
    turn_id = await suspended_with_client(store)
    await trio.sleep(300)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        other.clock.advance(300)
        await nursery.start(lambda task_status: run_recovery(other.sessions, shared=False, task_status=task_status))
        await trio.sleep(away_s)
        assert (other.sessions.open_turns(), other.puppet.asked) == ([], []), "it costs nothing meanwhile"
        log, watch = await other.sessions.open_events("s", turn_id)
        with watch:
            (await other.puppet.next_reply()).finish()
            assert kinds(await read_all(log))[-1] == "turn.completed"
        nursery.cancel_scope.cancel()


async def test_a_change_of_the_session_and_another_clock_do_not_put_the_recovery_off(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        other.clock.advance(-3600)  # another machine's clock
        await nursery.start(lambda task_status: run_recovery(other.sessions, shared=False, task_status=task_status))
        for _ in range(8):
            await other.sessions.update_session("s", SessionPatch(title="new"))
            await trio.sleep(0.5)
        assert [turn.id for turn in other.sessions.open_turns()] == [turn_id]
        nursery.cancel_scope.cancel()


async def test_an_adopted_turn_is_kept_running_by_a_call_that_waits_only_if_its_caller_may_be_a_client(
    autojump_clock: MockClock,
) -> None:
    for is_client in (True, False):
        store = MemoryStore()
        turn_id = await suspended_with_client(store)
        async with open_next(store) as other:
            at = trio.current_time()
            with trio.move_on_after(CLIENT_RETURNS_S + RETURN_S):
                await other.sessions.wait_turn("s", turn_id, is_client=is_client)
            await other.sessions.get_turn("s", turn_id, is_client=is_client)
            record = await other.sessions.wait_turn("s", turn_id)
            assert (record.state, record.reason) == ("cancelled", "disconnected")
            assert trio.current_time() - at == pytest.approx(CLIENT_RETURNS_S + (2 * RETURN_S if is_client else 0))


@pytest.mark.parametrize("looks", ["not", "adopts", "asks", "waits", "streams"])
async def test_whoever_looks_at_an_adopted_turn_and_leaves_does_not_shorten_the_time_of_its_client(
    looks: str, autojump_clock: MockClock
) -> None:
    store = MemoryStore()
    turn_id = await suspended_with_client(store)
    async with open_next(store) as other:
        at = trio.current_time()
        if looks == "adopts":
            await other.sessions.get_turn("s", turn_id, is_client=True)
        else:
            await other.sessions._acceptance.adopt("s")
        await trio.sleep(1)
        if looks == "asks":
            await other.sessions.get_turn("s", turn_id, is_client=True)
        elif looks == "waits":
            with trio.move_on_after(1):
                await other.sessions.wait_turn("s", turn_id, is_client=True)
        elif looks == "streams":
            _, watch = await other.sessions.open_events("s", turn_id)
            watch.release()
        record = await other.sessions.wait_turn("s", turn_id)
        assert (record.state, record.reason) == ("cancelled", "disconnected")
        assert trio.current_time() - at == pytest.approx(CLIENT_RETURNS_S)


async def test_a_turn_whose_client_comes_back_runs_on_with_it(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(
        store, NewTurn(text="Hi", on_interrupt="continue", on_disconnect="cancel", background=True)
    )
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", turn_id)
        await trio.sleep(2 * RETURN_S)
        reply = await other.puppet.next_reply()
        reply.finish()
        assert isinstance((await read_all(log))[-1], TurnCompleted)
        watch.release()


async def test_callers_that_wait_for_a_suspended_turn_are_sent_to_it(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, _ = await begun(stage, CONTINUES, "Hello")
        refused = []

        async def wait(call: Any) -> None:
            try:
                await call()
            except TurnMovedError as error:
                refused.append(error.turn_id)

        nursery.start_soon(wait, turn.wait_ended)
        looked = []

        async def look() -> None:
            looked.append(await stage.sessions.wait_turn("s", turn.id))

        nursery.start_soon(look)
        await wait_all_tasks_blocked()
        await suspend(stage)
        await wait_all_tasks_blocked()
        assert refused == [turn.id]
        assert [(record.state, record.text) for record in looked] == [("running", "Hello")]
        for call in (stage.sessions.open_events, stage.sessions.cancel_turn, stage.sessions.wait_turn):
            with pytest.raises(ShuttingDownError):  # a process that stops adopts nothing
                await call("s", turn.id)


async def test_a_cancel_of_a_suspended_turn_adopts_it_and_ends_it_once(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        record = await other.sessions.cancel_turn("s", turn_id)
        assert (record.state, record.reason, record.text) == ("cancelled", "requested", "Hello")
        assert other.puppet.asked == []
        told = await events_of(other, turn_id)
        assert [type(event) for event in told[-2:]] == [TurnResumed, TurnCancelled]


async def test_a_call_that_waits_for_a_suspended_turn_adopts_it(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        nursery.start_soon(partial(other.sessions.wait_turn, "s", turn_id))
        reply = await other.puppet.next_reply()
        reply.finish()


async def test_a_new_turn_adopts_the_suspended_one_and_meets_it_as_the_conflict_says(autojump_clock: MockClock) -> None:
    conflicts: tuple[OnConflict, ...] = ("queue", "supersede")
    for on_conflict in conflicts:
        store = MemoryStore()
        turn_id = await suspended(store)
        async with open_next(store) as other:
            new = NewTurn(text="And?", on_conflict=on_conflict, on_disconnect="continue")
            turn, watch = await other.sessions.start_turn("s", new)
            watch.release()
            reply = await other.puppet.next_reply()
            if on_conflict == "queue":
                assert turn.state == "queued"
                reply.finish()
            while reply.request.prompt[-1].text != "And?":  # the adopted turn may have asked before it was superseded
                reply = await other.puppet.next_reply()
            reply.finish()
            assert (await turn.wait_ended()).state == "completed"
            first = await other.sessions.get_turn("s", turn_id)
            assert first.state == ("completed" if on_conflict == "queue" else "cancelled")
            assert turn.record().parent == turn_id


async def test_queued_turns_are_suspended_with_the_one_before_them_and_keep_their_order(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        first, _ = await begun(stage, CONTINUES, "One")
        queued = NewTurn(text="Two", on_interrupt="retry", on_conflict="queue", background=True)
        second, watch = await stage.sessions.start_turn("s", queued)
        watch.release()
        fails, watch = await stage.sessions.start_turn("s", NewTurn(text="Three", on_conflict="queue", background=True))
        watch.release()
        await suspend(stage)
        assert (first.is_suspended, second.is_suspended, fails.state) == (True, True, "interrupted")
    async with open_next(store) as other:
        log, watch = await other.sessions.open_events("s", second.id)
        assert [turn.id for turn in other.sessions.open_turns()] == [first.id, second.id]
        reply = await other.puppet.next_reply()
        assert reply.request.prefix == "One"
        reply.finish()
        reply = await other.puppet.next_reply()
        reply.say("Two")
        reply.finish()
        told = await read_all(log)
        watch.release()
        assert kinds(told) == ["turn.queued", "turn.started", "turn.delta", "turn.completed"]
        assert (await other.sessions.get_turn("s", second.id)).attempt == 1


async def test_queued_turns_that_are_suspended_have_the_drain_too(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        _, reply = await begun(stage, CONTINUES, "One")
        queued = NewTurn(text="Two", on_interrupt="retry", on_conflict="queue", background=True)
        second, watch = await stage.sessions.start_turn("s", queued)
        watch.release()
        stage.stop.enter(Phase.DRAINING)
        assert stage.sessions.drain.interrupt_queued() == 0
        reply.finish()
        (await stage.puppet.next_reply()).finish()
        assert (await second.wait_ended()).state == "completed"


async def test_a_session_with_a_suspended_turn_is_deleted_without_an_adoption(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        await other.sessions.delete_session("s")
        with pytest.raises(SessionNotFoundError):
            await other.sessions.open_events("s", turn_id)
        await sweep(other)
        assert other.puppet.asked == []


async def test_a_session_with_a_suspended_turn_does_not_expire(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store, turn_timeout_s=10**6) as other:
        other.clock.advance(10**5)
        assert await store.delete_expired(now=other.clock(), limit=10) == 0
        await sweep(other)
        assert [turn.id for turn in other.sessions.open_turns()] == [turn_id]


async def test_no_adoption_beyond_the_bound_of_live_turns(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store, live_turns_max=1) as other:
        await other.sessions.create_session(NewSession(id="t"))
        await other.sessions.start_turn("t", NewTurn(text="Hi"))
        with pytest.raises(TurnLimitError):
            await other.sessions.open_events("s", turn_id)


# Where something is in the way


class Trouble(MemoryStore):
    """Hangs or refuses, before or after its work, at one method."""

    def __init__(self) -> None:
        super().__init__()
        self.at = ""
        self.is_done_first = False
        self.refuses = False
        self.reached = trio.Event()
        self.goes_on = trio.Event()

    async def _meet(self, method: str, work: Callable[[], Awaitable[T]]) -> T:
        if method != self.at:
            return await work()
        result = await work() if self.is_done_first else None
        self.reached.set()
        if self.refuses:
            raise StoreError("The store refuses.")
        await self.goes_on.wait()
        return await work() if result is None else result

    async def suspend_turns(self, turns: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        return await self._meet("suspend_turns", partial(super().suspend_turns, turns, now=now))

    async def adopt_turns(self, session_ids: Sequence[str], **rest: Any) -> Mapping[str, Adoption]:
        return await self._meet("adopt_turns", partial(super().adopt_turns, session_ids, **rest))

    async def find_open_turn(self, *names: str) -> OpenTurn | None:
        return await self._meet("find_open_turn", partial(super().find_open_turn, *names))


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_store_that_does_not_take_suspended_turns_costs_the_cleanup_and_no_more(
    refuses: bool, autojump_clock: MockClock
) -> None:
    store = Trouble()
    async with open_stage(store, cleanup_timeout_s=3) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, CONTINUES, "Hello")
        store.at, store.refuses = "suspend_turns", refuses
        began = trio.current_time()
        with capture_logs() as lines:
            await suspend(stage)
        assert trio.current_time() - began == (0 if refuses else 3)
        assert reply.closed.is_set()
        assert (turn.is_suspended, turn.log.is_moved) == (True, True)
        assert stage.sessions.suspensions.not_kept == 1
        assert stage.sessions.pending_writes.turns == 0
        assert [line["log_level"] for line in lines if "suspended" in line["event"]] == ["warning"] * refuses


async def test_turns_that_wait_for_a_step_go_into_the_next_one(autojump_clock: MockClock) -> None:
    store = Trouble()
    async with open_stage(store) as stage:
        for number in range(3):
            await stage.sessions.create_session(NewSession(id=f"s{number}"))
            await stage.sessions.start_turn(f"s{number}", CONTINUES)
        [first, *others] = stage.sessions.open_turns()
        store.at = "suspend_turns"
        stage.stop.enter(Phase.INTERRUPTING)
        first.cut_short(first.end_of_stop())
        await store.reached.wait()
        assert stage.sessions.drain.interrupt_all() == len(others)
        await wait_all_tasks_blocked()
        with capture_logs() as lines:
            store.goes_on.set()
            await stage.sessions.drain.wait_idle()
        assert [line["turns"] for line in lines if "suspended" in line["event"]] == [1, 2]
        assert stage.sessions.suspensions.not_kept == 0


async def test_a_model_client_that_does_not_let_go_is_not_waited_for(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, _ = await begun(stage, CONTINUES, "Hello")
        stage.puppet.close_s = 50
        stage.stop.enter(Phase.INTERRUPTING)
        stage.sessions.drain.interrupt_all()
        await trio.sleep(1)
        assert not turn.log.closed
        await stage.sessions.end_hung(within_s=1)
        assert turn.is_suspended
        assert (await store.get_turn("s", turn.id, now=stage.clock())).text == "Hello"
        await trio.sleep(50)
    assert stage.sessions.suspensions.not_kept == 0
    assert stage.sessions.statistics().turns_suspended == 1


@pytest.mark.parametrize("is_done_first", [True, False])
@pytest.mark.parametrize("at", ["find_open_turn", "adopt_turns"])
async def test_a_cancelled_adoption_leaves_no_turn_behind_that_no_process_runs(
    at: str, is_done_first: bool, autojump_clock: MockClock
) -> None:
    store = Trouble()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        store.at, store.is_done_first = at, is_done_first
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                await other.sessions.open_events("s", turn_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await store.reached.wait()
            scope.cancel()
            await wait_all_tasks_blocked()
            store.goes_on.set()
        store.at = ""
        if at == "find_open_turn":
            assert other.sessions.open_turns() == []
            assert await suspended_in(store, limit=9) == ["s"]
        else:
            assert [turn.id for turn in other.sessions.open_turns()] == [turn_id]
            await other.puppet.next_reply()


async def test_an_adoption_without_an_answer_is_asked_again_and_is_one_attempt(autojump_clock: MockClock) -> None:
    store = Trouble()
    turn_id = await suspended(store)
    async with open_next(store, store_timeout_s=5) as other:
        store.at, store.is_done_first = "adopt_turns", True
        with pytest.raises(StoreError):
            await other.sessions.open_events("s", turn_id)
        assert other.sessions.open_turns() == []
        store.at = ""
        await other.sessions.adopt_waiting()  # at once: the turn may be this process's already
        [turn] = other.sessions.open_turns()
        assert (turn.id, turn.record().attempt) == (turn_id, 2)
        (await other.puppet.next_reply()).finish()
        await turn.wait_ended()
        assert [event.seq for event in turn.log.events() if isinstance(event, TurnResumed)] == [4]


async def test_turns_that_the_store_may_have_given_to_this_process_keep_their_places_among_the_live_ones(
    autojump_clock: MockClock,
) -> None:
    """No other process can run them. So they are adopted at the bound, too, and count against it before."""
    store = Trouble()
    turn_id = await suspended(store)
    async with open_next(store, store_timeout_s=5, live_turns_max=2) as other:
        for name in ("t", "u"):
            await other.sessions.create_session(NewSession(id=name))
        await other.sessions.start_turn("t", NewTurn(text="Hi", on_disconnect="continue"))
        await other.puppet.next_reply()
        store.at, store.is_done_first = "adopt_turns", True
        with pytest.raises(StoreError):
            await other.sessions.open_events("s", turn_id)
        await wait_all_tasks_blocked()
        store.at = ""
        with pytest.raises(TurnLimitError):
            await other.sessions.start_turn("u", NewTurn(text="Hi"))
        await other.sessions.open_events("s", turn_id)
        assert (await other.puppet.next_reply()).request.prefix == "Hello"
        with pytest.raises(TurnLimitError):
            await other.sessions.start_turn("u", NewTurn(text="Hi"))


async def test_a_stop_that_begins_during_an_adoption_suspends_the_turn_again(autojump_clock: MockClock) -> None:
    store = Trouble()
    turn_id = await suspended(store)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        store.at = "adopt_turns"
        nursery.start_soon(other.sessions.open_events, "s", turn_id)
        await store.reached.wait()
        nursery.start_soon(suspend, other)
        await wait_all_tasks_blocked()
        store.goes_on.set()
        await wait_all_tasks_blocked()
        assert await suspended_in(store, limit=9) == ["s"]
        assert other.puppet.asked == []
    async with open_next(store) as third:
        log, watch = await third.sessions.open_events("s", turn_id)
        (await third.puppet.next_reply()).finish()
        assert isinstance((await read_all(log))[-1], TurnCompleted)
        watch.release()


async def test_of_callers_that_come_at_once_one_adopts(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        opened = []

        async def open_events() -> None:
            opened.append(await other.sessions.open_events("s", turn_id))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(open_events)
        assert len({id(log) for log, _ in opened}) == 1
        reply = await other.puppet.next_reply()
        for _, watch in opened:
            watch.release()
        reply.finish()
        [turn] = other.sessions.open_turns()
        assert (await turn.wait_ended()).attempt == 2
        assert len(other.puppet.asked) == 1


async def test_a_turn_whose_model_no_upstream_has_any_more_fails(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:
        sessions = other.sessions
        puppet = other.puppet

        def client_for(model: str) -> ModelClient:
            if model == turn.model:
                raise InvalidRequestError("No upstream has this model.", field="model")
            return puppet

        turn = await sessions.get_turn("s", turn_id)
        adoptions = sessions._acceptance.adoptions
        adoptions._client_for = client_for
        adoptions._settings = sessions._settings.model_copy(update={"model": "other"})
        record = await sessions.wait_turn("s", turn_id)
        assert record.error is not None
        assert (record.state, record.error.code) == ("failed", "model_not_found")


# A process that another one has taken for dead, and that goes on


@asynccontextmanager
async def taken_over(path: Path, new: NewTurn = CONTINUES) -> AsyncIterator[tuple[Stage, Turn, Reply, Stage, Reply]]:
    """A turn of a process that was taken for dead, and goes on with it, as does another process; both on one file."""
    with trio.fail_after(60):
        async with open_sqlite_store(path) as dead, open_stage(cast("MemoryStore", dead), **IN_A_FILE) as stage:
            await stage.sessions.create_session(NewSession(id="s"))
            turn, reply = await begun(stage, new, "Hel", "lo")
            await checkpoint_turns(dead, [turn], store_timeout_s=CAP_S)
            await take_for_dead(dead)
            async with open_sqlite_store(path) as store, open_next(cast("MemoryStore", store), **IN_A_FILE) as other:
                await store.recover(now=other.clock())
                _, watch = await other.sessions.open_events("s", turn.id)
                with watch:
                    yield stage, turn, reply, other, await other.puppet.next_reply()


class Recorder:
    """Counts the calls of a store's method in its place."""

    calls = 0

    async def __call__(self, *_: object, **__: object) -> Collection[str]:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        return []


async def ends_told(turn: Turn, other: Stage, goes_on: Reply) -> list[str]:
    """The terminal events that readers of both processes see, once the other process has ended the turn."""
    goes_on.say(" there")
    goes_on.finish()
    told = [*await read_all(turn.log), *await events_of(other, turn.id)]
    return [kind for kind in kinds(told) if kind in ("turn.completed", "turn.interrupted", "turn.cancelled")]


async def test_a_process_that_was_taken_for_dead_tells_no_end_of_a_turn_that_goes_on_elsewhere(tmp_path: Path) -> None:
    async with taken_over(tmp_path / "lastcall.db") as (stage, turn, reply, other, goes_on):
        reply.say("!")
        await wait_all_tasks_blocked()
        asked = stage.store.suspend_turns = Recorder()  # type: ignore[method-assign]
        await checkpoint_turns(stage.store, [turn], store_timeout_s=CAP_S)
        with pytest.raises(TurnMovedError):
            await turn.wait_ended()
        assert asked.calls == 0, "there is nothing to give to the store"
        assert reply.closed.is_set()
        assert turn.log.is_moved
        assert await ends_told(turn, other, goes_on) == ["turn.completed"]
        assert (await other.sessions.get_turn("s", turn.id)).text == "Hello there"
        told = stage.sessions.statistics()
        assert (told.ends_not_stored, told.turns_suspended, told.turns_lost) == (0, 0, 1)
        assert stage.sessions.drain.is_idle


async def test_an_end_that_comes_after_another_process_has_the_turn_is_not_told(tmp_path: Path) -> None:
    async with taken_over(tmp_path / "lastcall.db") as (stage, turn, reply, other, goes_on):
        reply.say("!")
        reply.finish()
        with pytest.raises(TurnMovedError):
            await turn.wait_ended()
        assert turn.log.is_moved
        assert await ends_told(turn, other, goes_on) == ["turn.completed"]
        assert (await other.sessions.get_turn("s", turn.id)).text == "Hello there"
        assert stage.sessions.statistics().ends_not_stored == 0


@pytest.mark.parametrize("is_noticed_by", ["checkpoint", "end"])
async def test_an_end_is_told_once_where_another_process_has_ended_the_last_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_noticed_by: str
) -> None:
    monkeypatch.setattr("service.storage.rules.ATTEMPTS_MAX", 1)
    path = tmp_path / "lastcall.db"
    with trio.fail_after(60):
        async with open_sqlite_store(path) as dead, open_stage(cast("MemoryStore", dead), **IN_A_FILE) as stage:
            await stage.sessions.create_session(NewSession(id="s"))
            turn, reply = await begun(stage, CONTINUES, "Hello")
            await checkpoint_turns(dead, [turn], store_timeout_s=CAP_S)
            await take_for_dead(dead)
            async with open_sqlite_store(path) as store:
                await store.recover(now=stage.clock())
            if is_noticed_by == "end":
                reply.finish()
            else:
                reply.say("!")
                await wait_all_tasks_blocked()
                await checkpoint_turns(dead, [turn], store_timeout_s=CAP_S)
            told = await read_all(turn.log)
            with pytest.raises(TurnMovedError):
                await turn.wait_ended()
            assert kinds(told)[-1] == "turn.delta"
            assert kinds(await events_of(stage, turn.id, after=2)) == ["turn.interrupted"]


async def test_a_turn_whose_session_another_process_has_deleted_has_its_end_told(tmp_path: Path) -> None:
    async with taken_over(tmp_path / "lastcall.db") as (_, turn, reply, other, _goes_on):
        await other.sessions.delete_session("s")
        reply.finish()
        record = await turn.wait_ended()
        assert (record.state, record.stored) == ("completed", False)
        assert not turn.log.is_moved


async def test_a_queued_turn_that_another_process_has_does_not_start_and_ends_there(tmp_path: Path) -> None:
    with trio.fail_after(60):
        path = tmp_path / "lastcall.db"
        async with open_sqlite_store(path) as dead, open_stage(cast("MemoryStore", dead), **IN_A_FILE) as stage:
            await stage.sessions.create_session(NewSession(id="s"))
            _, reply = await begun(stage, CONTINUES, "Hello")
            queues = msgspec.structs.replace(CONTINUES, on_conflict="queue")
            turn, watch = await stage.sessions.start_turn("s", queues)
            watch.release()
            await take_for_dead(dead)
            async with open_sqlite_store(path) as store:
                await store.recover(now=stage.clock())
                reply.finish()
                with pytest.raises(TurnMovedError):
                    await turn.wait_ended()
                assert turn.log.is_moved
                assert len(stage.puppet.asked) == 1
                assert (await store.get_turn("s", turn.id, now=stage.clock())).state == "queued"


# Where the store does not take the end


class RefusesEnds(MemoryStore):
    """Refuses ends while it ``refuses_ends``."""

    refuses_ends = True

    async def end_turn(self, turn: TurnRecord, **rest: Any) -> EndResult:
        if self.refuses_ends:
            raise StoreError("disk full")
        return await super().end_turn(turn, **rest)


class HangsAndRefusesEnds(Trouble, RefusesEnds):
    pass


async def test_a_turn_whose_end_waits_for_the_store_is_not_run_again_by_an_adoption_that_was_asked_for_before(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The end becomes a pending write after the session's pending ends were tried, and before the store is asked."""
    monkeypatch.setattr("service.sessions.active.adoptions._HELD_UP_MAX_S", 10)
    store = HangsAndRefusesEnds()
    turn_id = await suspended(store)
    await suspended_sessions(store, "other")
    async with open_next(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions._acceptance.adopt("s")
        reply = await stage.puppet.next_reply()
        reply.finish()
        await trio.sleep(UNTOLD_MAX_S - 1)
        [turn] = stage.sessions.open_turns()
        store.at = "adopt_turns"
        for session_id in ("other", "s"):
            nursery.start_soon(stage.sessions._acceptance.adopt, session_id)
            await wait_all_tasks_blocked()
        await trio.sleep(2)
        assert (turn.is_suspended, stage.sessions.pending_writes.turns) == (True, 1)
        store.goes_on.set()
        await stage.puppet.next_reply()
        await wait_all_tasks_blocked()
        assert [it.session_id for it in stage.sessions.open_turns()] == ["other"]
        store.refuses_ends = False
        await stage.sessions.pending_writes.retry()
        assert (await stage.sessions.get_turn("s", turn_id)).state == "completed"


async def test_a_turn_whose_end_can_never_be_stored_is_not_run_again_by_this_process(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("service.sessions.turns.turn_task.UNTOLD_MAX_S", 1)
    store = MemoryStore()
    turn_id = await suspended(store)

    async def fail(*args: object, **options: object) -> EndResult:
        raise RuntimeError("a bug")

    async with open_next(store) as stage:
        log, watch = await stage.sessions.open_events("s", turn_id)
        reply = await stage.puppet.next_reply()
        monkeypatch.setattr(store, "end_turn", fail)
        reply.finish()
        await log.wait_closed()
        watch.release()
        await stage.sessions.pending_writes.retry()
        assert (log.is_moved, stage.sessions.pending_writes.turns) == (True, 0)
        with pytest.raises(StoreError):
            await stage.sessions.open_events("s", turn_id)
        assert stage.sessions.open_turns() == []


async def test_an_end_that_the_store_refuses_is_told_once_the_store_has_it(autojump_clock: MockClock) -> None:
    store = RefusesEnds()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, CONTINUES, "Hello")
        reply.finish()
        await trio.sleep(UNTOLD_MAX_S / 2)
        assert (turn.state, turn.log.closed) == ("running", False)
        store.refuses_ends = False
        record = await turn.wait_ended()
        assert (record.state, record.stored) == ("completed", True)
        assert kinds(list(turn.log.events()))[-1] == "turn.completed"


@pytest.mark.parametrize("stops", [True, False])
async def test_an_end_that_the_store_still_refuses_is_not_told_because_another_process_may_run_the_turn_again(
    stops: bool, autojump_clock: MockClock
) -> None:
    store, metrics = RefusesEnds(), Metrics()

    def counted(family: Family) -> dict[tuple[str, ...], list[float]]:
        return at_once(metrics.memory.read([family]))[family]

    async with open_stage(store, metrics=metrics) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, CONTINUES, "Hello")
        reply.finish()
        await trio.sleep(1)
        if stops:
            await suspend(stage)
        with trio.fail_after(2 * UNTOLD_MAX_S):
            with pytest.raises(TurnMovedError):
                await turn.wait_ended()
        assert kinds(list(turn.log.events())) == ["turn.started", "turn.delta"]
        assert (turn.log.is_moved, stage.sessions.pending_writes.turns) == (True, 1)
        assert counted(families.TURNS) == {}
        # The release phase of a stop, or the recovery, tries again.
        store.refuses_ends = False
        await stage.sessions.pending_writes.retry()
        assert (await stage.sessions.get_turn("s", turn.id)).state == "completed"
        assert kinds(await events_of(stage, turn.id))[-1] == "turn.completed"
        await stage.sessions.pending_writes.retry()
        assert counted(families.TURNS) == {("completed", "stop"): [1]}
        assert counted(families.TURNS_UNTOLD) == counted(families.ENDS_NOT_STORED) == {(): [0]}


async def test_an_end_of_a_turn_that_fails_in_a_stop_is_told_as_ever_where_the_store_refuses_it(
    autojump_clock: MockClock,
) -> None:
    store = RefusesEnds()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn, reply = await begun(stage, msgspec.structs.replace(CONTINUES, on_interrupt="fail"), "Hello")
        reply.finish()
        record = await turn.wait_ended()
        assert (record.state, record.stored) == ("completed", False)
        store.refuses_ends = False
        await stage.sessions.pending_writes.retry()


# Many at once


class Noting(MemoryStore):
    """Notes which sessions are adopted together, and may leave some out unless they are alone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []
        self.leaves_out: set[str] = set()
        self.size_max = 1000
        self.refusals = 0

    async def adopt_turns(self, session_ids: Sequence[str], **rest: Any) -> Mapping[str, Adoption]:
        self.asked.append([*session_ids])
        if self.refusals:
            self.refusals -= 1
            raise StoreError("The store refuses.")
        taken = [it for it in session_ids if it not in self.leaves_out or len(session_ids) == 1]
        adoptions = await super().adopt_turns(taken[: self.size_max], **rest)
        return {**adoptions, **dict.fromkeys(taken[self.size_max :], Adoption(is_put_off=True))}


async def test_the_turns_of_many_clients_that_come_at_once_are_adopted_by_few_steps_of_the_store(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("service.sessions.active.adoptions._AT_ONCE", 8)
    store = Noting()
    ids = [f"s{number}" for number in range(20)]
    await suspended_sessions(store, *ids)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        turns = {(await store.list_turns(it, limit=1, after=None, now=other.clock())).data[0].id: it for it in ids}
        for turn_id, session_id in turns.items():
            nursery.start_soon(other.sessions.open_events, session_id, turn_id)
        for _ in ids:
            (await other.puppet.next_reply()).finish()
        assert sorted(map(len, store.asked)) == [4, 8, 8]
        for turn_id, session_id in turns.items():
            record = await other.sessions.wait_turn(session_id, turn_id)
            assert (record.state, record.text, record.attempt) == ("completed", "Hello", 2)


async def test_a_session_that_a_step_leaves_out_has_a_step_of_its_own(autojump_clock: MockClock) -> None:
    store = Noting()
    store.leaves_out = {"b"}
    await suspended_sessions(store, "a", "b", "c")
    async with open_next(store) as other:
        await sweep(other)
        assert sorted(turn.session_id for turn in other.sessions.open_turns()) == ["a", "b", "c"]
        assert [sorted(it) for it in store.asked] == [["a", "b", "c"], ["b"]]


async def test_sessions_that_a_step_puts_off_for_their_size_go_together_in_the_next_one_before_others(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("service.sessions.active.adoptions._AT_ONCE", 4)
    store = Noting()
    store.size_max = 2
    await suspended_sessions(store, *"abcdefg")
    async with open_next(store) as other:
        await sweep(other)
        assert sorted(turn.session_id for turn in other.sessions.open_turns()) == [*"abcdefg"]
        assert list(map(len, store.asked)) == [4, 4, 3, 1]
        for before, after in pairwise(store.asked):
            assert after[: len(before) - 2] == before[2:]


async def test_sessions_that_a_store_has_refused_together_are_asked_for_alone(autojump_clock: MockClock) -> None:
    """One of them may be the cause, and the others need not suffer for it."""
    store = Noting()
    store.refusals = 1
    await suspended_sessions(store, "a", "b")
    async with open_next(store) as other:
        with pytest.raises(StoreError):
            await sweep(other)
        assert other.sessions.open_turns() == []
        await other.sessions.adopt_waiting()
        assert sorted(turn.session_id for turn in other.sessions.open_turns()) == ["a", "b"]
        assert sorted(map(sorted, store.asked)) == [["a"], ["a", "b"], ["b"]]


class Locked(Noting):
    """As PostgreSQL: a step with several sessions passes over a locked one, and a step for one waits for its lock."""

    def __init__(self) -> None:
        super().__init__()
        self.unlocked = trio.Event()

    async def adopt_turns(self, session_ids: Sequence[str], **rest: Any) -> Mapping[str, Adoption]:
        if self.leaves_out.issuperset(session_ids) and len(session_ids) == 1:
            await self.unlocked.wait()
        return await super().adopt_turns(session_ids, **rest)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("locked", [1, 3, 12])
async def test_locked_sessions_hold_up_the_adoption_of_no_other(
    locked: int, at_once: bool, autojump_clock: MockClock
) -> None:
    store = Locked()
    locked_ids = [f"locked{number}" for number in range(locked)]
    free_ids = [f"s{number}" for number in range(6)]
    await suspended_sessions(store, *locked_ids, *free_ids)
    store.leaves_out = {*locked_ids}
    waited: dict[str, float] = {}
    async with open_next(store) as other, trio.open_nursery() as nursery:
        turns = {
            it: (await store.list_turns(it, limit=1, after=None, now=other.clock())).data[0].id
            for it in [*locked_ids, *free_ids]
        }

        async def come(session_id: str, after_s: float) -> None:
            await trio.sleep(after_s)
            at = trio.current_time()
            while session_id not in waited:
                try:
                    await other.sessions.open_events(session_id, turns[session_id])
                except StoreError:
                    await trio.sleep(1)  # as the streams tell their clients to
                else:
                    waited[session_id] = trio.current_time() - at

        for number, session_id in enumerate(locked_ids):
            nursery.start_soon(come, session_id, 0 if at_once else number * 1.7)
        for number, session_id in enumerate(free_ids):
            nursery.start_soon(come, session_id, 25 if at_once else number * 4)
        await trio.sleep(60)
        assert sorted(waited) == free_ids
        assert max(waited.values()) < 0.5
        store.unlocked.set()
        await trio.sleep(12)
        assert sorted(waited) == sorted(turns)
        assert other.sessions.pending_writes.refusal is None
        assert not other.sessions._acceptance.adoptions._asked_alone


async def test_callers_that_come_one_by_one_while_a_step_is_under_way_go_together(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    store = MemoryStore()
    ids = [f"s{number}" for number in range(6)]
    await suspended_sessions(store, *ids)
    asked: list[int] = []
    adopt_turns = store.adopt_turns

    async def adopt_slowly(session_ids: Sequence[str], **rest: Any) -> Mapping[str, Adoption]:
        asked.append(len(session_ids))
        await trio.sleep(0.1)
        return await adopt_turns(session_ids, **rest)

    monkeypatch.setattr(store, "adopt_turns", adopt_slowly)
    async with open_next(store) as other, trio.open_nursery() as nursery:
        for session_id in ids:
            nursery.start_soon(other.sessions._acceptance.adopt, session_id)
            await trio.sleep(0.01)
    assert asked == [1, 5]


async def test_a_caller_that_waits_no_longer_leaves_its_turn_to_the_next_one(autojump_clock: MockClock) -> None:
    """The store answers late: by then the session's turns may be known to this process as another object."""
    store = Trouble()
    turn_id = await suspended(store)
    async with open_next(store, store_timeout_s=5) as other, trio.open_nursery() as nursery:
        store.at = "adopt_turns"
        late: list[StoreError] = []

        async def call() -> None:
            try:
                await other.sessions._acceptance.adopt("s")
            except StoreError as error:
                late.append(error)

        async with trio.open_nursery() as callers:
            callers.start_soon(call)
            await trio.sleep(4)
            callers.start_soon(call)  # waits for the first one, which has half of its time
        assert len(late) == 2
        store.at = ""
        log, watch = await other.sessions.open_events("s", turn_id)
        with watch:
            [turn] = other.sessions.open_turns()
            assert (turn.log is log, turn.record().attempt) == (True, 2)
            (await other.puppet.next_reply()).finish()
            assert isinstance((await read_all(log))[-1], TurnCompleted)
        nursery.cancel_scope.cancel()


# Where an adoption fails by a fault of this service


async def suspended_sessions(store: MemoryStore, *ids: str) -> None:
    """Sessions with a suspended turn each, in this order."""
    async with open_stage(store) as stage:
        for session_id in ids:
            await stage.sessions.create_session(NewSession(id=session_id))
            await stage.sessions.start_turn(session_id, CONTINUES)
            (await stage.puppet.next_reply()).say("Hello")
            await wait_all_tasks_blocked()
        await suspend(stage)


class Poisoned(MemoryStore):
    """Fails, by no refusal, at each adoption of the poisoned sessions."""

    def __init__(self, *poisoned: str) -> None:
        super().__init__()
        self.poisoned = {*poisoned}
        self.asked: list[list[str]] = []

    async def adopt_turns(self, session_ids: Sequence[str], **rest: Any) -> Mapping[str, Adoption]:
        self.asked.append([*session_ids])
        if self.poisoned & {*session_ids}:
            raise RuntimeError("a row that cannot be decoded")
        return await super().adopt_turns(session_ids, **rest)


@pytest.mark.parametrize("at_once", [1, 100])
async def test_a_session_whose_adoption_fails_keeps_no_other_from_being_adopted(
    at_once: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("service.sessions.sessions._ADOPTED_AT_ONCE", at_once)
    store = Poisoned("a", "b")
    await suspended_sessions(store, "a", "b", "c", "d")
    async with open_next(store) as other:
        with capture_logs() as lines:
            await sweep(other)
            await other.sessions.adopt_waiting()
        assert sorted(turn.session_id for turn in other.sessions.open_turns()) == ["c", "d"]
        alone = [["a"], ["b"], ["c"], ["d"]]
        together = [] if at_once == 1 else [["a", "b", "c", "d"]]
        assert sorted(map(sorted, store.asked)) == sorted([*together, *alone])
        failed = [line["session_id"] for line in lines if line["log_level"] == "error"]
        assert sorted(failed) == ["a", "b"]


async def test_a_session_whose_adoption_failed_is_tried_again_later(autojump_clock: MockClock) -> None:
    store = Poisoned("a")
    await suspended_sessions(store, "a")
    async with open_next(store) as other:
        await sweep(other)
        store.poisoned.clear()
        await trio.sleep(ADOPTION_PAUSE_S - 1)
        await other.sessions.adopt_waiting()
        assert other.sessions.open_turns() == []
        await trio.sleep(1)
        await other.sessions.adopt_waiting()
        assert [turn.session_id for turn in other.sessions.open_turns()] == ["a"]


async def test_an_adopted_turn_whose_span_fails_ends_no_other_turn_and_its_caller_has_the_error(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    store = MemoryStore()
    await suspended_sessions(store, "a", "b")
    fails = ["a"]

    def begin_trace(turn: Turn, _: TurnRecord) -> None:
        if turn.session_id in fails:
            raise RuntimeError("a sampler fails")

    async with open_next(store) as other:
        adoptions = other.sessions._acceptance.adoptions
        monkeypatch.setattr(adoptions, "_begin_trace", begin_trace)
        async with trio.open_nursery() as callers:

            async def adopt_a() -> None:
                with pytest.raises(RuntimeError, match="a sampler fails"):
                    await other.sessions._acceptance.adopt("a")

            callers.start_soon(adopt_a)
            callers.start_soon(other.sessions._acceptance.adopt, "b")
        await trio.sleep(10)
        assert [(it.session_id, it.state) for it in other.sessions.open_turns()] == [("b", "running")]
        fails.clear()
        await sweep(other)
        assert sorted(turn.session_id for turn in other.sessions.open_turns()) == ["a", "b"]
        assert [*adoptions.unresolved] == []


async def test_an_adoption_that_fails_after_its_caller_has_left_is_told_in_the_log(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The step of the store goes on for another caller."""
    store = Trouble()
    await suspended_sessions(store, "a", "b")
    async with open_next(store) as other:
        adoptions = other.sessions._acceptance.adoptions
        restored = adoptions._restored

        def fail(record: TurnRecord, *rest: Any) -> Any:
            if record.session_id == "a":
                raise RuntimeError("no idea")
            return restored(record, *rest)

        monkeypatch.setattr(adoptions, "_restored", fail)
        store.at, store.is_done_first = "adopt_turns", True
        with capture_logs() as lines:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.sessions._acceptance.adopt, "b")
                with other.sessions._active.holding("a") as session, pytest.raises(StoreError):
                    await adoptions.adopt(session, within_s=1)
                store.goes_on.set()
        assert "adopted turns do not run yet: giving them failed" in [line["event"] for line in lines]
        assert [turn.session_id for turn in other.sessions.open_turns()] == ["b"]
        monkeypatch.setattr(adoptions, "_restored", restored)
        await sweep(other)
        assert sorted(turn.session_id for turn in other.sessions.open_turns()) == ["a", "b"]


async def test_a_deleted_session_is_not_adopted_for_ever(autojump_clock: MockClock) -> None:
    store = Poisoned("a")
    await suspended_sessions(store, "a")
    async with open_next(store) as other:
        await sweep(other)
        assert [*other.sessions._acceptance.adoptions.unresolved] == ["a"]
        await other.sessions.delete_session("a")
        store.poisoned.clear()  # with its rows
        await trio.sleep(ADOPTION_PAUSE_S)
        await other.sessions.adopt_waiting()
        assert [*other.sessions._acceptance.adoptions.unresolved] == []


async def test_a_model_client_that_fails_over_the_text_so_far_has_the_reply_begin_anew(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    store = MemoryStore()
    turn_id = await suspended(store)
    async with open_next(store) as other:

        def fail(*_: object) -> bool:
            raise RuntimeError("no idea")

        monkeypatch.setattr(other.puppet, "can_continue", fail)
        log, watch = await other.sessions.open_events("s", turn_id)
        with watch:
            reply = await other.puppet.next_reply()
            reply.say("Anew")
            reply.finish()
            told = await read_all(log)
        assert text_told(told) == "Anew"
        assert kinds(told)[-1] == "turn.completed"


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("unfit", [0, 1])
async def test_an_adopted_turn_that_cannot_be_restored_fails_once_and_the_others_run(
    unfit: int, in_file: bool, tmp_path: Path
) -> None:
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            store: Any = MemoryStore()
            if in_file:
                store = await stack.enter_async_context(open_sqlite_store(tmp_path / "lastcall.db"))
            async with open_stage(store, **IN_A_FILE) as stage:
                await stage.sessions.create_session(NewSession(id="s"))
                await begun(stage, CONTINUES, "Hel", "lo")
                await stage.sessions.start_turn("s", msgspec.structs.replace(CONTINUES, on_conflict="queue"))
                ids = [turn.id for turn in stage.sessions.open_turns()]
                await suspend(stage)
            adopt_turns = store.adopt_turns

            async def adopt_unfit(session_ids: Sequence[str], **rest: Any) -> Mapping[str, Adoption]:
                adoptions = await adopt_turns(session_ids, **rest)
                adopted = [*adoptions["s"].turns]
                if adopted:
                    adopted[unfit] = msgspec.structs.replace(adopted[unfit], runs=(Run(7, b"\x05"),))
                return {"s": msgspec.structs.replace(adoptions["s"], turns=adopted)}

            store.adopt_turns = adopt_unfit
            async with open_next(store, **IN_A_FILE) as other:
                with capture_logs() as lines:
                    await sweep(other)
                assert [line["turn_id"] for line in lines if line["log_level"] == "error"] == [ids[unfit]]
                assert [*other.sessions._acceptance.adoptions.unresolved] == []
                assert [turn.id for turn in other.sessions.open_turns()] == ids
                (await other.puppet.next_reply()).finish()
                failed = await other.sessions.wait_turn("s", ids[unfit])
                assert failed.error is not None
                assert (failed.state, failed.error.code, failed.stored) == ("failed", "internal_error", True)
                assert (await other.sessions.wait_turn("s", ids[1 - unfit])).state == "completed"
                assert (len(other.puppet.asked), other.sessions.statistics().turns_crashed) == (1, 1)
                told = await events_of(other, ids[unfit])
                assert kinds(told) == (["turn.queued", "turn.failed"] if unfit else ["turn.resumed", "turn.failed"])
                assert text_told(told, "Hello") == ("Hello" if unfit else "")
            store.adopt_turns = adopt_turns
            async with open_next(store, **IN_A_FILE) as third:
                assert await events_of(third, ids[unfit]) == told
                assert (await third.sessions.get_turn("s", ids[unfit])).text == ""
