"""The lists of the sessions in memory that are not marked as deleted: of all owners and of each, and by metadata."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sortedcontainers import SortedList

from service.storage.records import SessionRecord, SessionStatus


@dataclass
class ListedSessions:
    """Sorted lists of sessions that are not marked as deleted: each is in the first list and in one of the others."""

    by_age: SortedList[tuple[datetime, str]] = field(default_factory=SortedList)
    running_by_age: SortedList[tuple[datetime, str]] = field(default_factory=SortedList)
    idle_by_deadline: SortedList[tuple[datetime, str]] = field(default_factory=SortedList)

    def add(self, session: SessionRecord) -> None:
        self.by_age.add((session.created_at, session.id))
        self._of_status(session).add(_status_key(session))

    def remove(self, session: SessionRecord) -> None:
        self.by_age.remove((session.created_at, session.id))
        self._of_status(session).remove(_status_key(session))

    def replace(self, session: SessionRecord, changed: SessionRecord) -> None:
        self._of_status(session).remove(_status_key(session))
        self._of_status(changed).add(_status_key(changed))

    def count(self, status: SessionStatus | None, now: datetime) -> int:
        running = 0 if status == "idle" else len(self.running_by_age)
        return running if status == "running" else running + len(self.idle_by_deadline) - self.count_expired(now)

    def count_expired(self, now: datetime) -> int:
        # The highest character makes this key the last one of its moment: `expires_at <= now`.
        return self.idle_by_deadline.bisect_right((now, "\U0010ffff"))

    def _of_status(self, session: SessionRecord) -> SortedList[tuple[datetime, str]]:
        return self.running_by_age if session.open_turns else self.idle_by_deadline


def _status_key(session: SessionRecord) -> tuple[datetime, str]:
    return (session.created_at if session.open_turns else session.expires_at, session.id)


class Listings:
    """All lists. A session that is ephemeral is in none of them but those by metadata."""

    def __init__(self) -> None:
        self._all = ListedSessions()
        self._of_owner: dict[str, ListedSessions] = {}
        """Those of each owner; with an empty name those without an owner."""
        self._by_pair: dict[tuple[str | None, str, str], SortedList[tuple[datetime, str]]] = {}
        """The sessions for each pair of their metadata: those of each owner, and those of all owners under None."""

    def add(self, session: SessionRecord) -> None:
        for listed in self._lists_of(session):
            listed.add(session)
        self._add_pairs(session)

    def replace(self, session: SessionRecord, changed: SessionRecord) -> None:
        for listed in self._lists_of(changed):
            listed.replace(session, changed)
        if session.metadata != changed.metadata:
            self._remove_pairs(session)
            self._add_pairs(changed)

    def remove(self, session: SessionRecord) -> None:
        self._remove_pairs(session)
        for listed in self._lists_of(session):
            listed.remove(session)
        if not self.of(session.owner).by_age:
            self._of_owner.pop(session.owner, None)

    def of(self, owner: str | None) -> ListedSessions:
        """The lists of an owner; with None those of all owners."""
        return self._all if owner is None else self._of_owner.get(owner, ListedSessions())

    def with_metadata(self, owner: str | None, metadata: Mapping[str, str]) -> SortedList[tuple[datetime, str]]:
        """The sessions that have one of these pairs, of which fewest have it; ``metadata`` has at least one."""
        return min((self._by_pair.get((owner, *pair), SortedList()) for pair in metadata.items()), key=len)

    def expired(self, now: datetime, *, limit: int) -> Sequence[str]:
        """The ids of sessions that have expired, those that did so first."""
        first = self._all.idle_by_deadline[: min(limit, self._all.count_expired(now))]
        return [session_id for _, session_id in first]

    def _lists_of(self, session: SessionRecord) -> Iterator[ListedSessions]:
        if session.ephemeral:
            return
        yield self._all
        yield self._of_owner.setdefault(session.owner, ListedSessions())

    def _add_pairs(self, session: SessionRecord) -> None:
        for pair in _pairs_of(session):
            self._by_pair.setdefault(pair, SortedList()).add((session.created_at, session.id))

    def _remove_pairs(self, session: SessionRecord) -> None:
        for pair in _pairs_of(session):
            self._by_pair[pair].remove((session.created_at, session.id))
            if not self._by_pair[pair]:
                del self._by_pair[pair]


def _pairs_of(session: SessionRecord) -> Iterator[tuple[str | None, str, str]]:
    return ((owner, *pair) for pair in session.metadata.items() for owner in (None, session.owner))
