"""The live tree over HTTP: a snapshot, the stream of changes, what a viewer sees of a cancelled turn and of a stop."""

import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service import steps
from service.api.operator import tree
from service.sessions.turns.turn import Turn
from service.steps import Steps, at_once
from service.telemetry import live_tree
from service.telemetry.live_tree import LiveTree
from service.telemetry.tree_views import View
from tests.api.inprocess import Api, leave, open_api

SLOW = "scripted:?tokens=1000&rate=10&first_token_s=0"


@pytest.fixture(autouse=True)
def _every_look_is_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a walk that took much processor time, as all of them do on a busy machine."""
    monkeypatch.setattr(live_tree, "WALK_WAIT_MAX_S", 0)


async def turns_running(api: Api, count: int) -> list[str]:
    """Start so many turns, each in a session of its own. Returns the paths of the turns."""
    paths = []
    for number in range(count):
        await api.new_session(id=f"s{number}")
        body = {"input": "Hi", "background": True}
        reply = await api.call("POST", f"/sessions/s{number}/turns", body)
        assert reply.status == 202
        paths.append(reply.headers["location"])
    await wait_all_tasks_blocked()
    return paths


class Viewer:
    """Applies what a stream of changes says, as docs/admin.md tells it."""

    def __init__(self, connection: Any) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.head: dict[str, Any] = {}
        self.ends: dict[str, str] = {}
        self.end: dict[str, Any] | None = None
        self.last_id = ""
        self._connection = connection
        self._unread = b""

    async def next(self) -> str:
        """Take the next event, and return its name."""
        while b"\n\n" not in self._unread:
            self._unread += await self._connection.receive()
        frame, _, self._unread = self._unread.partition(b"\n\n")
        if frame.startswith(b":"):
            return "heartbeat"
        first, _, second = frame.decode().partition("\n")
        name, data = first.removeprefix("event: "), json.loads(second.removeprefix("data: "))
        if name == "end":
            self.end = data
            return name
        self.head |= {key: data[key] for key in ("worker", "workers", "shutdown", "counts", "sampling") if key in data}
        if name == "snapshot":
            self.nodes = {node["id"]: node for node in data["nodes"]}
        else:
            assert data["after"] == self.last_id
            for gone in data.get("removed", ()):
                del self.nodes[gone]
            for node in data.get("added", ()):
                assert node["parent"] in self.nodes
                assert node["id"] not in self.nodes
                self.nodes[node["id"]] = node
            for change in data.get("changed", ()):
                self.nodes[change["id"]] |= change
            self.ends |= data.get("ends", {})
        self.last_id = data["id"]
        return name

    async def until(self, name: str) -> None:
        with trio.fail_after(100):
            while await self.next() != name:
                pass

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [node for node in self.nodes.values() if node["kind"] == kind]


@asynccontextmanager
async def viewing(api: Api, query: str = "") -> AsyncIterator[Viewer]:
    connection = api.open("GET", f"/admin/tree/events{query}")
    async with connection:
        await connection.send_complete()
        viewer = Viewer(connection)
        yield viewer
        if viewer.end is None:
            await leave(connection)


async def test_a_snapshot_has_the_sessions_and_turns_by_name() -> None:
    async with open_api(model_url=SLOW, store_url="memory:") as api:
        (path,) = await turns_running(api, 1)
        reply = await api.call("GET", "/admin/tree")
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        snapshot = reply.json
        nodes = {node["id"]: node for node in snapshot["nodes"]}
        (turn,) = [node for node in nodes.values() if node["kind"] == "turn"]
        assert turn["turn"] == path.rpartition("/")[2]
        assert (turn["state"], turn["session"], turn["model"]) == ("running", "s0", "scripted")
        assert turn["deadline_name"] in ("first_token_timeout", "next_token_timeout")
        assert turn["deadline"] > snapshot["clock"] >= turn["since"]
        assert nodes[turn["parent"]]["kind"] == "session"
        assert nodes[turn["parent"]]["name"] == "session s0"
        assert {"expiry loop", "heartbeat loop", "shutdown watcher"} <= {node["name"] for node in nodes.values()}
        assert snapshot["counts"] == snapshot["counts"] | {"nodes": len(nodes), "left_out": 0}
        assert snapshot["shutdown"]["phase"] == "serving"
        assert snapshot["workers"] == [snapshot["worker"]]


async def test_a_snapshot_is_shared_for_a_moment_and_not_sent_twice(autojump_clock: MockClock) -> None:
    async with open_api() as api:
        first = await api.call("GET", "/admin/tree")
        again = await api.call("GET", "/admin/tree", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
        await trio.sleep(2 * tree.SHARED_S)
        later = await api.call("GET", "/admin/tree", headers={"If-None-Match": first.headers["etag"]})
        assert (later.status, later.json["id"] != first.json["id"]) == (200, True)


async def test_a_part_of_the_tree_and_a_bound_on_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "SHARED_S", inf)  # all calls are about one snapshot
    async with open_api(model_url=SLOW) as api:
        await turns_running(api, 30)
        whole = (await api.call("GET", "/admin/tree")).json
        few = (await api.call("GET", "/admin/tree?nodes=15")).json
        assert len(few["nodes"]) == 15
        assert sum(node.get("left_out", 0) for node in few["nodes"]) == few["counts"]["left_out"] > 30
        above = next(node for node in few["nodes"] if node.get("left_out"))
        part = (await api.call("GET", f"/admin/tree?under={above['id']}")).json
        assert len(part["nodes"]) == len([n for n in part["nodes"] if n in whole["nodes"]]) > 1
        assert part["nodes"][0]["id"] == above["id"]
        (await api.call("GET", "/admin/tree?under=999999")).problem(404, "node_not_found")
        (await api.call("GET", "/admin/tree?worker=1")).problem(404, "worker_not_found")
        (await api.call("GET", "/admin/tree?nodes=1")).problem(422, "invalid_request", "nodes")
        (await api.call("GET", "/admin/tree?depth=1")).problem(422, "invalid_request", "depth")


async def test_a_cancelled_turn_leaves_a_viewer_within_half_a_second_with_its_end(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        paths = await turns_running(api, 3)
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
            assert len(viewer.of_kind("turn")) == 3
            gone = next(node for node in viewer.of_kind("turn") if node["turn"] == paths[1].rpartition("/")[2])
            assert (await api.call("POST", f"{paths[1]}/cancel")).status == 200
            cancelled_at = trio.current_time()
            while gone["id"] in viewer.nodes:
                await viewer.until("change")
            assert trio.current_time() - cancelled_at < 0.5
            assert viewer.ends == {gone["id"]: "cancelled"}
            assert gone["parent"] not in viewer.nodes
            assert len(viewer.of_kind("turn")) == 2
        assert not api.service.tree.viewers


async def test_a_turn_that_leaves_the_tree_before_its_end_is_stored_tells_this_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_api(model_url=SLOW) as api, trio.open_nursery() as nursery:
        (path,) = await turns_running(api, 1)
        store, commit = api.service.store, trio.Event()
        end_turn = store.end_turn

        async def end_turn_later(*args: Any, **named: Any) -> Any:
            await commit.wait()
            return await end_turn(*args, **named)

        monkeypatch.setattr(store, "end_turn", end_turn_later)
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
            (turn,) = viewer.of_kind("turn")
            nursery.start_soon(api.call, "POST", f"{path}/cancel")
            while turn["id"] in viewer.nodes:
                await viewer.until("change")
            assert viewer.ends == {turn["id"]: "cancelled"}
            commit.set()


async def test_the_tree_keeps_no_turn_that_has_ended() -> None:
    async with open_api(model_url=SLOW) as api:
        (path,) = await turns_running(api, 1)
        turn_id = path.rpartition("/")[2]
        (turn,) = [weakref.ref(it) for it in gc.get_objects() if isinstance(it, Turn) and it.id == turn_id]
        assert turn_id.encode() in (await api.call("GET", "/admin/tree")).body
        assert (await api.call("POST", f"{path}/cancel")).status == 200
        assert (await api.call("DELETE", path.rpartition("/turns")[0])).status == 204
        gc.collect()
        assert api.service.tree._root is not None, "the mirror is still there"
        assert turn() is None


async def test_cursors_and_deadlines_move_in_the_stream_and_silence_is_a_heartbeat(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        nodes = (await api.call("GET", "/admin/tree")).json["nodes"]
        quiet = next(node["id"] for node in nodes if node["name"] == "expiry loop")
        async with viewing(api, f"?interval_ms=500&under={quiet}") as viewer:
            await viewer.until("snapshot")
            await viewer.until("heartbeat")
        await turns_running(api, 1)
        async with viewing(api) as viewer:
            await viewer.until("snapshot")  # which may be from before the turn
            while not viewer.of_kind("turn"):
                await viewer.until("change")
            (turn,) = viewer.of_kind("turn")
            seq, deadline = turn["seq"], turn["deadline"]
            for _ in range(8):
                await viewer.until("change")
            assert turn["seq"] > seq
            assert turn["deadline"] > deadline


async def test_a_viewer_sees_the_phases_pass_and_the_stream_ends_with_them(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, lame_duck_timeout_s=3, drain_timeout_s=5) as api:
        await turns_running(api, 2)
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
            phases = [viewer.head["shutdown"]["phase"]]
            api.service.shutdown.notice("test")
            with trio.fail_after(60):
                while await viewer.next() != "end":
                    if viewer.head["shutdown"]["phase"] != phases[-1]:
                        phases.append(viewer.head["shutdown"]["phase"])
            assert viewer.end is not None
            assert viewer.end["reason"] == "shutdown"
            assert phases[:3] == ["serving", "lame_duck", "draining"]
            assert viewer.end["shutdown"]["phase"] == "releasing"
            assert viewer.end["shutdown"]["entered"].keys() >= {"lame_duck", "draining", "closing", "interrupting"}
            assert set(viewer.ends.values()) <= {"interrupted"}


async def test_new_viewers_are_answered_in_the_drain(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, drain_timeout_s=50) as api:
        await turns_running(api, 1)
        api.service.shutdown.notice("test")
        await trio.sleep(1)
        (await api.call("POST", "/sessions", {})).problem(503, "shutting_down")
        snapshot = (await api.call("GET", "/admin/tree")).json
        assert (snapshot["shutdown"]["phase"], snapshot["worker"]["status"]) == ("draining", "draining")
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
            await viewer.until("end")


async def test_a_viewer_of_a_worker_that_is_replaced_is_sent_away(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW, drain_timeout_s=50) as api:
        await turns_running(api, 1)
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
            begun_at = trio.current_time()
            api.service.shutdown.notice("the master reloads", is_replaced=True)
            await viewer.until("end")
            assert viewer.end is not None
            assert viewer.end["reason"] == "replaced"
            assert trio.current_time() - begun_at < 1


async def test_the_stream_of_a_part_ends_with_this_part(autojump_clock: MockClock) -> None:
    async with open_api(model_url=SLOW) as api:
        (path,) = await turns_running(api, 1)
        snapshot = (await api.call("GET", "/admin/tree")).json
        session = next(node for node in snapshot["nodes"] if node["kind"] == "session")
        async with viewing(api, f"?under={session['id']}") as viewer:
            await viewer.until("snapshot")
            assert {"session", "turn"} <= {node["kind"] for node in viewer.nodes.values()}
            await api.call("POST", f"{path}/cancel")
            await viewer.until("end")
            assert viewer.end is not None
            assert viewer.end["reason"] == "gone"


async def test_the_viewers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "VIEWERS_MAX", 1)
    async with open_api() as api:
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
            (await api.call("GET", "/admin/tree/events")).problem(503, "stream_limit")
            assert (await api.call("HEAD", "/admin/tree")).status == 200
        async with viewing(api) as viewer:
            await viewer.until("snapshot")
        assert (await api.call("HEAD", "/admin/tree/events")).headers["content-type"] == "text/event-stream"
        assert not api.service.tree.viewers


class CountedTime(trio.abc.Instrument):
    """A clock of the work in steps, in tenths of a millisecond that the test counts; and the longest step by it."""

    def __init__(self) -> None:
        self.tenths = self.longest = 0
        self._began_at = 0

    def perf_counter(self) -> float:
        return self.tenths / 10_000

    thread_time = perf_counter

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began_at = self.tenths

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, self.tenths - self._began_at)

    def after(self, work: Callable[..., Steps[Any]], tenths: int) -> Callable[..., Steps[Any]]:
        """The work, which takes this time, in steps of a tenth of a millisecond each."""

        def steps(*args: Any) -> Steps[Any]:
            result = at_once(work(*args))
            for _ in range(tenths):
                yield
                self.tenths += 1
            return result

        return steps


@pytest.mark.parametrize("call", ["/admin/tree", "/admin/tree/events"])
async def test_a_look_hands_over_between_its_phases(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase ends just before it would let other tasks run, so two of them in one step are too long."""
    time = CountedTime()
    in_a_step = round(live_tree.STEP_S * 10_000)
    monkeypatch.setattr(steps, "time", time)
    monkeypatch.setattr(live_tree, "time", time)
    monkeypatch.setattr(LiveTree, "_walk", time.after(LiveTree._walk, in_a_step - 1))
    monkeypatch.setattr(View, "of", time.after(View.of, in_a_step - 1))
    monkeypatch.setattr(View, "changes", time.after(View.changes, in_a_step - 1))
    head = tree._head

    def head_in_a_millisecond(*args: Any, **rest: Any) -> Any:
        time.tenths += 10
        return head(*args, **rest)

    monkeypatch.setattr(tree, "_head", head_in_a_millisecond)
    async with open_api() as api:
        trio.lowlevel.add_instrument(time)
        try:
            if call == "/admin/tree":
                assert (await api.call("GET", call)).status == 200
            else:
                async with viewing(api) as viewer:
                    await viewer.until("snapshot")
        finally:
            trio.lowlevel.remove_instrument(time)
    assert time.longest == in_a_step
