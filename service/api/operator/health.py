"""Calls for probes: orchestrators, balancers and monitors ask whether the process is alive and ready."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service, json_response
from service.api.http.operations import Answer, operation
from service.errors import ShuttingDownError, StoreLostError
from service.stop_state import Phase

blueprint = Blueprint("health", __name__)


class Health(msgspec.Struct, frozen=True):
    """``{"status": "ok"}``

    ``writes`` is there while the store refuses writes: calls that need a write get 503 until it accepts them again.
    """

    status: Literal["ok", "ready"]
    writes: Literal["refused"] | UnsetType = UNSET


@blueprint.get("/healthz")
@operation(id="healthz", answers=(Answer(status=200, description="The process is alive.", body=Health),))
async def healthz() -> TrioResponse:
    """Tell whether the process is alive: also while it shuts down. Needs no API key."""
    return json_response(Health("ok"))


@blueprint.get("/readyz")
@operation(
    id="readyz",
    answers=(Answer(status=200, description="The process takes requests.", body=Health),),
    errors=(ShuttingDownError, StoreLostError),
)
async def readyz() -> TrioResponse:
    """Tell whether to send requests here.

    From the notice of a shutdown on it is 503. It is also 503 while the store's file is deleted or replaced, because
    another process may serve the right file. While the store refuses to write for another reason it is 200 with
    `"writes": "refused"`: reads and running streams go on, so a balancer must not take them away. Needs no API key.
    """
    service = current_service()
    if service.shutdown.phase > Phase.SERVING:
        raise ShuttingDownError(untouched=True)
    refusal = service.sessions.pending_writes.refusal  # the log has the reason: this call needs no key
    if isinstance(refusal, StoreLostError):
        raise refusal
    return json_response(Health("ready", writes="refused" if refusal is not None else UNSET))
