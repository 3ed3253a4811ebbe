"""The bodies and query strings of requests and the bodies of answers, each with one example.

Texts are bounded further by ``input_bytes_max`` (see :mod:`service.api.http.request_body`).
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import (
    EFFORT_PATTERN,
    FORMS,
    FUNCTION_PATTERN,
    PARENT_PATTERN,
    BodyPart,
    Limit,
    MaxOutputTokens,
    Metadata,
    MetadataValue,
    ModelName,
    OwnerName,
    Query,
    RequestBody,
    SessionId,
    Temperature,
    Text,
    TurnId,
)
from service.api.http.wire_types import NO_NUL as _NO_NUL
from service.ids import public_id
from service.models.client import FinishReason, Role, Usage
from service.sessions.commands import ADDED_ITEMS_MAX, INPUT_ITEMS_MAX, OnConflict
from service.sessions.messages import MessageRecord, messages_of
from service.sessions.turns.turn import OnDisconnect
from service.storage.records import (
    EndReason,
    Failure,
    Item,
    LeftOut,
    Match,
    Page,
    Places,
    SessionRecord,
    SessionStatus,
    Siblings,
    TreeNode,
    TurnRecord,
    TurnState,
)

Title = Annotated[str, Meta(max_length=200, extra_json_schema=_NO_NUL)]
_OF_TURNS = Meta(description="Of turns that name none; left to the model's server if null.")
_OF_SESSION = Meta(description="The session's if left out.")
IdleTimeout = Annotated[float, Meta(ge=1, le=31_536_000, description="Seconds without use until the session expires.")]
Time = Annotated[datetime, Meta(tz=True)]
After = Annotated[str, Meta(max_length=512, description="The `next` of the previous page.")]


# Sessions


class CreateSession(RequestBody, frozen=True, kw_only=True):
    """``{"id": "support-4711", "system_message": "Be brief.", "metadata": {"team": "blue"}}``"""

    id: SessionId | None = None
    owner: Annotated[
        OwnerName | None, Meta(description="Needs a key that may `administer`; the key's own name if left out.")
    ] = None
    title: Title | None = None
    model: ModelName | None = None
    system_message: Text | None = None
    temperature: Annotated[Temperature | None, _OF_TURNS] = None
    max_output_tokens: Annotated[MaxOutputTokens | None, _OF_TURNS] = None
    metadata: Metadata = {}  # noqa: RUF012  the fields of a Struct are no class attributes
    idle_timeout_s: IdleTimeout | None = None


class ForkSession(RequestBody, frozen=True, kw_only=True):
    """``{"at": "turn_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19", "id": "support-4711-again"}``"""

    at: Annotated[TurnId | None, Meta(description="The last turn to copy: the head if left out.")] = None
    id: SessionId | None = None


class UpdateSession(RequestBody, frozen=True, kw_only=True):
    """``{"title": "Refund for order 4711", "model": null}``: fields that are left out do not change.

    null clears ``title``, ``model``, ``system_message``, ``temperature`` and ``max_output_tokens``.

    ``{"head": "turn_0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19", "seen_head": "turn_7f3e…"}``: shows another branch.
    """

    title: Title | None | UnsetType = UNSET
    model: ModelName | None | UnsetType = UNSET
    system_message: Text | None | UnsetType = UNSET
    temperature: Annotated[Temperature | None, _OF_TURNS] | UnsetType = UNSET
    max_output_tokens: Annotated[MaxOutputTokens | None, _OF_TURNS] | UnsetType = UNSET
    metadata: Annotated[Metadata, Meta(extra_json_schema={"description": "Replaces all pairs."})] | UnsetType = UNSET
    idle_timeout_s: IdleTimeout | UnsetType = UNSET
    head: (
        Annotated[TurnId | None, Meta(description="The turn that the next turn is to follow; none if null.")]
        | UnsetType
    ) = UNSET
    seen_head: (
        Annotated[
            TurnId | None, Meta(description="The head that the client has seen: if it is another one, nothing changes.")
        ]
        | UnsetType
    ) = UNSET


class SessionUsage(msgspec.Struct, frozen=True):
    """All turns, as the upstreams counted.

    ``{"input_tokens": 120, "output_tokens": 340, "reasoning_tokens": 200, "cached_tokens": 64}``

    ``reasoning_tokens`` are part of ``output_tokens``, ``cached_tokens`` of ``input_tokens``. Turns that ended early
    count with what was counted by then.
    """

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cached_tokens: int


def _whole(number: float) -> float:
    """Return a whole number as an int, so that JSON shows ``1800`` and not ``1800.0``."""
    return int(number) if number.is_integer() else number


class FoundBy(msgspec.Struct, frozen=True, kw_only=True):
    """``{"turn_id": "turn_0a…", "snippet": "…where is Lisbon? In Portugal…"}``"""

    turn_id: Annotated[str | None, Meta(description="The turn with the words; null: they are in the title.")]
    snippet: Annotated[str, Meta(description="The text around a word of the query: at most 202 characters.")]


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A session.

    ``{"id": "sess_6f…", "created_at": "2026-01-31T09:30:00Z", "last_accessed_at": "2026-01-31T09:31:07.25Z",
    "updated_at": "2026-01-31T09:31:07.25Z", "expires_at": "2026-01-31T10:01:07.25Z", "idle_timeout_s": 1800,
    "title": null, "model": null,
    "system_message": "Be brief.", "temperature": null, "max_output_tokens": null, "metadata": {},
    "status": "idle", "head": "turn_0a…", "message_count": 2,
    "usage": {"input_tokens": 12, "output_tokens": 34, "reasoning_tokens": 0, "cached_tokens": 0}}``
    """

    id: str
    created_at: Time
    last_accessed_at: Time
    updated_at: Annotated[
        Time,
        Meta(description="When something that PATCH can change did, a turn began or ended, or messages were added."),
    ]
    expires_at: Time
    idle_timeout_s: float
    title: str | None
    model: str | None
    system_message: str | None
    temperature: float | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    status: SessionStatus
    head: str | None
    message_count: Annotated[int, Meta(description="The messages of all turns, also on other branches.")]
    usage: SessionUsage
    owner: Annotated[str, Meta(description="Whose session it is. Only there if it has an owner.")] | UnsetType = UNSET
    match: Annotated[FoundBy, Meta(description="Where the words of `q` are. Only there in a search.")] | UnsetType = (
        UNSET
    )

    @classmethod
    def of_match(cls, match: Match) -> Self:
        found_by = FoundBy(turn_id=match.turn_id, snippet=match.snippet)
        return msgspec.structs.replace(cls.of(match.session), match=found_by)

    @classmethod
    def of(cls, record: SessionRecord) -> Self:
        return cls(
            id=public_id(record.id),
            created_at=record.created_at,
            last_accessed_at=record.last_accessed_at,
            updated_at=record.updated_at,
            expires_at=record.expires_at,
            idle_timeout_s=_whole(record.idle_timeout_s),
            title=record.title,
            model=record.model,
            system_message=record.system_message,
            temperature=None if record.temperature is None else _whole(record.temperature),
            max_output_tokens=record.max_output_tokens,
            metadata=record.metadata,
            status=record.status,
            head=record.head,
            message_count=record.message_count,
            usage=SessionUsage(
                input_tokens=record.input_tokens,
                output_tokens=record.output_tokens,
                reasoning_tokens=record.reasoning_tokens,
                cached_tokens=record.cached_tokens,
            ),
            owner=record.owner or UNSET,
        )


