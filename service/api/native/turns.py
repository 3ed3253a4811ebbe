"""Calls about turns: starting them in three ways, looking at them, streaming and cancelling them."""

from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec import UNSET, UnsetType
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, encoded_response, json_response, no_content
from service.api.http.callers import current_caller
from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.event_stream import (
    HEADERS,
    MEDIA_TYPE,
    EventsQuery,
    read_last_event_id,
    read_seen,
    stream_response,
    wants_stream,
)
from service.api.http.held_bytes import room_for_answer
from service.api.http.idempotency_keys import read_key
from service.api.http.locations import turn_path
from service.api.http.long_json import encode_json
from service.api.http.operations import Answer, operation
from service.api.http.paging import read_page
from service.api.http.proxy import allow_longer_answer, allow_look, continue_streams_with, release_later
from service.api.http.query_params import read_query
from service.api.http.repeats import allow_repeat
from service.api.http.request_body import read_body
from service.api.http.request_id import current_request_id
from service.api.http.turn_answers import (
    FoundTurn,
    answer_again,
    answer_made,
    answer_new,
    resume,
    resume_streaming,
    take_slot,
)
from service.api.http.wire_types import json_schema_format
from service.api.native import turn_requests
from service.api.native.event_frames import encode_frame
from service.api.native.new_items import output_item
from service.api.native.sessions import checked_session_id
from service.api.native.turn_requests import FunctionChoice, NewMessage, RetryTurn, StartTurn
from service.api.native.turn_wire import TreeQuery, TreeTurn, Turn, TurnList, TurnQuery, TurnsQuery, TurnTree
from service.errors import (
    BranchLimitError,
    EventsDeletedError,
    EventsLostError,
    InvalidRequestError,
    OwnerHangsError,
    QueueFullError,
    RefusedError,
    RepeatedError,
    ResumeConflictError,
    SessionNotFoundError,
    ShuttingDownError,
    StreamLimitError,
    TurnEndingError,
    TurnInProgressError,
    TurnLimitError,
    TurnMovedError,
    TurnNotFoundError,
)
from service.freezes import move_on_after
from service.ids import is_turn_id, new_item_id
from service.models.client import NO_OPTIONS, FunctionTool, NamedFunction, Options, TextFormat, ToolChoice, Tools
from service.sessions.commands import NewTurn, text_input
from service.sessions.events.streams import StreamSlot
from service.storage.records import IdempotencyKey, Item, Page, Places, TurnRecord
from service.supervisor import Service

blueprint = Blueprint("turns", __name__)

_NO_TURN = (SessionNotFoundError, TurnNotFoundError)
STARTING_ERRORS = (TurnInProgressError, QueueFullError, TurnLimitError, StreamLimitError, ShuttingDownError)
WAITING_ERRORS = (OwnerHangsError, TurnMovedError)
ADOPTING_ERRORS = (TurnLimitError, ShuttingDownError)
"""A turn that no process runs is adopted by the process that is asked for it."""
RESUMING_ERRORS = (ResumeConflictError, EventsLostError, EventsDeletedError)
RESUMES = (
    "The id of the last event that the client has seen: no turn is started. "
    "The answer continues the session's newest turn after that event, if that turn has this input."
)
SEEN_ALL = Answer(
    status=204, description="With `Last-Event-ID`: all events have been seen.", located="The turn that has ended."
)
_LED_BY_ID = tuple(
    (name, {"session_id": "$response.body#/session_id", "turn_id": "$response.body#/id"})
    for name in ("get_turn", "stream_events", "cancel_turn", "retry_turn")
)
STARTED = (
    Answer(
        status=200,
        description="The turn, ended; or its events.",
        body=Turn,
        streams=True,
        located="The turn.",
        links=_LED_BY_ID,
    ),
    Answer(
        status=202,
        description="The turn, accepted (`background`).",
        body=Turn,
        located="The turn.",
        links=_LED_BY_ID,
    ),
    SEEN_ALL,
)


