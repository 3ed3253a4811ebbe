"""Turns that a caller added complete, in prompts: the sides alternate, and a note of the system stays in its place."""

from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from service.models.client import Message, PromptItem
from service.sessions.commands import turns_of
from service.sessions.turns.prompt import BEGINNING_LEFT_OUT, NOT_ANSWERED
from service.settings import Settings
from service.storage.records import Item, LeftOut, TurnRecord
from service.storage.rules import TURN_BYTES
from tests.sessions.turns.prompts import build_prompt
from tests.sessions.turns.test_calls_in_prompts import LAST, asks, brings, calls, check, done, says, short, turn

EVERYTHING = 10**9


def notes(text: str) -> Item:
    return Item(id=f"n_{text}", role="system", text=text)


def added(*items: Item) -> list[TurnRecord]:
    """The turns of these items."""
    turns = [done(said, *replied) for said, replied in turns_of(items, Settings())]
    return [msgspec.structs.replace(it, started_at=None) for it in turns]


def asked(*items: Item, bytes_max: int = EVERYTHING, system_message: str | None = None) -> list[str]:
    """The prompt of a turn after these items, in short."""
    path = [*added(*items), LAST]
    return [short(it) for it in build_prompt(path, system_message=system_message, bytes_max=bytes_max).items]


def test_a_note_stays_in_its_place_before_the_users_next_text() -> None:
    assert asked(asks("a"), says("A"), notes("n"), asks("b"), says("B")) == [
        *("u: a", "a: A", "s: n", "u: b", "a: B", "u: now"),
    ]


def test_a_note_at_the_end_comes_before_the_question_that_follows() -> None:
    assert asked(asks("a"), says("A"), notes("n"), notes("m")) == ["u: a", "a: A", "s: n\n\nm", "u: now"]


def test_a_note_between_two_texts_of_one_side_does_not_part_them() -> None:
    assert asked(asks("a"), notes("n"), asks("b"), says("B")) == ["s: n", "u: a\n\nb", "a: B", "u: now"]
    assert asked(asks("a"), says("A"), notes("n"), says("B")) == ["u: a", "a: A\n\nB", "s: n", "u: now"]


def test_a_note_before_everything_is_a_part_of_the_system_message() -> None:
    assert asked(notes("n"), asks("a"), says("A"), system_message="S") == ["s: S\n\nn", "u: a", "a: A", "u: now"]
    assert asked(notes("n"), says("A")) == ["s: n", "a: A", "u: now"]


def test_a_note_does_not_come_between_a_call_and_its_output() -> None:
    assert asked(asks("a"), calls("1"), notes("n"), brings("1"), asks("b"), says("B")) == [
        *("u: a", "call 1", "1: out", "s: n", "u: b", "a: B", "u: now"),
    ]
    assert asked(asks("a"), calls("1"), brings("1"), notes("n"), says("B"))[2:4] == ["1: out", "s: n"]


def test_a_note_beside_outputs_without_a_text_is_the_last_item() -> None:
    path = [*added(asks("a"), calls("1"), notes("n")), turn("running", [brings("1")])]
    assert [short(it) for it in build_prompt(path, system_message=None, bytes_max=EVERYTHING).items] == [
        *("u: a", "call 1", "1: out", "s: n"),
    ]


def test_a_note_at_the_end_of_an_input_comes_last() -> None:
    def ask(*said: Item) -> list[str]:
        path = [*added(asks("a"), says("A")), turn("running", said)]
        return [short(it) for it in build_prompt(path, system_message="S", bytes_max=EVERYTHING).items]

    assert ask(notes("n")) == ["s: S", "u: a", "a: A", "s: n"]
    assert ask(asks("b"), notes("n")) == ["s: S", "u: a", "a: A", "s: n", "u: b"]
    assert ask(asks("b"), says("B"), notes("n"), notes("m")) == ["s: S", "u: a", "a: A", "u: b", "a: B", "s: n\n\nm"]
    assert ask(calls("1"), notes("n")) == [
        *("s: S", "u: a", "a: A", "call 1", f"1: {NOT_ANSWERED}", "s: n"),
    ]


def test_a_note_is_left_out_with_its_turn() -> None:
    items = (asks("a"), says("A"), notes("n"), asks("b"), says("B"), asks("c"), says("C"))
    assert asked(*items, bytes_max=60 + 2 * TURN_BYTES) == ["u: c", "a: C", "u: now"]


def test_the_note_of_a_user_side_that_is_left_out_goes_to_the_system_message() -> None:
    """The outputs of calls that are left out are left out, too; the note between them stays."""
    path = [done([brings("1"), notes("n")], says("A")), LAST]
    items = build_prompt(path, system_message=None, bytes_max=EVERYTHING, older=LeftOut(1, 1)).items
    assert [short(it) for it in items] == ["s: n", f"u: {BEGINNING_LEFT_OUT}", "a: A", "u: now"]


def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user() -> None:
    assert asked(says("Hello!"), asks("a")) == ["a: Hello!", "u: a\n\nnow"]


def test_a_reply_that_was_added_does_not_say_what_a_model_takes() -> None:
    """The turn before it found that the model takes no more than half: an added turn knows nothing of that."""
    old = [done([asks(f"q{n}")], says(f"r{n}")) for n in range(4)]
    told = turn("completed", [asks("x")], [says("y")])
    path = [*old, msgspec.structs.replace(told, left_out=LeftOut(4, 8))]
    short_of = build_prompt([*path, *added(asks("b"), says("B")), LAST], system_message=None, bytes_max=EVERYTHING)
    assert short_of.left_out == LeftOut(4, 8)


ITEMS = st.lists(
    st.builds(asks, st.sampled_from("abc"))
    | st.builds(says, st.sampled_from("ABC"))
    | st.builds(notes, st.sampled_from("nm"))
    | st.builds(calls, st.sampled_from("12"))
    | st.builds(brings, st.sampled_from("12")),
    max_size=12,
)


@given(ITEMS, st.integers(0, 1500) | st.just(EVERYTHING))
def test_without_its_notes_the_prompt_of_any_added_conversation_is_one_that_upstreams_take(
    items: Sequence[Item], bytes_max: int
) -> None:
    path = [*added(asks("first"), *items), LAST]
    prompt = build_prompt(path, system_message="S", bytes_max=bytes_max).items
    check([prompt[0], *(it for it in prompt[1:] if it.role != "system")])
    for note, after in zip(prompt[1:], (*prompt[2:], None), strict=True):
        assert note.role != "system" or after is None or _is_no_output(after), "no note between a call and its output"
    if bytes_max == EVERYTHING:
        sent = "\n\n".join(it.text for it in prompt)
        assert all(item.text in sent for item in items if item.type == "message")


def _is_no_output(item: PromptItem) -> bool:
    return isinstance(item, Message) or item.role != "tool"
