"""The live tree: what a look finds, what stays the same from look to look, and what looks cost."""

import gc
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import islice
from math import inf
from types import FrameType
from typing import Any, TypeVar, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.hosting.lifespan import GARBAGE_AFTER
from service.steps import Steps, at_once, in_steps
from service.telemetry import live_tree
from service.telemetry.live_tree import KEPT_S, LiveTree, plain_name
from service.telemetry.tree_nodes import Node, Notes
from service.telemetry.tree_views import View
from tests.longest_step import watching_steps

T = TypeVar("T")

LOOKS = 5
LOOK_STEP_MAX_S = 0.005


def named(nodes: Sequence[Node], name: str) -> Node:
    (node,) = [node for node in nodes if node.name == name]
    return node


def path_to(nodes: Sequence[Node], node: Node) -> list[str]:
    by_id = {it.id: it for it in nodes}
    path = []
    while node.parent is not None:
        node = by_id[node.parent]
        path.append(node.name)
    return path


async def look(tree: LiveTree) -> Sequence[Node]:
    """The nodes of a walk, however soon after the last one."""
    tree._walk_at = -inf
    return (await tree.look(max_age_s=-1)).nodes


async def in_a_scope(seconds: float) -> None:
    with trio.move_on_after(seconds):
        await trio.sleep_forever()


async def test_every_task_nursery_and_scope_is_there_after_its_parent() -> None:
    tree = LiveTree()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_a_scope, 100, name="one that waits")
        await wait_all_tasks_blocked()
        nodes = await look(tree)
        known = {nodes[0].id}
        assert (nodes[0].parent, nodes[0].kind) == (None, "process")
        for node in nodes[1:]:
            assert node.parent in known
            known.add(node.id)
        assert len(known) == len(nodes)
        task = named(nodes, "one that waits")
        (scope,) = [node for node in nodes if node.parent == task.id]
        assert (task.kind, scope.kind, scope.name) == ("task", "scope", "time limit")
        assert scope.deadline == pytest.approx(100, abs=30)
        (parent,) = [node for node in nodes if node.id == task.parent]
        assert parent.kind == "nursery"
        nursery.cancel_scope.cancel()
        assert named(await look(tree), "one that waits").cancelled


async def test_a_thing_keeps_its_id_and_its_place_and_an_id_is_never_used_again() -> None:
    tree = LiveTree()
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(trio.sleep_forever, name=f"old {number}")
        await wait_all_tasks_blocked()
        first = await look(tree)
        old = [node for node in first if node.name.startswith("old ")]
        for number in range(5):
            nursery.start_soon(trio.sleep_forever, name=f"new {number}")
        await wait_all_tasks_blocked()
        second = await look(tree)
        both = [node for node in second if node.name.startswith(("old ", "new "))]
        assert both[:5] == old, "those that were there first come first, as they were"
        assert all(node in first for node in both[:5])
        assert len({node.id for node in both}) == 10
        nursery.cancel_scope.cancel()
    ids = {node.id for node in second}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever, name="later")
        await wait_all_tasks_blocked()
        assert named(await look(tree), "later").id not in ids
        nursery.cancel_scope.cancel()


async def test_a_node_that_has_not_changed_is_the_same_object() -> None:
    tree = LiveTree()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_a_scope, 100, name="quiet")
        await wait_all_tasks_blocked()
        first, second = await look(tree), await look(tree)
        before = {node.id: node for node in first}
        kept = [node for node in second if before.get(node.id) is node]
        assert len(kept) >= len(second) - 1, "but for this test's own scopes"
        nursery.cancel_scope.cancel()


async def test_parts_of_the_service_name_scopes_and_what_is_inside_of_them_is_below() -> None:
    tree = LiveTree()
    scope, thing, states = trio.CancelScope(), object(), ["running"]

    async def work() -> None:
        with scope, trio.CancelScope(deadline=trio.current_time() + 50):
            await trio.sleep_forever()

    def source(notes: Notes) -> Steps[None]:
        yield
        notes.name(
            scope, Node(parent=None, kind="turn", name="turn 1", state=states[-1]), end=partial(states.__getitem__, -1)
        )
        notes.add(thing, Node(parent=None, kind="model_connection", name="http://upstream"), below=task)

    tree.add_source(source)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, name="session s")
        await wait_all_tasks_blocked()
        (task,) = nursery.child_tasks
        nodes = await look(tree)
        turn = named(nodes, "turn 1")
        assert (turn.kind, turn.state) == ("turn", "running")
        assert path_to(nodes, turn)[0] == "session s"
        assert path_to(nodes, named(nodes, "http://upstream"))[:2] == ["turn 1", "session s"]
        (inner,) = [node for node in nodes if node.parent == turn.id and node.kind == "scope"]
        assert inner.deadline is not None
        states.append("cancelled")
        nursery.cancel_scope.cancel()
    await look(tree)
    assert tree.ends == {turn.id: "cancelled"}


