"""Calls and their outputs in prompts: no upstream refuses such a prompt, and none of them is lost."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.models.client import (
    EncryptedReasoning,
    FunctionCall,
    FunctionCallOutput,
    Message,
    PromptItem,
    Reasoning,
)
from service.sessions.turns.prompt import BEGINNING_LEFT_OUT, NOT_ANSWERED
from service.storage.records import Failure, Item, LeftOut, TurnRecord, TurnState
from service.storage.rules import TURN_BYTES, emptied
from tests.sessions.turns.prompts import build_prompt
from tests.storage.rows import T0

EVERYTHING = 10**9


def asks(text: str) -> Item:
    return Item(id=f"i_{text}", role="user", text=text)


def says(text: str) -> Item:
    return Item(id=f"o_{text}", role="assistant", text=text)


def calls(call_id: str, *, complete: bool = True, upstream: str = "") -> Item:
    return Item(
        id=f"fc_{call_id}",
        type="function_call",
        role="assistant",
        text=f'{{"of":"{call_id}"}}',
        call_id=call_id,
        name="f",
        complete=complete,
        upstream=upstream,
    )


def brings(call_id: str, text: str = "out") -> Item:
    return Item(id=f"fco_{call_id}_{text}", type="function_call_output", role="user", text=text, call_id=call_id)


def turn(
    state: TurnState, said: Sequence[Item], output: Sequence[Item] = (), *, code: str | None = None, model: str = "m"
) -> TurnRecord:
    return TurnRecord(
        id="t",
        session_id="s",
        parent=None,
        state=state,
        model=model,
        created_at=T0,
        started_at=T0,
        error=Failure(code or "upstream_error", "no") if state == "failed" else None,
        input=tuple(said),
        output=tuple(output),
    )


def done(said: Sequence[Item], *output: Item) -> TurnRecord:
    return turn("completed", said, output)


def asked(*path: TurnRecord, bytes_max: int = EVERYTHING, older: LeftOut = LeftOut()) -> list[str]:  # noqa: B008  immutable
    """The prompt in short, one text for each item."""
    items = build_prompt(path, system_message=None, bytes_max=bytes_max, older=older).items
    check(items)
    return [short(item) for item in items]


def short(item: PromptItem) -> str:
    match item:
        case Message(role, text):
            return f"{role[0]}: {text}"
        case FunctionCall(call_id):
            return f"call {call_id}"
        case FunctionCallOutput(call_id, text):
            return f"{call_id}: {text}"
        case EncryptedReasoning(text):
            return f"encrypted {text}"
        case Reasoning(text):
            return f"thinks {text}"


def check(items: Sequence[PromptItem]) -> None:
    """What every upstream takes: the sides alternate, and exactly the outputs of the calls follow the calls."""
    rest = list(items)
    if isinstance(rest[0], Message) and rest[0].role == "system":
        del rest[0]
    called: list[str] = []
    while rest:
        given = [item.call_id for item in rest[: len(called)] if isinstance(item, FunctionCallOutput)]
        assert given == called, "each call has its output"
        answered = bool(called)
        del rest[: len(called)]
        if rest and isinstance(rest[0], Message) and rest[0].role == "user":
            del rest[0]
            answered = True
        assert answered, "the user, or an output, comes before the assistant"
        called = []
        if not rest:
            return
        start = len(rest)
        while rest and isinstance(rest[0], EncryptedReasoning | Reasoning):
            del rest[0]
        if rest and isinstance(rest[0], Message):
            assert rest[0].role == "assistant"
            del rest[0]
        while rest and isinstance(rest[0], FunctionCall):
            called.append(rest[0].call_id)
            del rest[0]
        assert len(rest) < start
        assert rest, "the last word is the user's"


LAST = turn("running", [asks("now")])


def test_outputs_follow_their_calls_in_the_order_of_the_calls_and_before_a_text() -> None:
    first = done([asks("a")], says("Let me look."), calls("1"), calls("2"))
    last = turn("running", [asks("and"), brings("2"), brings("1")])
    assert asked(first, last) == ["u: a", "a: Let me look.", "call 1", "call 2", "1: out", "2: out", "u: and"]


@pytest.mark.parametrize(
    ("gone", "prompt"),
    [
        (0, ["u: [Output of the call 1]\nout", "call 2", "2: out", "a: B", "u: now"]),
        (1, ["u: a", "call 1", f"1: {NOT_ANSWERED}", "u: [Output of the call 2]\nout", "a: B", "u: now"]),
        (2, ["u: a", "call 1", "1: out", "call 2", f"2: {NOT_ANSWERED}", "u: now"]),
    ],
)
def test_a_turn_that_is_emptied_leaves_no_call_and_no_output_alone(gone: int, prompt: list[str]) -> None:
    path = [
        done([asks("a")], calls("1")),
        done([brings("1")], calls("2")),
        done([brings("2")], says("B")),
        LAST,
    ]
    path[gone] = emptied(path[gone])
    assert asked(*path) == prompt
    assert asked(*map(emptied, path[:-1]), LAST) == ["u: now"]


def test_a_prompt_may_end_with_outputs() -> None:
    assert asked(done([asks("a")], calls("1")), turn("running", [brings("1")])) == ["u: a", "call 1", "1: out"]


def test_a_text_after_calls_in_one_reply_comes_before_them() -> None:
    """An upstream's format has one text and then calls in a message."""
    assert asked(done([asks("a")], says("x"), calls("1"), says("y")), LAST)[1:3] == ["a: xy", "call 1"]


