"""A client's view of the wire: parses an HTTP/1.1 response as its bytes arrive, and judges how an event stream ended.

The module does no I/O. It has its own parser on purpose: the judge of a server must not share code with the server, and
20 000 frames a second must cost little.
"""

import re
from collections.abc import Mapping
from enum import StrEnum

import msgspec

_TOKEN = re.compile(rb"<(\d+)@(\d+)>")
_TERMINAL = re.compile(rb'"type"\s*:\s*"turn\.(completed|failed|cancelled|interrupted)"')
_FIRST = (b"turn.delta", b"response.output_text.delta", b'"content":"')
"""What stands in the first piece of a text: natively, in a response, in a chunk of a chat completion."""
_NOTE_BYTES_MAX = 300
_CARRY_BYTES = 64
"""Bytes kept from one piece to the next, for a mark that a chunk boundary cuts in two. Longer than any token mark."""


class WireError(Exception):
    """The peer sent bytes that are not HTTP/1.1."""


class ResponseParser:
    """One response: its head, then its body without the chunked coding.

    A body without a length or chunks goes on until the connection closes; ``delimited`` is False then.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.complete = False
        self.delimited = True
        self._buffer = b""
        self._chunked = False
        self._left: int | None = None  # bytes left of the body, or of the chunk in hand; None: unknown
        self._after_data = False  # the CRLF after a chunk's data is due
        self._trailers = False

    @property
    def closes(self) -> bool:
        """Whether the peer says that the connection ends with this response."""
        return self.headers.get("connection", "").lower() == "close"

    def feed(self, data: bytes) -> bytes:
        """Take received bytes, and return the bytes of the body in them.

        Raises:
            WireError: This is not HTTP/1.1, or bytes follow a complete response.
        """
        if self.complete:
            raise WireError(f"{len(data)} bytes after the end of the response")
        self._buffer += data
        if self.status is None and not self._take_head():
            return b""
        if self._chunked:
            return self._take_chunks()
        return self._take_plain()

    def end_of_input(self) -> None:
        """Note the peer's close: a body without a length is whole now."""
        if self.status is not None and not self.delimited:
            self.complete = True

    def _take_head(self) -> bool:
        while self.status is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > 65536 or not b"HTTP/1.1 ".startswith(self._buffer[:9]):
                    raise WireError(f"not a response head: {self._buffer[:80]!r}")
                return False
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            if not (match := re.match(r"HTTP/1\.1 (\d{3})(?: |$)", first)):
                raise WireError(f"not a status line: {first!r}")
            self._buffer = self._buffer[end + 4 :]
            if match[1] == "100":
                continue
            self.status = int(match[1])
            self.headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked:
            length = self.headers.get("content-length")
            bodiless = self.status in (204, 304)
            self._left = 0 if bodiless else None if length is None else int(length)
            self.delimited = self._left is not None
        return True

    def _take_plain(self) -> bytes:
        body, self._buffer = self._buffer, b""
        if self._left is not None:
            if len(body) > self._left:
                raise WireError(f"{len(body) - self._left} bytes too many")
            self._left -= len(body)
            self.complete = self._left == 0
        return body

    def _take_chunks(self) -> bytes:
        body: list[bytes] = []
        buffer, at = self._buffer, 0
        while not self.complete:
            if self._left:
                piece = buffer[at : at + self._left]
                if not piece:
                    break
                body.append(piece)
                at += len(piece)
                self._left -= len(piece)
                self._after_data = self._left == 0
                continue
            if self._after_data:
                if len(buffer) - at < 2:
                    break
                if buffer[at : at + 2] != b"\r\n":
                    raise WireError(f"a chunk is longer than it said: {buffer[at : at + 20]!r}")
                at += 2
                self._after_data = False
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            line, at = buffer[at:end], end + 2
            if self._trailers:
                self.complete = not line
                continue
            try:
                self._left = int(line.split(b";")[0], 16)
            except ValueError:
                raise WireError(f"not a chunk's size: {line[:40]!r}") from None
            self._trailers = self._left == 0
        self._buffer = buffer[at:]
        if self.complete and self._buffer:
            raise WireError(f"{len(self._buffer)} bytes after the last chunk")
        return b"".join(body)


