"""The calls of ``/v1/responses``. A response is a turn, and ``previous_response_id`` its parent."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, encoded_response, json_response
from service.api.http.callers import current_caller, current_owner
from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.event_stream import HEADERS, MEDIA_TYPE, stream_face
from service.api.http.face_frames import EndedTurn, TurnSource, find_place
from service.api.http.held_bytes import bytes_of, hold_answer, room_for_answer
from service.api.http.idempotency_keys import read_key
from service.api.http.locations import located
from service.api.http.long_json import encode_json
from service.api.http.operations import Answer, operation
from service.api.http.paging import PAGE_BYTES_MAX
from service.api.http.proxy import FaceStream, allow_longer_answer, continue_streams_with, release_later
from service.api.http.query_params import read_query
from service.api.http.repeats import allow_repeat
from service.api.http.request_body import read_body
from service.api.http.request_id import current_request_id
from service.api.http.turn_answers import FoundTurn, answer_made, answer_new, take_slot
from service.api.http.wire_types import Limit, Query
from service.api.openai.echo import Echo
from service.api.openai.errors import (
    ConversationLockedError,
    ConversationNotFoundError,
    ParameterError,
    PreviousResponseNotFoundError,
    PreviousResponseOpenError,
    ResponseNotFoundError,
    not_done_twice,
    response_path,
)
from service.api.openai.failures import RESPONSE_PARAMS, EndErrorBody, end_response
from service.api.openai.ids import item_id_of, public_session_id_of, response_id, turn_id_of
from service.api.openai.items import ItemList, shown_item
from service.api.openai.references import Found, References, find_own_session, references_in
from service.api.openai.requests import CreateResponse, Includable, read_request, turn_of
from service.api.openai.response import Response, response_of
from service.api.openai.response_events import CUT, DONE, ResponseFace
from service.errors import (
    BranchLimitError,
    EventsDeletedError,
    InvalidRequestError,
    OwnedElsewhereError,
    OwnerHangsError,
    RefusedError,
    RepeatedError,
    SessionLimitError,
    SessionNotFoundError,
    ShuttingDownError,
    StreamLimitError,
    TurnEndingError,
    TurnInProgressError,
    TurnLimitError,
    TurnMovedError,
    TurnNotFoundError,
)
from service.ids import new_session_id, public_id, scoped
from service.sessions.commands import NewTurn
from service.sessions.events.streams import StreamSlot
from service.steps import in_steps
from service.storage.records import Item, Places, TurnRecord
from service.supervisor import Service

blueprint = Blueprint("responses", __name__)

_IN_PATH = re.compile(r"/v1/responses/(resp_[0-9a-f]{32})(?:/|$)")
_NOT_FOUND = (SessionNotFoundError, TurnNotFoundError)
_SEQUENCE_MAX = 1 << 33
_ENCRYPTED: Includable = "reasoning.encrypted_content"
_LED_BY_ID = tuple(
    (name, {"response_id": "$response.body#/id"})
    for name in ("get_response", "cancel_response", "list_input_items", "delete_response")
)
EVENTS = (
    "The events of the response: `response.created`, `response.in_progress`, those of its items, and one of "
    "`response.completed`, `response.incomplete` and `response.failed`; after a reply that was cut an `error`, which "
    "clients raise; then `[DONE]`."
)
StartingAfter = Annotated[
    int, Meta(ge=0, le=_SEQUENCE_MAX, description="With `stream`: the sequence number that was seen last.")
]


class RetrieveQuery(Query, frozen=True, kw_only=True):
    """``?stream=true&starting_after=41``"""

    stream: bool = False
    starting_after: StartingAfter | UnsetType = UNSET
    include: Annotated[tuple[Includable, ...], Meta(description="Encrypted reasoning, if it is among these.")] = ()
    include_obfuscation: Annotated[bool, Meta(description="Accepted without effect.")] = False


class InputItemsQuery(Query, frozen=True, kw_only=True):
    """``?limit=20&order=asc``"""

    limit: Limit = 20
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, Meta(max_length=128, description="The id of the last item of the page before.")] = ""
    include: Annotated[tuple[Includable, ...], Meta(description="Encrypted reasoning, if it is among these.")] = ()


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """``{"id": "resp_0a…", "object": "response", "deleted": true}``"""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class _Responses:
    """How this API shows turns: a :class:`~service.api.http.turn_answers.TurnFace`.

    Args:
        waits: Whether the client waits for the end without a stream, so that a failure is an error of HTTP.
        seen: How many frames the client has seen.
        follows_conversation: Whether the request named a conversation.
        encrypted: Whether encrypted reasoning is shown, though the request of the response did not ask for it.
    """

    def __init__(
        self, *, waits: bool = False, seen: int = 0, follows_conversation: bool = False, encrypted: bool = False
    ) -> None:
        self._waits = waits
        self._seen = seen
        self._follows_conversation = follows_conversation
        self._encrypted = encrypted

    def path(self, session_id: str, turn_id: str) -> str:  # noqa: ARG002  the path has the turn alone
        return response_path(turn_id)

    def continue_streams(self) -> None:
        sessions = current_service().sessions

        async def find_turn(path: str) -> tuple[str, str]:
            found = _IN_PATH.search(path)  # after the prefix of a proxy
            assert found is not None
            turn_id = turn_id_of(found[1]) or ""
            return await sessions.find_session_of(turn_id), turn_id

        held = bytes_of(request.scope)
        bytes_max = current_service().settings.held_bytes_max

        def face_of(turn: TurnSource) -> ResponseFace:
            if isinstance(turn, EndedTurn):
                held.add(_held_by(turn, bytes_max))  # never refused: the stream has begun
            return ResponseFace(turn, encrypted=self._encrypted)

        continue_streams_with(FaceStream(face_of, find_turn, seen=self._seen, end=(DONE, CUT), cut=CUT))

    async def stream(self, opened: FoundTurn, slot: StreamSlot, *, after: int) -> TrioResponse:  # noqa: ARG002
        """The events after the frames that the client has seen; ``after`` is always 0.

        Raises:
            ParameterError: The response has no frame with the number that the client has seen last, or not any more.
        """
        source = await _source_of(opened)
        if isinstance(source, EndedTurn):
            hold_answer(_held_by(source, current_service().settings.held_bytes_max))
        face = ResponseFace(source, encrypted=self._encrypted)
        place = await find_place(opened.log, face, seen=self._seen)
        if place.is_beyond:
            raise ParameterError(
                f"The response has no event with the sequence_number {self._seen - 1}; send the last one seen.",
                param="starting_after",
            )
        if place.is_lost:
            raise ParameterError(
                "A restart or a crash of the server has cut the response, and its text goes on from an earlier place: "
                "leave starting_after out, and read it from the beginning.",
                param="starting_after",
                code="response_restarted",
            )
        return stream_face(opened.log, slot, face=face, place=place, cut=CUT)

    async def show(
        self,
        service: Service,  # noqa: ARG002
        record: TurnRecord,
        status: int = 200,  # noqa: ARG002  an accepted response is 200, too
        *,
        with_location: bool = False,
        places: Places | None = None,  # noqa: ARG002
    ) -> TrioResponse:
        if self._waits and record.state != "completed":  # a client would take a part of a reply for the whole
            return self._failure(record)
        location = response_path(record.id) if with_location and not record.ephemeral else None
        length = sum([len(item.text) + len(item.encrypted) + len(item.upstream) for item in record.output])
        with room_for_answer(length):
            encoded = await encode_json(response_of(record, encrypted=self._encrypted))
        return encoded_response(encoded, location=location)

    def _failure(self, record: TurnRecord) -> TrioResponse:
        """The error of HTTP for a response that failed. Sent again, a conversation would have the input twice."""
        response = end_response(record, repeats_input=self._follows_conversation, params=RESPONSE_PARAMS)
        if not record.ephemeral:  # with its end such a response is gone
            response.headers["Location"] = located(response_path(record.id))
        return response


async def _source_of(opened: FoundTurn) -> TurnSource:
    sessions = current_service().sessions
    live = sessions.find_live_turn(opened.session_id, opened.turn_id)
    if live is not None and live.log is opened.log:
        return live
    return EndedTurn(await sessions.get_turn(opened.session_id, opened.turn_id))


def _held_by(turn: EndedTurn, bytes_max: int) -> int:
    """What a stream of an ended response counts: no more than a half of the bound, so that each can be streamed."""
    return min(turn.held_bytes, bytes_max // 2)


@blueprint.post("/v1/responses")
@operation(
    id="create_response",
    keyed=True,
    body=CreateResponse,
    answers=(
        Answer(
            status=200,
            description="The response: ended; accepted (`background`); or its events (`stream`).",
            body=Response,
            streams=True,
            events=EVENTS,
            located="The response.",
            links=_LED_BY_ID,
        ),
        Answer(status=502, description="The model server failed.", body=EndErrorBody),
        Answer(status=504, description="A deadline of the response has passed.", body=EndErrorBody),
    ),
    errors=(
        *(SessionNotFoundError, SessionLimitError, TurnLimitError, BranchLimitError, StreamLimitError),
        *(ShuttingDownError, OwnerHangsError),
    ),
)
async def create_response() -> TrioResponse:
    """Ask a model for a response.

    Without `conversation` and `previous_response_id` a new tree of responses begins. With `previous_response_id` the
    response follows the named one; any number may follow one response, at the same time. With `conversation` it follows
    the newest response of the conversation; while another one is on its way there the answer is 400
    `conversation_locked`. The input is stored before the first byte of the answer; with `store: false` it is kept while
    the response runs.

    When the client leaves, the response is cancelled, unless it is `background`.
    """
    service = current_service()
    body = await read_body(request, CreateResponse, service)
    references = references_in(body.input)
    read = partial(read_request, body, service.settings, hosted=service.settings.hosted_tools)
    asked = None if references else await in_steps(read())
    key = read_key(body)
    streams, background = bool(body.stream), bool(body.background)
    face = _Responses(waits=not (streams or background), follows_conversation=body.conversation is not None)
    refusal: RefusedError
    try:
        session_id, parent, made_session = place = await _place_of(service, body)
        if asked is None:
            asked = await in_steps(read(found=await _find_references(service, references, place, body)))
    except OwnedElsewhereError:
        raise  # its owner answers this
    except RefusedError as error:
        refusal = error.with_traceback(None)  # whose frames have the body
    else:
        new = turn_of(
            body,
            asked,
            parent=parent,
            made_session=made_session,
            request_id=current_request_id(),
            key=key,
            on_interrupt=service.settings.on_interrupt,
        )
        previous, conversation = body.previous_response_id, body.conversation_name
        del body, references, read, asked  # the frame is there until a response that is waited for has ended
        return await _start(
            service, session_id, new, face, streams=streams, previous=previous, conversation=conversation
        )
    del body, references, read, asked
    if key is not None:  # what the request names may have been there when an earlier request with this key has named it
        try:
            await service.sessions.check_key(key)
        except RepeatedError as repeated:
            return await answer_made(service, repeated, face, streams=streams, background=background)
    raise refusal


async def _start(
    service: Service,
    session_id: str,
    new: NewTurn,
    face: _Responses,
    *,
    streams: bool,
    previous: str | None,
    conversation: str | None,
) -> TrioResponse:
    """Start the response, with its refusals in the words of the request.

    Args:
        previous: The ``previous_response_id`` of the request.
        conversation: The name of its conversation.
    """
    try:
        with nullcontext() if conversation is None else not_done_twice(new.key):
            return await answer_new(service, session_id, new, face, streams=streams)
    except TurnInProgressError:
        if previous is not None:
            raise PreviousResponseOpenError(previous) from None
        raise ConversationLockedError(conversation or "") from None
    except SessionNotFoundError:
        if previous is not None:
            raise PreviousResponseNotFoundError(previous) from None
        raise ConversationNotFoundError(conversation or "", param="conversation") from None
    except InvalidRequestError as error:
        if error.field == "parent" and previous is not None:
            raise PreviousResponseNotFoundError(previous) from None
        raise


class _Place(NamedTuple):
    """The place of a new response.

    Attributes:
        session_id: Scoped; a new one for a first response.
        parent: The turn that it follows; None for a first response, UNSET for the head of a conversation.
        made_session: The session's public id if it is made for the new response, or was for one that this follows.
    """

    session_id: str
    parent: str | None | UnsetType
    made_session: str | None


async def _place_of(service: Service, body: CreateResponse) -> _Place:
    """Where a new response goes.

    Raises:
        PreviousResponseNotFoundError, ConversationNotFoundError
    """
    owner = current_owner()
    if body.previous_response_id is not None:
        try:
            session_id, turn_id = await _find(service, body.previous_response_id)
            previous = await _get(service, session_id, turn_id, with_texts=False)
        except TurnNotFoundError:
            raise PreviousResponseNotFoundError(body.previous_response_id) from None
        made_session = public_id(session_id) if _was_made_for(previous) else None
        return _Place(session_id, turn_id, made_session)
    if body.conversation_name is not None:
        public = public_session_id_of(body.conversation_name)
        if public is None:
            raise ConversationNotFoundError(body.conversation_name, param="conversation")
        return _Place(scoped(owner, public), UNSET, None)
    public = new_session_id()
    return _Place(scoped(owner, public), None, public)


async def _find_references(
    service: Service, references: Mapping[str, str], place: _Place, body: CreateResponse
) -> Found:
    """The items to which the input of a request refers.

    Raises:
        PreviousResponseNotFoundError, ConversationNotFoundError, ReferencedItemNotFoundError, ParameterError,
        InputTooLargeError
    """
    allow_longer_answer(by_s=service.settings.store_timeout_s)
    session_id, parent, _ = place
    try:
        followed = None if parent is None else await service.sessions.get_session(session_id)
        head, model = (None, None) if followed is None else (followed.head, followed.model)
        found = References(
            service.sessions,
            None if followed is None else session_id,
            head if parent is UNSET else parent,
            model=body.model or model or service.settings.default_model,
            bytes_max=service.settings.history_bytes,
        )
        return await found.find(references)
    except SessionNotFoundError:
        if body.previous_response_id is not None:
            raise PreviousResponseNotFoundError(body.previous_response_id) from None
        raise ConversationNotFoundError(body.conversation_name or "", param="conversation") from None


def _was_made_for(record: TurnRecord) -> bool:
    """Whether a response's session was made for it, or for one that it follows."""
    return Echo.of_face(record.face).own_session == public_id(record.session_id)


