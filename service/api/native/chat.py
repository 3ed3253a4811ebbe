"""The chat call, for a first try: it takes a message and answers a stream of events."""

from functools import partial

from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service
from service.api.http.callers import current_owner
from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.event_stream import read_last_event_id
from service.api.http.idempotency_keys import read_key
from service.api.http.operations import Answer, operation
from service.api.http.request_body import read_body
from service.api.http.request_id import current_request_id
from service.api.http.turn_answers import resume_streaming, start_streaming
from service.api.native.turn_requests import Chat
from service.api.native.turns import FACE, RESUMES, RESUMING_ERRORS, SEEN_ALL, STARTING_ERRORS
from service.errors import ResumeConflictError, SessionLimitError, SessionNotFoundError
from service.ids import new_session_id, scoped
from service.sessions.commands import NewTurn, text_input
from service.storage.records import IdempotencyKey
from service.supervisor import Service

blueprint = Blueprint("chat", __name__)


@blueprint.post("/chat")
@operation(
    id="chat",
    keyed=True,
    body=Chat,
    answers=(Answer(status=200, description="The turn's events.", streams=True, located="The turn."), SEEN_ALL),
    errors=(SessionNotFoundError, SessionLimitError, *STARTING_ERRORS, *RESUMING_ERRORS),
    resumes=RESUMES,
)
async def chat() -> TrioResponse:
    """Send a message and stream the reply.

    The session is created if it does not exist; the first event has its id. With `Last-Event-ID` no session and no turn
    is created: the answer continues the turn with the same `Idempotency-Key`, or the newest turn of `session_id`, as
    described for turns.
    """
    service = current_service()
    body = await read_body(request, Chat, service)
    key = read_key(body)
    after = read_last_event_id(request)
    if after is not None:
        return await _resume(service, body, after, key)
    leave_at_end_of_input()
    new = NewTurn(
        text=body.message,
        on_disconnect=body.on_disconnect,
        on_interrupt=body.on_interrupt or service.settings.on_interrupt,
        creates_session=True,
        session_is_new=body.session_id is None,
        request_id=current_request_id(),
        key=key,
    )
    session_id = scoped(current_owner(), body.session_id or new_session_id())
    return await start_streaming(service, session_id, new, FACE)


async def _resume(service: Service, body: Chat, after: int, key: IdempotencyKey | None) -> TrioResponse:
    try:
        session_id = None if body.session_id is None else scoped(current_owner(), body.session_id)
        said = text_input(body.message)
        resume = partial(service.sessions.resume_newest, session_id or "", said=said, after=after)
        return await resume_streaming(service, session_id, resume, FACE, after=after, key=key)
    except ResumeConflictError as error:
        error.field = "message" if error.field == "input" else error.field
        raise
