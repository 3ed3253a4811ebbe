"""Turns that outlive their owner: suspended by it or released by a recovery, and adopted by another owner."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio

from service.errors import (
    HeadMovedError,
    OwnedElsewhereError,
    RepeatedError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
    TurnsSuspendedError,
)
from service.models.client import Usage
from service.storage import rules
from service.storage.pieces import CALL, QUEUED, STARTED, Resumed, Run, last_seq, resumed_run
from service.storage.records import (
    SEQ_AFTER_CRASH,
    AdoptedTurn,
    Adoption,
    EndResult,
    IdempotencyKey,
    Item,
    LeftOut,
    OnInterrupt,
    OpenTurn,
    SessionPatch,
    SuspendedTurn,
    TurnRecord,
)
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import (
    IDLE_TIMEOUT_S,
    T0,
    a_session,
    a_turn,
    adopt,
    at,
    contents,
    ended,
    said,
    suspended_in,
    told,
)
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_owners import a_checkpoint, take_for_dead

YES: Any = lambda _turn: True  # noqa: E731
NO: Any = lambda _turn: False  # noqa: E731
BEGINNING = (Run(STARTED),)


def a_lasting_turn(
    turn_id: str = "t", session_id: str = "s", *, on_interrupt: OnInterrupt = "continue", **changes: Any
) -> TurnRecord:
    return msgspec.structs.replace(a_turn(turn_id, session_id), on_interrupt=on_interrupt, **changes)


def so_far(turn: TurnRecord, *texts: str, after: int = 0, runs: Sequence[Run] = BEGINNING) -> SuspendedTurn:
    """A running turn with a reply so far, after the events that have no text."""
    runs = (*runs, *said(*texts))
    output = (Item(id=f"{turn.id}-out", role="assistant", text="".join(texts)),) if texts else ()
    return SuspendedTurn(
        turn=msgspec.structs.replace(turn, output=output, last_seq=last_seq(runs)), runs=runs, after=after
    )


async def begin(store: Store, *turns: TurnRecord) -> None:
    for session in dict.fromkeys(turn.session_id for turn in turns):
        await store.create_session(a_session(session), now=T0)
    for turn in turns:
        await store.begin_turn(turn, now=T0)


async def _suspended(store: Store, *texts: str, **changes: Any) -> SuspendedTurn:
    """A session with one turn, which is suspended."""
    turn = a_lasting_turn(**changes)
    await begin(store, turn)
    it = so_far(turn, *texts)
    assert list(await store.suspend_turns([it], now=at(1))) == []
    return it


# Suspended


async def test_a_suspended_turn_is_open_and_shows_what_it_has_said(store: Store) -> None:
    it = await _suspended(store, "Hel", "lo", usage=Usage(input_tokens=3, output_tokens=2), left_out=LeftOut(1, 9))
    assert await store.get_turn("s", "t", now=T0) == it.turn
    assert (await store.get_reply("s", "t", now=T0)).text == "Hello"
    assert (await store.list_turns("s", limit=10, after=None, now=T0)).data == (it.turn,)
    assert [turn.text for turn in await store.read_path("s", "t", bytes_max=None)] == ["Hello"]
    assert await store.measure_path("s", "t") == it.turn.in_prompts
    page = await store.read_events("s", "t")
    assert (page.runs, page.text, page.kept, page.ended) == (it.runs, "Hello", 3, False)
    page = await store.read_events("s", "t", after=2)
    assert (page.runs, page.text, page.after) == (said("lo"), "lo", 2)
    session = await store.get_session("s", now=at(1))
    assert (session.open_turns, session.status, session.message_count) == (1, "running", 1)
    assert (session.last_accessed_at, session.expires_at) == (at(1), at(1 + IDLE_TIMEOUT_S))
    assert (session.input_tokens, session.output_tokens) == (0, 0), "an open turn counts at its end"
    assert await store.find_owner("s") is None
    assert (await store.find_item("s", "t-out", now=T0)).id == "t"
    assert (await store.list_tree("s", limit=9, after=None, now=T0)).data[0].state == "running"
    found = await store.search_sessions("Hello", limit=9, after=None, status=None, now=T0)
    assert found.data == (), "only what has ended is searched"


async def test_a_suspended_turn_follows_on_its_checkpoints(store: Store) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    await store.checkpoint_turns([msgspec.structs.replace(a_checkpoint("t", "He"), runs=(*BEGINNING, *said("He")))])
    await store.checkpoint_turns([a_checkpoint("t", "xx", "y", after=2)])  # the answer to this call is lost
    it = so_far(turn, "He", "l", "lo", after=2)
    assert list(await store.suspend_turns([it], now=T0)) == []
    assert await store.get_turn("s", "t", now=T0) == it.turn
    assert await told(store, "s", "t") == ["He", "l", "lo"]


async def test_suspended_turns_of_many_sessions_go_in_one_call_and_those_that_are_lost_are_named(store: Store) -> None:
    turns = [a_lasting_turn(f"t{n}", f"s{n}") for n in range(5)]
    await begin(store, *turns)
    await store.end_turn(ended(turns[3]), runs=said("Hi"), now=T0)
    never = a_lasting_turn("never", "s0")
    asked = [so_far(turn, f"text {turn.id}") for turn in (*turns, never)]
    for _ in range(2):  # the outcome of the first call may be unknown
        assert set(await store.suspend_turns(asked, now=at(1))) == {"t3", "never"}
        for it in asked[:3]:
            assert await store.get_turn(it.turn.session_id, it.turn.id, now=T0) == it.turn
    assert (await store.get_turn("s3", "t3", now=T0)).state == "completed"


async def test_nothing_is_suspended_by_an_empty_call(store: Store) -> None:
    assert list(await store.suspend_turns([], now=T0)) == []


async def test_a_suspended_turn_is_its_owner_s_no_more(store: Store) -> None:
    it = await _suspended(store, "Hello")
    before = await contents(store, now=T0)
    assert not await store.start_turn("t", now=at(2))
    assert list(await store.checkpoint_turns([a_checkpoint("t", "x", after=2)])) == ["t"]
    assert await store.end_turn(ended(it.turn), runs=said("Hi"), now=at(2)) is EndResult.LOST
    assert await contents(store, now=T0) == before


async def test_a_long_reply_and_any_text_are_kept(store: Store) -> None:
    texts = ["a\0b", "é\U0001f600", "\ud7ff", " " * 300, "x" * 200_000, "y" * 70_000]
    it = await _suspended(store, *texts)
    assert await store.get_turn("s", "t", now=T0) == it.turn
    assert await told(store, "s", "t", length_max=50_000) == texts
    (adopted,) = await adopt(store)
    assert adopted.turn.output == it.turn.output
    assert adopted.runs == (*it.runs, resumed_run(Resumed(8, 2, "continue", len("".join(texts)))))


async def test_a_reply_of_many_megabytes_is_suspended_adopted_and_ended(store: Store) -> None:
    texts = [f"{n:06}" * 1000 for n in range(400)]
    turn = a_lasting_turn()
    await begin(store, turn)
    first = msgspec.structs.replace(a_checkpoint("t", *texts[:3]), runs=(*BEGINNING, *said(*texts[:3])))
    await store.checkpoint_turns([first])
    it = so_far(turn, *texts, after=4)
    assert list(await store.suspend_turns([it], now=T0)) == []
    assert await told(store, "s", "t") == texts
    (adopted,) = await adopt(store)
    assert adopted.turn.output == it.turn.output
    end = ended(adopted.turn, text="".join(texts) + "!")
    runs = (*adopted.runs, *said("!"))
    assert await store.end_turn(end, runs=runs, now=at(6), after=last_seq(adopted.runs)) is EndResult.KEPT
    assert (await store.get_turn("s", "t", now=at(6))).text == end.text
    assert await told(store, "s", "t") == [*texts, "!"]


# Other calls on a session whose turns are suspended


async def test_no_turn_begins_before_the_suspended_ones_are_adopted(store: Store) -> None:
    await _suspended(store, "Hello")
    before = await contents(store, now=T0)
    for turn in (a_turn("next", parent="t"), a_turn("beside")):
        for branches in (False, True):
            with pytest.raises(TurnsSuspendedError) as refused:
                await store.begin_turn(turn, now=at(2), branches=branches)
            assert refused.value.turn_id == "t"
    with pytest.raises(HeadMovedError):
        await store.begin_turn(a_turn("next", parent="t"), now=at(2), head=None)
    with pytest.raises(TurnNotFoundError):
        await store.begin_turn(a_turn("next", parent="never"), now=at(2))
    assert await contents(store, now=T0) == before
    await adopt(store)
    assert (await store.begin_turn(a_turn("next", parent="t"), now=at(6))).session.open_turns == 2


async def test_a_key_of_an_earlier_call_counts_before_all_else(store: Store) -> None:
    turn, key = a_lasting_turn(), IdempotencyKey(caller="", key="k", fingerprint=b"f")
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(turn, now=T0, key=key)
    await store.suspend_turns([so_far(turn, "Hello")], now=T0)
    with pytest.raises(RepeatedError) as repeated:
        await store.begin_turn(a_turn("again"), now=at(2), key=key)
    assert (repeated.value.turn_id, repeated.value.is_gone) == ("t", False)


async def test_what_is_open_refuses_changes_and_the_rest_of_the_session_takes_them(store: Store) -> None:
    first = a_turn("first")
    await begin(store, first)
    await store.end_turn(ended(first), runs=said("Hi"), now=T0)
    side = a_turn("side", parent="first")
    await store.begin_turn(side, now=T0)
    await store.end_turn(ended(side), runs=said("Hi"), now=T0)
    turn = msgspec.structs.replace(a_turn("t", parent="first"), on_interrupt="retry")
    await store.begin_turn(turn, now=T0)
    await store.suspend_turns([so_far(turn, "Hello")], now=T0)
    for refused in (
        store.delete_turns("s", "t", now=T0),
        store.delete_turns("s", "first", now=T0),
        store.delete_turn("s", "t", now=T0),
        store.delete_turn("s", "first", now=T0),
        store.delete_item("s", "t-out", now=T0),
        store.delete_item("s", "first-out", now=T0),
        store.update_session("s", SessionPatch(head="first"), now=T0),
        store.fork_session("s", at="t", copy_id="copy", now=T0),
        store.add_turns([an_added_turn("added", parent="t")], now=T0),
    ):
        with pytest.raises(TurnInProgressError):
            await refused
    assert (await store.fork_session("s", at="first", copy_id="copy", now=T0)).message_count == 2
    assert (await store.update_session("s", SessionPatch(title="new"), now=at(2))).title == "new"
    added = await store.add_turns([an_added_turn("added", parent="first")], now=at(2))
    assert (added.head, added.open_turns) == ("added", 1)
    await store.delete_item("s", "side-out", now=at(2))
    await store.delete_turn("s", "side", now=at(2))
    await store.delete_turns("s", "added", now=at(2))
    assert [it.turn.id for it in await adopt(store)] == ["t"]


async def test_a_session_with_suspended_turns_does_not_expire(store: Store) -> None:
    await _suspended(store, "Hello")
    late = at(10 * IDLE_TIMEOUT_S)
    assert await store.delete_expired(now=late, limit=10) == 0
    assert (await store.get_session("s", now=late)).open_turns == 1
    assert await suspended_in(store, limit=10) == ["s"]


async def test_a_session_is_deleted_with_its_suspended_turns(store: Store) -> None:
    await _suspended(store, "Hello")
    await store.mark_deleted("s", now=T0)
    assert list(await adopt(store)) == []
    assert await suspended_in(store, limit=10) == []
    await store.remove_deleted("s")
    assert list(await adopt(store)) == []
    assert await store.find_session_of("t") is None
    await store.create_session(a_session(), now=T0)
    assert await told(store, "s", "t") == []
    with pytest.raises(TurnNotFoundError):
        await store.get_turn("s", "t", now=T0)


async def test_the_sessions_that_wait_longest_are_listed_first(store: Store) -> None:
    turns = [a_lasting_turn(f"t{n}", f"s{n}") for n in range(4)]
    await begin(store, *turns)
    for moment, n in enumerate((2, 0, 3, 1)):
        await store.suspend_turns([so_far(turns[n])], now=at(moment))
    assert await suspended_in(store, limit=10) == ["s2", "s0", "s3", "s1"]
    assert await suspended_in(store, limit=2) == ["s2", "s0"]
    await adopt(store, "s2")
    await store.mark_deleted("s0", now=T0)
    assert await suspended_in(store, limit=2) == ["s3", "s1"]


# Adopted


async def test_a_turn_that_continues_keeps_its_reply_and_its_events(store: Store) -> None:
    it = await _suspended(store, "Hel", "lo", usage=Usage(input_tokens=3, output_tokens=2), attempt=1)
    (adopted,) = await adopt(store, continues=lambda turn: turn == it.turn)
    resumption = resumed_run(Resumed(4, 2, "continue", 5))
    assert adopted.turn == msgspec.structs.replace(it.turn, attempt=2, last_seq=4)
    assert adopted.runs == (*it.runs, resumption)
    assert (await store.get_turn("s", "t", now=T0)).attempt == 2
    # It is like any other turn of this owner.
    further = msgspec.structs.replace(a_checkpoint("t", "!", after=4), usage=Usage(input_tokens=5, output_tokens=3))
    assert list(await store.checkpoint_turns([further])) == []
    end = ended(adopted.turn, text="Hello!?", now=at(6))
    end = msgspec.structs.replace(end, last_seq=7, output=(msgspec.structs.replace(end.output[0], id="t-out"),))
    assert await store.end_turn(end, runs=(*adopted.runs, *said("!", "?")), now=at(6), after=5) is EndResult.KEPT
    assert await store.get_turn("s", "t", now=at(6)) == end
    page = await store.read_events("s", "t")
    assert (page.runs, page.text, page.kept, page.ended) == (
        (*it.runs, resumption, *said("!", "?")),
        "Hello!?",
        6,
        True,
    )
    page = await store.read_events("s", "t", after=4)
    assert (page.runs, page.text) == (said("!", "?"), "!?")
    session = await store.get_session("s", now=at(6))
    assert (session.open_turns, session.message_count, session.last_accessed_at) == (0, 2, at(6))


@pytest.mark.parametrize(("on_interrupt", "continues"), [("retry", True), ("continue", False)])
async def test_a_turn_that_begins_anew_has_only_its_beginning(
    store: Store, on_interrupt: OnInterrupt, continues: bool
) -> None:
    turn = a_lasting_turn(on_interrupt=on_interrupt)
    await begin(store, turn)
    await store.suspend_turns([so_far(turn, "Hel", "lo", runs=(Run(QUEUED), Run(STARTED)))], now=T0)
    (adopted,) = await adopt(store, continues=lambda _: continues)
    resumption = resumed_run(Resumed(5, 2, "retry", 0))
    assert adopted.turn == msgspec.structs.replace(turn, attempt=2, last_seq=5)
    assert adopted.runs == (Run(QUEUED), Run(STARTED), resumption)
    await store.checkpoint_turns([a_checkpoint("t", "A", after=5)])
    end = ended(adopted.turn, text="Anew")
    assert await store.end_turn(end, runs=(*adopted.runs, *said("A", "new")), now=at(6), after=6) is EndResult.KEPT
    assert await told(store, "s", "t") == ["A", "new"]
    for after in (2, 3, 4):  # a client that has seen a part of the first attempt
        page = await store.read_events("s", "t", after=after)
        assert (page.runs, page.text, page.kept) == ((resumption, *said("A", "new")), "Anew", 7)
    assert (await store.read_events("s", "t", after=6)).text == "new"
    assert (await store.get_turn("s", "t", now=at(6))).text == "Anew"


async def test_a_turn_that_is_suspended_without_its_reply_begins_anew_above_all_that_it_has_said(store: Store) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    await store.suspend_turns([so_far(turn, "Hel", "lo")], now=T0)
    (going_on,) = await adopt(store)
    assert (going_on.turn.text, going_on.turn.last_seq) == ("Hello", 4)
    without = SuspendedTurn(turn=msgspec.structs.replace(going_on.turn, output=()), runs=BEGINNING)
    for _ in range(2):  # the outcome of the first call may be unknown
        assert list(await store.suspend_turns([without], now=at(1))) == []
        assert await store.get_turn("s", "t", now=at(1)) == without.turn
    (anew,) = await adopt(store)
    resumption = resumed_run(Resumed(5, 3, "retry", 0))
    assert (anew.turn.output, anew.turn.last_seq, anew.runs) == ((), 5, (*BEGINNING, resumption))
    end = ended(anew.turn, text="Anew")
    assert await store.end_turn(end, runs=(*anew.runs, *said("Anew")), now=at(6), after=5) is EndResult.KEPT
    assert await told(store, "s", "t") == ["Anew"]
    for after in (1, 2, 3, 4):  # a client that has seen a part of the first attempt
        assert (await store.read_events("s", "t", after=after)).runs == (resumption, *said("Anew"))
    assert (await store.get_turn("s", "t", now=at(6))).text == "Anew"


MESSAGE = Item(id="m", role="assistant", text="Hi")
REASONING = Item(id="r", type="reasoning", role="assistant", text="hm", encrypted="x", upstream="{}")
CALLED = Item(id="c", type="function_call", role="assistant", text='{"a"', call_id="1", name="f")


@pytest.mark.parametrize(
    ("output", "mode"),
    [
        ((MESSAGE,), "continue"),
        ((REASONING, MESSAGE), "continue"),
        ((), "retry"),
        ((REASONING,), "retry"),
        ((MESSAGE, CALLED), "retry"),
        ((msgspec.structs.replace(CALLED, text="{}"), MESSAGE), "retry"),
        ((MESSAGE, REASONING), "retry"),
        ((msgspec.structs.replace(MESSAGE, text=" \n"),), "retry"),
    ],
)
async def test_only_a_text_is_continued(store: Store, output: tuple[Item, ...], mode: str) -> None:
    turn = a_lasting_turn()
    await begin(store, turn)
    runs = [Run(STARTED)]
    for index, item in enumerate(output):
        runs += [Run(CALL - index)] if item.type == "function_call" else []
        runs += said(item.text, item=index)
    seq = last_seq(runs)
    suspended = msgspec.structs.replace(turn, output=output, last_seq=seq)
    await store.suspend_turns([SuspendedTurn(turn=suspended, runs=tuple(runs))], now=T0)
    (adopted,) = await adopt(store)
    length = 2 if mode == "continue" else 0
    assert adopted.runs[-1] == resumed_run(Resumed(seq + 1, 2, mode, length))  # type: ignore[arg-type]
    assert adopted.turn.output == (output if mode == "continue" else ())
    assert list(adopted.runs[:-1]) == (runs if mode == "continue" else [Run(STARTED)])


async def test_a_turn_that_was_suspended_while_its_start_was_on_its_way_is_resumed(store: Store) -> None:
    queued = a_lasting_turn(state="queued", started_at=None)
    await begin(store, queued)
    started = msgspec.structs.replace(queued, state="running", started_at=at(1))
    it = so_far(started, runs=(Run(QUEUED), Run(STARTED)))
    for _ in range(2):  # the outcome of the first call may be unknown
        assert list(await store.suspend_turns([it], now=at(1))) == []
        assert not await store.start_turn("t", now=at(2)), "the start arrives late"
        assert await store.get_turn("s", "t", now=at(2)) == it.turn
    (adopted,) = await adopt(store)
    assert adopted.turn == msgspec.structs.replace(started, attempt=2, last_seq=3)
    assert adopted.runs == (Run(QUEUED), Run(STARTED), resumed_run(Resumed(3, 2, "retry", 0)))
    assert await store.get_turn("s", "t", now=at(5)) == adopted.turn


async def test_a_queued_turn_stays_as_it_is(store: Store) -> None:
    running, queued = a_lasting_turn(), a_lasting_turn("q", state="queued", parent="t", started_at=None)
    await begin(store, running, queued)
    waiting = SuspendedTurn(turn=msgspec.structs.replace(queued, last_seq=1), runs=(Run(QUEUED),))
    assert list(await store.suspend_turns([waiting, so_far(running, "Hi")], now=T0)) == []
    first, second = await adopt(store)
    assert (first.turn.id, second) == ("t", AdoptedTurn(turn=waiting.turn, runs=(Run(QUEUED),)))
    assert await store.start_turn("q", now=at(6))
    kept = await store.get_turn("s", "q", now=at(6))
    assert (kept.state, kept.attempt, kept.started_at) == ("running", 1, at(6))


async def test_an_adopted_turn_is_suspended_and_adopted_again(store: Store) -> None:
    it = await _suspended(store, "Hel", "lo")
    (second,) = await adopt(store)
    more = SuspendedTurn(
        turn=msgspec.structs.replace(
            second.turn, output=(msgspec.structs.replace(second.turn.output[0], text="Hello, you"),), last_seq=5
        ),
        runs=(*second.runs, *said(", you")),
        after=4,
    )
    assert list(await store.suspend_turns([more], now=at(6))) == []
    assert await store.get_turn("s", "t", now=T0) == more.turn
    (third,) = await adopt(store)
    assert third.runs == (*it.runs, second.runs[-1], *said(", you"), resumed_run(Resumed(6, 3, "continue", 10)))
    assert (third.turn.text, third.turn.attempt) == ("Hello, you", 3)
    assert list(await store.suspend_turns([SuspendedTurn(turn=third.turn, runs=third.runs)], now=at(6))) == []
    (fourth,) = await adopt(store, continues=NO)
    assert fourth.runs == (Run(STARTED), resumed_run(Resumed(7, 4, "retry", 0)))


async def test_an_adoption_whose_answer_was_lost_is_told_again(store: Store) -> None:
    queued = a_lasting_turn("q", state="queued", parent="t", started_at=None)
    await begin(store, a_lasting_turn(), queued)
    waiting = SuspendedTurn(turn=msgspec.structs.replace(queued, last_seq=1), runs=(Run(QUEUED),))
    await store.suspend_turns([so_far(a_lasting_turn(), "Hi"), waiting], now=T0)
    adopted = list(await adopt(store))
    assert list(await adopt(store)) == adopted
    assert list(await adopt(store, running={"t"})) == adopted[1:]
    assert list(await adopt(store, running={"t", "q"})) == []


async def test_there_is_nothing_to_adopt_where_no_turn_is_suspended(store: Store) -> None:
    assert list(await adopt(store, "never")) == []
    await begin(store, a_turn())
    assert list(await adopt(store)) == []
    await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0)
    assert list(await adopt(store)) == []
    assert (await store.begin_turn(a_turn("next", parent="t"), now=T0)).session.open_turns == 1


async def test_while_an_owner_has_another_open_turn_the_session_is_its_own(store: Store) -> None:
    fails, lasts = a_turn("f"), a_lasting_turn()
    await begin(store, fails, lasts)
    await store.suspend_turns([so_far(lasts, "Hi")], now=T0)
    assert await suspended_in(store, limit=9) == []
    assert await store.end_turn(ended(fails), runs=said("Hi"), now=at(1)) is EndResult.KEPT
    assert await suspended_in(store, limit=9) == ["s"]
    with pytest.raises(TurnsSuspendedError):
        await store.begin_turn(a_turn("next"), now=at(2))
    (adopted,) = await adopt(store)
    assert await store.end_turn(ended(adopted.turn), runs=adopted.runs, now=at(3)) is EndResult.KEPT
    assert (await store.get_session("s", now=at(3))).open_turns == 0
    assert (await store.begin_turn(a_turn("next"), now=at(4))).session.open_turns == 1


# Many sessions at once


async def test_the_turns_of_many_sessions_are_adopted_by_one_call(store: Store) -> None:
    turns = [a_lasting_turn(f"t{n}", f"s{n}") for n in range(5)]
    await begin(store, *turns, a_turn("mine", "s5"))
    await store.create_session(a_session("idle"), now=T0)
    suspended = [so_far(turn, f"text {turn.id}") for turn in turns]
    await store.suspend_turns(suspended, now=T0)
    await store.mark_deleted("s4", now=T0)
    ids = ["s3", "never", "s5", "s0", "s4", "idle", "s1", "s2"]
    adoptions = await store.adopt_turns(ids, now=at(5), continues=lambda turn: turn.id != "t1")
    assert {*ids} - set(adoptions) <= {"never"}, "of several sessions one that is not found may be missing"
    adoptions = {"never": Adoption()} | dict(adoptions)
    for n in (0, 2, 3):
        (it,) = adoptions[f"s{n}"].turns
        assert (it.turn.id, it.turn.text, it.turn.attempt) == (f"t{n}", f"text t{n}", 2)
    (it,) = adoptions["s1"].turns
    assert (it.turn.text, it.runs) == ("", (Run(STARTED), resumed_run(Resumed(3, 2, "retry", 0))))
    for session_id in ("s0", "s1", "s2", "s3", "s5", "idle"):
        assert adoptions[session_id].session == await store.get_session(session_id, now=at(5))
    assert {it for it in ids if adoptions[it].session is None} == {"never", "s4"}
    assert all(not adoptions[it].turns for it in ("s5", "idle", "never", "s4"))
    assert await suspended_in(store) == []
    # They are like other turns of this owner, each with what was kept of it.
    checkpoints = [a_checkpoint(f"t{n}", "!", after=3, session=f"s{n}") for n in (0, 2, 3)]
    assert list(await store.checkpoint_turns(checkpoints)) == []
    for n in (0, 2, 3):
        (it,) = adoptions[f"s{n}"].turns
        end = msgspec.structs.replace(ended(it.turn, text=f"{it.turn.text}!", now=at(6)), last_seq=5)
        runs = (*it.runs, *said("!"))
        assert await store.end_turn(end, runs=runs, now=at(6), after=4) is EndResult.KEPT
        assert await told(store, f"s{n}", f"t{n}") == [f"text t{n}", "!"]


async def test_an_adoption_of_many_sessions_whose_answer_was_lost_is_told_again(store: Store) -> None:
    turns = [a_lasting_turn(f"t{n}", f"s{n}") for n in range(3)]
    await begin(store, *turns)
    await store.suspend_turns([so_far(turn, "Hi") for turn in turns], now=T0)
    ids = ["s0", "s1", "s2"]
    first = await store.adopt_turns(ids, now=at(5), continues=YES)
    again = await store.adopt_turns(ids, now=at(6), continues=NO, running={"t1"})
    assert {it: list(again[it].turns) for it in ids} == {it: list(first[it].turns) for it in ("s0", "s2")} | {"s1": []}


async def test_turns_with_much_text_are_adopted_in_several_calls(store: Store) -> None:
    """Other writes wait for a call. A session alone is always adopted."""
    turns = [a_lasting_turn(f"t{n}", f"s{n}") for n in range(4)]
    await begin(store, *turns)
    for turn in turns:
        await store.suspend_turns([so_far(turn, "x" * 3_000_000)], now=T0)
    waiting, calls = [f"s{n}" for n in range(4)], 0
    adopted: dict[str, int] = {}
    while waiting:
        found = await store.adopt_turns(waiting, now=at(5), continues=YES)
        assert set(found) == set(waiting)
        taken = {it: len(found[it].turns) for it in found if not found[it].is_put_off}
        assert taken, "a call makes no progress"
        adopted |= taken
        waiting, calls = [it for it in waiting if it not in taken], calls + 1
    assert adopted == {f"s{n}": 1 for n in range(4)}
    assert store.capabilities.durable == (calls > 1)


# Where an open turn is


async def test_an_open_turn_is_found_with_the_owner_that_has_it(open_shared: OpenStore) -> None:
    async with open_shared() as here, open_shared() as there:
        await begin(there, a_lasting_turn(), a_turn("fails", "s2"))
        owner = await here.find_owner("s")
        assert owner is not None
        assert await here.find_open_turn("s", "t") == await here.find_open_turn("s2", "fails") == OpenTurn(owner=owner)
        assert await there.find_open_turn("s", "t") == OpenTurn()
        await there.suspend_turns([so_far(a_lasting_turn(), "Hi")], now=T0)
        assert (
            await here.find_open_turn("s", "t") == await there.find_open_turn("s", "t") == OpenTurn(is_suspended=True)
        )
        for names in (("s2", "t"), ("s", "never"), ("never", "t")):
            assert await here.find_open_turn(*names) is None
        (adopted,) = await adopt(here)
        assert await here.find_open_turn("s", "t") == OpenTurn()
        await here.end_turn(ended(adopted.turn), runs=adopted.runs, now=at(6))
        assert await here.find_open_turn("s", "t") is None
        await there.mark_deleted("s2", now=at(6))
        assert await there.find_open_turn("s2", "fails") is None


async def test_many_that_look_for_open_turns_at_once_each_find_their_own(store: Store) -> None:
    turns = [a_lasting_turn(f"t{n}", f"s{n}") for n in range(40)]
    await begin(store, *turns)
    await store.suspend_turns([so_far(turn, "Hi") for turn in turns[::2]], now=T0)
    found: dict[str, OpenTurn | None] = {}

    async def look(session_id: str, turn_id: str) -> None:
        found[turn_id] = await store.find_open_turn(session_id, turn_id)

    async with trio.open_nursery() as nursery:
        for turn in turns:
            nursery.start_soon(look, turn.session_id, turn.id)
        nursery.start_soon(look, "s0", "never")
    expected = {turn.id: OpenTurn(is_suspended=n % 2 == 0) for n, turn in enumerate(turns)}
    assert found == expected | {"never": None}


async def test_the_sessions_that_wait_for_their_clients_are_told_from_those_that_do_not(store: Store) -> None:
    tricky = {"f": msgspec.Raw(b'{"on_disconnect":"continue","x":"\\"on_disconnect\\":\\"continue\\""}')}
    turns = {
        "cancels": a_lasting_turn("c", "cancels", on_disconnect="cancel", attempt=1_000_000, may_title=False),
        "lasts": a_lasting_turn("l", "lasts", on_disconnect="continue"),
        "tricky": a_lasting_turn("x", "tricky", on_disconnect="cancel", face=tricky, may_leave_out=False),
    }
    await begin(store, *turns.values())
    both = a_lasting_turn("b", "lasts", state="queued", parent="l", started_at=None, on_disconnect="cancel")
    await store.begin_turn(both, now=T0)
    waiting = SuspendedTurn(turn=msgspec.structs.replace(both, last_seq=1), runs=(Run(QUEUED),))
    await store.suspend_turns([*(so_far(turn, "Hi") for turn in turns.values()), waiting], now=T0)
    found = {it.id: it.awaits_client for it in await store.list_suspended(limit=9)}
    assert found == {"cancels": True, "lasts": False, "tricky": True}


# Several owners


async def test_another_owner_adopts_what_an_owner_has_suspended(open_shared: OpenStore) -> None:
    queued = a_lasting_turn("q", state="queued", parent="t", started_at=None)
    async with open_shared() as here, open_shared() as there:
        await begin(there, a_lasting_turn(), queued)
        with pytest.raises(OwnedElsewhereError):
            await adopt(here)
        waiting = SuspendedTurn(turn=msgspec.structs.replace(queued, last_seq=1), runs=(Run(QUEUED),))
        await there.suspend_turns([so_far(a_lasting_turn(), "Hel", "lo"), waiting], now=at(1))
        assert await here.find_owner("s") is None
        assert await suspended_in(here, limit=9) == ["s"]
        adopted = await adopt(here)
        assert [(it.turn.id, it.turn.text) for it in adopted] == [("t", "Hello"), ("q", "")]
        # From now on they are this owner's as if it had begun them.
        owner = await there.find_owner("s")
        assert owner is not None
        for refused in (adopt(there), there.begin_turn(a_turn("next"), now=at(6))):
            with pytest.raises(OwnedElsewhereError) as error:
                await refused
            assert error.value.fence == owner.fence
        assert set(await there.suspend_turns([so_far(a_lasting_turn(), "Hel"), waiting], now=at(6))) == {"t", "q"}
        end = ended(a_lasting_turn())
        assert await there.end_turn(end, runs=said("Hi"), now=at(6)) is EndResult.LOST
        assert await here.start_turn("q", now=at(6))
        runs = (*adopted[0].runs, *said("!"))
        end = ended(adopted[0].turn, text="Hello!")
        assert await here.end_turn(end, runs=runs, now=at(6), after=4) is EndResult.KEPT
        assert await told(there, "s", "t") == ["Hel", "lo", "!"]


async def test_of_many_that_adopt_at_once_one_gets_the_turns(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await begin(store, *(a_lasting_turn(f"t{n}", f"s{n}") for n in range(10)))
        await store.suspend_turns([so_far(a_lasting_turn(f"t{n}", f"s{n}"), "Hi") for n in range(10)], now=T0)
    adopted: list[str] = []
    refused: list[str] = []
    have_adopted = trio.Event()

    async def adopt_all(store: Store) -> None:
        for n in range(10):
            try:
                adopted.extend(it.turn.id for it in await adopt(store, f"s{n}"))
            except OwnedElsewhereError as error:
                refused.append(error.session_id)
        if len(adopted) + len(refused) == 30:
            have_adopted.set()
        await have_adopted.wait()  # a store that closes leaves its turns to the others

    async with open_shared() as first, open_shared() as second, open_shared() as third:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for store in (first, second, third):
                    nursery.start_soon(adopt_all, store)
        assert sorted(adopted) == [f"t{n}" for n in range(10)]
        assert sorted(refused) == sorted([f"s{n}" for n in range(10)] * 2)


async def test_recovery_suspends_the_turns_that_may_have_another_attempt_and_ends_the_others(
    open_shared: OpenStore,
) -> None:
    usage = Usage(input_tokens=3, output_tokens=2)
    lasting = a_lasting_turn("lasting", "s1")
    async with open_shared() as store:
        await begin(store, a_turn("fails", "s1"), lasting, a_lasting_turn("last", "s2", attempt=rules.ATTEMPTS_MAX))
        queued = a_lasting_turn("queued", "s1", state="queued", started_at=None, attempt=rules.ATTEMPTS_MAX)
        await store.begin_turn(queued, now=T0)
        for session_id, turn in (("s1", "fails"), ("s1", "lasting"), ("s2", "last")):
            kept = a_checkpoint(turn, "Hel", session=session_id)
            kept = msgspec.structs.replace(kept, runs=(*BEGINNING, *kept.runs), usage=usage)
            await store.checkpoint_turns([kept])
    async with open_shared() as store:
        assert await store.recover(now=at(2)) == 2
        last = await store.get_turn("s2", "last", now=at(2))
        assert (last.state, last.reason, last.text, last.attempt) == ("interrupted", "crash", "Hel", 3)
        assert last.last_seq == rules.seq_after_crash(3) > 3 * SEQ_AFTER_CRASH
        fails = await store.get_turn("s1", "fails", now=at(2))
        assert (fails.state, fails.last_seq) == ("interrupted", SEQ_AFTER_CRASH)
        base = 2 * SEQ_AFTER_CRASH
        item = Item(id="lasting-out", role="assistant", text="Hel")
        suspended = msgspec.structs.replace(lasting, output=(item,), usage=usage, last_seq=base)
        assert await store.get_turn("s1", "lasting", now=at(2)) == suspended
        assert await store.get_turn("s1", "queued", now=at(2)) == queued
        left = await store.get_session("s1", now=at(2))
        assert (left.open_turns, left.last_accessed_at) == (2, at(2))
        assert await suspended_in(store, limit=9) == ["s1"]
        assert await store.recover(now=at(3)) == 0
        first, second = await adopt(store, "s1")
        resumption = resumed_run(Resumed(base + 1, 2, "continue", 3))
        assert first.turn == msgspec.structs.replace(suspended, attempt=2, last_seq=base + 1)
        assert first.runs == (*BEGINNING, *said("Hel"), resumption)
        assert second == AdoptedTurn(turn=queued, runs=())
        # A client that has seen more than was kept goes on with the resumption.
        for after in (2, 3, 1000, base):
            page = await store.read_events("s1", "lasting", after=after)
            assert (page.runs, page.kept) == ((resumption,), base + 1)
        end = msgspec.structs.replace(ended(first.turn, text="Hello"), last_seq=base + 3)
        runs = (*first.runs, *said("lo"))
        assert await store.end_turn(end, runs=runs, now=at(3), after=base + 1) is EndResult.KEPT
        assert (await store.read_events("s1", "lasting")).kept == base + 2
        assert await told(store, "s1", "lasting") == ["Hel", "lo"]


async def test_a_turn_that_crashed_before_its_first_checkpoint_begins_anew(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await begin(store, a_lasting_turn())
    async with open_shared() as store:
        assert await store.recover(now=at(2)) == 0
        (adopted,) = await adopt(store)
        seq = 2 * SEQ_AFTER_CRASH + 1
        assert adopted.runs == (Run(STARTED), resumed_run(Resumed(seq, 2, "retry", 0)))
        assert (adopted.turn.last_seq, adopted.turn.output) == (seq, ())


async def test_a_turn_that_crashes_at_each_attempt_is_interrupted_after_the_last(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await begin(store, a_lasting_turn())
    seqs = [0]
    for attempt in range(2, rules.ATTEMPTS_MAX + 1):
        async with open_shared() as store:
            (adopted,) = await adopt(store)  # recovers first
            assert adopted.turn.attempt == attempt
            after = adopted.turn.last_seq
            assert after > seqs[-1]
            message = Item(id="t-out", role="assistant", text="")
            kept = msgspec.structs.replace(a_checkpoint("t", "Hi", "!", after=after), items=(message,))
            await store.checkpoint_turns([kept])
            seqs.append(after + 2)
            assert (await store.read_events("s", "t", after=after)).kept == seqs[-1]
    async with open_shared() as store:
        assert list(await adopt(store)) == []
        turn = await store.get_turn("s", "t", now=at(6))
        assert (turn.state, turn.reason, turn.attempt) == ("interrupted", "crash", rules.ATTEMPTS_MAX)
        assert turn.last_seq > seqs[-1]
        assert (await store.get_session("s", now=at(6))).open_turns == 0


async def test_an_adopted_turn_crashes_with_all_that_was_kept_of_it(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        it = await _suspended(store, "Hel", "lo")
    async with open_shared() as store:
        (second,) = await adopt(store)
        await store.checkpoint_turns([a_checkpoint("t", ", ", "you", after=4)])
    async with open_shared() as store:
        assert await store.recover(now=at(6)) == 0
        assert (await store.get_turn("s", "t", now=at(6))).text == "Hello, you"
        (third,) = await adopt(store)
        resumption = resumed_run(Resumed(3 * SEQ_AFTER_CRASH + 1, 3, "continue", 10))
        assert third.runs == (*it.runs, second.runs[-1], *said(", ", "you"), resumption)
    async with open_shared() as store:
        assert await store.recover(now=at(7)) == 1
        turn = await store.get_turn("s", "t", now=at(7))
        assert (turn.state, turn.text, turn.last_seq) == ("interrupted", "Hello, you", 4 * SEQ_AFTER_CRASH)
        page = await store.read_events("s", "t")
        assert (page.runs, page.kept) == (third.runs, 3 * SEQ_AFTER_CRASH + 1)


async def test_a_turn_that_was_adopted_while_it_waited_keeps_its_seqs_over_a_crash(open_shared: OpenStore) -> None:
    queued = a_lasting_turn(state="queued", started_at=None)
    async with open_shared() as store:
        await begin(store, queued)
        waiting = SuspendedTurn(turn=msgspec.structs.replace(queued, last_seq=1), runs=(Run(QUEUED),))
        await store.suspend_turns([waiting], now=T0)
    async with open_shared() as store:
        await adopt(store)
        assert await store.start_turn("t", now=at(1))
        kept = a_checkpoint("t", "Hel", "lo")
        kept = msgspec.structs.replace(kept, after=1, runs=(Run(STARTED), *kept.runs))
        await store.checkpoint_turns([kept])
        assert (await store.read_events("s", "t", after=3)).text == "lo"
    async with open_shared() as store:
        assert await store.recover(now=at(2)) == 0
        page = await store.read_events("s", "t")
        assert (page.runs, page.kept) == ((Run(QUEUED), Run(STARTED), *said("Hel", "lo")), 4)
        assert (await store.read_events("s", "t", after=3)).text == "lo"


async def test_what_would_be_suspended_is_in_the_way_of_a_turn_and_nothing_else(open_shared: OpenStore) -> None:
    """The turns of an owner that is gone, before any recovery."""
    first = a_turn("first")
    async with open_shared() as here:
        async with open_shared() as dying:
            await begin(dying, first)
            await dying.end_turn(ended(first), runs=said("Hi"), now=T0)
            await dying.begin_turn(a_turn("side", parent="first"), now=T0)
            await dying.begin_turn(msgspec.structs.replace(a_lasting_turn(), parent="first"), now=T0)
        before = await contents(here, now=at(1))
        with pytest.raises(TurnsSuspendedError) as refused:
            await here.begin_turn(a_turn("next", parent="first"), now=at(1))
        assert refused.value.turn_id == "t"
        with pytest.raises(TurnInProgressError):
            await here.update_session("s", SessionPatch(head="first"), now=at(1))
        with pytest.raises(TurnInProgressError):
            await here.add_turns([an_added_turn("added", parent="t")], now=at(1))
        assert await contents(here, now=at(1)) == before, "a step that refuses has written nothing"
        await here.delete_turns("s", "side", now=at(1))
        assert [it.turn.id for it in await adopt(here)] == ["t"]
        assert (await here.get_session("s", now=at(1))).open_turns == 1


async def test_a_session_is_deleted_whose_turns_an_owner_that_is_gone_has_left(open_shared: OpenStore) -> None:
    async with open_shared() as here:
        async with open_shared() as dying:
            await begin(dying, a_lasting_turn(), a_lasting_turn("t2", "s2"))
        await here.mark_deleted("s", now=at(1))
        await here.remove_deleted("s")
        with pytest.raises(SessionNotFoundError):
            await here.get_session("s", now=at(1))
        async with open_shared() as marks:
            await marks.mark_deleted("s2", now=at(1))
        assert await here.recover(now=at(2)) == 0
        assert await here.find_session_of("t2") is None, "the deletion is finished"
        assert await suspended_in(here, limit=9) == []


async def test_an_owner_that_was_taken_for_dead_cannot_suspend_a_turn_that_was_adopted(open_shared: OpenStore) -> None:
    async with open_shared() as zombie:
        await begin(zombie, a_lasting_turn())
        await take_for_dead(zombie)
        async with open_shared() as store:
            await adopt(store)
            before = await contents(store, now=at(1))
            assert set(await zombie.suspend_turns([so_far(a_lasting_turn(), "late")], now=at(2))) == {"t"}
            assert set(await zombie.checkpoint_turns([a_checkpoint("t", "late")])) == {"t"}
            assert await contents(store, now=at(1)) == before


async def test_a_crash_in_a_session_with_suspended_turns_leaves_it_to_the_next(open_shared: OpenStore) -> None:
    """The owner dies after it has suspended some turns of a session, and before the ends of the others."""
    fails, lasts = a_turn("f"), a_lasting_turn()
    async with open_shared() as store:
        await begin(store, fails, lasts)
        await store.suspend_turns([so_far(lasts, "Hi")], now=T0)
    async with open_shared() as store:
        assert await suspended_in(store, limit=9) == []
        assert await store.recover(now=at(1)) == 1
        assert await suspended_in(store, limit=9) == ["s"]
        (adopted,) = await adopt(store)
        assert (adopted.turn.id, adopted.turn.text, adopted.turn.last_seq) == ("t", "Hi", 3)


async def test_a_fork_of_a_turn_with_several_attempts_has_its_events(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await _suspended(store, "Hel", "lo")
        (adopted,) = await adopt(store)
        runs = (*adopted.runs, *said("x" * 70_000, "!"))
        end = msgspec.structs.replace(ended(adopted.turn, text="Hello" + "x" * 70_000 + "!"), last_seq=7)
        assert await store.end_turn(end, runs=runs, now=at(6), after=4) is EndResult.KEPT
        copy = await store.fork_session("s", at=None, copy_id="copy", now=at(7))
        assert copy.head is not None
        copied = await store.get_turn("copy", copy.head, now=at(7))
        assert (copied.text, copied.last_seq, copied.attempt) == (end.text, 7, 2)
        assert await told(store, "copy", copy.head) == ["Hel", "lo", "x" * 70_000, "!"]
