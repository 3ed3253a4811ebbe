"""The event log of a turn that is over, from what the store kept of it."""

from collections.abc import Sequence

import msgspec

from service.sessions import ends
from service.sessions.event_log import EventLog
from service.sessions.events import TurnQueued, TurnStarted, decode_frame, encode_frame
from service.storage.records import TurnRecord


def replay_kept(turn: TurnRecord, frames: Sequence[bytes]) -> EventLog | None:
    """A closed log; None if events are missing in it.

    A crash loses events whose seqs only the readers of that moment know. What is left, and the text, are those up to
    the last checkpoint; the terminal event follows on them with a seq above all that are lost.
    """
    if turn.is_open:
        return None
    frames = _naming(turn, frames)
    if turn.reason == "crash" and len(frames) < turn.last_seq:
        terminal = ends.terminal_event(
            ends.Interrupted("crash"), seq=turn.last_seq, text_length=len(turn.text), stored=True
        )
        return EventLog.replay([*frames, encode_frame(terminal)], last_seq=turn.last_seq)
    return EventLog.replay(frames) if len(frames) == turn.last_seq else None


def _naming(turn: TurnRecord, frames: Sequence[bytes]) -> Sequence[bytes]:
    """The frames, the first of which say whose they are: in those of a fork it is the turn that was copied."""
    told: list[bytes] = []
    for frame in frames[:2]:
        # Of no other event: quotes in a text are escaped.
        if b'"turn_id":"' not in frame or turn.id.encode() in frame:
            break
        event = decode_frame(frame)
        assert isinstance(event, TurnQueued | TurnStarted)
        told.append(encode_frame(msgspec.structs.replace(event, session_id=turn.session_id, turn_id=turn.id)))
    return [*told, *frames[len(told) :]] if told else frames
