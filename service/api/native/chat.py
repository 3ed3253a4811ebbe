"""One call to try it by hand: a message in, a stream of events out."""

from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service
from service.api.http.operations import Answer, operation
from service.api.http.request_body import read_body
from service.api.native.turns import STARTING_ERRORS, start_streaming, take_slot
from service.api.native.wire import Chat
from service.errors import SessionLimitError, SessionNotFoundError
from service.ids import new_session_id
from service.sessions.commands import NewTurn

blueprint = Blueprint("chat", __name__)


@blueprint.post("/chat")
@operation(
    id="chat",
    body=Chat,
    answers=(Answer(status=200, description="The turn's events.", streams=True, located=True),),
    errors=(SessionNotFoundError, SessionLimitError, *STARTING_ERRORS),
)
async def chat() -> TrioResponse:
    """Send a message and stream the reply.

    The session is made if it is not there; the first event has its id.
    """
    service = current_service()
    body = await read_body(request, Chat, service)
    new = NewTurn(text=body.message, creates_session=True)
    return await start_streaming(service, take_slot(service), body.session_id or new_session_id(), new)
