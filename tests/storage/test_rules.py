"""What every store decides in the same way: the rules on records, each by itself."""

from itertools import pairwise, takewhile

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import HeadMovedError, PreconditionFailedError
from service.models.client import Usage
from service.storage import rules
from service.storage.pieces import QUEUED, STARTED
from service.storage.records import (
    SEQ_AFTER_CRASH,
    EndResult,
    EndState,
    Item,
    SessionPatch,
    SessionRecord,
    TurnRecord,
)
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, at, ended

texts = st.text(max_size=6)
tokens = st.integers(0, 9)
usages = st.none() | st.builds(
    Usage,
    input_tokens=tokens,
    output_tokens=tokens,
    reasoning_tokens=tokens,
    cached_tokens=tokens | st.just(msgspec.UNSET),
)


@st.composite
def turns(draw: st.DrawFn) -> TurnRecord:
    turn = a_turn(draw(st.uuids()).hex, texts=draw(st.lists(texts, max_size=3)))
    state: EndState = draw(st.sampled_from(["completed", "failed", "cancelled", "interrupted"]))
    return ended(turn, state, text=draw(texts), reasoning=draw(texts), usage=draw(usages))


# Sessions


@pytest.mark.parametrize("open_turns", [0, 1])
@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize("after_s", [IDLE_TIMEOUT_S - 0.001, IDLE_TIMEOUT_S])
def test_a_session_is_visible_until_it_is_deleted_or_has_expired_and_keeps_its_id_until_its_deletion_is_finished(
    open_turns: int, is_deleted: bool, after_s: float
) -> None:
    session = msgspec.structs.replace(a_session(), open_turns=open_turns)
    has_expired = after_s == IDLE_TIMEOUT_S and not open_turns
    assert rules.is_visible(session, at(after_s), is_deleted=is_deleted) == (not is_deleted and not has_expired)
    assert rules.keeps_its_id(session, at(after_s), is_deleted=is_deleted) == (is_deleted or not has_expired)


def test_a_use_moves_the_deadline_and_nothing_else() -> None:
    session = a_session()
    assert rules.used(session, at(7)) == msgspec.structs.replace(
        session, last_accessed_at=at(7), expires_at=at(7 + IDLE_TIMEOUT_S)
    )


def test_a_patch_changes_the_fields_that_it_sets_and_is_a_use() -> None:
    session = msgspec.structs.replace(a_session(), title="Old", model="a", metadata={"k": "v"})
    patch = SessionPatch(title=None, idle_timeout_s=5)
    assert rules.changes_of(patch) == {"title": None, "idle_timeout_s": 5}
    assert rules.patched(session, patch, at(7)) == msgspec.structs.replace(
        session, title=None, idle_timeout_s=5, last_accessed_at=at(7), expires_at=at(12)
    ), "a new idle timeout counts from this use"
    assert rules.patched(session, SessionPatch(), at(7)) == rules.used(session, at(7))


NEW_VALUES: dict[str, object] = {
    "title": "New",
    "model": "b",
    "system_message": "Be brief.",
    "metadata": {"k": "w"},
    "idle_timeout_s": 7.0,
    "temperature": 0.5,
    "max_output_tokens": 7,
}


def test_a_revision_changes_with_each_field_that_a_patch_can_set() -> None:
    session = msgspec.structs.replace(a_session(), title="Old", model="a", metadata={"k": "v"})
    assert set(rules.PATCHED_FIELDS) == set(NEW_VALUES), "a new field of a patch needs a new value here"
    others = [msgspec.structs.replace(session, **{name: value}) for name, value in NEW_VALUES.items()]
    revisions = {rules.revision_of(it) for it in (session, *others)}
    assert len(revisions) == 1 + len(others)


def test_a_revision_changes_with_nothing_else() -> None:
    session = msgspec.structs.replace(a_session(), metadata={"a": "1", "b": "2"})
    turn = a_turn()
    after_a_turn = rules.ended(rules.begun(session, turn, at(1)), ended(turn, text="Hi"), at(2))
    unpatched = {name: getattr(session, name) for name in rules.PATCHED_FIELDS}
    assert rules.revision_of(msgspec.structs.replace(after_a_turn, **unpatched)) == rules.revision_of(session)
    other_order = msgspec.structs.replace(session, metadata={"b": "2", "a": "1"})
    assert rules.revision_of(other_order) == rules.revision_of(session)
    assert rules.revision_of(session) == rules.revision_of(
        msgspec.json.decode(msgspec.json.encode(session), type=SessionRecord)
    )


def test_a_session_must_have_one_of_the_revisions() -> None:
    session = a_session()
    revision = rules.revision_of(session)
    rules.check_revision(session, None)
    rules.check_revision(session, ["other", revision])
    for revisions in ([], ["other"], [revision.upper() + "x"]):
        with pytest.raises(PreconditionFailedError) as refused:
            rules.check_revision(session, revisions)
        assert refused.value.revision == revision


# Turns


def test_a_head_that_a_caller_did_not_name_is_not_checked() -> None:
    session = msgspec.structs.replace(a_session(), head="t")
    rules.check_head(session, msgspec.UNSET)
    rules.check_head(session, "t")
    rules.check_head(a_session(), None)
    for head in ("other", None):
        with pytest.raises(HeadMovedError):
            rules.check_head(session, head)


