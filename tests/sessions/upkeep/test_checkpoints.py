"""Checkpoints store the replies of running turns, and a reader gets the part that survives a crash."""

from collections.abc import Collection, Sequence

import msgspec
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.api.native.event_frames import decode_frame, encode_frame
from service.errors import EventsLostError, StoreError
from service.sessions.commands import NewSession
from service.sessions.events.events import TurnDelta, TurnInterrupted
from service.sessions.turns.turn import Turn
from service.sessions.upkeep import checkpoints
from service.sessions.upkeep.checkpoints import checkpoint_turns, run_checkpoints
from service.storage import rules
from service.storage.memory import MemoryStore
from service.storage.pieces import STARTED, Run
from service.storage.records import SEQ_AFTER_CRASH, Checkpoint, EndResult, EndState, EventsPage
from tests.sessions.puppet import open_stage, pieces_of, read_all
from tests.sessions.turns.test_turns import start
from tests.storage.rows import T0, a_session, a_turn, ended, said, told


class Recording(MemoryStore):
    """Records the checkpoints, and refuses as many as ``refusals`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Checkpoint]] = []
        self.refusals = 0
        self.ends: list[int] = []

    async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> Collection[str]:
        lost = await super().checkpoint_turns(checkpoints)
        self.calls.append(list(checkpoints))
        if self.refusals:
            self.refusals -= 1
            raise StoreError("told to")
        return lost

    async def end_turn(self, *arguments: object, after: int = 0, **named: object) -> EndResult:
        self.ends.append(after)
        return await super().end_turn(*arguments, after=after, **named)  # type: ignore[arg-type]


async def test_a_checkpoint_brings_what_all_turns_grew_by_in_one_call(autojump_clock: MockClock) -> None:
    store = Recording()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        turns = []
        replies = []
        for _ in range(3):
            session = await stage.sessions.create_session(NewSession())
            turns.append(await start(stage.sessions, session.id))
            replies.append(await stage.puppet.next_reply())
        await nursery.start(
            lambda task_status: run_checkpoints(
                store, open_turns=stage.sessions.open_turns, interval_s=1, store_timeout_s=5, task_status=task_status
            )
        )
        replies[0].think("hm")
        replies[0].say("Hel", "lo")
        await trio.sleep(1.5)
        assert [sorted(it.turn_id for it in call) for call in store.calls] == [sorted(turn.id for turn in turns)]
        await trio.sleep(5)
        assert len(store.calls) == 1, "nothing has grown"

        replies[0].say(" you")
        await trio.sleep(1)
        (again,) = store.calls[1]
        assert (again.turn_id, again.after) == (turns[0].id, 4)
        assert (again.runs, again.text, again.items) == (said(" you", item=1), " you", ())
        first = next(it for it in store.calls[0] if it.turn_id == turns[0].id)
        assert first.runs == (Run(STARTED), *said("hm"), *said("Hel", "lo", item=1))
        assert first.text == "hmHello"
        assert [(item.type, item.text) for item in first.items] == [("reasoning", ""), ("message", "")]
        assert [item.id for item in first.items] == [item.id for item in turns[0].record().output]

        for reply in replies:
            reply.finish()
        for turn in turns:
            await turn.wait_ended()
        assert sorted(store.ends) == [1, 1, 5], "an end names the last event that a checkpoint brought"
        assert await told(store, turns[0].session_id, turns[0].id) == pieces_of(turns[0].log)
        nursery.cancel_scope.cancel()


async def test_the_checkpoint_after_a_refused_one_has_its_events_too(autojump_clock: MockClock) -> None:
    store = Recording()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        store.refusals = 1
        nursery.start_soon(
            lambda: run_checkpoints(store, open_turns=stage.sessions.open_turns, interval_s=1, store_timeout_s=5)
        )
        reply.say("Hel")
        await trio.sleep(1.5)
        reply.say("lo")
        await trio.sleep(1)
        assert [[it.after for it in call] for call in store.calls] == [[0], [0]]
        assert store.calls[1][0].text == "Hello"
        nursery.cancel_scope.cancel()
        reply.finish()
        await turn.wait_ended()
        assert await told(store, session.id, turn.id) == pieces_of(turn.log)


class TakenOver(Recording):
    """A store in which another owner has taken this one for dead, once :meth:`take_over` was called."""

    async def take_over(self, turn: Turn) -> None:
        """End a turn as the other owner does, so that it is this owner's no longer."""
        theirs = rules.crashed(await self.get_turn(turn.session_id, turn.id, now=T0), [], [], T0)
        assert await MemoryStore.end_turn(self, theirs, runs=(), now=T0) is EndResult.KEPT


async def test_a_turn_that_another_process_has_ended_stops_at_its_next_checkpoint(autojump_clock: MockClock) -> None:
    store = TakenOver()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        await stage.sessions.create_session(NewSession(id="other"))
        turn = await start(stage.sessions, "s")
        reply = await stage.puppet.next_reply()
        other = await start(stage.sessions, "other")
        other_reply = await stage.puppet.next_reply()
        nursery.start_soon(
            lambda: run_checkpoints(store, open_turns=stage.sessions.open_turns, interval_s=1, store_timeout_s=5)
        )
        await store.take_over(turn)
        reply.say("to nobody")
        other_reply.say("Hi")
        with capture_logs() as log, trio.fail_after(2):
            record = await turn.wait_ended()
        assert (record.state, record.reason, record.stored) == ("interrupted", "crash", False)
        assert [line["turn_id"] for line in log if "took this process for dead" in line["event"]] == [turn.id]
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == 1, "the model is asked on for a turn that is not this process's"
        assert stage.sessions.pending_writes.turns == 0, "the end will never be taken, and still waits"
        assert other.running
        assert other.stored_seq == 2, "the checkpoints of the other turns count"
        nursery.cancel_scope.cancel()