async def _find(service: Service, name: str) -> tuple[str, str]:
    """The ids of a response's session and turn. Raises: ResponseNotFoundError, also for a response of another owner."""
    turn_id = turn_id_of(name)
    if turn_id is None:
        raise ResponseNotFoundError(name)
    try:
        return await find_own_session(service.sessions, turn_id), turn_id
    except TurnNotFoundError:
        raise ResponseNotFoundError(name) from None


async def _get(service: Service, session_id: str, turn_id: str, *, with_texts: bool = True) -> TurnRecord:
    """A response's turn. Raises: ResponseNotFoundError, also for one that was deleted and that others follow."""
    try:
        record = await service.sessions.get_turn(session_id, turn_id, with_texts=with_texts)
    except _NOT_FOUND:
        raise ResponseNotFoundError(response_id(turn_id)) from None
    if record.is_emptied:
        raise ResponseNotFoundError(response_id(turn_id))
    return record


@blueprint.get("/v1/responses/<response_id>")
@operation(
    id="get_response",
    query=RetrieveQuery,
    answers=(
        Answer(
            status=200,
            description="The response as it stands; or its events.",
            body=Response,
            streams=True,
            events=EVENTS,
        ),
    ),
    errors=(TurnNotFoundError, EventsDeletedError, StreamLimitError, TurnLimitError, ShuttingDownError),
)
async def get_response(response_id: str) -> TrioResponse:
    """Get a response, with the output so far; with `stream` its events, live, replayed or both.

    After a lost connection send the last event's `sequence_number` as `starting_after`: then no event is missing or
    sent twice. Without it the events come from the first one on.
    """
    query = read_query(request, RetrieveQuery)
    service = current_service()
    if query.starting_after is not UNSET and not query.stream:
        raise ParameterError("Without `stream` there are no events.", param="starting_after")
    encrypted = _ENCRYPTED in query.include
    if query.stream:
        seen = 0 if query.starting_after is UNSET else query.starting_after + 1
        return await _stream(service, response_id, _Responses(seen=seen, encrypted=encrypted))
    session_id, turn_id = await _find(service, response_id)
    face = _Responses(encrypted=encrypted)
    return await face.show(service, await _get(service, session_id, turn_id))


