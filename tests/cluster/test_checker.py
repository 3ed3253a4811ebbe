"""The checker finds each kind of broken promise in a history that is made up, and nothing in a sound one."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from tests.cluster.checker import Stored, StoredSession, StoredTurn, check, forbidden_lines
from tests.cluster.history import (
    Accepted,
    AnyFact,
    Asked,
    Created,
    Deleted,
    Deleting,
    Done,
    Event,
    Exited,
    Fault,
    GaveUp,
    History,
    Logged,
    Lost,
    Refused,
    Saw,
    Titled,
    Told,
    read_history,
)

CRASH = 1 << 30


def reply_of(text: str) -> str:
    return f"{text}0 {text}1 {text}2 "


def events(text: str, pieces: int = 3) -> tuple[Event, ...]:
    return (
        Event(seq=1, type="turn.started"),
        *(Event(seq=2 + n, type="turn.delta", text=f"{text}{n} ") for n in range(pieces)),
    )


def end(seq: int, state: str, length: int, reason: str = "") -> Event:
    finish = "stop" if state == "completed" else ""
    return Event(seq=seq, type=f"turn.{state}", text_length=length, reason=reason, finish_reason=finish)


COMPLETED = StoredTurn("t1", "a", "completed", "a0 a1 a2 ", (*events("a"), end(5, "completed", 9)))
CANCELLED = StoredTurn(
    "t2", "b", "cancelled", "b0 ", (*events("b", 1), end(3, "cancelled", 3, "requested")), "requested"
)
CRASHED = StoredTurn("t3", "c", "interrupted", "c0 ", (*events("c", 1), end(CRASH, "interrupted", 3, "crash")), "crash")
RESUMED = StoredTurn(
    "t4",
    "d",
    "completed",
    "d0 d1 d2 ",
    (
        *events("d", 1),
        Event(seq=2 * CRASH + 1, type="turn.resumed", mode="continue", attempt=2, text_length=3),
        Event(seq=2 * CRASH + 2, type="turn.delta", text="d1 "),
        Event(seq=2 * CRASH + 3, type="turn.delta", text="d2 "),
        end(2 * CRASH + 4, "completed", 9),
    ),
)
BEGUN = StoredTurn("t6", "f", "interrupted", "", (end(CRASH, "interrupted", 0, "crash"),), "crash")
TURNS = (COMPLETED, CANCELLED, CRASHED, RESUMED, BEGUN)
STORED = Stored({"s": StoredSession("s", "named", TURNS)})


def saw(view: int, turn: str, *told: Event) -> list[AnyFact]:
    return [Saw(at=1, view=view, turn=turn, event=event) for event in told]


def sound() -> list[AnyFact]:
    """A history in which no promise is broken, though much happens."""
    return [
        Created(at=1, session="s", key="k0"),
        Created(at=1, session="gone", key="k9"),
        Titled(at=1, session="s", title="first"),
        Titled(at=2, session="s", title="named", is_known=False),
        Accepted(at=1, session="s", turn="t1", input="a", key="k1"),
        Accepted(at=1, session="s", turn="t1", input="a", key="k1"),  # by a repetition
        *saw(1, "t1", *COMPLETED.events),
        *saw(2, "t1", *COMPLETED.events[:2]),
        Done(at=2, view=1, turn="t1", seq=5),
        Accepted(at=1, session="s", turn="t2", input="b", key="k2"),
        *saw(3, "t2", *CANCELLED.events),
        Told(at=2, call="cancel", turn="t2", state="cancelled", reason="requested", text="b0 "),
        Accepted(at=1, session="s", turn="t3", input="c", key="k3"),
        *saw(4, "t3", *events("c", 3)),
        Lost(at=3, view=4, turn="t3"),
        *saw(5, "t3", *CRASHED.events),
        *saw(7, "t3", *events("c", 3), CRASHED.events[-1]),  # the end says how much of the text is kept
        Accepted(at=1, session="s", turn="t4", input="d", key="k4"),
        *saw(6, "t4", *events("d", 2), *RESUMED.events[2:]),
        Deleting(at=1, session="gone"),
        Accepted(at=1, session="gone", turn="t5", input="e", key="k5"),
        Deleted(at=2, session="gone"),
        Refused(at=2, call="turn", session="gone", status=404, code="session_not_found"),
        Refused(at=2, call="turn", session="s", status=503, code="turn_limit", retry_after=True),
        Refused(at=2, call="turn", session="s", status=503, code="store_unavailable"),
        Refused(at=2, call="wait", session="s", status=504, code="owner_hangs", location=True),
        Fault(at=1, kind="kill", target="p1", until=1),
        Exited(at=1, process="p1", code=-9, cause="killed"),
        Exited(at=1, process="p2", code=0, cause="stopped"),
        Exited(at=1, process="p2", code=-15, cause="stopped", has_begun=False),
        Fault(at=1, kind="freeze", target="p3", until=10),
        Exited(at=11, process="p3", code=71, cause="itself"),
        Asked(input="a", opened_at=1, closed_at=2, tokens=3),
        Asked(input="b", opened_at=1, closed_at=2, tokens=0),
        Asked(input="b", opened_at=1, closed_at=2, tokens=1),
        Asked(input="d", opened_at=1, closed_at=2, tokens=1),
        Asked(input="d", opened_at=1, closed_at=2, tokens=2),
    ]


def with_turns(*turns: StoredTurn) -> Stored:
    return Stored({"s": replace(STORED.sessions["s"], turns=turns)})


def test_a_sound_history_breaks_no_rule() -> None:
    assert check(sound(), STORED, reply_of=reply_of) == []


Change = Callable[[list[AnyFact]], Stored]


def told(*facts: AnyFact, stored: Stored = STORED) -> Change:
    """Add facts to the sound history, and take another store."""

    def change(history: list[AnyFact]) -> Stored:
        history += facts
        return stored

    return change


def turn_is(turn: StoredTurn, **changes: object) -> Change:
    """One turn in the store is another one."""
    changed = replace(turn, **changes)  # type: ignore[arg-type]
    return told(stored=with_turns(*(changed if it.id == turn.id else it for it in TURNS)))


def gap(*seqs: int) -> Change:
    return told(*saw(9, "t1", *(COMPLETED.events[seq - 1] for seq in seqs)))


BROKEN: dict[str, tuple[str, Change]] = {
    "a session is missing": ("a session that was acknowledged is kept", told(Created(session="s2"))),
    "a deleted session is back": (
        "a session that was deleted stays deleted",
        told(Deleting(session="s"), Deleted(session="s")),
    ),
    "one key made two sessions": (
        "a key makes one thing",
        told(Created(session="s", key="k"), Created(session="gone", key="k")),
    ),
    "one key told two turns": ("a key makes one thing", told(Accepted(session="s", turn="t2", input="b", key="k1"))),
    "one input has two turns": (
        "a key makes one thing",
        told(stored=with_turns(*TURNS, replace(COMPLETED, id="t9"))),
    ),
    "a title is lost": (
        "a change that was acknowledged is kept",
        told(stored=Stored({"s": replace(STORED.sessions["s"], title="")})),
    ),
    "an accepted turn is missing": ("a turn that was accepted is kept", told(stored=with_turns(*TURNS[1:]))),
    "a turn has another input": (
        "a turn that was accepted is kept",
        told(Accepted(session="s", turn="t1", input="x", key="k1")),
    ),
    "a turn that was seen is missing": ("a turn that was accepted is kept", told(*saw(9, "t9", *events("a")))),
    "turns are out of order": ("turns are in the order of their acceptance", told(stored=with_turns(*TURNS[::-1]))),
    "a turn is open": ("each turn has exactly one end", turn_is(COMPLETED, state="running", events=events("a"))),
    "a turn has two ends": (
        "each turn has exactly one end",
        turn_is(COMPLETED, events=(*COMPLETED.events, end(6, "completed", 9))),
    ),
    "a state is not that of the events": ("a turn and its events agree", turn_is(COMPLETED, state="failed")),
    "a text is not that of the events": (
        "a turn and its events agree",
        turn_is(COMPLETED, text="a0 a1 ", state="completed"),
    ),
    "an end counts another text": (
        "a turn and its events agree",
        turn_is(COMPLETED, events=(*events("a"), end(5, "completed", 8))),
    ),
    "a text is of another turn": (
        "a text is that of the model",
        turn_is(COMPLETED, text="b0 b1 b2 ", events=(*events("b"), end(5, "completed", 9))),
    ),
    "a completed turn is cut": (
        "a completed turn is whole",
        turn_is(COMPLETED, text="a0 a1 ", events=(*events("a", 2), end(4, "completed", 6))),
    ),
    "the replay of a turn has a gap": (
        "events come once, in order and without a gap",
        turn_is(COMPLETED, events=(*events("a"), end(6, "completed", 9))),
    ),
    "an event comes twice": ("events come once, in order and without a gap", gap(1, 2, 2)),
    "an event is left out": ("events come once, in order and without a gap", gap(1, 2, 4)),
    "a view does not begin at its beginning": ("events come once, in order and without a gap", gap(2, 3)),
    "an event follows the end": (
        "nothing follows a terminal event",
        told(*saw(9, "t1", *COMPLETED.events, Event(seq=6, type="turn.delta", text="x"))),
    ),
    "another end was told": (
        "the end that was told is the one that is kept",
        told(*saw(9, "t1", *events("a"), end(5, "interrupted", 9, "shutdown"))),
    ),
    "another end was answered": (
        "the end that was told is the one that is kept",
        told(Told(call="wait", turn="t1", state="cancelled", reason="requested", text="a0 a1 a2 ")),
    ),
    "another text was answered": (
        "the end that was told is the one that is kept",
        told(Told(call="wait", turn="t1", state="completed", text="a0 ")),
    ),
    "another piece was told": (
        "an event that was told is the one that is kept",
        told(*saw(9, "t1", COMPLETED.events[0], Event(seq=2, type="turn.delta", text="x"))),
    ),
    "a piece was told that is not kept": ("an event that was told is kept", told(*saw(9, "t2", *events("b", 3)))),
    "a text was told that is not kept": (
        "a text that was told is the beginning of the kept one",
        told(*saw(9, "t2", *events("b", 3))),
    ),
    "a crash changed what was told": (
        "a text that was told is the beginning of the kept one",
        told(*saw(9, "t3", Event(seq=1, type="turn.started"), Event(seq=2, type="turn.delta", text="x"))),
    ),
    "a crash took more of the text than its end says": (
        "a client that saw the end has the whole text",
        told(*saw(9, "t3", CRASHED.events[0], CRASHED.events[-1])),
    ),
    "a resumption went on at a wrong place": (
        "a client that saw the end has the whole text",
        told(*saw(9, "t4", RESUMED.events[0], *RESUMED.events[2:])),
    ),
    "nothing was said to be left too early": (
        "204 means that all was seen",
        told(*saw(9, "t1", *events("a")), Done(view=9, turn="t1", seq=4)),
    ),
    "an answer never came": ("an answer comes within its time", told(GaveUp(call="events", session="s", turn="t1"))),
    "an answer is a fault of the server": (
        "an answer is a documented one",
        told(Refused(call="read", session="s", status=500, code="internal_error")),
    ),
    "a 503 does not say when": (
        "an answer is a documented one",
        told(Refused(call="turn", session="s", status=503, code="turn_limit")),
    ),
    "a 504 does not say where": (
        "an answer is a documented one",
        told(Refused(call="wait", session="s", status=504, code="owner_hangs")),
    ),
    "a proxy has no server": ("an answer is a documented one", told(Refused(call="turn", session="s", status=502))),
    "a session is not found": (
        "a session that was acknowledged is found",
        told(Refused(call="turn", session="s", status=404, code="session_not_found")),
    ),
    "a log has a traceback": (
        "logs have no traceback",
        told(Logged(process="p1", line="Traceback (most recent call last):")),
    ),
    "a process crashed": (
        "a process ends with the code of its cause",
        told(Exited(at=500, process="p1", code=71, cause="itself")),
    ),
    "a stop was not clean": (
        "a process ends with the code of its cause",
        told(Exited(at=500, process="p2", code=70, cause="stopped")),
    ),
    "a stop was not heard": (
        "a process ends with the code of its cause",
        told(Exited(at=500, process="p2", code=-15, cause="stopped")),
    ),
    "a call is open for ever": (
        "no call of the model outlives its turn",
        told(Asked(input="a", opened_at=1, closed_at=0, tokens=0)),
    ),
    "the model was asked twice": (
        "the model is asked once for each attempt",
        told(Asked(input="a", opened_at=1, closed_at=2, tokens=1)),
    ),
    "rows disagree": ("rows agree with each other", told(stored=replace(STORED, wrong=("open turns",)))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_checker_finds_that(what: str) -> None:
    rule, change = BROKEN[what]
    history = sound()
    stored = change(history)
    assert rule in {broken.rule for broken in check(history, stored, reply_of=reply_of)}


def test_an_end_that_was_told_as_not_stored_may_be_another_one() -> None:
    told_end = Event(seq=5, type="turn.completed", text_length=9, finish_reason="stop", stored=False)
    history = [*sound(), *saw(9, "t3", *events("c", 3), told_end)]
    history.append(Told(call="wait", turn="t3", state="completed", text="c0 c1 c2 ", stored=False))
    assert check(history, STORED, reply_of=reply_of) == []


def test_a_history_is_read_as_it_was_written_also_if_it_ends_early(tmp_path: Path) -> None:
    file = BytesIO()
    history = History(file)
    for fact in sound():
        history.add(fact)
    path = tmp_path / "history"
    path.write_bytes(file.getvalue() + b'{"fact":"saw","vi')
    assert list(read_history(path)) == history.facts


def test_a_traceback_is_found_in_lines_of_json_and_in_plain_ones() -> None:
    plain = 'started\nTraceback (most recent call last):\n  File "x"\nValueError: y\n'
    assert next(forbidden_lines(plain)).endswith("ValueError: y")
    line = '{"message": "failed", "exception": "Traceback (most recent call last):"}'
    assert list(forbidden_lines(f"{line}\nturn.cancelled\n")) == [line]
    assert list(forbidden_lines("trio.Cancelled: cancelled\n")) == ["trio.Cancelled: cancelled"]
