"""The bodies and query strings of calls about conversations, and the bodies of their answers."""

from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import Limit, Metadata, Query, RequestBody
from service.api.openai.echo import Echo
from service.api.openai.ids import conversation_id
from service.api.openai.items import ItemStatus, ShownItem, shown_item, status_of
from service.api.openai.requests import Includable
from service.ids import public_id
from service.sessions.items import PlacedItem
from service.storage.records import SessionRecord

ADDED_MAX = 20
"""How many items one call adds to a conversation: OpenAI's bound."""

_Items = Annotated[tuple[dict[str, Any], ...], Meta(max_length=ADDED_MAX, description="Oldest first.")]


class CreateConversation(RequestBody, frozen=True, kw_only=True):
    """``{"metadata": {"topic": "demo"}, "items": [{"type": "message", "role": "user", "content": "Hi"}]}``"""

    bounds_each: ClassVar[bool] = True
    may_be_left_out: ClassVar[bool] = True

    items: _Items | None = None
    metadata: Metadata | None = None


class UpdateConversation(RequestBody, frozen=True, kw_only=True):
    """``{"metadata": {"topic": "demo"}}``: replaces all pairs; null removes them."""

    metadata: Metadata | None


class CreateItems(RequestBody, frozen=True, kw_only=True):
    """``{"items": [{"type": "message", "role": "user", "content": "Hi"}]}``"""

    bounds_each: ClassVar[bool] = True

    items: Annotated[_Items, Meta(min_length=1)]


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation.

    ``{"id": "conv_6f0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a", "object": "conversation", "created_at": 1769851800,
    "metadata": {"topic": "demo"}}``
    """

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]

    @classmethod
    def of(cls, session: SessionRecord) -> Self:
        return cls(
            id=conversation_id(public_id(session.id)),
            created_at=int(session.created_at.timestamp()),
            metadata=session.metadata,
        )


class ConversationDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """``{"id": "conv_6f0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a", "object": "conversation.deleted", "deleted": true}``"""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True


class ItemQuery(Query, frozen=True, kw_only=True):
    """``?include=reasoning.encrypted_content``"""

    include: Annotated[
        tuple[Includable, ...],
        Meta(max_length=16, description="`reasoning.encrypted_content` has an effect; nothing else is ever there."),
    ] = ()

    @property
    def includes_encrypted(self) -> bool:
        return "reasoning.encrypted_content" in self.include


class ItemsQuery(ItemQuery, frozen=True, kw_only=True):
    """``?limit=50&order=asc&after=msg_9c…``"""

    limit: Limit = 20
    order: Annotated[Literal["asc", "desc"], Meta(description="Oldest or newest first.")] = "desc"
    after: (
        Annotated[str, Meta(max_length=128, description="The id of an item: the page begins after it.")] | UnsetType
    ) = UNSET


def shown_placed(placed: PlacedItem, *, encrypted: bool) -> ShownItem:
    """An item as it is shown, by what became of its turn.

    Args:
        encrypted: Whether encrypted reasoning is shown, as ``include`` asks for it.
    """
    turn = placed.turn
    place = next((index for index, item in enumerate(turn.output) if item.id == placed.item.id), None)
    if place is None:
        status: ItemStatus = "completed"
    else:
        is_whole = turn.state == "completed" and turn.finish_reason in ("stop", "tool_calls")
        status = status_of(turn.output, place, is_open=turn.is_open, is_whole=is_whole)
    return shown_item(placed.item, status=status, namespaces=Echo.of_face(turn.face).namespaces, encrypted=encrypted)