async def _stream(service: Service, name: str, face: _Responses) -> TrioResponse:
    face.continue_streams()
    slot = take_slot(service)
    session_id, turn_id = await _find(service, name)
    may_talk = "talk" in current_caller().may
    try:
        log, watch = await service.sessions.open_events(session_id, turn_id, watches=may_talk)
        release_later(watch)
        if request.method == "HEAD":
            return TrioResponse(b"", headers=HEADERS, content_type=MEDIA_TYPE)
        leave_at_end_of_input()
        return await face.stream(FoundTurn(session_id, turn_id, log, watch), slot, after=0)
    except _NOT_FOUND:
        raise ResponseNotFoundError(name) from None
    except EventsDeletedError as error:
        refusal = error
    await _get(service, session_id, turn_id, with_texts=False)
    raise refusal


@blueprint.delete("/v1/responses/<response_id>")
@operation(
    id="delete_response",
    answers=(Answer(status=200, description="The response is gone.", body=DeletedResponse),),
    errors=(TurnNotFoundError, TurnInProgressError, TurnEndingError),
)
async def delete_response(response_id: str) -> TrioResponse:
    """Delete a response. One that is queued or in progress is cancelled first.

    Responses that follow it stay as they are; what the deleted one said is in no later prompt. While one of them is
    queued or in progress the answer is 400 `conversation_locked`. A conversation to which it belonged stays. A session
    that was made for responses goes with the last of them.
    """
    service = current_service()
    session_id, turn_id = await _find(service, response_id)
    sessions = service.sessions
    allow_longer_answer(by_s=sessions.cancel_timeout_s + service.settings.store_timeout_s)
    record = await _get(service, session_id, turn_id, with_texts=False)
    if record.is_open:
        await sessions.cancel_turn(session_id, turn_id)
    try:
        await sessions.delete_turn_alone(session_id, turn_id, with_session=_was_made_for(record))
    except _NOT_FOUND:
        pass  # another call has deleted it meanwhile; or it was ephemeral
    return json_response(DeletedResponse(id=response_id))


