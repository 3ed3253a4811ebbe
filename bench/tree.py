"""Measures what the live tree costs: while nobody looks, at the first look of a server, and while one or four look.

The turns are quiet, each in a session of its own: so all work is that of the tree. Viewers are sockets that follow
``GET /admin/tree/events`` as the console does. Steps are measured within the server (:mod:`bench.tree_server`).
"""

import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import trio

from bench.contenders import Contender
from bench.plan import Calls, Request
from bench.rows import spread
from bench.server_process import ServerProcess, python_command
from bench.stage import Place, Stage, open_stage
from bench.table import Table, number, triple
from bench.tree_server import Step, ask_steps

TURNS = 5000
WINDOW_S = 10.0
_CLIENTS = 20
_FIRST_S = 2.0
_SETTLE_S = 2.0
_CANCELLED_EACH_S = 0.13
"""Less regular than the looks, so that the cancels fall on any moment between two of them."""
_CANCELLED_MAX = 40
_GONE_MAX_S = 10.0
_OPENING_MAX_S = 600.0
_MESSAGE = "silent_after=1"
_TURN = re.compile(rb'"id":"(\d+)",[^{}]*"kind":"turn",[^{}]*"session":"([^"]+)","turn":"([^"]+)"')
_COUNTS = re.compile(rb'"counts":\{"tasks":(\d+),"nodes":(\d+)')
_REMOVED = re.compile(rb'"removed":\[([^\]]*)\]')


class TreeRow(msgspec.Struct, kw_only=True):
    """One window of time."""

    kind: str = "tree"
    contender: str
    label: str
    repeat: int
    what: str
    turns: int
    tasks: int | None = None  # as the tree counts them; None where nobody looks
    nodes: int | None = None
    cpu_share: float  # the use of one core by the server
    tree_share: float  # by the tasks that look
    steps: int  # of the tasks that look
    ran_ms: tuple[float, float, float] | None  # processor time of a step: p50, p99, max
    took_ms: tuple[float, float, float] | None  # the same in real time: other processes and threads count
    collected_ms: float  # the longest garbage collection in one of these steps
    others_ms: float  # the longest step of any other task, in processor time
    others_task: str
    others_collected_ms: float  # the part of it that the garbage collector took
    cancelled: int = 0  # turns that were cancelled meanwhile
    gone_ms: tuple[float, float, float] | None = None  # from the cancel's request until a viewer has read that it left


TABLE = Table(
    "Tree: what looking at the live tree costs",
    "core: the use of one core by the whole server, and by the tasks that look. A step is what a task does without "
    "letting others run; steps are those of the tasks that look: ms of processor time, and of real time, which has the "
    "time that other processes took. collection: the longest garbage collection within one of these steps; others: the "
    "longest step of any other task, what the collector took of it, and its task. gone: from the request that cancels "
    "a turn until a viewer has read that its node has gone.",
    (
        ("window", lambda row: row.what),
        ("turns", lambda row: f"{row.turns:,}"),
        ("tasks", lambda row: "-" if row.tasks is None else f"{row.tasks:,}"),
        ("nodes", lambda row: "-" if row.nodes is None else f"{row.nodes:,}"),
        ("core", lambda row: f"{row.cpu_share:.1%}"),
        ("tree", lambda row: f"{row.tree_share:.2%}"),
        ("steps", lambda row: f"{row.steps:,}"),
        ("step ms", lambda row: triple(row.ran_ms, 2)),
        ("real ms", lambda row: triple(row.took_ms, 2)),
        ("collection ms", lambda row: number(row.collected_ms, 2)),
        (
            "others ms",
            lambda row: f"{number(row.others_ms, 2)} ({number(row.others_collected_ms, 2)}), {row.others_task}",
        ),
        ("gone ms", lambda row: "-" if row.gone_ms is None else f"{triple(row.gone_ms, 0)} (n {row.cancelled})"),
    ),
)


