"""Open event streams: their number, its bound, and the heartbeats of silent streams."""

from collections import OrderedDict
from math import inf

import trio

from service.errors import StreamLimitError
from service.sessions.events.event_log import Events
from service.stop_state import StopState


class Streams:
    """Counts streams and bounds them to ``streams_max``.

    Args:
        heartbeat_interval_s: Silence after which a stream sends a heartbeat.
        stop: Says when streams write only their ends.

    Attributes:
        heartbeat_interval_s: As given.
    """

    def __init__(self, *, streams_max: int, heartbeat_interval_s: float, stop: StopState) -> None:
        self.open = 0
        self.ended = 0
        self.aborted = 0
        self.stop = stop
        self._streams_max = streams_max
        self.heartbeat_interval_s = heartbeat_interval_s
        self._waiting: OrderedDict[StreamSlot, tuple[float, Events]] = OrderedDict()
        """The streams that wait for an event, longest silence first: the start of the silence, and the log."""

    def __repr__(self) -> str:
        return f"<Streams: {self.open} of {self._streams_max} open, {self.ended} ended, {self.aborted} aborted>"

    def open_stream(self) -> "StreamSlot":
        """Take a slot, which the caller must close.

        Raises:
            StreamLimitError: ``streams_max`` streams are open.
        """
        if self.open >= self._streams_max:
            raise StreamLimitError(f"{self._streams_max} streams are open already (streams_max); try again later.")
        self.open += 1
        return StreamSlot(self)

    def wake_silent(self) -> float:
        """Wake each stream that has been silent for the interval, so that it sends a heartbeat.

        Returns the time at which the next stream will have been silent for so long, at the earliest.
        """
        now = trio.current_time()
        while self._waiting:
            since, log = next(iter(self._waiting.values()))
            due_at = since + self.heartbeat_interval_s
            if due_at > now:
                return due_at
            self._waiting.popitem(last=False)
            log.wake_readers()
        return now + self.heartbeat_interval_s

    def note_waiting(self, slot: "StreamSlot", log: Events) -> float:
        """For :class:`StreamSlot`."""
        now = trio.current_time()
        self._waiting[slot] = now, log
        self._waiting.move_to_end(slot)
        return now + self.heartbeat_interval_s

    def note_closed(self, slot: "StreamSlot", *, ended: bool) -> None:
        """For :class:`StreamSlot`."""
        self._waiting.pop(slot, None)
        self.open -= 1
        if ended:
            self.ended += 1
        else:
            self.aborted += 1


class StreamSlot:
    """The slot of one open stream. Closing it twice has no effect."""

    def __init__(self, streams: Streams) -> None:
        self._streams: Streams | None = streams

    def __repr__(self) -> str:
        return f"<StreamSlot: {'closed' if self._streams is None else 'open'}>"

    def is_ends_only(self) -> bool:
        """Whether the stream may write only its end. The answer may begin the stop (:meth:`StopState.ends_only`)."""
        return self._streams is not None and self._streams.stop.ends_only()

    async def wait_beyond(self, log: Events, seq: int) -> None:
        """Wait for an event after ``seq``, for the close of the log, or for the time of a heartbeat."""
        if log.last_seq <= seq:
            until = inf if self._streams is None else self._streams.note_waiting(self, log)
            await log.wait_beyond(seq, until=until)

    def close(self, *, ended: bool = False) -> None:
        """Give the slot back; ``ended`` says whether the stream was sent to its end."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.note_closed(self, ended=ended)

    def release_unused(self) -> None:
        """Release the slot of a stream that never began; the stream counts as neither ended nor aborted."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.open -= 1
