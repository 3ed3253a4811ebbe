"""``lastcall tree``: draws what a server's process does now: sessions, turns, model calls, streams, connections, loops.

On a terminal the drawing follows the server's stream of changes: arrow keys and page keys move in it, ``q`` or Ctrl+C
leaves. A stream that was cut is asked for again. In a pipe the tree is drawn once.
"""

import argparse
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import trio
from lastcall_client import Bounds, Client, Event, LastcallError

from service.cli import exit_codes
from service.cli.connection import explained, open_client
from service.cli.reply_views import json_line
from service.cli.terminal.cells import cut
from service.cli.terminal.keys import Key, KeyDecoder
from service.cli.terminal.output import Output, Style, harmless_line
from service.cli.terminal.raw_mode import TerminalMode, raw_mode, read_keys, set_mode, set_raw
from service.cli.tree_model import TreeModel
from service.client_settings import Target

Node = Mapping[str, Any]
NODES_MAX = 2000
"""Bound of the nodes that are asked for: each look costs the server time."""
BOUNDS = Bounds(patience_s=0, silence_s=10)
"""The stream has a comment every two seconds: a longer silence is a connection that is dead."""
AGAIN_S = 0.5
"""The pause before a stream that was cut is asked for again; more if the server says so."""
TICK_S = 0.5
"""The deadlines count down so often, also if nothing changes."""
_STYLES: Mapping[str, tuple[Style, ...]] = {
    "process": ("bold",),
    "session": ("bold", "cyan"),
    "turn": ("bold", "green"),
    "stream": ("green",),
    "model_connection": ("yellow",),
    "scope": ("dim",),
    "nursery": ("dim",),
}
_SCREEN_TAKEN, _SCREEN_GIVEN_BACK = "\x1b[?1049h\x1b[?7l\x1b[?25l\x1b[2J", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_SERVING = "serving"
_ENDS: Mapping[str, str] = {
    "shutdown": "the process has released all that it held",
    "replaced": "another worker serves in its place",
    "gone": "this worker has gone",
}
"""Why a stream of changes has ended, by what its last event says."""


async def run(arguments: argparse.Namespace, target: Target, output: Output) -> int:
    """Run the command, and return the exit code."""
    async with open_client(target, BOUNDS) as client:
        params = {"nodes": str(NODES_MAX)} | ({"worker": str(arguments.worker)} if arguments.worker else {})
        if os.isatty(0) and output.is_terminal and not (arguments.once or arguments.json):
            return await _LiveTree(arguments, target, output, client, params).run()
        tree = await client.request("GET", "/admin/tree", params=params)
        if arguments.json:
            await output.write(json_line(tree))
        else:
            await output.write("".join(f"{line}\n" for line in drawn(tree, output, with_inner=arguments.all)))
        return exit_codes.OK


# The drawing


def drawn(tree: Mapping[str, Any], output: Output, *, with_inner: bool = False) -> list[str]:
    """The lines of a tree, the first two of which are about the whole process."""
    lines = [_head(tree, output)]
    shutdown = tree["shutdown"]
    if shutdown["phase"] != _SERVING:
        passed = " → ".join(shutdown["entered"]) or shutdown["phase"]
        lines.append(output.styled(harmless_line(f"stopping ({shutdown['reason']}): {passed}"), "bold", "yellow"))
    children = _children(tree["nodes"], with_inner=with_inner)
    for root in children.get(None, ()):
        lines += _below(root, children, tree["clock"], output)
    return lines


def _head(tree: Mapping[str, Any], output: Output) -> str:
    counts, worker = tree["counts"], tree["worker"]
    parts = [f"worker {worker['pid']}", worker["status"], f"{counts['tasks']} tasks"]
    parts += [f"{counts['left_out']} nodes left out"] if counts.get("left_out") else []
    others = [str(it["pid"]) for it in tree["workers"] if it["pid"] != worker["pid"]]
    parts += [f"other workers: {', '.join(others)} (--worker PID)"] if others else []
    return output.styled(harmless_line(" · ".join([*parts, str(tree["taken_at"])[11:19] + " UTC"])), "dim")


