"""The records that a store keeps, as immutable values."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Generic, Literal, TypeVar

import msgspec

from service.ids import owner_of
from service.models.client import NO_OPTIONS, FinishReason, Options, Role, Tools, Usage, is_signature
from service.storage.pieces import Run

TurnState = Literal["queued", "running", "completed", "failed", "cancelled", "interrupted"]
T = TypeVar("T")
EndState = Literal["completed", "failed", "cancelled", "interrupted"]
SessionStatus = Literal["idle", "running"]
CancelReason = Literal["requested", "superseded", "disconnected", "session_deleted"]
InterruptReason = Literal["shutdown", "crash"]
EndReason = CancelReason | InterruptReason
"""Why a turn was cancelled or interrupted."""

OnInterrupt = Literal["fail", "retry", "continue"]
"""What becomes of a turn whose process stops or dies: the turn ends as interrupted, or another process runs it again
from its beginning, or lets the model go on after the text so far."""
OnDisconnect = Literal["cancel", "continue"]
"""What becomes of a turn whose last client has left."""

SEQ_AFTER_CRASH = 1 << 30
"""The seq of the terminal event of a turn that a crash ended, higher than the seq of any event that was sent.

That of a turn with several attempts is higher still: :func:`~service.storage.rules.seq_after_crash`.

A log holds no more bytes than this number (the upper bound of ``log_bytes_max``), and every event has some bytes.
"""


ItemType = Literal["message", "reasoning", "function_call", "function_call_output"]


def _message() -> ItemType:
    return "message"


def utf8_length(text: str) -> int:
    """The size of a text, in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a turn's input or output. ``text`` is what grows while a reply arrives.

    - A *message* of ``role``.
    - *Reasoning* of the model: in words, ``encrypted``, or both. Only a server of ``encrypted`` can read it; it may be
      a signature of the words.
    - A *function call* of the model: ``text`` is the arguments, exactly as they were streamed. ``complete`` is False if
      the reply ended within them. ``call_id`` is the model server's id.
    - A *function call output*, which a caller brings: ``text`` is the result of the call ``call_id``.

    ``upstream`` is JSON of the fields that only the item's model server knows, and wants back with the item.
    Fields that are left out of JSON have their defaults, and ``type`` is never left out.
    """

    id: str
    type: ItemType = msgspec.field(default_factory=_message)  # with a plain default, JSON would leave the type out
    role: Role
    text: str
    call_id: str = ""
    name: str = ""
    complete: bool = True
    encrypted: str = ""
    upstream: str = ""

    @property
    def is_message(self) -> bool:
        """Whether the item is in lists of messages: no reasoning, and no empty reply."""
        return self.type != "reasoning" and bool(self.text or self.role == "user" or self.name)

    @property
    def prompt_bytes(self) -> int:
        """The size of the item in a prompt, in bytes of UTF-8."""
        size = utf8_length(self.text)
        if self.type == "message":
            return size
        return size + utf8_length(self.call_id) + utf8_length(self.name) + utf8_length(self.upstream)


def _reasoning_bytes(items: Iterable[Item]) -> int:
    """The size of reasoning that goes back to the model's server: encrypted, signed, and in words before calls."""
    size = words = 0
    has_calls = False
    for item in items:
        has_calls = has_calls or item.type == "function_call"
        if item.type != "reasoning":
            continue
        words += utf8_length(item.text)
        if item.encrypted:
            signed = utf8_length(item.text) if is_signature(item.upstream) else 0
            size += utf8_length(item.encrypted) + utf8_length(item.upstream) + signed
    return size + words if has_calls else size


def count_messages(items: Iterable[Item]) -> int:
    """The messages, calls and outputs of calls among these items."""
    return sum(item.is_message for item in items)


def text_length(output: Iterable[Item]) -> int:
    """The code points of a reply: of the messages among the output items."""
    return sum(len(item.text) for item in output if item.type == "message")


def cut_off(item: Item) -> Item:
    """An item of a reply that ended early. A call is complete only if its arguments are a whole JSON object.

    The beginning of an object is never an object itself, so no such call lacks an end.
    """
    if item.type != "function_call":
        return item
    return msgspec.structs.replace(item, complete=is_json_object(item.text))


