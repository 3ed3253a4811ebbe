"""A turn's event log: one writer appends, any number of readers read, each at its own pace."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import Protocol

import msgspec
import trio

from service.sessions.events.events import (
    Event,
    Piece,
    TerminalEvent,
    TurnArguments,
    TurnCall,
    TurnDelta,
    TurnReasoning,
    TurnResumed,
)
from service.sessions.events.kept_events import PieceKind, runs_of
from service.steps import Steps, at_once
from service.storage.pieces import Run, join, pack, skip, texts_by_item, unpack

_TERMINAL_RESERVE_BYTES = 2048
"""Room kept for the terminal event, which must always fit: it may quote 300 characters of up to four bytes."""
_PIECE_BYTES = 4
"""What a piece takes beside its text, in a long log."""
_ITEM_CHANGE_BYTES = 4
"""What a piece takes in addition, if it is of another item than the piece before."""
_OTHER_EVENT_BYTES = 512
_CHUNK_EVENTS_MAX = 64
_CHUNK_BYTES_MAX = 16 * 1024
"""The newest events are kept as they came. Beyond so many, or so much text, they become a chunk."""
INLINE_READERS_MAX = 32
"""So many readers take an event in the step that appends it, which takes each some ten microseconds."""
WOKEN_MAX = 128
"""So many tasks of readers are woken in one step. To wake a task takes up to five microseconds."""
_WOKEN_BY_WOKEN = 4
"""So many of the others each of these tasks wakes when it runs."""


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    """Successive events in a compact form: their runs, and the texts of the pieces in the order of their arrival.

    Nearly all chunks have pieces of one item only. Many of these are read together, without work for each of them.

    Attributes:
        item: The item of all the pieces, if there is nothing else: then ``runs`` is the lengths of its one run.
            Otherwise it is -1, and ``runs`` is packed runs.
    """

    after: int
    item: int
    runs: bytes
    text: bytes

    def unpacked(self) -> list[Run]:
        return unpack(self.runs) if self.item < 0 else [Run(self.item, self.runs)]

    def texts(self) -> Iterable[tuple[int, str]]:
        """The texts with their items, in the order of their arrival."""
        text = self.text.decode()
        return [(self.item, text)] if self.item >= 0 else texts_by_item(unpack(self.runs), text)


class InlineReader(Protocol):
    """A reader that may take events in the step of the task that appends them, while the reader's own task waits."""

    def take_appended(self, now: float) -> bool:
        """Take the new events, without a wait. Returns whether the reader has them all and still waits.

        ``now`` is the time on Trio's clock: one look at it serves for all that is done with a token.
        Otherwise its task is woken: it takes what is left. The same after an error, which the task then meets itself.
        """
        ...


class Events(Protocol):
    """The events of a turn for its readers: the log of a live turn, or a replay of an ended turn."""

    beside: dict[object, object]

    @property
    def turn_id(self) -> str:
        """Whose events they are; empty if that is not known."""
        ...

    @property
    def last_seq(self) -> int: ...

    @property
    def is_moved(self) -> bool: ...

    @property
    def unbroken_seq(self) -> int: ...

    @property
    def closed(self) -> bool: ...

    @property
    def has_ended(self) -> bool:
        """Whether the last event is the terminal one: a log whose turn goes on elsewhere is closed without it."""
        ...

    def read_after(self, seq: int) -> Sequence[Event]:
        """Some of the events after ``seq``, in order; a replay has them once :meth:`load_after` has loaded them."""
        ...

    def alike_after(self, seq: int) -> int:
        """How many of the next events after ``seq`` are pieces of one item, if this is known without reading them."""
        ...

    async def load_after(self, seq: int) -> None:
        """Have the events after ``seq`` ready, if there are some. Raises: StoreError, EventsLostError."""
        ...

    async def wait_beyond(self, seq: int) -> None: ...

    async def wait_to_read(self, reader: InlineReader | None = None) -> None: ...

    def wake(self, task: trio.lowlevel.Task) -> None: ...

    async def wait_closed(self) -> None: ...


