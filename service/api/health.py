"""Calls for whatever watches over the process."""

from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from service.api.operations import Answer, operation
from service.api.serving import current_service, json_response
from service.api.wire import Health
from service.errors import ShuttingDownError

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
@operation(id="healthz", answers=(Answer(status=200, description="It is alive.", body=Health),))
async def healthz() -> TrioResponse:
    """Tell whether the process is alive: also while it shuts down. Needs no API key."""
    return json_response(Health("ok"))


@blueprint.get("/readyz")
@operation(
    id="readyz",
    answers=(Answer(status=200, description="It takes requests.", body=Health),),
    errors=(ShuttingDownError,),
)
async def readyz() -> TrioResponse:
    """Tell whether to send requests here: not from the first sign of a shutdown on. Needs no API key."""
    if current_service().shutdown.noticed.is_set():
        raise ShuttingDownError
    return json_response(Health("ready"))