class SessionsQuery(Query, frozen=True, kw_only=True):
    """``?limit=50&status=running&count=true``, ``?q=lisbon+flight&metadata.team=blue``"""

    limit: Limit = 20
    after: After | UnsetType = UNSET
    status: SessionStatus | UnsetType = UNSET
    count: Annotated[
        bool, Meta(description="Whether to add the exact count of all pages; not with `q` or `metadata`.")
    ] = False
    q: Annotated[
        str,
        Meta(
            description="Only sessions that have all of these words in the title, or in the messages of an ended turn."
        ),
    ] = ""
    metadata: Annotated[
        dict[
            Annotated[str, Meta(min_length=1, max_length=64, extra_json_schema={"pattern": r"^[^\[\]\x00]*$"})],
            MetadataValue,
        ],
        Meta(
            max_length=16,
            description="Only sessions with these pairs: `metadata.key=value`, also for a key with brackets; or "
            "`metadata[key]=value`.",
        ),
    ] = {}  # noqa: RUF012  the fields of a Struct are no class attributes


class SessionList(msgspec.Struct, frozen=True, kw_only=True):
    """``{"data": [{"id": "sess_6f…", …}], "next": null, "count": 1}``: newest first; no ``next`` on the last page."""

    data: tuple[Session, ...]
    next: str | None
    count: int | UnsetType = UNSET
    partial: Annotated[
        bool | UnsetType,
        Meta(description="With `q` or `metadata`: whether sessions may be missing on this page. `next` goes on."),
    ] = UNSET

    @classmethod
    def of(cls, page: Page[msgspec.Raw], *, count: int | UnsetType = UNSET, partial: bool | UnsetType = UNSET) -> Self:
        return cls(data=cast("tuple[Session, ...]", page.data), next=page.next, count=count, partial=partial)


