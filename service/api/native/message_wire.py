"""The bodies of calls about messages, each with one example."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import FORMS, FUNCTION_PATTERN, BodyPart, RequestBody, Text, TurnId
from service.api.http.wire_types import NO_NUL as _NO_NUL
from service.api.native.paging_wire import Time
from service.api.native.turn_requests import NewFunctionCallOutput
from service.models.client import Role
from service.sessions.commands import ADDED_ITEMS_MAX
from service.sessions.messages import MessageRecord, messages_of
from service.storage.records import Page, TurnRecord


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message; or, with a ``type``, a call of the model or the output of a call, whose ``text`` is empty.

    ``{"id": "msg_9c…", "turn_id": "turn_0a…", "role": "user", "text": "Hi", "created_at": "2026-01-31T09:30:00Z"}``
    """

    id: str
    turn_id: str
    role: Role
    text: str
    created_at: Time
    type: Literal["function_call", "function_call_output"] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    complete: bool | UnsetType = UNSET
    output: str | UnsetType = UNSET

    @classmethod
    def of(cls, record: MessageRecord) -> Self:
        item = record.item
        is_call, is_output = item.type == "function_call", item.type == "function_call_output"
        return cls(
            id=item.id,
            turn_id=record.turn_id,
            role=item.role,
            text="" if is_call or is_output else item.text,
            created_at=record.created_at,
            type="function_call" if is_call else "function_call_output" if is_output else UNSET,
            call_id=item.call_id or UNSET,
            name=item.name or UNSET,
            arguments=item.text if is_call else UNSET,
            complete=item.complete if is_call else UNSET,
            output=item.text if is_output else UNSET,
        )


class MessageList(msgspec.Struct, frozen=True, kw_only=True):
    """``{"data": [{"id": "msg_9c…", …}], "next": null}``: the path to the head, oldest first."""

    data: tuple[Message, ...]
    next: str | None

    @classmethod
    def of(cls, page: Page[msgspec.Raw]) -> Self:
        return cls(data=cast("tuple[Message, ...]", page.data), next=page.next)


class AddedMessage(BodyPart, frozen=True, kw_only=True, tag="message", tag_field="type"):
    """A text of a conversation: ``{"type": "message", "role": "assistant", "text": "It will rain."}``"""

    role: Annotated[
        Role, Meta(description="A `system` message is a note, which goes to models in its place in the conversation.")
    ]
    text: Text


class AddedFunctionCall(BodyPart, frozen=True, kw_only=True, tag="function_call", tag_field="type"):
    """A call that a model has made.

    ``{"type": "function_call", "call_id": "call_6f…", "name": "get_weather", "arguments": "{\"city\": \"Oslo\"}"}``
    """

    call_id: Annotated[str, Meta(min_length=1, extra_json_schema=_NO_NUL)]
    name: Annotated[str, Meta(pattern=FUNCTION_PATTERN, description=f"{FORMS[FUNCTION_PATTERN]}.")]
    arguments: Annotated[str, Meta(description="JSON, as the model wrote it.", extra_json_schema=_NO_NUL)]


class AddMessages(RequestBody, frozen=True, kw_only=True):
    """``{"items": [{"type": "message", "role": "user", "text": "Hi"}]}``: a conversation, oldest first."""

    bounds_each = True

    items: Annotated[
        tuple[AddedMessage | AddedFunctionCall | NewFunctionCallOutput, ...],
        Meta(
            min_length=1,
            max_length=ADDED_ITEMS_MAX,
            description="Each has at most `input_bytes_max` bytes of UTF-8, one of the model `reply_bytes_max`.",
        ),
    ]
    parent: (
        Annotated[
            TurnId | None,
            Meta(description="The ended turn that the items follow: the head if left out, none if null."),
        ]
        | UnsetType
    ) = UNSET


class AddedMessages(msgspec.Struct, frozen=True, kw_only=True):
    """The new turns, the last of which is the head, and all that they add to the messages of the session.

    ``{"turns": ["turn_0a…"], "messages": [{"id": "msg_9c…", "turn_id": "turn_0a…", "role": "user", "text": "Hi",
    "created_at": "2026-01-31T09:30:00Z"}]}``
    """

    turns: tuple[str, ...]
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, records: Sequence[TurnRecord]) -> Self:
        messages = tuple(Message.of(message) for record in records for message in messages_of(record))
        return cls(turns=tuple(record.id for record in records), messages=messages)
