"""Branches: turns with an ended parent, which run beside the other turns of their session."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    BranchLimitError,
    QueueFullError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.sessions.commands import NewSession, NewTurn
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_task import run_turn
from service.stop_state import Phase
from service.storage.records import SessionPatch, Siblings
from tests.sessions.puppet import Reply, Stage, open_stage
from tests.sessions.turns.test_turns import start


async def _a_conversation(stage: Stage, *texts: str) -> list[Turn]:
    """A session ``s`` with turns that have ended, each after the one before."""
    await stage.sessions.create_session(NewSession(id="s"))
    turns = []
    for text in texts:
        turns.append(await start(stage.sessions, "s", text))
        reply = await stage.puppet.next_reply()
        reply.say(text.upper())
        reply.finish()
        await turns[-1].wait_ended()
    return turns


def _asked(reply: Reply) -> list[str]:
    return [item.text for item in reply.request.prompt]


async def _branch(stage: Stage, text: str, parent: str | None, **options: Any) -> tuple[Turn, Reply]:
    turn = await start(stage.sessions, "s", text, parent=parent, **options)
    return turn, await stage.puppet.next_reply()


async def test_a_retry_runs_beside_the_turn_that_it_repeats(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        turn = await start(stage.sessions, "s", "b")
        reply = await stage.puppet.next_reply()
        retry, other = await _branch(stage, "b", first.id)
        assert (turn.state, retry.state, stage.puppet.open_replies) == ("running", "running", 2)
        assert _asked(reply) == _asked(other) == ["a", "A", "b"]
        assert (await stage.sessions.get_session("s")).head == retry.id, "the last accepted turn"
        assert (turn.siblings, retry.siblings) == (Siblings(), Siblings(2, 2))
        other.say("B2")
        other.finish()
        assert (await retry.wait_ended()).text == "B2"
        assert turn.state == "running"
        reply.finish()
        assert (await turn.wait_ended()).state == "completed"
        assert (await stage.sessions.get_session("s")).head == retry.id


async def test_a_first_turn_runs_beside_other_turns(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _a_conversation(stage)
        replies = [(await _branch(stage, text, None))[1] for text in ("a", "b", "c")]
        assert [_asked(reply) for reply in replies] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("on_conflict", ["reject", "queue", "supersede"])
async def test_on_conflict_is_not_about_a_branch(autojump_clock: MockClock, on_conflict: str) -> None:
    async with open_stage(queued_turns_max=1) as stage:
        (first,) = await _a_conversation(stage, "a")
        turn = await start(stage.sessions, "s", "b")
        branch, _ = await _branch(stage, "c", first.id, on_conflict=on_conflict)
        await wait_all_tasks_blocked()
        assert (turn.state, branch.state) == ("running", "running")


async def test_a_turn_that_follows_the_head_meets_every_open_turn(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        first, second = await _a_conversation(stage, "a", "b")
        branch, reply = await _branch(stage, "c", first.id)
        await stage.sessions.update_session("s", SessionPatch(title="x"))
        with pytest.raises(TurnInProgressError) as refused:
            await start(stage.sessions, "s", "d")
        assert refused.value.turn_id == branch.id
        queued = await start(stage.sessions, "s", "d", on_conflict="queue")
        later, other = await _branch(stage, "e", second.id)
        await wait_all_tasks_blocked()
        assert queued.state == "queued"
        reply.finish()
        assert _asked(await stage.puppet.next_reply()) == ["a", "A", "c\n\nd"], "the later branch runs on"
        assert later.state == "running"
        last = await start(stage.sessions, "s", "f", on_conflict="supersede")
        for turn in (queued, later):
            assert ((await turn.wait_ended()).state, turn.record().reason) == ("cancelled", "superseded")
        await other.closed.wait()
        assert (await stage.puppet.next_reply()).request.prompt[-1].text.endswith("f")
        assert last.state == "running"


async def test_a_queued_turn_waits_for_all_turns_before_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        replies = [(await _branch(stage, text, first.id))[1] for text in ("b", "c", "d")]
        queued = await start(stage.sessions, "s", "e", on_conflict="queue")
        for reply in replies[::-1]:
            await wait_all_tasks_blocked()
            assert queued.state == "queued"
            reply.finish()
        await stage.puppet.next_reply()
        assert queued.state == "running"


async def test_the_running_turns_of_a_session_are_bounded_for_branches(autojump_clock: MockClock) -> None:
    async with open_stage(branches_max=2, queued_turns_max=1) as stage:
        (first,) = await _a_conversation(stage, "a")
        _, reply = await _branch(stage, "b", first.id)
        await _branch(stage, "c", None)
        with pytest.raises(BranchLimitError):
            await start(stage.sessions, "s", "d", parent=first.id)
        await start(stage.sessions, "s", "e", on_conflict="queue")
        with pytest.raises(QueueFullError):
            await start(stage.sessions, "s", "f", on_conflict="queue")
        await stage.sessions.create_session(NewSession(id="t"))
        await start(stage.sessions, "t", "g")
        reply.finish()
        await stage.puppet.next_reply()
        await wait_all_tasks_blocked()
        await _branch(stage, "h", first.id)


async def test_concurrent_branches_stay_within_the_bound(autojump_clock: MockClock) -> None:
    refused = 0

    async def branch(stage: Stage, parent: str) -> None:
        nonlocal refused
        try:
            await start(stage.sessions, "s", "b", parent=parent)
        except BranchLimitError:
            refused += 1

    async with open_stage(branches_max=3) as stage:
        (first,) = await _a_conversation(stage, "a")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(branch, stage, first.id)
        assert (refused, stage.sessions.statistics().turns_running) == (7, 3)


async def test_a_turn_after_one_that_never_started_follows_the_open_turn_above_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _a_conversation(stage)
        turn = await start(stage.sessions, "s", "a")
        reply = await stage.puppet.next_reply()
        queued = await start(stage.sessions, "s", "b", on_conflict="queue")
        await stage.sessions.cancel_turn("s", queued.id)
        with pytest.raises(TurnInProgressError) as refused:
            await start(stage.sessions, "s", "c", parent=queued.id)
        assert refused.value.turn_id == turn.id
        follower = await start(stage.sessions, "s", "c", parent=queued.id, on_conflict="queue")
        assert follower.state == "queued"
        reply.say("A")
        reply.finish()
        assert _asked(await stage.puppet.next_reply()) == ["a", "A", "b\n\nc"]


async def test_a_branch_of_no_turn_is_refused_and_leaves_nothing(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _a_conversation(stage, "a")
        await start(stage.sessions, "s", "b")
        with pytest.raises(TurnNotFoundError):
            await start(stage.sessions, "s", "c", parent="turn_" + 32 * "0")
        assert stage.sessions.statistics().turns_running == 1


# Ends of several turns at once


async def test_a_client_that_leaves_ends_its_own_branch_only(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        one, _ = await _branch(stage, "b", first.id)
        other, watch = await stage.sessions.start_turn("s", NewTurn(text="c", parent=first.id))
        watch.release()
        assert (await other.wait_ended()).reason == "disconnected"
        assert one.state == "running"


async def test_deletion_ends_all_branches(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        turns = [(await _branch(stage, text, first.id))[0] for text in "bcd"]
        turns.append(await start(stage.sessions, "s", "e", on_conflict="queue"))
        await stage.sessions.delete_session("s")
        assert [turn.record().reason for turn in turns] == 4 * ["session_deleted"]
        with pytest.raises(SessionNotFoundError):
            await start(stage.sessions, "s", "f", parent=first.id)


async def test_a_stop_interrupts_all_branches(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        turns = [(await _branch(stage, text, first.id))[0] for text in "bc"]
        turns.append(await start(stage.sessions, "s", "e", on_conflict="queue"))
        stage.stop.enter(Phase.DRAINING)
        assert stage.sessions.drain.interrupt_queued() == 1
        assert [turn.state for turn in turns[:2]] == ["running", "running"]
        assert stage.sessions.drain.interrupt_all() == 2
        await stage.sessions.drain.wait_idle()
        assert {(turn.state, turn.record().reason) for turn in turns} == {("interrupted", "shutdown")}


async def test_branches_whose_model_clients_hang_end_without_them(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        stage.puppet.close_s = 50
        turns = [(await _branch(stage, text, first.id))[0] for text in "bc"]
        stage.sessions.drain.interrupt_all()
        await wait_all_tasks_blocked()
        await stage.sessions.end_hung(within_s=1)
        assert [turn.record().state for turn in turns] == ["interrupted", "interrupted"]
        assert (await stage.sessions.get_session("s")).open_turns == 0


async def test_a_crash_of_the_sessions_task_ends_all_branches(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run_or_crash(turn: Turn, **rest: Any) -> None:
        if turn.record().input_text == "crash":
            raise RuntimeError("on purpose")
        await run_turn(turn, **rest)

    monkeypatch.setattr("service.sessions.active.acceptance.run_turn", run_or_crash)
    async with open_stage() as stage:
        (first,) = await _a_conversation(stage, "a")
        turns = [(await _branch(stage, text, first.id))[0] for text in "bc"]
        turns.append(await start(stage.sessions, "s", "d", on_conflict="queue"))
        turns.append(await start(stage.sessions, "s", "crash", parent=first.id))
        for turn in turns:
            assert (await turn.wait_ended()).state == "failed"
        await wait_all_tasks_blocked()
        assert stage.sessions.statistics().turns_crashed == 4
        await _branch(stage, "e", first.id)
