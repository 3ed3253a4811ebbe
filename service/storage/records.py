"""What a store keeps, as immutable values."""

from collections.abc import Sequence
from datetime import datetime
from typing import Generic, Literal, TypeVar

import msgspec

from service.models.client import FinishReason, Role, Usage

TurnState = Literal["queued", "running", "completed", "failed", "cancelled", "interrupted"]
T = TypeVar("T")
EndState = Literal["completed", "failed", "cancelled", "interrupted"]
SessionStatus = Literal["idle", "running"]
CancelReason = Literal["requested", "superseded", "disconnected", "session_deleted"]
InterruptReason = Literal["shutdown", "crash"]
EndReason = CancelReason | InterruptReason
"""Why a turn was cancelled or interrupted."""

SEQ_AFTER_CRASH = 1 << 30
"""The seq of the terminal event of a turn that a crash ended: above any that can ever have been sent.

A log holds no more bytes than this (the upper bound of ``log_bytes_max``), and every event has some.
"""


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a turn's input or output: a message, or the model's reasoning."""

    id: str
    type: Literal["message", "reasoning"] = "message"
    role: Role
    text: str


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A session: settings of a conversation, and the head of its tree of turns.

    ``open_turns`` counts turns that are queued or running; ``message_count`` the messages on all
    turns (inputs and non-empty replies); ``expires_at`` is the moment past which the session is gone
    unless it has an open turn.
    """

    id: str
    created_at: datetime
    last_accessed_at: datetime
    expires_at: datetime
    idle_timeout_s: float
    title: str | None = None
    model: str | None = None
    system_message: str | None = None
    metadata: dict[str, str] = {}
    head: str | None = None
    message_count: int = 0
    open_turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        # It may have been given as a whole number; what is told at first is what is told later.
        msgspec.structs.force_setattr(self, "idle_timeout_s", float(self.idle_timeout_s))

    @property
    def status(self) -> SessionStatus:
        return "running" if self.open_turns else "idle"

    def has_expired(self, now: datetime) -> bool:
        """Whether it is gone: past its deadline and without a turn."""
        return not self.open_turns and self.expires_at <= now


class SessionPatch(msgspec.Struct, frozen=True, kw_only=True):
    """Changes to a session; what is ``UNSET`` stays."""

    title: str | None | msgspec.UnsetType = msgspec.UNSET
    model: str | None | msgspec.UnsetType = msgspec.UNSET
    system_message: str | None | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    idle_timeout_s: float | msgspec.UnsetType = msgspec.UNSET


class Failure(msgspec.Struct, frozen=True):
    """Why a turn failed: a stable code and a sentence for a user."""

    code: str
    message: str


class TurnRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A turn: an input, the reply to it, and its place in the session's tree.

    Output items appear with the end; before it a live turn holds them. ``last_seq`` is the seq of
    its terminal event.
    """

    id: str
    session_id: str
    parent: str | None
    state: TurnState
    model: str
    created_at: datetime
    input: tuple[Item, ...]
    output: tuple[Item, ...] = ()
    temperature: float | None = None
    max_output_tokens: int | None = None
    background: bool = False
    started_at: datetime | None = None
    ended_at: datetime | None = None
    reason: EndReason | None = None
    error: Failure | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    last_seq: int = 0

    @property
    def is_open(self) -> bool:
        return self.state in ("queued", "running")

    @property
    def text(self) -> str:
        """The reply, without reasoning; partial where the turn did not complete."""
        return "".join(item.text for item in self.output if item.type == "message")

    @property
    def message_bytes(self) -> int:
        """The size of its messages in a prompt, in UTF-8: without reasoning, and without what a failed turn replied."""
        items = self.input if self.state == "failed" else (*self.input, *self.output)
        return sum(len(item.text.encode()) for item in items if item.type == "message")


def with_totals(session: SessionRecord, turns: Sequence[TurnRecord]) -> SessionRecord:
    """The session with the counts and sums of these turns, all of which have ended."""
    usages = [turn.usage for turn in turns if turn.usage is not None]
    return msgspec.structs.replace(
        session,
        message_count=sum(sum(item.type == "message" for item in turn.input) + bool(turn.text) for turn in turns),
        open_turns=0,
        input_tokens=sum(usage.input_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
    )


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a running turn grew by since the checkpoint before.

    ``after`` is the seq of the last event of the last checkpoint that was acknowledged, 0 if there was none;
    ``events`` are those that follow it, without gaps. ``output`` holds the text that these events brought: an
    item whose id was there before goes on, a new one begins.
    """

    session_id: str
    turn_id: str
    after: int
    events: tuple[bytes, ...]
    output: tuple[Item, ...]


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """An open store: who runs the turns that it began.

    ``fence`` grows from owner to owner of one store and is never used twice. ``address`` is where the process
    that opened it answers for its sessions (``unix:/run/lastcall/3.sock``, ``http://10.0.0.3:8000``), if it said so.
    """

    fence: int
    address: str | None


class Page(msgspec.Struct, Generic[T], frozen=True):
    """One page of a listing; ``next`` is the cursor of the following page, None on the last."""

    data: tuple[T, ...]
    next: str | None
