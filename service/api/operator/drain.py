"""The call that begins the shutdown."""

from typing import Annotated

import msgspec
from msgspec import Meta
from quart import request
from quart_trio.wrappers import TrioResponse

from service.api.http.admin_access import CrossSiteError
from service.api.http.app_state import current_service, json_response
from service.api.http.operations import Answer, operation
from service.api.http.request_body import read_body
from service.api.http.wire_types import RequestBody
from service.api.operator.admin import blueprint
from service.api.operator.stop_wire import bounds_of
from service.api.operator.workers import ask_stop, current_workers
from service.freezes import move_on_after
from service.stop_state import Phase

__all__ = ["blueprint"]

REASON = "admin drain"
"""The reason of such a shutdown in its report."""
NOTICE_S = 0.5
"""How long the answer waits for the notice, which comes from the master where there is one."""


class Drain(RequestBody, frozen=True, kw_only=True):
    """``{}``"""


class Draining(msgspec.Struct, frozen=True, kw_only=True):
    """What happens now.

    ``{"phase": "draining", "reason": "admin drain", "workers": 4, "bounds_s": {"lame_duck": 0.0, "draining": 2.0,
    "interrupting": 1.0, "releasing": 1.0, "total": 5.0}}``
    """

    phase: Annotated[str, Meta(description="Of the worker that answers; `serving` if the notice is on its way yet.")]
    reason: Annotated[str, Meta(description="The cause of the first notice; empty before it.")]
    workers: Annotated[int, Meta(description="How many processes stop.")]
    bounds_s: Annotated[
        dict[str, float], Meta(description="How long each phase may take, and `total`: then all processes have gone.")
    ]


@blueprint.post("/drain")
@operation(
    id="drain",
    answers=(Answer(status=202, description="The shutdown has begun, or had begun before.", body=Draining),),
    errors=(CrossSiteError,),
    body=Drain,
    needs=("administer",),
)
async def drain() -> TrioResponse:
    """Begin the shutdown of the whole server, of all its workers, as SIGTERM would.

    A second call changes nothing. Whether the server starts again is up to what has started it.
    """
    service = current_service()
    await read_body(request, Drain, service)
    shutdown = service.shutdown
    workers = len(current_workers().known())
    ask_stop(service, REASON)  # also if this worker stops already: it may stop alone
    with move_on_after(NOTICE_S):
        await shutdown.reached(Phase.LAME_DUCK)
    answer = Draining(
        phase=str(shutdown.phase), reason=shutdown.reason, workers=workers, bounds_s=bounds_of(service.settings)
    )
    return json_response(answer, 202)
