"""A turn from its acceptance to its end: in every situation it has one terminal event."""

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import ModelError, SessionNotFoundError, StoreError, TurnLimitError, TurnNotFoundError
from service.models.client import Message
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.events import (
    TurnCancelled,
    TurnCompleted,
    TurnDelta,
    TurnFailed,
    TurnInterrupted,
    TurnReasoning,
    TurnStarted,
)
from service.sessions.events.outcome import Cancelled
from service.sessions.sessions import Sessions
from service.sessions.turns.turn import Turn
from service.storage.memory import MemoryStore
from service.storage.records import EndResult, Failure, TurnRecord
from tests.sessions.puppet import Stage, kinds, open_stage, read_all


async def start(sessions: Sessions, session_id: str, text: str = "hi", **new: object) -> Turn:
    """Start a background turn: it does not end when its watchers leave."""
    turn, watch = await sessions.start_turn(session_id, NewTurn(text=text, background=True, **new))  # type: ignore[arg-type]
    watch.release()
    return turn


async def test_completed_turn_tells_started_deltas_and_completed(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.think("hm")
        reply.say("Grüß", " Gott 👋")
        reply.finish()
        assert await read_all(turn.log) == [
            TurnStarted(seq=1, session_id=session.id, turn_id=turn.id, model="scripted"),
            TurnReasoning(seq=2, text="hm"),
            TurnDelta(seq=3, text="Grüß"),
            TurnDelta(seq=4, text=" Gott 👋"),
            TurnCompleted(seq=5, finish_reason="stop", usage=turn.record().usage, text_length=11),
        ]
        stored = await stage.sessions.get_turn(session.id, turn.id)
        assert (stored.state, stored.text, stored.last_seq) == ("completed", "Grüß Gott 👋", 5)
        assert [item.type for item in stored.output] == ["reasoning", "message"]
        assert stored.usage is not None
        assert stored.usage.output_tokens == 2


async def test_input_is_stored_before_the_acceptance_returns(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id, "keep me")
        stored = await stage.store.get_turn(session.id, turn.id, now=stage.clock())
        assert stored.input[0].text == "keep me"
        assert (await stage.sessions.get_session(session.id)).head == turn.id


async def test_end_is_stored_before_its_event_is_visible(autojump_clock: MockClock) -> None:
    class SlowStore(MemoryStore):
        async def end_turn(self, turn: TurnRecord, **rest: object) -> EndResult:
            reached.set()
            await trio.sleep(0.5)
            return await super().end_turn(turn, **rest)  # type: ignore[arg-type]

    reached = trio.Event()
    async with open_stage(SlowStore()) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        (await stage.puppet.next_reply()).finish()
        await reached.wait()
        await wait_all_tasks_blocked()
        assert not turn.log.closed
        assert stage.puppet.open_replies == 0, "the upstream is closed before the end is stored"
        await turn.wait_ended()
        assert turn.log.closed


async def test_text_so_far_is_readable_while_the_turn_runs(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.say("half")
        await wait_all_tasks_blocked()
        running = await stage.sessions.get_turn(session.id, turn.id)
        assert (running.state, running.text) == ("running", "half")
        assert (await stage.sessions.list_turns(session.id, limit=10)).data[0].text == "half"
        assert (await stage.sessions.get_session(session.id)).status == "running"
        await stage.sessions.cancel_turn(session.id, turn.id)
        assert (await stage.sessions.get_session(session.id)).status == "idle"


async def test_next_turn_gets_the_conversation_so_far(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession(system_message="be brief"))
        first = await start(stage.sessions, session.id, "one")
        reply = await stage.puppet.next_reply()
        reply.say("1")
        reply.finish()
        await first.wait_ended()
        second = await start(stage.sessions, session.id, "two")
        reply = await stage.puppet.next_reply()
        assert reply.request.prompt == (
            Message("system", "be brief"),
            Message("user", "one"),
            Message("assistant", "1"),
            Message("user", "two"),
        )
        assert second.record().parent == first.id
        reply.finish()


async def test_turn_beside_another_leaves_that_one_out_of_its_prompt(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        for text in ("root", "left"):
            turn = await start(stage.sessions, session.id, text)
            reply = await stage.puppet.next_reply()
            reply.say(f"re {text}")
            reply.finish()
            await turn.wait_ended()
        root = (await stage.sessions.list_turns(session.id, limit=1)).data[0]
        await start(stage.sessions, session.id, "right", parent=root.id)
        reply = await stage.puppet.next_reply()
        assert [message.text for message in reply.request.prompt] == ["root", "re root", "right"]
        with pytest.raises(TurnNotFoundError):
            await start(stage.sessions, session.id, "x", parent="turn_unknown", on_conflict="queue")
        reply.finish()


async def test_upstream_error_becomes_a_failed_turn_and_harms_no_other(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        broken = await stage.sessions.create_session(NewSession())
        other = await stage.sessions.create_session(NewSession())
        failing = await start(stage.sessions, broken.id)
        failing_reply = await stage.puppet.next_reply()
        going_on = await start(stage.sessions, other.id)
        other_reply = await stage.puppet.next_reply()
        failing_reply.say("par")
        await wait_all_tasks_blocked()
        failing_reply.fail(ModelError("upstream_truncated", "Cut off."))
        events = await read_all(failing.log)
        assert isinstance(events[-1], TurnFailed)
        assert (events[-1].error.code, events[-1].text_length) == ("upstream_truncated", 3)
        other_reply.say("fine")
        other_reply.finish()
        assert (await going_on.wait_ended()).state == "completed"
        again = await start(stage.sessions, broken.id)
        (await stage.puppet.next_reply()).finish()
        assert (await again.wait_ended()).state == "completed"


async def test_crash_of_a_turn_is_an_internal_error_without_details(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        (await stage.puppet.next_reply()).fail(ValueError("secret"))
        record = await turn.wait_ended()
        assert record.error is not None
        assert record.error.code == "internal_error"
        assert "secret" not in record.error.message


@pytest.mark.parametrize(
    ("settings", "said", "code"),
    [
        ({"first_token_timeout_s": 7}, False, "first_token_timeout"),
        ({"next_token_timeout_s": 3}, True, "next_token_timeout"),
        ({"turn_timeout_s": 5}, True, "turn_timeout"),
        ({"turn_timeout_s": 5}, False, "turn_timeout"),
    ],
)
async def test_deadlines_fail_the_turn(
    autojump_clock: MockClock, settings: dict[str, float], said: bool, code: str
) -> None:
    async with open_stage(**settings) as stage:
        session = await stage.sessions.create_session(NewSession())
        started_at = trio.current_time()
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        if said:
            reply.say("x")
        record = await turn.wait_ended()
        assert record.error is not None
        assert record.error.code == code
        assert trio.current_time() - started_at == pytest.approx(next(iter(settings.values())))


WORDS = "It says: org-4711 has no credit"


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("setting", "told", "logged"),
    [
        ("caller", f"The model server failed. {WORDS}", []),
        ("log", "The model server failed.", [WORDS]),
        ("both", f"The model server failed. {WORDS}", [WORDS]),
    ],
)
async def test_an_upstream_s_words_go_where_the_setting_says(
    autojump_clock: MockClock, setting: str, told: str, logged: list[str], begun: bool
) -> None:
    error = ModelError("upstream_error", "The model server failed.", upstream_words=WORDS)
    with capture_logs() as entries:
        async with open_stage(upstream_words=setting) as stage:
            stage.puppet.refuse = None if begun else error
            session = await stage.sessions.create_session(NewSession())
            turn = await start(stage.sessions, session.id)
            if begun:
                reply = await stage.puppet.next_reply()
                reply.say("x")
                reply.fail(error)
            (failed,) = [it for it in await read_all(turn.log) if isinstance(it, TurnFailed)]
            stored = await stage.sessions.get_turn(session.id, turn.id)
    assert failed.error == stored.error == Failure("upstream_error", told)
    (ended,) = [entry for entry in entries if entry["event"] == "turn ended"]
    assert ended["error"] == "The model server failed."
    warnings = [entry for entry in entries if "upstream_words" in entry]
    assert [entry["upstream_words"] for entry in warnings] == logged
    assert all(
        (it["turn_id"], it["session_id"], it["log_level"]) == (turn.id, session.id, "warning") for it in warnings
    )


async def test_an_upstream_that_fails_after_the_end_was_decided_is_not_logged_again(
    autojump_clock: MockClock,
) -> None:
    with capture_logs() as entries:
        async with open_stage(upstream_words="log") as stage:
            session = await stage.sessions.create_session(NewSession())
            turn = await start(stage.sessions, session.id)
            reply = await stage.puppet.next_reply()
            turn.decide(Cancelled("requested"))
            reply.fail(ModelError("upstream_error", "The model server failed.", upstream_words=WORDS))
            assert (await turn.wait_ended()).state == "cancelled"
    assert not any("upstream_words" in entry for entry in entries)


@pytest.mark.parametrize(
    ("error", "code"), [(ModelError("upstream_error", "it broke"), "upstream_error"), (ValueError(), "internal_error")]
)
async def test_a_failure_is_the_end_though_a_deadline_passes_while_the_client_closes(
    autojump_clock: MockClock, error: Exception, code: str
) -> None:
    async with open_stage(next_token_timeout_s=3) as stage:
        stage.puppet.close_s = 10
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.say("x")
        await trio.sleep(1)
        reply.fail(error)
        record = await turn.wait_ended()
        assert record.error is not None
        assert record.error.code == code
        assert trio.current_time() == 11


async def test_the_first_deadline_is_the_end_though_another_passes_while_the_client_closes(
    autojump_clock: MockClock,
) -> None:
    async with open_stage(next_token_timeout_s=3, disconnect_grace_s=1) as stage:
        stage.puppet.close_s = 10
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="Hi"))
        (await stage.puppet.next_reply()).say("x")
        await wait_all_tasks_blocked()
        watch.release()
        await trio.sleep(5)
        turn.watch()  # this watch comes too late
        assert (await turn.wait_ended()).reason == "disconnected"


async def test_head_of_the_reply_counts_as_waiting_for_the_first_token(autojump_clock: MockClock) -> None:
    async with open_stage(first_token_timeout_s=7) as stage:
        stage.puppet.hang_before_head = True
        session = await stage.sessions.create_session(NewSession())
        record = await (await start(stage.sessions, session.id)).wait_ended()
        assert record.error is not None
        assert record.error.code == "first_token_timeout"


@pytest.mark.parametrize("progress", ["reasoning", "work"])
async def test_progress_rearms_the_next_token_deadline(progress: str, autojump_clock: MockClock) -> None:
    async with open_stage(next_token_timeout_s=3, first_token_timeout_s=3) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        for _ in range(5):
            await trio.sleep(2.9)
            if progress == "work":
                reply.work()
            else:
                reply.think("hm")
        reply.finish()
        record = await turn.wait_ended()
        assert record.state == "completed"
        assert record.last_seq == (2 if progress == "work" else 7), "work makes no event"


async def test_cancel_is_idempotent_and_waits_for_the_end(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.say("part")
        await wait_all_tasks_blocked()
        for _ in range(2):
            record = await stage.sessions.cancel_turn(session.id, turn.id)
            assert (record.state, record.reason, record.text) == ("cancelled", "requested", "part")
        assert (await read_all(turn.log))[-1] == TurnCancelled(seq=3, reason="requested", text_length=4)
        with pytest.raises(TurnNotFoundError):
            await stage.sessions.cancel_turn(session.id, "turn_unknown")
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.cancel_turn("nowhere", turn.id)


async def test_first_cause_wins_when_the_reply_ends_in_the_same_instant(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="x"))
        reply = await stage.puppet.next_reply()
        reply.say("all")
        reply.finish()
        watch.release()  # in the same instant, before the turn's task has looked at the reply
        events = await read_all(turn.log)
        assert events[-1] == TurnCancelled(seq=2, reason="disconnected", text_length=0, usage=reply.usage)
        assert kinds(events) == ["turn.started", "turn.cancelled"]
        assert (await stage.sessions.get_turn(session.id, turn.id)).state == "cancelled"


async def test_client_that_leaves_after_the_completion_changes_nothing(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="x"))
        reply = await stage.puppet.next_reply()
        reply.finish()
        await reply.closed.wait()
        watch.release()
        watch.release()
        assert (await turn.wait_ended()).state == "completed"


async def test_reply_at_the_bound_completes_and_above_it_fails(autojump_clock: MockClock) -> None:
    async with open_stage(reply_bytes_max=1024) as stage:
        session = await stage.sessions.create_session(NewSession())
        for size, state in ((1024, "completed"), (1025, "failed")):
            turn = await start(stage.sessions, session.id)
            reply = await stage.puppet.next_reply()
            reply.say("é" * 512, "x" * (size - 1024))
            reply.finish()
            record = await turn.wait_ended()
            assert record.state == state
            assert record.text == "é" * 512
            assert (record.error is None) == (size == 1024)
            assert record.error is None or record.error.code == "reply_too_large"


async def test_log_bound_fails_the_turn_and_still_tells_its_end(autojump_clock: MockClock) -> None:
    async with open_stage(log_bytes_max=64 * 1024, reply_bytes_max=10**6) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.think(*["x" * 1000] * 100)
        events = await read_all(turn.log)
        assert isinstance(events[-1], TurnFailed)
        assert events[-1].error.code == "log_too_large"
        assert len(turn.record().output[0].text) == 1000 * ((62 * 1024 - 512 - 4) // 1004)
        assert reply.closed.is_set()


async def test_live_turns_are_bounded_over_all_sessions(autojump_clock: MockClock) -> None:
    async with open_stage(live_turns_max=2) as stage:
        ids = [(await stage.sessions.create_session(NewSession())).id for _ in range(3)]
        turns = [await start(stage.sessions, session_id) for session_id in ids[:2]]
        with pytest.raises(TurnLimitError):
            await start(stage.sessions, ids[2])
        await stage.sessions.cancel_turn(ids[0], turns[0].id)
        await start(stage.sessions, ids[2])


async def test_refused_acceptance_leaves_nothing(autojump_clock: MockClock) -> None:
    async with open_stage(live_turns_max=1) as stage:
        for _ in range(3):
            with pytest.raises(SessionNotFoundError):
                await start(stage.sessions, "nowhere")
        assert stage.sessions.statistics().turns_queued == 0


async def test_unwinding_the_tree_interrupts_running_and_queued_turns(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        session = await stage.sessions.create_session(NewSession())
        running = await start(stage.sessions, session.id)
        (await stage.puppet.next_reply()).say("part")
        queued = await start(stage.sessions, session.id, on_conflict="queue")
        await wait_all_tasks_blocked()
        # A turn that the session's task has not seen yet:
        unseen = await start(stage.sessions, session.id, on_conflict="queue")
    for turn, length in ((running, 4), (queued, 0), (unseen, 0)):
        last = (await read_all(turn.log))[-1]
        assert isinstance(last, TurnInterrupted)
        assert (last.reason, last.text_length) == ("shutdown", length)


class RefusingStore(MemoryStore):
    """A store that refuses or hangs at the end of a turn, until ``fixed`` is set."""

    def __init__(self, *, hang: bool) -> None:
        super().__init__()
        self.hang = hang
        self.fixed = False

    async def end_turn(self, turn: TurnRecord, **rest: object) -> EndResult:
        if self.fixed:
            return await super().end_turn(turn, **rest)  # type: ignore[arg-type]
        if self.hang:
            await trio.sleep_forever()
        raise StoreError("disk full")


@pytest.mark.parametrize("hang", [False, True])
async def test_end_that_the_store_refuses_is_marked_as_not_stored_and_kept_later(
    autojump_clock: MockClock, hang: bool
) -> None:
    store = RefusingStore(hang=hang)
    async with open_stage(store) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.say("kept?")
        reply.finish()
        last = (await read_all(turn.log))[-1]
        assert isinstance(last, TurnCompleted)
        assert not last.stored
        assert (await stage.sessions.get_turn(session.id, turn.id)).state == "completed"
        assert (await store.get_turn(session.id, turn.id, now=stage.clock())).state == "running"
        assert stage.sessions.statistics().ends_not_stored == 1
        store.fixed = True
        await stage.sessions.pending_writes.retry()
        assert (await store.get_turn(session.id, turn.id, now=stage.clock())).text == "kept?"
        assert stage.sessions.statistics().ends_not_stored == 0


async def test_acceptance_that_the_store_hangs_on_is_refused_and_leaves_no_open_turn(
    autojump_clock: MockClock,
) -> None:
    class HangingStore(MemoryStore):
        async def begin_turn(self, turn: TurnRecord, **rest: object) -> object:  # type: ignore[override]
            await super().begin_turn(turn, **rest)  # type: ignore[arg-type]
            await trio.sleep_forever()  # it was written, but the answer never comes

    async with open_stage(HangingStore(), store_timeout_s=2) as stage:
        session = await stage.sessions.create_session(NewSession())
        with pytest.raises(StoreError):
            await start(stage.sessions, session.id)
        assert (await stage.sessions.get_session(session.id)).status == "running"
        await stage.sessions.pending_writes.retry()
        assert (await stage.sessions.get_session(session.id)).status == "idle"


async def test_caller_that_leaves_during_the_commit_leaves_a_turn_with_an_owner(autojump_clock: MockClock) -> None:
    class SlowStore(MemoryStore):
        async def begin_turn(self, turn: TurnRecord, **rest: object) -> object:  # type: ignore[override]
            reached.set()
            await trio.sleep(1)
            return await super().begin_turn(turn, **rest)  # type: ignore[arg-type]

    reached = trio.Event()

    async def call(stage: Stage, session_id: str) -> None:
        turn, watch = await stage.sessions.start_turn(session_id, NewTurn(text="x"))
        with watch:
            await turn.wait_ended()

    async with open_stage(SlowStore()) as stage:
        session = await stage.sessions.create_session(NewSession())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, stage, session.id)
            await reached.wait()
            nursery.cancel_scope.cancel()
        await stage.sessions.drain.wait_idle()
        (record,) = (await stage.sessions.list_turns(session.id, limit=10)).data
        assert (record.state, record.reason) == ("cancelled", "disconnected")


async def test_readers_are_told_once_of_what_came_together_and_also_if_its_end_fails(autojump_clock: MockClock) -> None:
    told: list[int] = []
    async with open_stage(reply_bytes_max=1024) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        await wait_all_tasks_blocked()

        class Reader:
            def take_appended(self, now: float) -> bool:
                told.append(turn.log.last_seq)
                return True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn.log.wait_to_read, Reader())
            await wait_all_tasks_blocked()
            for texts in (["a", "b"], ["c", "d", "x" * 1024], ["lost"]):
                reply.say(*texts)
                await wait_all_tasks_blocked()
        assert kinds(await read_all(turn.log))[-1] == "turn.failed"
    assert told == [3, 5]
