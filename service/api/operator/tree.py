"""Calls about the live tree: one snapshot, and a stream of changes.

A viewer of the stream costs nothing between two looks, and all viewers share the looks. The stream holds no turn and
no session, and it ends with the drain of a worker that others replace, or else when the streams of turns have ended: a
viewer sees the phases of a shutdown pass until then.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import msgspec
import trio
from msgspec import UNSET
from quart import Blueprint, request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse

from service.api.http.admin_access import CrossSiteError
from service.api.http.app_state import current_service, encoded_response
from service.api.http.event_stream import HEADERS, MEDIA_TYPE, LastPiece
from service.api.http.operations import Answer, operation
from service.api.http.query_params import read_query
from service.api.http.request_resources import release_after_request
from service.api.operator.tree_wire import (
    Counts,
    Sampling,
    StopShown,
    Tree,
    TreeChange,
    TreeEnd,
    TreeEventsQuery,
    TreeHead,
    TreeQuery,
    WorkerShown,
)
from service.errors import NodeNotFoundError, StreamLimitError, WorkerNotFoundError
from service.settings import Settings
from service.shutdown import Shutdown
from service.steps import in_steps
from service.stop_state import Phase
from service.supervisor import Service
from service.telemetry.live_tree import Snapshot
from service.telemetry.tree_nodes import Node
from service.telemetry.tree_views import Difference, View

blueprint = Blueprint("admin", __name__, url_prefix="/admin")

SHARED_S = 0.25
"""How old a snapshot may be that answers a call."""
VIEWERS_MAX = 16
HEARTBEAT_S = 2.0
COSTS_TOLD_S = 1.0
"""How often a stream tells what its looks cost."""
_PIECE_NODES = 500
"""So many nodes are encoded in one step."""
_STARTED_AT = datetime.now(UTC)
_PROCESS = token_hex(4)
"""Makes the ids of this process's snapshots differ from those of the process before."""
_HEARTBEAT = b": heartbeat\n\n"


@blueprint.get("/tree")
@operation(
    id="get_live_tree",
    needs=("administer",),
    answers=(Answer(status=200, description="The tree as the last look has found it.", body=Tree),),
    errors=(NodeNotFoundError, WorkerNotFoundError, CrossSiteError),
    query=TreeQuery,
)
async def get_live_tree() -> TrioResponse:
    """Get the live tree of one worker.

    It has all tasks, nurseries and cancel scopes, and the sessions, turns, streams and connections that they are.
    A snapshot is shared by all callers for a quarter of a second. With `If-None-Match` the answer is 304 meanwhile.
    """
    service = current_service()
    query = read_query(request, TreeQuery)
    _check_worker(query.worker)
    snapshot = await service.tree.look(max_age_s=SHARED_S)
    etag = f'"{_id_of(snapshot)}"'
    if request.headers.get("If-None-Match") == etag:
        response = TrioResponse(b"", 304, {"ETag": etag, "Cache-Control": "no-store"})
        response.headers.pop("Content-Type", None)
        return response
    view = View(under=None if query.under is UNSET else query.under, nodes_max=query.nodes)
    nodes = await in_steps(view.of(snapshot.nodes))
    if nodes is None:
        raise NodeNotFoundError
    head = _head(service, snapshot, shown=len(nodes), interval_s=SHARED_S)
    pieces = []
    for piece in _with_lists(head, {"nodes": nodes}):
        pieces.append(piece)
        await trio.lowlevel.checkpoint()
    return encoded_response(b"".join(pieces), etag=etag)


