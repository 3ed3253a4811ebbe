"""Calls about sessions and the messages on their path."""

from functools import partial

import msgspec
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, encoded_response, json_response, no_content
from service.api.http.callers import listed_owner, owner_of_new
from service.api.http.held_bytes import room_for_answer
from service.api.http.idempotency_keys import read_key
from service.api.http.locations import session_path, turn_path
from service.api.http.long_json import encode_json
from service.api.http.operations import Answer, operation
from service.api.http.paging import read_page
from service.api.http.preconditions import etag_of, read_if_match
from service.api.http.proxy import allow_longer_answer, is_from_peer
from service.api.http.query_params import read_query
from service.api.http.request_body import drop_body, read_body
from service.api.native.message_wire import AddedMessages, AddMessages, Message, MessageList
from service.api.native.new_items import added_items
from service.api.native.paging_wire import PageQuery
from service.api.native.session_wire import (
    CreateSession,
    ForkSession,
    Session,
    SessionList,
    SessionsQuery,
    UpdateSession,
)
from service.errors import (
    HeadMovedError,
    InvalidRequestError,
    ItemNotFoundError,
    PreconditionFailedError,
    SessionExistsError,
    SessionLimitError,
    SessionNotFoundError,
    ShuttingDownError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.ids import is_item_id, is_session_id, public_id
from service.sessions.commands import NewItems, NewSession
from service.storage.records import SessionPatch

blueprint = Blueprint("sessions", __name__)

_LED_BY_ID = tuple(
    (name, {"session_id": "$response.body#/id"})
    for name in (
        *("get_session", "update_session", "delete_session", "fork_session"),
        *("list_messages", "add_messages", "start_turn", "list_turns"),
    )
)


def checked_session_id(session_id: str) -> str:
    """Return a path's id of valid form; :func:`~service.api.http.callers.admit` has made it a scoped one.

    Raises: SessionNotFoundError, because no session has an id of another form.
    """
    if not is_session_id(public_id(session_id)):
        raise SessionNotFoundError(public_id(session_id)[:128])
    return session_id


@blueprint.post("/sessions")
@operation(
    id="create_session",
    keyed=True,
    body=CreateSession,
    answers=(
        Answer(
            status=201,
            description="The new session.",
            body=Session,
            located="The new session.",
            tagged=True,
            links=_LED_BY_ID,
        ),
    ),
    errors=(SessionExistsError, SessionLimitError, ShuttingDownError),
)
async def create_session() -> TrioResponse:
    """Create a session.

    All fields are optional: `{}` creates a session with a new id. A session expires when it has not been used for
    `idle_timeout_s`. Accepting a turn, the end of a turn and PATCH count as use; reading does not.
    """
    service = current_service()
    body = await read_body(request, CreateSession, service)
    new = NewSession(**msgspec.structs.asdict(body) | {"owner": owner_of_new(body.owner)})
    record = await service.sessions.create_session(new, key=read_key(body))
    return json_response(Session.of(record), 201, location=session_path(record.id), etag=etag_of(record))


@blueprint.get("/sessions")
@operation(
    id="list_sessions",
    query=SessionsQuery,
    answers=(Answer(status=200, description="A page of sessions.", body=SessionList),),
)
async def list_sessions() -> TrioResponse:
    """List sessions, newest first.

    A session that exists from the first page to the last one is on exactly one page.

    With `q` only sessions with all of its words, in the title or in the messages of one ended turn; words are whole,
    and their case does not matter. Each session comes once, with the newest `match`: the newest match first. With
    `metadata.key=value`, which may be there several times, only sessions with these pairs. A page that takes too long
    is `partial`, perhaps empty, and `next` goes on where it ended.
    """
    query = read_query(request, SessionsQuery)
    is_filtered = bool(query.q or query.metadata)
    if is_filtered and query.count:
        raise InvalidRequestError("Sessions are not counted with `q` or `metadata`.", field="count")
    sessions = current_service().sessions
    status, owner = query.status or None, listed_owner()
    if query.q:
        search = partial(sessions.search_sessions, query.q, status=status, owner=owner, metadata=query.metadata)
        page = await read_page(search, Session.of_match, limit=query.limit, after=query.after or None)
    else:
        listing = partial(sessions.list_sessions, status=status, owner=owner, metadata=query.metadata)
        page = await read_page(listing, Session.of, limit=query.limit, after=query.after or None)
    count = await sessions.count_sessions(status=status, owner=owner) if query.count else msgspec.UNSET
    return json_response(SessionList.of(page, count=count, partial=page.partial if is_filtered else msgspec.UNSET))


@blueprint.get("/sessions/<session_id>")
@operation(
    id="get_session",
    answers=(Answer(status=200, description="The session.", body=Session, tagged=True),),
    errors=(SessionNotFoundError,),
)
async def get_session(session_id: str) -> TrioResponse:
    """Get a session. Reading does not keep it from expiring.

    The `ETag` is for `If-Match`, and stands for what PATCH can change, besides `head`. It does not change with `head`,
    times, counts, `status` and `usage`, so that a turn which ends makes no `If-Match` fail. A title that a model writes
    after the session's first turn (`title_model`) does change it. Since it does not stand for the whole answer,
    `If-None-Match` has no effect here.
    """
    record = await current_service().sessions.get_session(checked_session_id(session_id))
    return json_response(Session.of(record), etag=etag_of(record))


@blueprint.patch("/sessions/<session_id>")
@operation(
    id="update_session",
    body=UpdateSession,
    preconditions=(("If-Match", "`ETag`s that were received: the session is changed only if it has one of them."),),
    answers=(Answer(status=200, description="The session as it is now.", body=Session, tagged=True),),
    errors=(SessionNotFoundError, TurnInProgressError, HeadMovedError, PreconditionFailedError),
)
async def update_session(session_id: str) -> TrioResponse:
    """Change a session and move its expiry.

    Fields that are left out do not change; null clears `title`, `model`, `system_message`, `temperature` and
    `max_output_tokens`. `metadata` is replaced as a whole.

    `head` chooses the branch that the session shows, and that the next turn follows: any turn of the session, or null
    to begin anew. While a turn runs on the path to this turn, or to the head so far, the answer is 409
    `turn_in_progress`. With `seen_head` all changes depend on the head that the client saw: 409 `head_moved` if another
    client was faster.

    With `If-Match` the session is changed only if nothing else that PATCH can change has changed since its `ETag` was
    received: otherwise the answer is 412 `precondition_failed`, with the `ETag` that the session has now. The `ETag`
    does not cover `head`, which each turn moves.
    """
    session_id = checked_session_id(session_id)
    service = current_service()
    body = await read_body(request, UpdateSession, service)
    patch = SessionPatch(**msgspec.structs.asdict(body))
    try:
        record = await service.sessions.update_session(session_id, patch, revisions=read_if_match())
    except TurnNotFoundError as error:
        raise InvalidRequestError(str(error), field="head") from None
    return json_response(Session.of(record), etag=etag_of(record))


@blueprint.delete("/sessions/<session_id>")
@operation(
    id="delete_session",
    preconditions=(("If-Match", "`ETag`s that were received: the session is deleted only if it has one of them."),),
    answers=(Answer(status=204, description="The session, its turns and their events are gone."),),
    errors=(SessionNotFoundError, PreconditionFailedError),
)
async def delete_session(session_id: str) -> TrioResponse:
    """Delete a session.

    For all callers the session is gone at once; its turns end as `cancelled` (`session_deleted`). The deletion
    completes even if the caller leaves. A second call during the deletion waits and gets 204 too, also with another
    `If-Match`. With `If-Match` the session is deleted only if it has one of these `ETag`s.
    """
    service = current_service()
    allow_longer_answer(by_s=service.settings.cleanup_timeout_s + service.settings.store_timeout_s)
    await service.sessions.delete_session(checked_session_id(session_id), revisions=read_if_match())
    return no_content()


@blueprint.post("/sessions/<session_id>/fork")
@operation(
    id="fork_session",
    keyed=True,
    body=ForkSession,
    answers=(
        Answer(
            status=201,
            description="The copy.",
            body=Session,
            located="The new session.",
            tagged=True,
            links=_LED_BY_ID,
        ),
    ),
    errors=(
        *(SessionNotFoundError, SessionExistsError, TurnInProgressError),
        *(SessionLimitError, ShuttingDownError),
    ),
)
async def fork_session(session_id: str) -> TrioResponse:
    """Fork a session: create one with its settings and a copy of its conversation.

    The fork copies the turns on the path from the first one to `at`, with their events, and gives them new ids. These
    turns must have ended. Afterwards the two sessions are independent.
    """
    session_id = checked_session_id(session_id)
    service = current_service()
    body = await read_body(request, ForkSession, service)
    try:
        record = await service.sessions.fork_session(
            session_id, at=body.at, copy_id=body.id, for_peer=is_from_peer(), key=read_key(body)
        )
    except TurnNotFoundError as error:
        raise InvalidRequestError(str(error), field="at") from None
    return json_response(Session.of(record), 201, location=session_path(record.id), etag=etag_of(record))


@blueprint.get("/sessions/<session_id>/messages")
@operation(
    id="list_messages",
    query=PageQuery,
    answers=(Answer(status=200, description="A page of messages.", body=MessageList),),
    errors=(SessionNotFoundError,),
)
async def list_messages(session_id: str) -> TrioResponse:
    """List the messages on the path from the first turn to the head, oldest first."""
    session_id = checked_session_id(session_id)
    query = read_query(request, PageQuery)
    listing = partial(current_service().sessions.list_messages, session_id)
    page = await read_page(listing, Message.of, limit=query.limit, after=query.after or None)
    return json_response(MessageList.of(page))


@blueprint.post("/sessions/<session_id>/messages")
@operation(
    id="add_messages",
    keyed=True,
    body=AddMessages,
    answers=(
        Answer(
            status=201, description="The new turns.", body=AddedMessages, located="The last one, which is the head."
        ),
    ),
    errors=(SessionNotFoundError, TurnInProgressError, ShuttingDownError),
)
async def add_messages(session_id: str) -> TrioResponse:
    """Add messages, calls and results to a conversation, without asking a model.

    The items become turns that are complete at once: a question and its answer are one turn, so a whole conversation
    is a chain of turns. All of them are added, or none. The last turn becomes the head.
    A conversation that is too long for one call may come in several, each of which follows the one before.

    The events of such a turn can be read as those of others. Its `started_at` is null, because no model was asked.
    """
    session_id = checked_session_id(session_id)
    service = current_service()
    body = await read_body(request, AddMessages, service)
    new = NewItems(items=added_items(body.items, settings=service.settings), parent=body.parent, key=read_key(body))
    allow_longer_answer(by_s=service.settings.store_timeout_s)
    try:
        turns = await service.sessions.add_items(session_id, new)
    except TurnNotFoundError as error:
        raise InvalidRequestError(str(error), field="parent") from None
    drop_body(request)
    added = AddedMessages.of(turns)
    with room_for_answer(sum([len(message.text) for message in added.messages])):
        encoded = await encode_json(added)
    return encoded_response(encoded, 201, location=turn_path(session_id, turns[-1].id))


@blueprint.delete("/sessions/<session_id>/messages/<item_id>")
@operation(
    id="delete_message",
    answers=(Answer(status=204, description="The message is gone, and so are the results of a call."),),
    errors=(SessionNotFoundError, ItemNotFoundError, TurnInProgressError),
)
async def delete_message(session_id: str, item_id: str) -> TrioResponse:
    """Delete a message, a call or a result from its turn, also on another branch, and reasoning by its id.

    The results of a call are deleted with the call. A result that is deleted leaves its call, which is told to the
    model as not answered. If a part of a reply is deleted, the events of its turn are deleted, too: a replay is 410
    `events_deleted`. Neither the turn nor one that follows it may be open. The turn stays, even without items.
    """
    service = current_service()
    allow_longer_answer(by_s=service.settings.store_timeout_s)
    await service.sessions.delete_item(checked_session_id(session_id), checked_item_id(item_id))
    return no_content()


def checked_item_id(item_id: str) -> str:
    """Return an id of valid form. Raises: ItemNotFoundError, because no item has an id of another form."""
    if not is_item_id(item_id):
        raise ItemNotFoundError(item_id[:128])
    return item_id
