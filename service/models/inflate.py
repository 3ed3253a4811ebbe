"""Decompresses a body that a server on the way has compressed, although the request asked for plain text. Pure.

The text is returned as it arrives, in pieces of a bounded size, because a few bytes can hold millions.
"""

import zlib

ENCODINGS = ("gzip", "x-gzip", "deflate")
PIECE_BYTES_MAX = 8 * 1024
_FREE_BYTES = 16 * 1024 * 1024
"""The size of the text that is allowed for an input of any size."""
_RATIO_MAX = 200
"""How many more bytes of text one byte of input may add. Streams of tokens reach 30; the format allows 1032."""
_STEPS_MAX = 16
"""Bound on the members of a gzip body that one call reads."""
_GZIP_START = b"\x1f\x8b"
_GZIP, _ZLIB, _RAW = zlib.MAX_WBITS + 16, zlib.MAX_WBITS, -zlib.MAX_WBITS


class InflateError(ValueError):
    """The body cannot be decompressed, or its text is too large; the message says which."""


class Inflater:
    """Decompresses one body, which may arrive in pieces of any size.

    "gzip" may have several members. "deflate" is zlib's format, or the raw format that some servers send. The beginning
    of the body counts more than the name: a body that is called "gzip" and is not compressed is read as it is.

    Args:
        encoding: One of :data:`ENCODINGS`.
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._input = b""
        self._member: zlib._Decompress | None = None
        self._has_output = False  # whether some text did not fit into the last piece
        self._has_begun = False
        self._is_plain = False
        self._is_over = False
        self._bytes_in = 0
        self._bytes_out = 0

    @property
    def has_more(self) -> bool:
        """Whether there is input or output left for :meth:`take`."""
        needed = 1 if self._member is not None or self._is_plain else len(_GZIP_START)
        return self._has_output or len(self._input) >= needed

    def feed(self, chunk: bytes) -> None:
        """Take a chunk of the body. To be called once :meth:`take` has used up the chunks before."""
        if not self._is_over:
            self._input += chunk
            self._bytes_in += len(chunk)

    def take(self) -> bytes:
        """The next piece of the text; may be empty.

        Raises:
            InflateError: The body is damaged, or its text is too large. No more text can come.
        """
        for _ in range(_STEPS_MAX):
            if not self.has_more:
                break
            piece = self._read_plain() if self._is_plain else self._read()
            self._bytes_out += len(piece)
            if self._bytes_out > _FREE_BYTES + _RATIO_MAX * self._bytes_in:
                raise InflateError("its content is too large")
            if piece:
                return piece
        return b""

    def _read_plain(self) -> bytes:
        piece, self._input = self._input[:PIECE_BYTES_MAX], self._input[PIECE_BYTES_MAX:]
        return piece

    def _read(self) -> bytes:
        if self._member is None:
            self._begin()
            return b""
        try:
            piece = self._member.decompress(self._input, PIECE_BYTES_MAX)
        except zlib.error as error:
            raise InflateError("it is damaged") from error
        if self._member.eof:
            self._input = self._member.unused_data
            self._member = None
            self._has_output = False
        else:
            self._input = self._member.unconsumed_tail
            self._has_output = len(piece) == PIECE_BYTES_MAX
        return piece

    def _begin(self) -> None:
        """Choose the format by the first bytes of the input."""
        is_gzip = self._input.startswith(_GZIP_START)
        if self._has_begun and not is_gzip:  # these bytes are padding after the end
            self._is_over = True
            self._input = b""
        elif is_gzip:
            self._member = zlib.decompressobj(_GZIP)
        elif self._input[0] & 15 == 8 and int.from_bytes(self._input[:2], "big") % 31 == 0:  # RFC 1950, 2.2
            self._member = zlib.decompressobj(_ZLIB)
        elif self._encoding == "deflate":
            self._member = zlib.decompressobj(_RAW)
        else:
            self._is_plain = True
        self._has_begun = True


def inflate(body: bytes, encoding: str, *, bytes_max: int) -> bytes:
    """The text of a body that may be cut off, up to a bound; the body itself if nothing can be decompressed."""
    inflater, text = Inflater(encoding), b""
    inflater.feed(body)
    try:
        while inflater.has_more and len(text) < bytes_max:
            text += inflater.take()
    except InflateError:
        return text or body
    return text[:bytes_max]