def is_json_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A session: settings of a conversation, and the head of its tree of turns.

    ``open_turns`` counts turns that are queued or running; ``message_count`` the messages on all
    turns (inputs and non-empty replies, calls and their outputs); ``expires_at`` is the moment past which the session
    is gone unless it has an open turn. An *ephemeral* session was made for one ephemeral turn, takes no other one and
    ends with this turn; no listing and no search has it.
    """

    id: str
    created_at: datetime
    last_accessed_at: datetime
    expires_at: datetime
    idle_timeout_s: float
    title: str | None = None
    model: str | None = None
    system_message: str | None = None
    temperature: float | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    head: str | None = None
    message_count: int = 0
    open_turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    titled_at: datetime | None = None
    ephemeral: bool = False

    def __post_init__(self) -> None:
        # A whole number becomes a float here, so that the first answer shows the same value as later ones.
        msgspec.structs.force_setattr(self, "idle_timeout_s", float(self.idle_timeout_s))
        if self.temperature is not None:
            msgspec.structs.force_setattr(self, "temperature", float(self.temperature))

    @property
    def owner(self) -> str:
        """The name of the owner, which the id never loses; empty for a session without one."""
        return owner_of(self.id)

    @property
    def text_bytes(self) -> int:
        """The size of the texts that a caller chose, in bytes of UTF-8: the part of a record that may be large."""
        texts = (self.title or "", self.system_message or "", *self.metadata, *self.metadata.values())
        return sum(len(text.encode()) for text in texts)

    @property
    def updated_at(self) -> datetime:
        """When the session changed last: a use, or a title that was written for it."""
        return self.last_accessed_at if self.titled_at is None else max(self.last_accessed_at, self.titled_at)

    @property
    def status(self) -> SessionStatus:
        return "running" if self.open_turns else "idle"

    def has_expired(self, now: datetime) -> bool:
        """Whether the session has expired: past its deadline and without an open turn."""
        return not self.open_turns and self.expires_at <= now


class SessionPatch(msgspec.Struct, frozen=True, kw_only=True):
    """Changes to a session; a field that is ``UNSET`` stays as it is.

    ``seen_head`` changes nothing: it is the head that the session must have, for all other changes.
    """

    title: str | None | msgspec.UnsetType = msgspec.UNSET
    model: str | None | msgspec.UnsetType = msgspec.UNSET
    system_message: str | None | msgspec.UnsetType = msgspec.UNSET
    temperature: float | None | msgspec.UnsetType = msgspec.UNSET
    max_output_tokens: int | None | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    idle_timeout_s: float | msgspec.UnsetType = msgspec.UNSET
    head: str | None | msgspec.UnsetType = msgspec.UNSET
    seen_head: str | None | msgspec.UnsetType = msgspec.UNSET


def is_refusal(code: str) -> bool:
    """Whether a turn that failed with this code was refused for its input, not for what happened meanwhile."""
    return code in ("context_too_long", "content_filter", "unsupported_content")


class Failure(msgspec.Struct, frozen=True):
    """Why a turn failed: a stable code and a sentence for a user.

    ``param`` is the parameter of the turn that the model server refused, if that is the cause.
    """

    code: str
    message: str
    param: str | msgspec.UnsetType = msgspec.UNSET


class LeftOut(msgspec.Struct, frozen=True):
    """The oldest messages, calls and outputs, which did not go to the model: their number and their size in bytes."""

    items: int = 0
    bytes: int = 0

    def __add__(self, other: "LeftOut") -> "LeftOut":
        return LeftOut(self.items + other.items, self.bytes + other.bytes)


def text_bytes_of(items: Iterable[Item]) -> int:
    """The size of all texts of items, in bytes of UTF-8."""
    return sum(len(text.encode()) for item in items for text in (item.text, item.encrypted, item.upstream))


class TurnRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A turn: an input, the reply to it, and its place in the session's tree.

    A turn that a caller added complete has no ``started_at``, and may have no input, or no output.

    The store gets output items with the end; until then the live turn holds them. ``last_seq`` is the seq of
    the terminal event. ``system_message`` is the turn's own, in place of the session's. ``left_out`` is None if the
    whole conversation went to the model. With ``events_deleted`` an item of the reply was deleted, and
    the turn's events with it. The store does not keep ``stored``: it is False if the turn has ended and the store has
    not taken this end.

    ``face`` is what the caller's face wants back with the turn; nothing below ``service/api`` looks at it. An
    *ephemeral* turn is kept like others while it is open; its end removes it. No turn follows an ephemeral one, and it
    never becomes the head.

    ``attempt`` counts the processes that have run the turn. Only with an ``on_interrupt`` other than ``fail`` there may
    be several, and only then the store keeps ``on_disconnect``, ``may_title`` (whether its end may give the session a
    title), ``may_leave_out`` (whether its prompt may lack the oldest turns) and ``trace`` (the span of the turn in the
    first process, as ``traceparent`` names it; empty without one). These six are not in the records of a path. While
    such a turn is *suspended*, open without an owner, the record has the output and the ``last_seq`` of what was kept.
    """

    id: str
    session_id: str
    parent: str | None
    state: TurnState
    model: str
    created_at: datetime
    input: tuple[Item, ...]
    output: tuple[Item, ...] = ()
    system_message: str | None = None
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
    tools: Tools | msgspec.UnsetType = msgspec.UNSET
    options: Options = NO_OPTIONS
    face: dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    ephemeral: bool = False
    events_deleted: bool = False
    on_interrupt: OnInterrupt = "fail"
    attempt: int = 1
    on_disconnect: OnDisconnect = "cancel"
    may_title: bool = True
    may_leave_out: bool = True
    trace: str = ""
    stored: bool = True

    @property
    def is_open(self) -> bool:
        return self.state in ("queued", "running")

    @property
    def was_added(self) -> bool:
        """Whether a caller brought both sides of the turn, and no model was asked."""
        return self.state == "completed" and self.started_at is None

    @property
    def is_emptied(self) -> bool:
        """Whether all that the turn said is deleted. A turn that had nothing to say is not emptied."""
        return self.events_deleted and not (self.input or self.output)

    @property
    def input_text(self) -> str:
        return "\n".join(item.text for item in self.input if item.type == "message")

    @property
    def text(self) -> str:
        """The reply, without reasoning; partial where the turn did not complete."""
        return "".join([item.text for item in self.output if item.type == "message"])

    @property
    def text_bytes(self) -> int:
        """The size of all texts of input and output, in bytes of UTF-8."""
        return text_bytes_of((*self.input, *self.output))

    @property
    def message_count(self) -> int:
        """The messages, calls and outputs of the turn."""
        return count_messages(self.input) + count_messages(self.output)

    def find_item(self, item_id: str) -> Item | None:
        return next((item for item in (*self.input, *self.output) if item.id == item_id), None)

    @property
    def was_refused(self) -> bool:
        """Whether the model refused the input itself, so that the model would refuse it again."""
        if self.state == "failed":
            return self.error is not None and is_refusal(self.error.code)
        return self.finish_reason == "content_filter" and not self.has_reply

    @property
    def reply(self) -> str:
        """The text of the reply as it stands in later prompts: empty for a failed turn, and for white space."""
        if self.state == "failed":
            return ""
        text = self.text
        return "" if text.isspace() else text

    @property
    def calls(self) -> tuple[Item, ...]:
        """The calls of the reply as they stand in later prompts: none of a failed turn, and none that was cut off."""
        if self.state == "failed":
            return ()
        return tuple([item for item in self.output if item.type == "function_call" and item.complete])

    @property
    def has_calls(self) -> bool:
        """Whether the turn has a call of the model, or the output of a call."""
        return any(item.call_id for item in (*self.input, *self.output))

    @property
    def has_reply(self) -> bool:
        """Whether later prompts have a reply of this turn: a text or calls."""
        return bool(self.reply or self.calls)

    @property
    def in_prompts(self) -> LeftOut:
        """The messages, calls and outputs that this turn adds to later prompts, as a number and a size."""
        if self.was_refused:
            return LeftOut()
        items = [item for item in self.input if item.type != "reasoning"]
        reasoning = _reasoning_bytes(self.input) if len(items) < len(self.input) else 0
        reply, calls = self.reply, self.calls
        if reply:
            items += [item for item in self.output if item.type == "message"]
        if calls:
            items += calls
        if reply or calls:
            reasoning += _reasoning_bytes(self.output)
        size = reasoning
        for item in items:
            size += item.prompt_bytes
        return LeftOut(len(items), size)

    @property
    def message_bytes(self) -> int:
        """The size of the turn's messages in a prompt, in bytes of UTF-8."""
        return self.in_prompts.bytes


