"""The live tree: all nurseries, tasks and cancel scopes of this process, with the names that the service gives them.

A look walks through the tree in short steps, between which other tasks run and the tree changes: a snapshot is not one
moment, but each of its nodes was there while the walk lasted. A node keeps its id from look to look. So the tree is
mirrored here, but only while somebody looks: without a look for :data:`KEPT_S` nothing is kept, and nothing runs.

All viewers share one snapshot. Looks read only: they cancel nothing, wake nothing and hold no task back. No step grows
with the tree, but for what C does with sets and dictionaries of tasks: copies of them, and their growth at a first
look. At 5 000 tasks that is a part of a millisecond, at 100 000 some milliseconds. Looks make next to no objects that
the garbage collector counts, so that they do not make it run: a collection takes longer than a step may.
"""

import os
import re
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from math import inf
from operator import attrgetter
from typing import Any

import msgspec
import trio

from service.ids import owner_of, public_id
from service.steps import Steps, in_steps
from service.telemetry.cancel_scopes import is_cancelled, is_over, scopes_in, was_cancelled, was_left
from service.telemetry.tree_nodes import Node, Noted, Notes, Source

STEP_S = 0.001
"""The time after which a look lets other tasks run."""
NODES_A_STEP = 16
"""After so many nodes the walk looks at the time."""
NODES_MAX = 50_000
"""Bound on the nodes of a snapshot; what is beyond it counts as left out."""
KEPT_S = 30.0
"""How long the ids of nodes are kept without a look."""
SHARE_MAX = 0.1
"""How much of a core walks through the whole tree may take, if the next walk may wait for that."""
WALK_WAIT_MAX_S = 2.0
"""How long the next walk waits at the most. Until then looks only leave out what has gone, which costs a tenth."""
WAIT_MAX_S = 0.4
"""How long the next look waits at the most for a walk: what has gone has to leave the viewers within half a second."""
_CHECKED_A_STEP = 128
_ENDS_KEPT = 2000
_VIEW = "live tree"
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
        depths: How many nodes are above each of them.
        things: What each of them shows.
        tasks: How many tasks there are.
        left_out: How many of them, at least, are not among the nodes.
        took_ms, cpu_ms: How long the last walk took, with the steps of other tasks and without.
        longest_step_ms: Its longest step, or that of a look since.
    """

    def __init__(self, number: int, at: float, clock: float) -> None:
        self.number = number
        self.at = at
        self.clock = clock
        self.taken_at = datetime.now(UTC)
        self.nodes: list[Node] = []
        self.depths = array("I")
        self.things: list[object] = []
        self.tasks = self.left_out = 0
        self.took_ms = self.cpu_ms = self.longest_step_ms = 0.0

    def __repr__(self) -> str:
        return f"<Snapshot {self.number}: {len(self.nodes)} nodes>"

    def add(self, node: Node, depth: int, thing: object) -> None:
        """Add a node, if there is room."""
        self.tasks += type(thing) is trio.lowlevel.Task
        if len(self.nodes) >= NODES_MAX:
            self.left_out += 1
            return
        self.nodes.append(node)
        self.depths.append(depth)
        self.things.append(thing)

    def extend(self, other: "Snapshot", start: int, end: int) -> None:
        """Add the nodes of another snapshot from one place up to another."""
        self.nodes += other.nodes[start:end]
        self.depths += other.depths[start:end]
        self.things += other.things[start:end]


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
        self._asked_at = self._walk_at = -inf
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
        """A snapshot that is not older than this: the last one, or a new one. Several callers share one look.

        Where walks are expensive, a new snapshot is the one of the last walk without what has gone since: what has come
        or changed is missing for up to :data:`WALK_WAIT_MAX_S`. A cancelled look is given up; the next caller begins
        another one.
        """
        async with self._looking:
            now = self._asked_at = trio.current_time()
            last = self._last
            if last is not None and now - last.at <= max_age_s:
                return last
            self._snapshots += 1
            snapshot = Snapshot(self._snapshots, now, self.moment(now))
            try:
                if last is not None and now < self._walk_at:
                    await _take(snapshot, self._leave_out_gone(snapshot, last))
                    snapshot.took_ms, snapshot.cpu_ms = last.took_ms, last.cpu_ms
                    snapshot.longest_step_ms = max(snapshot.longest_step_ms, last.longest_step_ms)
                else:
                    await _take(snapshot, self._walk(snapshot))
                    self._walk_at = now + min(snapshot.cpu_ms / 1000 / SHARE_MAX, WALK_WAIT_MAX_S)
                self._last = snapshot
            finally:
                self._asked.unpark_all()  # a look that is given up has mirrored a part
            return snapshot

    def next_look_at(self, snapshot: Snapshot, *, interval_s: float) -> float:
        """When the look after this one is due: a little later than wished, if that look is a walk then."""
        due_at = snapshot.at + interval_s
        return self._walk_at if due_at < self._walk_at <= snapshot.at + WAIT_MAX_S else due_at

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forget the mirror once there was no look for a while. A child task of the service; sleeps without looks."""
        task_status.started()
        while True:
            while self._root is None:
                await self._asked.park()
            while trio.current_time() < self._asked_at + KEPT_S:  # noqa: ASYNC110  once in 30 s
                await trio.sleep_until(self._asked_at + KEPT_S)
            await in_steps(self._forget(), step_s=STEP_S)

    def _forget(self) -> Steps[None]:
        root, self._root, self._last = self._root, None, None
        self._living, self.ends = {}, {}
        stack = [root] if root is not None else []
        del root
        while stack:  # one by one: the end of the root would free all of them at once
            yield
            for _ in range(min(len(stack), NODES_A_STEP)):
                item = stack.pop()
                if item.next is not None:
                    stack.append(item.next)
                if item.first is not None:
                    stack.append(item.first)
                if item.children:
                    stack.extend(item.children.values())
                item.next = item.first = item.children = None

    # The walk

    def _walk(self, snapshot: Snapshot) -> Steps[None]:
        if self._root is None:
            self._root = self._new(trio.lowlevel.current_root_task(), None, "process", f"process {os.getpid()}")
        notes = Notes(self._epoch)
        for source in self._sources:
            yield from source(notes)
        walked: set[object] = set()
        living: dict[str, Callable[[], str]] = {}
        stack: list[_Item | Iterator[_Item]] = [self._root]
        since_step = 0
        while stack:
            item = _take_next(stack)
            if item is None or _is_over_or_in(walked, item.thing):
                continue
            if (many := self._visit(item, notes)) is not None:
                yield from many
            assert item.node is not None
            snapshot.add(item.node, item.depth, item.thing)
            if (end := notes.ends.pop(item.stands_for, None)) is not None:
                living[item.id] = self._living.get(item.id, end)  # the same one, so that few are freed at once
            if item.children:
                stack.append(iter(item.children.values()))
            elif item.first is not None:
                stack.append(item.first)
            since_step += 1
            if since_step == NODES_A_STEP:
                since_step = 0
                yield
        yield from self._note_ends(living)

    def _visit(self, item: "_Item", notes: Notes) -> Steps[None] | None:
        """Make the item's node, and find the items below it. Returns the rest of the work, where these may be many."""
        thing = item.thing
        kind = type(thing)  # of Trio's final classes, whose own check of instances takes as long as all else here
        if kind is trio.lowlevel.Task:
            self._visit_task(item, thing, notes)
            return None
        if kind is trio.CancelScope:
            item.make(notes, notes.named.pop(thing, None), thing)
            return None  # the visit of its task has found what is below
        if kind is trio.Nursery:
            item.make(notes, notes.named.pop(thing, None), thing.cancel_scope)
            return self._find_tasks(item, thing)
        item.make(notes, item.noted)
        return self._find_noted(item, notes) if item.children or thing in notes.below else None

    def _leave_out_gone(self, snapshot: Snapshot, last: Snapshot) -> Steps[None]:
        """Give a snapshot the last one's nodes, without the things that have gone since and what was below them."""
        snapshot.tasks, snapshot.left_out = last.tasks, last.left_out
        gone: list[int] = []
        for start in range(0, len(last.things), _CHECKED_A_STEP):
            things = enumerate(last.things[start : start + _CHECKED_A_STEP], start)
            gone += [place for place, thing in things if _has_gone(thing)]
            yield
        if not gone:
            snapshot.nodes, snapshot.depths, snapshot.things = last.nodes, last.depths, last.things
            return
        kept = 0
        for count, place in enumerate(gone, 1):
            if place >= kept:  # otherwise it was below another one that has gone
                snapshot.extend(last, kept, place)
                kept = yield from self._end_all(snapshot, last, place)
            if not count % NODES_A_STEP:
                yield
        snapshot.extend(last, kept, len(last.nodes))

    def _end_all(self, snapshot: Snapshot, last: Snapshot, place: int) -> Steps[int]:
        """Note the end of a thing that has gone and of all below it. Returns the place of the next node after them."""
        depth = last.depths[place]
        while True:
            snapshot.tasks -= type(last.things[place]) is trio.lowlevel.Task
            node_id = last.nodes[place].id
            if node_id in self._living:
                self._note_end(node_id, self._living[node_id])
            place += 1
            if place == len(last.nodes) or last.depths[place] <= depth:
                return place
            if not place % NODES_A_STEP:
                yield

    def _note_end(self, item_id: str, end: Callable[[], str]) -> None:
        self.ends[item_id] = end()
        if len(self.ends) > _ENDS_KEPT:
            del self.ends[next(iter(self.ends))]

    def _note_ends(self, living: dict[str, Callable[[], str]]) -> Steps[None]:
        for count, (item_id, end) in enumerate(self._living.items(), 1):
            if item_id not in living:
                self._note_end(item_id, end)
            if not count % NODES_A_STEP:
                yield
        self._living = living

    def _new(self, thing: object, parent: "_Item | None", kind: str, name: str) -> "_Item":
        self._items += 1
        return _Item(
            number=self._items,
            id=str(self._items),
            thing=thing,
            parent=None if parent is None else parent.id,
            depth=0 if parent is None else parent.depth + 1,
            kind=kind,
            name=name,
            stands_for=thing,
        )

    def _find_tasks(self, item: "_Item", nursery: trio.Nursery) -> Steps[None]:
        """Put the tasks of a nursery below it, in the order in which looks have found them."""
        tasks = nursery.child_tasks
        known = item.children = {} if item.children is None else item.children
        for count, task in enumerate(tuple(known), 1):
            if task not in tasks:
                del known[task]
            if not count % NODES_A_STEP:
                yield
        for count, task in enumerate(tuple(tasks), 1):
            if task not in known:
                known[task] = self._new_task(task, item)
            if not count % NODES_A_STEP:
                yield

    def _new_task(self, task: trio.lowlevel.Task, parent: "_Item") -> "_Item":
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

    def _visit_task(self, item: "_Item", task: trio.lowlevel.Task, notes: Notes) -> None:
        """Make the node of a task, and put its scopes and nurseries below it, each inside of the one before.

        What is inside of a scope with a name, such as a turn, is below that scope. A task that was started for a turn
        stands for the turn itself.
        """
        scopes = scopes_in(task) if task not in self.viewers else []
        named, merged = notes.named.pop(task, None), None
        if item.kind == "turn":
            merged = next((scope for scope in scopes if scope in notes.named), None)
            if merged is not None:
                named, item.stands_for = notes.named.pop(merged), merged
        item.make(notes, named, is_cancelled=is_cancelled(task))
        nurseries = {nursery.cancel_scope: nursery for nursery in task.child_nurseries} if scopes else {}
        holder, before = item, item.first
        below: list[_Item] = []
        for scope in scopes:
            if scope is merged:
                continue
            thing: trio.Nursery | trio.CancelScope = nurseries.get(scope, scope)
            part = _find(thing, before)
            if part is None:
                kind, name = ("scope", "") if thing is scope else ("nursery", "nursery")
                part = self._new(thing, holder, kind, name)
            below.append(part)
            if thing is scope:
                if thing in notes.named:
                    holder.link(below)
                    holder, before, below = part, part.first, []
                else:
                    part.first = None
        for noted in self._noted_below(item, task, notes):
            part = _find(noted.thing, before)
            if part is None:
                part = self._new(noted.thing, holder, noted.node.kind, noted.node.name)
            part.noted = noted.node
            below.append(part)
        holder.link(below)

    def _noted_below(self, item: "_Item", task: trio.lowlevel.Task, notes: Notes) -> Sequence[Noted]:
        """What is noted below a task. Of a viewer: itself, as a stream."""
        if task in self.viewers:
            since = notes.moment(self.viewers[task])
            return [Noted(_VIEW, Node(parent=None, kind="stream", name=_VIEW, state="open", since=since), None)]
        noted = notes.below.pop(task, None)
        found = noted.in_order() if noted is not None else ()
        if item.parent is None and (of_process := notes.below.pop(None, None)) is not None:
            found = [*found, *of_process.in_order()]
        return found

    def _find_noted(self, item: "_Item", notes: Notes) -> Steps[None]:
        """Put what is noted below a thing of the service below it: perhaps thousands of idle connections."""
        noted = notes.below.pop(item.thing, None)
        before, found = item.children or {}, dict[Any, _Item]()
        for count, it in enumerate(() if noted is None else noted.in_order(), 1):
            part = before.get(it.thing)
            if part is None:
                part = self._new(it.thing, item, it.node.kind, it.node.name)
            part.noted = it.node
            found[it.thing] = part
            if not count % NODES_A_STEP:
                yield
        item.children = found  # at the end: a look that is given up changes nothing


