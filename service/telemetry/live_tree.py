"""The live tree: all nurseries, tasks and cancel scopes of this process, with the names that the service gives them.

A look walks through the tree in short steps, between which other tasks run and the tree changes: a snapshot is not one
moment, but each of its nodes was there while the walk lasted. A node keeps its id from look to look. So the tree is
mirrored here, but only while somebody looks: without a look for :data:`KEPT_S` nothing is kept, and nothing runs.

All viewers share one snapshot. Looks read only: they cancel nothing, wake nothing and hold no task back.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from math import inf
from typing import Any

import msgspec
import trio

from service.ids import owner_of, public_id
from service.steps import Steps
from service.telemetry.cancel_scopes import is_cancelled, is_over, scopes_in, was_cancelled
from service.telemetry.tree_nodes import Node, Notes, Source

STEP_S = 0.002
"""The time after which a walk lets other tasks run."""
NODES_A_STEP = 16
"""After so many nodes the walk looks at the time."""
NODES_MAX = 50_000
"""Bound on the nodes of a snapshot; what is beyond it counts as left out."""
KEPT_S = 30.0
"""How long the ids of nodes are kept without a look."""
SHARE_MAX = 0.1
"""How much of a core looks may take, if the next look may wait for that."""
WAIT_MAX_S = 0.4
"""How long the next look waits at the most: what has gone has to leave the viewers within half a second."""
_ENDS_KEPT = 2000
_LOOPS = (" loop", " watcher", " poller", " keeper")
_LISTENERS = ("listener", "accept")
_NAMES = {
    "<init>": "Trio's first task",
    "<TrioToken.run_sync_soon task>": "calls from other threads",
    "worker_serve": "HTTP server (hypercorn)",
    "hypercorn.trio.serve": "HTTP server (hypercorn)",
    "handle_lifespan": "lifespan: holds the service",
    "_close_when_idle": "idle timer",
    "_cancel_unopened": "guard of the start",
    "_receive_shutdown": "waits for hypercorn's end",
    "raise_shutdown": "waits for hypercorn's wish to stop",
    "serve_listeners": "accepts clients",
    "_serve_one_listener": "listener",
}
_OF_A_CLASS = ("run", "_run", "__call__")
"""Names of functions that say nothing without the name of their class."""


class Snapshot:
    """The tree as one look has found it.

    Attributes:
        number: Grows with each snapshot of this process.
        at: When the look began, on Trio's clock.
        clock: The same on the clock of the nodes, in seconds.
        taken_at: The same as wall time.
        nodes: Each after its parent; siblings in the order in which looks have found them.
        tasks: How many tasks there are.
        left_out: How many of them, at least, are not among the nodes.
        took_ms, cpu_ms, longest_step_ms: How long the walk took, with the steps of other tasks and without, and its
            longest step.
    """

    def __init__(self, number: int, at: float, clock: float) -> None:
        self.number = number
        self.at = at
        self.clock = clock
        self.taken_at = datetime.now(UTC)
        self.nodes: list[Node] = []
        self.tasks = self.left_out = 0
        self.took_ms = self.cpu_ms = self.longest_step_ms = 0.0

    def __repr__(self) -> str:
        return f"<Snapshot {self.number}: {len(self.nodes)} nodes>"


class LiveTree:
    """The tree of the event loop in which this is made.

    Attributes:
        viewers: The tasks that follow the tree now, each with the moment on Trio's clock at which it began. Their own
            waits are not shown: each look would be news for the next one.
    """

    def __init__(self) -> None:
        self.viewers: dict[trio.lowlevel.Task, float] = {}
        self.ends: dict[str, str] = {}
        """How the turns have ended that the last looks found gone, by the ids of their nodes."""
        self._epoch = trio.current_time()
        self._sources: list[Source] = []
        self._looking = trio.Lock()
        self._last: Snapshot | None = None
        self._root: _Item | None = None
        self._living: dict[str, Callable[[], str]] = {}
        self._items = self._snapshots = 0
        self._asked_at = -inf
        self._asked = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<LiveTree: {self._snapshots} looks, {len(self.viewers)} viewers>"

    def add_source(self, source: Source) -> None:
        """Let a part of the service say which tasks and scopes are its own."""
        self._sources.append(source)

    def moment(self, at: float) -> float:
        """A moment of Trio's clock on the clock of the snapshots."""
        return round(at - self._epoch, 3)

    async def look(self, *, max_age_s: float) -> Snapshot:
        """A snapshot that is not older than this: the last one, or a new one. Several callers share one walk.

        A cancelled walk is given up; the next caller begins another one.
        """
        async with self._looking:
            self._asked_at = trio.current_time()
            last = self._last
            if last is not None and self._asked_at - last.at <= max_age_s:
                return last
            self._last = snapshot = await self._take()
            self._asked.unpark_all()
            return snapshot

    def next_look_at(self, snapshot: Snapshot, *, interval_s: float) -> float:
        """When the look after this one is due, so that looks take no more than their share of a core."""
        wait_s = min(snapshot.cpu_ms / 1000 / SHARE_MAX, WAIT_MAX_S)
        return snapshot.at + max(interval_s, wait_s)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forget the mirror once there was no look for a while. A child task of the service; sleeps without looks."""
        task_status.started()
        while True:
            await self._asked.park()
            while trio.current_time() < self._asked_at + KEPT_S:  # noqa: ASYNC110  one look in 30 s
                await trio.sleep(KEPT_S)
            self._last = self._root = None
            self._living = {}
            self.ends = {}

    # The walk

    async def _take(self) -> Snapshot:
        now = trio.current_time()
        self._snapshots += 1
        snapshot = Snapshot(self._snapshots, now, self.moment(now))
        steps = self._walk(snapshot)
        began = begun_step = time.perf_counter()
        ran_s = time.thread_time()
        cpu_s = longest_s = 0.0
        is_over_now = False
        while not is_over_now:
            try:
                next(steps)
            except StopIteration:
                is_over_now = True
            if is_over_now or time.perf_counter() - begun_step >= STEP_S:
                step_s = time.thread_time() - ran_s  # without the time that other processes took meanwhile
                cpu_s += step_s
                longest_s = max(longest_s, step_s)
                await trio.lowlevel.checkpoint()  # at the end, too: the caller goes on with steps of its own
                begun_step, ran_s = time.perf_counter(), time.thread_time()
        snapshot.took_ms = round((time.perf_counter() - began) * 1000, 2)
        snapshot.cpu_ms, snapshot.longest_step_ms = round(cpu_s * 1000, 2), round(longest_s * 1000, 2)
        return snapshot

    def _walk(self, snapshot: Snapshot) -> Steps[None]:
        notes = Notes(self._epoch)
        for source in self._sources:
            yield from source(notes)
        if self._root is None:
            self._root = self._new(trio.lowlevel.current_root_task(), None, "process", f"process {os.getpid()}")
        nodes, since_step = snapshot.nodes, 0
        walked: set[object] = set()
        living: dict[str, Callable[[], str]] = {}
        stack: list[Iterator[_Item]] = [iter((self._root,))]
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
                continue
            thing = item.thing
            if thing in walked or (isinstance(thing, trio.lowlevel.Task) and is_over(thing)):
                continue  # it was handed to another nursery, or has ended since its nursery was looked at
            walked.add(thing)
            snapshot.tasks += isinstance(thing, trio.lowlevel.Task)
            children = yield from self._visit(item, notes)
            if len(nodes) >= NODES_MAX:
                snapshot.left_out += 1
            elif item.node is not None:
                nodes.append(item.node)
            if (end := notes.ends.get(item.stands_for)) is not None:
                living[item.id] = end
            if children:
                stack.append(iter(children))
            since_step += 1
            if since_step == NODES_A_STEP:
                since_step = 0
                yield
        self._note_ends(living)

    def _note_ends(self, living: dict[str, Callable[[], str]]) -> None:
        for gone in self._living.keys() - living.keys():
            self.ends[gone] = self._living[gone]()
        while len(self.ends) > _ENDS_KEPT:
            del self.ends[next(iter(self.ends))]
        self._living = living

    def _new(self, thing: object, parent: str | None, kind: str, name: str) -> "_Item":
        self._items += 1
        return _Item(self._items, thing, parent, kind, name, str(self._items), thing)

    def _visit(self, item: "_Item", notes: Notes) -> Steps[Iterable["_Item"]]:
        """Make the item's node, and return the items below it."""
        thing = item.thing
        if isinstance(thing, trio.lowlevel.Task):
            return self._visit_task(item, thing, notes)
        if isinstance(thing, trio.Nursery):
            item.make(notes, notes.named.get(thing), thing.cancel_scope)
            return (yield from self._tasks_of(item, thing))
        if isinstance(thing, trio.CancelScope):
            item.make(notes, notes.named.get(thing), thing)
            return (item.children or {}).values()  # as the visit of its task has put them there
        item.make(notes, item.noted)
        before, item.children = item.children or {}, None
        added = notes.below.get(thing, ())
        return self._add(item, before, added) if added else ()

    def _tasks_of(self, item: "_Item", nursery: trio.Nursery) -> Steps[Iterable["_Item"]]:
        """The tasks of a nursery, in the order in which looks have found them."""
        tasks = nursery.child_tasks
        known = item.children = {} if item.children is None else item.children
        for task in known.keys() - tasks:
            del known[task]
        for count, task in enumerate(tasks - known.keys(), 1):
            known[task] = self._new_task(task, item.id)
            if not count % NODES_A_STEP:
                yield
        return list(known.values())

    def _new_task(self, task: trio.lowlevel.Task, parent: str) -> "_Item":
        name = plain_name(task.name)
        word, _, rest = name.partition(" ")
        kind = "task"
        if name.endswith(_LOOPS):
            kind = "loop"
        elif name.endswith(_LISTENERS):
            kind = "listener"
        elif word in ("session", "turn") and rest:
            kind = word
        item = self._new(task, parent, kind, name)
        if kind == "session":
            item.session, item.owner = public_id(rest), owner_of(rest) or None
            item.name = f"session {item.session}"
        return item

    def _visit_task(self, item: "_Item", task: trio.lowlevel.Task, notes: Notes) -> Iterable["_Item"]:
        """The scopes and nurseries of a task are below it, each inside of the one before.

        What is inside of a scope with a name, such as a turn, is below that scope. A task that was started for a turn
        stands for the turn itself.
        """
        scopes = scopes_in(task) if task not in self.viewers else []
        named, merged = notes.named.get(task), None
        if item.kind == "turn":
            merged = next((scope for scope in scopes if scope in notes.named), None)
            if merged is not None:
                named, item.stands_for = notes.named[merged], merged
        item.make(notes, named, is_cancelled=is_cancelled(task))
        added = notes.below.get(task, ())
        if task in self.viewers:
            since = notes.moment(self.viewers[task])
            added = [(self, Node(parent=None, kind="stream", name="live tree", state="open", since=since))]
        if item.parent is None:
            added = [*added, *notes.below.get(None, ())]
        before, item.children = item.children or {}, None
        if not scopes:
            return self._add(item, before, added) if added else ()
        nurseries = {nursery.cancel_scope: nursery for nursery in task.child_nurseries}
        holder = item
        below: dict[Any, _Item] = {}
        item.children = below
        for scope in scopes:
            if scope is merged:
                continue
            thing: trio.Nursery | trio.CancelScope = nurseries.get(scope, scope)
            part = before.get(thing)
            if part is None:
                kind, name = ("scope", "") if thing is scope else ("nursery", "nursery")
                part = self._new(thing, holder.id, kind, name)
            below[thing] = part
            if thing is scope and thing in notes.named:
                holder, before, below = part, part.children or {}, {}
                part.children = below
        if added:
            self._add(holder, before, added)
        return item.children.values()

    def _add(
        self, holder: "_Item", before: dict[object, "_Item"], added: Iterable[tuple[object, Node]]
    ) -> Iterable["_Item"]:
        """Put what is noted below a thing among the items below it."""
        below = holder.children or {}
        for thing, node in added:
            part = before.get(thing)
            if part is None:
                part = self._new(thing, holder.id, node.kind, node.name)
            part.noted = node
            below[thing] = part
        holder.children = dict(sorted(below.items(), key=lambda pair: pair[1].number))
        return holder.children.values()