class EventLog:
    """An append-only log of events with seqs from 1, without gaps but those before ``turn.resumed``.

    Only the turn's own task appends and closes, and what takes the model's events for it. Reading is synchronous, so a
    reader holds only a number (the last seq that the reader has seen, 0 for none) while it waits or is stalled.

    The log is the only place in which the texts of a running turn are: :meth:`texts` tells the output so far.

    Args:
        bytes_max: Bound on the memory of the events: their texts in UTF-8, and some bytes for each event.
            :meth:`append` refuses an event beyond it; the terminal event has room of its own.
        turn_id: Whose events they are.

    Attributes:
        last_seq: The seq of the newest event, 0 if there is none.
        is_moved: Whether the log is closed because its turn goes on elsewhere: it has no terminal event then.
        beside: What the readers of one kind keep together, such as the frames that they have sent last.
    """

    def __init__(self, *, bytes_max: int, turn_id: str = "") -> None:
        self.turn_id = turn_id
        self.last_seq = 0
        self.is_moved = False
        self.beside: dict[object, object] = {}
        self._chunks: list[_Chunk] = []
        self._newest: list[Event] = []
        self._newest_after = 0
        self._newest_bytes = 0
        self._others: dict[int, Event] = {}  # the events in chunks that are no pieces, by seq
        self._kinds: dict[int, PieceKind] = {}  # of the pieces in chunks, by item
        self._bytes = 0
        self._gaps: list[tuple[int, int]] = []
        """Where seqs have no events: the last seq before each gap, and the last one in it."""
        self._bytes_max = bytes_max - _TERMINAL_RESERVE_BYTES
        self._last_item = -1
        self._closed = False
        self._waiting: dict[trio.lowlevel.Task, InlineReader | None] = {}
        self._to_wake: dict[trio.lowlevel.Task, None] = {}
        """Of the waiting tasks those that are to be woken, but not in this step. Other woken tasks have yet to run."""
        self._told_seq = 0
        self._waiting_for_end = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<EventLog: {'closed' if self._closed else 'open'}, seq {self.last_seq}>"

    @property
    def unbroken_seq(self) -> int:
        """The seq up to which no event is missing: no event of a log is."""
        return self.last_seq

    @property
    def closed(self) -> bool:
        """Whether no event follows: the log has its terminal event, or its turn goes on elsewhere."""
        return self._closed

    @property
    def has_ended(self) -> bool:
        """See :class:`Events`."""
        return self._closed and not self.is_moved

    @property
    def size(self) -> int:
        """The size that counts against the bound: the texts, and some bytes for each event."""
        return self._bytes

    def size_after(self, seq: int) -> int:
        """The approximate size of the events after a seq, in bytes of their texts and lengths. Reads no text."""
        chunks = self._chunks_after(self._past_gap(seq))
        return sum(len(it.text) + len(it.runs) for it in chunks) + self._newest_bytes + len(self._newest)

    def append(self, event: Event, *, tells: bool = True) -> bool:
        """Append an event whose ``seq`` is ``last_seq + 1``, and tell the readers; ``turn.resumed`` may skip seqs.

        Returns False, and appends nothing, if the log would be larger than ``bytes_max``.

        Args:
            tells: Whether to tell the readers; otherwise the caller calls :meth:`tell_readers` in the same step.
        """
        if isinstance(event, Piece):
            text_bytes = len(event.text) if event.text.isascii() else len(event.text.encode())
            size = _PIECE_BYTES + text_bytes + (_ITEM_CHANGE_BYTES if event.item != self._last_item else 0)
        else:
            text_bytes, size = 0, _size_of_other(event)
        if self._bytes + size > self._bytes_max:
            return False
        if isinstance(event, Piece):
            self._last_item = event.item
        self._bytes += size
        # Never with the newest event, which the readers are about to read.
        if len(self._newest) >= _CHUNK_EVENTS_MAX or self._newest_bytes >= _CHUNK_BYTES_MAX:
            self._end_chunk()
        if event.seq > self.last_seq + 1:
            self._skip_before(event)
        self._newest_bytes += text_bytes
        self._append(event)
        if tells:
            self.tell_readers()
        return True

    def close(self, terminal: TerminalEvent) -> None:
        """Append the terminal event. Always succeeds; the log then never changes again."""
        self._append(terminal)
        self._end()

    def leave(self) -> None:
        """Close the log without a terminal event, because its turn goes on elsewhere."""
        self.is_moved = True
        self._end()

    def restore(
        self,
        runs: Iterable[Run],
        texts: Sequence[str],
        *,
        event_of: Callable[[Run, int], Event],
        kind_of: Callable[[int], PieceKind],
    ) -> Steps[None]:
        """Put the events that the log of another process had into this one, which is empty and nobody reads.

        Args:
            texts: The texts of the items, which the pieces make.
            event_of: The event that is no piece, of its run and the seq that follows.
            kind_of: The kind of the pieces of an item.
        """
        assert not self.last_seq, "the log has events of its own"
        ends: dict[int, int] = {}
        for run in runs:
            if run.item < 0:
                self._restore_other(event_of(run, self.last_seq + 1))
                continue
            kind, text, end = kind_of(run.item), texts[run.item], ends.get(run.item, 0)
            for few in _parts(run):
                start, end = end, end + few.length
                self._restore_pieces(few, text[start:end].encode(), kind)
                yield
            ends[run.item] = end
        self._newest_after = self._told_seq = self.last_seq

    def _restore_other(self, event: Event) -> None:
        if event.seq > self.last_seq + 1:
            self._skip_before(event)
        self._bytes += _size_of_other(event)
        self._chunks.append(_Chunk(self.last_seq, -1, pack(list(runs_of([event]))), b""))
        self._others[event.seq] = event
        self.last_seq = event.seq

    def _restore_pieces(self, run: Run, text: bytes, kind: PieceKind) -> None:
        events = run.events
        self._bytes += len(text) + _PIECE_BYTES * events + (_ITEM_CHANGE_BYTES if run.item != self._last_item else 0)
        self._chunks.append(_Chunk(self.last_seq, run.item, run.lengths, text))
        self._kinds[run.item] = kind
        self._last_item = run.item
        self.last_seq += events

    def _skip_before(self, event: Event) -> None:
        """Let the seqs before an event have no events."""
        assert isinstance(event, TurnResumed), "an event has the wrong seq"
        if self._newest:
            self._end_chunk()
        self._gaps.append((self.last_seq, event.seq - 1))
        self._newest_after = self.last_seq = event.seq - 1

    def _end(self) -> None:
        self._closed = True
        self._wake(list(self._waiting))
        self._waiting_for_end.unpark_all()

    def _append(self, event: Event) -> None:
        assert not self._closed, "a closed log was written to"
        assert event.seq == self.last_seq + 1, "an event has the wrong seq"
        self._newest.append(event)
        self.last_seq += 1

    def tell_readers(self, now: float | None = None) -> int:
        """Tell the waiting readers of the events that were appended since the last time. Returns how many these are.

        The readers that began to wait last may take the events inline. The tasks of the others are woken; these readers
        will then be the last ones that began to wait, so each has its turn.

        Args:
            now: The time, if the caller has just read it.
        """
        new = self.last_seq - self._told_seq
        if not new:
            return 0
        self._told_seq = self.last_seq
        if not self._waiting:
            return new
        if now is None:
            now = trio.current_time()
        if len(self._waiting) == 1 and not self._to_wake:
            for task, reader in self._waiting.items():
                if reader is None or not _takes_appended(reader, now):
                    self._wake([task])
                return new
        tasks = list(self._waiting)
        woken = tasks[:-INLINE_READERS_MAX]
        for task in tasks[-INLINE_READERS_MAX:]:
            reader = self._waiting[task]
            if reader is None or not _takes_appended(reader, now):
                woken.append(task)
            else:
                self._to_wake.pop(task, None)
        self._wake(woken)
        return new

    def _wake(self, tasks: Iterable[trio.lowlevel.Task]) -> None:
        self._to_wake.update(dict.fromkeys(tasks))
        self._wake_some(WOKEN_MAX)

    def _wake_some(self, count: int) -> None:
        for task in list(islice(self._to_wake, count)):
            self._wake_now(task)

    def _wake_now(self, task: trio.lowlevel.Task) -> None:
        del self._to_wake[task]
        del self._waiting[task]
        trio.lowlevel.reschedule(task)

    def _end_chunk(self) -> None:
        """Make a chunk of the newest events."""
        for event in self._newest:
            if isinstance(event, TurnDelta | TurnReasoning | TurnArguments):
                self._kinds[event.item] = type(event)
            else:
                self._others[event.seq] = event
        text = "".join([event.text for event in self._newest if isinstance(event, Piece)]).encode()
        runs = list(runs_of(self._newest))
        if len(runs) == 1 and runs[0].item >= 0:
            self._chunks.append(_Chunk(self._newest_after, runs[0].item, runs[0].lengths, text))
        else:
            self._chunks.append(_Chunk(self._newest_after, -1, pack(runs), text))
        self._newest_after += len(self._newest)
        self._newest = []
        self._newest_bytes = 0

    async def wait_beyond(self, seq: int) -> None:
        """Wait for an event after ``seq``, or for the close of the log."""
        while self.last_seq <= seq and not self._closed:
            await self.wait_to_read()

    async def wait_to_read(self, reader: InlineReader | None = None) -> None:
        """Wait for a reason to read: an event that ``reader`` does not take inline, the close, or :meth:`wake`."""
        task = trio.lowlevel.current_task()
        self._waiting[task] = reader

        def leave(_: object) -> trio.lowlevel.Abort:
            del self._waiting[task]
            self._to_wake.pop(task, None)
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            await trio.lowlevel.wait_task_rescheduled(leave)
        finally:
            if self._to_wake:
                self._wake_some(_WOKEN_BY_WOKEN)

    def wake(self, task: trio.lowlevel.Task) -> None:
        """Wake a task that is in :meth:`wait_to_read`, in this step. No effect if it was woken already."""
        if task in self._waiting:
            self._to_wake[task] = None
            self._wake_now(task)

    async def load_after(self, seq: int) -> None:
        """Nothing: a log has all of its events. See :class:`Events`."""

    async def wait_closed(self) -> None:
        """Wait until the log has its terminal event."""
        while not self._closed:
            await self._waiting_for_end.park()

    def read_after(self, seq: int) -> Sequence[Event]:
        """Some of the events after ``seq``, in order: at least one if there is one, and never many."""
        if self._gaps:
            seq = self._past_gap(seq)
        if seq >= self._newest_after:
            return self._newest[seq - self._newest_after :]
        chunk = self._chunks[self._chunk_with(seq)]
        return self._events_of(chunk)[seq - chunk.after :]

    def alike_after(self, seq: int) -> int:
        """How many of the next events after ``seq`` are pieces of one item. See :class:`Events`."""
        if self._gaps:
            seq = self._past_gap(seq)
        if seq >= self._newest_after:
            return 0
        index = self._chunk_with(seq)
        if self._chunks[index].item < 0:
            return 0
        end = self._chunks[index + 1].after if index + 1 < len(self._chunks) else self._newest_after
        for gap_after, gap_end in self._gaps:
            end = gap_after if end == gap_end else end
        return end - seq

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """All events after a seq."""
        while events := self.read_after(after):
            yield from events
            after = events[-1].seq

    def runs(self, *, after: int = 0) -> list[Run]:
        """All events after a seq in the form in which a store keeps them, without the terminal event."""
        after = self._past_gap(after)
        chunks = self._chunks_after(after)
        runs: list[Run] = []
        for item, alike in groupby(chunks, key=attrgetter("item")):
            if item >= 0:
                runs.append(Run(item, b"".join([chunk.runs for chunk in alike])))
            else:
                runs += [run for chunk in alike for run in unpack(chunk.runs)]
        runs += runs_of(self._newest)
        return join(skip(runs, after, begins=chunks[0].after if chunks else self._newest_after))

    def text(self, *, after: int = 0) -> str:
        """The texts of the pieces after a seq, in the order of their arrival."""
        after = self._past_gap(after)
        chunks = self._chunks_after(after)
        texts: list[str] = []
        if chunks and chunks[0].after < after:
            rest = self._events_of(chunks[0])[after - chunks[0].after :]
            texts += [text for _, text in _texts_of(rest)]
            chunks = chunks[1:]
        texts += [chunk.text.decode() for chunk in chunks]
        texts += [text for _, text in _texts_of(self._newest[max(after - self._newest_after, 0) :])]
        return "".join(texts)

    def texts(self) -> dict[int, str]:
        """The texts of the pieces, joined by item, in the order of the items' first pieces."""
        return at_once(self.joined_texts())

    def joined_texts(self) -> Steps[dict[int, str]]:
        """Do :meth:`texts` in steps, in which nothing is appended."""
        pieces: dict[int, list[str]] = {}
        for chunk in self._chunks:
            yield
            for item, piece in chunk.texts():
                pieces.setdefault(item, []).append(piece)
        for item, piece in _texts_of(self._newest):
            pieces.setdefault(item, []).append(piece)
        texts: dict[int, str] = {}
        for item, parts in pieces.items():
            yield
            texts[item] = "".join(parts)
        return texts

    def text_pieces(self, item: int) -> Iterator[str]:
        """The text of an item to which no piece is added any more, in short pieces."""
        for chunk in self._chunks:  # also those that are added meanwhile
            if chunk.item in (item, -1):
                yield "".join([text for of, text in chunk.texts() if of == item])
        yield "".join([text for of, text in _texts_of(self._newest) if of == item])

    def _past_gap(self, seq: int) -> int:
        """The last seq of a gap, if the event after ``seq`` would be in it; else ``seq``."""
        return next((end for after, end in self._gaps if after <= seq < end), seq)

    def _chunks_after(self, seq: int) -> Sequence[_Chunk]:
        """The chunks with events after ``seq``."""
        return self._chunks[self._chunk_with(seq) :] if seq < self._newest_after else ()

    def _chunk_with(self, seq: int) -> int:
        """The index of the chunk with the event that follows ``seq``."""
        return bisect_right(self._chunks, seq, key=attrgetter("after")) - 1

    def _events_of(self, chunk: _Chunk) -> list[Event]:
        events: list[Event] = []
        seq = chunk.after
        text, start = chunk.text.decode(), 0
        for run in chunk.unpacked():
            if run.item < 0:
                seq += 1
                events.append(self._others[seq])
                continue
            kind = self._kinds[run.item]
            for length in run.pieces():
                seq += 1
                events.append(kind(seq=seq, item=run.item, text=text[start : start + length]))
                start += length
        return events


