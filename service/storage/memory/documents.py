"""The search index of the memory store: for each owner and each term, the numbers of the documents that have it.

A search of an owner reads the lists and prepares the documents of this owner only: neither its time nor its pages
depend on other owners. A search among all owners merges what it finds for each of them.

A document counts from its publication to its removal. What it has in the lists of its terms is put there before, or by
the next search (:meth:`MemoryDocuments.note`), and taken out afterwards, in steps: a long reply has many thousands of
terms. Few documents wait for the next search (:meth:`MemoryDocuments.prepare_oldest`), so that it is whole.
"""

import heapq
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import partial

import msgspec

from service.ids import owner_of
from service.steps import Steps, WorkTime
from service.storage.terms import document_terms

_TERMS_AT_ONCE = 256
"""The terms that one step puts into their lists, which takes a fraction of a millisecond."""

NOTED_MAX = 512
"""The documents that wait for the next search, apart from those of turns that are open at the same time."""
NOTED_COST_MAX = 1024 * 1024
"""The same for what they cost: a search prepares so many characters of ASCII in about half of its time."""
_WIDE_COST = 8
"""What a character costs if its text has other characters than ASCII."""
_PREPARED_AT_ONCE = 2
"""The documents that :meth:`MemoryDocuments.prepare_oldest` prepares at most: more than come in the same time."""

Texts = Callable[[], Iterable[str]]


def _never() -> bool:
    return False


class Document(msgspec.Struct, frozen=True):
    """A title (``turn_id`` is None) or an ended turn."""

    session_id: str
    turn_id: str | None
    texts: Texts
    is_deleted: Callable[[], bool] = _never
    """Whether its turn is deleted: the document is found no more, and removed later."""


class _Noted(msgspec.Struct):
    """A document whose terms are not in their lists; perhaps those of the texts in ``begun`` are, or some of them."""

    texts: Texts
    cost: int
    begun: tuple[str, ...] = ()
    is_claimed: bool = False
    """Whether a task prepares it as one of the oldest."""


