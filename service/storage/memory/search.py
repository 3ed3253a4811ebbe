"""The memory store as the index of one search."""

from collections.abc import Iterator, Mapping
from itertools import islice

from service.steps import Steps
from service.storage import rules
from service.storage.memory.documents import MemoryDocuments
from service.storage.memory.kept import KeptSession
from service.storage.records import SessionRecord
from service.storage.search import Found, SearchQuery

_DOCUMENTS_AT_ONCE = 256
"""Documents of a session that a search looks at in one step, which takes less than a millisecond."""


class MemoryIndex:
    """Meets :class:`service.storage.search.Index`. A session is its id."""

    def __init__(self, documents: MemoryDocuments, sessions: Mapping[str, KeptSession], query: SearchQuery) -> None:
        self._documents = documents
        self._sessions = sessions
        self._query = query

    def newest(self) -> int | None:
        return self._documents.newest

    def is_whole(self) -> bool:
        return self._documents.is_whole(self._query.owner)

    def documents(self, *, below: int) -> Iterator[tuple[int, Found[str] | None]]:
        for number, it in self._documents.matching(self._query.terms, below=below, owner=self._query.owner):
            yield number, None if it is None else Found(number, it.session_id, it.turn_id, it.texts)

    def is_in(self, session: str, *, first: int, last: int) -> Steps[bool]:
        while (kept := self._sessions.get(session)) is not None:
            numbers = list(islice(kept.documents.irange(first, last), _DOCUMENTS_AT_ONCE))
            if any(self._documents.has_terms(number, self._query.terms) for number in numbers):
                return True
            if len(numbers) < _DOCUMENTS_AT_ONCE:
                return False
            first = numbers[-1] + 1
            yield
        return False

    def record(self, session: str) -> SessionRecord | None:
        kept = self._sessions[session]
        is_visible = rules.is_visible(kept.record, self._query.now, is_deleted=kept.deleted)
        return kept.record if is_visible and self._query.takes(kept.record) else None

    def still_has(self, document: Found[str]) -> Steps[bool]:
        yield from ()
        # A number is never given again, not even to another session with the same id.
        return self._documents.has_terms(document.number, self._query.terms)
