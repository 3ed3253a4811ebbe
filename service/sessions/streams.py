"""Open streams: event streams of turns, and answers that are passed on from another process."""

from collections.abc import Awaitable, Callable
from math import inf

import trio

from service.errors import StreamLimitError


class Streams:
    """Counts streams and bounds them to ``streams_max``.

    Attributes:
        held: Whether a stream is to write no more than its end, which comes in a moment.
    """

    def __init__(self, *, streams_max: int) -> None:
        self.open = 0
        self.ended = 0
        self.aborted = 0
        self.held = False
        self._streams_max = streams_max

    def open_stream(self) -> "StreamSlot":
        """Take a place; the slot is to be closed.

        Raises:
            StreamLimitError: All places are taken.
        """
        if self.open >= self._streams_max:
            raise StreamLimitError(f"{self._streams_max} streams are open already (streams_max); try again later.")
        self.open += 1
        return StreamSlot(self)

    def note_closed(self, *, ended: bool) -> None:
        """For :class:`StreamSlot`."""
        self.open -= 1
        if ended:
            self.ended += 1
        else:
            self.aborted += 1


class StreamSlot:
    """The place of one stream. Closing twice is closing once."""

    def __init__(self, streams: Streams) -> None:
        self._streams: Streams | None = streams

    @property
    def is_held(self) -> bool:
        """Whether it is to write no more than its end, which comes in a moment."""
        return self._streams is not None and self._streams.held

    def close(self, *, ended: bool) -> None:
        """Give the place back; ``ended`` says whether the stream was sent to its end."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.note_closed(ended=ended)

    def give_back(self) -> None:
        """Give the place back of a stream that never began: it counts as neither ended nor aborted."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.open -= 1


class Forward:
    """An answer on its way from the process that owns a session through this one. Closing twice is closing once.

    Args:
        note_closed: Called when it is closed.
        start: Starts a task that closes it; False where the service is closed already.
    """

    def __init__(
        self,
        note_closed: Callable[["Forward"], None],
        start: Callable[["Forward", Callable[[], Awaitable[None]]], bool],
    ) -> None:
        self._note_closed = note_closed
        self._start = start
        self._deadline = inf
        self._scope = trio.CancelScope()

    def waiting(self) -> trio.CancelScope:
        """The scope of one wait for the owner; left early once the answer is cut off."""
        self._scope = trio.CancelScope(deadline=self._deadline)
        return self._scope

    def end_by(self, deadline: float) -> None:
        """This process is leaving: whatever is not there by then does not come through it."""
        self._deadline = self._scope.deadline = deadline

    @property
    def was_cut(self) -> bool:
        """Whether it was over because this process leaves."""
        return self._deadline <= trio.current_time()

    def take_leave(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Close it after a last call, which the shutdown waits for: the request that it belonged to is over.

        False, and nothing happens, where the service is closed already.
        """
        return self._start(self, call)

    def close(self) -> None:
        self._note_closed(self)
