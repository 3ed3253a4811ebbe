"""Decoders of a response's body: chunked, with a length, or until the connection closes. Pure.

Each decoder takes the bytes as they arrive and returns the bytes of the body among them. It copies a byte at most
twice, however the bytes are split, and holds nothing but the beginning of one short line. Bytes before an error are
returned first: the error waits in ``failure``.

Source: RFC 9112, sections 6 and 7.
"""

import re
from typing import Protocol

from service.http1_lines import CHUNK_HEADER

LINE_BYTES_MAX = 16 * 1024
"""Bound on the line with a chunk's size, and on all trailers of a body together."""
_LENIENT_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,20})(?:;[^\n]*|[ \t]*\r?)\n")
"""As :data:`CHUNK_HEADER`, with a line feed alone at the end, and with carriage returns among the extensions."""
_TRAILER = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+:[^\r\n\0]*\r\n")


class BodyError(ValueError):
    """The body is not what its head announces; the message says why."""


class BodyDecoder(Protocol):
    """What takes the bytes of one body.

    Attributes:
        is_over: Whether the body has ended. Then nothing may be fed.
        is_clean: Whether all bytes so far were in their strict form, and none followed the end. If not, the peer and
            this decoder may disagree on where the next response begins.
        failure: The error after which nothing more can be decoded.
    """

    is_over: bool
    is_clean: bool
    failure: BodyError | None

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body among the data."""
        ...

    def end(self) -> None:
        """Note that the peer has ended its side of the connection: it will send nothing more."""
        ...


class ChunkedBody:
    """A body in chunks.

    Chunk extensions and trailers are read and forgotten. Lines that end with a line feed alone, carriage returns in
    extensions and trailers that are no fields are accepted, but make the body not clean.
    """

    __slots__ = (
        "_in_trailers",
        "_is_between",
        "_left",
        "_line",
        "_padding",
        "_trailer_bytes",
        "failure",
        "is_clean",
        "is_over",
    )

    def __init__(self) -> None:
        self.is_over = False
        self.is_clean = True
        self.failure: BodyError | None = None
        self._is_between = True  # whether a chunk's size comes next, from its beginning
        self._left = 0  # the bytes of the chunk that have not come yet
        self._padding = b""  # the part of the line end after the chunk's data that has not come yet
        self._line = bytearray()  # the beginning of a line
        self._in_trailers = False
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        size = len(data)
        if self._is_between:  # the short way for one whole chunk, as tokens mostly come
            match = CHUNK_HEADER.match(data, 0, LINE_BYTES_MAX)
            if match is not None and 0 < int(match[1], 16) == size - match.end() - 2 and data.endswith(b"\r\n"):
                return data[match.end() : -2]
        body = self._feed(data, size)
        self._is_between = not (self._left or self._padding or self._line or self._in_trailers or self.failure)
        return body

    def _feed(self, data: bytes, size: int) -> bytes:
        pieces: list[bytes] = []
        at = 0
        try:
            while at < size and not self.is_over:
                if self._left:
                    piece = data[at : at + self._left]
                    pieces.append(piece)
                    at += len(piece)
                    self._left -= len(piece)
                    if not self._left:
                        self._padding = b"\r\n"
                elif self._padding:
                    at = self._skip_padding(data, at)
                elif not (self._line or self._in_trailers) and (
                    match := CHUNK_HEADER.match(data, at, at + LINE_BYTES_MAX)
                ):
                    at = match.end()
                    self._begin_chunk(match[1])
                else:
                    at = self._take_line(data, at)
        except BodyError as error:
            self.failure = error
        if self.is_over and at < size:
            self.is_clean = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def end(self) -> None:
        if not self.is_over:
            self.failure = BodyError("the connection was closed within a chunked body")

    def _begin_chunk(self, size: bytes) -> None:
        self._left = int(size, 16)
        self._in_trailers = not self._left

    def _skip_padding(self, data: bytes, at: int) -> int:
        """Skip the line end after a chunk's data."""
        if data.startswith(self._padding, at):
            at += len(self._padding)
            self._padding = b""
        elif self._padding == data[at:] + b"\n":  # the data ends within the line end
            at += 1
            self._padding = b"\n"
        elif data.startswith(b"\n", at):
            at += 1
            self._padding = b""
            self.is_clean = False
        else:
            raise BodyError("a chunk is not followed by a line end")
        return at

    def _take_line(self, data: bytes, at: int) -> int:
        """Take a line, or the beginning or the rest of one: a chunk's size, or a trailer."""
        end = data.find(b"\n", at) + 1
        self._line += data[at : end or None]
        if self._trailer_bytes + len(self._line) > LINE_BYTES_MAX:
            raise BodyError(f"a chunk's size, or the trailers, have more than {LINE_BYTES_MAX} bytes")
        if not end:
            return len(data)
        line = bytes(self._line)
        self._line.clear()
        if self._in_trailers:
            self._take_trailer(line)
        else:
            self._take_size(line)
        return end

    def _take_size(self, line: bytes) -> None:
        match = CHUNK_HEADER.fullmatch(line)
        if match is None:
            self.is_clean = False
            match = _LENIENT_SIZE_LINE.fullmatch(line)
        if match is None:
            raise BodyError("a chunk has no size")
        self._begin_chunk(match[1])

    def _take_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        if line in (b"\r\n", b"\n"):
            self.is_over = True
        if line != b"\r\n" and not _TRAILER.fullmatch(line):
            self.is_clean = False


class SizedBody:
    """A body whose length the head has told."""

    __slots__ = ("_left", "failure", "is_clean", "is_over")

    def __init__(self, length: int) -> None:
        self._left = length
        self.is_over = not length
        self.is_clean = True
        self.failure: BodyError | None = None

    def feed(self, data: bytes) -> bytes:
        body = data if len(data) <= self._left else data[: self._left]
        self._left -= len(body)
        self.is_over = not self._left
        if len(body) < len(data):
            self.is_clean = False
        return body

    def end(self) -> None:
        if not self.is_over:
            self.failure = BodyError("the connection was closed before the body had its length")


class UnsizedBody:
    """A body that ends when the peer closes the connection."""

    __slots__ = ("failure", "is_clean", "is_over")

    def __init__(self) -> None:
        self.is_over = False
        self.is_clean = False
        self.failure: BodyError | None = None

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.is_over = True