async def _take(snapshot: Snapshot, steps: Steps[None]) -> None:
    """Do the steps of a look, and let other tasks run in between."""
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


def _has_gone(thing: object) -> bool:
    """Whether a task or a scope has ended. Of other things only their own part of the service knows."""
    if type(thing) is trio.lowlevel.Task:
        return is_over(thing)
    if type(thing) is trio.Nursery:
        thing = thing.cancel_scope
    return type(thing) is trio.CancelScope and was_left(thing)


def _take_next(stack: "list[_Item | Iterator[_Item]]") -> "_Item | None":
    """Take the next item off a stack of items and of iterators; None if it was the end of an iterator.

    An item's successor takes its place, so the items that are pushed next come first.
    """
    top = stack[-1]
    if not isinstance(top, _Item):
        item = next(top, None)
        if item is None:
            stack.pop()
        return item
    if top.next is None:
        stack.pop()
    else:
        stack[-1] = top.next
    return top


def _is_over_or_in(walked: set[object], thing: object) -> bool:
    """Whether a task has ended since its nursery was looked at, or was visited in another one, which handed it on."""
    if type(thing) is not trio.lowlevel.Task:
        return False
    if thing in walked or is_over(thing):
        return True
    walked.add(thing)
    return False


def _find(thing: object, item: "_Item | None") -> "_Item | None":
    """The item of a thing in a list of items, which are a few."""
    while item is not None and item.thing is not thing:
        item = item.next
    return item


