"""Turns without an input: the model answers what their path ends with."""

from collections.abc import Sequence

import msgspec
import pytest
from msgspec import UNSET
from trio.testing import MockClock

from service.errors import ModelError, NothingAskedError
from service.models.client import FunctionCall, Message
from service.sessions.commands import NewSession
from service.sessions.turns.prompt import PathEnd
from service.storage.records import Item, LeftOut, TurnRecord
from tests.sessions.puppet import LeavesPathsOut, open_stage
from tests.sessions.turns.prompts import build_prompt
from tests.sessions.turns.test_calls_in_prompts import (
    EVERYTHING,
    asked,
    asks,
    brings,
    calls,
    check,
    done,
    says,
    short,
    turn,
)
from tests.sessions.turns.test_notes_in_prompts import notes
from tests.sessions.turns.test_turns import start

NOTED = turn("completed", [notes("n")])


def said_in(path: Sequence[TurnRecord], *, bytes_max: int = EVERYTHING) -> list[str]:
    """The prompt in short, without notes."""
    items = build_prompt(path, system_message=None, bytes_max=bytes_max).items
    said = [item for item in items if not (isinstance(item, Message) and item.role == "system")]
    if said:
        check(said)
    return [short(item) for item in said]


@pytest.mark.parametrize(
    "ending",
    [
        [turn("running", [])],
        [turn("failed", []), turn("running", [])],
        [NOTED, turn("running", [])],
        [NOTED, turn("failed", [notes("m")]), turn("running", [])],
        [turn("running", [notes("n")])],
    ],
)
@pytest.mark.parametrize("before", [asks("x"), brings("1", "x" * 100)])
def test_the_input_that_a_turn_without_one_answers_is_never_left_out(before: Item, ending: list[TurnRecord]) -> None:
    path = [
        done([asks("old")], says("older")),
        done([asks("call")], calls("1"), says("y" * 100)),
        turn("completed", [before]),
        *ending,
    ]
    whole = said_in(path)
    said = said_in(path, bytes_max=1)
    assert said[-1] == whole[-1]
    assert len(said) < len(whole)
    if before.type == "function_call_output":
        assert said[-2:] == ["call 1", f"1: {'x' * 100}"]
    else:
        assert said[-1] == "u: x"


def test_a_note_after_a_reply_does_not_keep_the_question_of_this_reply() -> None:
    path = [done([asks("old")], says("y" * 100)), turn("running", [notes("n")])]
    prompt = build_prompt(path, system_message=None, bytes_max=1)
    assert (prompt.items, prompt.left_out) == ((Message("system", "n"),), LeftOut(2, 103))


def test_outputs_that_a_turn_without_an_input_answers_are_sent_though_their_call_is_left_out() -> None:
    """The call's own turn was deleted, so that older turns are left out and the prompt begins with the outputs."""
    asking = turn("failed", [brings("c1", "42")])
    as_text = ["u: [Output of the call c1]\n42"]
    assert asked(asking, turn("running", []), older=LeftOut(3, 30)) == as_text
    earlier = turn("failed", [brings("c0", "old")])
    assert asked(earlier, asking, turn("failed", []), turn("running", []), older=LeftOut(3, 30)) == as_text
    assert asked(earlier, msgspec.structs.replace(asking, state="running"), older=LeftOut(3, 30)) == as_text


@pytest.mark.parametrize(
    ("path", "waits"),
    [
        ([turn("completed", [asks("a")])], True),
        ([turn("completed", [asks("a"), notes("n")])], True),
        ([turn("completed", [notes("n")])], None),
        ([turn("completed", [asks("a"), says("A")])], False),
        ([done([asks("a")], says("A"))], False),
        ([done([asks("a")], calls("1"))], False),
        ([done([asks("a")], calls("1")), turn("completed", [brings("1")])], True),
        ([turn("completed", [asks("a")]), turn("failed", [])], True),
        ([turn("completed", [asks("a")]), turn("cancelled", [], [says(" ")])], True),
        ([turn("completed", [asks("a")]), turn("cancelled", [], [says("A")])], False),
        ([turn("completed", [asks("a")]), turn("failed", [], code="content_filter")], False),
        ([turn("completed", [asks("a")]), turn("failed", [asks("b")], code="context_too_long")], True),
        ([turn("failed", [asks("a")], code="context_too_long")], None),
        ([turn("failed", [asks("a")], code="upstream_rejected")], True),
        ([turn("failed", [asks("a")], code="upstream_rejected"), turn("failed", [], code="upstream_rejected")], False),
    ],
)
def test_a_path_ends_with_something_to_answer_if_its_prompt_would(path: list[TurnRecord], waits: bool | None) -> None:
    end = PathEnd()
    decided = next((it for it in map(end.decide, reversed(path)) if it is not None), None)
    assert decided is waits
    if waits:
        assert asked(*path, turn("running", []))[-1][0] in "u1"