class _Item(msgspec.Struct, gc=False):
    """What is mirrored of one thing. No circle leads through it, and the collector need not know of thousands of these.

    Attributes:
        number: Grows with each item, also as the id.
        stands_for: The thing, or the scope whose name it has.
        children: The items below it, by their things; None if there were none.
        noted: The node that a part of the service has made for this look.
        node: The node of the last look.
    """

    number: int
    thing: Any
    parent: str | None
    kind: str
    name: str
    id: str
    stands_for: Any
    session: str | None = None
    owner: str | None = None
    children: "dict[Any, _Item] | None" = None
    noted: Node | None = None
    node: Node | None = None
    state: tuple[float, bool, bool] | None = None

    def make(
        self,
        notes: Notes,
        named: Node | None,
        scope: trio.CancelScope | None = None,
        *,
        is_cancelled: bool = False,
    ) -> None:
        """Make the node. It stays the same object if nothing has changed since the last look."""
        deadline, shielded = inf, False
        if scope is not None:
            deadline, is_cancelled, shielded = scope.deadline, was_cancelled(scope), scope.shield
        if named is not None:
            named.id, named.parent = self.id, self.parent
            named.cancelled, named.shielded = is_cancelled, shielded
            if named.deadline is None and deadline != inf:
                named.deadline = notes.moment(deadline)
            if self.node != named:
                self.node = named
            self.state = None
            return
        state = (deadline, is_cancelled, shielded)
        if self.node is not None and self.state == state:
            return
        self.state = state
        self.node = Node(
            id=self.id,
            parent=self.parent,
            kind=self.kind,
            name=self.name or _scope_name(deadline, shielded=shielded),
            deadline=None if deadline == inf else notes.moment(deadline),
            cancelled=is_cancelled,
            shielded=shielded,
            session=self.session,
            owner=self.owner,
        )


def _scope_name(deadline: float, *, shielded: bool) -> str:
    if shielded:
        return "cleanup (shielded)"
    return "cancel scope" if deadline == inf else "time limit"


def plain_name(name: str) -> str:
    """The name of a task in words: Trio names it after its function unless it was given a name.

    ``service.hosting.lifespan.Hosting._receive_shutdown`` becomes ``receive shutdown``.
    """
    if name in _NAMES:
        return _NAMES[name]
    if " " in name:
        return name
    parts = [part for part in name.split(".") if part not in ("<locals>", "")]
    last = parts[-1]
    if last in _NAMES:
        return _NAMES[last]
    if last in _OF_A_CLASS and len(parts) > 1:
        last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", parts[-2]).lower()
    return " ".join(last.strip("_").split("_")) or name