class MemoryDocuments:
    """The documents, and the lists of their terms.

    Attributes:
        newest: The highest number that was ever published, if any.
    """

    def __init__(self) -> None:
        self._documents: dict[int, Document] = {}
        self._numbers: dict[str, dict[str, array[int]]] = {}  # for each owner; in ascending order
        self._owners: dict[int, str] = {}
        """The owner of each document, until it is taken out of all lists."""
        self._removed: deque[tuple[int, Texts]] = deque()
        self._dropped: dict[int, Set[str]] = {}
        self._noted: dict[str, dict[int, _Noted]] = {}
        self._waiting: dict[int, _Noted] = {}  # the noted documents of all owners, the oldest first
        self._waiting_cost = 0
        self._last = 0
        self.newest: int | None = None

    def reserve(self) -> int:
        """A number for the next document."""
        self._last += 1
        return self._last

    def prepare(
        self, number: int, owner: str, texts: Texts, is_wanted: Callable[[], bool] = lambda: True
    ) -> Steps[None]:
        """Put a document's number into the lists of its terms. Afterwards it is published, or else removed.

        Ends early once the document is not wanted any more as these texts.
        """
        self._owners[number] = owner
        while number in self._dropped:
            yield from self._take_dropped(number)
        terms = yield from document_terms(texts())
        for done, term in enumerate(terms):
            if done % _TERMS_AT_ONCE == 1:
                yield
            if done % _TERMS_AT_ONCE <= 1 and not is_wanted():  # after each yield
                return
            numbers = self._numbers.setdefault(owner, {}).setdefault(term, array("q"))
            if not numbers or numbers[-1] < number:
                numbers.append(number)
            elif not _has(numbers, number):
                numbers.insert(bisect_left(numbers, number), number)

    def publish(self, number: int, document: Document) -> None:
        self._documents[number] = document
        self.newest = number if self.newest is None else max(self.newest, number)

    def note(self, number: int, document: Document) -> None:
        """Publish a document whose terms the next search prepares: a turn that ends does not wait for them."""
        owner = self._owners[number] = owner_of(document.session_id)
        noted = _Noted(document.texts, cost=sum(map(_cost, document.texts())))
        self._noted.setdefault(owner, {})[number] = self._waiting[number] = noted
        self._waiting_cost += noted.cost
        self.publish(number, document)

    def is_noted(self, number: int) -> bool:
        """Whether the next search prepares a document. Until then its terms are not to be prepared otherwise."""
        return number in self._waiting

    def is_whole(self, owner: str | None = None) -> bool:
        """Whether the terms of all documents are in the lists: of those of an owner, or of all owners."""
        return not (self._noted if owner is None else owner in self._noted)

    def prepare_noted(self, owner: str | None = None, *, within_s: float) -> Steps[None]:
        """Prepare the documents of an owner, or of all, that were noted, as far as this takes ``within_s``.

        The newest documents of an owner come first.

        A document is not found before all of its terms are in the lists. Other tasks may do the same meanwhile, and a
        task may never come to the end.
        """
        work = WorkTime()
        return work.of(self._prepare_noted(owner, lambda: work.elapsed_s >= within_s))

    def _prepare_noted(self, owner: str | None, is_over: Callable[[], bool]) -> Steps[None]:
        while not self.is_whole(owner) and not is_over():
            noted_owner = next(iter(self._noted)) if owner is None else owner
            number, noted = next(reversed(self._noted[noted_owner].items()))
            yield from self._prepare_one(number, noted)
            yield

    def prepare_oldest(self) -> Steps[None]:
        """Prepare some of the oldest documents if more wait than the next search can prepare.

        Called about as often as a document is noted, so the number of those that wait has a bound.
        """
        for _ in range(_PREPARED_AT_ONCE):
            if len(self._waiting) <= NOTED_MAX and self._waiting_cost <= NOTED_COST_MAX:
                return
            oldest = next((it for it in self._waiting.items() if not it[1].is_claimed), None)
            if oldest is None:
                return
            number, noted = oldest
            noted.is_claimed = True
            try:
                yield from self._prepare_one(number, noted)
            finally:
                noted.is_claimed = False
            yield

    def _prepare_one(self, number: int, noted: _Noted) -> Steps[None]:
        owner, said = self._owners[number], tuple(noted.texts())
        if noted.begun and noted.begun != said:
            yield from self._take_out(number, partial(tuple, noted.begun))
            if self._waiting.get(number) is not noted:
                return
        noted.begun = said
        is_wanted = partial(self._is_noted_as, number, noted, said)
        yield from self.prepare(number, owner, partial(tuple, said), is_wanted)
        if is_wanted() and tuple(noted.texts()) == said:
            self._note_no_more(number)

    def _is_noted_as(self, number: int, noted: _Noted, said: tuple[str, ...]) -> bool:
        """Whether a document is still to be prepared as these texts: another task may have gone on with other ones."""
        return self._waiting.get(number) is noted and noted.begun == said

    def _note_no_more(self, number: int) -> _Noted | None:
        noted = self._waiting.pop(number, None)
        if noted is not None:
            self._waiting_cost -= noted.cost
            owner = self._owners[number]
            del self._noted[owner][number]
            if not self._noted[owner]:
                del self._noted[owner]
        return noted

    def remove(self, number: int, texts: Texts) -> None:
        """Let a document be found no more. :meth:`reclaim` does the rest."""
        noted = self._note_no_more(number)
        if noted is not None:
            texts = partial(tuple, noted.begun)
        self._documents.pop(number, None)
        self._removed.append((number, texts))

    def drop(self, number: int, terms: Set[str]) -> None:
        """Let a document be found no more by these terms: it has lost the texts with them. :meth:`reclaim` does the
        rest."""
        self._dropped[number] = self._dropped.get(number, frozenset()) | terms

    def reclaim(self) -> Steps[None]:
        """Take removed documents, and terms that documents have lost, out of the lists."""
        while self._removed:
            number, texts = entry = self._removed[0]
            yield from self._take_out(number, texts)
            while number in self._dropped:
                yield from self._take_dropped(number)
            if self._removed and self._removed[0] is entry:  # no other task has done the same meanwhile
                self._removed.popleft()
                self._owners.pop(number, None)
        while self._dropped:
            yield from self._take_dropped(next(iter(self._dropped)))

    def _take_dropped(self, number: int) -> Steps[None]:
        dropped = self._dropped.get(number, frozenset())
        for done, term in enumerate(dropped):
            self._take_from(term, number)
            if done % _TERMS_AT_ONCE == 0:
                yield
                if self._dropped.get(number) is not dropped:  # another task has done it, or there are more of them
                    return
        self._dropped.pop(number, None)

    def _take_out(self, number: int, texts: Texts) -> Steps[None]:
        terms = yield from document_terms(texts())
        for done, term in enumerate(terms):
            self._take_from(term, number)
            if done % _TERMS_AT_ONCE == 0:
                yield

    def _take_from(self, term: str, number: int) -> None:
        owner = self._owners.get(number, "")
        lists = self._numbers.get(owner, {})
        numbers = lists.get(term)
        if numbers is not None and _has(numbers, number):
            del numbers[bisect_left(numbers, number)]
            if not numbers:
                del lists[term]
            if not lists:
                del self._numbers[owner]

    # Queries

    def matching(
        self, terms: Sequence[str], *, below: int, owner: str | None = None
    ) -> Iterator[tuple[int, Document | None]]:
        """The numbers below this one that are in the list of a rare term, the highest first; each with its document, if
        the document has all terms. Documents may come and go between two of them.

        Args:
            owner: Only the documents of this owner.
        """
        owners = list(self._numbers) if owner is None else [owner]
        for number in heapq.merge(*(self._rare(it, terms, below) for it in owners), reverse=True):
            yield number, self._documents.get(number) if self.has_terms(number, terms) else None

    def _rare(self, owner: str, terms: Sequence[str], below: int) -> Iterator[int]:
        """The numbers in the list of a rare term of an owner."""
        while (rare := self._rarest(owner, terms)) is not None and (index := bisect_left(rare, below)) > 0:
            below = rare[index - 1]
            yield below

    def has_terms(self, number: int, terms: Sequence[str]) -> bool:
        """Whether a published document has all these terms."""
        document = self._documents.get(number)
        if document is None or document.is_deleted() or self.is_noted(number):
            return False
        dropped, lists = self._dropped.get(number, ()), self._numbers.get(self._owners[number], {})
        return all(
            (numbers := lists.get(term)) is not None and _has(numbers, number) and term not in dropped for term in terms
        )

    def _rarest(self, owner: str, terms: Sequence[str]) -> "array[int] | None":
        """The shortest list of an owner; None if a term is in none of his documents."""
        of_owner = self._numbers.get(owner, {})
        lists = [of_owner.get(term) for term in terms]
        found = [numbers for numbers in lists if numbers is not None]
        return min(found, key=len) if len(found) == len(terms) else None


def _has(numbers: "array[int]", number: int) -> bool:
    index = bisect_left(numbers, number)
    return index < len(numbers) and numbers[index] == number


def _cost(text: str) -> int:
    return len(text) if text.isascii() else _WIDE_COST * len(text)
