"""One call to try it by hand: a message in, a stream of events out."""

from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.bodies import read_body
from service.api.operations import Answer, operation
from service.api.serving import current_service
from service.api.turns import STARTING_ERRORS, start_streaming
from service.api.wire import Chat
from service.errors import SessionExistsError, SessionNotFoundError
from service.sessions.registry import NewSession, NewTurn, Sessions

blueprint = Blueprint("chat", __name__)


@blueprint.post("/chat")
@operation(
    id="chat",
    body=Chat,
    answers=(Answer(status=200, description="The turn's events.", streams=True, located=True),),
    errors=(SessionNotFoundError, *STARTING_ERRORS),
)
async def chat() -> TrioResponse:
    """Send a message and stream the reply.

    The session is made if it is not there; the first event has its id.
    """
    service = current_service()
    body = await read_body(request, Chat, service.settings)
    session_id = await _get_or_create(service.sessions, body.session_id)
    return await start_streaming(service, session_id, NewTurn(text=body.message))


async def _get_or_create(sessions: Sessions, session_id: str | None) -> str:
    if session_id is not None:
        try:
            return (await sessions.get_session(session_id)).id
        except SessionNotFoundError:
            pass
    try:
        return (await sessions.create_session(NewSession(id=session_id))).id
    except SessionExistsError as error:
        return error.session_id  # somebody else made it in between
