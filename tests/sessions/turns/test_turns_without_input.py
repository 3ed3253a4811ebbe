"""Turns without an input: the model answers what their path ends with."""

import pytest

from service.sessions.turns.prompt import PathEnd
from service.storage.records import Item, TurnRecord
from tests.sessions.turns.test_calls_in_prompts import asked, asks, brings, calls, done, says, turn
from tests.sessions.turns.test_notes_in_prompts import notes


@pytest.mark.parametrize("before", [asks("x"), brings("1", "x" * 100)])
def test_the_input_that_a_turn_without_one_answers_is_never_left_out(before: Item) -> None:
    path = [
        done([asks("old")], says("older")),
        done([asks("call")], calls("1"), says("y" * 100)),
        turn("completed", [before]),
        turn("failed", []),
        turn("running", []),
    ]
    whole = asked(*path)
    cut = asked(*path, bytes_max=1)
    assert cut[-1] == whole[-1]
    assert len(cut) < len(whole)
    if before.type == "function_call_output":
        assert cut[-2:] == ["call 1", f"1: {'x' * 100}"]


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
