"""The live tree as ``lastcall tree`` knows it: a snapshot, and the changes that the server's stream has told since.

What the events hold: ``docs/admin.md``.
"""

from collections.abc import Mapping
from typing import Any

_HEAD = ("taken_at", "clock", "worker", "workers", "shutdown", "counts")


class TreeModel:
    """One process's tree.

    Attributes:
        is_known: Whether there is a snapshot.
    """

    def __init__(self) -> None:
        self.is_known = False
        self._head: dict[str, Any] = {}
        self._nodes: dict[str, dict[str, Any]] = {}

    def take(self, kind: str, told: Mapping[str, Any]) -> None:
        """Take an event of the stream. One of a kind that a newer server sends is passed over."""
        match kind:
            case "snapshot":
                self.is_known = True
                self._nodes = {it["id"]: it for it in told["nodes"]}
            case "change":
                self._change(told)
            case "end" if told["reason"] == "shutdown":
                # All that the process held is released; the process itself goes a moment later.
                self._nodes = {id_: it for id_, it in self._nodes.items() if it["parent"] is None}
            case "end":
                pass
            case _:
                return
        self._head |= {name: told[name] for name in _HEAD if name in told}

    def _change(self, told: Mapping[str, Any]) -> None:
        for id_ in told.get("removed", ()):
            self._nodes.pop(id_, None)
        self._nodes |= {it["id"]: it for it in told.get("added", ())}
        for fields in told.get("changed", ()):
            node = self._nodes.get(fields["id"], {})
            node.update(fields)
            for name in [name for name, value in fields.items() if value is None]:
                del node[name]

    def tree(self, *, age_s: float) -> Mapping[str, Any]:
        """The tree as ``GET /admin/tree`` has it, with the clock of a moment so many seconds after the last event."""
        return {**self._head, "clock": self._head["clock"] + age_s, "nodes": list(self._nodes.values())}
