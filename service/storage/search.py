"""A search page: which documents are on it, in the same way for every store.

A document is the title of a session, or a turn: its input and its output together. Documents are numbered in the order
in which they became what they are: a title when it was set, a turn when it ended.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from service.steps import Steps, WorkTime, at_once, in_steps
from service.storage import rules
from service.storage.page_size import fitting
from service.storage.records import Match, Page, SessionRecord, SessionStatus, TurnRecord
from service.storage.search_cursor import SearchCursors, SearchPosition
from service.storage.snippets import snippet
from service.storage.terms import document_terms, query_terms

SEARCH_S = 0.25
"""How long a search, or a listing by metadata, looks for rows: its own work, without its waits for others. After this
time its page is partial, and the next page goes on from there."""

S = TypeVar("S")
D = TypeVar("D")
D_contra = TypeVar("D_contra", contravariant=True)


def searched_texts(turn: TurnRecord) -> Iterator[str]:
    """The texts by which a turn is found: its messages, without reasoning, calls and outputs of calls."""
    return (item.text for item in (*turn.input, *turn.output) if item.type == "message")


async def terms_of(turn: TurnRecord) -> Collection[str]:
    """The terms of an ended turn, cut in steps: in the thread of a writer a long reply would hold up other writes."""
    return await in_steps(document_terms(searched_texts(turn)))


def terms_at_once(turn: TurnRecord) -> Collection[str]:
    """:func:`terms_of`, cut in the thread of the caller."""
    return at_once(document_terms(searched_texts(turn)))


class SearchQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A search, and the page of it that is asked for.

    Attributes:
        terms: All of them must be in one document. None of them: the search finds nothing.
    """

    cursors: SearchCursors
    terms: tuple[str, ...]
    limit: int
    after: SearchPosition | None
    status: SessionStatus | None
    owner: str | None
    metadata: Mapping[str, str]
    now: datetime
    bytes_max: int | None

    def takes(self, session: SessionRecord) -> bool:
        """Whether a visible session passes the filters."""
        return rules.is_listed(session, self.status, self.owner, self.metadata)


async def search_query(
    secret: bytes,
    query: str,
    *,
    limit: int,
    after: str | None,
    status: SessionStatus | None,
    owner: str | None,
    metadata: Mapping[str, str] | None,
    now: datetime,
    bytes_max: int | None,
) -> SearchQuery:
    """What a store is asked for, as :meth:`~service.storage.store.Store.search_sessions` has it.

    Args:
        secret: That of the store, for its page cursors.

    Raises:
        InvalidRequestError: ``after`` is not a page cursor of a search.
    """
    cursors = SearchCursors(secret)
    return SearchQuery(
        cursors=cursors,
        terms=await in_steps(query_terms(query)),
        limit=limit,
        after=None if after is None else cursors.decode(after),
        status=status,
        owner=owner,
        metadata=metadata or {},
        now=now,
        bytes_max=bytes_max,
    )


class Found(msgspec.Struct, Generic[S], frozen=True):
    """A document that has all terms. ``session`` is the store's own name of its session."""

    number: int
    session: S
    turn_id: str | None
    texts: Callable[[], Iterable[str]]


class Index(Protocol[S]):
    """What a store gives for one search."""

    def newest(self) -> int | None:
        """The highest number of a document; None if there is no document."""
        ...

    def is_whole(self) -> bool:
        """Whether all documents are in the index."""
        ...

    def documents(self, *, below: int) -> Iterator[tuple[int, Found[S] | None]]:
        """The documents with all terms and a number below this one, the highest first.

        Each comes with its number. None in place of a document: there is no further one from this number on. It may be
        so before a document whose texts are looked through, again and again.
        """
        ...

    def is_in(self, session: S, *, first: int, last: int) -> Steps[bool]:
        """Whether a document of this session with a number from ``first`` to ``last`` has all terms."""
        ...

    def record(self, session: S) -> SessionRecord | None:
        """The session, if it is visible and passes the filters of the search."""
        ...

    def still_has(self, document: Found[S]) -> Steps[bool]:
        """Whether a document that was found is still there, with all terms: other tasks ran meanwhile."""
        ...


