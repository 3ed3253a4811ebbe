"""Replays: the events of ended turns, read from the store page by page."""

from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

import trio

from service.errors import EventsDeletedError, EventsLostError, SessionNotFoundError
from service.sessions.events.event_log import InlineReader
from service.sessions.events.events import Event, TerminalEvent
from service.sessions.events.kept_events import Place, events_of, place_after, terminal_event_of, without_contents
from service.storage.pieces import Run, last_seq
from service.storage.records import EventsPage, TurnRecord
from service.storage.store import Store
from service.storage.store_deadline import answered_within

_EVENTS_MAX = 512
"""The most events that one read makes of a page."""

ReadTurn = Callable[[bool], Awaitable[TurnRecord]]
"""Reads a turn's record, with or without the texts of a long output."""


class _Page:
    """A page of a turn's events, shared by the replays that read it."""

    def __init__(self, page: EventsPage) -> None:
        self.page = page
        self.begin = Place(page.after)
        self.end = last_seq(page.runs, page.after)


class Replays:
    """Opens replays. Replays that read the same page at the same time share it; without readers no page is kept.

    A page of a turn that has not ended is never shared: a later read of this page has more, once the turn has ended.

    Args:
        store_timeout_s: How long a replay waits for its next page.
    """

    def __init__(self, store: Store, *, store_timeout_s: float) -> None:
        self._store = store
        self._store_timeout_s = store_timeout_s
        self._pages: WeakValueDictionary[tuple[str, str, int], _Page] = WeakValueDictionary()
        self._reading: WeakValueDictionary[tuple[str, str, int], trio.Lock] = WeakValueDictionary()

    async def open(self, session_id: str, turn_id: str, *, after: int, read_turn: ReadTurn) -> "Replay":
        """A replay of an ended turn.

        Args:
            after: The seq after which the caller reads.
            read_turn: Reads the turn's record, or raises an error that refuses the caller. Called after the events were
                read, so that a session that is deleted meanwhile is not found.

        Raises:
            EventsDeletedError: An item of the turn's reply was deleted.
            EventsLostError: Not all events after ``after`` are in the store, or the turn has not ended.
        """
        page = await self._page(session_id, turn_id, after)
        turn = await read_turn(False)
        if turn.events_deleted:
            raise EventsDeletedError(turn_id)
        if not page.page.ended:  # the turn may have ended between the two reads
            page = await self._page(session_id, turn_id, after)
        replay = replay_kept(self, turn, page)
        if replay is None or replay.unbroken_seq < after < replay.last_seq:
            kept = page.page.kept
            turn = await read_turn(True)
            raise EventsLostError(turn_id, after=kept, state=turn.state, text=turn.text)
        return replay

    async def next_page(self, session_id: str, turn_id: str, after: int) -> _Page:
        """The page that begins after a seq, for :class:`Replay`. Raises: StoreError."""
        with answered_within(self._store_timeout_s):
            return await self._page(session_id, turn_id, after)

    async def _page(self, session_id: str, turn_id: str, after: int) -> _Page:
        key = session_id, turn_id, after
        async with self._reading.setdefault(key, trio.Lock()):
            page = self._pages.get(key)
            if page is None:
                page = _Page(await self._store.read_events(session_id, turn_id, after=after))
                if page.page.ended:
                    self._pages[key] = page
            return page


def replay_kept(replays: Replays, turn: TurnRecord, page: _Page) -> "Replay | None":
    """The replay of an ended turn, of which a page was read; None if events are missing.

    A crash loses the events after the last checkpoint; the text in the store ends at the same checkpoint. The terminal
    event follows with a seq that is higher than the seq of every lost event.
    """
    terminal = terminal_event_of(turn, text_length=page.page.text_length) if page.page.ended else None
    kept = page.page.kept
    if terminal is None or not (kept == turn.last_seq - 1 or (turn.reason == "crash" and kept < turn.last_seq)):
        return None
    return Replay(replays, turn, page, terminal=terminal)


class Replay:
    """The events of an ended turn for one reader, who holds one page of them. Meets :class:`~event_log.Events`.

    Attributes:
        beside: See :class:`~event_log.EventLog`.
    """

    closed = has_ended = True
    is_moved = False

    def __init__(self, replays: Replays, turn: TurnRecord, page: _Page, *, terminal: TerminalEvent) -> None:
        self.beside: dict[object, object] = {}
        self._replays = replays
        self._turn = without_contents(turn)
        self._terminal = terminal
        self._kept = page.page.kept
        self._page = page
        # Where the last read began and ended. A reader may take only the first of the events that it read.
        self._begin = self._end = page.begin

    def __repr__(self) -> str:
        return f"<Replay of {self._turn.id}: seq {self.last_seq}>"

    @property
    def turn_id(self) -> str:
        return self._turn.id

    @property
    def last_seq(self) -> int:
        """The seq of the terminal event."""
        return self._terminal.seq

    @property
    def unbroken_seq(self) -> int:
        """The seq up to which no event is missing; below ``last_seq`` if events before the terminal event are lost."""
        return self._kept if self._kept < self.last_seq - 1 else self.last_seq

    def read_after(self, seq: int) -> Sequence[Event]:
        """The events after ``seq`` of the loaded page, which begins there; or the terminal event."""
        if seq >= self._kept:
            return [self._terminal] if seq < self.last_seq else []
        if not self._has_after(seq):
            return []
        page = self._page.page
        self._begin = self._place_after(seq)
        events, self._end = events_of(self._turn, page, self._begin, events_max=_EVENTS_MAX)
        return events

    def alike_after(self, seq: int) -> int:
        """How many of the next events of the loaded page are pieces of one item. See :class:`~event_log.Events`."""
        if seq >= self._kept or not self._has_after(seq):
            return 0
        self._begin = self._place_after(seq)
        run = self._page.page.runs[self._begin.run]
        return Run(run.item, run.lengths[self._begin.offset :]).events if run.item >= 0 else 0

    def _place_after(self, seq: int) -> Place:
        place = next(place for place in (self._end, self._begin, self._page.begin) if place.seq <= seq)
        return place_after(self._page.page, seq, place=place)

    def _has_after(self, seq: int) -> bool:
        return self._page.page.after <= seq < self._page.end

    async def load_after(self, seq: int) -> None:
        """Read the page that begins after ``seq``, unless it is the loaded one.

        Raises:
            StoreError
            EventsDeletedError: An item of the turn's reply was deleted meanwhile.
            SessionNotFoundError: The session or the turn was removed meanwhile.
        """
        if seq >= self._kept or self._has_after(seq):
            return
        self._page = await self._replays.next_page(self._turn.session_id, self._turn.id, seq)
        self._begin = self._end = self._page.begin
        if self._page.page.events_deleted:
            raise EventsDeletedError(self._turn.id)
        if not self._page.page.runs:
            raise SessionNotFoundError(self._turn.session_id)

    async def wait_beyond(self, seq: int) -> None:
        """Nothing: all events are there."""

    async def wait_to_read(self, reader: InlineReader | None = None) -> None:
        """Nothing: all events are there."""

    def wake(self, task: trio.lowlevel.Task) -> None:
        """Nothing: no reader waits."""

    async def wait_closed(self) -> None:
        """Nothing: the turn has ended."""
