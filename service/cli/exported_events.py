"""Exports and imports of sessions: their events are frames of the native API, and runs in a store."""

from collections.abc import Iterable, Sequence

import msgspec

from service.api.native.event_frames import decode_frame, encode_frame
from service.cli.session_export import ExportedSession, ExportedTurn, not_exported, shown, without_open_turns
from service.sessions.events import kept_events
from service.sessions.events.events import TurnDelta, TurnReasoning
from service.storage.pieces import Run, are_of, count, join, last_seq, length_bytes, text_of
from service.storage.records import EventsPage, SessionRecord, TurnRecord
from service.storage.rules import events_at_once

Turns = Sequence[tuple[TurnRecord, Sequence[Run]]]


def encoded(session: SessionRecord, turns: Turns) -> bytes:
    """A session with its turns and events, as JSON."""
    exported = tuple(ExportedTurn(_without_output(turn), frames_of(turn, runs)) for turn, runs in turns)
    return msgspec.json.encode(ExportedSession(session=session, turns=exported))


def _without_output(turn: TurnRecord) -> TurnRecord:
    """The record of an open turn without what was kept of it: an import drops the turn."""
    return msgspec.structs.replace(turn, output=(), last_seq=0, usage=None) if turn.is_open else turn


def decoded(whole: ExportedSession) -> tuple[SessionRecord, Turns]:
    """The session and its turns with their events, without open turns."""
    whole = without_open_turns(whole)
    return whole.session, [(it.turn, runs_of(it.turn, it.events)) for it in whole.turns]


def frames_of(turn: TurnRecord, runs: Sequence[Run]) -> tuple[str, ...]:
    """The frames of a turn's events. An open turn has none: an import drops it."""
    if turn.is_open or turn.events_deleted:
        return ()
    texts = [item.text for item in turn.output]
    page = EventsPage(after=0, runs=tuple(runs), text=text_of(runs, texts))
    events, _ = kept_events.events_of(turn, page, kept_events.Place(0), events_max=count(runs))
    terminal = kept_events.terminal_event_of(turn, text_length=len(turn.text))
    if terminal is not None and last_seq(runs) == turn.last_seq - 1:
        events.append(terminal)
    return tuple(encode_frame(event).decode() for event in events)


def runs_of(turn: TurnRecord, frames: Iterable[str]) -> list[Run]:
    """The runs of the frames of a turn that was checked (:mod:`service.cli.whole_turn`).

    A piece of a message or of reasoning does not name its item: it is of the first one whose text is not whole yet. A
    turn may have no events, because none were kept.

    Raises:
        StartupError: A piece is not within one item.
    """
    if turn.events_deleted:
        return events_at_once(turn.output)  # the store keeps long texts by them
    growing = {
        kind: [[index, len(item.text)] for index, item in enumerate(turn.output) if item.type == kind and item.text]
        for kind in ("message", "reasoning")
    }
    runs: list[Run] = []
    for number, frame in enumerate(frames):
        match decode_frame(frame.encode()):
            case TurnDelta(text=text):
                runs.append(_grow(growing["message"], text, turn, number))
            case TurnReasoning(text=text):
                runs.append(_grow(growing["reasoning"], text, turn, number))
            case event:
                runs += kept_events.runs_of([event])
    if runs and not (turn.is_open or are_of(runs, [item.text for item in turn.output])):
        raise not_exported(f"the events {_of(turn)} do not have the texts of its items")
    return join(runs)


def _grow(growing: list[list[int]], text: str, turn: TurnRecord, number: int) -> Run:
    index, rest = growing[0] if growing else (0, 0)
    if not 0 < len(text) <= rest:
        problem = "is empty, or longer than the rest of its item"
        raise not_exported(f"the text {shown(text)} of events[{number}] {_of(turn)} {problem}")
    growing[0][1] -= len(text)
    if rest == len(text):
        del growing[0]
    return Run(index, length_bytes(len(text)))


def _of(turn: TurnRecord) -> str:
    return f"of turn {shown(turn.id)} of session {shown(turn.session_id)}"
