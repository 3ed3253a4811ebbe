"""Calls about conversations, which are sessions, and about the items on the path to the newest response."""

from collections.abc import Sequence
from typing import cast

import msgspec
import trio
from msgspec import UNSET
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, encoded_response, json_response
from service.api.http.callers import current_owner
from service.api.http.held_bytes import room_for_answer
from service.api.http.idempotency_keys import read_key
from service.api.http.long_json import encode_json
from service.api.http.operations import Answer, operation
from service.api.http.paging import PAGE_BYTES_MAX
from service.api.http.proxy import allow_longer_answer
from service.api.http.query_params import read_query
from service.api.http.request_body import drop_body, read_body
from service.api.http.strict_json import InputTooLargeError
from service.api.openai.conversation_wire import (
    Conversation,
    ConversationDeleted,
    CreateConversation,
    CreateItems,
    ItemQuery,
    ItemsQuery,
    UpdateConversation,
    shown_placed,
)
from service.api.openai.echo import Echo
from service.api.openai.errors import ConversationNotFoundError, ParameterError, not_done_twice
from service.api.openai.ids import item_id_of, public_session_id_of
from service.api.openai.ids import item_name as name_of_item
from service.api.openai.items import ItemList, ShownItem, namespaces_in, read_items
from service.errors import (
    ItemNotFoundError,
    SessionLimitError,
    SessionNotFoundError,
    ShuttingDownError,
    TurnInProgressError,
)
from service.ids import scoped
from service.sessions.commands import NewItems, NewSession, is_callers
from service.sessions.items import PlacedItem, placed_items
from service.settings import Settings
from service.storage.records import IdempotencyKey, SessionPatch
from service.supervisor import Service

blueprint = Blueprint("conversations", __name__)

_PATH = "/v1/conversations"
_LED_BY_ID = tuple(
    (name, {"conversation_id": "$response.body#/id"})
    for name in (
        *("get_conversation", "update_conversation", "delete_conversation"),
        *("create_conversation_items", "list_conversation_items"),
    )
)
_LED_TO_ITEM = tuple(
    (name, {"conversation_id": "$request.path.conversation_id", "item_name": "$response.body#/first_id"})
    for name in ("get_conversation_item", "delete_conversation_item")
)


@blueprint.post(_PATH)
@operation(
    id="create_conversation",
    keyed=True,
    body=CreateConversation,
    answers=(Answer(status=200, description="The new conversation.", body=Conversation, links=_LED_BY_ID),),
    errors=(SessionLimitError, ShuttingDownError),
)
async def create_conversation() -> TrioResponse:
    """Create a conversation, perhaps with items: with all of them, or not at all.

    A conversation is a session: the native API shows it as `sess_…` with the same digits. It expires when it has not
    been used for `default_idle_timeout_s`.
    """
    service = current_service()
    body = await read_body(request, CreateConversation, service)
    beginning = _new_items(body.items, service.settings, key=None) if body.items else None
    key = read_key(body)
    new = NewSession(owner=current_owner(), metadata=body.metadata or {})
    return json_response(Conversation.of(await service.sessions.create_session(new, beginning=beginning, key=key)))


@blueprint.get(f"{_PATH}/<conversation_id>")
@operation(
    id="get_conversation",
    answers=(Answer(status=200, description="The conversation.", body=Conversation),),
    errors=(SessionNotFoundError,),
)
async def get_conversation(conversation_id: str) -> TrioResponse:
    """Get a conversation. Every session of the caller is one, under its name here."""
    session = await current_service().sessions.get_session(session_of(conversation_id))
    return json_response(Conversation.of(session))


@blueprint.post(f"{_PATH}/<conversation_id>")
@operation(
    id="update_conversation",
    body=UpdateConversation,
    answers=(Answer(status=200, description="The conversation as it is now.", body=Conversation),),
    errors=(SessionNotFoundError,),
)
async def update_conversation(conversation_id: str) -> TrioResponse:
    """Replace the metadata of a conversation, and move its expiry."""
    service = current_service()
    body = await read_body(request, UpdateConversation, service)
    patch = SessionPatch(metadata=body.metadata or {})
    return json_response(Conversation.of(await service.sessions.update_session(session_of(conversation_id), patch)))