def _children(nodes: Sequence[Node], *, with_inner: bool) -> Mapping[str | None, list[Node]]:
    """The drawn nodes by the drawn node above them."""
    left_out = {it["id"]: it["parent"] for it in nodes if not with_inner and _is_inner(it)}
    children: dict[str | None, list[Node]] = {}
    for node in nodes:
        above = node["parent"]
        while above in left_out:
            above = left_out[above]
        if node["id"] not in left_out:
            children.setdefault(above, []).append(node)
    return children


def _is_inner(node: Node) -> bool:
    """Whether a node is left out unless all are asked for: what it holds is drawn below the node around it."""
    match node["kind"]:
        case "scope":
            return True
        case "nursery":
            return bool(node["name"] == "nursery")  # others say what they hold
        case "model_connection":
            return node.get("state") == "idle"
        case _:
            return False


def _below(root: Node, children: Mapping[str | None, list[Node]], clock: float, output: Output) -> Iterator[str]:
    """The lines of a node and of all below it: without recursion, because a tree may be deep."""
    waiting = [(root, "", "")]
    while waiting:
        node, branch, indent = waiting.pop()
        yield output.styled(branch, "dim") + _line(node, clock, output)
        below = children.get(node["id"], [])
        for place, child in reversed(list(enumerate(below))):
            is_last = place == len(below) - 1
            waiting.append((child, indent + ("└─ " if is_last else "├─ "), indent + ("   " if is_last else "│  ")))


def _line(node: Node, clock: float, output: Output) -> str:
    name = harmless_line(str(node["name"]))
    styles: tuple[Style, ...] = ("red",) if node.get("cancelled") else _STYLES.get(node["kind"], ())
    details = harmless_line(" · ".join(_details(node, clock)))
    return output.styled(name, *styles) + (output.styled(f"  {details}", "dim") if details else "")


def _details(node: Node, clock: float) -> Iterator[str]:
    if node.get("cancelled"):
        yield "cancelled"
    if node.get("state") and node["kind"] != "process":
        yield str(node["state"])
    for field in ("owner", "model", "upstream", "face"):
        if node.get(field):
            yield str(node[field])
    if node.get("seq"):
        yield f"event {node['seq']}"
    if node.get("text_length"):
        yield f"{node['text_length']} characters"
    if node.get("since") is not None:
        yield f"for {_seconds(clock - node['since'])}"
    if node.get("deadline") is not None:
        yield f"{node.get('deadline_name') or 'deadline'} in {_seconds(node['deadline'] - clock)}"
    if node.get("shielded"):
        yield "shielded"
    if node.get("left_out"):
        yield f"{node['left_out']} more below"


def _seconds(duration_s: float) -> str:
    return f"{duration_s:.0f} s" if duration_s < 600 else f"{duration_s / 60:.0f} min"


# Live


