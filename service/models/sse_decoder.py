"""An incremental decoder of server-sent events: bytes in, the events' data out. Pure.

Of an event only its data matters here: chat completions carry everything in it, so ``event:``,
``id:`` and ``retry:`` are read over like any unknown field. The one exception is a field ``error``, which no standard
has: llama.cpp sent its errors so until 2025. It is taken for the data of an event of its own.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

_BOM = b"\xef\xbb\xbf"


class EventTooLargeError(ValueError):
    """A line, or the data of one event, is larger than the decoder may hold."""


class SseDecoder:
    """Decodes one stream, whatever way its bytes are cut.

    It works on bytes: a character that is split between two chunks needs no care, because line ends
    are ASCII and never part of another UTF-8 sequence.

    Args:
        event_bytes_max: Bound on what is held between two calls: an unfinished line and the data of an
            unfinished event, each.
    """

    __slots__ = ("_after_cr", "_at_start", "_data", "_data_bytes", "_event_bytes_max", "_line")

    def __init__(self, *, event_bytes_max: int) -> None:
        self._event_bytes_max = event_bytes_max
        self._line = bytearray()
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._at_start = True
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take a chunk; the data of each event that it completes, in order.

        What follows the last blank line waits for more. At the end of a stream it is to be forgotten, as the standard
        says, unless the data itself can tell whether it is whole (:meth:`rest`).

        Raises:
            EventTooLargeError: The decoder is not to be used again.
        """
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_lf_only(chunk)
        lines = chunk.split(b"\n")
        if self._line:
            self._line += lines[0]
            if len(lines) == 1:
                self._check(len(self._line))
                return []
            lines[0] = bytes(self._line)
            self._line.clear()
        self._line += lines.pop()
        self._check(len(self._line))
        if self._at_start and lines:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BOM)
        return self._take(lines)

    def rest(self) -> bytes:
        """The data of the event that has begun and not ended; perhaps cut off. Nothing is to be fed after it."""
        events = self._take([bytes(self._line), b""])
        return events[-1] if events else b""

    def _with_lf_only(self, chunk: bytes) -> bytes:
        """Make each CRLF and CR an LF.

        A CR at the end of a chunk ends its line at once (waiting for a LF that may not come would
        delay a token); the LF is dropped if it does come.
        """
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if chunk.endswith(b"\r"):
            self._after_cr = True
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take(self, lines: list[bytes]) -> list[bytes]:
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if not line:
                if data:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data.clear()
                    self._data_bytes = 0
            elif line.startswith(b"data:"):
                data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._data_bytes += len(line)
                self._check(self._data_bytes)
            elif line == b"data":
                data.append(b"")
                self._data_bytes += len(line)
                self._check(self._data_bytes)
            elif line.startswith(b"error:"):
                events.append(b'{"error":%s}' % line[6:])
        return events

    def _check(self, size: int) -> None:
        if size > self._event_bytes_max:
            raise EventTooLargeError(f"an event is larger than {self._event_bytes_max} bytes")