@pytest.mark.parametrize("state", ["completed", "cancelled", "interrupted"])
def test_a_call_without_an_output_is_said_to_be_unanswered(state: TurnState) -> None:
    first = turn(state, [asks("a")], [calls("1"), calls("2")])
    assert asked(first, LAST) == ["u: a", "call 1", "call 2", f"1: {NOT_ANSWERED}", f"2: {NOT_ANSWERED}", "u: now"]
    assert asked(first, turn("running", [brings("2")])) == ["u: a", "call 1", "call 2", f"1: {NOT_ANSWERED}", "2: out"]


def test_a_call_that_was_cut_off_is_left_out() -> None:
    first = turn("interrupted", [asks("a")], [says("x"), calls("1"), calls("2", complete=False)])
    assert asked(first, LAST) == ["u: a", "a: x", "call 1", f"1: {NOT_ANSWERED}", "u: now"]
    assert asked(turn("interrupted", [asks("a")], [calls("2", complete=False)]), LAST) == ["u: a\n\nnow"]


def test_the_calls_of_a_failed_turn_are_left_out_and_their_outputs_become_texts() -> None:
    failed = turn("failed", [asks("a")], [says("x"), calls("1")])
    assert asked(failed, LAST) == ["u: a\n\nnow"]
    assert asked(failed, turn("running", [brings("1"), asks("b")])) == ["u: [Output of the call 1]\nout\n\na\n\nb"]


def test_an_output_that_comes_later_than_a_text_becomes_a_text() -> None:
    path = done([asks("a")], calls("1")), done([asks("b")], says("B")), turn("running", [brings("1")])
    assert asked(*path) == ["u: a", "call 1", f"1: {NOT_ANSWERED}", "u: b", "a: B", "u: [Output of the call 1]\nout"]


def test_outputs_stay_where_their_turn_failed_and_a_repeated_one_counts_once() -> None:
    first = done([asks("a")], calls("1"), calls("2"))
    failed = turn("failed", [brings("1", "old"), brings("2")])
    assert asked(first, failed, turn("running", [brings("1", "new")]))[3:] == ["1: new", "2: out"]
    assert asked(first, failed, LAST)[3:] == ["1: old", "2: out", "u: now"]
    rejected = turn("failed", [brings("1")], code="upstream_rejected")
    assert asked(first, rejected, rejected, LAST)[3:] == ["1: out", f"2: {NOT_ANSWERED}", "u: now"]


def test_the_outputs_of_a_turn_that_the_model_refused_are_left_out() -> None:
    refused = turn("failed", [brings("1", "x" * 99)], code="context_too_long")
    assert asked(done([asks("a")], calls("1")), refused, LAST) == ["u: a", "call 1", f"1: {NOT_ANSWERED}", "u: now"]


def test_the_same_id_in_another_turn_is_another_call() -> None:
    path = [done([asks("a")], calls("1")), done([brings("1", "x")], calls("1")), turn("running", [brings("1", "y")])]
    assert asked(*path) == ["u: a", "call 1", "1: x", "call 1", "1: y"]


def test_data_that_only_one_model_server_can_read_goes_to_no_other_model() -> None:
    thought = Item(id="r", type="reasoning", role="assistant", text="hm", encrypted="gAAA", upstream='{"n":1}')
    first = done([asks("a")], thought, calls("1", upstream='{"x":1}'))
    last = turn("running", [brings("1")])
    same = build_prompt([first, last], system_message=None, bytes_max=EVERYTHING).items
    assert same[1:4] == (
        EncryptedReasoning("gAAA", '{"n":1}'),
        Reasoning("hm"),
        FunctionCall("1", "f", '{"of":"1"}', '{"x":1}'),
    )
    last = turn("running", [brings("1")], model="other")
    assert build_prompt([first, last], system_message=None, bytes_max=EVERYTHING).items[1:2] == (
        FunctionCall("1", "f", '{"of":"1"}'),
    )


def test_an_input_may_hold_a_conversation_of_its_own() -> None:
    system = Item(id="s", role="system", text="S")
    history = [system, asks("a"), says("A"), asks("b"), calls("1"), brings("1"), says("B"), asks("c")]
    assert asked(turn("running", history)) == ["s: S", "u: a", "a: A", "u: b", "call 1", "1: out", "a: B", "u: c"]
    assert asked(done([asks("x")]), turn("running", [calls("1"), brings("1")])) == ["u: x", "call 1", "1: out"]