FACE_BYTES_MAX = 256 * 1024
"""The most bytes of JSON in a turn's ``face``."""


class IdempotencyKey(msgspec.Struct, frozen=True, kw_only=True):
    """The key of a call that may be repeated: what the call makes is made once.

    Attributes:
        caller: The owner for whom the call is made: the keys of two owners never meet.
        fingerprint: Tells the request from others: equal for requests that ask for the same.
    """

    caller: str
    key: str
    fingerprint: bytes


class Siblings(msgspec.Struct, frozen=True):
    """A turn's place, from 1, among the turns with its parent in the order of acceptance, and the count of these turns.

    The first turns of a session are siblings, too.
    """

    place: int = 1
    count: int = 1


class Places(msgspec.Struct, frozen=True):
    """The places of some turns in their session's tree: the session's head, and the siblings of each turn by its id.

    A turn that does not exist has no siblings here.
    """

    head: str | None = None
    siblings: Mapping[str, Siblings] = {}


class TreeNode(msgspec.Struct, frozen=True, kw_only=True):
    """A turn in its session's tree, without its texts."""

    id: str
    parent: str | None
    state: TurnState
    created_at: datetime
    ended_at: datetime | None

    @classmethod
    def of(cls, turn: TurnRecord) -> "TreeNode":
        return cls(id=turn.id, parent=turn.parent, state=turn.state, created_at=turn.created_at, ended_at=turn.ended_at)


