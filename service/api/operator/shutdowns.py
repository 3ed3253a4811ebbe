"""The call for the reports of past shutdowns."""

from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from quart import request
from quart_trio.wrappers import TrioResponse

from service.api.http.admin_access import CrossSiteError
from service.api.http.app_state import current_service, json_response
from service.api.http.operations import Answer, operation
from service.api.http.query_params import read_query
from service.api.http.wire_types import Query
from service.api.operator.admin import blueprint
from service.errors import ReportsUnavailableError
from service.telemetry.shutdown_history import INTEGER_MAX, Past, Time

__all__ = ["blueprint"]

KEPT_MAX = 50
Count = Annotated[int, Meta(ge=0, le=INTEGER_MAX)]


class ShutdownsQuery(Query, frozen=True, kw_only=True):
    """``?limit=10``"""

    limit: Annotated[int, Meta(ge=1, le=KEPT_MAX)] = KEPT_MAX


class PastShutdown(msgspec.Struct, frozen=True, kw_only=True):
    """The stop of a process with its report, or a process that has left none: a crash, or it cannot be seen from here.

    ``{"kind": "stop", "at": "2026-01-31T09:30:03Z", "began_at": "2026-01-31T09:30:01Z", "started_at":
    "2026-01-30T20:00:00Z", "pid": 4711, "version": "0.1.0", "exit_code": 0, "reason": "SIGTERM", "phases_ms":
    {"notice": 0.3, "draining": 2000.4, "total": 2043.9}, "bounds_ms": {"draining": 2000, "total": 5000},
    "turns_finished": 3, "turns_interrupted": 9, "turns_suspended": 0, "streams_ended": 12, "streams_aborted": 0,
    "connections_aborted": 0, "clients_closed": 1, "tasks_left": 0, "faults": []}``
    """

    kind: Annotated[
        Literal["stop", "crash", "unknown"],
        Meta(
            description="`crash`: the process is gone and has left no report. `unknown`: it has left none, and runs or "
            "is gone in another container or on another machine."
        ),
    ]
    at: Annotated[Time | None, Meta(description="When the process had stopped; null without a report.")]
    started_at: Time
    pid: int
    version: str
    began_at: Time | UnsetType = UNSET
    exit_code: Annotated[int, Meta(ge=-INTEGER_MAX, le=INTEGER_MAX)] | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    phases_ms: dict[str, float] | UnsetType = UNSET
    bounds_ms: dict[str, float] | UnsetType = UNSET
    turns_finished: Count | UnsetType = UNSET
    turns_interrupted: Count | UnsetType = UNSET
    turns_suspended: Count | UnsetType = UNSET
    turns_lost: Count | UnsetType = UNSET
    streams_ended: Count | UnsetType = UNSET
    streams_aborted: Count | UnsetType = UNSET
    connections_aborted: Count | UnsetType = UNSET
    clients_closed: Count | UnsetType = UNSET
    tasks_left: Count | UnsetType = UNSET
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
    errors=(CrossSiteError, ReportsUnavailableError),
    needs=("administer",),
    query=ShutdownsQuery,
)
async def list_shutdowns() -> TrioResponse:
    """List the last shutdowns of the workers of this server with their reports, newest first.

    A process that has left no report was killed: it is told as a crash. Of one in another container or on another
    machine only that process could tell: it is `unknown`. Reports are kept beside a SQLite database, or in
    `shutdowns_file`.
    """
    query = read_query(request, ShutdownsQuery)
    reports = current_service().shutdown_reports
    if reports is None:
        return json_response(Shutdowns(data=(), kept="none"))
    past = await reports.read(limit=query.limit)
    return json_response(Shutdowns(data=tuple(map(_shown, past)), kept="file"))


def _shown(past: Past) -> PastShutdown:
    """Return what the file tells of a process. A part that another version has written otherwise is left out."""
    line, run = past.line, past.line.of
    if line.at is None:
        kind: Literal["crash", "unknown"] = "crash" if past.fate == "gone" else "unknown"
        return PastShutdown(kind=kind, at=None, started_at=run.started_at, pid=run.pid, version=run.version)
    report: dict[str, Any] = line.report if isinstance(line.report, dict) else {}
    told = report | {"exit_code": line.exit_code, "bounds_ms": line.bounds_ms or {}}
    known = {}
    for field in msgspec.structs.fields(PastShutdown):
        if field.name in told and field.default is UNSET:
            with suppress(msgspec.ValidationError):
                known[field.name] = msgspec.convert(told[field.name], field.type)
    with suppress(OverflowError):  # nor is a time before the first year shown
        known["began_at"] = line.at - timedelta(milliseconds=known.get("phases_ms", {}).get("total", 0))
    return PastShutdown(kind="stop", at=line.at, started_at=run.started_at, pid=run.pid, version=run.version, **known)