class SteppedIndex(Index[S], Protocol[D_contra, S]):
    """An index whose queries run in short steps, on a connection that each step is given."""

    def begin_step(self, db: D_contra) -> None: ...

    def is_step_over(self) -> bool: ...

    def end_step(self) -> None:
        """End the queries of this step, which hold its snapshot."""
        ...


class SteppedSearch(Generic[D]):
    """Makes a page of a search, as :meth:`~service.storage.store.Store.search_sessions` says, in short steps.

    Attributes:
        page: The page, once the search is complete.
    """

    def __init__(self, index: SteppedIndex[D, S], query: SearchQuery) -> None:
        self.page: Page[Match] | None = None
        self._index: SteppedIndex[D, Any] = index
        self._steps = search_page(index, query)

    def read_some(self, db: D) -> None:
        """Do one step, in one snapshot. Not to be called again after an error."""
        self._index.begin_step(db)
        try:
            next(self._steps)
            while not self._index.is_step_over():
                next(self._steps)
        except StopIteration as done:
            page: Page[Match] | None = done.value
            assert page is not None, "nothing is asked of a search that has failed"
            self.page = page
        finally:
            self._index.end_step()


def search_page(index: Index[S], query: SearchQuery) -> Steps[Page[Match]]:
    """Make a page of a search: each session at its document with the highest number.

    A page is partial if its time was over before it was full, or if not all documents are in the index yet.
    """
    work = WorkTime()
    return work.of(_search_page(index, query, lambda: work.elapsed_s >= SEARCH_S))


def _search_page(index: Index[S], query: SearchQuery, is_over: Callable[[], bool]) -> Steps[Page[Match]]:
    partial = not index.is_whole()
    below = _end(index) if query.after is None else query.after.document
    if below is None or not query.terms:
        return Page((), None, partial=partial)
    newest = None if query.after is None else query.after.newest
    seen: set[S] = set()
    data: list[Match] = []
    cursors: list[str] = []
    for number, document in index.documents(below=below):
        if document is not None and document.session not in seen:
            seen.add(document.session)
            record = index.record(document.session)
            if record is not None and not (yield from _was_shown(index, document, query)):
                if len(data) == query.limit:
                    return _page(data, cursors, query, partial=partial, next_cursor=cursors[-1])
                newest = number if newest is None else newest
                text = yield from snippet(document.texts(), query.terms[0], is_over=is_over)
                if (yield from index.still_has(document)):
                    data.append(Match(session=record, turn_id=document.turn_id, snippet=text))
                    cursors.append(query.cursors.encode(SearchPosition(number, newest)))
                else:  # an older document of the session may be found in its place
                    seen.discard(document.session)
        yield
        if number < below and is_over():  # each page gets on, however long its first document takes
            rest = query.cursors.encode(SearchPosition(number, number if newest is None else newest))
            return _page(data, cursors, query, partial=True, next_cursor=rest)
    return _page(data, cursors, query, partial=partial, next_cursor=None)


def _end(index: Index[S]) -> int | None:
    newest = index.newest()
    return None if newest is None else newest + 1


def _was_shown(index: Index[S], document: Found[S], query: SearchQuery) -> Steps[bool]:
    """Whether an earlier page had the session of this document."""
    after = query.after
    return after is not None and (yield from index.is_in(document.session, first=after.document, last=after.newest))


def _page(
    data: list[Match], cursors: list[str], query: SearchQuery, *, partial: bool, next_cursor: str | None
) -> Page[Match]:
    fits = fitting((match.session.text_bytes + len(match.snippet) for match in data), bytes_max=query.bytes_max)
    if fits < len(data):
        return Page(tuple(data[:fits]), cursors[fits - 1], tuple(cursors[:fits]), partial=partial)
    return Page(tuple(data), next_cursor, tuple(cursors), partial=partial)
