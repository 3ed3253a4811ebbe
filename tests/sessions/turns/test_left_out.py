"""Texts that do not go to the model (too long, refused by it, or beyond the bound), and the report of them."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import ModelError
from service.failure_codes import FailureCode
from service.models.client import Message
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.events import TurnCancelled, TurnCompleted, TurnFailed
from service.sessions.turns.turn import Turn
from service.storage.records import LeftOut, TurnRecord
from tests.sessions.puppet import Stage, frames_of, open_stage, read_all

TOO_LONG = ModelError("context_too_long", "Too long.")


async def _start(stage: Stage, text: str, **new: object) -> Turn:
    turn, watch = await stage.sessions.start_turn("s", NewTurn(text=text, background=True, **new))  # type: ignore[arg-type]
    watch.release()
    return turn


async def _say(stage: Stage, text: str, reply: str = "R", **new: object) -> TurnRecord:
    """Run a whole turn."""
    turn = await _start(stage, text, **new)
    while not turn.ended.is_set():
        with trio.move_on_after(1):
            answer = await stage.puppet.next_reply()
            answer.say(reply)
            answer.finish()
            await turn.wait_ended()
    return turn.record()


async def _fill(stage: Stage, *texts: str) -> None:
    await stage.sessions.create_session(NewSession(id="s", system_message="S"))
    for text in texts:
        assert (await _say(stage, text)).state == "completed"


def _asked(stage: Stage) -> list[list[str]]:
    return [[message.text for message in messages] for messages in stage.puppet.asked]


async def test_a_prompt_that_is_too_long_is_sent_once_more_without_the_oldest_turns(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, *(f"{n}" * 50 for n in range(4)))
        stage.puppet.takes_bytes = 150
        turn = await _start(stage, "now")
        reply = await stage.puppet.next_reply()
        assert reply.request.prompt == (
            Message("system", "S"),
            Message("user", "3" * 50),
            Message("assistant", "R"),
            Message("user", "now"),
        )
        assert stage.puppet.open_replies == 1, "the first one is left"
        assert (await stage.sessions.get_turn("s", turn.id)).left_out == LeftOut(6, 153)
        reply.say("ok")
        reply.finish()
        end = (await read_all(turn.log))[-1]
        assert isinstance(end, TurnCompleted)
        assert end.left_out == LeftOut(6, 153)
        kept = await stage.store.get_turn("s", turn.id, now=stage.clock())
        assert kept.left_out == LeftOut(6, 153)
        replay, _ = await stage.sessions.open_events("s", turn.id)
        assert (await read_all(replay))[-1] == end
        # The next turn begins with the prompt that was answered here, and asks the model once.
        asked = len(stage.puppet.asked)
        assert (await _say(stage, "next")).left_out == LeftOut(6, 153)
        assert len(stage.puppet.asked) == asked + 1


async def test_an_end_says_nothing_of_what_was_not_left_out(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, "a")
        turn = await _start(stage, "b")
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        assert turn.record().left_out is None
        assert b"left_out" not in b"".join(frames_of(turn.log))


async def test_a_refusal_in_the_stream_counts_as_long_as_nothing_was_said(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, "a" * 500, "b" * 10)
        turn = await _start(stage, "now")
        (await stage.puppet.next_reply()).fail(TOO_LONG)
        reply = await stage.puppet.next_reply()
        reply.think("hm")
        await wait_all_tasks_blocked()
        reply.fail(TOO_LONG)
        ended = await turn.wait_ended()
        assert (ended.state, ended.error and ended.error.code) == ("failed", "context_too_long")
        assert ended.left_out == LeftOut(2, 501)


async def test_a_refusal_after_the_first_token_is_not_tried_again(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, "a" * 50)
        turn = await _start(stage, "now")
        reply = await stage.puppet.next_reply()
        reply.say("half")
        await wait_all_tasks_blocked()
        reply.fail(TOO_LONG)
        assert (await turn.wait_ended()).state == "failed"
        assert turn.record().left_out is None
        assert len(stage.puppet.asked) == 2


async def test_an_input_that_is_too_long_by_itself_fails_and_the_next_turn_works(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, "hello")
        stage.puppet.takes_bytes = 100
        paste = await _say(stage, "x" * 200)
        assert (paste.state, paste.error and paste.error.code) == ("failed", "context_too_long")
        assert paste.left_out == LeftOut(2, 6)
        again = await _say(stage, "hi again")
        assert (again.state, again.left_out) == ("completed", None)
        assert _asked(stage)[-1] == ["S", "hello", "R", "hi again"]


async def test_a_conversation_becomes_short_enough_for_any_bound_of_the_model(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, *(f"{n}" * 4000 for n in range(10)))
        stage.puppet.takes_bytes = 5000
        states = [(await _say(stage, "now")).state for _ in range(5)]
        assert states == ["failed", *["completed"] * 4]


@pytest.mark.parametrize("code", ["content_filter", "unsupported_content"])
async def test_a_refused_input_is_neither_sent_nor_tried_again(autojump_clock: MockClock, code: FailureCode) -> None:
    async with open_stage() as stage:
        await _fill(stage, "hello")
        stage.puppet.refuse = ModelError(code, "No.")
        assert (await _say(stage, "poison")).state == "failed"
        assert len(stage.puppet.asked) == 2
        stage.puppet.refuse = None
        assert (await _say(stage, "hi again")).left_out is None
        assert _asked(stage)[-1] == ["S", "hello", "R", "hi again"]


async def test_a_question_that_failed_four_times_in_an_outage_is_asked_once(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await _fill(stage, "hello")
        stage.puppet.refuse = ModelError("upstream_error", "Down.")
        for _ in range(4):
            assert (await _say(stage, "why?")).state == "failed"
        stage.puppet.refuse = None
        await _say(stage, "why?")
        assert _asked(stage)[-1] == ["S", "hello", "R", "why?"]


@pytest.mark.parametrize("partial", [False, True])
async def test_a_blank_reply_is_not_sent_again(autojump_clock: MockClock, partial: bool) -> None:
    async with open_stage() as stage:
        await _fill(stage)
        if partial:
            turn = await _start(stage, "hello")
            (await stage.puppet.next_reply()).say("\n", "\n")
            await wait_all_tasks_blocked()
            await stage.sessions.cancel_turn("s", turn.id)
            assert turn.record().text == "\n\n"
        else:
            await _say(stage, "hello", reply="\n\n")
        await _say(stage, "and?")
        assert _asked(stage)[-1] == ["S", "hello\n\nand?"]


async def test_the_second_attempt_has_the_deadlines_of_the_first(autojump_clock: MockClock) -> None:
    async with open_stage(first_token_timeout_s=10) as stage:
        await _fill(stage, "a" * 50)
        start = trio.current_time()
        turn = await _start(stage, "now")
        reply = await stage.puppet.next_reply()
        await trio.sleep(7)
        reply.fail(TOO_LONG)
        await turn.wait_ended()
        assert len(stage.puppet.asked) == 3
        assert trio.current_time() == start + 10
        end = (await read_all(turn.log))[-1]
        assert isinstance(end, TurnFailed)
        assert (end.error.code, end.left_out) == ("first_token_timeout", LeftOut(2, 51))


async def test_a_deadline_that_passes_while_the_first_attempt_is_left_ends_the_turn(autojump_clock: MockClock) -> None:
    async with open_stage(first_token_timeout_s=10) as stage:
        await _fill(stage, "a" * 50)
        stage.puppet.close_s = 20
        turn = await _start(stage, "now")
        (await stage.puppet.next_reply()).fail(TOO_LONG)
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "first_token_timeout"
        assert len(stage.puppet.asked) == 2
        stage.puppet.close_s = 0


@pytest.mark.parametrize("attempt", [1, 2])
async def test_a_turn_that_is_cancelled_in_either_attempt_says_what_that_left_out(
    autojump_clock: MockClock, attempt: int
) -> None:
    async with open_stage() as stage:
        await _fill(stage, "a" * 50)
        turn = await _start(stage, "now")
        reply = await stage.puppet.next_reply()
        if attempt == 2:
            reply.fail(TOO_LONG)
            await stage.puppet.next_reply()
        await stage.sessions.cancel_turn("s", turn.id)
        end = (await read_all(turn.log))[-1]
        assert isinstance(end, TurnCancelled)
        assert end.left_out == (None if attempt == 1 else LeftOut(2, 51))


async def test_left_out_counts_also_the_turns_that_were_not_read(
    autojump_clock: MockClock,
) -> None:
    async with open_stage(prompt_bytes_max=2560, input_bytes_max=1024) as stage:
        await _fill(stage, *(f"{n}" * 500 for n in range(9)))
        told: Sequence[LeftOut | None] = [
            turn.left_out for turn in (await stage.sessions.list_turns("s", limit=20)).data
        ]
        assert told[:4] == [None] * 4
        assert told[4:] == [LeftOut(2 * n, 501 * n) for n in range(1, 6)]
        await _say(stage, "elsewhere", parent=None)
        assert (await stage.sessions.list_turns("s", limit=20)).data[-1].left_out is None


# Turns that have the whole conversation in their prompt, or fail


async def test_a_turn_that_may_leave_nothing_out_is_not_sent_without_the_oldest_turns(
    autojump_clock: MockClock,
) -> None:
    async with open_stage(prompt_bytes_max=2560, input_bytes_max=1024) as stage:
        await _fill(stage, *(f"{n}" * 500 for n in range(4)))
        asked = len(stage.puppet.asked)
        refused = await _say(stage, "x" * 500, may_leave_out=False)
        assert (refused.state, refused.error and refused.error.code) == ("failed", "context_too_long")
        assert refused.error is not None
        assert "its oldest 2 items, with 501 bytes," in refused.error.message
        assert refused.left_out is None
        assert len(stage.puppet.asked) == asked
        assert (await _say(stage, "elsewhere", parent=None, may_leave_out=False)).state == "completed"


async def test_a_turn_that_may_leave_nothing_out_is_asked_once_where_the_model_refuses_its_length(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        await _fill(stage, *(f"{n}" * 50 for n in range(4)))
        stage.puppet.takes_bytes = 150
        assert (await _say(stage, "now")).left_out == LeftOut(6, 153)
        asked = len(stage.puppet.asked)
        refused = await _say(stage, "whole", may_leave_out=False)
        assert (refused.state, refused.error and refused.error.code) == ("failed", "context_too_long")
        assert refused.left_out is None
        assert len(stage.puppet.asked) == asked + 1
        assert _asked(stage)[-1][1] == "0" * 50, "also if the turn before has left the oldest turns out"
        stage.puppet.takes_bytes = 10_000
        whole = await _say(stage, "whole", may_leave_out=False)
        assert (whole.state, whole.left_out) == ("completed", None)
        assert _asked(stage)[-1] == ["S", *(it for n in range(4) for it in (f"{n}" * 50, "R")), "now", "R", "whole"]