class PageQuery(Query, frozen=True, kw_only=True):
    """``?limit=50&after=WyJ0IiwxMl0``"""

    limit: Limit = 20
    after: After | UnsetType = UNSET


# Messages


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


# Turns


class NewMessage(BodyPart, frozen=True, kw_only=True, tag="message", tag_field="type"):
    """A text of the user in an input: ``{"type": "message", "text": "And tomorrow?"}``"""

    text: Text


class NewFunctionCallOutput(BodyPart, frozen=True, kw_only=True, tag="function_call_output", tag_field="type"):
    """The result of a call: ``{"type": "function_call_output", "call_id": "call_6f…", "output": "4 °C"}``"""

    call_id: Annotated[str, Meta(min_length=1, description="The `call_id` of the call.", extra_json_schema=_NO_NUL)]
    output: Annotated[
        str,
        Meta(
            description="The result, in any form that the model understands; it may be empty.",
            extra_json_schema=_NO_NUL,
        ),
    ]


NewItems = Annotated[
    tuple[NewMessage | NewFunctionCallOutput, ...],
    Meta(
        min_length=1,
        max_length=INPUT_ITEMS_MAX,
        description="All texts together have at most `input_bytes_max` bytes of UTF-8.",
    ),
]


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


class FunctionTool(BodyPart, frozen=True, kw_only=True, tag="function", tag_field="type"):
    """A function that the model may call; this service only passes the description to the model's server.

    ``{"type": "function", "name": "get_weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}``
    """

    name: Annotated[str, Meta(pattern=FUNCTION_PATTERN, description=f"{FORMS[FUNCTION_PATTERN]}.")]
    description: Annotated[str, Meta(extra_json_schema=_NO_NUL)] | None = None
    parameters: Annotated[dict[str, Any], Meta(description="A JSON schema of the arguments.")] | None = None
    strict: Annotated[bool, Meta(description="Whether the arguments must fit the schema.")] | None = None


class FunctionChoice(BodyPart, frozen=True, kw_only=True, tag="function", tag_field="type"):
    """The function that the model must call: ``{"type": "function", "name": "get_weather"}``"""

    name: str


class JsonSchemaFormat(BodyPart, frozen=True, kw_only=True, tag="json_schema", tag_field="type"):
    """The text of the reply is JSON that fits a schema, by the model's server; this service does not check it.

    ``{"type": "json_schema", "name": "weather", "schema": {"type": "object", "properties": {"city":
    {"type": "string"}}, "required": ["city"], "additionalProperties": false}, "strict": true}``
    """

    name: Annotated[str, Meta(pattern=FUNCTION_PATTERN, description=f"{FORMS[FUNCTION_PATTERN]}.")]
    schema: Annotated[dict[str, Any], Meta(description="A JSON schema of the text.")]
    description: Annotated[str, Meta(extra_json_schema=_NO_NUL)] | None = None
    strict: Annotated[bool, Meta(description="Whether the text must fit the schema.")] | None = None


