"""The nodes of the live tree, and what the parts of the service say about them."""

from collections.abc import Callable, Iterator, Sequence

import msgspec


class Node(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    """One thing that lives: a task, a nursery, a cancel scope, or what the service calls it.

    ``{"id": "41", "parent": "40", "kind": "turn", "name": "turn turn_0a…", "state": "running", "deadline": 872.4,
    "deadline_name": "next_token_timeout", "since": 801.2, "seq": 212, "text_length": 840, "session": "sess_6f…",
    "turn": "turn_0a…", "model": "scripted"}``

    Attributes:
        id: Of this thing as long as it lives, and of no other one in this process.
        parent: None for the root only.
        kind: What it is.
        name: For people.
        state: By its kind.
        deadline: On the clock of the snapshot, in seconds; None if there is none.
        deadline_name: What passes then.
        cancelled: True while it is cancelled and still there.
        shielded: True if no cancellation from outside reaches into it.
        since: When it began, on the same clock.
        seq: The newest event of a turn; the last event that a stream has written.
        text_length: The code points of a turn's reply so far.
        session, owner, turn, model, face, upstream: What it belongs to. ``session`` is the public id.
        left_out: How many nodes below this one are not told.
    """

    id: str = ""
    parent: str | None
    kind: str
    name: str
    state: str | None = None
    deadline: float | None = None
    deadline_name: str | None = None
    cancelled: bool = False
    shielded: bool = False
    since: float | None = None
    seq: int | None = None
    text_length: int | None = None
    session: str | None = None
    owner: str | None = None
    turn: str | None = None
    model: str | None = None
    face: str | None = None
    upstream: str | None = None
    left_out: int = 0


class Noted(msgspec.Struct, gc=False):
    """A thing that is shown below another one, and those that were noted before it.

    The garbage collector does not know of it. With thousands of pairs in lists each look would make the collector run.
    """

    thing: object
    node: Node
    before: "Noted | None"

    def in_order(self) -> "Sequence[Noted]":
        """This one and those before it, in the order in which they were noted."""
        found: list[Noted] = []
        noted: Noted | None = self
        while noted is not None:
            found.append(noted)
            noted = noted.before
        found.reverse()
        return found


class Notes:
    """What the parts of the service say about one snapshot: which tasks and scopes are theirs, and what hangs below.

    Args:
        epoch: The moment on Trio's clock from which the clock of the snapshots counts.

    Attributes:
        named: The node of a task or a scope that stands for something of the service, without its id and parent.
        below: What is shown below a task, a scope or another thing, the last one first; below None: the process.
        ends: How a thing that is in ``named`` has ended, for the look that finds it gone.
    """

    def __init__(self, epoch: float) -> None:
        self._epoch = epoch
        self.named: dict[object, Node] = {}
        self.below: dict[object, Noted] = {}
        self.ends: dict[object, Callable[[], str]] = {}

    def moment(self, at: float) -> float:
        """A moment of Trio's clock on the clock of the snapshots."""
        return round(at - self._epoch, 3)

    def name(self, thing: object, node: Node, *, end: Callable[[], str] | None = None) -> None:
        """Say what a task or a scope is. ``end`` is kept from look to look, and is called once the thing has gone."""
        self.named[thing] = node
        if end is not None:
            self.ends[thing] = end

    def add(self, thing: object, node: Node, *, below: object) -> None:
        """Say what else lives, and below which task, scope or other thing it is shown. None stands for the process."""
        self.below[below] = Noted(thing, node, self.below.get(below))


Source = Callable[[Notes], Iterator[None]]
"""Writes notes, in short steps: a generator that yields after each of them (:mod:`service.steps`)."""
