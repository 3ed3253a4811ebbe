"""The prompt of a turn: roles alternate on every path, and a turn's end decides its part of the prompt."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ModelError
from service.models.client import Message, PromptItem
from service.sessions.turns.prompt import shortened, size_of
from service.steps import at_once
from service.storage.records import Failure, Item, LeftOut, TurnRecord, TurnState
from service.storage.rules import TURN_BYTES
from tests.sessions.turns.prompts import build_prompt
from tests.storage.rows import T0

EVERYTHING = 10**9
ENDS: list[TurnState] = ["completed", "failed", "cancelled", "interrupted"]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
types = st.sampled_from(["message", "reasoning"])
replies = st.lists(st.builds(Item, id=st.just("o"), type=types, role=st.just("assistant"), text=texts), max_size=3)


CODES = ["upstream_error", "upstream_rejected", "context_too_long", "content_filter", "unsupported_content"]
REFUSALS = CODES[2:]


@st.composite
def paths(draw: st.DrawFn) -> list[TurnRecord]:
    """A path to a running turn, over turns with every kind of end."""
    ended = draw(
        st.lists(
            st.tuples(st.sampled_from(ENDS), st.lists(texts, min_size=1, max_size=2), replies, st.sampled_from(CODES)),
            max_size=8,
        )
    )
    path = [
        _turn(f"t{n}", state, said, output, code=code if state == "failed" else None)
        for n, (state, said, output, code) in enumerate(ended)
    ]
    return [*path, _turn("last", "running", draw(st.lists(texts, min_size=1, max_size=2)))]


systems = st.none() | st.just("") | texts


def _turn(
    name: str,
    state: TurnState,
    said: Sequence[str],
    output: Sequence[Item] = (),
    *,
    code: str | None = None,
    left_out: LeftOut | None = None,
    model: str = "m",
) -> TurnRecord:
    return TurnRecord(
        id=name,
        session_id="s",
        parent=None,
        state=state,
        model=model,
        created_at=T0,
        started_at=T0,
        error=None if code is None else Failure(code, "it says"),
        left_out=left_out,
        input=tuple(Item(id="i", role="user", text=text) for text in said),
        output=tuple(output),
    )


def _ended(
    state: TurnState,
    said: str,
    replied: str = "",
    *,
    code: str | None = None,
    left_out: LeftOut | None = None,
    model: str = "m",
) -> TurnRecord:
    output = [Item(id="o", role="assistant", text=replied)] if replied else []
    return _turn(said, state, [said], output, code=code, left_out=left_out, model=model)


LAST = _turn("last", "running", ["now"])


def _said(*turns: TurnRecord, system_message: str | None = None, bytes_max: int = EVERYTHING) -> list[str]:
    """The prompt in short: each message as its role's first letter and its text."""
    return _in_short(build_prompt([*turns, LAST], system_message=system_message, bytes_max=bytes_max).items)


def _in_short(items: Sequence[PromptItem]) -> list[str]:
    assert all(isinstance(item, Message) for item in items)
    return [f"{item.role[0]}: {item.text}" for item in items]


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
    room = 50 + 3 * TURN_BYTES
    assert _said(*path, bytes_max=room) == ["u: 2", "a: 2", "u: now"], (
        "the first turn would fit, the one after it does not"
    )
    assert _said(*path, bytes_max=0) == ["u: now"]
    full = "y" * (room - 1)
    assert _said(*path, bytes_max=room, system_message=full) == [f"s: {full}", "u: now"]


