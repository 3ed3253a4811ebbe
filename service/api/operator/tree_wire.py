"""The answers and queries of the calls about the live tree, each with one example."""

from datetime import datetime
from typing import Annotated, Literal, Self

import msgspec
from msgspec import UNSET, Meta, UnsetType

from service.api.http.wire_types import Query
from service.api.operator.stop_wire import StopShown
from service.cluster.workers import KnownWorker, WorkerPhase
from service.telemetry.tree_nodes import Node

NODES_DEFAULT = 5000
INTERVAL_MS_DEFAULT = 250

Time = Annotated[datetime, Meta(tz=True)]
Pid = Annotated[int, Meta(ge=1, le=1 << 31, description="Another worker of this server, by its process id.")]
Under = Annotated[
    str, Meta(pattern=r"^[0-9]{1,15}$(?!\n)", description="Only the node with this id, and what is below it.")
]
NodesMax = Annotated[int, Meta(ge=10, le=20_000, description="At most so many nodes; those near the root come first.")]


class TreeQuery(Query, frozen=True, kw_only=True):
    """``?nodes=1000&under=41``"""

    worker: Pid | UnsetType = UNSET
    under: Under | UnsetType = UNSET
    nodes: NodesMax = NODES_DEFAULT


class TreeEventsQuery(Query, frozen=True, kw_only=True):
    """``?interval_ms=500``"""

    worker: Pid | UnsetType = UNSET
    under: Under | UnsetType = UNSET
    nodes: NodesMax = NODES_DEFAULT
    interval_ms: Annotated[
        int, Meta(ge=100, le=5000, description="The time between two looks; longer where a look is expensive.")
    ] = INTERVAL_MS_DEFAULT


class WorkerShown(msgspec.Struct, frozen=True, kw_only=True):
    """``{"pid": 4711, "status": "serving", "started_at": "2026-01-31T09:30:00Z"}``"""

    pid: int
    status: WorkerPhase
    started_at: Time

    @classmethod
    def of(cls, worker: KnownWorker) -> Self:
        return cls(pid=worker.pid, status=worker.status, started_at=worker.started_at)


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How often there is a look, what the last walk through the tree has cost, and the longest step since.

    ``{"interval_s": 0.25, "took_ms": 12.1, "cpu_ms": 9.8, "longest_step_ms": 1.2}``
    """

    interval_s: float
    took_ms: float
    cpu_ms: float
    longest_step_ms: float


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """``{"tasks": 431, "nodes": 902, "left_out": 0}``"""

    tasks: int
    nodes: int
    left_out: int


class TreeHead(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot without its nodes.

    ``{"id": "3f2a91c0-17", "taken_at": "2026-01-31T09:30:00Z", "clock": 812.401, "worker": {"pid": 4711, "status":
    "serving", "started_at": "2026-01-31T09:16:27Z"}, "workers": [{"pid": 4711, "status": "serving", "started_at":
    "2026-01-31T09:16:27Z"}], "shutdown": {"phase": "serving", "reason": "", "entered": {}, "bounds_s": {"total": 5.0}},
    "sampling": {"interval_s": 0.25, "took_ms": 12.1, "cpu_ms": 9.8, "longest_step_ms": 1.2}, "counts": {"tasks": 431,
    "nodes": 902, "left_out": 0}}``
    """

    id: str
    taken_at: Time
    clock: Annotated[float, Meta(description="The process's own clock, in seconds, when the look began.")]
    worker: WorkerShown
    workers: tuple[WorkerShown, ...]
    shutdown: StopShown
    sampling: Sampling
    counts: Counts


class Tree(TreeHead, frozen=True, kw_only=True):
    """The live tree of one process.

    ``{"id": "3f2a91c0-17", "taken_at": "2026-01-31T09:30:00Z", "clock": 812.401, "worker": {"pid": 4711, "status":
    "serving", "started_at": "2026-01-31T09:16:27Z"}, "workers": [{"pid": 4711, "status": "serving", "started_at":
    "2026-01-31T09:16:27Z"}], "shutdown": {"phase": "serving", "reason": "", "entered": {}, "bounds_s": {"total": 5.0}},
    "sampling": {"interval_s": 0.25, "took_ms": 12.1, "cpu_ms": 9.8, "longest_step_ms": 1.2}, "counts": {"tasks": 1,
    "nodes": 1, "left_out": 0}, "nodes": [{"id": "1", "parent": null, "kind": "process", "name": "process 4711"}]}``
    """

    nodes: Annotated[tuple[Node, ...], Meta(description="Each after its parent; siblings oldest first.")]


class TreeChange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change, as the head of its event: ``added``, ``changed``, ``removed`` and ``ends`` follow where there are any.

    ``{"id": "3f2a91c0-18", "after": "3f2a91c0-17", "taken_at": "2026-01-31T09:30:00Z", "clock": 812.66}``
    """

    id: str
    after: str
    taken_at: Time
    clock: float
    worker: WorkerShown | UnsetType = UNSET
    workers: tuple[WorkerShown, ...] | UnsetType = UNSET
    shutdown: StopShown | UnsetType = UNSET
    sampling: Sampling | UnsetType = UNSET
    counts: Counts | UnsetType = UNSET


class TreeEnd(msgspec.Struct, frozen=True, kw_only=True):
    """``{"reason": "shutdown", "shutdown": {"phase": "releasing", "reason": "SIGTERM", "entered": {}, "bounds_s":
    {"total": 5.0}}}``"""

    reason: Literal["shutdown", "replaced", "gone"]
    shutdown: StopShown
