"""A chunked body on HTTP/1: all chunks that have arrived are read as one event.

h11 makes an event of each chunk, and hypercorn sends a message for each event: 30 microseconds, also for a chunk of one
byte, so a body of some hundred kilobytes takes seconds. h11's pattern still decides what a chunk is, and h11 still
reads the chunks that are not whole yet. Proven by ``tests/hosting/hypercorn/test_chunked_request.py``.
"""

import h11
from h11._readers import ChunkedReader, chunk_header_re
from h11._receivebuffer import ReceiveBuffer

_END = b"\r\n"


class JoiningChunkedReader(ChunkedReader):
    """h11's reader of chunks, which returns the data of several chunks as one event."""

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        if self._bytes_to_discard == _END and buf._data.startswith(_END):
            buf.maybe_extract_at_most(len(_END))
            self._bytes_to_discard = b""
        if not (self._bytes_in_chunk or self._bytes_to_discard or self._reading_trailer):
            data = _take_whole_chunks(buf)
            if data:
                return h11.Data(data=data)
        return super().__call__(buf)


def _take_whole_chunks(buf: ReceiveBuffer) -> bytes:
    """Take the data of the whole chunks out of ``buf``, up to the empty chunk that ends the body."""
    received = buf._data
    data: list[bytearray] = []
    position = 0
    while (header := chunk_header_re.match(received, position)) is not None:
        size = int(header["chunk_size"], base=16)
        start = header.end()
        end = start + size
        if not size or received[end : end + len(_END)] != _END:
            break
        data.append(received[start:end])
        position = end + len(_END)
    if position:
        buf.maybe_extract_at_most(position)
    return b"".join(data)
