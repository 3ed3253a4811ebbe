"""What upstreams have counted: in the turn, its terminal event and the session, however the turn ends."""

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import ModelError
from service.models.client import Usage
from service.sessions.commands import NewSession
from service.sessions.turns.turn import Turn
from service.storage.records import SessionRecord
from tests.sessions.puppet import Reply, Stage, frames_of, open_stage, read_all
from tests.sessions.turns.test_turns import start

COUNTED = Usage(input_tokens=100, output_tokens=20, reasoning_tokens=12, cached_tokens=64)


async def _begin(stage: Stage) -> tuple[Turn, Reply]:
    await stage.sessions.create_session(NewSession(id="s"))
    turn = await start(stage.sessions, "s")
    reply = await stage.puppet.next_reply()
    reply.say("so far")
    await wait_all_tasks_blocked()
    return turn, reply


def _totals(session: SessionRecord) -> Usage:
    return Usage(
        input_tokens=session.input_tokens,
        output_tokens=session.output_tokens,
        reasoning_tokens=session.reasoning_tokens,
        cached_tokens=session.cached_tokens,
    )


async def _cancel(stage: Stage, turn: Turn, _: Reply) -> None:
    await stage.sessions.cancel_turn("s", turn.id)


async def _fail(_stage: Stage, _turn: Turn, reply: Reply) -> None:
    reply.fail(ModelError("upstream_error", "It broke."))


async def _stop(stage: Stage, _turn: Turn, _reply: Reply) -> None:
    stage.sessions.drain.interrupt_all()


async def _say_too_much(_stage: Stage, _turn: Turn, reply: Reply) -> None:
    reply.say("x" * 2000)


async def _pause(_stage: Stage, _turn: Turn, _reply: Reply) -> None:
    await trio.sleep(61)


async def _finish(_stage: Stage, _turn: Turn, reply: Reply) -> None:
    reply.finish()


ENDS: dict[str, Callable[[Stage, Turn, Reply], object]] = {
    "completed": _finish,
    "cancelled": _cancel,
    "interrupted": _stop,
    "upstream_error": _fail,
    "reply_too_large": _say_too_much,
    "next_token_timeout": _pause,
}


@pytest.mark.parametrize("end", ENDS)
async def test_what_was_counted_before_an_end_is_kept(autojump_clock: MockClock, end: str) -> None:
    async with open_stage(reply_bytes_max=1024) as stage:
        turn, reply = await _begin(stage)
        reply.usage = COUNTED
        await ENDS[end](stage, turn, reply)  # type: ignore[misc]
        record = await turn.wait_ended()
        assert end in (record.state, record.error and record.error.code)
        assert record.usage == COUNTED
        terminal = (await read_all(turn.log))[-1]
        assert getattr(terminal, "usage") == COUNTED  # noqa: B009
        assert (await stage.sessions.get_turn("s", turn.id)).usage == COUNTED
        replay, _ = await stage.sessions.open_events("s", turn.id)
        assert (await read_all(replay))[-1] == terminal
        assert _totals(await stage.sessions.get_session("s")) == COUNTED
        copy = await stage.sessions.fork_session("s")
        assert _totals(copy) == COUNTED


@pytest.mark.parametrize("end", sorted(ENDS.keys() - {"completed"}))
async def test_an_end_says_nothing_of_what_was_not_counted(autojump_clock: MockClock, end: str) -> None:
    async with open_stage(reply_bytes_max=1024) as stage:
        turn, reply = await _begin(stage)
        await ENDS[end](stage, turn, reply)  # type: ignore[misc]
        assert (await turn.wait_ended()).usage is None
        assert b"usage" not in b"".join(frames_of(turn.log))


async def test_a_frame_has_cached_tokens_only_where_the_upstream_tells_them(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        turn, reply = await _begin(stage)
        reply.finish()
        await turn.wait_ended()
        assert b'"usage":{"input_tokens":1,"output_tokens":2,"reasoning_tokens":0},' in frames_of(turn.log)[-1]
        second = await start(stage.sessions, "s")
        reply = await stage.puppet.next_reply()
        reply.usage = COUNTED
        reply.finish()
        await second.wait_ended()
        assert (
            b'"usage":{"input_tokens":100,"output_tokens":20,"reasoning_tokens":12,"cached_tokens":64},'
            in frames_of(second.log)[-1]
        )
        session = await stage.sessions.get_session("s")
        assert (session.input_tokens, session.reasoning_tokens, session.cached_tokens) == (101, 12, 64)


async def test_a_prompt_that_was_asked_twice_costs_what_was_counted_for_both(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        turn, reply = await _begin(stage)
        reply.say("x" * 100)
        reply.finish()
        await turn.wait_ended()
        stage.puppet.takes_bytes = 50
        stage.puppet.counts_refused = Usage(input_tokens=30, output_tokens=0)
        second = await start(stage.sessions, "s")
        reply = await stage.puppet.next_reply()
        assert len(stage.puppet.asked) == 3
        reply.finish()
        assert (await second.wait_ended()).usage == Usage(input_tokens=31, output_tokens=2)
        stage.puppet.takes_bytes = 0
        third = await start(stage.sessions, "s")
        end = await third.wait_ended()
        assert (end.state, end.usage) == ("failed", Usage(input_tokens=60, output_tokens=0))
        assert (await stage.sessions.get_session("s")).input_tokens == 1 + 31 + 60


async def test_a_checkpoint_has_what_was_counted_so_far(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        turn, reply = await _begin(stage)
        checkpoint = turn.checkpoint()
        assert checkpoint is not None
        assert checkpoint.usage is None
        reply.usage = COUNTED
        checkpoint = turn.checkpoint()
        assert checkpoint is not None
        assert checkpoint.usage == COUNTED
        reply.finish()
        await turn.wait_ended()
