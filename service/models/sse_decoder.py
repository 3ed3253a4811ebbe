"""An incremental decoder of server-sent events, for chat completions: bytes in, the events' data out. Pure.

It follows the standard, with these differences that servers made necessary:

- A named event other than ``message`` and ``error`` is left out: pings, progress of tools, other additions of gateways.
- The data of an event named ``error``, and of the field ``error`` that llama.cpp sent until 2025, comes out as an
  object with a member ``error``.
- A line that is an error without a field's name is an event: some gateways pass on a backend's error like this.
- Events with a single line end between them are separate events if they are JSON objects or ``[DONE]``.
- An event that is too large is left out and counted, without being collected.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

import msgspec

_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_CONTINUED = b"{[,:"
"""The characters after which an object may follow in JSON."""
_ERROR_BYTES_MAX = 64 * 1024
"""Bound on the data of an error event that is decoded."""


class EventTooLargeError(ValueError):
    """A line, or the data of one event, is too large even to be skipped."""


class SseDecoder:
    """Decodes one stream, which may arrive in pieces of any size.

    It works on bytes: a character that is split between two chunks is no special case, because line
    ends are ASCII and never part of another UTF-8 sequence.

    Args:
        event_bytes_max: Bound on an unfinished line and on the data of an unfinished event, each, which are held
            between two calls. A larger event is left out.
        skipped_bytes_max: Bound on an event that is left out. A larger event ends the decoding.
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_data",
        "_data_bytes",
        "_event_bytes_max",
        "_is_dropped",
        "_is_plain",
        "_line",
        "_line_bytes_dropped",
        "_name",
        "_next_name",
        "_parted_by_lines",
        "_skipped_bytes_max",
        "foreign_events",
        "large_events",
    )

    def __init__(self, *, event_bytes_max: int, skipped_bytes_max: int = 0) -> None:
        self._event_bytes_max = event_bytes_max
        self._skipped_bytes_max = max(skipped_bytes_max, event_bytes_max)
        self._line = bytearray()
        self._line_bytes_dropped = 0  # the bytes of a line that is too large and has not ended
        self._data: list[bytes] = []
        self._data_bytes = 0  # the size of the event's lines, dropped lines included
        self._name = b""
        # A name that follows data: the event's name, or the next event's if a single line end separates the two.
        self._next_name = b""
        self._is_dropped = False
        self._is_plain = True
        """Whether the event has no name of its own and was not dropped, so that the short way can take it."""
        self._parted_by_lines = False
        self._at_start = True
        self._after_cr = False
        self.foreign_events = 0
        """How many named events were left out."""
        self.large_events = 0
        """How many events were left out because of their size."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take a chunk. Returns the data of each event that the chunk completes, in order.

        Data after the last blank line waits for the next chunk. At the end of a stream the standard drops this data;
        a caller that can see whether the data is whole may use it (:meth:`rest`).

        Raises:
            EventTooLargeError: An event is too large to be skipped. The decoder must not be used again.
        """
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_lf_only(chunk)
        elif chunk.find(b"\n") == len(chunk) - 2 and self._is_one_event(chunk):
            return [chunk[6:-2]]
        lines = chunk.split(b"\n")
        if self._line_bytes_dropped:
            if len(lines) == 1:
                self._drop_line(len(chunk))
                return []
            self._drop_line(len(lines[0]))
            self._line_bytes_dropped = 0
            lines[0] = b":"  # a comment in place of the dropped line's end
        elif self._line:
            self._line += lines[0]
            if len(lines) == 1:
                return self._bound_line([])
            lines[0] = bytes(self._line)
            self._line.clear()
        self._line += lines.pop()
        if self._at_start and lines:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BOM)
        return self._bound_line(self._take(lines))

    def _is_one_event(self, chunk: bytes) -> bool:
        """Whether a chunk is one event of one line, as most chunks are. The long way gives the same result."""
        return (
            chunk.startswith(b"data: ")
            and chunk.endswith(b"\n\n")
            and not (self._line or self._data_bytes or self._at_start or self._line_bytes_dropped)
            and self._is_plain
            and len(chunk) <= self._event_bytes_max
        )

    def rest(self) -> list[bytes]:
        """The data of the unfinished events, which may be cut off. :meth:`feed` must not be called afterwards."""
        return self._take([b":" if self._line_bytes_dropped else bytes(self._line), b""])

    def _with_lf_only(self, chunk: bytes) -> bytes:
        """Make each CRLF and CR an LF.

        A CR at the end of a chunk ends its line at once, because waiting for a LF that may not come would
        delay a token. If the LF comes, it is dropped.
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
                if not self._is_plain:
                    self._end_event(events)
                elif data:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data.clear()
                    self._data_bytes = 0
            elif line.startswith(b"data:"):
                value = line[6:] if line.startswith(b"data: ") else line[5:]
                if self._data_bytes:
                    self._part_from(value, events)
                size = self._data_bytes = self._data_bytes + len(line)
                if size > self._event_bytes_max:
                    self._drop_event()
                else:
                    data.append(value)
                    if self._parted_by_lines and value.rstrip().endswith((b"}", _DONE)):
                        self._end_event(events)
            else:
                self._take_other(line, events)
        return events

    def _take_other(self, line: bytes, events: list[bytes]) -> None:
        """Take a line that is neither blank nor has data in it."""
        if line.startswith(b"event:"):
            name = line[6:].strip()
            if self._data_bytes:
                self._next_name = name or b"message"
            else:
                self._name = name
            self._is_plain = False
        elif line == b"data":
            self._data_bytes += len(line)
            if self._data_bytes > self._event_bytes_max:
                self._drop_event()
            else:
                self._data.append(b"")
        elif line.startswith((b"error:", b'{"error"')):
            if len(line) > self._event_bytes_max:
                self.large_events += 1
            else:
                events.append(line if line.startswith(b"{") else b'{"error":%s}' % line[6:])

    def _part_from(self, value: bytes, events: list[bytes]) -> None:
        """End the event before this line of data, if the line cannot continue the event's JSON."""
        if not value.startswith(b"{") and value.strip() != _DONE:
            return
        before = self._data[-1].rstrip() if self._data else b""
        if self._is_dropped or (before and before[-1] not in _CONTINUED):
            following = self._next_name or self._name
            self._next_name = b""
            self._end_event(events)
            self._parted_by_lines = True
            if following:
                self._name = following
                self._is_plain = False

    def _end_event(self, events: list[bytes]) -> None:
        """Dispatch the event, or count it if it is left out."""
        name = self._next_name or self._name
        if name not in (b"", b"message", b"error"):
            self.foreign_events += bool(self._data_bytes)
        elif self._is_dropped:
            self.large_events += 1
        elif self._data:
            data = b"\n".join(self._data)
            events.append(_as_error(data) if name == b"error" else data)
        self._data.clear()
        self._data_bytes = 0
        self._name = self._next_name = b""
        self._is_dropped = False
        self._is_plain = True

    def _bound_line(self, events: list[bytes]) -> list[bytes]:
        """Drop the unfinished line, and the event to which it belongs, if the line is too large."""
        size = len(self._line)
        if size <= self._event_bytes_max:
            return events
        start = bytes(self._line[:16])
        self._line.clear()
        if self._at_start:
            self._at_start = False
            start = start.removeprefix(_BOM)
        if start.startswith(b"data:"):
            if self._data_bytes:
                self._part_from(start[5:].removeprefix(b" "), events)
            self._drop_event()
        elif start.startswith(b"event:"):
            self._take_other(start, events)
        elif start.startswith(b"error:"):
            self.large_events += 1
        self._drop_line(size)
        return events

    def _drop_line(self, size: int) -> None:
        self._line_bytes_dropped += size
        if self._is_dropped:
            self._data_bytes += size
        self._check(max(self._line_bytes_dropped, self._data_bytes))

    def _drop_event(self) -> None:
        self._data.clear()
        self._is_dropped = True
        self._is_plain = False
        self._check(self._data_bytes)

    def _check(self, size: int) -> None:
        if size > self._skipped_bytes_max:
            raise EventTooLargeError(f"an event is larger than {self._skipped_bytes_max} bytes")


def _as_error(data: bytes) -> bytes:
    """The data of an event named "error", as an object with the member ``error``."""
    try:
        decoded = msgspec.json.decode(data) if len(data) < _ERROR_BYTES_MAX else None
    except (ValueError, RecursionError):
        return msgspec.json.encode({"error": data[:_ERROR_BYTES_MAX].decode(errors="replace")})
    if isinstance(decoded, list) and decoded:
        decoded = decoded[0]
    if isinstance(decoded, dict) and decoded.get("error"):
        return data
    return b'{"error":%b}' % data if decoded else b'{"error":true}'
