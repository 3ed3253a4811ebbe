"""The idempotency keys in memory, and what was made with them."""

from collections import deque
from dataclasses import dataclass
from datetime import datetime

from service.storage import rules
from service.storage.memory.kept import KeptSession
from service.storage.records import IdempotencyKey

Name = tuple[str, str]
"""The caller and its key."""


@dataclass
class KeptKey:
    """An idempotency key, and what was made with it; the session is None once it is removed."""

    fingerprint: bytes
    session: KeptSession | None
    session_id: str
    turn_id: str | None
    first_turn_id: str | None


class Keys:
    """All keys. The session of a key has its name, too: :attr:`KeptSession.keys`."""

    def __init__(self) -> None:
        self._keys: dict[Name, KeptKey] = {}
        self._gone: deque[Name] = deque()
        """Keys of things that are gone, before :meth:`forget` has noted when."""
        self._gone_at: deque[tuple[datetime, Name]] = deque()

    def find(self, key: IdempotencyKey | None) -> KeptKey | None:
        return None if key is None else self._keys.get((key.caller, key.key))

    def keep(
        self,
        key: IdempotencyKey | None,
        session: KeptSession,
        turn_id: str | None = None,
        first_turn_id: str | None = None,
    ) -> None:
        if key is not None:
            name = (key.caller, key.key)
            self._keys[name] = KeptKey(key.fingerprint, session, session.record.id, turn_id, first_turn_id)
            session.keys[turn_id] = name

    def note_turn_gone(self, session: KeptSession, turn_id: str) -> None:
        if turn_id in session.keys:
            self._gone.append(session.keys.pop(turn_id))

    def note_session_gone(self, session: KeptSession) -> None:
        for name in session.keys.values():
            self._keys[name].session = None
        self._gone.extend(session.keys.values())
        session.keys.clear()  # deleted turns are taken out later

    def forget(self, now: datetime, *, limit: int) -> bool:
        """Forget keys whose time is over, at most so many. Returns whether there may be more."""
        noted = [self._gone.popleft() for _ in range(min(limit, len(self._gone)))]
        self._gone_at.extend((now, name) for name in noted)
        until, forgotten = rules.forgotten_until(now), 0
        while forgotten < limit and self._gone_at and self._gone_at[0][0] <= until:
            del self._keys[self._gone_at.popleft()[1]]
            forgotten += 1
        return limit in (len(noted), forgotten)
