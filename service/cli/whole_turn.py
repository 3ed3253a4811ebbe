"""Checks that a turn's record and its events, as in an import, are ones that this service could have made."""

import re
from collections.abc import Iterator, Sequence

import msgspec

from service.api.native.event_frames import decode_frame, encode_frame
from service.ids import is_session_id, is_turn_id, public_id
from service.sessions.events.events import (
    Event,
    Piece,
    TurnArguments,
    TurnCall,
    TurnDelta,
    TurnQueued,
    TurnReasoning,
    TurnResumed,
    TurnStarted,
)
from service.sessions.events.outcome import outcome_of, record_changes, terminal_event
from service.storage.records import FACE_BYTES_MAX, Item, TurnRecord
from service.storage.rules import seq_after_crash

_END_FIELDS = ("reason", "error", "finish_reason")
_FIELDS_OF_TYPES = {
    "message": (),
    "reasoning": ("encrypted", "upstream"),
    "function_call": ("call_id", "name", "complete", "upstream"),
    "function_call_output": ("call_id",),
}
_FIELDS_OF_SOME = ("call_id", "name", "complete", "encrypted", "upstream")
_PLAIN = Item(id="", role="user", text="")
_FRAME = re.compile(rb"id: [1-9][0-9]*\ndata: [^\r\n]+\n\n")
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\(.)|([^\x20-\x7e])", re.DOTALL)
_SHORT_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

Problem = tuple[str, object, str]
"""The field, its value, and what is wrong with it."""


def problems_of(turn: TurnRecord, frames: Sequence[bytes]) -> Iterator[Problem]:
    """The contradictions in a turn; a turn with one of them was not made by this service.

    Args:
        frames: The turn's encoded events.
    """
    yield from _problems_of_record(turn)
    yield from _problems_of_events(turn, frames)


def _problems_of_record(turn: TurnRecord) -> Iterator[Problem]:
    yield from _problems_of_items(turn)
    if not turn.stored:
        yield "stored", turn.stored, "is not true"
    if turn.ephemeral and not turn.is_open:
        yield "ephemeral", True, "does not fit a turn that has ended: its end removes it"
    if turn.on_interrupt == "fail":
        for field, only in (("attempt", 1), ("on_disconnect", "cancel")):
            if getattr(turn, field) != only:
                yield field, getattr(turn, field), 'does not go with "on_interrupt": "fail"'
    elif turn.attempt < 1:
        yield "attempt", turn.attempt, "is less than 1"
    if turn.face and len(msgspec.json.encode(turn.face)) > FACE_BYTES_MAX:
        yield "face", turn.face, f"has more than {FACE_BYTES_MAX} bytes"
    expected: dict[str, object] = {"state": turn.state}
    if turn.is_open:
        expected |= {"output": (), "ended_at": None, "last_seq": 0, "left_out": turn.left_out}
    else:
        outcome = outcome_of(turn)
        if outcome is None:
            field = {"completed": "finish_reason", "failed": "error"}.get(turn.state, "reason")
            yield field, getattr(turn, field), f"does not fit a turn that is {turn.state}"
            return
        expected |= record_changes(outcome)
    for field, value in (dict.fromkeys(_END_FIELDS) | expected).items():
        if getattr(turn, field) != value:
            yield field, getattr(turn, field), f"does not fit a turn that is {turn.state}"


def _problems_of_items(turn: TurnRecord) -> Iterator[Problem]:
    if not turn.was_added and turn.input and turn.input[-1].role == "assistant":  # all of its input may be deleted
        yield "input", turn.input, "ends with an item of the assistant"
    for item in turn.input:
        if problem := _problem_of_item(item):
            yield "input", turn.input, problem
    own = [item for item in turn.output if item.role != "assistant" or item.type == "function_call_output"]
    if own:
        yield "output", turn.output, "has an item that is not the assistant's"
    for item in turn.output:
        if problem := _problem_of_item(item):
            yield "output", turn.output, problem
    messages = 0
    for item in () if turn.events_deleted else turn.output:  # the call between them may be deleted
        messages = 0 if item.type == "function_call" else messages + (item.type == "message")
        if messages > 1:
            yield "output", turn.output, "has two messages without a call between them"
            return


def _problem_of_item(item: Item) -> str | None:
    """What is wrong with an item by itself."""
    if item.type != "message" and item.role != ("user" if item.type == "function_call_output" else "assistant"):
        return f"has an item of type {item.type} and role {item.role}"
    if item.type in ("message", "reasoning") and not item.text and not item.encrypted:
        return "has an item without text"
    allowed = _FIELDS_OF_TYPES[item.type]
    for field in _FIELDS_OF_SOME:
        if field not in allowed and getattr(item, field) != getattr(_PLAIN, field):
            return f"has an item of type {item.type} with {field}"
    if any(name in allowed and not getattr(item, name) for name in ("call_id", "name")):
        return f"has an item of type {item.type} without call_id or name"
    return None