class _LiveTree:
    """The drawing on a screen of its own, which is drawn anew with each change. ``_top`` is its first visible line."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        target: Target,
        output: Output,
        client: Client,
        params: Mapping[str, str],
    ) -> None:
        self.exit_code = exit_codes.OK
        self._with_inner = arguments.all
        self._target, self._output, self._client, self._params = target, output, client, params
        self._model = TreeModel()
        self._told_at = 0.0
        self._has_changed = trio.Event()
        self._lines: list[str] = []
        self._trouble = ""
        self._top = 0
        self._mode_before: TerminalMode | None = None

    async def run(self) -> int:
        """Draw until the user leaves. Returns the exit code. Raises: LastcallError, if the first stream is refused."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH)
        with trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_signals, signals, nursery.cancel_scope)
                nursery.start_soon(self._follow)
                await self._has_changed.wait()
                with raw_mode(0) as self._mode_before, self._own_screen():
                    async with trio.open_nursery() as drawing:
                        drawing.start_soon(self._take_keys, nursery.cancel_scope)
                        drawing.start_soon(self._redraw)
        return self.exit_code

    async def _follow(self) -> None:
        """Follow the server's stream of changes, again and again. Raises: LastcallError, before the first snapshot."""
        while True:
            pause_s = AGAIN_S
            try:
                async with self._client.watch("/admin/tree/events", params=self._params) as events:
                    async for event in events:
                        self._take(event)
                if not self._model.is_known:
                    raise LastcallError("The stream of the tree has ended at once.", code="malformed_answer")
                self._trouble = self._trouble or "the stream of the tree has ended"
            except LastcallError as error:
                if not self._model.is_known:
                    raise
                _, self._trouble = explained(error, self._target)
                pause_s = max(pause_s, error.retry_after_s or 0)
            self._has_changed.set()
            await trio.sleep(pause_s)

    def _take(self, event: Event) -> None:
        self._model.take(event.type, event.data)
        self._told_at = trio.current_time()
        self._trouble = _ENDS.get(event.data["reason"], "") if event.type == "end" else ""
        if self._model.is_known:
            self._has_changed.set()

    async def _redraw(self) -> None:
        """Draw what has changed, and count the deadlines down."""
        while True:
            self._has_changed = trio.Event()
            age_s = 0 if self._trouble else trio.current_time() - self._told_at
            self._lines = drawn(self._model.tree(age_s=age_s), self._output, with_inner=self._with_inner)
            await self._draw()
            with trio.move_on_after(TICK_S):
                await self._has_changed.wait()

    async def _draw(self) -> None:
        columns, rows = self._output.size()
        room = max(1, rows - 1)
        self._top = min(max(0, self._top), max(0, len(self._lines) - room))
        shown = self._lines[self._top : self._top + room]
        if self._trouble:
            foot = self._output.styled(cut(f"old, because {harmless_line(self._trouble)}", columns - 1), "bold", "red")
        else:
            last = self._top + len(shown)
            place = f"lines {self._top + 1} to {last} of {len(self._lines)} · " if len(self._lines) > room else ""
            foot = self._output.styled(cut(f"{place}q leaves", columns - 1), "dim")
        lines = [*shown, *[""] * (room - len(shown)), foot]
        await self._output.write("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")

    @contextmanager
    def _own_screen(self) -> Iterator[None]:
        """Draw on the terminal's other screen, without its cursor and without breaking lines."""
        self._output.write_now(_SCREEN_TAKEN)
        try:
            yield
        finally:
            self._output.write_now(_SCREEN_GIVEN_BACK)

    def _suspend(self) -> None:
        """Stop, as a shell wants it at Ctrl+Z. The terminal is as it was before until the shell lets this go on."""
        before = self._mode_before
        if before is not None:
            self._output.write_now(_SCREEN_GIVEN_BACK)
            set_mode(0, before)
        os.kill(os.getpid(), signal.SIGSTOP)  # and on from here after SIGCONT
        if before is not None:
            set_raw(0, signals=True)
            self._output.write_now(_SCREEN_TAKEN)

    async def _take_signals(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            if number == signal.SIGTSTP:
                self._suspend()
            if number in (signal.SIGTSTP, signal.SIGWINCH):
                if self._lines:
                    await self._draw()
                continue
            self.exit_code = 128 + number
            scope.cancel()

    async def _take_keys(self, scope: trio.CancelScope) -> None:
        decoder = KeyDecoder(self._output.encoding)
        while True:
            data = await read_keys(0)
            for key in decoder.feed(data):
                if key in ("q", "Q", Key.END_OF_INPUT):
                    scope.cancel()
                    return
                self._move(key)
            if not data:  # the terminal has gone
                scope.cancel()
                return
            await self._draw()

    def _move(self, key: Key | str) -> None:
        page = max(1, self._output.size()[1] - 2)
        steps = {Key.UP: -1, "k": -1, Key.DOWN: 1, "j": 1, " ": page, "b": -page, Key.HOME: -self._top}
        self._top += steps.get(key, len(self._lines) if key is Key.END else 0)
