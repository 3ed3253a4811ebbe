"""What the memory store keeps: sessions with their turns and events."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from sortedcontainers import SortedList

from service.steps import Steps
from service.storage.records import AdoptedTurn, SessionRecord, Siblings, TurnRecord
from service.storage.search import searched_texts

_LOOKED_AT_ONCE = 100
"""Turns that are looked at in one step, which takes some microseconds."""


@dataclass(frozen=True)
class KeptEvents:
    """Successive events of a turn, packed."""

    after: int
    runs: bytes
    starts: dict[int, int]
    """Where in the texts of their items the pieces of this page begin."""


@dataclass
class TurnDeletion:
    """A deletion of turns: all of them are deleted at once, and taken out of the lists afterwards.

    Attributes:
        turns: The turns that are still in the lists.
    """

    session: "KeptSession"
    turns: list["KeptTurn"]
    is_done: bool = False


@dataclass
class KeptTurn:
    record: TurnRecord
    pages: Sequence[KeptEvents] = ()
    """The events, in pages, so that a replay reads one of them at a time."""
    kept: int = 0
    """The seq of the last event."""
    ordinal: int = 0
    """From 0, in the order of acceptance."""
    place: int = 1
    """From 1, among the turns with the same parent."""
    document: int | None = None
    """Its number among the documents that are searched, once it has ended."""
    deletion: TurnDeletion | None = None
    is_suspended: bool = False
    adopted: AdoptedTurn | None = None
    """What the adoption has returned, until the turn's owner writes something of it."""

    def is_deleted(self) -> bool:
        return self.deletion is not None and self.deletion.is_done

    def texts(self) -> Iterable[str]:
        return searched_texts(self.record)


@dataclass
class KeptSession:
    record: SessionRecord
    turns: list[KeptTurn] = field(default_factory=list)
    """The session's turns, in the order of their acceptance."""
    keys: dict[str | None, tuple[str, str]] = field(default_factory=dict)
    """The idempotency keys of the session (None) and of its turns, by their ids."""
    children: dict[str | None, list[KeptTurn]] = field(default_factory=dict)
    """The turns of each parent, in the order of their acceptance."""
    begun: int = 0
    """How many turns were accepted so far."""
    edits: int = 0
    """How often turns or items were deleted."""
    removed: int = 0
    """How many ephemeral turns have ended."""
    deleted: bool = False
    title_document: int | None = None
    """The number of the title among the documents that are searched."""
    documents: SortedList[int] = field(default_factory=SortedList)
    """The numbers of all documents of the session."""
    suspended: int = 0
    """How many of the open turns are suspended."""

    def add(self, turn: KeptTurn) -> Siblings:
        """Add a turn as the newest one."""
        siblings = self.children.setdefault(turn.record.parent, [])
        siblings.append(turn)
        turn.place = len(siblings)
        turn.ordinal, self.begun = self.begun, self.begun + 1
        self.turns.append(turn)
        return Siblings(turn.place, turn.place)

    @property
    def version(self) -> tuple[int, int, int]:
        """What changes with each deletion, each new turn and each turn that its end removes."""
        return self.edits, self.begun, self.removed

    @property
    def is_suspended(self) -> bool:
        """Whether all open turns are suspended, and there are some."""
        return 0 < self.suspended == self.record.open_turns

    def open_turns(self) -> list[KeptTurn]:
        """The open turns, in the order of their acceptance."""
        found: list[KeptTurn] = []
        for turn in reversed(self.turns):
            if len(found) == self.record.open_turns:
                break
            if turn.record.is_open:
                found.append(turn)
        return found[::-1]

    def followers_of(self, turn: KeptTurn) -> Steps[list[KeptTurn]]:
        """A turn and all that follow it."""
        found = [turn]
        for follower in found:
            yield
            found += self.children.get(follower.record.id, ())
        return found

    def others_than(self, deletion: TurnDeletion) -> Steps[list[KeptTurn] | None]:
        """All turns but those of a deletion; None if these are so few that they are taken out one by one."""
        if len(deletion.turns) <= _LOOKED_AT_ONCE:
            return None
        others: list[KeptTurn] = []
        for looked_at, turn in enumerate(self.turns):
            if turn.deletion is not deletion:
                others.append(turn)
            if looked_at % _LOOKED_AT_ONCE == 0:
                yield
        return others

    def remove(self, turns: Sequence[KeptTurn], others: list[KeptTurn] | None) -> None:
        """Take a turn and all that follow it out; the others stay. The siblings of the first turn move up."""
        if others is not None:
            self.turns = others
        else:
            for turn in turns:
                del self.turns[bisect_left(self.turns, turn.ordinal, key=attrgetter("ordinal"))]
        siblings = self.children[turns[0].record.parent]
        index = turns[0].place - 1
        del siblings[index]
        for sibling in siblings[index:]:
            sibling.place -= 1


class KeptTurns(dict[str, KeptTurn]):
    """All turns by their ids, with deleted ones that are not yet taken out of the lists."""

    def find(self, turn_id: str) -> KeptTurn | None:
        """The turn with this id; None if there is none, or if it is deleted."""
        turn = self.get(turn_id)
        return None if turn is None or turn.is_deleted() else turn