@blueprint.get("/tree/events")
@operation(
    id="stream_live_tree",
    needs=("administer",),
    answers=(
        Answer(
            status=200,
            description="A stream of changes.",
            streams=True,
            events="Events `snapshot` (a `Tree`), then `change` and at last `end`, as docs/admin.md has them.",
        ),
    ),
    errors=(NodeNotFoundError, WorkerNotFoundError, CrossSiteError, StreamLimitError),
    query=TreeEventsQuery,
)
async def stream_live_tree() -> TrioResponse:
    """Follow the live tree: a snapshot, then what changes, several times a second, up to the end of the process."""
    service = current_service()
    query = read_query(request, TreeEventsQuery)
    _check_worker(query.worker)
    if len(service.tree.viewers) >= VIEWERS_MAX:
        raise StreamLimitError(f"{VIEWERS_MAX} viewers follow the tree already; try again later.")
    if request.method == "HEAD":
        return TrioResponse(b"", headers=HEADERS, content_type=MEDIA_TYPE)
    view = View(under=None if query.under is UNSET else query.under, nodes_max=query.nodes)
    body = TreeStream(service, view, interval_s=query.interval_ms / 1000)
    release_after_request(body.close)
    return TrioResponse(body, headers=HEADERS, content_type=MEDIA_TYPE)


def _check_worker(pid: Any) -> None:
    if pid is not UNSET and pid != os.getpid():
        raise WorkerNotFoundError


class TreeStream(ResponseBody):
    """The body of a stream of changes. It waits only in ``__anext__``, and ends with the process's streams."""

    def __init__(self, service: Service, view: View, *, interval_s: float) -> None:
        self._service = service
        self._tree = service.tree
        self._task = trio.lowlevel.current_task()
        self._tree.viewers[self._task] = trio.current_time()
        self._stop = service.shutdown
        self._view = view
        self._interval_s = interval_s
        self._last: Snapshot | None = None
        self._told: dict[str, Any] = {}
        self._told_id = ""
        self._costs_told_at = 0.0
        self._wrote_at = trio.current_time()
        self._pieces: Iterator[bytes] = iter(())
        self._ended = False

    async def __aenter__(self) -> "TreeStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # this may never run: the request closes the stream

    def __aiter__(self) -> "TreeStream":
        return self

    def close(self) -> None:
        """Count as a viewer no more. Idempotent."""
        self._tree.viewers.pop(self._task, None)

    async def __anext__(self) -> bytes:
        while True:
            piece = next(self._pieces, None)
            if piece is not None:
                self._wrote_at = trio.current_time()
                return piece
            if self._ended:
                raise StopAsyncIteration
            self._pieces = await self._next_event()

    async def _next_event(self) -> Iterator[bytes]:
        """Wait for what is to be told next."""
        if self._last is not None:
            due_at = self._tree.next_look_at(self._last, interval_s=self._interval_s)
            phase = self._stop.phase
            with self._stop.until(_after(phase)):
                await trio.sleep_until(due_at)
            if phase is not self._stop.phase and trio.current_time() < due_at and not self._is_over:
                return self._tell_change(self._last, Difference(), {})  # the phase alone, now
        if self._is_over:
            return self._end("replaced" if self._stop.is_replaced else "shutdown")
        with self._stop.until(Phase.RELEASING):
            snapshot = await self._tree.look(max_age_s=self._interval_s / 2)
            nodes = await in_steps(self._view.of(snapshot.nodes))
            if nodes is None:
                return self._end("gone")
            difference = await in_steps(self._view.changes(nodes))
            is_first, self._last = self._last is None, snapshot
            if is_first:
                return self._tell_all(snapshot, nodes)
            ends = {it: self._tree.ends[it] for it in difference.removed if it in self._tree.ends}
            return self._tell_change(snapshot, difference, ends, shown=len(nodes))
        return self._end("shutdown")

    @property
    def _is_over(self) -> bool:
        phase = self._stop.phase
        return phase >= Phase.RELEASING or (phase >= Phase.DRAINING and self._stop.is_replaced)

    def _tell_all(self, snapshot: Snapshot, nodes: Sequence[Node]) -> Iterator[bytes]:
        head = _head(self._service, snapshot, shown=len(nodes), interval_s=self._interval_s)
        self._told_id = head.id
        self._told = {"worker": head.worker, "workers": head.workers, "shutdown": head.shutdown, "counts": head.counts}
        yield b"event: snapshot\ndata: "
        yield from _with_lists(head, {"nodes": nodes})
        yield b"\n\n"

    def _tell_change(
        self, snapshot: Snapshot, difference: Difference, ends: dict[str, str], *, shown: int | None = None
    ) -> Iterator[bytes]:
        """The event of a change; a heartbeat now and then if there is none."""
        now = trio.current_time()
        head = _head(self._service, snapshot, shown=shown or 0, interval_s=self._interval_s)
        fresh = {"worker": head.worker, "workers": head.workers, "shutdown": head.shutdown}
        if shown is not None:
            fresh["counts"] = head.counts
        news: dict[str, Any] = {name: value for name, value in fresh.items() if self._told.get(name) != value}
        if difference.is_empty and not news:
            return iter((_HEARTBEAT,) if now >= self._wrote_at + HEARTBEAT_S else ())
        self._told |= news
        if now >= self._costs_told_at + COSTS_TOLD_S:
            self._costs_told_at = now
            news["sampling"] = head.sampling
        change = TreeChange(
            id=head.id, after=self._told_id, taken_at=datetime.now(UTC), clock=self._tree.moment(now), **news
        )
        self._told_id = head.id
        return self._change(change, difference, ends)

    def _change(self, change: TreeChange, difference: Difference, ends: dict[str, str]) -> Iterator[bytes]:
        yield b"event: change\ndata: "
        lists = {"added": difference.added, "changed": difference.changed, "removed": difference.removed}
        last = b"" if not ends else b',"ends":' + msgspec.json.encode(ends)
        yield from _with_lists(change, {name: it for name, it in lists.items() if it}, last=last)
        yield b"\n\n"

    def _end(self, reason: Any) -> Iterator[bytes]:
        self._ended = True
        end = TreeEnd(reason=reason, shutdown=_stop_of(self._service.settings, self._stop, self._service))
        return iter((LastPiece(b"event: end\ndata: " + msgspec.json.encode(end) + b"\n\n"),))