def checked_turn_id(turn_id: str) -> str:
    """Return an id of valid form. Raises: TurnNotFoundError, because no turn has an id of another form."""
    if not is_turn_id(turn_id):
        raise TurnNotFoundError(turn_id[:128])
    return turn_id


class _NativeTurns:
    """How the native API shows turns: a :class:`~service.api.http.turn_answers.TurnFace`."""

    def path(self, session_id: str, turn_id: str) -> str:
        return turn_path(session_id, turn_id)

    def continue_streams(self) -> None:
        continue_streams_with(encode_frame)

    async def stream(self, opened: FoundTurn, slot: StreamSlot, *, after: int) -> TrioResponse:
        return stream_response(opened.log, slot, after=after, encode=encode_frame)

    async def show(
        self,
        service: Service,
        record: TurnRecord,
        status: int = 200,
        *,
        with_location: bool = False,
        places: Places | None = None,
    ) -> TrioResponse:
        if places is None:
            places = await service.sessions.find_places(record.session_id, [record.id])
        location = turn_path(record.session_id, record.id) if with_location else None
        length = sum([len(item.text) for items in (record.input, record.output) for item in items])
        with room_for_answer(length):
            encoded = await encode_json(Turn.of(record, places))
        return encoded_response(encoded, status, location=location)


FACE = _NativeTurns()


@blueprint.post("/sessions/<session_id>/turns")
@operation(
    id="start_turn",
    keyed=True,
    body=StartTurn,
    accepts_stream=True,
    answers=STARTED,
    errors=(
        SessionNotFoundError,
        OwnerHangsError,
        TurnMovedError,
        BranchLimitError,
        *STARTING_ERRORS,
        *RESUMING_ERRORS,
    ),
    resumes=RESUMES,
)
async def start_turn(session_id: str) -> TrioResponse:
    """Start a turn.

    With `Accept: text/event-stream` the answer streams the turn's events from the first one on. With
    `background` the answer is 202 at once. Otherwise the answer comes when the turn has ended, after every
    kind of end: read `state`. The input is stored before the first byte of the answer. When the last client
    that streams a turn or waits for it has left, the turn is cancelled, unless it is `background` or
    `on_disconnect` is `continue`.

    If the process of the turn stops, a turn with `on_interrupt` as `retry` or `continue` goes on in another process, or
    after the next start: a stream ends without a terminal event then, and a call that waits gets 503 `turn_moved` with
    the turn's URL as `Location`. Resume the stream, or ask for the turn there.

    With `tools` the model may call functions, which the client runs: `items` of the ended turn has the calls, as do the
    events `turn.call` and `turn.arguments`. The `input` of the next turn brings the results, as items of the type
    `function_call_output`. A call whose output is not there is told to the model as not answered.

    With an `Idempotency-Key` the request may be repeated: it starts one turn, and a repetition gets the answer of this
    turn. A stream begins with the first event, or after `Last-Event-ID`.

    A client that lost its connection may repeat its request with the id of the last event that it has seen as
    `Last-Event-ID`, as some libraries do by themselves. Then no turn is started. Without a key: if the session's newest
    turn has the same input, the answer is its events after that one, live; 204 if no event is left; or,
    without a stream, the turn. Where a branch was started since, the newest open turn with this input is meant, if
    possible one with this `parent`. The other fields of the body are not compared. If no turn has this input, or it has
    fewer events, the answer is 409 `resume_conflict` with the newest turn's URL as `Location`. Two turns that run with
    one input and one parent are not told apart: stream the URL of the one that is meant.
    """
    session_id = checked_session_id(session_id)
    service = current_service()
    body = await read_body(request, StartTurn, service)
    said = _input_of(body)
    key = read_key(body)
    new = NewTurn(
        items=said,
        parent=body.parent,
        model=body.model,
        system_message=body.system_message,
        temperature=body.temperature,
        max_output_tokens=body.max_output_tokens,
        tools=_tools_of(body.tools, body.tool_choice, parallel=body.parallel_tool_calls),
        options=_options_of(body, NO_OPTIONS),
        on_conflict=body.on_conflict,
        on_disconnect=body.on_disconnect,
        on_interrupt=body.on_interrupt or service.settings.on_interrupt,
        background=body.background,
        request_id=current_request_id(),
        key=key,
    )
    return await _answer_new(service, session_id, new)


