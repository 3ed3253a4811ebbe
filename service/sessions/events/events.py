"""A turn's events: what happened to a turn, as typed values. The seqs of events grow from 1, without a gap.

Only before :class:`TurnResumed` may be a gap, where another attempt was cut off by a crash, or is told no more.
"""

from typing import Literal

import msgspec

from service.models.client import FinishReason, Usage
from service.storage.records import CancelReason, Failure, InterruptReason, LeftOut

ResumeMode = Literal["retry", "continue"]
"""How a turn goes on: the model replies anew, or goes on with the text that it has sent."""


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


class Piece(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A piece of the text of an output item; ``item`` is the index of this item in the turn's output."""

    seq: int = 0
    item: int = 0
    text: str


class TurnDelta(Piece, frozen=True, kw_only=True, gc=False, tag="turn.delta", tag_field="type"):
    """A piece of the reply."""


class TurnReasoning(Piece, frozen=True, kw_only=True, gc=False, tag="turn.reasoning", tag_field="type"):
    """A piece of the model's reasoning, where the upstream sends it."""


class TurnCall(msgspec.Struct, frozen=True, kw_only=True, tag="turn.call", tag_field="type"):
    """The model calls a function; the arguments follow, also in turns with those of other calls.

    ``item`` is the index of the call among the turn's output items, ``id`` the item's id, ``call_id`` the model
    server's own id of the call, which the output of the call names.
    """

    seq: int = 0
    item: int
    id: str
    call_id: str
    name: str


class TurnArguments(Piece, frozen=True, kw_only=True, gc=False, tag="turn.arguments", tag_field="type"):
    """A piece of the arguments of the call with the index ``item``: all pieces together are JSON."""


class TurnCompleted(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.completed", tag_field="type"
):
    """The reply is whole. ``text_length`` counts its Unicode code points.

    Each kind of terminal event has ``left_out`` if a part of the conversation did not go to the model; the others have
    ``usage`` if the upstream had counted before they ended.
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
    usage: Usage | None = None
    left_out: LeftOut | None = None
    stored: bool = True


class TurnCancelled(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.cancelled", tag_field="type"
):
    """A caller ended the turn."""

    seq: int = 0
    reason: CancelReason
    text_length: int
    usage: Usage | None = None
    left_out: LeftOut | None = None
    stored: bool = True


class TurnInterrupted(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="turn.interrupted", tag_field="type"
):
    """The service stopped or crashed before the turn ended; the partial reply is kept."""

    seq: int = 0
    reason: InterruptReason
    text_length: int
    usage: Usage | None = None
    left_out: LeftOut | None = None
    stored: bool = True


class TurnResumed(msgspec.Struct, frozen=True, kw_only=True, tag="turn.resumed", tag_field="type"):
    """The turn goes on in another process, or after a restart, in its attempt number ``attempt``.

    Of the reply that was sent so far the first ``text_length`` Unicode code points count, and more follows: all of them
    with the mode ``continue``, none with ``retry``. The seq may be much larger than the one before.
    """

    seq: int = 0
    attempt: int
    mode: ResumeMode
    text_length: int


TerminalEvent = TurnCompleted | TurnFailed | TurnCancelled | TurnInterrupted
Event = TurnQueued | TurnStarted | TurnDelta | TurnReasoning | TurnCall | TurnArguments | TurnResumed | TerminalEvent
