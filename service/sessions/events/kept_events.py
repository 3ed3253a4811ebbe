"""A turn's events in the compact form that a store keeps, and back: runs of pieces, and the turn's record."""

from collections.abc import Iterable, Iterator
from itertools import groupby

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
    TurnStarted,
)
from service.storage.pieces import CALL, QUEUED, STARTED, Run, length_bytes, skip
from service.storage.records import EventsPage, TurnRecord

_PIECES: dict[str, type[TurnDelta | TurnReasoning | TurnArguments]] = {
    "message": TurnDelta,
    "reasoning": TurnReasoning,
    "function_call": TurnArguments,
}


def runs_of(events: Iterable[Event]) -> Iterator[Run]:
    """The runs of events; a terminal event is none of them."""
    for item, run in groupby(events, key=_item_of):
        if item >= 0:
            yield Run(item, b"".join([length_bytes(len(event.text)) for event in run if isinstance(event, Piece)]))
        else:
            yield from (Run(item) for event in run if isinstance(event, TurnQueued | TurnStarted | TurnCall))


def _item_of(event: Event) -> int:
    """The item of an event's run."""
    if isinstance(event, Piece):
        return event.item
    if isinstance(event, TurnCall):
        return CALL - event.item
    return QUEUED if isinstance(event, TurnQueued) else STARTED


def events_of(turn: TurnRecord, page: EventsPage, *, after: int, events_max: int) -> list[Event]:
    """The first events of a page after a seq in it; they name the turn's ids.

    Args:
        turn: The turn's record, perhaps without the texts of its output.
    """
    rest = list(skip(page.runs, after - page.after))
    start = len(page.text) - sum(run.length for run in rest)
    events: list[Event] = []
    seq = after
    for run in rest:
        if len(events) >= events_max:
            break
        if run.item < 0:
            seq += 1
            events.append(_opening(turn, run.item, seq))
            continue
        kind = _PIECES[turn.output[run.item].type]
        for length in run.first(events_max - len(events)).pieces():
            seq += 1
            events.append(kind(seq=seq, item=run.item, text=page.text[start : start + length]))
            start += length
    return events


def _opening(turn: TurnRecord, item: int, seq: int) -> TurnQueued | TurnStarted | TurnCall:
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
    return outcome.terminal_event(end, seq=turn.last_seq, text_length=text_length, left_out=turn.left_out, stored=True)
