"""The metrics, for Prometheus. What each of them means: ``docs/metrics.md``."""

from quart import Blueprint, request
from quart_trio.wrappers import TrioResponse

from service.api.http.app_state import current_service
from service.api.http.held_bytes import bytes_of
from service.api.http.operations import Answer, operation
from service.steps import in_steps
from service.telemetry.metrics.exposition import MEDIA_TYPE, exposed

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
@operation(
    id="metrics",
    answers=(Answer(status=200, description="The metrics, one a line.", media_type="text/plain"),),
    needs=("metrics", "administer"),
)
async def metrics() -> TrioResponse:
    """Tell the metrics in Prometheus' text format: the sums of all workers of this server.

    Needs a key that may `metrics` or `administer`; a plain key may neither. With `metrics_bind` it is also served at an
    address of its own, without a key.
    """
    gauges = current_service().gauges
    await gauges.count_sessions()
    await gauges.measure()
    text = await in_steps(exposed(gauges.metrics.memory))
    bytes_of(request.scope).add(len(text))  # never refused: a monitor has to see why others are
    return TrioResponse(text, 200, {"Cache-Control": "no-store"}, content_type=MEDIA_TYPE)