class TitleSource(msgspec.Struct, frozen=True):
    """What a title was written of: a turn, and how many messages, calls and outputs this turn had then."""

    turn_id: str
    items: int

    @classmethod
    def of(cls, turn: TurnRecord) -> "TitleSource":
        return cls(turn.id, turn.in_prompts.items)


class BegunTurn(msgspec.Struct, frozen=True):
    """What the store knows of a turn that it has just accepted.

    Attributes:
        session: The session after the acceptance.
        path: The turns for the prompt, if the caller asked for them and they are short enough to be read with a write.
        siblings: The turn's place among its siblings, the last one.
    """

    session: SessionRecord
    path: Sequence[TurnRecord] | None = None
    siblings: Siblings = Siblings()


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The growth of a running turn since the checkpoint before.

    ``after`` is the seq of the last event of the last acknowledged checkpoint, 0 if there was none. The events of an
    adopted turn are kept up to its resumption: its first checkpoint follows that seq. ``runs`` are the
    events that follow, without gaps, and ``text`` is the text of their pieces in the order of arrival. ``items`` are
    the items that began or changed with these events, without texts, in the order of their indices; a known id replaces
    what only its model server reads. ``left_out`` is the turn's, and ``usage`` what the upstream has counted so far.
    """

    session_id: str
    turn_id: str
    after: int
    runs: tuple[Run, ...]
    text: str = ""
    items: tuple[Item, ...] = ()
    left_out: LeftOut | None = None
    usage: Usage | None = None


class SuspendedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """An open turn that its owner gives up, so that another owner may run it.

    Attributes:
        turn: The whole record, queued or running, with the output so far; without an output the next attempt begins
            anew. ``last_seq`` is the seq of the last event that was sent, 0 if there was none.
        runs: All events of the turn, or those before an output that is left out; the texts of their pieces are those
            of ``turn.output``.
        after: The seq of the last event of the last checkpoint that was acknowledged.
    """

    turn: TurnRecord
    runs: tuple[Run, ...]
    after: int = 0


class AdoptedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A suspended turn that an owner has taken over.

    Attributes:
        turn: The record, queued or running. The output of a running one is what the next attempt goes on from: with
            its texts if the mode of the resumption is ``continue``, else empty. ``last_seq`` is the seq of the last
            event in ``runs``; the next event has the seq after it. ``usage`` is that of the earlier attempts.
        runs: The events of the turn that are kept; the texts of their pieces are those of ``turn.output``. Those of a
            running turn end with the resumption (:class:`~service.storage.pieces.Resumed`), which the store has kept.
        path: The turns for its prompt, as :meth:`~service.storage.store.Store.begin_turn` returns them; None if they
            were not read.
    """

    turn: TurnRecord
    runs: tuple[Run, ...]
    path: Sequence[TurnRecord] | None = None