class StreamEnd(StrEnum):
    """How an event stream ended, on the wire."""

    TERMINAL = "terminal"  # a terminal event, then the last chunk: the only proper end
    CLEAN = "clean"  # the last chunk, but no terminal event: whole for HTTP only
    TRUNCATED = "truncated"  # the connection was closed in mid-body
    RESET = "reset"  # the connection was reset in mid-body
    OPEN = "open"  # no end yet when the client stopped watching
    REFUSED = "refused"  # a complete answer that is no event stream (a 503, a 409)
    UNANSWERED = "unanswered"  # closed or reset before a response's head
    UNREACHABLE = "unreachable"  # no connection
    BROKEN = "broken"  # the received bytes are not HTTP


class StreamResult(msgspec.Struct, kw_only=True):
    """The observations of one event stream. Times are ``time.monotonic()``, in seconds."""

    group: str = ""
    number: int = 0
    end: StreamEnd = StreamEnd.OPEN
    terminal: str | None = None  # completed, failed, cancelled, interrupted
    terminals: int = 0  # more than one is a fault
    status: int | None = None
    tokens: int = 0
    gaps: int = 0  # tokens missing, doubled or out of order
    began_at: float | None = None  # before the connection was opened
    sent_at: float | None = None
    first_at: float | None = None  # the first piece of text
    ended_at: float | None = None
    cancelled_at: float | None = None  # the time of the client's request to cancel
    note: str = ""


class StreamJudge:
    """Follows one event stream and judges how it ended.

    Tokens are counted by their marks, ``<number@nanoseconds>`` (numbers from 1 without gaps; the time
    at which the model sent it), also if frames and chunks cut a mark.

    Either :meth:`feed` gets the bytes of an HTTP/1.1 connection, or a client of another
    protocol calls :meth:`take_head`, :meth:`take_body` and :meth:`last_chunk`.
    """

    def __init__(self, result: StreamResult, *, delays_ns: list[int] | None = None) -> None:
        self.result = result
        self._response = ResponseParser()
        self._is_stream = False
        self._delays_ns = delays_ns
        self._carry = b""

    @property
    def ended(self) -> bool:
        return self.result.ended_at is not None

    @property
    def headers(self) -> Mapping[str, str]:
        """Take the head of an HTTP/1.1 response, once it has a status."""
        return self._response.headers

    def feed(self, data: bytes, now: float) -> None:
        """Take received bytes."""
        try:
            body = self._response.feed(data)
        except WireError as error:
            self.result.note = str(error)
            self._end(StreamEnd.BROKEN, now)
            return
        if self.result.status is None and self._response.status is not None:
            self.take_head(self._response.status, self._response.headers)
        if body:
            self.take_body(body, now)
        if self._response.complete:
            self.last_chunk(now)

    def end_of_input(self, now: float) -> None:
        """Note that the peer closed its side."""
        self._response.end_of_input()
        if self._response.complete:
            self.last_chunk(now)
        else:
            self._end(StreamEnd.UNANSWERED if self.result.status is None else StreamEnd.TRUNCATED, now)

    def reset(self, now: float) -> None:
        """Note that the connection, or the stream in it, was reset."""
        self._end(StreamEnd.UNANSWERED if self.result.status is None else StreamEnd.RESET, now)

    def take_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Take the response's head."""
        self.result.status = status
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")

    def last_chunk(self, now: float) -> None:
        """Note the last chunk: the response is whole."""
        if not self._is_stream:
            self.result.note = f"{self.result.status} {self._carry.decode(errors='replace')}"
            self._end(StreamEnd.REFUSED, now)
        else:
            self._end(StreamEnd.TERMINAL if self.result.terminal else StreamEnd.CLEAN, now)

    def take_body(self, body: bytes, now: float) -> None:
        """Take a piece of the body."""
        if not self._is_stream:
            self._carry = (self._carry + body)[:_NOTE_BYTES_MAX]
            return
        text = self._carry + body
        if self.result.first_at is None and any(mark in text for mark in _FIRST):
            self.result.first_at = now
        used = 0
        for match in _TOKEN.finditer(text):
            used = match.end()
            self.result.tokens += 1
            if int(match[1]) != self.result.tokens:
                self.result.gaps += 1
                self.result.note = f"token {match[1].decode()} where {self.result.tokens} was due"
            if self._delays_ns is not None:
                self._delays_ns.append(int(now * 1e9) - int(match[2]))
        for match in _TERMINAL.finditer(text):
            used = max(used, match.end())
            self.result.terminal = match[1].decode()
            self.result.terminals += 1
        self._carry = text[max(used, len(text) - _CARRY_BYTES) :]

    def _end(self, end: StreamEnd, now: float) -> None:
        if not self.ended:
            self.result.end = end
            self.result.ended_at = now
