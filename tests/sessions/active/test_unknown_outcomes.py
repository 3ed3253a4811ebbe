"""Writes whose outcome is unknown when their callers get an answer; later the sessions find out, and all agree again.

For each write of the store: it takes longer than ``store_timeout_s``, and then happens or does not.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import SessionExistsError, SessionNotFoundError, StoreError
from service.sessions.active import deletion
from service.sessions.commands import NewSession, NewTurn
from service.sessions.turns.turn import Turn
from service.sessions.upkeep.checkpoints import checkpoint_turns
from service.sessions.upkeep.expiry import sweep
from service.sessions.upkeep.recovery import INTERVAL_S, run_recovery
from service.storage.records import SessionPatch
from tests.sessions.late_store import LateStore, Outcome, open_late_store
from tests.sessions.puppet import Reply, Stage, frames_in, frames_of, open_stage
from tests.sessions.turns.test_turns import start

TIMEOUT_S = 5.0
RECOVERED_S = 6.5 + 2 * INTERVAL_S
"""After this time the write is over and the recovery loop has run since."""

outcomes = pytest.mark.parametrize("outcome", ["lands", "is lost"])


class Scene(Stage):
    """A stage on a late store, with the recovery loop, a session ``s`` and a running turn in it."""

    store: LateStore
    turn: Turn
    reply: Reply

    async def wait_for_recovery(self) -> None:
        await trio.sleep(RECOVERED_S)
        await wait_all_tasks_blocked()


@asynccontextmanager
async def open_scene() -> AsyncIterator[Scene]:
    async with (
        open_late_store() as store,
        open_stage(store, store_timeout_s=TIMEOUT_S, cleanup_timeout_s=TIMEOUT_S) as stage,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(lambda task_status: run_recovery(stage.sessions, shared=False, task_status=task_status))
        await stage.sessions.create_session(NewSession(id="s"))
        scene = Scene(stage.sessions, store, stage.puppet, stage.clock, stage.stop)
        scene.turn = await start(stage.sessions, "s", "first")
        scene.reply = await stage.puppet.next_reply()
        scene.reply.say("so far")
        await wait_all_tasks_blocked()
        yield scene
        nursery.cancel_scope.cancel()


async def is_there(scene: Scene, session_id: str) -> bool:
    try:
        await scene.sessions.get_session(session_id)
    except SessionNotFoundError:
        return False
    return True


# Each write, one by one


async def _create(scene: Scene) -> None:
    await scene.sessions.create_session(NewSession(id="new"))


async def _fork(scene: Scene) -> None:
    scene.reply.finish()
    await scene.turn.wait_ended()
    await scene.sessions.fork_session("s", copy_id="new")


async def _update(scene: Scene) -> None:
    await scene.sessions.update_session("s", SessionPatch(title="a title"))


async def _delete(scene: Scene) -> None:
    await scene.sessions.delete_session("s")


async def _begin(scene: Scene) -> None:
    await start(scene.sessions, "s", "second", on_conflict="queue")


async def _start(scene: Scene) -> None:
    second = await start(scene.sessions, "s", "second", on_conflict="queue")
    scene.reply.finish()
    await scene.turn.wait_ended()
    record = await second.wait_ended()
    assert (record.state, record.error and record.error.code) == ("failed", "store_unavailable")
    raise StoreError("As its end says.")


async def _checkpoint(scene: Scene) -> None:
    await checkpoint_turns(scene.store, [scene.turn], store_timeout_s=TIMEOUT_S)


async def _end(scene: Scene) -> None:
    scene.reply.finish()
    record = await scene.turn.wait_ended()
    assert not record.stored
    assert record.state == "completed"
    raise StoreError("As the record says.")


async def _expire(scene: Scene) -> None:
    await scene.sessions.create_session(NewSession(id="old", idle_timeout_s=1))
    scene.clock.advance(2)
    await sweep(scene.store, clock=scene.clock, store_timeout_s=TIMEOUT_S)


WRITES: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "create_session": _create,
    "fork_session": _fork,
    "update_session": _update,
    "mark_deleted": _delete,
    "remove_deleted": _delete,
    "begin_turn": _begin,
    "start_turn": _start,
    "checkpoint_turns": _checkpoint,
    "end_turn": _end,
    "delete_expired": _expire,
}


@outcomes
@pytest.mark.parametrize("write", WRITES)
async def test_memory_and_store_agree_after_a_write_whose_outcome_was_unknown(
    autojump_clock: MockClock, write: str, outcome: Outcome
) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = write, outcome
        with pytest.raises(StoreError), capture_logs():
            await WRITES[write](scene)
        assert scene.store.late is None, "it was not slow"
        await scene.wait_for_recovery()
        scene.reply.finish()
        await scene.turn.wait_ended()
        await wait_all_tasks_blocked()
        assert scene.puppet.open_replies == 0, "a model call runs that has no turn"
        assert scene.sessions.statistics().ends_not_stored == 0
        assert scene.sessions.pending_writes.refusal is None, "the store takes writes again"
        for session_id in ("s", "new"):
            await check_usable(scene, session_id)


@outcomes
async def test_an_end_whose_outcome_was_unknown_is_told_as_stored_once_the_store_has_it(
    autojump_clock: MockClock, outcome: Outcome
) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = "end_turn", outcome
        with pytest.raises(StoreError), capture_logs():
            await _end(scene)
        await scene.wait_for_recovery()
        assert scene.turn.record().stored
        assert (await scene.store.get_turn("s", scene.turn.id, now=scene.clock())).state == "completed"


async def check_usable(scene: Scene, session_id: str) -> None:
    """Check that the session exists, has no open turn and takes a turn, or does not exist and can be created."""
    assert not await scene.store.is_marked(session_id)
    there = await is_there(scene, session_id)
    with suppress(SessionExistsError):
        await scene.sessions.create_session(NewSession(id=session_id))
        assert not there, "what is there exists"
    session = await scene.sessions.get_session(session_id)
    turns = (await scene.sessions.list_turns(session_id, limit=100)).data
    assert session.status == "idle"
    assert all(not turn.is_open and turn.stored for turn in turns)
    turn = await start(scene.sessions, session_id, "and now?")
    (await scene.puppet.next_reply()).finish()
    assert (await turn.wait_ended()).state == "completed"
    await scene.sessions.delete_session(session_id)
    assert not await is_there(scene, session_id)
    await scene.sessions.create_session(NewSession(id=session_id))


# Answers to callers while an outcome is unknown


async def test_a_deletion_that_the_store_marks_later_than_it_was_waited_for_is_finished(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.store.late = "mark_deleted"
        with pytest.raises(StoreError), trio.fail_after(TIMEOUT_S + 0.1):
            await scene.sessions.delete_session("s")
        assert await is_there(scene, "s"), "nothing has happened to it yet"
        assert (await scene.sessions.get_turn("s", scene.turn.id)).state == "running"
        await scene.wait_for_recovery()
        record = await scene.turn.wait_ended()
        assert (record.state, record.reason) == ("cancelled", "session_deleted")
        assert scene.reply.closed.is_set(), "the model call goes on"
        for call in (scene.sessions.get_session, scene.sessions.delete_session):
            with pytest.raises(SessionNotFoundError):
                await call("s")
        await scene.sessions.create_session(NewSession(id="s"))
        assert (await scene.sessions.get_session("s")).message_count == 0


async def test_a_deletion_that_the_store_loses_leaves_a_session_that_goes_on(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = "mark_deleted", "is lost"
        with pytest.raises(StoreError):
            await scene.sessions.delete_session("s")
        await scene.wait_for_recovery()
        scene.reply.say(" good")
        scene.reply.finish()
        record = await scene.turn.wait_ended()
        assert (record.state, record.text) == ("completed", "so far good")
        assert (await scene.sessions.get_session("s")).message_count == 2


@outcomes
@pytest.mark.parametrize("step", ["mark_deleted", "remove_deleted"])
async def test_a_second_delete_while_the_outcome_of_the_first_is_unknown_deletes_or_says_that_it_is_gone(
    autojump_clock: MockClock, step: str, outcome: Outcome
) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = step, outcome
        with pytest.raises(StoreError):
            await scene.sessions.delete_session("s")
        if (step, outcome) == ("remove_deleted", "lands"):
            with pytest.raises(SessionNotFoundError):
                await scene.sessions.delete_session("s")
        else:
            await scene.sessions.delete_session("s")
        assert (await scene.turn.wait_ended()).reason == "session_deleted"
        await scene.sessions.create_session(NewSession(id="s"))


async def test_a_session_that_takes_the_id_of_one_whose_removal_was_unknown_can_be_deleted(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.late_s = "remove_deleted", TIMEOUT_S + 0.1
        with pytest.raises(StoreError):
            await scene.sessions.delete_session("s")
        await scene.sessions.create_session(NewSession(id="s"))
        await scene.sessions.delete_session("s")
        assert not await is_there(scene, "s")


async def test_a_turn_that_is_accepted_while_the_outcome_of_a_deletion_is_unknown_has_the_answer_of_the_store(
    autojump_clock: MockClock,
) -> None:
    async with open_scene() as scene:
        scene.store.late = "mark_deleted"
        with pytest.raises(StoreError):
            await scene.sessions.delete_session("s")
        with pytest.raises(SessionNotFoundError):
            await scene.sessions.start_turn("s", NewTurn(text="too late", on_conflict="queue"))
        await scene.wait_for_recovery()
        assert (await scene.turn.wait_ended()).reason == "session_deleted"


async def test_deletions_with_an_unknown_outcome_are_bounded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "UNRESOLVED_MAX", 1)
    async with open_scene() as scene:
        await scene.sessions.create_session(NewSession(id="other"))
        scene.store.late = "mark_deleted"
        with pytest.raises(StoreError):
            await scene.sessions.delete_session("s")
        with pytest.raises(StoreError, match="too many deletions"):
            await scene.sessions.delete_session("other")
        await scene.sessions.delete_session("s")  # this deletion is about the session whose outcome is unknown
        await scene.sessions.delete_session("other")


@outcomes
async def test_a_session_whose_creation_was_unknown_is_there_or_can_be_created(
    autojump_clock: MockClock, outcome: Outcome
) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = "create_session", outcome
        with pytest.raises(StoreError):
            await scene.sessions.create_session(NewSession(id="new"))
        assert not await is_there(scene, "new"), "it is not there yet"
        if outcome == "lands":
            with pytest.raises(SessionExistsError):  # writes keep their order: the first creation has landed by then
                await scene.sessions.create_session(NewSession(id="new"))
        else:
            await scene.sessions.create_session(NewSession(id="new"))
        assert await is_there(scene, "new")


@outcomes
async def test_a_turn_whose_acceptance_was_unknown_never_runs(autojump_clock: MockClock, outcome: Outcome) -> None:
    async with open_scene() as scene:
        scene.reply.finish()
        await scene.turn.wait_ended()
        scene.store.late, scene.store.outcome = "begin_turn", outcome
        with pytest.raises(StoreError):
            await start(scene.sessions, "s", "unknown")
        await scene.wait_for_recovery()
        _, *others = (await scene.sessions.list_turns("s", limit=10)).data
        told = [(turn.state, turn.error and turn.error.code, turn.stored) for turn in others]
        assert told == ([("failed", "store_unavailable", True)] if outcome == "lands" else [])
        await start(scene.sessions, "s", "next")
        request = (await scene.puppet.next_reply()).request
        assert request.prompt[-1].text.endswith("next")


async def test_an_end_that_was_not_kept_is_in_the_prompt_of_the_next_turn(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = "end_turn", "is lost"
        scene.reply.finish()
        assert not (await scene.turn.wait_ended()).stored
        await start(scene.sessions, "s", "and then?")  # before the recovery loop has run
        request = (await scene.puppet.next_reply()).request
        assert [message.text for message in request.prompt] == ["first", "so far", "and then?"]
        assert scene.turn.stored


async def test_a_replay_of_an_end_that_was_kept_later_does_not_say_that_it_was_not(autojump_clock: MockClock) -> None:
    async with open_scene() as scene:
        scene.store.late, scene.store.outcome = "end_turn", "is lost"
        scene.reply.finish()
        await scene.turn.wait_ended()
        told = frames_of(scene.turn.log)
        assert b'"stored":false' in told[-1]
        await scene.wait_for_recovery()
        log, _ = await scene.sessions.open_events("s", scene.turn.id)
        assert await frames_in(log) == [*told[:-1], told[-1].replace(b',"stored":false', b"")]
