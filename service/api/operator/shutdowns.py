"""The call for the reports of past shutdowns."""

from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import trio
from msgspec import UNSET, Meta, UnsetType
from quart import request
from quart_trio.wrappers import TrioResponse

from service.api.http.admin_access import CrossSiteError
from service.api.http.app_state import current_service, json_response
from service.api.http.operations import Answer, operation
from service.api.http.query_params import read_query
from service.api.http.wire_types import Query
from service.api.operator.admin import blueprint
from service.telemetry.shutdown_history import Line, history_file, read_history

__all__ = ["blueprint"]

KEPT_MAX = 50
Time = Annotated[datetime, Meta(tz=True)]


class ShutdownsQuery(Query, frozen=True, kw_only=True):
    """``?limit=10``"""

    limit: Annotated[int, Meta(ge=1, le=KEPT_MAX)] = KEPT_MAX


class PastShutdown(msgspec.Struct, frozen=True, kw_only=True):
    """The stop of a process with its report, or a crash, which has none.

    ``{"kind": "stop", "at": "2026-01-31T09:30:03Z", "began_at": "2026-01-31T09:30:01Z", "started_at":
    "2026-01-30T20:00:00Z", "pid": 4711, "version": "0.1.0", "exit_code": 0, "reason": "SIGTERM", "phases_ms":
    {"notice": 0.3, "draining": 2000.4, "total": 2043.9}, "bounds_ms": {"draining": 2000, "total": 5000},
    "turns_finished": 3, "turns_interrupted": 9, "turns_suspended": 0, "streams_ended": 12, "streams_aborted": 0,
    "connections_aborted": 0, "clients_closed": 1, "tasks_left": 0, "faults": []}``
    """

    kind: Literal["stop", "crash"]
    at: Annotated[Time | None, Meta(description="When the process had stopped; null for a crash.")]
    started_at: Time
    pid: int
    version: str
    began_at: Time | UnsetType = UNSET
    exit_code: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    phases_ms: dict[str, float] | UnsetType = UNSET
    bounds_ms: dict[str, float] | UnsetType = UNSET
    turns_finished: int | UnsetType = UNSET
    turns_interrupted: int | UnsetType = UNSET
    turns_suspended: int | UnsetType = UNSET
    turns_lost: int | UnsetType = UNSET
    streams_ended: int | UnsetType = UNSET
    streams_aborted: int | UnsetType = UNSET
    connections_aborted: int | UnsetType = UNSET
    clients_closed: int | UnsetType = UNSET
    tasks_left: int | UnsetType = UNSET
    faults: tuple[str, ...] | UnsetType = UNSET


class Shutdowns(msgspec.Struct, frozen=True, kw_only=True):
    """The last shutdowns, newest first.

    ``{"data": [], "kept": "file"}``
    """

    data: tuple[PastShutdown, ...]
    kept: Annotated[
        Literal["file", "none"], Meta(description="Where reports are kept: `none` without a file for them.")
    ]


@blueprint.get("/shutdowns")
@operation(
    id="list_shutdowns",
    answers=(Answer(status=200, description="The last shutdowns.", body=Shutdowns),),
    errors=(CrossSiteError,),
    needs=("administer",),
    query=ShutdownsQuery,
)
async def list_shutdowns() -> TrioResponse:
    """List the last shutdowns of the workers of this server with their reports, newest first.

    A process that has left no report was killed: it is told as a crash. Reports are kept beside a SQLite database, or
    in `shutdowns_file`.
    """
    query = read_query(request, ShutdownsQuery)
    file = history_file(current_service().settings)
    if file is None:
        return json_response(Shutdowns(data=(), kept="none"))
    lines = await trio.to_thread.run_sync(partial(read_history, file, limit=query.limit), abandon_on_cancel=True)
    return json_response(Shutdowns(data=tuple(map(_shown, lines)), kept="file"))


def _shown(line: Line) -> PastShutdown:
    run = line.of
    if line.at is None:
        return PastShutdown(kind="crash", at=None, started_at=run.started_at, pid=run.pid, version=run.version)
    report: dict[str, Any] = line.report or {}
    known = {name: value for name, value in report.items() if name in PastShutdown.__struct_fields__}
    total_ms = float(report.get("phases_ms", {}).get("total", 0))
    shown = {
        "kind": "stop",
        "at": line.at,
        "began_at": line.at - timedelta(milliseconds=total_ms),
        "started_at": run.started_at,
        "pid": run.pid,
        "version": run.version,
        "exit_code": line.exit_code,
        "bounds_ms": line.bounds_ms or {},
    }
    return msgspec.convert(known | shown, PastShutdown)