class EndResult(Enum):
    """What became of a turn's end that an owner gave to the store."""

    KEPT = "kept"
    """This call has stored the end."""
    ALREADY_KEPT = "already_kept"
    """The store had this end already, from an earlier call whose outcome the owner does not know."""
    LOST = "lost"
    """The store will never have this end: the turn is gone, has another end or is not this owner's any more."""

    @property
    def is_kept(self) -> bool:
        return self is not EndResult.LOST


class EventsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Successive events of a turn; without runs if the turn has no events there.

    ``after`` is the seq before the first of them, unless that is a resumption, which has a seq of its own
    (:class:`~service.storage.pieces.Resumed`). ``text`` is the text of their pieces in the order of arrival. ``kept``
    is the seq of the last event of the turn that is kept; the terminal event is not among them, because the turn's
    record tells it. ``ended`` tells whether the turn had ended when the page was read, so that no later read differs.
    ``text_length`` counts the code points of the turn's messages, if it has ended. With ``events_deleted`` the turn has
    no events any more.
    """

    after: int
    runs: tuple[Run, ...] = ()
    text: str = ""
    kept: int = 0
    ended: bool = False
    events_deleted: bool = False
    text_length: int = 0


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """An owner: an open store, whose process runs the turns that this process accepted.

    ``fence`` grows from owner to owner of one store and is never used twice. ``address`` is the address at which the
    owner's process answers (``unix:/run/lastcall/3.sock``, ``http://10.0.0.3:8000``); None if it did not give one.
    """

    fence: int
    address: str | None


class OpenTurn(msgspec.Struct, frozen=True, kw_only=True):
    """Where an open turn is.

    Attributes:
        owner: Another owner, which has open turns of the session, and may have died.
        is_suspended: Whether the turn is nobody's, and may be adopted.
    """

    owner: Owner | None = None
    is_suspended: bool = False


class SuspendedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session whose open turns are all suspended.

    Attributes:
        awaits_client: Whether all of them are cancelled without clients (``on_disconnect``).
    """

    id: str
    awaits_client: bool


class Adoption(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the adoption of a session's turns.

    Attributes:
        session: The session; None if it does not exist or is marked as deleted.
        turns: The adopted turns, in the order of their acceptance.
        owner: Another owner, which lives and has open turns of the session: then none was adopted.
        is_put_off: Whether none was adopted because of the size of the turns, with those of other sessions: the rest
            says nothing then.
    """

    session: SessionRecord | None = None
    turns: Sequence[AdoptedTurn] = ()
    owner: Owner | None = None
    is_put_off: bool = False


class Page(msgspec.Struct, Generic[T], frozen=True):
    """One page of a listing; ``next`` is the page cursor of the following page, None on the last page.

    ``cursors`` has the page cursor after each row, for a reader that shows only the first rows of the page. ``partial``
    says that rows may be missing: they were not found in time, or are not in the index yet. Such a page may be empty
    although it is not the last one.
    """

    data: tuple[T, ...]
    next: str | None
    cursors: tuple[str, ...] = ()
    partial: bool = False


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """A session that a search has found: by its title, or by the messages of one of its turns."""

    session: SessionRecord
    turn_id: str | None
    snippet: str