# Turns that are left out

LONG = [
    done([asks("a" * 100)], calls("1")),
    done([brings("1", "b" * 100)], calls("2")),
    done([brings("2", "c" * 100)], calls("3")),
]


def test_outputs_are_left_out_together_with_their_calls() -> None:
    path = [*LONG, done([brings("3", "d"), asks("e")], says("E")), LAST]
    kept = ["u: e", "a: E", "u: now"]
    assert asked(*path, bytes_max=150 + 2 * TURN_BYTES) == kept
    assert asked(*path, bytes_max=320 + 3 * TURN_BYTES) == ["u: " + BEGINNING_LEFT_OUT, "call 3", "3: d", *kept]
    told = build_prompt(path, system_message=None, bytes_max=150 + 2 * TURN_BYTES).left_out
    assert told is not None
    assert told.items == 2 + 2 + 2 + 1


def test_the_calls_that_the_last_turn_answers_stay_beyond_every_bound() -> None:
    failed = turn("failed", [brings("3", "x")])
    for between in [], [failed]:
        path = [*LONG, *between, turn("running", [brings("3", "now")])]
        assert asked(*path, bytes_max=0) == ["u: " + BEGINNING_LEFT_OUT, "call 3", "3: now"]


def test_a_prompt_goes_on_from_what_an_earlier_prompt_left_out() -> None:
    path = [*LONG, done([brings("3", "d"), asks("e")], says("E")), LAST]
    left_out = build_prompt(path, system_message=None, bytes_max=320 + 3 * TURN_BYTES).left_out
    assert left_out is not None
    answered = turn("completed", [asks("now")], [says("N")])
    answered = TurnRecord(
        **{name: getattr(answered, name) for name in answered.__struct_fields__} | {"left_out": left_out}
    )
    again = build_prompt([*path[:-1], answered, LAST], system_message=None, bytes_max=EVERYTHING)
    assert again.left_out == left_out
    assert short(again.items[1]) == "call 3"


# On every path

ids = st.sampled_from(["1", "2", "3"])
words = st.text(st.sampled_from("abc é"), min_size=1, max_size=6)
inputs = st.lists(
    st.builds(asks, words) | st.builds(brings, ids, words),
    min_size=1,
    max_size=3,
    unique_by=lambda it: it.call_id or it.id,
)
reasoning = st.builds(
    Item,
    id=st.just("r"),
    type=st.just("reasoning"),
    role=st.just("assistant"),
    text=words,
    encrypted=st.just("x") | st.just(""),
)
outputs = st.lists(
    st.builds(says, words) | st.builds(calls, ids, complete=st.booleans()) | reasoning,
    max_size=4,
    unique_by=lambda item: item.id if item.type == "function_call" else object(),
)
ends = st.sampled_from(["completed", "failed", "cancelled", "interrupted"])
codes = st.sampled_from(["upstream_error", "upstream_rejected", "context_too_long", "content_filter"])
paths = st.tuples(
    st.lists(st.builds(turn, ends, inputs, outputs, code=codes, model=st.sampled_from("mn")), max_size=6),
    st.builds(turn, st.just("running"), inputs),
).map(lambda parts: [*parts[0], parts[1]])


@given(paths)
def test_no_call_and_no_output_is_lost_on_any_path(path: list[TurnRecord]) -> None:
    items = build_prompt(path, system_message="S", bytes_max=EVERYTHING).items
    check(items)
    assert [item.call_id for item in items if isinstance(item, FunctionCall)] == [
        call.call_id for it in path if not it.was_refused for call in it.calls
    ]
    told = "".join(item.text for item in items if isinstance(item, FunctionCallOutput) or item.role == "user")
    group: list[TurnRecord] = []
    for it in path:
        if it.was_refused:
            group = group if it.error is not None and it.error.code == "context_too_long" else []
            continue
        group.append(it)
        if it.has_reply or it is path[-1]:
            last = {x.call_id: x.text for of in group for x in of.input if x.type == "function_call_output"}
            for text in last.values():
                assert text in told
            group = []


@given(paths, st.integers(0, 1500))
def test_a_bounded_prompt_is_taken_by_every_upstream_too(path: list[TurnRecord], bytes_max: int) -> None:
    prompt = build_prompt(path, system_message=None, bytes_max=bytes_max)
    check(prompt.items)
    whole = build_prompt(path, system_message=None, bytes_max=EVERYTHING)
    found = [item for item in prompt.items if isinstance(item, FunctionCall)]
    assert (
        found == [item for item in whole.items if isinstance(item, FunctionCall)][len(found) * -1 or len(whole.items) :]
    )
    if prompt.left_out is None:
        assert prompt == whole
    for item in path[-1].input:
        assert any(item.text in told.text for told in prompt.items), "the last input is always there"
