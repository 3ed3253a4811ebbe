"""The live tree of ``lastcall tree``: what is known after a snapshot and changes is what a new snapshot would tell."""

import random
from typing import Any

import msgspec

from service.cli.terminal.output import Output
from service.cli.tree import drawn
from service.cli.tree_model import TreeModel
from service.steps import at_once
from service.telemetry.tree_nodes import Node
from service.telemetry.tree_views import View
from tests.telemetry.test_live_tree import depths_of

SERVING = {"phase": "serving", "reason": "", "entered": {}, "bounds_s": {"total": 5.0}}
HEAD: dict[str, Any] = {
    "taken_at": "2026-01-31T09:30:00Z",
    "clock": 10.0,
    "worker": {"pid": 7, "status": "serving", "started_at": "2026-01-31T09:00:00Z"},
    "workers": [{"pid": 7, "status": "serving", "started_at": "2026-01-31T09:00:00Z"}],
    "shutdown": SERVING,
    "counts": {"tasks": 1, "nodes": 1, "left_out": 0},
}


def told(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(node))
    return found


def below(nodes: list[Node], at: str) -> set[str]:
    gone = {at}
    for node in nodes:
        if node.parent in gone:
            gone.add(node.id)
    return gone


def test_a_tree_after_changes_is_the_one_of_a_new_snapshot() -> None:
    dice = random.Random(4711)
    nodes = [Node(id="0", parent=None, kind="process", name="process 7")]
    view = View(under=None, nodes_max=20_000)
    at_once(view.look(nodes, depths_of(nodes)))
    model = TreeModel()
    model.take("snapshot", HEAD | {"nodes": [told(it) for it in nodes]})
    most = 0
    for number in range(1, 300):
        match dice.choice(("add", "add", "add", "remove", "change")):
            case "add":
                parent = dice.choice(nodes)
                node = Node(id=str(number), parent=parent.id, kind="turn", name=f"turn {number}", seq=1, deadline=20.0)
                at = nodes.index(parent) + len(below(nodes, parent.id))
                nodes = [*nodes[:at], node, *nodes[at:]]
            case "remove" if len(nodes) > 1:
                gone = below(nodes, dice.choice(nodes[1:]).id)
                nodes = [it for it in nodes if it.id not in gone]
            case _:
                at = dice.randrange(len(nodes))
                nodes = nodes.copy()
                nodes[at] = msgspec.structs.replace(nodes[at])
                nodes[at].deadline, nodes[at].cancelled = dice.choice((None, 30.0)), dice.choice((True, False))
        seen = at_once(view.look(nodes, depths_of(nodes)))
        assert seen is not None
        _, difference = seen
        change = {"removed": difference.removed, "added": [told(it) for it in difference.added]}
        model.take("change", change | {"changed": difference.changed, "clock": 10.0 + number})
        fresh = HEAD | {"clock": 10.0 + number, "nodes": [told(it) for it in nodes]}
        output = Output(encoding="utf-8")
        assert drawn(model.tree(age_s=0), output) == drawn(fresh, output)
        most = max(most, len(nodes))
    assert most > 20


def test_the_phases_of_a_stop_are_drawn_and_at_its_end_the_process_holds_nothing() -> None:
    model = TreeModel()
    nodes = [
        {"id": "0", "parent": None, "kind": "process", "name": "process 7"},
        {"id": "1", "parent": "0", "kind": "turn", "name": "turn t", "deadline": 20.0},
    ]
    model.take("snapshot", HEAD | {"nodes": nodes})
    output = Output(encoding="utf-8")
    assert drawn(model.tree(age_s=4.0), output)[-1] == "└─ turn t  deadline in 6 s"
    stop = SERVING | {"phase": "draining", "reason": "SIGTERM", "entered": {"draining": 11.0}}
    model.take("change", {"clock": 11.0, "shutdown": stop})
    assert drawn(model.tree(age_s=0), output)[1] == "stopping (SIGTERM): draining"
    model.take("news", {"of": "a newer server"})
    stop = stop | {"phase": "releasing", "entered": {"draining": 11.0, "releasing": 12.0}}
    model.take("end", {"reason": "shutdown", "shutdown": stop})
    assert drawn(model.tree(age_s=0), output)[1:] == ["stopping (SIGTERM): draining → releasing", "process 7"]
