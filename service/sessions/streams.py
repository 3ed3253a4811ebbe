"""Open streams: event streams of turns, and answers that are passed on from another process."""

from collections.abc import Callable
from math import inf

import trio

from service.errors import StreamLimitError


class Streams:
    """Counts streams and bounds them to ``streams_max``."""

    def __init__(self, *, streams_max: int) -> None:
        self.open = 0
        self.ended = 0
        self.aborted = 0
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
    """An answer on its way from the process that owns a session through this one. Closing twice is closing once."""

    def __init__(self, note_closed: Callable[["Forward"], None]) -> None:
        self._note_closed = note_closed
        self._deadline = inf
        self._scope = trio.CancelScope()

    def waiting(self) -> trio.CancelScope:
        """The scope of one wait for the owner; left early once the answer is cut off."""
        self._scope = trio.CancelScope(deadline=self._deadline)
        return self._scope

    def end_by(self, deadline: float) -> None:
        """This process is leaving: whatever is not there by then does not come through it."""
        self._deadline = self._scope.deadline = deadline

    def close(self) -> None:
        self._note_closed(self)
