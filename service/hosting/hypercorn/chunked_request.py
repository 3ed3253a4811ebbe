"""A chunked body on HTTP/1: all chunks that have arrived are read as one event.

h11 makes an event of each chunk, and hypercorn sends a message for each event: 30 microseconds, also for a chunk of one
byte, so a body of some hundred kilobytes takes seconds. h11's pattern still decides what a chunk is, and h11 still
reads the chunks that are not whole yet.

A chunk's extensions and the trailers are looked at before h11's patterns: :mod:`service.http1_lines`.

Proven by ``tests/hosting/hypercorn/test_chunked_request.py``.
"""

import h11
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer

from service.hosting.hypercorn.request_parser import has_refused_bytes
from service.http1_lines import CHUNK_HEADER

_END = b"\r\n"


class JoiningChunkedReader(ChunkedReader):
    """h11's reader of chunks, which returns the data of several chunks as one event."""

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        # The line end of the last chunk, or the rest of it. So h11 never reads this and a header unchecked in one call.
        if (rest := self._bytes_to_discard) and buf._data.startswith(rest):
            buf.maybe_extract_at_most(len(rest))
            self._bytes_to_discard = b""
        if not (self._bytes_in_chunk or self._bytes_to_discard or self._reading_trailer):
            data = _take_whole_chunks(buf)
            if data:
                return h11.Data(data=data)
        self._check_lines(buf._data)
        return super().__call__(buf)

    def _check_lines(self, received: bytearray) -> None:
        """Raises: h11.LocalProtocolError: The next chunk's header, or the trailers, have bytes that h11 refuses."""
        if self._reading_trailer:
            if received.startswith(b"\n") or (not received.startswith(_END) and has_refused_bytes(received)):
                raise h11.LocalProtocolError("illegal trailer")
            return
        header = received[: max(received.find(_END), 0)]
        if b"\n" in header and not (self._bytes_in_chunk or self._bytes_to_discard):
            raise h11.LocalProtocolError("illegal chunk header")


def _take_whole_chunks(buf: ReceiveBuffer) -> bytes:
    """Take the data of the whole chunks out of ``buf``, up to the empty chunk that ends the body."""
    received = buf._data
    data: list[bytearray] = []
    position = 0
    while (header := CHUNK_HEADER.match(received, position)) is not None:
        size = int(header[1], base=16)
        start = header.end()
        end = start + size
        if not size or received[end : end + len(_END)] != _END:
            break
        data.append(received[start:end])
        position = end + len(_END)
    if position:
        buf.maybe_extract_at_most(position)
    return b"".join(data)
