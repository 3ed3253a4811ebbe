"""The records that a store keeps, as immutable values."""

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
"""The seq of the terminal event of a turn that a crash ended, higher than the seq of any event that was sent.

A log holds no more bytes than this number (the upper bound of ``log_bytes_max``), and every event has some bytes.
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
        # A whole number becomes a float here, so that the first answer shows the same value as later ones.
        msgspec.structs.force_setattr(self, "idle_timeout_s", float(self.idle_timeout_s))

    @property
    def text_bytes(self) -> int:
        """The size of the texts that a caller chose, in bytes of UTF-8: the part of a record that may be large."""
        texts = (self.title or "", self.system_message or "", *self.metadata, *self.metadata.values())
        return sum(len(text.encode()) for text in texts)

    @property
    def status(self) -> SessionStatus:
        return "running" if self.open_turns else "idle"

    def has_expired(self, now: datetime) -> bool:
        """Whether the session has expired: past its deadline and without an open turn."""
        return not self.open_turns and self.expires_at <= now


class SessionPatch(msgspec.Struct, frozen=True, kw_only=True):
    """Changes to a session; a field that is ``UNSET`` stays as it is."""

    title: str | None | msgspec.UnsetType = msgspec.UNSET
    model: str | None | msgspec.UnsetType = msgspec.UNSET
    system_message: str | None | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    idle_timeout_s: float | msgspec.UnsetType = msgspec.UNSET


def is_refusal(code: str) -> bool:
    """Whether a turn that failed with this code was refused for its input, not for what happened meanwhile."""
    return code in ("context_too_long", "content_filter", "unsupported_content")


class Failure(msgspec.Struct, frozen=True):
    """Why a turn failed: a stable code and a sentence for a user."""

    code: str
    message: str


class LeftOut(msgspec.Struct, frozen=True):
    """The oldest messages, which did not go to the model: their number and their size in bytes of UTF-8."""

    items: int = 0
    bytes: int = 0

    def __add__(self, other: "LeftOut") -> "LeftOut":
        return LeftOut(self.items + other.items, self.bytes + other.bytes)


class TurnRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A turn: an input, the reply to it, and its place in the session's tree.

    The store gets output items with the end; until then the live turn holds them. ``last_seq`` is the seq of
    the terminal event. ``left_out`` is None if the whole conversation went to the model. The store does not keep
    ``stored``: it is False if the turn has ended and the store has not taken this end.
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
    left_out: LeftOut | None = None
    stored: bool = True

    @property
    def is_open(self) -> bool:
        return self.state in ("queued", "running")

    @property
    def input_text(self) -> str:
        return "\n".join(item.text for item in self.input if item.type == "message")

    @property
    def text(self) -> str:
        """The reply, without reasoning; partial where the turn did not complete."""
        return "".join(item.text for item in self.output if item.type == "message")

    @property
    def text_bytes(self) -> int:
        """The size of all texts of input and output, in bytes of UTF-8."""
        return sum(len(item.text.encode()) for item in (*self.input, *self.output))

    @property
    def was_refused(self) -> bool:
        """Whether the model refused the input itself, so that the model would refuse it again."""
        if self.state == "failed":
            return self.error is not None and is_refusal(self.error.code)
        return self.finish_reason == "content_filter" and not self.text.strip()

    @property
    def reply(self) -> str:
        """The reply as it stands in later prompts: empty for a failed turn, and for a reply of white space."""
        return "" if self.state == "failed" or not self.text.strip() else self.text

    @property
    def in_prompts(self) -> LeftOut:
        """The messages that this turn adds to later prompts, as a number and a size."""
        if self.was_refused:
            return LeftOut()
        texts = [item.text for item in self.input if item.type == "message"]
        if self.reply:
            texts += [item.text for item in self.output if item.type == "message"]
        return LeftOut(len(texts), sum(len(text.encode()) for text in texts))

    @property
    def message_bytes(self) -> int:
        """The size of the turn's messages in a prompt, in bytes of UTF-8."""
        return self.in_prompts.bytes


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The growth of a running turn since the checkpoint before.

    ``after`` is the seq of the last event of the last acknowledged checkpoint, 0 if there was none; ``events`` are
    the events that follow, without gaps. ``output`` holds the text of these events: an item with a known id continues
    this item, an item with a new id begins one. ``left_out`` is the turn's.
    """

    session_id: str
    turn_id: str
    after: int
    events: tuple[bytes, ...]
    output: tuple[Item, ...]
    left_out: LeftOut | None = None


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """An owner: an open store, whose process runs the turns that this process accepted.

    ``fence`` grows from owner to owner of one store and is never used twice. ``address`` is the address at which the
    owner's process answers (``unix:/run/lastcall/3.sock``, ``http://10.0.0.3:8000``); None if it did not give one.
    """

    fence: int
    address: str | None


class Page(msgspec.Struct, Generic[T], frozen=True):
    """One page of a listing; ``next`` is the page cursor of the following page, None on the last page.

    ``cursors`` has the page cursor after each row, for a reader that shows only the first rows of the page.
    """

    data: tuple[T, ...]
    next: str | None
    cursors: tuple[str, ...] = ()