@blueprint.post("/sessions/<session_id>/turns/<turn_id>/retry")
@operation(
    id="retry_turn",
    keyed=True,
    body=RetryTurn,
    accepts_stream=True,
    answers=STARTED,
    errors=(*_NO_TURN, *WAITING_ERRORS, BranchLimitError, *STARTING_ERRORS, *RESUMING_ERRORS),
    resumes=RESUMES,
)
async def retry_turn(session_id: str, turn_id: str) -> TrioResponse:
    """Ask again: start a turn with the input and the parent of another one.

    The new turn is a sibling of the other one, which stays as it is; it becomes the head. Its model, system message,
    temperature, bound, tools and other options are those of the other one, unless the body names others. The answer is
    that of `start_turn`. The other turn may still run: both run at once then. Only if it waits in the queue, so does
    the new one, as `on_conflict` says.

    For an edit start a turn with another `input` and the same `parent`.
    """
    session_id, turn_id = checked_session_id(session_id), checked_turn_id(turn_id)
    service = current_service()
    body = await read_body(request, RetryTurn, service)
    key = read_key(body)
    try:
        turn = await _find_asked(service, session_id, turn_id, key)
    except RepeatedError as repeated:
        streams = wants_stream(request) and not body.background
        after = read_last_event_id(request) or 0
        return await answer_made(service, repeated, FACE, streams=streams, background=body.background, after=after)
    new = NewTurn(
        items=tuple(msgspec.structs.replace(item, id=new_item_id(item.type)) for item in turn.input),
        parent=turn.parent,
        model=turn.model if body.model is UNSET else body.model,
        system_message=turn.system_message if body.system_message is UNSET else body.system_message,
        temperature=turn.temperature if body.temperature is UNSET else body.temperature,
        max_output_tokens=turn.max_output_tokens if body.max_output_tokens is UNSET else body.max_output_tokens,
        tools=_retried_tools(body, turn.tools),
        options=_options_of(body, turn.options),
        on_conflict=body.on_conflict,
        on_disconnect=body.on_disconnect,
        on_interrupt=body.on_interrupt or service.settings.on_interrupt,
        background=body.background,
        request_id=current_request_id(),
        key=key,
    )
    return await _answer_new(service, session_id, new, retried=turn_id)


async def _find_asked(service: Service, session_id: str, turn_id: str, key: IdempotencyKey | None) -> TurnRecord:
    """Find the turn that is to be retried.

    Raises:
        SessionNotFoundError, TurnNotFoundError
        InvalidRequestError: The turn has no input of the user: a prompt would end with a reply, or with a note.
        RepeatedError: The turn or its input is gone, and was not when an earlier request with this key has retried it.
    """
    refusal: RefusedError
    try:
        turn = await service.sessions.get_turn(session_id, turn_id, with_texts=False)
    except _NO_TURN as error:
        refusal = error
    else:
        if any(item.role == "user" for item in turn.input):
            return turn
        refusal = InvalidRequestError(f"Turn {turn_id!r} has no input that could be sent again.", field="turn_id")
    if key is not None:
        await service.sessions.check_key(key)
    raise refusal