def _size_of_other(event: Event) -> int:
    """What an event that is no piece takes."""
    if isinstance(event, TurnCall):
        return _OTHER_EVENT_BYTES + len(event.call_id.encode()) + len(event.name.encode())
    return _OTHER_EVENT_BYTES


def _parts(run: Run) -> Iterator[Run]:
    """The pieces of a run, as many at a time as a chunk has."""
    start = 0
    while start < len(run.lengths):
        end = run.end_of(_CHUNK_EVENTS_MAX, start)
        yield Run(run.item, run.lengths[start:end])
        start = end


def _takes_appended(reader: InlineReader, now: float) -> bool:
    try:
        return reader.take_appended(now)
    except Exception:  # noqa: BLE001  it is the reader's own: the task of the reader meets it again, and ends that reader alone
        return False


def _texts_of(events: Iterable[Event]) -> Iterator[tuple[int, str]]:
    """The texts of pieces with their items; successive pieces of one item together."""
    item, texts = -1, list[str]()
    for event in events:
        if not isinstance(event, (TurnDelta, Piece)):  # the first of them is exact, which is fast
            continue
        if event.item != item:
            if texts:
                yield item, "".join(texts)
            item, texts = event.item, []
        texts.append(event.text)
    if texts:
        yield item, "".join(texts)