@given(begun=st.lists(turns(), max_size=5), data=st.data())
def test_begins_and_ends_in_any_order_count_every_turn_once(begun: list[TurnRecord], data: st.DataObject) -> None:
    session = a_session()
    waiting, opened, second = list(begun), list[TurnRecord](), 0
    while waiting or opened:
        second += 1
        if waiting and (not opened or data.draw(st.booleans())):
            opened.append(waiting.pop(0))
            session = rules.begun(session, opened[-1], at(second))
            assert session.head == opened[-1].id
        else:
            turn = opened.pop(data.draw(st.integers(0, len(opened) - 1)))
            session = rules.ended(session, turn, at(second))
        assert session.open_turns == len(opened)
        assert session.expires_at == at(second + IDLE_TIMEOUT_S)
    used = rules.used(a_session(), at(second)) if begun else a_session()
    head = begun[-1].id if begun else None
    assert session == rules.with_totals(msgspec.structs.replace(used, head=head, message_count=77), begun)
    usages = [turn.usage for turn in begun if turn.usage]
    assert session.input_tokens == sum(usage.input_tokens for usage in usages)
    assert session.output_tokens == sum(usage.output_tokens for usage in usages)
    assert session.message_count == sum(len(turn.input) + (turn.text != "") for turn in begun)


def test_an_item_that_is_no_message_counts_as_none() -> None:
    reasoning = Item(id="r", type="reasoning", role="assistant", text="hm")
    turn = msgspec.structs.replace(a_turn(texts=("a", "b")), input=(*a_turn(texts=("a", "b")).input, reasoning))
    assert rules.counts_of_begin(turn).message_count == 2
    assert rules.counts_of_end(ended(turn, text="", reasoning="hm")).message_count == 0


def test_a_start_is_for_a_queued_turn_only() -> None:
    queued = a_turn(state="queued")
    assert rules.started(queued, at(3)) == msgspec.structs.replace(queued, state="running", started_at=at(3))
    for turn in (a_turn(), ended(a_turn())):
        assert rules.started(turn, at(3)) == turn


def test_only_the_very_end_that_the_store_has_is_kept_already() -> None:
    end = ended(a_turn())
    assert rules.result_of_late_end(end, msgspec.structs.replace(end, stored=False)) is EndResult.ALREADY_KEPT
    for kept in (None, a_turn(), rules.crashed(a_turn(), [], [], T0), ended(a_turn(), text="Another")):
        assert rules.result_of_late_end(kept, end) is EndResult.LOST


@given(
    whole=st.lists(st.tuples(st.sampled_from(["r", "m", "n"]), texts), max_size=3, unique_by=lambda it: it[0]),
    data=st.data(),
)
def test_a_crashed_turn_has_the_output_of_its_checkpoints_however_they_cut_it(
    whole: list[tuple[str, str]], data: st.DataObject
) -> None:
    items = tuple(Item(id=name, role="assistant", text=text) for name, text in whole)
    growth: list[tuple[int, str]] = []
    for index, item in enumerate(items):
        length = len(item.text)
        inner = data.draw(st.lists(st.integers(0, length), max_size=3))
        for start, end in pairwise(sorted([0, *inner, length])):
            growth.append((index, item.text[start:end]))
    turn = a_turn()
    assert rules.crashed(turn, rules.without_texts(items), growth, at(9)) == msgspec.structs.replace(
        turn, state="interrupted", reason="crash", ended_at=at(9), last_seq=SEQ_AFTER_CRASH, output=items
    )


def test_a_call_in_a_crashed_turn_is_complete_if_its_arguments_are_a_whole_object() -> None:
    calls = [
        Item(id=f"fc_{n}", type="function_call", role="assistant", text="", call_id=f"c{n}", name="f", complete=False)
        for n in range(3)
    ]
    growth = [(0, '{"a":'), (1, "{"), (0, '"}"}')]
    crashed = rules.crashed(a_turn(), calls, growth, at(9)).output
    assert [(item.text, item.complete) for item in crashed] == [('{"a":"}"}', True), ("{", False), ("", False)]
    assert {item.name for item in crashed} == {"f"}


def test_encrypted_reasoning_may_come_later_than_its_words() -> None:
    words = Item(id="r", type="reasoning", role="assistant", text="a")
    rest = msgspec.structs.replace(words, text="b", encrypted="gAAA", upstream="{}")
    assert rules.joined([words, rest, words]) == (msgspec.structs.replace(rest, text="aba"),)


@given(sizes=st.lists(st.integers(0, 5), max_size=6), bytes_max=st.none() | st.integers(0, 800))
def test_the_newest_turns_within_a_size_are_all_that_fit_and_always_the_last(
    sizes: list[int], bytes_max: int | None
) -> None:
    bound = rules.PathBound(bytes_max)
    newest = list(takewhile(bound.takes, sizes))
    assert bool(newest) == bool(sizes)
    if bytes_max is None:
        assert newest == sizes
    else:
        assert len(newest) <= 1 or sum(size + rules.TURN_BYTES for size in newest) <= bytes_max
        one_more = sizes[: len(newest) + 1]
        assert len(newest) == len(sizes) or sum(one_more) + rules.TURN_BYTES * len(one_more) > bytes_max


def test_the_totals_of_no_turns_are_nothing() -> None:
    session = msgspec.structs.replace(a_session(), message_count=3, open_turns=1, input_tokens=4, output_tokens=5)
    assert rules.with_totals(session, []) == a_session()
    assert session.created_at == T0


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (a_turn(), [STARTED]),
        (rules.started(a_turn(state="queued"), at(3)), [QUEUED, STARTED]),
    ],
    ids=["at once", "queued"],
)
def test_how_an_adopted_turn_has_started_is_known_without_a_checkpoint(turn: TurnRecord, expected: list[int]) -> None:
    adopted = rules.resumed(turn, (), continues=False)
    assert [run.item for run in adopted.runs[:-1]] == expected
