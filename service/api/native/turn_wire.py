"""The answers and queries of calls about turns, each with one example."""

from typing import Annotated, Literal, Self, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import PARENT_PATTERN, Query
from service.api.native.paging_wire import After, PageQuery, Time
from service.ids import public_id
from service.models.client import FinishReason, Role, Usage
from service.storage.records import (
    EndReason,
    Failure,
    Item,
    LeftOut,
    Page,
    Places,
    Siblings,
    TreeNode,
    TurnRecord,
    TurnState,
)


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
    on_interrupt: (
        Annotated[
            Literal["retry", "continue"],
            Meta(description="Only there if the turn goes on after a stop or a crash of its process."),
        ]
        | UnsetType
    ) = UNSET
    attempt: (
        Annotated[
            int,
            Meta(description="How many processes have run the turn so far. Only there with `on_interrupt`."),
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
            on_interrupt=UNSET if record.on_interrupt == "fail" else record.on_interrupt,
            attempt=UNSET if record.on_interrupt == "fail" else record.attempt,
            stored=UNSET if record.stored else False,
        )


def _shows_items(record: TurnRecord) -> bool:
    """Whether ``input`` and ``text`` do not say all about a turn: it has calls, or an input that is not only texts of
    the user."""
    return record.has_calls or any(item.role != "user" for item in record.input)


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


class TurnList(msgspec.Struct, frozen=True, kw_only=True):
    """``{"data": [{"id": "turn_0a…", …}], "next": null}``: oldest first."""

    data: tuple[Turn, ...]
    next: str | None

    @classmethod
    def of(cls, page: Page[msgspec.Raw]) -> Self:
        return cls(data=cast("tuple[Turn, ...]", page.data), next=page.next)
