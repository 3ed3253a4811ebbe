"""A face that says which frame it makes, with its number."""

from typing import NamedTuple, cast

from service.api.http.face_frames import Step, TurnSource
from service.sessions.events.events import Event, Piece, TerminalEvent


class CountingState(NamedTuple):
    """Each item's first piece opens the item in a frame of its own; the end has a frame for each item."""

    opened: frozenset[int] = frozenset()
    begun: bool = False

    def piece(self, event: Piece, number: int) -> bytes | None:
        return b"data: %d +\n\n" % number if event.item in self.opened else None

    def step(self, event: Event, number: int, gap: int) -> Step:
        kinds = [] if self.begun else ["begin"]
        before_gap = len(kinds)
        state = self._replace(begun=True)
        match event:
            case Piece(item=item):
                kinds += [f"open {item}", "+"]
                state = state._replace(opened=self.opened | {item})
            case event if isinstance(event, TerminalEvent):
                kinds += [*(f"close {item}" for item in sorted(self.opened)), "end"]
            case _:
                kinds.append("other")
        numbers = [number + at - (gap if at < before_gap else 0) for at in range(len(kinds))]
        frames = [b"data: %d %b\n\n" % (at, kind.encode()) for at, kind in zip(numbers, kinds, strict=True)]
        return Step(frames, state, before_gap)


class CountingFace:
    key = "counting"
    turn = cast("TurnSource", None)  # it repeats no texts
    end = b"data: over\n\n"

    def begin(self) -> CountingState:
        return CountingState()
