"""Sessions: conflicts, disconnects, deletion, expiry, paging of messages, and the shutdown's side."""

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    InvalidRequestError,
    QueueFullError,
    RepeatedError,
    SessionExistsError,
    SessionNotFoundError,
    ShuttingDownError,
    StoreError,
    StreamLimitError,
    TurnInProgressError,
)
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.events import TurnInterrupted
from service.sessions.turns.turn import RETURN_S
from service.sessions.upkeep.expiry import run_expiry, sweep
from service.stop_state import Phase, StopState
from service.storage.memory import MemoryStore
from service.storage.records import IdempotencyKey, SessionPatch
from tests.sessions.puppet import Stage, kinds, open_stage, read_all
from tests.sessions.turns.test_turns import start
from tests.storage.rows import a_turn


async def new_session(stage: Stage) -> str:
    return (await stage.sessions.create_session(NewSession())).id


# Conflicts


async def test_second_turn_is_rejected_by_default(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        with pytest.raises(TurnInProgressError) as caught:
            await start(stage.sessions, session_id)
        assert caught.value.turn_id == turn.id


async def test_queued_turns_run_one_after_the_other(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        first = await start(stage.sessions, session_id, "1")
        second = await start(stage.sessions, session_id, "2", on_conflict="queue")
        third = await start(stage.sessions, session_id, "3", on_conflict="queue")
        assert third.record().parent == second.id
        reply = await stage.puppet.next_reply()
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == 1
        await stage.sessions.cancel_turn(session_id, second.id)
        await wait_all_tasks_blocked()
        assert stage.puppet.open_replies == 1, "the third must not run while the first does"
        reply.finish()
        await first.wait_ended()
        reply = await stage.puppet.next_reply()
        assert reply.request.prompt[-1].text == "1\n\n2\n\n3"
        reply.finish()
        assert kinds(await read_all(third.log)) == ["turn.queued", "turn.started", "turn.completed"]
        assert kinds(await read_all(second.log)) == ["turn.queued", "turn.cancelled"]


async def test_queue_is_bounded(autojump_clock: MockClock) -> None:
    async with open_stage(queued_turns_max=2) as stage:
        session_id = await new_session(stage)
        for _ in range(3):
            await start(stage.sessions, session_id, on_conflict="queue")
        with pytest.raises(QueueFullError):
            await start(stage.sessions, session_id, on_conflict="queue")


async def test_superseding_turn_cancels_all_others_and_runs(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        running = await start(stage.sessions, session_id)
        (await stage.puppet.next_reply()).say("half an ans")
        queued = await start(stage.sessions, session_id, on_conflict="queue")
        await wait_all_tasks_blocked()
        latest = await start(stage.sessions, session_id, "no, this", on_conflict="supersede")
        reply = await stage.puppet.next_reply()
        for turn in (running, queued):
            record = await turn.wait_ended()
            assert (record.state, record.reason) == ("cancelled", "superseded")
        assert [message.text for message in reply.request.prompt] == ["hi", "half an ans", "hi\n\nno, this"]
        reply.finish()
        assert (await latest.wait_ended()).state == "completed"


async def test_concurrent_starts_are_decided_one_by_one(autojump_clock: MockClock) -> None:
    outcomes: list[str] = []

    async def try_start(stage: Stage, session_id: str) -> None:
        try:
            await start(stage.sessions, session_id)
            outcomes.append("accepted")
        except TurnInProgressError:
            outcomes.append("rejected")

    async with open_stage() as stage:
        session_id = await new_session(stage)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(try_start, stage, session_id)
    assert sorted(outcomes) == ["accepted"] + ["rejected"] * 19


# Disconnects


async def test_turn_is_cancelled_with_its_last_watch(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn, first = await stage.sessions.start_turn(session_id, NewTurn(text="x"))
        _, second = await stage.sessions.open_events(session_id, turn.id)
        first.release()
        await wait_all_tasks_blocked()
        assert turn.end is None
        second.release()
        record = await turn.wait_ended()
        assert (record.state, record.reason) == ("cancelled", "disconnected")


@pytest.mark.parametrize("new", [{"on_disconnect": "continue"}, {"background": True}])
async def test_turn_that_is_to_continue_runs_on_without_watches(
    autojump_clock: MockClock, new: dict[str, object]
) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn, watch = await stage.sessions.start_turn(session_id, NewTurn(text="x", **new))  # type: ignore[arg-type]
        watch.release()
        reply = await stage.puppet.next_reply()
        await trio.sleep(50)
        reply.finish()
        assert (await turn.wait_ended()).state == "completed"


@pytest.mark.parametrize("queued", [False, True])
async def test_grace_gives_a_client_time_to_come_back(autojump_clock: MockClock, queued: bool) -> None:
    async with open_stage(disconnect_grace_s=10) as stage:
        session_id = await new_session(stage)
        if queued:
            await start(stage.sessions, session_id)
        turn, watch = await stage.sessions.start_turn(session_id, NewTurn(text="x", on_conflict="queue"))
        watch.release()
        await trio.sleep(9)
        _, watch = await stage.sessions.open_events(session_id, turn.id)
        await trio.sleep(30)
        assert turn.end is None
        watch.release()
        left_at = trio.current_time()
        record = await turn.wait_ended()
        assert (record.state, record.reason) == ("cancelled", "disconnected")
        assert trio.current_time() - left_at == pytest.approx(10)


async def test_a_client_that_another_process_has_cut_off_is_given_time_to_come_back(autojump_clock: MockClock) -> None:
    """This is true even if another client leaves on purpose meanwhile."""
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn, cut = await stage.sessions.start_turn(session_id, NewTurn(text="x"))
        _, other = await stage.sessions.open_events(session_id, turn.id)
        cut_at = trio.current_time()
        cut.release(client_returns=True)
        await trio.sleep(1)
        other.release()
        await trio.sleep(3)
        _, back = await stage.sessions.open_events(session_id, turn.id)
        await trio.sleep(30)
        assert turn.end is None
        back.release()
        assert (await turn.wait_ended()).reason == "disconnected"
        assert trio.current_time() - cut_at == pytest.approx(34)

        turn, cut = await stage.sessions.start_turn(session_id, NewTurn(text="x"))
        cut_at = trio.current_time()
        cut.release(client_returns=True)
        assert (await turn.wait_ended()).reason == "disconnected"
        assert trio.current_time() - cut_at == pytest.approx(RETURN_S)


# Event logs


async def test_stream_that_starts_after_everything_is_over_gets_a_replay(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        reply = await stage.puppet.next_reply()
        reply.say("a", "b")
        reply.finish()
        await turn.wait_ended()
        await wait_all_tasks_blocked()
        log, watch = await stage.sessions.open_events(session_id, turn.id)
        assert log is not turn.log
        assert await read_all(log) == await read_all(turn.log)
        assert kinds(await read_all(log, after=3)) == ["turn.completed"]
        watch.release()


async def test_stream_that_joins_between_the_last_delta_and_the_terminal_event(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        reply = await stage.puppet.next_reply()
        reply.say("all there is")
        await wait_all_tasks_blocked()
        log, watch = await stage.sessions.open_events(session_id, turn.id)
        with watch:
            reply.finish()
            assert kinds(await read_all(log)) == ["turn.started", "turn.delta", "turn.completed"]


# Deletion


async def test_deleted_session_is_gone_at_once_and_its_turns_end(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        queued = await start(stage.sessions, session_id, on_conflict="queue")
        await stage.puppet.next_reply()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stage.sessions.delete_session, session_id)
            for _ in range(2):  # the first deletion has begun by then
                await trio.lowlevel.checkpoint()
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: stage.sessions.get_session(session_id),
                lambda: stage.sessions.get_turn(session_id, turn.id),
                lambda: stage.sessions.open_events(session_id, turn.id),
                lambda: stage.sessions.update_session(session_id, SessionPatch(title="x")),
                lambda: start(stage.sessions, session_id, on_conflict="queue"),
            ]
            for call in calls:
                with pytest.raises(SessionNotFoundError):
                    await call()
        for ended in (turn, queued):
            record = await ended.wait_ended()
            assert (record.state, record.reason) == ("cancelled", "session_deleted")
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.delete_session(session_id)
        with pytest.raises(SessionNotFoundError):
            await stage.store.get_session(session_id, now=stage.clock())
        assert await stage.sessions.count_sessions() == 0


async def test_deletion_completes_though_its_caller_leaves(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        with trio.CancelScope() as scope:
            scope.cancel()
            await stage.sessions.delete_session(session_id)
        assert scope.cancelled_caught
        await stage.sessions.drain.wait_idle()
        assert turn.record().reason == "session_deleted"
        await stage.sessions.create_session(NewSession(id=session_id))


async def test_deletion_that_the_store_refuses_can_be_tried_again(autojump_clock: MockClock) -> None:
    class Refusing(MemoryStore):
        refuses = True

        async def remove_deleted(self, session_id: str) -> None:
            if self.refuses:
                raise StoreError("read-only")
            await super().remove_deleted(session_id)

    store = Refusing()
    async with open_stage(store) as stage:
        session_id = await new_session(stage)
        with pytest.raises(StoreError):
            await stage.sessions.delete_session(session_id)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_session(session_id)


async def test_chosen_id_is_taken_once(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await stage.sessions.create_session(NewSession(id="mine"))
        with pytest.raises(SessionExistsError):
            await stage.sessions.create_session(NewSession(id="mine"))


# Expiry


async def test_idle_session_expires_while_a_stream_is_open(autojump_clock: MockClock) -> None:
    async with open_stage(idle_timeout_s=100) as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        _, watch = await stage.sessions.open_events(session_id, turn.id)
        with watch:
            stage.clock.advance(99)
            await stage.sessions.get_session(session_id)  # a read does not move the deadline
            stage.clock.advance(1)
            with pytest.raises(SessionNotFoundError):
                await stage.sessions.get_session(session_id)
            with pytest.raises(SessionNotFoundError):
                await start(stage.sessions, session_id)


async def test_session_with_a_turn_does_not_expire_and_its_end_moves_the_deadline(autojump_clock: MockClock) -> None:
    async with open_stage(idle_timeout_s=100) as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id)
        reply = await stage.puppet.next_reply()
        stage.clock.advance(1000)
        assert await sweep(stage.store, clock=stage.clock, store_timeout_s=5) == 0
        reply.finish()
        await turn.wait_ended()
        stage.clock.advance(99)
        await stage.sessions.get_session(session_id)
        stage.clock.advance(1)
        assert await sweep(stage.store, clock=stage.clock, store_timeout_s=5) == 1


async def test_session_used_between_the_look_of_expiry_and_its_delete_stays(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def delete_expired(self, **arguments: object) -> int:
            looked.set()
            await used.wait()
            return await super().delete_expired(**arguments)  # type: ignore[arg-type]

    looked, used = trio.Event(), trio.Event()
    async with open_stage(Slow(), idle_timeout_s=100) as stage, trio.open_nursery() as nursery:
        session_id = await new_session(stage)
        stage.clock.advance(99)
        at_the_look = stage.clock()
        stage.clock.advance(10)
        nursery.start_soon(lambda: sweep(stage.store, clock=stage.clock, store_timeout_s=5))
        await looked.wait()
        stage.clock.now = at_the_look
        await stage.sessions.update_session(session_id, SessionPatch(title="still here"))
        stage.clock.advance(10)
        used.set()
        await wait_all_tasks_blocked()
        assert (await stage.sessions.get_session(session_id)).title == "still here"


async def test_expiry_loop_forgets_the_keys_of_sessions_that_are_gone_for_a_day(autojump_clock: MockClock) -> None:
    kept = [IdempotencyKey(caller="", key=f"{n}", fingerprint=b"f") for n in range(250)]
    async with open_stage(idle_timeout_s=100) as stage, trio.open_nursery() as nursery:
        for key in kept:
            await stage.sessions.create_session(NewSession(), key=key)
        stage.clock.advance(101)
        run = partial(run_expiry, stage.store, clock=stage.clock, interval_s=300, store_timeout_s=5)
        await nursery.start(lambda task_status: run(task_status=task_status))
        await trio.sleep(301)
        for key in kept:
            with pytest.raises(RepeatedError):
                await stage.store.check_key(key, now=stage.clock())
        stage.clock.advance(24 * 3600)
        await trio.sleep(300)
        for key in kept:
            await stage.store.check_key(key, now=stage.clock())
        nursery.cancel_scope.cancel()


async def test_expiry_loop_sweeps_in_batches_and_survives_an_error(autojump_clock: MockClock) -> None:
    class Flaky(MemoryStore):
        sweeps = 0

        async def delete_expired(self, **arguments: object) -> int:
            self.sweeps += 1
            if self.sweeps == 1:
                raise StoreError("locked")
            return await super().delete_expired(**arguments)  # type: ignore[arg-type]

    store = Flaky()
    async with open_stage(store, idle_timeout_s=100) as stage, trio.open_nursery() as nursery:
        for _ in range(1200):
            await new_session(stage)
        stage.clock.advance(101)
        await nursery.start(
            lambda task_status: run_expiry(
                store,
                clock=stage.clock,
                interval_s=300,
                store_timeout_s=5,
                task_status=task_status,
            )
        )
        await trio.sleep(301)
        assert store.sweeps == 1
        await trio.sleep(300)
        assert store.sweeps == 14
        assert await store.delete_expired(now=stage.clock(), limit=1) == 0
        nursery.cancel_scope.cancel()


# Messages


async def all_messages(stage: Stage, session_id: str, *, limit: int) -> list[str]:
    texts: list[str] = []
    after = None
    for _ in range(100):
        page = await stage.sessions.list_messages(session_id, limit=limit, after=after)
        assert len(page.data) <= limit
        texts += [message.item.text for message in page.data]
        after = page.next
        if after is None:
            return texts
    pytest.fail("the pages have no end")


async def test_turns_without_messages_end_no_page(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        parent = None
        for number in range(12):
            record = a_turn(f"t{number}", session_id, parent=parent, texts=[f"{number}"] if number % 5 == 0 else [])
            await stage.store.begin_turn(record, now=stage.clock())
            parent = record.id
        for limit in range(1, 5):
            assert await all_messages(stage, session_id, limit=limit) == ["0", "5", "10"]


async def test_pages_of_messages_go_on_at_their_cursor_also_after_new_turns(autojump_clock: MockClock) -> None:
    """A reply since the previous page is the next message; on another path there is no next message."""
    async with open_stage() as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id, "q")
        reply = await stage.puppet.next_reply()
        first = await stage.sessions.list_messages(session_id, limit=1)
        assert ([message.item.text for message in first.data], first.next) == (["q"], None)
        reply.say("a")
        reply.finish()
        await turn.wait_ended()
        first = await stage.sessions.list_messages(session_id, limit=1)
        other = await start(stage.sessions, session_id, "q2", parent=turn.id)
        second = await stage.sessions.list_messages(session_id, limit=1, after=first.next)
        assert [message.item.text for message in second.data] == ["a"]
        third = await stage.sessions.list_messages(session_id, limit=1, after=second.next)
        assert [message.item.text for message in third.data] == ["q2"]
        await stage.sessions.cancel_turn(session_id, other.id)
        await start(stage.sessions, session_id, "beside", parent=None)
        with pytest.raises(InvalidRequestError):
            await stage.sessions.list_messages(session_id, limit=1, after=second.next)


async def test_messages_of_the_path_are_paged(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        assert (await stage.sessions.list_messages(session_id, limit=5)).data == ()
        for number in range(3):
            turn = await start(stage.sessions, session_id, f"q{number}")
            reply = await stage.puppet.next_reply()
            reply.say(f"a{number}")
            reply.finish()
            await turn.wait_ended()
        page = await stage.sessions.list_messages(session_id, limit=4)
        assert [message.item.text for message in page.data] == ["q0", "a0", "q1", "a1"]
        rest = await stage.sessions.list_messages(session_id, limit=4, after=page.next)
        assert [message.item.text for message in rest.data] == ["q2", "a2"]
        assert rest.next is None
        for limit in range(1, 8):
            assert await all_messages(stage, session_id, limit=limit) == ["q0", "a0", "q1", "a1", "q2", "a2"]
        assert (await stage.sessions.get_session(session_id)).message_count == 6
        with pytest.raises(InvalidRequestError):
            await stage.sessions.list_messages(session_id, limit=4, after="msg_unknown")


# Streams


async def test_a_proxied_request_that_outlives_the_service_is_not_closed_after_a_call(
    autojump_clock: MockClock,
) -> None:
    async def never_called() -> None:
        pytest.fail("there is no nursery left for this call")

    async with open_stage() as stage:
        forward = stage.sessions.proxied_requests.open_request("@nowhere")
    assert not forward.close_after(never_called)
    forward.close()


async def test_stream_places_are_bounded_and_given_back_once() -> None:
    from service.sessions.events.streams import Streams

    streams = Streams(streams_max=1, heartbeat_interval_s=15, stop=StopState())
    slot = streams.open_stream()
    with pytest.raises(StreamLimitError):
        streams.open_stream()
    slot.close(ended=True)
    slot.close(ended=False)
    streams.open_stream().close(ended=False)
    assert (streams.open, streams.ended, streams.aborted) == (0, 1, 1)


# The shutdown's side


async def test_shutdown_refuses_new_work_interrupts_queued_turns_and_lets_running_ones_finish(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        session_id = await new_session(stage)
        running = await start(stage.sessions, session_id)
        queued = await start(stage.sessions, session_id, on_conflict="queue")
        reply = await stage.puppet.next_reply()
        stage.stop.enter(Phase.DRAINING)
        with pytest.raises(ShuttingDownError):
            await start(stage.sessions, session_id, on_conflict="queue")
        with pytest.raises(ShuttingDownError):
            await new_session(stage)
        assert stage.sessions.drain.interrupt_queued() == 1
        record = await queued.wait_ended()
        assert (record.state, record.reason) == ("interrupted", "shutdown")
        assert running.end is None
        reply.say("done")
        reply.finish()
        await stage.sessions.drain.wait_idle()
        assert running.record().state == "completed"


async def test_turn_accepted_during_the_interrupt_is_interrupted_too(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def begin_turn(self, turn: object, **rest: object) -> object:  # type: ignore[override]
            committing.set()
            await trio.sleep(1)
            return await super().begin_turn(turn, **rest)  # type: ignore[arg-type]

    committing = trio.Event()
    async with open_stage(Slow()) as stage, trio.open_nursery() as nursery:
        session_id = await new_session(stage)
        nursery.start_soon(start, stage.sessions, session_id)
        await committing.wait()
        stage.stop.enter(Phase.INTERRUPTING)
        assert stage.sessions.drain.interrupt_all() == 0
        await stage.sessions.drain.wait_idle()
        (record,) = (await stage.sessions.list_turns(session_id, limit=2)).data
        assert (record.state, record.reason) == ("interrupted", "shutdown")


async def test_the_end_of_a_turn_whose_task_is_cancelled_is_stored_all_the_same(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def end_turn(self, *args: object, **options: object) -> object:  # type: ignore[override]
            await trio.sleep(0.5)
            return await super().end_turn(*args, **options)  # type: ignore[arg-type]

    async with open_stage(Slow()) as stage:
        turn = await start(stage.sessions, await new_session(stage))
        await stage.puppet.next_reply()
    assert (turn.record().state, turn.record().reason, turn.stored) == ("interrupted", "shutdown", True)
    assert trio.current_time() == 0.5


async def test_shutdown_waits_for_a_deletion_under_way(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def remove_deleted(self, session_id: str) -> None:
            await trio.sleep(1)
            await super().remove_deleted(session_id)

    async with open_stage(Slow()) as stage, trio.open_nursery() as nursery:
        session_id = await new_session(stage)
        nursery.start_soon(stage.sessions.delete_session, session_id)
        await wait_all_tasks_blocked()
        with trio.fail_after(10):
            await stage.sessions.drain.wait_idle()
        assert trio.current_time() == 1


async def test_a_proxied_request_has_the_time_of_its_owner_during_the_interrupt(
    autojump_clock: MockClock,
) -> None:
    async with open_stage(cleanup_timeout_s=3) as stage:
        earlier = stage.sessions.proxied_requests.open_request("@nowhere")
        stage.stop.enter(Phase.INTERRUPTING)
        stage.sessions.drain.interrupt_all()
        later = stage.sessions.proxied_requests.open_request("@nowhere")
        for forward in (earlier, later):
            with trio.fail_after(10), forward.waiting() as wait:
                await trio.sleep_forever()
            assert wait.cancelled_caught
            assert forward.was_cut
            forward.close()
        assert trio.current_time() == pytest.approx(3, abs=0.1)
        await stage.sessions.drain.wait_idle()


async def test_interrupted_turn_keeps_its_partial_reply_and_the_session_goes_on(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        session_id = await new_session(stage)
        turn = await start(stage.sessions, session_id, "question")
        (await stage.puppet.next_reply()).say("part of")
        await wait_all_tasks_blocked()
        stage.sessions.drain.interrupt_all()
        await stage.sessions.drain.wait_idle()
        assert (await read_all(turn.log))[-1] == TurnInterrupted(seq=3, reason="shutdown", text_length=7)
    async with open_stage(store) as stage:
        await start(stage.sessions, session_id, "go on")
        reply = await stage.puppet.next_reply()
        assert [message.text for message in reply.request.prompt] == ["question", "part of", "go on"]
