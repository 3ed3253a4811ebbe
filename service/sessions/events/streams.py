"""Open event streams: how many there are, their bound, and the heartbeats of those that have nothing to say."""

from collections import OrderedDict
from collections.abc import Callable
from math import inf

import trio

from service.errors import StreamLimitError
from service.freezes import LATE_S, READING_S
from service.sessions.events.event_log import EventLog


class Streams:
    """Counts streams and bounds them to ``streams_max``.

    Args:
        heartbeat_interval_s: Silence after which a stream says that it is there.

    Attributes:
        held: Whether streams are to write no more than their ends, which come in a moment.
    """

    def __init__(self, *, streams_max: int, heartbeat_interval_s: float) -> None:
        self.open = 0
        self.ended = 0
        self.aborted = 0
        self.held = False
        self._on_held: Callable[[], None] = lambda: None
        self._streams_max = streams_max
        self._heartbeat_interval_s = heartbeat_interval_s
        self._waiting: OrderedDict[StreamSlot, tuple[float, EventLog]] = OrderedDict()
        """Those that wait for an event: since when they are silent, the longest first, and for what."""

    def __repr__(self) -> str:
        return f"<Streams: {self.open} of {self._streams_max} open, {self.ended} ended, {self.aborted} aborted>"

    def open_stream(self) -> "StreamSlot":
        """Take a place; the slot is to be closed.

        Raises:
            StreamLimitError: All places are taken.
        """
        if self.open >= self._streams_max:
            raise StreamLimitError(f"{self._streams_max} streams are open already (streams_max); try again later.")
        self.open += 1
        return StreamSlot(self)

    async def run_heartbeats(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The heartbeat loop, a child of the service: wake each stream that has been silent for the interval.

        One task for all of them: a deadline of its own for each wait of each stream is a tenth of what a token costs.
        """
        task_status.started()
        while True:
            now = trio.current_time()
            since, log = next(iter(self._waiting.values()), (now, None))
            due_at = since + self._heartbeat_interval_s
            if log is None or due_at > now:
                await trio.sleep_until(due_at)
                if trio.current_time() - due_at >= LATE_S:
                    await trio.sleep(READING_S)  # what lies in the sockets comes first: it may end the silence
            else:
                self._waiting.popitem(last=False)
                log.wake_readers()

    def hold(self, then: Callable[[], None]) -> None:
        """Have all streams write no more than their ends. From any thread.

        Args:
            then: To be called, perhaps more than once, by streams that come to know it: within the event loop, and
                before what is due there already.
        """
        self._on_held = then
        self.held = True

    def note_ends_only(self) -> None:
        """For :class:`StreamSlot`."""
        self._on_held()

    def note_waiting(self, slot: "StreamSlot", log: EventLog) -> float:
        """For :class:`StreamSlot`."""
        now = trio.current_time()
        self._waiting[slot] = now, log
        self._waiting.move_to_end(slot)
        return now + self._heartbeat_interval_s

    def note_closed(self, slot: "StreamSlot", *, ended: bool) -> None:
        """For :class:`StreamSlot`."""
        self._waiting.pop(slot, None)
        self.open -= 1
        if ended:
            self.ended += 1
        else:
            self.aborted += 1


class StreamSlot:
    """The place of one stream. Closing twice is closing once."""

    def __init__(self, streams: Streams) -> None:
        self._streams: Streams | None = streams

    def __repr__(self) -> str:
        return f"<StreamSlot: {'closed' if self._streams is None else 'open'}>"

    def is_ends_only(self) -> bool:
        """Whether it is to write no more than its end, which comes in a moment, if it is not there now.

        If so, that is told first (:meth:`Streams.hold`).
        """
        if self._streams is None or not self._streams.held:
            return False
        self._streams.note_ends_only()
        return True

    async def wait_beyond(self, log: EventLog, cursor: int) -> None:
        """Return once the log has an event after ``cursor`` or is closed, or it is time for a heartbeat."""
        if log.last_seq <= cursor:
            until = inf if self._streams is None else self._streams.note_waiting(self, log)
            await log.wait_beyond(cursor, until=until)

    def close(self, *, ended: bool = False) -> None:
        """Give the place back; ``ended`` says whether the stream was sent to its end."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.note_closed(self, ended=ended)

    def give_back(self) -> None:
        """Give the place back of a stream that never began: it counts as neither ended nor aborted."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.open -= 1
