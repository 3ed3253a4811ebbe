"""``POST /v1/chat/completions``: the whole conversation goes in, one reply comes out, and nothing is kept.

A completion is an ephemeral turn of a session that is made for it. So it has the deadlines, limits and ends of all
turns, and is gone when it has ended.
"""

from math import inf

from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, encoded_response
from service.api.http.callers import current_owner
from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.event_stream import stream_response
from service.api.http.face_frames import Face, TurnSource
from service.api.http.held_bytes import room_for_answer
from service.api.http.long_json import encode_json
from service.api.http.operations import Answer, operation
from service.api.http.proxy import FaceStream, allow_longer_answer, continue_streams_with, release_later
from service.api.http.request_body import read_body
from service.api.http.request_id import current_request_id
from service.api.http.turn_answers import start, take_slot
from service.api.openai.chat_frames import CUT, ENDS, ChatCompletion, ChunkEncoder
from service.api.openai.chat_requests import CreateChatCompletion, includes_usage, turn_of
from service.api.openai.failures import EndErrorBody, end_response
from service.errors import SessionLimitError, ShuttingDownError, StreamLimitError, TurnLimitError, TurnNotFoundError
from service.freezes import move_on_after
from service.ids import new_session_id, scoped
from service.sessions.turns.turn import Turn
from service.steps import in_steps
from service.storage.records import TurnRecord

blueprint = Blueprint("chat_completions", __name__)

_STARTED_SEQ = 1
"""The seq of the event that the turn has started; all later events tell of its reply, or of its end."""


async def _find_nothing(_: str) -> tuple[str, str]:
    """Raises: TurnNotFoundError, because an ephemeral turn is gone with its process."""
    raise TurnNotFoundError("")


def _no_face(_: TurnSource) -> Face:
    raise AssertionError("there is no turn that could go on")


_PASSED_ON = FaceStream(_no_face, _find_nothing, end=ENDS, cut=CUT)
"""A stream from another process, which answers in this one's place."""


@blueprint.post("/v1/chat/completions")
@operation(
    id="create_chat_completion",
    body=CreateChatCompletion,
    answers=(
        Answer(
            status=200,
            description="The reply, or its chunks (`stream`).",
            body=ChatCompletion,
            streams=True,
            events="Chunks (`chat.completion.chunk`) as the JSON of `data:`, then `data: [DONE]`.",
        ),
        Answer(status=404, description="The model server does not have the model.", body=EndErrorBody),
        Answer(status=429, description="The model server is busy.", body=EndErrorBody),
        Answer(status=500, description="The reply was cancelled or is too large.", body=EndErrorBody),
        Answer(status=502, description="The model server failed.", body=EndErrorBody),
        Answer(status=504, description="A deadline of the reply has passed.", body=EndErrorBody),
    ),
    errors=(TurnLimitError, StreamLimitError, SessionLimitError, ShuttingDownError),
)
async def create_chat_completion() -> TrioResponse:
    """Ask a model to continue a conversation.

    Nothing is kept: neither the messages nor the reply. The reply is cancelled when the client leaves.

    With `stream` the answer is an event stream of chunks, then `[DONE]`. A reply that is cut off ends with
    `{"error": …}` instead, so that it is not taken for a whole one; if that is known before the first chunk, the answer
    is an error with its own status, as it is without `stream`. Reasoning that the model server sends in words is
    `reasoning_content`, beside `content`.
    """
    service = current_service()
    body = await read_body(request, CreateChatCompletion, service)
    new = await in_steps(turn_of(body, request_id=current_request_id()))
    streams, with_usage = bool(body.stream), includes_usage(body)
    del body  # the frame is there until the reply has ended
    leave_at_end_of_input()
    slot = None
    if streams:
        continue_streams_with(_PASSED_ON)
        slot = take_slot(service)
    allow_longer_answer(by_s=inf)
    turn, watch = await start(service, scoped(current_owner(), new_session_id()), new)
    release_later(watch)
    if slot is None:
        return await _whole(await turn.wait_ended())
    await _wait_for_reply(turn, within_s=service.settings.heartbeat_interval_s)
    if turn.log.closed and turn.state != "completed":
        return end_response(await turn.wait_ended())
    encoder = ChunkEncoder(turn, includes_usage=with_usage)
    return stream_response(turn.log, slot, after=0, encode=encoder, cut=CUT)


async def _wait_for_reply(turn: Turn, *, within_s: float) -> None:
    """Wait for the first piece of a reply, so that a refusal of the model server can have its own status.

    A client gets the head of the stream in time for its heartbeats in any case.
    """
    with move_on_after(within_s):
        await turn.log.wait_beyond(_STARTED_SEQ)


async def _whole(turn: TurnRecord) -> TrioResponse:
    if turn.state != "completed":
        return end_response(turn)
    with room_for_answer(sum([len(item.text) for item in turn.output])):
        return encoded_response(await encode_json(ChatCompletion.of(turn)))