async def test_the_task_of_a_turn_is_the_turn() -> None:
    tree, scope = LiveTree(), trio.CancelScope()

    async def work() -> None:
        with scope, trio.CancelScope():
            await trio.sleep_forever()

    def source(notes: Notes) -> Steps[None]:
        notes.name(scope, Node(parent=None, kind="turn", name="turn 1", seq=7))
        yield

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, name="turn 1")
        await wait_all_tasks_blocked()
        assert named(await look(tree), "turn 1").seq is None
        tree.add_source(source)
        nodes = await look(tree)
        turn = named(nodes, "turn 1")
        assert turn.seq == 7
        assert [node.kind for node in nodes if node.parent == turn.id] == ["scope"]
        nursery.cancel_scope.cancel()


async def test_a_look_between_two_walks_leaves_out_what_has_gone_and_a_walk_finds_what_has_come() -> None:
    tree, scopes = LiveTree(), [trio.CancelScope() for _ in range(3)]

    async def work(scope: trio.CancelScope) -> None:
        with scope, trio.CancelScope():
            await trio.sleep_forever()
        await trio.sleep_forever()  # as a session whose next turn is about to begin

    def source(notes: Notes) -> Steps[None]:
        for number, scope in enumerate(scopes):
            notes.name(scope, Node(parent=None, kind="turn", name=f"turn {number}"), end=lambda: "cancelled")
        yield

    tree.add_source(source)
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(work, scope, name="session s")
        await wait_all_tasks_blocked()
        walk = await tree.look(max_age_s=-1)
        first = walk.nodes
        tree._walk_at = inf  # a walk is expensive
        nursery.start_soon(trio.sleep_forever, name="one that has come")
        scopes[1].cancel()
        await wait_all_tasks_blocked()
        turn = named(first, "turn 1")
        gone = {turn.id, *(node.id for node in first if node.parent == turn.id)}
        assert len(gone) == 2
        between = await tree.look(max_age_s=-1)
        ours = [node for node in first if node.id not in gone]
        assert [node for node in between.nodes if node in ours] == between.nodes
        assert {node.name for node in between.nodes} >= {"turn 0", "turn 2", "session s"}
        assert (between.tasks, len(between.depths)) == (walk.tasks, len(between.nodes))
        assert tree.ends == {turn.id: "cancelled"}
        tree._walk_at = -inf
        assert "one that has come" in {node.name for node in await look(tree)}
        nursery.cancel_scope.cancel()
    assert tree.ends == {turn.id: "cancelled"}


async def test_the_next_look_waits_a_little_for_a_walk_and_no_longer() -> None:
    tree = LiveTree()
    snapshot = await tree.look(max_age_s=-1)
    at = snapshot.at
    for walk_in_s, look_in_s in ((0.1, 0.25), (0.3, 0.3), (0.5, 0.25)):
        tree._walk_at = at + walk_in_s
        assert tree.next_look_at(snapshot, interval_s=0.25) == at + look_in_s


async def test_viewers_share_a_look_and_a_look_that_is_given_up_spoils_nothing() -> None:
    tree = LiveTree()
    snapshots: list[int] = []

    async def view() -> None:
        snapshots.append((await tree.look(max_age_s=60)).number)

    def slow(_notes: Notes) -> Steps[None]:
        end = time.perf_counter() + 2 * live_tree.STEP_S
        while time.perf_counter() < end:
            yield
        yield

    tree.add_source(slow)
    with trio.CancelScope() as scope:
        scope.cancel()
        await view()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(view)
    assert len(set(snapshots)) == 1
    assert len(snapshots) == 4


async def test_without_looks_nothing_is_kept(autojump_clock: MockClock) -> None:
    tree = LiveTree()
    async with trio.open_nursery() as nursery:
        await nursery.start(tree.run)
        snapshot = await tree.look(max_age_s=0)
        await trio.sleep(KEPT_S * 0.9)
        assert await tree.look(max_age_s=KEPT_S) is snapshot
        tree.viewers[trio.lowlevel.current_task()] = 0
        for _ in range(20):
            await trio.sleep(KEPT_S / 5)
            await tree.look(max_age_s=0)
        assert tree._root is not None
        await trio.sleep(2 * KEPT_S)  # the viewer does not look: its client takes nothing
        assert tree._root is None
        assert tree._last is None
        nursery.cancel_scope.cancel()