class JsonObjectFormat(BodyPart, frozen=True, kw_only=True, tag="json_object", tag_field="type"):
    """The text of the reply is a JSON object, by the model's server: ``{"type": "json_object"}``"""


TopP = Annotated[
    float, Meta(ge=0, le=1, description="Only the likeliest tokens, up to this share; left to the server if left out.")
]
TextFormat = Annotated[
    JsonSchemaFormat | JsonObjectFormat,
    Meta(description="The form of the reply's text: at most `input_bytes_max` bytes. A plain text if left out."),
]
ReasoningEffort = Annotated[
    str,
    Meta(
        pattern=EFFORT_PATTERN,
        description="How much the model thinks, like `low` or `high`, in the words of its server; left to the server "
        "if left out.",
    ),
]
_WITHOUT_CLIENTS = Meta(description="What happens when no client streams the turn or waits for it any more.")
_AT_ONCE = Meta(description="Answer 202 at once; the turn runs also if no client waits for it.")


class StartTurn(RequestBody, frozen=True, kw_only=True):
    """``{"input": "What is a nursery?", "temperature": 0.2, "on_conflict": "queue"}``"""

    input: Annotated[
        Text | NewItems, Meta(description="A text of the user, or texts and the results of calls of the model.")
    ]
    parent: (
        Annotated[
            TurnId | None,
            Meta(description="The turn that this one follows: the head if left out, none if null."),
        ]
        | UnsetType
    ) = UNSET
    model: ModelName | None = None
    system_message: Annotated[
        Text | None, Meta(description="In place of the session's, for this turn only. Up to `input_bytes_max` bytes.")
    ] = None
    temperature: Annotated[Temperature | None, _OF_SESSION] = None
    max_output_tokens: Annotated[MaxOutputTokens | None, _OF_SESSION] = None
    tools: Annotated[
        tuple[FunctionTool, ...],
        Meta(
            max_length=128,
            description="Functions that the model may call and the client runs: at most `input_bytes_max` bytes.",
        ),
    ] = ()
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | FunctionChoice | None,
        Meta(description="Whether the model calls a function; left to the model's server if left out."),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="Whether one reply may have several calls; left to the server if left out.")
    ] = None
    top_p: TopP | None = None
    text_format: TextFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    on_conflict: Annotated[
        OnConflict, Meta(description="What to do while another turn of the session is running or queued.")
    ] = "reject"
    on_disconnect: Annotated[OnDisconnect, _WITHOUT_CLIENTS] = "cancel"
    background: Annotated[bool, _AT_ONCE] = False


class RetryTurn(RequestBody, frozen=True, kw_only=True):
    """``{"temperature": 1, "on_disconnect": "continue"}``: what is left out is as in the turn that is retried.

    null stands for what a new turn has without the field. The body may be left out.
    """

    may_be_left_out: ClassVar[bool] = True

    model: ModelName | None | UnsetType = UNSET
    system_message: Text | None | UnsetType = UNSET
    temperature: Temperature | None | UnsetType = UNSET
    max_output_tokens: MaxOutputTokens | None | UnsetType = UNSET
    tools: (
        Annotated[tuple[FunctionTool, ...], Meta(max_length=128, description="In place of the turn's; none if empty.")]
        | UnsetType
    ) = UNSET
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None | UnsetType = UNSET
    parallel_tool_calls: bool | None | UnsetType = UNSET
    top_p: TopP | None | UnsetType = UNSET
    text_format: TextFormat | None | UnsetType = UNSET
    reasoning_effort: ReasoningEffort | None | UnsetType = UNSET
    on_conflict: Annotated[
        OnConflict, Meta(description="What to do if the retried turn waits for other turns to end.")
    ] = "reject"
    on_disconnect: Annotated[OnDisconnect, _WITHOUT_CLIENTS] = "cancel"
    background: Annotated[bool, _AT_ONCE] = False


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag="message", tag_field="type"):
    """``{"type": "message", "id": "msg_9c…", "role": "user", "text": "Hi"}``"""

    id: str
    role: Role
    text: str


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning", tag_field="type"):
    """``{"type": "reasoning", "id": "msg_5d…", "text": "The user greets me."}``: no text if it is encrypted only."""

    id: str
    text: str


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True, tag="function_call", tag_field="type"):
    """A call of the model.

    ``{"type": "function_call", "id": "fc_3e…", "call_id": "call_6f…", "name": "get_weather",
    "arguments": "{\"city\": \"Oslo\"}", "complete": true}``
    """

    id: str
    call_id: str
    name: str
    arguments: Annotated[str, Meta(description="As the model wrote them: JSON, if the model is right.")]
    complete: Annotated[
        bool, Meta(description="Whether the arguments are whole: the reply may be on its way, or cut off.")
    ]