@blueprint.post("/v1/responses/<response_id>/cancel")
@operation(
    id="cancel_response",
    answers=(Answer(status=200, description="The response, ended.", body=Response),),
    errors=(TurnNotFoundError, TurnEndingError, TurnMovedError, TurnLimitError, ShuttingDownError),
)
async def cancel_response(response_id: str) -> TrioResponse:
    """Cancel a response, background or not, and wait for its end. One that has ended is answered as it is."""
    service = current_service()
    allow_repeat()
    allow_longer_answer(by_s=service.sessions.cancel_timeout_s)
    session_id, turn_id = await _find(service, response_id)
    await _get(service, session_id, turn_id)
    return await _Responses().show(service, await service.sessions.cancel_turn(session_id, turn_id))


@blueprint.get("/v1/responses/<response_id>/input_items")
@operation(
    id="list_input_items",
    query=InputItemsQuery,
    answers=(Answer(status=200, description="A page of items.", body=ItemList),),
    errors=(TurnNotFoundError,),
)
async def list_input_items(response_id: str) -> TrioResponse:
    """List the items of a response's own input, the last one first. Those of earlier responses are not among them.

    A page has about 1 MiB of texts at most, and one item at least.
    """
    query = read_query(request, InputItemsQuery)
    service = current_service()
    session_id, turn_id = await _find(service, response_id)
    record = await _get(service, session_id, turn_id)
    items = record.input if query.order == "asc" else record.input[::-1]
    rest = _items_after(items, query.after) if query.after else items
    sizes = accumulate(len(item.text) + len(item.encrypted) for item in rest[: query.limit])
    page = rest[: max(sum(size <= PAGE_BYTES_MAX for size in sizes), 1)]
    namespaces, encrypted = Echo.of_face(record.face).namespaces, _ENCRYPTED in query.include
    data = tuple([shown_item(item, namespaces=namespaces, encrypted=encrypted) for item in page])
    listed = ItemList.of(page, data, has_more=len(rest) > len(page))
    with room_for_answer(sum([len(item.text) for item in page])):
        return encoded_response(await encode_json(listed))


def _items_after(items: Sequence[Item], name: str) -> Sequence[Item]:
    """The items after one of them. Raises: ParameterError: It is none of them."""
    item_id = item_id_of(name)
    for index, item in enumerate(items, 1):
        if item.id == item_id:
            return items[index:]
    raise ParameterError("This is no item of the response's input.", param="after")
