"""Which suspended turns no client has come back for, so that this process goes on with them by itself."""

from collections.abc import Sequence
from math import inf

from service.storage.records import SuspendedSession

SUSPENDED_S = 1.0
"""How long a suspended turn waits for its client, which names the process that goes on with it."""
GAP_MAX_S = 10.0
"""The most time between two looks that counts: in a longer one this process was frozen, and served no client."""


class Sweep:
    """For how long this process has seen sessions with suspended turns. All methods are synchronous.

    Attributes:
        next_due_at: When the next session has waited for long enough; None if none waits.
    """

    def __init__(self) -> None:
        self.next_due_at: float | None = None
        self._seen_at: dict[str, float] = {}
        self._set_aside: dict[str, float] = {}
        self._looked_at = -inf

    def __repr__(self) -> str:
        return f"<Sweep: {len(self._seen_at)} sessions seen, {len(self._set_aside)} set aside>"

    @property
    def known(self) -> int:
        """How many sessions the last look has found, or were set aside."""
        return len(self._seen_at.keys() | self._set_aside.keys())

    def due(self, found: Sequence[SuspendedSession], *, now: float, returns_within_s: float) -> dict[str, bool]:
        """The sessions that have waited for long enough, in their order.

        Each with whether it has no client: all its turns are cancelled without clients, and have waited for that long.

        Args:
            found: The suspended sessions now.
            now: On Trio's clock.
            returns_within_s: How long turns wait that are cancelled without clients.
        """
        uncounted_s = max(now - self._looked_at - GAP_MAX_S, 0)
        self._looked_at = now
        self._seen_at = {it.id: self._seen_at[it.id] + uncounted_s if it.id in self._seen_at else now for it in found}
        self._set_aside = {it: until for it, until in self._set_aside.items() if until > now}
        due_at = {it.id: self._seen_at[it.id] + (returns_within_s if it.awaits_client else SUSPENDED_S) for it in found}
        self.next_due_at = min((at for at in due_at.values() if at > now), default=None)
        return {it.id: it.awaits_client for it in found if due_at[it.id] <= now and not self.is_set_aside(it.id)}

    def set_aside(self, session_id: str, *, until: float) -> None:
        """Leave a session alone for a while, because an adoption of its turns has failed."""
        self._set_aside[session_id] = until

    def is_set_aside(self, session_id: str) -> bool:
        return session_id in self._set_aside