class _Item(msgspec.Struct, kw_only=True, gc=False):
    """What is mirrored of one thing. No circle leads through it, and the garbage collector does not know of it.

    A look at 5 000 tasks makes 20 000 of these. If the collector counted them, or a container for each, the looks would
    make it go through all objects of the server, which takes far longer than a step may.

    Attributes:
        number: Grows with each item, also as the id.
        depth: How many items are above it.
        stands_for: The thing, or the scope whose name it has.
        first: The first one of a few items below it, which lead to each other by ``next``.
        children: Many items below it, by their things.
        noted: The node that a part of the service has made for this look.
        node: The node of the last look.
        deadline, is_cancelled, is_shielded: What the node was made from, if no part of the service has made it.
    """

    number: int
    id: str
    thing: Any
    parent: str | None
    depth: int
    kind: str
    name: str
    stands_for: Any
    session: str | None = None
    owner: str | None = None
    first: "_Item | None" = None
    next: "_Item | None" = None
    children: "dict[Any, _Item] | None" = None
    noted: Node | None = None
    node: Node | None = None
    deadline: float | None = None
    is_cancelled: bool = False
    is_shielded: bool = False

    def link(self, items: "list[_Item]") -> None:
        """Put these items below this one, those first that were found first."""
        if len(items) > 1:
            items.sort(key=_number_of)
        after: _Item | None = None
        for item in reversed(items):
            item.next, after = after, item
        self.first = after

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
            self.deadline = None
            return
        if self.deadline == deadline and self.is_cancelled is is_cancelled and self.is_shielded is shielded:
            return
        self.deadline, self.is_cancelled, self.is_shielded = deadline, is_cancelled, shielded
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


_number_of = attrgetter("number")


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
