"""Commands to create sessions and turns, and the records that these commands make."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from service.errors import InvalidRequestError
from service.ids import new_item_id, new_session_id, new_turn_id, scoped
from service.models.client import NO_OPTIONS, Options, Tools
from service.settings import Settings
from service.storage.pieces import count
from service.storage.records import (
    FACE_BYTES_MAX,
    IdempotencyKey,
    Item,
    OnDisconnect,
    OnInterrupt,
    SessionRecord,
    TurnRecord,
)
from service.storage.rules import events_at_once, expires_at

ADDED_ITEMS_MAX = 500
"""The most items that one call adds, because they are added in one step of the store."""
INPUT_ITEMS_MAX = 128
"""The most items in the input of one turn of the native API: texts, and outputs of calls."""
HISTORY_ITEMS_MAX = 4096
"""The most items in the input of one turn where a caller may bring a conversation with it."""

OnConflict = Literal["reject", "queue", "supersede"]


class NewSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session to be created; each field that is left out has a default. ``id`` is the public id."""

    id: str | None = None
    owner: str = ""
    title: str | None = None
    model: str | None = None
    system_message: str | None = None
    temperature: float | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    idle_timeout_s: float | None = None

    def record(self, *, now: datetime, settings: Settings) -> SessionRecord:
        """The session as it is created."""
        idle_timeout_s = settings.default_idle_timeout_s if self.idle_timeout_s is None else self.idle_timeout_s
        return SessionRecord(
            id=scoped(self.owner, self.id or new_session_id()),
            created_at=now,
            last_accessed_at=now,
            expires_at=expires_at(now, idle_timeout_s),
            idle_timeout_s=idle_timeout_s,
            title=self.title,
            model=self.model,
            system_message=self.system_message,
            temperature=self.temperature,
            max_output_tokens=self.max_output_tokens,
            metadata=self.metadata,
        )


def text_input(text: str) -> tuple[Item, ...]:
    """An input of one message."""
    return (Item(id=new_item_id("message"), role="user", text=text),)


def is_same_input(one: Sequence[Item], other: Sequence[Item]) -> bool:
    """Whether two inputs say the same; the ids of their items do not matter."""
    return [msgspec.structs.replace(item, id="") for item in one] == [
        msgspec.structs.replace(item, id="") for item in other
    ]


class NewTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn to be started. Its input is a text, or new items; with ``answers_path`` it has none, and the model answers
    what the path to its parent ends with.

    Without ``parent`` the turn follows the session's head; with ``parent=None`` the turn is a first turn. With
    ``creates_session`` the session is created if it does not exist. With ``session_is_new`` as well, the session's id
    was made for this turn, so no session has it. With ``ephemeral`` the turn's end removes it, and the session as well
    if that is created with it. Without ``may_title`` its end gives the session no title. Without ``may_leave_out`` it
    fails where a part of the conversation would have to be left out of its prompt.

    ``face`` is stored with the turn and not looked at: JSON values by name, at most
    :data:`~service.storage.records.FACE_BYTES_MAX` bytes.
    """

    text: str = ""
    items: tuple[Item, ...] = ()
    answers_path: bool = False
    parent: str | None | msgspec.UnsetType = msgspec.UNSET
    model: str | None = None
    system_message: str | None = None
    temperature: float | None = None
    max_output_tokens: int | None = None
    tools: Tools | msgspec.UnsetType = msgspec.UNSET
    options: Options = NO_OPTIONS
    face: dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    ephemeral: bool = False
    may_title: bool = True
    may_leave_out: bool = True
    on_conflict: OnConflict = "reject"
    on_disconnect: OnDisconnect = "cancel"
    on_interrupt: OnInterrupt = "fail"
    background: bool = False
    creates_session: bool = False
    session_is_new: bool = False
    request_id: str | None = None
    """What the log calls the request that asks for it."""
    key: IdempotencyKey | None = None
    """The key with which the request may be repeated."""

    @property
    def without_clients(self) -> OnDisconnect:
        """What becomes of the turn without a client."""
        return "continue" if self.background else self.on_disconnect

    def record(self, session: SessionRecord, *, queued: bool, now: datetime, settings: Settings) -> TurnRecord:
        """The turn as it is accepted."""
        return TurnRecord(
            id=new_turn_id(),
            session_id=session.id,
            parent=session.head if self.parent is msgspec.UNSET else self.parent,
            state="queued" if queued else "running",
            model=self.model or session.model or settings.default_model,
            created_at=now,
            started_at=None if queued else now,
            input=() if self.answers_path else self.items or text_input(self.text),
            system_message=self.system_message,
            temperature=session.temperature if self.temperature is None else self.temperature,
            max_output_tokens=self.max_output_tokens or session.max_output_tokens,
            background=self.background,
            tools=self.tools,
            options=self.options,
            face=_kept_face(self.face),
            ephemeral=self.ephemeral,
            **self._for_other_processes(settings),
        )

    def _for_other_processes(self, settings: Settings) -> dict[str, Any]:
        """What only a process must know that goes on with the turn. None can where the store ends with this process."""
        if self.ephemeral or self.on_interrupt == "fail" or not settings.store_capabilities.durable:
            return {}
        return {
            "on_interrupt": self.on_interrupt,
            "on_disconnect": self.without_clients,
            "may_title": self.may_title,
            "may_leave_out": self.may_leave_out,
        }


def _kept_face(face: dict[str, msgspec.Raw] | msgspec.UnsetType) -> dict[str, msgspec.Raw] | msgspec.UnsetType:
    """A copy of what a face keeps with a turn, without the request's body of which its values may be parts.

    Raises:
        InvalidRequestError: It is too large.
    """
    if face is msgspec.UNSET:
        return msgspec.UNSET
    size = len(msgspec.json.encode(face))
    if size > FACE_BYTES_MAX:
        raise InvalidRequestError(
            f"What is to be kept beside the input, with tools, instructions and metadata, has {size} bytes of JSON; "
            f"at most {FACE_BYTES_MAX} are kept."
        )
    return {name: value.copy() for name, value in face.items()}


class NewItems(msgspec.Struct, frozen=True, kw_only=True):
    """Items of a conversation, to be added as turns that are complete at once.

    ``parent`` and ``face`` are as in :class:`NewTurn`; each of the turns keeps the face.
    """

    items: tuple[Item, ...]
    face: dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    parent: str | None | msgspec.UnsetType = msgspec.UNSET
    key: IdempotencyKey | None = None

    def records(self, session: SessionRecord, *, now: datetime, settings: Settings) -> list[TurnRecord]:
        """The turns as they are added, each the parent of the next one."""
        parent = session.head if self.parent is msgspec.UNSET else self.parent
        face = _kept_face(self.face)
        turns: list[TurnRecord] = []
        for said, replied in turns_of(self.items, settings):
            turn = TurnRecord(
                id=new_turn_id(),
                session_id=session.id,
                parent=parent,
                state="completed",
                model=session.model or settings.default_model,
                created_at=now,
                ended_at=now,
                input=tuple(said),
                output=tuple(replied),
                finish_reason="tool_calls" if any(item.type == "function_call" for item in replied) else "stop",
                last_seq=count(events_at_once(replied)) + 1,
                face=face,
            )
            turns.append(turn)
            parent = turn.id
        return turns


def turns_of(items: Sequence[Item], settings: Settings) -> Iterator[tuple[list[Item], list[Item]]]:
    """Cut a conversation into the inputs and outputs of turns.

    A turn is what the caller's side says and then what the model's side says. It has the form and the bounds of other
    turns: a second text of the model without a call in between, and what would be too much for one input or reply,
    begins another turn.
    """
    said: list[Item] = []
    replied: list[Item] = []
    said_bytes = replied_bytes = 0
    has_text = False
    for item in items:
        size = item.prompt_bytes
        if is_callers(item):
            is_full = bool(said) and said_bytes + size > settings.input_bytes_max
            begins = bool(replied) or is_full or len(said) == INPUT_ITEMS_MAX
        else:
            is_full = bool(replied) and replied_bytes + size > settings.reply_bytes_max
            begins = is_full or (has_text and item.type == "message")
        if begins:
            yield said, replied
            said, replied, said_bytes, replied_bytes, has_text = [], [], 0, 0, False
        if is_callers(item):
            said.append(item)
            said_bytes += size
        else:
            replied.append(item)
            replied_bytes += size
            has_text = item.type == "message"
    if said or replied:
        yield said, replied


def is_callers(item: Item) -> bool:
    """Whether an item is of the caller's side of a conversation, which the model answers."""
    return item.role != "assistant"