def _with_lists(head: msgspec.Struct, lists: dict[str, Sequence[Any]], *, last: bytes = b"") -> Iterator[bytes]:
    """A JSON object with these lists at its end, in pieces that take a fraction of a millisecond each."""
    yield msgspec.json.encode(head)[:-1]
    for name, things in lists.items():
        yield b',"%b":[' % name.encode()
        for start in range(0, len(things), _PIECE_NODES):
            encoded = msgspec.json.encode(things[start : start + _PIECE_NODES])
            yield (b"," if start else b"") + encoded[1:-1]
        yield b"]"
    yield last + b"}"


def _head(service: Service, snapshot: Snapshot, *, shown: int, interval_s: float) -> TreeHead:
    stop = service.shutdown
    this = WorkerShown(
        pid=os.getpid(), status="draining" if stop.phase >= Phase.DRAINING else "serving", started_at=_STARTED_AT
    )
    return TreeHead(
        id=_id_of(snapshot),
        taken_at=snapshot.taken_at,
        clock=snapshot.clock,
        worker=this,
        workers=(this,),
        shutdown=_stop_of(service.settings, stop, service),
        sampling=Sampling(
            interval_s=round(service.tree.next_look_at(snapshot, interval_s=interval_s) - snapshot.at, 3),
            took_ms=snapshot.took_ms,
            cpu_ms=snapshot.cpu_ms,
            longest_step_ms=snapshot.longest_step_ms,
        ),
        counts=Counts(
            tasks=snapshot.tasks,
            nodes=len(snapshot.nodes) + snapshot.left_out,
            left_out=len(snapshot.nodes) + snapshot.left_out - shown,
        ),
    )


def _stop_of(settings: Settings, stop: Shutdown, service: Service) -> StopShown:
    return StopShown(
        phase=str(stop.phase),
        reason=stop.reason,
        entered={str(phase): service.tree.moment(at) for phase, at in stop.entered_at.items()},
        bounds_s={
            "lame_duck": settings.lame_duck_timeout_s,
            "draining": settings.drain_timeout_s,
            "interrupting": settings.cleanup_timeout_s,
            "releasing": settings.release_timeout_s,
            "total": settings.shutdown_total_s,
        },
    )


def _id_of(snapshot: Snapshot) -> str:
    return f"{_PROCESS}-{snapshot.number}"


def _after(phase: Phase) -> Phase:
    return Phase(min(phase + 1, Phase.RELEASED))
