"""The events of a turn in the native API: the JSON of a frame's ``data:``."""

import msgspec

from service.sessions.events.events import TerminalEvent, TurnArguments, TurnCall, TurnQueued, TurnResumed, TurnStarted


class TurnDelta(msgspec.Struct, frozen=True, kw_only=True, tag="turn.delta", tag_field="type"):
    """A piece of the reply."""

    seq: int = 0
    text: str


class TurnReasoning(msgspec.Struct, frozen=True, kw_only=True, tag="turn.reasoning", tag_field="type"):
    """A piece of the model's reasoning, where the upstream sends it."""

    seq: int = 0
    text: str


Event = TurnQueued | TurnStarted | TurnDelta | TurnReasoning | TurnCall | TurnArguments | TurnResumed | TerminalEvent