async def test_a_look_that_is_given_up_is_forgotten_as_any_other(autojump_clock: MockClock) -> None:
    tree = LiveTree()
    looking = trio.CancelScope()

    def leave(_notes: Notes) -> Steps[None]:
        looking.cancel()
        yield

    tree.add_source(leave)
    async with trio.open_nursery() as nursery:
        await nursery.start(tree.run)
        with looking:
            await tree.look(max_age_s=0)
        assert looking.cancelled_caught
        assert tree._root is not None
        await trio.sleep(KEPT_S + 1)
        assert tree._root is None
        nursery.cancel_scope.cancel()


def test_names_of_functions_become_words() -> None:
    assert plain_name("service.hosting.lifespan.Hosting._receive_something") == "receive something"
    assert plain_name("service.hosting.hypercorn.unread_answers.UnreadAnswers.run") == "unread answers"
    assert plain_name("trio._highlevel.serve.<locals>.one_client") == "one client"
    assert plain_name("expiry loop") == "expiry loop"
    assert plain_name("hypercorn.trio.run.worker_serve") == "HTTP server (hypercorn)"


# Views


def chain_and_leaves(leaves: int) -> list[Node]:
    nodes = [Node(id="1", parent=None, kind="process", name="p"), Node(id="2", parent="1", kind="task", name="t")]
    nodes += [Node(id=f"3{i:05}", parent="2", kind="task", name="leaf") for i in range(leaves)]
    return [*nodes, Node(id="4", parent="1", kind="task", name="u"), Node(id="5", parent="4", kind="task", name="v")]


def depths_of(nodes: Sequence[Node]) -> Sequence[int]:
    depths: dict[str, int] = {}
    for node in nodes:
        depths[node.id] = 0 if node.parent is None else depths[node.parent] + 1
    return list(depths.values())


def shown_of(nodes: Sequence[Node], *, under: str | None = None, nodes_max: int = 100) -> Sequence[Node] | None:
    return at_once(View(under=under, nodes_max=nodes_max).of(nodes, depths_of(nodes)))


def test_a_view_within_its_bound_has_the_nodes_near_the_root_and_counts_the_others() -> None:
    nodes = chain_and_leaves(100)
    shown = shown_of(nodes, nodes_max=10)
    assert shown is not None
    assert len(shown) == 10
    assert {"1", "2", "4"} <= {node.id for node in shown}
    assert sum(node.left_out for node in shown) == len(nodes) - 10
    assert shown_of(nodes, nodes_max=200) is nodes
    ids = {node.id for node in shown}
    assert all(node.parent is None or node.parent in ids for node in shown)
    assert not any(node.left_out for node in nodes), "the snapshot's own nodes are as they were"


def test_a_view_of_a_part_has_this_part() -> None:
    nodes = chain_and_leaves(3)
    shown = shown_of(nodes, under="2")
    assert shown is not None
    assert [node.id for node in shown] == ["2", "300000", "300001", "300002"]
    assert [node.id for node in shown_of(nodes, under="4") or ()] == ["4", "5"], "the last one"
    assert shown_of(nodes, under="77") is None


def test_changes_have_the_fields_that_changed_and_the_ids_that_have_gone() -> None:
    view = View(under=None, nodes_max=100)
    one = Node(id="1", parent=None, kind="process", name="p")
    turn = Node(id="2", parent="1", kind="turn", name="t", seq=0, cancelled=True, deadline=5.0, state="running")
    first = at_once(view.changes([one, turn]))
    assert (first.added, first.changed, first.removed) == ([one, turn], [], [])
    assert at_once(view.changes([one, turn])).is_empty
    later = Node(id="2", parent="1", kind="turn", name="t", seq=3, state="ending")
    new = Node(id="3", parent="2", kind="scope", name="s")
    second = at_once(view.changes([one, later, new]))
    assert second.changed == [{"id": "2", "seq": 3, "cancelled": None, "deadline": None, "state": "ending"}]
    assert second.added == [new]
    third = at_once(view.changes([one]))
    assert (third.added, third.changed, third.removed) == ([], [], ["2", "3"])


# What it costs

STEP_BYTECODES_MAX = 20_000
"""As far as a step may go, by the bytecodes of Python that it executes: half a millisecond or so."""