@blueprint.delete(f"{_PATH}/<conversation_id>")
@operation(
    id="delete_conversation",
    answers=(Answer(status=200, description="The conversation is gone.", body=ConversationDeleted),),
    errors=(SessionNotFoundError,),
)
async def delete_conversation(conversation_id: str) -> TrioResponse:
    """Delete a conversation, with its items and its responses. A response that is in progress is cancelled."""
    service = current_service()
    session_id = session_of(conversation_id)
    allow_longer_answer(by_s=service.settings.cleanup_timeout_s + service.settings.store_timeout_s)
    await service.sessions.delete_session(session_id)
    return json_response(ConversationDeleted(id=conversation_id))


@blueprint.post(f"{_PATH}/<conversation_id>/items")
@operation(
    id="create_conversation_items",
    keyed=True,
    body=CreateItems,
    query=ItemQuery,
    answers=(Answer(status=200, description="The new items.", body=ItemList, links=_LED_TO_ITEM),),
    errors=(SessionNotFoundError, TurnInProgressError, ShuttingDownError),
)
async def create_conversation_items(conversation_id: str) -> TrioResponse:
    """Add items to a conversation, without asking a model: all of them, or none.

    They get new ids. While a response of the conversation is queued or in progress the answer is 400
    `conversation_locked`.
    """
    service = current_service()
    session_id = session_of(conversation_id)
    query = read_query(request, ItemQuery)
    body = await read_body(request, CreateItems, service)
    new = _new_items(body.items, service.settings, key=read_key(body))
    allow_longer_answer(by_s=service.settings.store_timeout_s)
    with not_done_twice(new.key):
        turns = await service.sessions.add_items(session_id, new)
    drop_body(request)
    added = [placed for turn in turns for placed in placed_items(turn)]
    with room_for_answer(sum([len(placed.item.text) for placed in added])):
        return encoded_response(await _encoded(added, has_more=False, query=query, bytes_max=None))


@blueprint.get(f"{_PATH}/<conversation_id>/items")
@operation(
    id="list_conversation_items",
    query=ItemsQuery,
    answers=(Answer(status=200, description="A page of items.", body=ItemList),),
    errors=(SessionNotFoundError,),
)
async def list_conversation_items(conversation_id: str) -> TrioResponse:
    """List the items of a conversation, newest first: those on the path from the first turn to the head.

    The input of a response is there from its beginning, and its output from its end. A page has at most 1 MiB of items.
    """
    session_id = session_of(conversation_id)
    query = read_query(request, ItemsQuery)
    with room_for_answer(PAGE_BYTES_MAX):
        page = await current_service().sessions.list_items(
            session_id,
            limit=query.limit,
            after=item_id_of(query.after) or query.after if query.after else None,
            newest_first=query.order == "desc",
            bytes_max=PAGE_BYTES_MAX,
        )
        encoded = await _encoded(page.data, has_more=page.has_more, query=query, bytes_max=PAGE_BYTES_MAX)
    return encoded_response(encoded)


@blueprint.get(f"{_PATH}/<conversation_id>/items/<item_name>")
@operation(
    id="get_conversation_item",
    query=ItemQuery,
    answers=(Answer(status=200, description="The item.", body=ShownItem),),
    errors=(SessionNotFoundError, ItemNotFoundError),
)
async def get_conversation_item(conversation_id: str, item_name: str) -> TrioResponse:
    """Get an item of a conversation, also one that is on another branch."""
    session_id = session_of(conversation_id)
    query = read_query(request, ItemQuery)
    placed = await _find_item(current_service(), session_id, item_name)
    with room_for_answer(len(placed.item.text)):
        encoded = await encode_json(shown_placed(placed, encrypted=query.includes_encrypted))
    return encoded_response(encoded)