@dataclass
class Viewer:
    """A client that follows the tree, and notes when the nodes of turns leave it."""

    port: int
    turns: dict[bytes, tuple[str, str]] = field(default_factory=dict)  # by the ids of their nodes: session and turn
    left: dict[str, float] = field(default_factory=dict)  # turns that have left, and when
    tasks: int | None = None
    nodes: int | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the tree until the task is cancelled."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            task_status.started()
            await stream.send_all(b"GET /admin/tree/events?nodes=20000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            unread = b""
            async for data in stream:
                unread += data
                *frames, unread = unread.split(b"\n\n")
                for frame in frames:
                    self._take(re.sub(rb"\r\n[0-9a-f]+\r\n", b"", frame))  # the marks of chunks within a frame
        raise ConnectionError("the server has ended the stream of the tree")

    def _take(self, frame: bytes) -> None:
        now = time.monotonic()
        for node, session, turn in _TURN.findall(frame):
            self.turns[node] = session.decode(), turn.decode()
        for tasks, nodes in _COUNTS.findall(frame):
            self.tasks, self.nodes = int(tasks), int(nodes)
        for removed in _REMOVED.findall(frame):
            for node in removed.replace(b'"', b"").split(b","):
                if (turn_shown := self.turns.pop(node, None)) is not None:
                    self.left[turn_shown[1]] = now


@dataclass
class _Window:
    what: str
    viewer: Viewer | None
    since: float
    used_s: float
    until: float = 0.0
    tasks: int | None = None
    nodes: int | None = None
    cancelled: dict[str, float] = field(default_factory=dict)  # turns, and when each was asked to end


async def measure_contender(
    contender: Contender, place: Place, *, repeat: int, turns: int, window_s: float
) -> list[TreeRow]:
    """Measure all windows on one server."""
    steps_path = place.folder / f"steps-{repeat}.json"
    measured = replace(contender, argv=python_command("-m", "bench.tree_server"))
    settings = {
        "LASTCALL_STORE_URL": "memory:",
        "LASTCALL_LIVE_TURNS_MAX": str(turns + _CLIENTS),
        "LASTCALL_NEXT_TOKEN_TIMEOUT_S": "3600",
        "LASTCALL_TURN_TIMEOUT_S": "3600",
        "BENCH_STEPS": str(steps_path),
    }
    async with open_stage(measured, place, **settings) as stage:
        begin = (
            Request(path="/sessions", body="{}", capture={"session": "id"}),
            Request(path="/sessions/$session/turns", body=f'{{"input": "{_MESSAGE}", "background": true}}'),
        )
        clients = min(_CLIENTS, turns)
        calls = Calls(name="begin", count=clients, requests=begin, repeat=turns // clients)
        async with stage.open_load(calls, opening_max_s=_OPENING_MAX_S):
            pass
        await trio.sleep(_SETTLE_S)
        windows = [await _watch(stage, "nobody looks", window_s)]
        async with _viewers(stage, 1) as (viewer,):
            windows.append(await _watch(stage, "the first look", _FIRST_S, viewer))
            windows.append(await _watch(stage, "one viewer", window_s, viewer))
            windows.append(await _watch_cancels(stage, viewer, window_s))
        async with _viewers(stage, 4) as (viewer, *_):
            await trio.sleep(_FIRST_S)
            windows.append(await _watch(stage, "four viewers", window_s, viewer))
        await trio.sleep(_SETTLE_S)
        windows.append(await _watch(stage, "nobody looks again", window_s))
        steps = await ask_steps(stage.server, steps_path)
    return [_row(contender, repeat, turns, window, steps) for window in windows]


@asynccontextmanager
async def _viewers(stage: Stage, count: int) -> AsyncIterator[list[Viewer]]:
    viewers = [Viewer(stage.server.port) for _ in range(count)]
    async with trio.open_nursery() as nursery:
        for viewer in viewers:
            await nursery.start(viewer.run)
        yield viewers
        nursery.cancel_scope.cancel()


async def _watch(stage: Stage, what: str, window_s: float, viewer: Viewer | None = None) -> _Window:
    """Let some time pass, and at least until the viewer has its first snapshot."""
    window = _begin(stage.server, what, viewer)
    await trio.sleep(window_s)
    if viewer is not None:
        with trio.move_on_after(_GONE_MAX_S):
            while viewer.tasks is None:  # noqa: ASYNC110  what another task reads sets no event
                await trio.sleep(0.05)
    return _end(window, stage.server)


async def _watch_cancels(stage: Stage, viewer: Viewer, window_s: float) -> _Window:
    """Cancel some of the turns, one after the other, and wait until all have left the viewer."""
    window = _begin(stage.server, "one viewer, cancels", viewer)
    asked = window.cancelled
    for session, turn in list(viewer.turns.values())[: min(_CANCELLED_MAX, round(window_s / _CANCELLED_EACH_S))]:
        asked[turn] = time.monotonic()
        await _cancel(stage.server.port, session, turn)
        await trio.sleep(max(0.0, asked[turn] + _CANCELLED_EACH_S - time.monotonic()))
    with trio.move_on_after(_GONE_MAX_S):
        while not asked.keys() <= viewer.left.keys():  # noqa: ASYNC110  what another task reads sets no event
            await trio.sleep(0.05)
    return _end(window, stage.server)


def _begin(server: ServerProcess, what: str, viewer: Viewer | None) -> _Window:
    return _Window(what, viewer, since=time.monotonic(), used_s=-server.cpu_seconds())


def _end(window: _Window, server: ServerProcess) -> _Window:
    window.until = time.monotonic()
    window.used_s += server.cpu_seconds()
    if window.viewer is not None:
        window.tasks, window.nodes = window.viewer.tasks, window.viewer.nodes
    return window


async def _cancel(port: int, session: str, turn: str) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        head = f"POST /sessions/{session}/turns/{turn}/cancel HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        await stream.send_all(f"{head}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
        async for _ in stream:
            pass


def _row(contender: Contender, repeat: int, turns: int, window: _Window, steps: Sequence[Step]) -> TreeRow:
    took_s = window.until - window.since
    in_it = [step for step in steps if window.since <= step.began_at < window.until]
    looking = [step for step in in_it if step.is_of_tree]
    longest = max((step for step in in_it if not step.is_of_tree), key=lambda step: step.ran_s, default=None)
    left = {} if window.viewer is None else window.viewer.left
    return TreeRow(
        contender=contender.name,
        label=contender.label,
        repeat=repeat,
        what=window.what,
        turns=turns,
        tasks=window.tasks,
        nodes=window.nodes,
        cpu_share=window.used_s / took_s,
        tree_share=sum(step.ran_s for step in looking) / took_s,
        steps=len(looking),
        ran_ms=spread(step.ran_s * 1000 for step in looking),
        took_ms=spread(step.took_s * 1000 for step in looking),
        collected_ms=max((step.collected_s * 1000 for step in looking), default=0.0),
        others_ms=longest.ran_s * 1000 if longest is not None else 0.0,
        others_task=longest.task if longest is not None else "",
        others_collected_ms=longest.collected_s * 1000 if longest is not None else 0.0,
        cancelled=len(window.cancelled),
        gone_ms=spread((left[turn] - at) * 1000 for turn, at in window.cancelled.items() if turn in left),
    )
