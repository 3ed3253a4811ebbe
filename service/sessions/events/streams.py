"""Open event streams: their number, its bound, and the heartbeats of silent streams."""

from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Protocol

import trio

from service.errors import StreamLimitError
from service.sessions.events.event_log import Events, InlineReader
from service.stop_state import Phase, StopState
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

_LOOKS = 16
"""Looks at all streams within one interval, at the most, where no stream is silent."""
_CLOSED_MAX = 64
"""So many closed streams may wait for the time of their heartbeat, beside as many as are open."""


class Progress(Protocol):
    """How far an event stream has come, for those who look.

    Attributes:
        seq: The last event that was written.
        turn_id: Whose events they are; empty if that is not known.
    """

    @property
    def seq(self) -> int: ...

    @property
    def turn_id(self) -> str: ...


class Streams:
    """Counts streams and bounds them to ``streams_max``.

    Args:
        heartbeat_interval_s: Silence after which a stream sends a heartbeat.
        stop: Says when streams write only their ends.
        metrics: Counts the streams.

    Attributes:
        heartbeat_interval_s: As given.
        slots: The open ones.
    """

    def __init__(
        self, *, streams_max: int, heartbeat_interval_s: float, stop: StopState, metrics: Metrics | None = None
    ) -> None:
        self.slots: set[StreamSlot] = set()
        self.ended = 0
        self.aborted = 0
        self.stop = stop
        self._streams_max = streams_max
        self._metrics = metrics or Metrics()
        self.heartbeat_interval_s = heartbeat_interval_s
        self._due: list[tuple[float, int, StreamSlot]] = []
        """A heap of the streams that wait for an event: the time of the next heartbeat, or an earlier time.

        A write of a stream only moves the stream's ``silent_since``; the heap hears of it when its time has come.
        """
        self._numbers = count()

    def __repr__(self) -> str:
        return f"<Streams: {self.open} of {self._streams_max} open, {self.ended} ended, {self.aborted} aborted>"

    @property
    def open(self) -> int:
        """How many streams are open."""
        return len(self.slots)

    def open_stream(self, face: str = "native") -> "StreamSlot":
        """Take a slot, which the caller must close.

        Args:
            face: The face of the API, as the metrics call it.

        Raises:
            StreamLimitError: ``streams_max`` streams are open.
        """
        if self.open >= self._streams_max:
            raise StreamLimitError(f"{self._streams_max} streams are open already (streams_max); try again later.")
        slot = StreamSlot(self, face)
        self.slots.add(slot)
        self._metrics.add(families.STREAMS_OPEN, face)
        return slot

    def wake_silent(self) -> float:
        """Wake each stream that has been silent for the interval, so that it sends a heartbeat.

        Returns the time at which the next stream will have been silent for so long, at the earliest.
        """
        now = trio.current_time()
        soon = now + self.heartbeat_interval_s / _LOOKS
        while self._due and self._due[0][0] <= soon:
            noted_at, _, slot = self._due[0]
            due_at = slot.silent_since + self.heartbeat_interval_s
            if slot.is_closed:
                heappop(self._due)
            elif due_at > noted_at:
                heapreplace(self._due, (due_at, next(self._numbers), slot))
            elif due_at <= now:
                heappop(self._due)
                slot.wake()
            else:
                break
        return self._due[0][0] if self._due else now + self.heartbeat_interval_s

    def note_waiting(self, slot: "StreamSlot") -> None:
        """For :class:`StreamSlot`: it waits, and is not noted already."""
        heappush(self._due, (slot.silent_since + self.heartbeat_interval_s, next(self._numbers), slot))

    def note_closed(self, slot: "StreamSlot", *, ended: bool | None) -> None:
        """For :class:`StreamSlot`; ``ended`` is None if the stream never began."""
        self.slots.discard(slot)
        self._metrics.add(families.STREAMS_OPEN, slot.face, by=-1)
        if ended is not None:
            self._metrics.add(families.STREAMS, slot.face, "ended" if ended else "aborted")
        if ended:
            self.ended += 1
        elif ended is not None:
            self.aborted += 1
            if self.stop.phase >= Phase.INTERRUPTING:  # before, a client may leave as at any time
                self._metrics.add(families.STREAMS_CUT)
        if len(self._due) > 2 * self.open + _CLOSED_MAX:
            self._due = [due for due in self._due if not due[2].is_closed]
            heapify(self._due)


class StreamSlot:
    """The slot of one open stream. Closing it twice has no effect.

    Attributes:
        face: The face of the API, as the metrics call it.
        silent_since: When the stream began to wait, or wrote last while it waited.
        opened_at: When the slot was taken, on Trio's clock.
        task: The task that has taken it, and sends the stream; None once the slot is closed.
        progress: How far the stream has come; None before it has begun, and if another process sends it.
    """

    def __init__(self, streams: Streams, face: str) -> None:
        self._streams: Streams | None = streams
        self.face = face
        self.silent_since = 0.0
        self.opened_at = trio.current_time()
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        self.progress: Progress | None = None
        self._is_noted = False
        self._is_due = False
        self._waits_in: tuple[Events, trio.lowlevel.Task] | None = None

    def __repr__(self) -> str:
        return f"<StreamSlot: {'closed' if self.is_closed else 'open'}>"

    @property
    def is_closed(self) -> bool:
        return self._streams is None

    def is_ends_only(self) -> bool:
        """Whether the stream may write only its end. The answer may begin the stop (:meth:`StopState.ends_only`)."""
        return self._streams is not None and self._streams.stop.ends_only()

    def may_write(self) -> bool:
        """Whether the stream may write more than its end; unlike :meth:`is_ends_only` the answer begins nothing."""
        return self._streams is not None and not self._streams.stop.is_ends_only

    async def wait_beyond(self, log: Events, seq: int, *, reader: InlineReader | None = None) -> None:
        """Wait for an event after ``seq``, for the close of the log, or for the time of a heartbeat.

        Args:
            reader: Takes events inline meanwhile. The wait ends with the first event that it does not take.
        """
        self.silent_since = trio.current_time()
        self._is_due = False
        while log.last_seq <= seq and not log.closed and not self._is_due:
            if self._streams is not None and not self._is_noted:
                self._is_noted = True
                self._streams.note_waiting(self)
            self._waits_in = log, trio.lowlevel.current_task()
            try:
                await log.wait_to_read(reader)
            finally:
                self._waits_in = None

    def wake(self) -> None:
        """End the wait, if the stream waits: it is time for a heartbeat."""
        self._is_noted = False
        self._is_due = True
        if self._waits_in is not None:
            log, task = self._waits_in
            log.wake(task)

    def close(self, *, ended: bool = False) -> None:
        """Give the slot back; ``ended`` says whether the stream was sent to its end."""
        self._close(ended=ended)

    def release_unused(self) -> None:
        """Release the slot of a stream that never began; the stream counts as neither ended nor aborted."""
        self._close(ended=None)

    def _close(self, *, ended: bool | None) -> None:
        streams, self._streams = self._streams, None
        self.task = self.progress = None  # circles
        if streams is not None:
            streams.note_closed(self, ended=ended)
