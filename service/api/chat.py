"""One call to try it by hand: a message in, a stream of events out."""

from contextlib import suppress

import trio
from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.bodies import read_body
from service.api.operations import Answer, operation
from service.api.serving import current_service
from service.api.turns import STARTING_ERRORS, start_streaming, take_slot
from service.api.wire import Chat
from service.errors import LastcallError, LimitError, SessionExistsError, SessionNotFoundError
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
    body = await read_body(request, Chat, service)
    slot = take_slot(service)
    session_id, created = await _get_or_create(service.sessions, body.session_id)
    try:
        return await start_streaming(service, slot, session_id, NewTurn(text=body.message))
    except LimitError as error:
        refusal = error
    if created:
        await _delete_unused(service.sessions, session_id)
    raise refusal


async def _get_or_create(sessions: Sessions, session_id: str | None) -> tuple[str, bool]:
    """The session's id, and whether it was made here."""
    if session_id is not None:
        try:
            return (await sessions.get_session(session_id)).id, False
        except SessionNotFoundError:
            pass
    try:
        return (await sessions.create_session(NewSession(id=session_id))).id, True
    except SessionExistsError as error:
        return error.session_id, False  # somebody else made it in between


async def _delete_unused(sessions: Sessions, session_id: str) -> None:
    """Delete a session that was made for a turn that was refused, unless somebody else has found a use for it.

    A caller who leaves meanwhile changes nothing: the shield's bound is the store's, ``store_timeout_s``,
    and a deletion that has begun completes by itself.
    """
    with suppress(LastcallError):  # the refusal is what there is to tell; what is left behind expires
        with trio.CancelScope(shield=True):
            turns = await sessions.list_turns(session_id, limit=1)
        if not turns.data and all(turn.session_id != session_id for turn in sessions.open_turns()):
            await sessions.delete_session(session_id)