@pytest.mark.parametrize("brings_outputs", [False, True])
async def test_an_input_that_is_larger_than_a_prompt_is_answered_with_the_calls_that_it_answers(
    autojump_clock: MockClock, brings_outputs: bool
) -> None:
    """Under ``/v1`` an input may be larger than a prompt. The last turn has its own in any case."""
    long = "x" * 8000
    bounds = {"input_bytes_max": 1024, "prompt_bytes_max": 2048, "reply_bytes_max": 1024, "history_bytes_max": 9000}
    async with open_stage(**bounds) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        first = await start(stage.sessions, session_id, "first")
        reply = await stage.puppet.next_reply()
        reply.call("1", '{"of":"1"}')
        reply.finish("tool_calls")
        await first.wait_ended()
        items = (brings("1", long),) if brings_outputs else (asks(long),)
        failed = await start(stage.sessions, session_id, items=items)
        (await stage.puppet.next_reply()).fail(ModelError("upstream_error", "no"))
        await failed.wait_ended()
        await start(stage.sessions, session_id, "", answers_path=True)
        prompt = (reply := await stage.puppet.next_reply()).request.prompt
        assert prompt[-1].text == long
        calls_in_prompt = [item for item in prompt if isinstance(item, FunctionCall)]
        assert len(calls_in_prompt) == (1 if brings_outputs else 0)
        reply.say("At last.")
        reply.finish()


@pytest.mark.parametrize("has_input", [False, True])
async def test_calls_that_are_far_above_many_failed_turns_are_not_looked_for_up_to_the_root(
    autojump_clock: MockClock, has_input: bool
) -> None:
    class Counting(LeavesPathsOut):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
            path = await super().read_path(session_id, turn_id, bytes_max=bytes_max)
            if bytes_max is not None and path[-1].is_open:  # to answer it, not to check or to measure the path
                self.sizes.append(sum(turn.message_bytes for turn in path))
            return path

    long = "x" * 4000
    bounds = {"input_bytes_max": 1024, "prompt_bytes_max": 2048, "reply_bytes_max": 1024, "history_bytes_max": 9000}
    async with open_stage(store := Counting(), **bounds) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        output = brings("1", long)
        for said in [asks(long)] * 30 + ([] if has_input else [output]):
            failed = await start(stage.sessions, session_id, items=(said,))
            (await stage.puppet.next_reply()).fail(ModelError("upstream_error", "no"))
            await failed.wait_ended()
        store.sizes.clear()
        if has_input:
            await start(stage.sessions, session_id, items=(output,))
        else:
            await start(stage.sessions, session_id, "", answers_path=True)
        prompt = (reply := await stage.puppet.next_reply()).request.prompt
        assert [item.text for item in prompt] == [f"[Output of the call 1]\n{long}"]
        assert len(store.sizes) == (2 if has_input else 3)
        assert max(store.sizes) <= 2048 + 2 * (1024 + 9000)
        reply.finish()


async def test_a_turn_without_an_input_is_refused_before_it_is_accepted(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        for parent in (UNSET, None):
            with pytest.raises(NothingAskedError):
                await start(stage.sessions, session_id, answers_path=True, parent=parent)
        turn = await start(stage.sessions, session_id)
        reply = await stage.puppet.next_reply()
        reply.say("Hello.")
        reply.finish()
        await turn.wait_ended()
        with pytest.raises(NothingAskedError):
            await start(stage.sessions, session_id, answers_path=True)
        assert (await stage.sessions.get_session(session_id)).head == turn.id