def test_the_text_so_far_of_a_reply_that_goes_on_counts_and_is_never_left_out() -> None:
    path = [_ended("completed", "1", "1"), _ended("completed", "2", "2"), LAST]
    room = 50 + 3 * TURN_BYTES
    for prefix, items in (("ä" * 10, 5), ("ä" * (TURN_BYTES // 2), 3), ("ä" * room, 1)):
        prompt = build_prompt(path, system_message=None, bytes_max=room, prefix=prefix)
        assert len(prompt.items) == items, "in UTF-8 each letter has two bytes"


@given(paths(), systems, st.integers(0, 1500) | st.just(EVERYTHING))
def test_roles_alternate_on_every_path(path: list[TurnRecord], system_message: str | None, bytes_max: int) -> None:
    prompt = build_prompt(path, system_message=system_message, bytes_max=bytes_max).items
    roles = [message.role for message in prompt]
    if system_message:
        assert prompt[0] == Message("system", system_message)
        roles = roles[1:]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert all(message.text for message in prompt)
    assert all(message.text.strip() for message in prompt if message.role == "assistant")


@pytest.mark.parametrize("code", REFUSALS)
def test_an_input_that_the_model_refused_for_its_content_is_never_sent_again(code: str) -> None:
    poison = _ended("failed", "poison", code=code)
    assert _said(_ended("completed", "a", "A"), poison) == ["u: a", "a: A", "u: now"]
    assert _said(poison, _ended("completed", "b", "B"), poison, _ended("failed", "c")) == [
        "u: b",
        "a: B",
        "u: c\n\nnow",
    ]


def test_an_input_whose_whole_reply_was_filtered_is_never_sent_again() -> None:
    filtered = msgspec.structs.replace(_ended("completed", "poison"), finish_reason="content_filter")
    assert _said(filtered) == ["u: now"]
    cut = msgspec.structs.replace(_ended("completed", "a", "half"), finish_reason="content_filter")
    assert _said(cut) == ["u: a", "a: half", "u: now"]


@pytest.mark.parametrize("code", ["content_filter", "unsupported_content"])
def test_inputs_that_were_refused_in_one_message_are_all_suspected(code: str) -> None:
    outage = _ended("failed", "poison", code="upstream_error")
    assert _said(outage, _ended("failed", "harmless", code=code)) == ["u: now"]
    assert _said(_ended("completed", "a", "A"), outage, _ended("failed", "b", code=code)) == ["u: a", "a: A", "u: now"]


def test_an_input_that_was_too_long_takes_no_other_with_it() -> None:
    assert _said(_ended("failed", "a", code="upstream_error"), _ended("failed", "b" * 99, code="context_too_long")) == [
        "u: a\n\nnow"
    ]


def test_a_question_that_was_repeated_in_an_outage_is_asked_once() -> None:
    outage = [_ended("failed", "now", code="upstream_error")] * 4
    assert _said(*outage) == ["u: now"]
    others = [_ended("failed", text, code="upstream_error") for text in ("a", "b", "a ", "c", " ")]
    assert _said(*others, *outage) == ["u: b\n\na \n\nc\n\nnow"]


def test_inputs_that_were_rejected_twice_are_not_sent_a_third_time() -> None:
    rejected = [_ended("failed", text, code="upstream_rejected") for text in ("poison", "a", "b")]
    assert _said(*rejected[:1]) == ["u: poison\n\nnow"]
    assert _said(*rejected[:2]) == ["u: a\n\nnow"]
    assert _said(*rejected) == ["u: b\n\nnow"]
    outage = _ended("failed", "poison", code="upstream_error")
    assert _said(outage, *rejected[1:]) == ["u: b\n\nnow"]
    assert _said(rejected[0], _ended("completed", "c", "C"), rejected[1]) == ["u: poison\n\nc", "a: C", "u: a\n\nnow"]


@pytest.mark.parametrize("state", ["completed", "cancelled", "interrupted"])
@pytest.mark.parametrize("blank", ["\n\n", " ", "\u00a0\u2003\r"])
def test_a_blank_reply_counts_as_empty(state: TurnState, blank: str) -> None:
    assert _said(_ended(state, "before", blank)) == ["u: before\n\nnow"]
    assert _said(_ended(state, "before", f"{blank}x{blank}")) == ["u: before", f"a: {blank}x{blank}", "u: now"]


def test_a_blank_input_stays_where_there_is_nothing_else() -> None:
    assert _said(_ended("completed", " ", "A"), _ended("failed", "\n")) == ["u:  ", "a: A", "u: now"]
    path = [_turn("last", "running", ["\t"])]
    assert _in_short(build_prompt(path, system_message=None, bytes_max=EVERYTHING).items) == ["u: \t"]


# Turns that are left out


def _left_out(*turns: TurnRecord, bytes_max: int = EVERYTHING, older: LeftOut = LeftOut()) -> LeftOut | None:  # noqa: B008  immutable
    return build_prompt([*turns, LAST], system_message=None, bytes_max=bytes_max, older=older).left_out


def test_left_out_counts_messages_and_bytes() -> None:
    path = [_ended("completed", "é", "A"), _ended("failed", "b"), _ended("completed", "c" * 9, "C")]
    assert _left_out(*path) is None
    assert _left_out(*path, bytes_max=30 + 3 * TURN_BYTES) == LeftOut(2, 3), "the first one's input and reply"
    assert _left_out(*path, bytes_max=0) == LeftOut(5, 14)
    assert _left_out(*path, older=LeftOut(7, 100)) == LeftOut(7, 100)
    assert _left_out(*path, older=LeftOut(7, 100), bytes_max=0) == LeftOut(12, 114)


def test_the_number_of_turns_in_a_prompt_is_bounded_by_its_size_too() -> None:
    path = [_ended("completed", "q", "A") for _ in range(1000)]
    prompt = build_prompt([*path, LAST], system_message=None, bytes_max=100 * TURN_BYTES)
    turns = 100 * TURN_BYTES // (TURN_BYTES + 6)
    assert prompt.left_out == LeftOut(2 * (1001 - turns), 2 * (1001 - turns)), "only texts are told as left out"
    assert len(prompt.items) == 2 * turns - 1
    assert at_once(size_of(prompt)) == turns * TURN_BYTES + 2 * (turns - 1) + len("now")


def test_refused_turns_have_no_share_of_a_prompt() -> None:
    refused = [_ended("failed", "b", code=code) for code in REFUSALS] * 100
    assert _said(_ended("completed", "a", "A"), *refused, bytes_max=3 * TURN_BYTES) == ["u: a", "a: A", "u: now"]
    assert _shortened(*refused, _ended("completed", "a", "A")) == ["s: S", "u: now"]


def test_each_turn_of_a_path_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    in_prompts = TurnRecord.in_prompts.fget  # type: ignore[attr-defined]

    def note(turn: TurnRecord) -> LeftOut:
        measured.append(turn.id)
        brought: LeftOut = in_prompts(turn)
        return brought

    monkeypatch.setattr(TurnRecord, "in_prompts", property(note))
    path = [*LONG, _ended("completed", "q", "A", left_out=LeftOut(6, 303)), LAST]
    build_prompt(path, system_message=None, bytes_max=EVERYTHING)
    assert measured == [turn.id for turn in path]


def test_refused_turns_do_not_count_as_left_out() -> None:
    refused = [_ended("failed", "b", code=code) for code in REFUSALS]
    assert _left_out(*refused) is None
    assert _left_out(*refused, _ended("completed", "c", "\n"), bytes_max=0) == LeftOut(1, 1)


def _shortened(
    *turns: TurnRecord, tokens: int | None = None, tokens_max: int | None = None, max_output_tokens: int | None = None
) -> list[str]:
    path = [*turns, LAST]
    refused = build_prompt(path, system_message="S", bytes_max=EVERYTHING)
    refusal = ModelError("context_too_long", "no", tokens=tokens, tokens_max=tokens_max)
    shorter = at_once(shortened(refused, refusal, path, system_message="S", max_output_tokens=max_output_tokens))
    return [] if shorter is None else _in_short(shorter.items)


LONG = [_ended("completed", str(n) * 100, "R") for n in range(1, 9)]


def _kept(said: list[str]) -> int:
    """The number of turns before the last one that a prompt has."""
    assert said[0] == "s: S"
    assert said[-1] == "u: now"
    return (len(said) - 2) // 2


def test_without_numbers_half_of_a_prompt_that_was_too_long_is_tried() -> None:
    assert _kept(_shortened(*LONG)) == 3
    assert _kept(_shortened(*LONG, tokens_max=512)) == 3
    assert _kept(_shortened(*LONG, tokens_max=240)) == 2, "three bytes a token"


def test_the_text_so_far_is_a_part_of_the_prompt_that_was_too_long() -> None:
    path, refusal = [*LONG, LAST], ModelError("context_too_long", "no", tokens=1000, tokens_max=900)
    refused = build_prompt(path, system_message="S", bytes_max=EVERYTHING)
    kept = []
    for prefix in ("", "x" * 4000):
        steps = shortened(refused, refusal, path, system_message="S", max_output_tokens=None, prefix=prefix)
        shorter = at_once(steps)
        assert shorter is not None
        kept.append(_kept(_in_short(shorter.items)))
    assert kept == [6, 2], "a fifth less of all, the text included, leaves less of the conversation"


def test_with_numbers_as_much_is_tried_as_fits_by_them() -> None:
    assert _kept(_shortened(*LONG, tokens=1000, tokens_max=900)) == 6
    assert _kept(_shortened(*LONG, tokens=1000, tokens_max=400)) == 2
    assert _kept(_shortened(*LONG, tokens=1000, tokens_max=900, max_output_tokens=500)) == 5, (
        "the reply needs room, too"
    )
    assert _kept(_shortened(*LONG, tokens=1000, tokens_max=900, max_output_tokens=900)) == 0
    assert _kept(_shortened(*LONG, tokens=10**9, tokens_max=512)) == 0


def test_where_there_is_nothing_to_leave_out_nothing_is_tried_again() -> None:
    assert _shortened() == []
    assert _shortened(_ended("failed", "x", code="content_filter")) == []


def test_a_conversation_goes_on_from_what_the_turn_before_was_answered_with() -> None:
    answered = _ended("completed", "q", "A", left_out=LeftOut(6, 303))
    assert _said(*LONG, answered)[0] == f"u: {'4' * 100}"
    assert _left_out(*LONG, answered) == LeftOut(6, 303)
    assert _left_out(*LONG[2:], answered, older=LeftOut(4, 202)) == LeftOut(6, 303)
    assert _left_out(*LONG[4:], answered, older=LeftOut(8, 404)) == LeftOut(8, 404)
    another = _ended("completed", "q", "A", left_out=LeftOut(6, 303), model="smaller")
    assert _left_out(*LONG, another) is None, "of another model it says nothing"
    assert _left_out(*LONG, answered, another) == LeftOut(6, 303)


def test_a_conversation_that_was_too_long_twice_begins_with_half_of_what_was_tried() -> None:
    long = [_ended("completed", str(n) * 4000, "R") for n in range(1, 9)]
    too_long = _ended("failed", "q", code="context_too_long", left_out=LeftOut(4, 8002))
    assert _said(*long, too_long)[0] == f"u: {'7' * 4000}"
    again = _ended("failed", "q", code="context_too_long", left_out=LeftOut(8, 16004))
    assert _said(*long, too_long, again)[0] == f"u: {'8' * 4000}"
    assert _said(*LONG, too_long)[0] == f"u: {'1' * 100}", "so short that it was not the conversation that is too long"


def test_an_input_that_was_too_long_by_itself_costs_the_conversation_nothing() -> None:
    path = [_ended("completed", "a", "A"), _ended("failed", "x" * 100, code="context_too_long", left_out=LeftOut(2, 2))]
    assert _said(*path) == ["u: a", "a: A", "u: now"]
    assert _left_out(*path) is None


# On every path


@given(paths())
def test_answered_turns_are_all_there_in_order_and_nothing_is_added(path: list[TurnRecord]) -> None:
    prompt = build_prompt(path, system_message=None, bytes_max=EVERYTHING).items
    answered = [turn for turn in path if turn.reply]
    asked = [*answered, path[-1]]
    assert [message.text for message in prompt if message.role == "assistant"] == [turn.text for turn in answered]
    questions = [message.text for message in prompt if message.role == "user"]
    assert len(questions) == len(asked)
    for text, turn, last in zip(questions, asked, [None, *answered], strict=True):
        own = "\n\n".join(item.text for item in turn.input)
        assert text.endswith(own)
        between = path[0 if last is None else path.index(last) + 1 : path.index(turn)]
        merged = ["\n\n".join(item.text for item in it.input) for it in between if not it.was_refused]
        assert _is_made_of(text.removesuffix(own), merged)


def _is_made_of(text: str, pieces: Sequence[str]) -> bool:
    """Whether a text is some of these pieces in order: a prompt omits repeated, blank and suspected pieces."""
    if not pieces:
        return text == ""
    first = f"{pieces[0]}\n\n"
    return _is_made_of(text, pieces[1:]) or (text.startswith(first) and _is_made_of(text[len(first) :], pieces[1:]))


@given(paths(), systems, st.integers(0, 1500))
def test_a_bounded_prompt_is_that_of_the_newest_turns_and_within_its_bound(
    path: list[TurnRecord], system_message: str | None, bytes_max: int
) -> None:
    whole = build_prompt(path, system_message=system_message, bytes_max=EVERYTHING).left_out
    prompt = build_prompt(path, system_message=system_message, bytes_max=bytes_max).items
    suffixes = [
        build_prompt(path[start:], system_message=system_message, bytes_max=EVERYTHING).items
        for start in range(len(path))
    ]
    assert prompt in suffixes, "whole turns, no holes, always the last"
    size = sum(len(message.text.encode()) + TURN_BYTES * (message.role == "user") for message in prompt)
    assert size <= bytes_max or prompt == suffixes[-1]
    if whole is None:  # and as many turns as fit; the count may include merged or repeated texts that the prompt omits
        system_bytes = len((system_message or "").encode())
        for start in range(suffixes.index(prompt)):
            brought = sum(TURN_BYTES + turn.in_prompts.bytes + 2 * (1 + len(turn.input)) for turn in path[start:])
            assert system_bytes + brought > bytes_max