class FunctionCallOutputItem(msgspec.Struct, frozen=True, kw_only=True, tag="function_call_output", tag_field="type"):
    """The result of a call.

    ``{"type": "function_call_output", "id": "fco_8a…", "call_id": "call_6f…", "output": "4 °C"}``
    """

    id: str
    call_id: str
    output: str


TurnItem = MessageItem | ReasoningItem | FunctionCallItem | FunctionCallOutputItem


def _item_of(item: Item) -> TurnItem:
    match item.type:
        case "message":
            return MessageItem(id=item.id, role=item.role, text=item.text)
        case "reasoning":
            return ReasoningItem(id=item.id, text=item.text)
        case "function_call":
            return FunctionCallItem(
                id=item.id, call_id=item.call_id, name=item.name, arguments=item.text, complete=item.complete
            )
        case "function_call_output":
            return FunctionCallOutputItem(id=item.id, call_id=item.call_id, output=item.text)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn; ``text`` is the reply so far.

    ``items`` is there only if the turn has a call of the model, the output of a call or a system message: then it has
    all items of the input and of the reply so far, in their order.

    ``"stored": false`` is there only if the turn has ended and the store has not stored its end yet. The write is tried
    again; after a crash the state in the store counts.

    ``{"id": "turn_0a…", "session_id": "sess_6f…", "parent": null, "state": "completed", "reason": null,
    "error": null, "model": "scripted", "input": "Hi", "text": "Hello.", "finish_reason": "stop",
    "usage": {"input_tokens": 1, "output_tokens": 2, "reasoning_tokens": 0}, "left_out": null,
    "created_at": "2026-01-31T09:30:00Z", "started_at": "2026-01-31T09:30:00Z", "ended_at": "2026-01-31T09:30:01Z",
    "siblings": {"place": 1, "count": 1}, "is_head": true}``
    """

    id: str
    session_id: str
    parent: str | None
    state: TurnState
    reason: EndReason | None
    error: Failure | None
    model: str
    input: str
    text: str
    finish_reason: FinishReason | None
    usage: Usage | None
    left_out: Annotated[
        LeftOut | None,
        Meta(description="The oldest messages of the conversation that did not go to the model; null if all did."),
    ]
    created_at: Time
    started_at: Time | None
    ended_at: Time | None
    siblings: (
        Annotated[
            Siblings,
            Meta(
                extra_json_schema={
                    "description": "The place, from 1, and the count of the turns with the same parent, in the order "
                    "of acceptance. Left out only if the store does not answer."
                }
            ),
        ]
        | UnsetType
    ) = UNSET
    is_head: (
        Annotated[
            bool, Meta(description="Whether the turn is the session's head. Left out if the store does not answer.")
        ]
        | UnsetType
    ) = UNSET
    items: (
        Annotated[
            tuple[TurnItem, ...],
            Meta(
                description="All items of the turn, in order. Only there if it has calls, outputs or system messages."
            ),
        ]
        | UnsetType
    ) = UNSET
    events_deleted: (
        Annotated[
            Literal[True],
            Meta(description="Only there if a part of the reply was deleted, and the turn's events with it."),
        ]
        | UnsetType
    ) = UNSET
    stored: (
        Annotated[
            Literal[False],
            Meta(description="Only there if the turn has ended and the store has not stored its end yet."),
        ]
        | UnsetType
    ) = UNSET

    @classmethod
    def of(cls, record: TurnRecord, places: Places | None = None) -> Self:
        siblings = places.siblings.get(record.id) if places is not None else None
        return cls(
            id=record.id,
            session_id=public_id(record.session_id),
            parent=record.parent,
            state=record.state,
            reason=record.reason,
            error=record.error,
            model=record.model,
            input=record.input_text,
            text=record.text,
            finish_reason=record.finish_reason,
            usage=record.usage,
            left_out=record.left_out,
            created_at=record.created_at,
            started_at=record.started_at,
            ended_at=record.ended_at,
            siblings=UNSET if siblings is None else siblings,
            is_head=UNSET if places is None or siblings is None else places.head == record.id,
            items=tuple(map(_item_of, (*record.input, *record.output))) if _shows_items(record) else UNSET,
            events_deleted=True if record.events_deleted else UNSET,
            stored=UNSET if record.stored else False,
        )


class TurnsQuery(PageQuery, frozen=True, kw_only=True):
    """``?parent=turn_0a…&limit=50``: the turns that follow this turn; with ``null`` the first turns."""

    parent: (
        Annotated[
            str, Meta(pattern=PARENT_PATTERN, description="Only the turns with this parent; `null`: without one.")
        ]
        | UnsetType
    ) = UNSET


class TreeQuery(Query, frozen=True, kw_only=True):
    """``?limit=1000``"""

    limit: Annotated[int, Meta(ge=1, le=1000, description="At most this many turns on a page.")] = 100
    after: After | UnsetType = UNSET


class TreeTurn(msgspec.Struct, frozen=True, kw_only=True):
    """``{"id": "turn_0a…", "parent": null, "state": "completed", "created_at": "2026-01-31T09:30:00Z",
    "ended_at": "2026-01-31T09:30:01Z"}``"""

    id: str
    parent: str | None
    state: TurnState
    created_at: Time
    ended_at: Time | None

    @classmethod
    def of(cls, node: TreeNode) -> Self:
        return cls(id=node.id, parent=node.parent, state=node.state, created_at=node.created_at, ended_at=node.ended_at)


class TurnTree(msgspec.Struct, frozen=True, kw_only=True):
    """``{"data": [{"id": "turn_0a…", "parent": null, …}], "next": null}``: in the order of acceptance."""

    data: tuple[TreeTurn, ...]
    next: str | None


class TurnQuery(Query, frozen=True, kw_only=True):
    """``?wait=30``: the turn when it ends, or as it stands after 30 seconds."""

    wait: Annotated[
        int,
        Meta(ge=0, le=60, description="Seconds to wait for the turn's end; with 0 the answer comes at once."),
    ] = 0


def _shows_items(record: TurnRecord) -> bool:
    """Whether ``input`` and ``text`` do not say all about a turn: it has calls, or an input that is not only texts of
    the user."""
    return record.has_calls or any(item.role != "user" for item in record.input)


class TurnList(msgspec.Struct, frozen=True, kw_only=True):
    """``{"data": [{"id": "turn_0a…", …}], "next": null}``: oldest first."""

    data: tuple[Turn, ...]
    next: str | None

    @classmethod
    def of(cls, page: Page[msgspec.Raw]) -> Self:
        return cls(data=cast("tuple[Turn, ...]", page.data), next=page.next)


class Chat(RequestBody, frozen=True, kw_only=True):
    """``{"message": "Hi", "session_id": "me", "on_disconnect": "continue"}``"""

    message: Text
    session_id: Annotated[
        SessionId | None, Meta(description="Created if it does not exist; if left out, a new session is created.")
    ] = None
    on_disconnect: Annotated[
        OnDisconnect, Meta(description="What happens when no client streams the turn any more.")
    ] = "cancel"
