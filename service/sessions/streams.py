"""Open event streams: how many there are, and their bound."""

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
