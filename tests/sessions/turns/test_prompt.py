"""The prompt of a turn: roles alternate on every path, and what a turn contributes follows from its end."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.models.client import Message
from service.sessions.turns.prompt import build_prompt
from service.storage.records import Item, TurnRecord, TurnState
from tests.storage.rows import T0

EVERYTHING = 10**9
ENDS: list[TurnState] = ["completed", "failed", "cancelled", "interrupted"]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
types = st.sampled_from(["message", "reasoning"])
replies = st.lists(st.builds(Item, id=st.just("o"), type=types, role=st.just("assistant"), text=texts), max_size=3)


@st.composite
def paths(draw: st.DrawFn) -> list[TurnRecord]:
    """A path to a turn that runs, over turns that ended in every way."""
    ended = draw(
        st.lists(st.tuples(st.sampled_from(ENDS), st.lists(texts, min_size=1, max_size=2), replies), max_size=8)
    )
    path = [_turn(f"t{n}", state, said, output) for n, (state, said, output) in enumerate(ended)]
    return [*path, _turn("last", "running", draw(st.lists(texts, min_size=1, max_size=2)))]


systems = st.none() | st.just("") | texts


def _turn(name: str, state: TurnState, said: Sequence[str], output: Sequence[Item] = ()) -> TurnRecord:
    return TurnRecord(
        id=name,
        session_id="s",
        parent=None,
        state=state,
        model="m",
        created_at=T0,
        input=tuple(Item(id="i", role="user", text=text) for text in said),
        output=tuple(output),
    )


def _ended(state: TurnState, said: str, replied: str = "") -> TurnRecord:
    return _turn(said, state, [said], [Item(id="o", role="assistant", text=replied)] if replied else [])


LAST = _turn("last", "running", ["now"])


def _said(*turns: TurnRecord, system_message: str | None = None, bytes_max: int = EVERYTHING) -> list[str]:
    """The prompt in short: each message as its role's first letter and its text."""
    prompt = build_prompt([*turns, LAST], system_message=system_message, bytes_max=bytes_max)
    return [f"{message.role[0]}: {message.text}" for message in prompt]


def test_a_first_turn_is_its_input() -> None:
    assert _said() == ["u: now"]


def test_the_system_message_comes_first_if_there_is_one() -> None:
    assert _said(system_message="Be brief.") == ["s: Be brief.", "u: now"]
    assert _said(system_message="") == ["u: now"]


@pytest.mark.parametrize("state", ["completed", "cancelled", "interrupted"])
def test_a_turn_with_a_reply_contributes_both_sides(state: TurnState) -> None:
    assert _said(_ended(state, "before", "a reply")) == ["u: before", "a: a reply", "u: now"]


@pytest.mark.parametrize("state", ENDS)
def test_an_input_without_a_reply_merges_into_the_next(state: TurnState) -> None:
    assert _said(_ended(state, "before")) == ["u: before\n\nnow"]


def test_a_failed_turn_contributes_no_reply() -> None:
    assert _said(_ended("failed", "before", "half a")) == ["u: before\n\nnow"]


def test_many_unanswered_inputs_merge_in_order() -> None:
    path = [
        _ended("completed", "a", "A"),
        _ended("failed", "b", "x"),
        _ended("cancelled", "c"),
        _ended("completed", "d", "D"),
    ]
    assert _said(*path) == ["u: a", "a: A", "u: b\n\nc\n\nd", "a: D", "u: now"]  # fmt: skip


def test_reasoning_is_no_part_of_a_reply() -> None:
    hm = Item(id="r", type="reasoning", role="assistant", text="hm")
    assert _said(_turn("t", "completed", ["before"], [hm])) == ["u: before\n\nnow"]
    reply = Item(id="o", role="assistant", text="a reply")
    assert _said(_turn("t", "completed", ["before"], [hm, reply])) == ["u: before", "a: a reply", "u: now"]


def test_the_oldest_turns_are_left_out_whole_and_without_holes() -> None:
    path = [_ended("completed", "1", "1"), _ended("completed", "x" * 100, "x"), _ended("completed", "2", "2")]
    assert _said(*path, bytes_max=50) == ["u: 2", "a: 2", "u: now"], (
        "the first turn would fit, the one after it does not"
    )
    assert _said(*path, bytes_max=0) == ["u: now"]
    assert _said(*path, bytes_max=50, system_message="y" * 49) == ["s: " + "y" * 49, "u: now"]


@given(paths(), systems, st.integers(0, 200) | st.just(EVERYTHING))
def test_roles_alternate_on_every_path(path: list[TurnRecord], system_message: str | None, bytes_max: int) -> None:
    prompt = build_prompt(path, system_message=system_message, bytes_max=bytes_max)
    roles = [message.role for message in prompt]
    if system_message:
        assert prompt[0] == Message("system", system_message)
        roles = roles[1:]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert all(message.text for message in prompt)


@given(paths())
def test_nothing_is_lost_added_or_moved(path: list[TurnRecord]) -> None:
    expected: list[tuple[str, list[str]]] = []
    for turn in path:
        parts = [("user", item.text) for item in turn.input]
        if turn.state != "failed" and turn.text:
            parts.append(("assistant", turn.text))
        for role, text in parts:
            if expected and expected[-1][0] == role == "user":
                expected[-1][1].append(text)
            else:
                expected.append((role, [text]))
    prompt = build_prompt(path, system_message=None, bytes_max=EVERYTHING)
    assert [(message.role, message.text) for message in prompt] == [
        (role, "\n\n".join(said)) for role, said in expected
    ]


@given(paths(), systems, st.integers(0, 150))
def test_a_bounded_prompt_is_that_of_the_newest_turns_and_within_its_bound(
    path: list[TurnRecord], system_message: str | None, bytes_max: int
) -> None:
    prompt = build_prompt(path, system_message=system_message, bytes_max=bytes_max)
    suffixes = [
        build_prompt(path[start:], system_message=system_message, bytes_max=EVERYTHING) for start in range(len(path))
    ]
    assert prompt in suffixes, "whole turns, no holes, always the last"
    size = sum(len(message.text.encode()) for message in prompt)
    assert size <= bytes_max or prompt == suffixes[-1]
    # And as many of them as fit; a separator may be counted where none is needed.
    for longer in suffixes[: suffixes.index(prompt)]:
        assert sum(len(message.text.encode()) for message in longer) + 2 * len(path) + 2 > bytes_max
