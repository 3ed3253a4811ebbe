"""A turn's events, and the SSE frame in which an event is sent and stored.

A frame has an ``id:`` (the seq) and one ``data:`` line of JSON, whose ``type`` names the kind of the event. There is
no ``event:`` line: it would repeat the type in each delta, and without it a browser's ``onmessage`` sees all frames.
Every character that some client takes for a line end is escaped, so that the line is one line to every client.
"""

import msgspec

from service.models.client import FinishReason, Usage
from service.storage.records import CancelReason, Failure, InterruptReason, LeftOut


class TurnQueued(msgspec.Struct, frozen=True, kw_only=True, tag="turn.queued", tag_field="type"):
    """The turn is accepted and waits for others of its session."""

    seq: int = 0
    session_id: str
    turn_id: str


class TurnStarted(msgspec.Struct, frozen=True, kw_only=True, tag="turn.started", tag_field="type"):
    """The turn runs. This is the first event of a turn that was not queued."""

    seq: int = 0
    session_id: str
    turn_id: str
    model: str


class TurnDelta(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="turn.delta", tag_field="type"):
    """A piece of the reply."""

    seq: int = 0
    text: str


class TurnReasoning(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="turn.reasoning", tag_field="type"):
    """A piece of the model's reasoning, where the upstream sends it."""

    seq: int = 0
    text: str


class TurnCompleted(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.completed", tag_field="type"
):
    """The reply is whole. ``text_length`` counts its Unicode code points.

    Each kind of terminal event has ``left_out`` if a part of the conversation did not go to the model.
    """

    seq: int = 0
    finish_reason: FinishReason
    usage: Usage | None
    text_length: int
    left_out: LeftOut | None = None
    stored: bool = True


class TurnFailed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.failed", tag_field="type"):
    """Something broke: ``error.code`` is stable, ``error.message`` is for a user."""

    seq: int = 0
    error: Failure
    text_length: int
    left_out: LeftOut | None = None
    stored: bool = True


class TurnCancelled(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.cancelled", tag_field="type"
):
    """A caller ended the turn."""

    seq: int = 0
    reason: CancelReason
    text_length: int
    left_out: LeftOut | None = None
    stored: bool = True


class TurnInterrupted(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.interrupted", tag_field="type"
):
    """The service stopped or crashed before the turn ended; the partial reply is kept."""

    seq: int = 0
    reason: InterruptReason
    text_length: int
    left_out: LeftOut | None = None
    stored: bool = True


TerminalEvent = TurnCompleted | TurnFailed | TurnCancelled | TurnInterrupted
Event = TurnQueued | TurnStarted | TurnDelta | TurnReasoning | TerminalEvent

_LINE_ENDS = tuple((end.encode(), b"\\u%04x" % ord(end)) for end in ("\x85", "\u2028", "\u2029"))
_encode = msgspec.json.encode
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_frame(event: Event) -> bytes:
    r"""The SSE frame of an event: ``id: 3\ndata: {"type":"turn.delta","seq":3,"text":"Hi"}\n\n``.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    return b"id: %d\ndata: %b\n\n" % (event.seq, escape_line_ends(_encode(event)))


def escape_line_ends(frames: bytes) -> bytes:
    """The same JSON with U+0085, U+2028 and U+2029 as ``\\u`` escapes; JSON itself escapes all other line ends.

    A client that splits lines as Python's ``str.splitlines`` does (httpx, and so httpx-sse) would cut an event there.
    """
    if not frames.isascii():
        for line_end, escape in _LINE_ENDS:
            frames = frames.replace(line_end, escape)
    return frames


def decode_frame(frame: bytes) -> Event:
    """The reverse of :func:`encode_frame`."""
    return _decoder.decode(frame[frame.index(b"data: ") + 6 :])