async def test_a_queued_turn_that_another_process_has_ended_never_asks_the_model(autojump_clock: MockClock) -> None:
    store = TakenOver()
    async with open_stage(store) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        first = await start(stage.sessions, "s")
        reply = await stage.puppet.next_reply()
        second = await start(stage.sessions, "s", on_conflict="queue")
        await store.take_over(second)
        reply.finish()
        with capture_logs() as log, trio.fail_after(2):
            await first.wait_ended()
            record = await second.wait_ended()
        assert (record.state, record.reason, record.stored) == ("interrupted", "crash", False)
        assert [line["turn_id"] for line in log if "took this process for dead" in line["event"]] == [second.id]
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == 0, "the model was asked for a turn that is not this process's"
        assert stage.sessions.pending_writes.turns == 0


async def test_a_turn_that_ends_during_its_checkpoint_is_kept_whole(autojump_clock: MockClock) -> None:
    class Slow(Recording):
        async def checkpoint_turns(self, checkpoints: Sequence[Checkpoint]) -> Collection[str]:
            lost = await super().checkpoint_turns(checkpoints)
            await trio.sleep(1)
            return lost

    store = Slow()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        reply.say("Hel")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: checkpoint_turns(store, stage.sessions.open_turns(), store_timeout_s=5))
        await trio.testing.wait_all_tasks_blocked()
        reply.say("lo")
        reply.finish()
        await turn.wait_ended()
        await trio.sleep(2)
        assert await told(store, session.id, turn.id) == pieces_of(turn.log)


async def test_many_large_turns_are_kept_in_several_calls(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_BATCH_LENGTH_MAX", 2000)
    store = Recording()
    async with open_stage(store) as stage:
        for _ in range(5):
            session = await stage.sessions.create_session(NewSession())
            await start(stage.sessions, session.id)
            (await stage.puppet.next_reply()).say("x" * 1500)
        await trio.testing.wait_all_tasks_blocked()
        await checkpoint_turns(store, stage.sessions.open_turns(), store_timeout_s=5)
        assert [len(call) for call in store.calls] == [2, 2, 1]


# After a crash

FRAMES = [encode_frame(TurnDelta(seq=seq, text=f"{seq} ")) for seq in (1, 2, 3)]
CRASHED = msgspec.structs.replace(
    ended(a_turn(), "interrupted", text="1 2 3 "), reason="crash", last_seq=SEQ_AFTER_CRASH
)


class Crashed(MemoryStore):
    """A store with a turn that a crash interrupted after three stored events."""

    async def get_turn(self, *_: object, **__: object) -> object:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        return CRASHED

    async def read_events(self, session_id: str, turn_id: str, *, after: int = 0, length_max: int = 0) -> EventsPage:
        await trio.lowlevel.checkpoint()
        texts = ["1 ", "2 ", "3 "][after:]
        return EventsPage(after=after, runs=said(*texts), text="".join(texts), kept=3, ended=True, text_length=6)


@pytest.mark.parametrize("cursor", [0, 1, 3])
async def test_after_a_crash_what_is_left_is_replayed_and_then_the_end(cursor: int) -> None:
    async with open_stage(Crashed()) as stage:
        log, _ = await stage.sessions.open_events("s", "t", after=cursor)
        events = await read_all(log, after=cursor)
        terminal = TurnInterrupted(seq=SEQ_AFTER_CRASH, reason="crash", text_length=6)
        assert events == [*(decode_frame(frame) for frame in FRAMES[cursor:]), terminal]
        assert (log.closed, log.last_seq) == (True, SEQ_AFTER_CRASH)


async def test_after_a_crash_a_seq_of_a_lost_event_gets_events_lost_with_the_text() -> None:
    async with open_stage(Crashed()) as stage:
        for cursor in (4, 100_000, SEQ_AFTER_CRASH - 1):
            with pytest.raises(EventsLostError) as lost:
                await stage.sessions.open_events("s", "t", after=cursor)
            assert (lost.value.after, lost.value.state, lost.value.text) == (3, "interrupted", "1 2 3 ")


async def test_after_a_crash_a_reader_that_saw_the_end_has_nothing_left_to_read() -> None:
    async with open_stage(Crashed()) as stage:
        log, _ = await stage.sessions.open_events("s", "t", after=SEQ_AFTER_CRASH)
        assert log.read_after(SEQ_AFTER_CRASH) == []


@pytest.mark.parametrize(("state", "kept", "is_whole"), [("completed", 3, True), ("completed", 2, False)])
async def test_a_turn_with_holes_is_not_replayed(state: EndState, kept: int, *, is_whole: bool) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await store.create_session(a_session(idle_timeout_s=1e9), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        end = msgspec.structs.replace(ended(a_turn(), state, text="123"), last_seq=4)
        await store.end_turn(end, runs=said(*"123"[:kept]), now=T0)
        if is_whole:
            replay, _ = await stage.sessions.open_events("s", "t")
            assert len(await read_all(replay)) == 4
        else:
            with pytest.raises(EventsLostError):
                await stage.sessions.open_events("s", "t")


async def test_a_crashed_turn_without_events_is_its_end() -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await store.create_session(a_session(idle_timeout_s=1e9), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        await store.end_turn(msgspec.structs.replace(CRASHED, output=()), runs=(), now=T0)
        replay, _ = await stage.sessions.open_events("s", "t")
        assert await read_all(replay) == [TurnInterrupted(seq=SEQ_AFTER_CRASH, reason="crash", text_length=0)]
