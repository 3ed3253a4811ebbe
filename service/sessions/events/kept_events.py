"""A turn's events in the compact form that a store keeps, and back: runs of pieces, and the turn's record."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from service.models.client import NO_OPTIONS
from service.sessions.events import outcome
from service.sessions.events.events import (
    Event,
    Piece,
    TerminalEvent,
    TurnArguments,
    TurnCall,
    TurnDelta,
    TurnQueued,
    TurnReasoning,
    TurnResumed,
    TurnStarted,
)
from service.storage.pieces import CALL, QUEUED, RESUMED, STARTED, Resumed, Run, resumed_of, resumed_run, run_of
from service.storage.records import EventsPage, Item, TurnRecord

PieceKind = type[TurnDelta | TurnReasoning | TurnArguments]
_PIECES: dict[str, PieceKind] = {
    "message": TurnDelta,
    "reasoning": TurnReasoning,
    "function_call": TurnArguments,
}


def runs_of(events: Iterable[Event]) -> Iterator[Run]:
    """The runs of events; a terminal event is none of them."""
    item, lengths = -1, list[int]()
    for event in events:
        if isinstance(event, (TurnDelta, Piece)):  # the first of them is exact, which is fast
            if event.item != item:
                if lengths:
                    yield run_of(item, lengths)
                item, lengths = event.item, []
            lengths.append(len(event.text))
            continue
        if lengths:
            yield run_of(item, lengths)
            item, lengths = -1, []
        if isinstance(event, TurnStarted):
            yield Run(STARTED)
        elif isinstance(event, TurnCall):
            yield Run(CALL - event.item)
        elif isinstance(event, TurnQueued):
            yield Run(QUEUED)
        elif isinstance(event, TurnResumed):
            yield resumed_run(Resumed(event.seq, event.attempt, event.mode, event.text_length))
    if lengths:
        yield run_of(item, lengths)


class Place(NamedTuple):
    """A place in a page: the event after ``seq`` begins there."""

    seq: int
    run: int = 0
    """The index of the event's run."""
    offset: int = 0
    """Where in the lengths of its run the event begins."""
    start: int = 0
    """Where in the page's text the event begins."""


def place_after(page: EventsPage, seq: int, *, place: Place) -> Place:
    """The place of the event after a seq of a page. Visits only what is between this place and ``place`` before it."""
    at, index, offset, start = place
    while at < seq:
        run = page.runs[index]
        if run.item == RESUMED:
            resumed = resumed_of(run).seq
            if resumed > seq:  # a seq before it that no event has
                at = seq
                break
            at, index = resumed, index + 1
            continue
        if run.item < 0:
            at, index = at + 1, index + 1
            continue
        passed = Run(run.item, run.lengths[offset : run.end_of(seq - at, offset)])
        at += passed.events
        start += passed.length
        offset += len(passed.lengths)
        if offset == len(run.lengths):
            index, offset = index + 1, 0
    return Place(at, index, offset, start)


def events_of(turn: TurnRecord, page: EventsPage, place: Place, *, events_max: int) -> tuple[list[Event], Place]:
    """The first events of a page from a place on, which name the turn's ids; and the place after them.

    Args:
        turn: The turn's record, perhaps without what :func:`without_contents` drops.
    """
    events: list[Event] = []
    seq, index, offset, start = place
    while index < len(page.runs) and len(events) < events_max:
        run = page.runs[index]
        if run.item < 0:
            events.append(opening_of(turn, run, seq + 1))
            seq, index = events[-1].seq, index + 1
            continue
        end = run.end_of(events_max - len(events), offset)
        kind = kind_of_pieces(turn.output[run.item])
        for length in Run(run.item, run.lengths[offset:end]).pieces():
            seq += 1
            events.append(kind(seq=seq, item=run.item, text=page.text[start : start + length]))
            start += length
        index, offset = (index, end) if end < len(run.lengths) else (index + 1, 0)
    return events, Place(seq, index, offset, start)


def without_contents(turn: TurnRecord) -> TurnRecord:
    """The record without what may be large in it and is in no event: :func:`events_of` needs only ids and names."""
    output = tuple(msgspec.structs.replace(item, text="", encrypted="", upstream="") for item in turn.output)
    return msgspec.structs.replace(
        turn, input=(), output=output, tools=msgspec.UNSET, options=NO_OPTIONS, face=msgspec.UNSET
    )


def kind_of_pieces(item: Item) -> PieceKind:
    """The kind of the pieces of an output item."""
    return _PIECES[item.type]


def opening_of(turn: TurnRecord, run: Run, seq: int) -> TurnQueued | TurnStarted | TurnCall | TurnResumed:
    """The event of a run that has no pieces. ``seq`` is the one after that of the event before."""
    item = run.item
    if item == RESUMED:
        resumed = resumed_of(run)
        return TurnResumed(seq=resumed.seq, attempt=resumed.attempt, mode=resumed.mode, text_length=resumed.text_length)
    if item <= CALL:
        call = turn.output[CALL - item]
        return TurnCall(seq=seq, item=CALL - item, id=call.id, call_id=call.call_id, name=call.name)
    if item == QUEUED:
        return TurnQueued(seq=seq, session_id=turn.session_id, turn_id=turn.id)
    return TurnStarted(seq=seq, session_id=turn.session_id, turn_id=turn.id, model=turn.model)


def terminal_event_of(turn: TurnRecord, *, text_length: int) -> TerminalEvent | None:
    """The terminal event of an ended turn; None if its record does not tell its end."""
    end = outcome.outcome_of(turn)
    if end is None:
        return None
    return outcome.terminal_event(
        end, seq=turn.last_seq, text_length=text_length, usage=turn.usage, left_out=turn.left_out, stored=True
    )
