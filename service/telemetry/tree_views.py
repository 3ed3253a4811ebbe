"""What one viewer sees of the live tree: all of it or a part, within a bound, and the changes from look to look."""

from collections.abc import Sequence
from typing import Any

import msgspec

from service.steps import Steps
from service.telemetry.tree_nodes import Node

_A_STEP = 256
"""Nodes after which a step ends; each takes less than a microsecond or two."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What has changed from one view to the next.

    Attributes:
        added: Each after its parent; the last among its siblings.
        changed: The id, and the fields that have other values now: None for a field that has none any more.
        removed: The ids of nodes that have gone, with all that was below them.
    """

    added: Sequence[Node] = ()
    changed: Sequence[dict[str, Any]] = ()
    removed: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.added or self.changed or self.removed)


class View:
    """The nodes that one viewer sees.

    Args:
        under: Only the node with this id, and what is below it; None for all.
        nodes_max: So many nodes at the most. Nodes near the root come first, and each node says how many are left out
            below it.
    """

    def __init__(self, *, under: str | None, nodes_max: int) -> None:
        self._under = under
        self._nodes_max = nodes_max
        self._seen: dict[str, Node] = {}

    def look(self, nodes: Sequence[Node]) -> Steps[tuple[Sequence[Node], Difference] | None]:
        """:meth:`of`, and what has changed since the last look, as one work in steps."""
        shown = yield from self.of(nodes)
        if shown is None:
            return None
        yield
        return shown, (yield from self.changes(shown))

    def of(self, nodes: Sequence[Node]) -> Steps[Sequence[Node] | None]:
        """The nodes of a snapshot that this view has; None if there is no node with the id ``under``."""
        if self._under is not None:
            nodes = yield from _below(nodes, self._under)
            if not nodes:
                return None
        if len(nodes) > self._nodes_max:
            nodes = yield from _cut(nodes, self._nodes_max)
        return nodes

    def changes(self, nodes: Sequence[Node]) -> Steps[Difference]:
        """What has changed since the last call. The nodes are those that :meth:`of` has returned."""
        before, now = self._seen, {}
        added: list[Node] = []
        changed: list[dict[str, Any]] = []
        for count, node in enumerate(nodes, 1):
            now[node.id] = node
            old = before.get(node.id)
            if old is None:
                added.append(node)
            elif old is not node and old != node:
                changed.append(_changed_fields(old, node))
            if not count % _A_STEP:
                yield
        removed: list[str] = []
        for count, node_id in enumerate(before, 1):
            if node_id not in now:
                removed.append(node_id)
            if not count % _A_STEP:
                yield
        self._seen = now
        return Difference(added=added, changed=changed, removed=removed)


def _changed_fields(old: Node, new: Node) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": new.id}
    for name in Node.__struct_fields__:
        value = getattr(new, name)
        if value != getattr(old, name):
            fields[name] = value if value or name in ("seq", "text_length", "deadline", "since") else None
    return fields


def _below(nodes: Sequence[Node], under: str) -> Steps[Sequence[Node]]:
    """A node and all below it: they follow each other."""
    found: list[Node] = []
    ids: set[str] = set()
    for count, node in enumerate(nodes, 1):
        if node.id == under or node.parent in ids:
            found.append(node)
            ids.add(node.id)
        elif found:
            break
        if not count % _A_STEP:
            yield
    return found


def _cut(nodes: Sequence[Node], nodes_max: int) -> Steps[Sequence[Node]]:
    """So many of the nodes, those near the root first; their last ones say how many are left out below them."""
    depths: dict[str, int] = {}
    by_depth: list[int] = []
    for count, node in enumerate(nodes, 1):
        depth = depths[node.id] = depths.get(node.parent or "", -1) + 1
        if depth == len(by_depth):
            by_depth.append(0)
        by_depth[depth] += 1
        if not count % _A_STEP:
            yield
    room, whole = nodes_max, 0
    while whole < len(by_depth) and by_depth[whole] <= room:
        room -= by_depth[whole]
        whole += 1
    shown: list[Node] = []
    places: dict[str, int] = {}
    left_out: dict[str, int] = {}
    above: dict[str, str] = {}
    for count, node in enumerate(nodes, 1):
        depth = depths[node.id]
        if depth < whole or (depth == whole and room > 0):
            room -= depth == whole
            places[node.id] = len(shown)
            shown.append(node)
        else:
            parent = node.parent or ""
            shown_above = above[node.id] = above.get(parent, parent)
            left_out[shown_above] = left_out.get(shown_above, 0) + 1
        if not count % _A_STEP:
            yield
    for count, (node_id, number) in enumerate(left_out.items(), 1):
        place = places[node_id]
        shown[place] = msgspec.structs.replace(shown[place], left_out=number)
        if not count % _A_STEP:
            yield
    return shown