async def _answer_new(service: Service, session_id: str, new: NewTurn, *, retried: str | None = None) -> TrioResponse:
    """Start a turn and answer it, as a stream or when it has ended; or resume it, for a client that has come back.

    Args:
        retried: The turn that the new one is a retry of.
    """
    streams = wants_stream(request) and not new.background
    after = read_last_event_id(request)
    if after is None:
        return await answer_new(service, session_id, new, FACE, streams=streams)
    newest = partial(
        service.sessions.resume_newest,
        session_id,
        said=new.items,
        parent=new.parent,
        besides=retried,
        after=after,
    )
    if streams:
        return await resume_streaming(service, session_id, newest, FACE, after=after, key=new.key)
    find = partial(resume, service, session_id, newest, after=after, key=new.key)
    read = partial(service.sessions.get_turn, session_id)
    return await answer_again(find, read, FACE, background=new.background)


def _input_of(body: StartTurn) -> tuple[Item, ...]:
    """Return the input as new items. Raises: InvalidRequestError, if two of them are outputs of one call."""
    if isinstance(body.input, str):
        return text_input(body.input)
    items: list[Item] = []
    answered: set[str] = set()
    for index, new in enumerate(body.input):
        if isinstance(new, NewMessage):
            items += text_input(new.text)
            continue
        if new.call_id in answered:
            raise InvalidRequestError("This is a second output of the same call.", field=f"input[{index}].call_id")
        answered.add(new.call_id)
        items.append(output_item(new))
    return tuple(items)