def _problems_of_events(turn: TurnRecord, frames: Sequence[bytes]) -> Iterator[Problem]:
    if turn.events_deleted:
        if frames:
            yield "events", [frame.decode() for frame in frames], "do not go with events_deleted"
        elif turn.is_open:
            yield "events_deleted", True, "does not fit an open turn"
        return
    events: list[Event] = []
    seq = 0
    for index, frame in enumerate(frames):
        event = _read(frame)
        if event is None or not (event.seq == seq + 1 or (isinstance(event, TurnResumed) and event.seq > seq)):
            yield f"events[{index}]", frame.decode(), f"is not the SSE frame of seq {seq + 1}"
            return
        events.append(event)
        seq = event.seq
    outcome = outcome_of(turn)
    if outcome is not None and not (turn.reason == "crash" and seq < turn.last_seq == seq_after_crash(turn.attempt)):
        if seq != turn.last_seq:
            yield "last_seq", turn.last_seq, f"does not go with {len(events)} events"
            return
        expected = terminal_event(
            outcome,
            seq=seq,
            text_length=len(turn.text),
            usage=turn.usage,
            left_out=turn.left_out,
            stored=True,
        )
        if not events or events[-1] not in (expected, msgspec.structs.replace(expected, stored=False)):
            yield f"events[{len(events) - 1}]", frames[-1].decode() if frames else None, "is not the turn's end"
            return
        events.pop()
    yield from _problems_of_course(turn, events)
    yield from _problems_of_resumptions(turn, events)


def _problems_of_course(turn: TurnRecord, events: Sequence[Event]) -> Iterator[Problem]:
    """Check the events before the terminal event: queued, started, then the pieces of the reply."""
    texts: dict[type, list[str]] = {TurnDelta: [], TurnReasoning: []}
    calls: dict[int, tuple[TurnCall, list[str]]] = {}
    named: tuple[str, str] | None = None
    stage = 0
    for index, event in ((n, it) for n, it in enumerate(events) if not isinstance(it, TurnResumed)):
        of = f"events[{index}]"
        if isinstance(event, TurnQueued | TurnStarted):
            names = event.session_id, event.turn_id
            stage_of_event = 1 if isinstance(event, TurnQueued) else 2
            if stage_of_event <= stage or named not in (None, names) or not _are_names_of(turn, *names):
                yield of, event, "does not begin this turn"
            if isinstance(event, TurnStarted) and event.model != turn.model:
                yield of, event, f"has another model than {turn.model!r}"
            named, stage = names, stage_of_event
        elif isinstance(event, TurnDelta | TurnReasoning) and stage == 2:
            texts[type(event)].append(event.text)
        elif isinstance(event, TurnCall) and stage == 2 and event.item > max(calls, default=-1):
            calls[event.item] = event, []
        elif isinstance(event, TurnArguments) and event.item in calls:
            calls[event.item][1].append(event.text)
        else:
            yield of, event, "does not belong there"
    if not turn.is_open:
        reasoning = "".join(item.text for item in turn.output if item.type == "reasoning")
        for kind, text in ((TurnDelta, turn.text), (TurnReasoning, reasoning)):
            if "".join(texts[kind]) != text:
                yield "output", turn.output, "has another text than the events"
        told = {item: (call.call_id, call.name, "".join(pieces)) for item, (call, pieces) in calls.items()}
        if told != {
            index: (item.call_id, item.name, item.text)
            for index, item in enumerate(turn.output)
            if item.type == "function_call"
        }:
            yield "output", turn.output, "has other calls than the events"


def _problems_of_resumptions(turn: TurnRecord, events: Sequence[Event]) -> Iterator[Problem]:
    """Check that each resumption belongs to the turn, and tells how much of the reply was there by then."""
    attempt, length, is_new = 1, 0, True
    for index, event in enumerate(events):
        if isinstance(event, TurnResumed):
            is_next = index > 0 and attempt < event.attempt <= turn.attempt
            if not is_next or event.text_length != length or (event.mode == "retry" and not is_new):
                yield f"events[{index}]", event, "does not go with the events before"
            attempt = event.attempt
        elif isinstance(event, Piece | TurnCall):
            is_new = False
            length += len(event.text) if isinstance(event, TurnDelta) else 0


def _are_names_of(turn: TurnRecord, session_id: str, turn_id: str) -> bool:
    """Whether events may name these ids: the turn's own ids, or, in a fork, the ids of the copied turn."""
    own = session_id == public_id(turn.session_id), turn_id == turn.id
    return all(own) or (not any(own) and is_session_id(session_id) and is_turn_id(turn_id))


def _read(frame: bytes) -> Event | None:
    """The event of a frame; None unless this service writes the event so, apart from JSON's optional escapes."""
    if _FRAME.fullmatch(frame) is None:
        return None
    try:
        event = decode_frame(frame)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    written = encode_frame(event)
    return event if frame == written or _escaped(frame) == _escaped(written) else None


def _escaped(frame: bytes) -> str:
    """The frame with one spelling of each character, because earlier versions escaped fewer characters."""
    return _ESCAPED.sub(_escape, frame.decode())


def _escape(found: re.Match[str]) -> str:
    code, short, plain = found.groups()
    text = _SHORT_ESCAPES.get(short, short) if short else plain
    units = code.lower() if code else text.encode("utf-16-be").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
