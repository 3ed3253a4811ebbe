"""h11's parser of requests: skips empty lines before a request line, and refuses bad bytes before it reads fields.

Some clients send a line end after a body, which the body's length does not count. h11 reads this line end as the next
request's line, and refuses it with 400.

Source: https://www.rfc-editor.org/rfc/rfc9112#section-2.2-6; h11 0.16, ``_readers.maybe_read_from_IDLE_client``.
Proven by ``tests/hosting/hypercorn/test_request_parser.py``.

A head with a byte that h11 refuses is refused before h11's patterns see it, because these may take seconds for it:
:mod:`service.http1_lines`.

A line that ends with a line feed alone is refused, too. A server may accept it, and h11 does. But a proxy that sees no
end of line there passes on one field, or one trailer, where this server would see two, or the end of the request.

Source: https://www.rfc-editor.org/rfc/rfc9112#section-2.2-3
"""

import re

import h11

from service.http1_lines import END_OF_FIELDS

_WHOLE_LINES = re.compile(rb"[^\0\v\f\r\n]*+(?:\r\n[^\0\v\f\r\n]*+)*+")
"""Lines as they are to be: up to the first byte that h11 refuses, or to a line feed alone. Takes a third of the time
of a search for these."""

EMPTY_LINES_MAX = 8
"""Empty lines that are skipped before one request. h11 refuses a client that sends more."""


def has_refused_bytes(received: bytes | bytearray) -> bool:
    """Whether the lines of a head or of trailers have bytes that are refused. False until their empty line is here."""
    lines = _WHOLE_LINES.match(received)
    if lines is None or lines.end() == len(received):
        return False
    end = END_OF_FIELDS.search(received)
    return end is not None and lines.end() < end.end()


class RequestParser(h11.Connection):
    """The parser of one request on HTTP/1.

    Attributes:
        received: What had arrived, without empty lines, when the request's head was complete.
    """

    def __init__(self, *, head_bytes_max: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=head_bytes_max)
        self.received = b""
        self._empty_lines = 0

    @property
    def has_more(self) -> bool:
        """Whether bytes have arrived that are not parsed yet."""
        return bool(self._receive_buffer)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            self.received, closed = self.trailing_data
            if self.received.startswith((b"\r", b"\n")) and self._begins_with_half_a_line_end(closed=closed):
                return h11.NEED_DATA
            if has_refused_bytes(self.received):
                self._receive_buffer.maybe_extract_at_most(len(self.received))
                self._receive_buffer += b"\0\r\n\r\n"  # h11 refuses this in the same way, and at once
        return super().next_event()

    def _begins_with_half_a_line_end(self, *, closed: bool) -> bool:
        """Skip the empty lines that have arrived. Returns whether the rest may be half of another one."""
        while self._empty_lines < EMPTY_LINES_MAX and self.received.startswith((b"\r\n", b"\n")):
            line_end, _, self.received = self.received.partition(b"\n")
            self._receive_buffer.maybe_extract_at_most(len(line_end) + 1)
            self._empty_lines += 1
        return self.received == b"\r" and not closed and self._empty_lines < EMPTY_LINES_MAX
