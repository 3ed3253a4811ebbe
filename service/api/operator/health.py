"""Calls for whatever watches over the process."""

from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, json_response
from service.api.http.operations import Answer, operation
from service.api.native.wire import Health
from service.errors import ResourcesExhaustedError, ShuttingDownError, StoreError

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
    errors=(ShuttingDownError, StoreError, ResourcesExhaustedError),
)
async def readyz() -> TrioResponse:
    """Tell whether to send requests here.

    Not from the first sign of a shutdown on, and not while the store refuses to write. Needs no API key.
    """
    service = current_service()
    if service.shutdown.expected:
        raise ShuttingDownError
    if (refusal := service.sessions.pending_writes.refusal) is not None:
        if isinstance(refusal, ResourcesExhaustedError):
            raise ResourcesExhaustedError
        # Anybody may ask this: what it is stays in the log.
        raise StoreError("The store refuses to write; the log says why.", retry_after_s=refusal.retry_after_s)
    return json_response(Health("ready"))
