"""A chunked body on HTTP/1, of whose chunks those that have come are taken in one go.

h11 makes an event of each chunk, for which hypercorn then sends a message: 30 microseconds, also for a chunk of one
byte, so that a body of some hundred kilobytes takes seconds. What is a chunk is h11's to say, and it still reads all
that are not whole yet. Proven by ``tests/hosting/hypercorn/test_chunked_request.py``.
"""

import h11
from h11._readers import ChunkedReader, chunk_header_re
from h11._receivebuffer import ReceiveBuffer

_END = b"\r\n"


class JoiningChunkedReader(ChunkedReader):
    """h11's reader of chunks; it gives the data of several as one event."""

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
    """The data of the chunks that are whole, up to the last one, which has none."""
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