def _tools_of(
    tools: Sequence[turn_requests.FunctionTool] | Sequence[FunctionTool],
    choice: FunctionChoice | ToolChoice | None,
    *,
    parallel: bool | None,
) -> Tools | UnsetType:
    """Return what the model may call; UNSET if there are no functions.

    Raises:
        InvalidRequestError: Two functions have one name, or the choice needs a function that is not there.
    """
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequestError(f"There are two functions named {name!r}.", field=f"tools[{index}].name")
    choice = NamedFunction(choice.name) if isinstance(choice, FunctionChoice) else choice
    if isinstance(choice, NamedFunction) and choice.name not in names:
        raise InvalidRequestError("This is none of the functions in `tools`.", field="tool_choice.name")
    if choice == "required" and not names:
        raise InvalidRequestError("A call is required, and `tools` has no function.", field="tool_choice")
    if not names:
        return UNSET
    functions = tuple(
        FunctionTool(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
        for tool in tools
    )
    return Tools(functions=functions, choice=choice, parallel=parallel)


def _retried_tools(body: RetryTurn, kept: Tools | UnsetType) -> Tools | UnsetType:
    """Return what the model may call in a retry, where ``kept`` is what it might call. Raises: InvalidRequestError."""
    old = kept if body.tools is UNSET and kept is not UNSET else Tools(functions=())
    return _tools_of(
        old.functions if body.tools is UNSET else body.tools,
        old.choice if body.tool_choice is UNSET else body.tool_choice,
        parallel=old.parallel if body.parallel_tool_calls is UNSET else body.parallel_tool_calls,
    )


def _options_of(body: StartTurn | RetryTurn, kept: Options) -> Options:
    """Return what a body asks of the model beside the tools, with ``kept`` for all that the body leaves out."""
    text_format = kept.text_format
    if not isinstance(body.text_format, UnsetType):
        text_format = None if body.text_format is None else _text_format(body.text_format)
    return msgspec.structs.replace(
        kept,
        top_p=kept.top_p if body.top_p is UNSET else body.top_p,
        text_format=text_format,
        reasoning_effort=kept.reasoning_effort if body.reasoning_effort is UNSET else body.reasoning_effort,
    )


def _text_format(asked: turn_requests.JsonSchemaFormat | turn_requests.JsonObjectFormat) -> TextFormat:
    if isinstance(asked, turn_requests.JsonObjectFormat):
        return TextFormat(type="json_object")
    return json_schema_format(asked)


@blueprint.get("/sessions/<session_id>/turns")
@operation(
    id="list_turns",
    query=TurnsQuery,
    answers=(Answer(status=200, description="A page of turns.", body=TurnList),),
    errors=(SessionNotFoundError,),
)
async def list_turns(session_id: str) -> TrioResponse:
    """List all turns of a session, or the turns with one parent, in the order of their acceptance.

    The turns with one parent are siblings: the same question asked again, or in other words. `siblings` of a turn tells
    its place among them and their count, as a switch "2 / 3" in a chat page shows them.
    """
    session_id = checked_session_id(session_id)
    query = read_query(request, TurnsQuery)
    sessions = current_service().sessions
    parent = None if query.parent == "null" else query.parent
    places: Places | None = None

    async def listing(*, limit: int, after: str | None, bytes_max: int) -> Page[TurnRecord]:
        nonlocal places
        page = await sessions.list_turns(session_id, limit=limit, after=after, bytes_max=bytes_max, parent=parent)
        places = await sessions.find_places(session_id, [turn.id for turn in page.data])
        return page

    try:
        page = await read_page(
            listing, lambda turn: Turn.of(turn, places), limit=query.limit, after=query.after or None
        )
    except TurnNotFoundError as error:
        raise InvalidRequestError(str(error), field="parent") from None
    return json_response(TurnList.of(page))


@blueprint.get("/sessions/<session_id>/tree")
@operation(
    id="get_tree",
    query=TreeQuery,
    answers=(Answer(status=200, description="A page of the tree.", body=TurnTree),),
    errors=(SessionNotFoundError,),
)
async def get_tree(session_id: str) -> TrioResponse:
    """List ids, parents, states and times of all turns of a session, in the order of their acceptance.

    That is all that a page needs to draw the tree, or to find the path to a turn: a parent comes before the turns that
    follow it.
    """
    session_id = checked_session_id(session_id)
    query = read_query(request, TreeQuery)
    page = await current_service().sessions.list_tree(session_id, limit=query.limit, after=query.after or None)
    return json_response(TurnTree(data=tuple(map(TreeTurn.of, page.data)), next=page.next))


@blueprint.get("/sessions/<session_id>/turns/<turn_id>")
@operation(
    id="get_turn",
    query=TurnQuery,
    answers=(Answer(status=200, description="The turn as it stands.", body=Turn),),
    errors=(*_NO_TURN, StreamLimitError, *ADOPTING_ERRORS),
)
async def get_turn(session_id: str, turn_id: str) -> TrioResponse:
    """Get a turn, with the reply so far.

    For clients without event streams: with `wait` the answer comes when the turn has ended, or after so many seconds
    as the turn stands then; look at `ended_at`, and ask again. A turn that begins to run is not waited for. Such a call
    only looks: it does not keep a turn from being cancelled when its last client leaves. It counts as a stream under
    `streams_max`.

    A turn that goes on after its process has stopped or died (`on_interrupt`) has lost its clients. Each call by a
    caller who may talk keeps it from being cancelled, while the call waits and for five seconds more. In the first 30
    seconds after it has begun to go on no such turn is cancelled for lack of clients.
    """
    session_id, turn_id = checked_session_id(session_id), checked_turn_id(turn_id)
    wait_s = read_query(request, TurnQuery).wait
    service = current_service()
    if wait_s:
        allow_look(wait_s)
    may_talk = "talk" in current_caller().may
    record = await service.sessions.get_turn(session_id, turn_id, is_client=may_talk)
    if wait_s and record.is_open:
        record = await _wait_for_end(service, session_id, turn_id, within_s=wait_s, is_client=may_talk)
    return await FACE.show(service, record)


async def _wait_for_end(
    service: Service, session_id: str, turn_id: str, *, within_s: float, is_client: bool
) -> TurnRecord:
    """Return a turn when it has ended, or after ``within_s`` as it stands."""
    take_slot(service)
    leave_at_end_of_input()
    with move_on_after(within_s):
        return await service.sessions.wait_turn(session_id, turn_id, is_client=is_client)
    return await service.sessions.get_turn(session_id, turn_id)


@blueprint.delete("/sessions/<session_id>/turns/<turn_id>")
@operation(
    id="delete_turn",
    answers=(Answer(status=204, description="The turn, all turns that follow it and their events are gone."),),
    errors=(*_NO_TURN, TurnInProgressError),
)
async def delete_turn(session_id: str, turn_id: str) -> TrioResponse:
    """Delete a turn and all turns that follow it, on every branch.

    If the head is among them, the turn's parent becomes the head. None of these turns may be open. However many they
    are, all are gone at once. The tokens that they used stay counted.
    """
    service = current_service()
    allow_longer_answer(by_s=service.settings.store_timeout_s)
    await service.sessions.delete_turn(checked_session_id(session_id), checked_turn_id(turn_id))
    return no_content()


@blueprint.get("/sessions/<session_id>/turns/<turn_id>/events")
@operation(
    id="stream_events",
    query=EventsQuery,
    resumes="The id of the last event that the client has seen; wins over the query.",
    answers=(
        Answer(status=200, description="The events after the one that was seen last, live.", streams=True),
        Answer(status=204, description="The turn has ended and all its events have been seen: do not reconnect."),
    ),
    errors=(*_NO_TURN, EventsLostError, EventsDeletedError, StreamLimitError, *ADOPTING_ERRORS),
)
async def stream_events(session_id: str, turn_id: str) -> TrioResponse:
    """Stream a turn's events: live, replayed or both.

    Any number of streams may follow a turn, each at its own speed. After a lost connection send the
    last event's id as `Last-Event-ID` (an `EventSource` does), as `lastEventId` or `Last-Event-ID` in the query (its
    polyfills do) or as `after`: then no event is missing or sent twice. The header wins over the query, and in the
    query the id wins over `after`. Unknown names in the query are ignored.

    A turn that runs for its clients alone (`on_disconnect` is `cancel`) has no client in a caller who may only `read`:
    the turn may end while this caller follows it.

    Compare the ids of events, and do not count them: if the process that ran the turn has crashed, the id of the
    last event, `turn.interrupted`, jumps to 1073741824 or more.

    A turn with `on_interrupt` outlives its process. Where that stops, the stream ends after a comment and without a
    terminal event: resume it. Then, and after a crash, `turn.resumed` comes before all that is new: cut the text that
    you have to its first `text_length` Unicode code points, and go on with the pieces that follow. Its id may be much
    larger than the one before.
    """
    seen, field = read_seen(request)
    service = current_service()
    session_id, turn_id = checked_session_id(session_id), checked_turn_id(turn_id)
    FACE.continue_streams()
    slot = take_slot(service)
    may_talk = "talk" in current_caller().may
    log, watch = await service.sessions.open_events(session_id, turn_id, after=seen, watches=may_talk)
    release_later(watch)
    if log.has_ended and seen >= log.last_seq:
        return no_content()
    if seen > log.last_seq:
        raise InvalidRequestError(f"This turn has {log.last_seq} events so far.", field=field)
    if request.method == "HEAD":
        return TrioResponse(b"", headers=HEADERS, content_type=MEDIA_TYPE)
    leave_at_end_of_input()
    return stream_response(log, slot, after=seen, encode=encode_frame)


@blueprint.post("/sessions/<session_id>/turns/<turn_id>/cancel")
@operation(
    id="cancel_turn",
    answers=(Answer(status=200, description="The turn, ended.", body=Turn),),
    errors=(*_NO_TURN, TurnEndingError, TurnMovedError, *ADOPTING_ERRORS),
)
async def cancel_turn(session_id: str, turn_id: str) -> TrioResponse:
    """Cancel a turn and wait for its end.

    Idempotent: if the turn has ended already, or ends in another way first, the answer has that end. If the end takes
    longer than usual, the answer is 503 `turn_ending` with the turn's URL as `Location`: the turn is ending, and its
    end comes later.
    """
    service = current_service()
    allow_repeat()
    allow_longer_answer(by_s=service.sessions.cancel_timeout_s)
    record = await service.sessions.cancel_turn(checked_session_id(session_id), checked_turn_id(turn_id))
    return await FACE.show(service, record)
