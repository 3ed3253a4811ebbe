"""What one viewer sees of the live tree: all of it or a part, within a bound, and the changes from look to look."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple, replace

from service.steps import Steps
from service.telemetry.tree_nodes import Node

_A_STEP = 256
"""Nodes after which a step ends; each takes less than a microsecond or two."""
_CHANGED_AS_MANY = 15
"""As so many unchanged nodes counts one that has changed."""
_COUNTED_A_STEP = 4096
"""The same where each takes a small part of a microsecond."""


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
        self._nodes: Sequence[Node] | None = None  # those of the last look
        self._shown: Sequence[Node] = ()

    def look(self, nodes: Sequence[Node], depths: Sequence[int]) -> Steps[tuple[Sequence[Node], Difference] | None]:
        """:meth:`of`, and what has changed since the last look, as one work in steps."""
        if nodes is self._nodes:
            return self._shown, Difference()
        self._nodes = None
        shown = yield from self.of(nodes, depths)
        if shown is None:
            return None
        yield
        difference = yield from self.changes(shown)
        self._nodes, self._shown = nodes, shown
        return shown, difference

    def of(self, nodes: Sequence[Node], depths: Sequence[int]) -> Steps[Sequence[Node] | None]:
        """The nodes of a snapshot that this view has; None if there is no node with the id ``under``.

        Args:
            depths: How many nodes are above each of the nodes.
        """
        start, end = 0, len(nodes)
        if self._under is not None:
            start, end = yield from _range_of(nodes, depths, self._under)
            if start == end:
                return None
        if end - start > self._nodes_max:
            return (yield from _cut(nodes, depths, range(start, end), self._nodes_max))
        return nodes if end - start == len(nodes) else nodes[start:end]

    def changes(self, nodes: Sequence[Node]) -> Steps[Difference]:
        """What has changed since the last call. The nodes are those that :meth:`of` has returned."""
        before, now = self._seen, {}
        added: list[Node] = []
        changed: list[dict[str, Any]] = []
        since_step = 0
        for node in nodes:
            now[node.id] = node
            old = before.get(node.id)
            if old is None:
                added.append(node)
            elif old is not node and old != node:
                changed.append(_changed_fields(old, node))
                since_step += _CHANGED_AS_MANY
            since_step += 1
            if since_step >= _A_STEP:
                since_step = 0
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
    values = zip(Node.__struct_fields__, astuple(old), astuple(new), strict=True)
    for name, before, value in values:
        if value is not before and value != before:
            fields[name] = value if value or name in ("seq", "text_length", "deadline", "since") else None
    return fields


def _range_of(nodes: Sequence[Node], depths: Sequence[int], under: str) -> Steps[tuple[int, int]]:
    """Where a node and all below it are: they follow each other. An empty range if there is no such node."""
    start = end = len(nodes)
    for place, node in enumerate(nodes):
        if start == end and node.id == under:
            start = place
        elif start != end and depths[place] <= depths[start]:
            end = place
            break
        if not place % _A_STEP:
            yield
    return start, end


def _cut(nodes: Sequence[Node], depths: Sequence[int], places: range, nodes_max: int) -> Steps[Sequence[Node]]:
    """So many of these nodes, those near the root first; their last ones say how many are left out below them."""
    whole, room = yield from _whole_depths(depths, places, nodes_max)
    shown: list[Node] = []
    left_out: dict[int, int] = {}
    above = last_whole = (
        0  # places among the shown nodes: of the last one, and of the last one of the depths shown as a whole
    )
    for count, place in enumerate(places, 1):
        depth = depths[place]
        if depth < whole or (depth == whole and room):
            above = len(shown)
            shown.append(nodes[place])
            if depth < whole:
                last_whole = above
            else:
                room -= 1
        else:
            if depth == whole:
                above = last_whole
            left_out[above] = left_out.get(above, 0) + 1
        if not count % _A_STEP:
            yield
    for count, (place, number) in enumerate(left_out.items(), 1):
        shown[place] = replace(shown[place], left_out=number)
        if not count % _A_STEP:
            yield
    return shown


def _whole_depths(depths: Sequence[int], places: range, nodes_max: int) -> Steps[tuple[int, int]]:
    """The first depth of which not all nodes are shown, and how many of its nodes are."""
    by_depth: Counter[int] = Counter()
    for start in range(places.start, places.stop, _COUNTED_A_STEP):
        by_depth.update(depths[start : min(start + _COUNTED_A_STEP, places.stop)])
        yield
    whole, room = depths[places.start], nodes_max
    while by_depth[whole] <= room:
        room -= by_depth[whole]
        whole += 1
    return whole, room