@blueprint.delete(f"{_PATH}/<conversation_id>/items/<item_name>")
@operation(
    id="delete_conversation_item",
    answers=(Answer(status=200, description="The conversation, without the item.", body=Conversation),),
    errors=(SessionNotFoundError, ItemNotFoundError, TurnInProgressError),
)
async def delete_conversation_item(conversation_id: str, item_name: str) -> TrioResponse:
    """Delete an item of a conversation.

    The outputs of a call are deleted with the call. Of a response whose output loses an item no events are left, so it
    can be got, and not streamed. While the item's response, or one that follows it, is queued or in progress the answer
    is 400 `conversation_locked`.
    """
    service = current_service()
    session_id = session_of(conversation_id)
    allow_longer_answer(by_s=service.settings.store_timeout_s)
    placed = await _find_item(service, session_id, item_name)
    await service.sessions.delete_item(session_id, placed.item.id)
    return json_response(Conversation.of(await service.sessions.get_session(session_id)))


def session_of(name: str) -> str:
    """The id of the session that a conversation is. Raises: ConversationNotFoundError, if no id has this form."""
    public = public_session_id_of(name)
    if public is None:
        raise ConversationNotFoundError(name)
    return scoped(current_owner(), public)


async def _find_item(service: Service, session_id: str, name: str) -> PlacedItem:
    """Raises: SessionNotFoundError, ItemNotFoundError."""
    item_id = item_id_of(name)
    if item_id is not None:
        try:
            placed = await service.sessions.find_item(session_id, item_id)
        except ItemNotFoundError:
            pass
        else:
            if name_of_item(placed.item) == name:  # a message and reasoning may have the same digits
                return placed
    else:
        await service.sessions.get_session(session_id)
    raise ItemNotFoundError(name[:128])


def _new_items(told: Sequence[object], settings: Settings, *, key: IdempotencyKey | None) -> NewItems:
    """The items that a caller adds.

    Raises:
        ParameterError: An item is wrong; two results of one call are beside each other; or no item says anything.
        InputTooLargeError
    """
    items = read_items(told, field="items")
    answered: set[str] = set()
    for item in items:
        bound = "input_bytes_max" if is_callers(item) else "reply_bytes_max"
        bytes_max: int = getattr(settings, bound)
        if item.prompt_bytes > bytes_max:
            raise InputTooLargeError(
                f"An item has {item.prompt_bytes} bytes of UTF-8; at most {bytes_max} are taken ({bound}).",
                field="items",
            )
        if not is_callers(item):
            answered.clear()
        elif item.call_id in answered:
            raise ParameterError(f"There is a second output of the call {item.call_id!r}.", param="items")
        elif item.call_id:
            answered.add(item.call_id)
    if not items:
        raise ParameterError("No item has a text, reasoning, a call or an output.", param="items")
    namespaces = namespaces_in(told)
    face = Echo(conversation=True, namespaces=namespaces).face() if namespaces else UNSET
    return NewItems(items=items, face=face, key=key)


async def _encoded(placed: Sequence[PlacedItem], *, has_more: bool, query: ItemQuery, bytes_max: int | None) -> bytes:
    """A page as JSON: the first ``bytes_max`` bytes of these items, but one at least."""
    rows: list[msgspec.Raw] = []
    size = 0
    for item in placed:
        row = await encode_json(shown_placed(item, encrypted=query.includes_encrypted))
        size += len(row)
        if rows and bytes_max is not None and size > bytes_max:
            has_more = True
            break
        rows.append(msgspec.Raw(row))
        await trio.lowlevel.checkpoint()
    shown = [it.item for it in placed[: len(rows)]]
    return msgspec.json.encode(ItemList.of(shown, cast("tuple[ShownItem, ...]", tuple(rows)), has_more=has_more))
