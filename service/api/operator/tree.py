"""Calls about the live tree: one snapshot, and a stream of changes.

A viewer of the stream costs nothing between two looks, and all viewers share the looks. The stream holds no turn and
no session, and it ends with the drain of a worker that others replace, or else when the streams of turns have ended: a
viewer sees the phases of a shutdown pass until then. A viewer that takes no byte for ``unread_timeout_s`` is cut: it
comes back with a new snapshot.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, cast

import msgspec
import trio
from msgspec import UNSET, UnsetType
from quart import request
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse

from service.api.http.admin_access import CrossSiteError
from service.api.http.app_state import current_service, encoded_response, no_content
from service.api.http.event_stream import ENDS_UNREAD, HEADERS, MEDIA_TYPE, LastPiece
from service.api.http.operations import Answer, operation
from service.api.http.proxy import is_from_peer, pass_to
from service.api.http.query_params import read_query
from service.api.http.request_resources import release_after_request
from service.api.operator.admin import blueprint
from service.api.operator.stop_wire import stop_of
from service.api.operator.tree_wire import (
    Counts,
    Sampling,
    Tree,
    TreeChange,
    TreeEnd,
    TreeEventsQuery,
    TreeHead,
    TreeQuery,
    WorkerShown,
)
from service.api.operator.workers import Workers, current_workers
from service.errors import NodeNotFoundError, StreamLimitError, WorkerNotFoundError
from service.steps import in_steps
from service.stop_state import Phase
from service.supervisor import Service
from service.telemetry.live_tree import STEP_S, Snapshot
from service.telemetry.tree_nodes import Node
from service.telemetry.tree_views import Difference, View

__all__ = ["blueprint"]

SHARED_S = 0.25
"""How old a snapshot may be that answers a call."""
VIEWERS_MAX = 16
HEARTBEAT_S = 2.0
COSTS_TOLD_S = 1.0
"""How often a stream tells what its looks cost."""
_PIECE_NODES = 500
"""So many nodes are encoded in one step."""
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
    if (response := await _other_worker(service, query.worker)) is not None:
        return response
    snapshot = await service.tree.look(max_age_s=SHARED_S)
    etag = f'"{_id_of(snapshot)}"'
    if request.headers.get("If-None-Match") == etag:
        return no_content(304, {"ETag": etag, "Cache-Control": "no-store"})
    view = View(under=None if query.under is UNSET else query.under, nodes_max=query.nodes)
    nodes = await in_steps(view.of(snapshot.nodes, snapshot.depths), step_s=STEP_S)
    if nodes is None:
        raise NodeNotFoundError
    await trio.lowlevel.checkpoint()  # the answer is a step of its own
    head = _head(service, current_workers(), snapshot, shown=len(nodes), interval_s=SHARED_S)
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
    cast("dict[str, Any]", request.scope)[ENDS_UNREAD] = True  # viewers that are away take no place from others
    if (response := await _other_worker(service, query.worker)) is not None:
        return response
    if len(service.tree.viewers) >= VIEWERS_MAX:
        raise StreamLimitError(f"{VIEWERS_MAX} viewers follow the tree already; try again later.")
    if request.method == "HEAD":
        return TrioResponse(b"", headers=HEADERS, content_type=MEDIA_TYPE)
    view = View(under=None if query.under is UNSET else query.under, nodes_max=query.nodes)
    body = TreeStream(service, view, interval_s=query.interval_ms / 1000)
    release_after_request(body.close)
    return TrioResponse(body, headers=HEADERS, content_type=MEDIA_TYPE)


async def _other_worker(service: Service, pid: int | UnsetType) -> TrioResponse | None:
    """The answer of another worker, if the request is for one.

    Raises:
        WorkerNotFoundError
        ResourcesExhaustedError, StoreError: The worker cannot be reached, or does not answer in time.
    """
    worker = None if pid is UNSET else current_workers().find(pid)
    if worker is None:
        return None
    response = None if is_from_peer() else await pass_to(worker.address, cut=_end_event(service, "gone"))
    if response is None:
        raise WorkerNotFoundError
    return response


class TreeStream(ResponseBody):
    """The body of a stream of changes. It waits only in ``__anext__``, and ends with the process's streams."""

    def __init__(self, service: Service, view: View, *, interval_s: float) -> None:
        self._service = service
        self._workers = current_workers()
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
            seen = await in_steps(self._view.look(snapshot.nodes, snapshot.depths), step_s=STEP_S)
            if seen is None:
                return self._end("gone")
            nodes, difference = seen
            await trio.lowlevel.checkpoint()  # what is told of it is a step of its own
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
        head = _head(self._service, self._workers, snapshot, shown=len(nodes), interval_s=self._interval_s)
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
        head = _head(self._service, self._workers, snapshot, shown=shown or 0, interval_s=self._interval_s)
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
        return iter((LastPiece(_end_event(self._service, reason)),))


def _end_event(service: Service, reason: Any) -> bytes:
    return b"event: end\ndata: " + msgspec.json.encode(TreeEnd(reason=reason, shutdown=stop_of(service))) + b"\n\n"


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


def _head(service: Service, workers: Workers, snapshot: Snapshot, *, shown: int, interval_s: float) -> TreeHead:
    return TreeHead(
        id=_id_of(snapshot),
        taken_at=snapshot.taken_at,
        clock=snapshot.clock,
        worker=WorkerShown.of(workers.this()),
        workers=tuple(map(WorkerShown.of, workers.known())),
        shutdown=stop_of(service),
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


def _id_of(snapshot: Snapshot) -> str:
    return f"{_PROCESS}-{snapshot.number}"


def _after(phase: Phase) -> Phase:
    return Phase(min(phase + 1, Phase.RELEASED))
