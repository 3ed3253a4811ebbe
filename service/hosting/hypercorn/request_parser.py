"""h11's parser of requests: skips empty lines before a request line, and refuses bad bytes before it reads fields.

Some clients send a line end after a body, which the body's length does not count. h11 reads this line end as the next
request's line, and refuses it with 400.

Source: https://www.rfc-editor.org/rfc/rfc9112#section-2.2-6; h11 0.16, ``_readers.maybe_read_from_IDLE_client``.
Proven by ``tests/hosting/hypercorn/test_request_parser.py``.

A head with a byte that h11 refuses is refused before h11's patterns see it, because these may take seconds for it:
:mod:`service.http1_lines`.
"""

import h11

from service.http1_lines import END_OF_FIELDS, REFUSED

EMPTY_LINES_MAX = 8
"""Empty lines that are skipped before one request. h11 refuses a client that sends more."""


def has_refused_bytes(received: bytes | bytearray) -> bool:
    """Whether the lines of a head or of trailers have bytes that h11 refuses. False until their empty line is here."""
    refused = REFUSED.search(received)
    if refused is None:
        return False
    end = END_OF_FIELDS.search(received)
    return end is not None and refused.start() < end.start()


class RequestParser(h11.Connection):
    """The server's side of one connection on HTTP/1."""

    def __init__(self, *, head_bytes_max: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=head_bytes_max)
        self._empty_lines = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        # Also once a request is complete: if only a line end followed, h11 would stop reading until the response is
        # complete, and the server would not notice a client that leaves meanwhile.
        if self.their_state in (h11.IDLE, h11.DONE) and self._begins_with_half_a_line_end():
            return h11.NEED_DATA
        if self.their_state is h11.IDLE and has_refused_bytes(received := self.trailing_data[0]):
            self._receive_buffer.maybe_extract_at_most(len(received))
            self._receive_buffer += b"\0\r\n\r\n"  # h11 refuses this in the same way, and at once
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._empty_lines = 0
        return event

    def _begins_with_half_a_line_end(self) -> bool:
        """Skip the empty lines that have arrived. Returns whether the rest may be half of another one."""
        received, closed = self.trailing_data
        while self._empty_lines < EMPTY_LINES_MAX and received.startswith((b"\r\n", b"\n")):
            line_end, _, received = received.partition(b"\n")
            self._receive_buffer.maybe_extract_at_most(len(line_end) + 1)
            self._empty_lines += 1
        return received == b"\r" and not closed and self._empty_lines < EMPTY_LINES_MAX