class StepCounter:
    """Does work in steps, and counts the bytecodes of each step: on any machine the same in every run."""

    def __init__(self) -> None:
        self.longest = self.steps = self._count = 0

    def do(self, work: Steps[T]) -> T:
        while True:
            self._count = 0
            sys.settrace(self._on_call)
            try:
                next(work)
            except StopIteration as done:
                return cast("T", done.value)
            finally:
                sys.settrace(None)
                self.steps += 1
                self.longest = max(self.longest, self._count)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_opcode

    def _on_opcode(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._count += event == "opcode"
        return self._on_opcode


async def run_turn(number: int, scopes: dict[int, trio.CancelScope]) -> None:
    with trio.CancelScope() as scopes[number], trio.move_on_after(1000):
        await trio.sleep_forever()


@asynccontextmanager
async def turns_in(tree: LiveTree, count: int) -> AsyncIterator[None]:
    """So many tasks with a named scope each, in one nursery, and below one thing a connection for each of them."""
    scopes: dict[int, trio.CancelScope] = {}
    client = object()

    def source(notes: Notes) -> Steps[None]:
        notes.add(client, Node(parent=None, kind="model_client", name="client"), below=None)
        for number in range(len(scopes)):
            scope = scopes[number]
            notes.name(scope, Node(parent=None, kind="turn", name=f"turn {number}"), end=Ended())
            notes.add(scope, Node(parent=None, kind="model_connection", name="idle"), below=client)
            yield

    tree.add_source(source)
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(run_turn, number, scopes, name=f"session s{number}")
        await wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


class Ended(msgspec.Struct, gc=False):
    def __call__(self) -> str:
        return "cancelled"


@pytest.mark.parametrize("count", [150, 900])
async def test_no_step_of_a_look_grows_with_the_number_of_tasks(count: int) -> None:
    tree, view, counter = LiveTree(), View(under=None, nodes_max=count), StepCounter()

    def look() -> live_tree.Snapshot:
        snapshot = live_tree.Snapshot(1, 0.0, 0.0)
        counter.do(tree._walk(snapshot))
        seen = counter.do(view.look(snapshot.nodes, snapshot.depths))
        assert seen is not None
        return snapshot

    async with turns_in(tree, count):
        assert len(look().nodes) > 3 * count, "all are new"
        last = look()
    counter.do(tree._leave_out_gone(live_tree.Snapshot(1, 0.0, 0.0), last))
    assert len(tree.ends) == count
    look()  # all have gone
    counter.do(tree._forget())
    assert counter.longest < STEP_BYTECODES_MAX
    assert counter.steps > count / 10


async def test_looks_make_few_objects_that_start_the_garbage_collector() -> None:
    """A full collection in a server with thousands of turns takes longer than any step may: looks are not its cause."""
    tree, count = LiveTree(), 1000

    def objects_of_a_look() -> int:
        before = most = gc.get_count()[0]
        for _ in tree._walk(live_tree.Snapshot(1, 0.0, 0.0)):
            most = max(most, gc.get_count()[0])
        return most - before

    async with turns_in(tree, count):
        gc.collect()
        gc.disable()
        try:
            assert objects_of_a_look() < count / 4
            assert objects_of_a_look() < count / 4
        finally:
            gc.enable()


async def test_what_a_look_has_found_is_the_same_after_one_that_was_given_up() -> None:
    tree = LiveTree()
    async with turns_in(tree, 100):
        first = await look(tree)
        for steps in (5, 50, 110, 130):
            given_up = tree._walk(live_tree.Snapshot(1, 0.0, 0.0))
            assert len(list(islice(given_up, steps))) == steps
            given_up.close()
        before = {node.id: node for node in first}
        again = await look(tree)
        assert [node.id for node in again if node.kind != "scope"] == [it.id for it in first if it.kind != "scope"]
        assert sum(before.get(node.id) is node for node in again) >= len(first) - 3, "but for this test's own scopes"


@contextmanager
def collecting_as_the_server() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(GARBAGE_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@pytest.mark.serial
async def test_a_look_at_five_thousand_tasks_takes_short_steps() -> None:
    """No look holds the event loop for longer than some milliseconds; the figures are in docs/admin.md.

    A walk in one step takes ten times the bound in each look. What else the machine and the garbage collector do falls
    on some of them.
    """
    tree, view = LiveTree(), View(under=None, nodes_max=20_000)

    async def look_once(finished: trio.Event) -> None:
        snapshot = await tree.look(max_age_s=-1)
        seen = await in_steps(view.look(snapshot.nodes, snapshot.depths), step_s=live_tree.STEP_S)
        assert seen is not None
        assert len(seen[0]) > 10_000
        finished.set()

    async with trio.open_nursery() as nursery:
        for number in range(5000):
            nursery.start_soon(in_a_scope, 1000 + number)
        await wait_all_tasks_blocked()
        took_s: list[float] = []
        with collecting_as_the_server(), watching_steps() as longest:
            for _ in range(LOOKS):
                longest.reset()
                finished = trio.Event()
                nursery.start_soon(look_once, finished)
                await finished.wait()
                took_s.append(longest.seconds)
        assert min(took_s) < LOOK_STEP_MAX_S, took_s
        nursery.cancel_scope.cancel()
