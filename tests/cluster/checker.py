"""Compares what clients were told with what the store has afterwards, in the way of Jepsen's checkers.

The rules are the promises of docs/concepts.md and docs/storage.md. Each rule has a name; what breaks it is told with
the ids by which it is found in the history. :func:`check` does no I/O: it is tested with histories that are made up.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

from tests.cluster.history import (
    RESUMED,
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
    Logged,
    Lost,
    Refused,
    Saw,
    Titled,
    Told,
    text_of,
)

SEQ_AFTER_CRASH = 1 << 30
"""The first seq of the next attempt, or of the end, after a crash."""
LATE_S = 20
"""So long after a fault a process may still end because of it."""
_FORBIDDEN_IN_LOGS = re.compile(r"Traceback|\bCancelled\b|never awaited")
_OPEN = ("queued", "running")

F = TypeVar("F", bound=AnyFact)


class Broken(NamedTuple):
    """A rule that does not hold, and where."""

    rule: str
    words: str


@dataclass(frozen=True)
class StoredTurn:
    """A turn as the store has it. ``events`` are those of its replay."""

    id: str
    input: str
    state: str
    text: str
    events: tuple[Event, ...]
    reason: str = ""


@dataclass(frozen=True)
class StoredSession:
    """A session as the store has it; its turns in the order of acceptance."""

    id: str
    title: str = ""
    turns: tuple[StoredTurn, ...] = ()


@dataclass(frozen=True)
class Stored:
    """The store once all processes have stopped and one has been started. ``wrong``: see ``stored.WRONG``."""

    sessions: Mapping[str, StoredSession]
    wrong: Sequence[str] = ()


@dataclass
class View:
    """What one client was told of one turn."""

    turn: str
    events: list[Event] = field(default_factory=list)
    lost: bool = False
    done: bool = False


def check(facts: Iterable[AnyFact], stored: Stored, *, reply_of: Callable[[str], str]) -> list[Broken]:
    """All that breaks a rule.

    Args:
        reply_of: The whole reply of the model server to an input.
    """
    told = _Facts(list(facts))
    turns = {turn.id: turn for session in stored.sessions.values() for turn in session.turns}
    rules = (
        _check_rows(stored),
        _check_sessions(told, stored),
        _check_turns(told, stored),
        _check_ends(stored),
        _check_views(told, turns),
        _check_answers(told, turns),
        _check_texts(turns, reply_of),
        _check_refusals(told),
        _check_processes(told),
        _check_calls(told, turns),
    )
    return [broken for rule in rules for broken in rule]


class _Facts:
    """The facts of a history by their kinds."""

    def __init__(self, facts: Sequence[AnyFact]) -> None:
        self._by_type: defaultdict[type, list[AnyFact]] = defaultdict(list)
        for fact in facts:
            self._by_type[type(fact)].append(fact)
        self.deleting = {it.session for it in self.of(Deleting)}
        self.deleted = {it.session for it in self.of(Deleted)}
        self.session_of = {it.turn: it.session for it in self.of(Accepted)}
        self.views: dict[int, View] = {}
        for fact in facts:
            if isinstance(fact, Saw | Lost | Done):
                self._follow(fact)

    def of(self, kind: type[F]) -> list[F]:
        return self._by_type[kind]  # type: ignore[return-value]  # the list of a type has facts of it alone

    def is_gone(self, turn: str) -> bool:
        """Whether the turn may be gone with its session."""
        return self.session_of.get(turn) in self.deleting

    def _follow(self, fact: Saw | Lost | Done) -> None:
        view = self.views.setdefault(fact.view, View(fact.turn))
        match fact:
            case Saw():
                view.events.append(fact.event)
            case Lost():
                view.lost = True
            case Done():
                view.done = True


# The store by itself


def _check_rows(stored: Stored) -> Iterator[Broken]:
    for words in stored.wrong:
        yield Broken("rows agree with each other", words)


def _check_ends(stored: Stored) -> Iterator[Broken]:
    for session in stored.sessions.values():
        for turn in session.turns:
            terminal = [event for event in turn.events if event.is_terminal]
            if turn.state in _OPEN or len(terminal) != 1 or not turn.events[-1].is_terminal:
                yield Broken("each turn has exactly one end", f"{turn.id} is {turn.state}, and has {terminal}")
            elif (terminal[0].type, terminal[0].reason) != (f"turn.{turn.state}", turn.reason):
                yield Broken("a turn and its events agree", f"{turn.id} is {turn.state}, its end {terminal[0]}")
            elif text_of(turn.events) != turn.text or terminal[0].text_length != len(turn.text):
                yield Broken("a turn and its events agree", f"the text of {turn.id} is not that of its events")
            yield from _check_seqs(turn.id, turn.events)


def _check_texts(turns: Mapping[str, StoredTurn], reply_of: Callable[[str], str]) -> Iterator[Broken]:
    for turn in turns.values():
        reply = reply_of(turn.input)
        if not reply.startswith(turn.text):
            yield Broken("a text is that of the model", f"{turn.id} has {turn.text[:200]!r}")
        elif turn.state == "completed" and turn.text != reply:
            yield Broken("a completed turn is whole", f"{turn.id} has {len(turn.text)} of {len(reply)} characters")


# What was accepted


def _check_sessions(told: _Facts, stored: Stored) -> Iterator[Broken]:
    for created in told.of(Created):
        if created.session not in stored.sessions and created.session not in told.deleting:
            yield Broken("a session that was acknowledged is kept", created.session)
    for session in told.deleted & stored.sessions.keys():
        yield Broken("a session that was deleted stays deleted", session)
    by_key: defaultdict[str, set[str]] = defaultdict(set)
    for created in told.of(Created):
        by_key[created.key].add(created.session)
    for key, sessions in by_key.items():
        if key and len(sessions) > 1:
            yield Broken("a key makes one thing", f"{key} made {sorted(sessions)}")
    yield from _check_titles(told, stored)


def _check_titles(told: _Facts, stored: Stored) -> Iterator[Broken]:
    """A title is the last one that was acknowledged, or one whose outcome is unknown: that may come at any time."""
    known: dict[str, str] = {}
    unknown: defaultdict[str, set[str]] = defaultdict(set)
    for titled in told.of(Titled):
        if titled.is_known:
            known[titled.session] = titled.title
        else:
            unknown[titled.session].add(titled.title)
    for session in known.keys() | unknown.keys():
        kept = stored.sessions.get(session)
        if kept is not None and kept.title not in {known.get(session, ""), *unknown[session]}:
            yield Broken("a change that was acknowledged is kept", f"the title of {session} is {kept.title!r}")


def _check_turns(told: _Facts, stored: Stored) -> Iterator[Broken]:
    by_key: defaultdict[str, set[str]] = defaultdict(set)
    in_order: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for accepted in told.of(Accepted):
        by_key[accepted.key].add(accepted.turn)
        in_order[accepted.session][accepted.turn] = accepted.input
    for key, made in by_key.items():
        if len(made) > 1:
            yield Broken("a key makes one thing", f"{key} made {sorted(made)}")
    for session, accepted_turns in in_order.items():
        if session in told.deleting or session not in stored.sessions:
            continue  # a session that is missing is told already
        kept = {turn.id: turn.input for turn in stored.sessions[session].turns}
        for turn, text in accepted_turns.items():
            if turn not in kept:
                yield Broken("a turn that was accepted is kept", f"{turn} of {session}")
            elif kept[turn] != text:
                yield Broken("a turn that was accepted is kept", f"the input of {turn} is {kept[turn]!r}, not {text!r}")
        if [turn for turn in accepted_turns if turn in kept] != [turn for turn in kept if turn in accepted_turns]:
            yield Broken("turns are in the order of their acceptance", session)
    inputs = Counter(turn.input for session in stored.sessions.values() for turn in session.turns)
    for text, count in inputs.items():
        if count > 1:
            yield Broken("a key makes one thing", f"{count} turns have the input {text!r}")


# What clients were told of turns


def _check_seqs(name: str, events: Sequence[Event]) -> Iterator[Broken]:
    """Seqs go up by one; after a crash, and where an attempt begins anew, they go up by more.

    Of a turn that had just begun a crash may have taken all events.
    """
    first = events[0] if events else None
    if (
        first is not None
        and first.seq != 1
        and not (first.seq >= SEQ_AFTER_CRASH and (first.is_terminal or first.type == RESUMED))
    ):
        yield Broken("events come once, in order and without a gap", f"{name} begins with {events[0]}")
    for before, after in pairwise(events):
        beyond = after.seq >= SEQ_AFTER_CRASH and after.seq // SEQ_AFTER_CRASH > before.seq // SEQ_AFTER_CRASH
        may_jump = (beyond and after.is_terminal) or after.type == RESUMED
        if after.seq <= before.seq or (after.seq != before.seq + 1 and not may_jump):
            yield Broken("events come once, in order and without a gap", f"{name}: {before}, then {after}")
    if any(event.is_terminal for event in events[:-1]):
        yield Broken("nothing follows a terminal event", name)


def _check_views(told: _Facts, turns: Mapping[str, StoredTurn]) -> Iterator[Broken]:
    for number, view in told.views.items():
        name = f"view {number} of {view.turn}"
        yield from _check_seqs(name, view.events)
        turn = turns.get(view.turn)
        if turn is None:
            if not told.is_gone(view.turn):
                yield Broken("a turn that was accepted is kept", f"{name}: the store does not have it")
            continue
        yield from _check_view(name, view, turn)


def _check_view(name: str, view: View, turn: StoredTurn) -> Iterator[Broken]:
    last = view.events[-1] if view.events else None
    if view.done and (last is None or last.seq < turn.events[-1].seq):
        yield Broken("204 means that all was seen", name)
    if last is not None and last.is_terminal and last.stored and last != turn.events[-1]:
        yield Broken("the end that was told is the one that is kept", f"{name}: {last}, kept {turn.events[-1]}")
    kept = {event.seq: event for event in turn.events}
    dropped_below = max((event.seq for event in turn.events if event.type == RESUMED), default=0)
    crashed = turn.events[-1].seq >= SEQ_AFTER_CRASH
    for event in view.events:
        if event.is_terminal:
            continue
        if event.seq in kept and kept[event.seq] != event:
            yield Broken("an event that was told is the one that is kept", f"{name}: {event}, kept {kept[event.seq]}")
        elif event.seq not in kept and event.seq > dropped_below and not (crashed and event.seq < SEQ_AFTER_CRASH):
            yield Broken("an event that was told is kept", f"{name}: {event}")
    text = text_of(view.events)
    if last is not None and last.is_terminal and last.stored and not view.lost:
        if text != turn.text:
            yield Broken("a client that saw the end has the whole text", f"{name}: {len(text)}, {len(turn.text)} kept")
    elif not turn.text.startswith(text) and not (crashed and text.startswith(turn.text)) and not dropped_below:
        yield Broken("a text that was told is the beginning of the kept one", f"{name}: {text[-100:]!r}")


def _check_answers(told: _Facts, turns: Mapping[str, StoredTurn]) -> Iterator[Broken]:
    for answer in told.of(Told):
        turn = turns.get(answer.turn)
        if turn is None or not answer.stored:
            continue  # a turn that is missing is told already
        said = (answer.state, answer.reason, answer.text)
        if said != (turn.state, turn.reason, turn.text):
            words = f"{answer.call} of {turn.id} said {answer.state} {answer.reason}, {len(answer.text)} characters; "
            words += f"kept {turn.state} {turn.reason}, {len(turn.text)}"
            yield Broken("the end that was told is the one that is kept", words)
    for given_up in told.of(GaveUp):
        yield Broken("an answer comes within its time", f"{given_up.call} of {given_up.session} {given_up.turn}")


# Refusals, processes and the model server

_FOR_CALLS = {
    "create": (),
    "turn": ((409, "turn_in_progress"), (429, "queue_full")),
    "events": ((410, "events_lost"),),
    "wait": (),
    "cancel": (),
    "title": (),
    "delete": (),
    "read": (),
}
_OF_THE_DELETED = ((404, "session_not_found"), (404, "turn_not_found"), (410, "idempotency_key_spent"))


def _check_refusals(told: _Facts) -> Iterator[Broken]:
    for refusal in told.of(Refused):
        pair = (refusal.status, refusal.code)
        is_allowed = pair in _FOR_CALLS[refusal.call] or (pair in _OF_THE_DELETED and refusal.session in told.deleting)
        if refusal.status == 503:
            # Without Retry-After it is documented for one code: the outcome is unknown.
            is_allowed = refusal.retry_after or refusal.code == "store_unavailable"
        if pair == (504, "owner_hangs"):
            is_allowed = refusal.location
        if not is_allowed:
            rule = "an answer is a documented one"
            if pair in _OF_THE_DELETED:
                rule = "a session that was acknowledged is found"
            yield Broken(rule, f"{refusal.call} of {refusal.session}: {refusal.status} {refusal.code}")


def _check_processes(told: _Facts) -> Iterator[Broken]:
    for line in told.of(Logged):
        yield Broken("logs have no traceback", f"{line.process}: {line.line[:2000]}")
    for exited in told.of(Exited):
        faults = [
            it
            for it in told.of(Fault)
            if it.target in (exited.process, "database") and it.at <= exited.at <= it.until + LATE_S
        ]
        allowed = {"killed": {-9}, "stopped": {0}, "itself": set()}[exited.cause]
        if any(it.kind not in ("kill", "stop") for it in faults):
            # Its store was away while it started or stopped, or it was taken for dead.
            allowed |= {71, 75, 78}
        if exited.cause == "stopped" and not exited.has_begun:
            allowed |= {-15}  # in the first moments of Python a signal has no handler yet
        if exited.code not in allowed:
            yield Broken(
                "a process ends with the code of its cause", f"{exited.process}: {exited.code} ({exited.cause})"
            )


def _check_calls(told: _Facts, turns: Mapping[str, StoredTurn]) -> Iterator[Broken]:
    attempts = {
        turn.input: max((event.attempt for event in turn.events if event.type == RESUMED), default=1)
        for turn in turns.values()
    }
    began: Counter[str] = Counter()
    for call in told.of(Asked):
        if not call.closed_at:
            yield Broken("no call of the model outlives its turn", call.input)
        began[call.input] += call.tokens > 0
    for text, count in began.items():
        if text in attempts and count > attempts[text]:
            yield Broken("the model is asked once for each attempt", f"{text!r}: {count} times")


def forbidden_lines(log: str) -> Iterator[str]:
    """The lines of a log that should not be there, each with what follows in a traceback."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if _FORBIDDEN_IN_LOGS.search(line):
            yield "\n".join(lines[number : number + 30]) if "Traceback" in line and "{" not in line[:1] else line
