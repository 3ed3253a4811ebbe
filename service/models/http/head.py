"""The heads of HTTP/1.1: the request's in bytes, and the response's out of bytes. Pure; h11 does the work.

Source: RFC 9112.
"""

import re

import h11
import httpx  # noqa: ASYNC127  the project's choice

from service.http1_lines import END_OF_FIELDS, REFUSED
from service.models.http.body import BodyDecoder, ChunkedBody, SizedBody, UnsizedBody

HEAD_BYTES_MAX = 100 * 1024
"""Bound on a response's head."""
INTERIM_MAX = 256
"""Bound on the interim responses (1xx) before a response. Some servers send one from time to time while they work."""
_CHUNKED_LINE = re.compile(
    rb"^transfer-encoding:[ \t]*chunked(?:[ \t]*,[ \t]*chunked)*[ \t]*\r?\n(?![ \t])", re.IGNORECASE | re.MULTILINE
)
_START = b"HTTP/"


class ResponseHead:
    """A response's head.

    Attributes:
        is_reusable: Whether the connection may serve another request after this response, as far as the head tells.
    """

    def __init__(self, event: h11.Response, method: str, *, is_ambiguous: bool) -> None:
        self.status = event.status_code
        self.reason = event.reason
        self.http_version = b"HTTP/" + event.http_version
        self.headers = event.headers.raw_items()
        codings = dict(event.headers)  # the names are lowercase here; h11 lets at most one of each pass
        length, is_chunked = codings.get(b"content-length"), b"transfer-encoding" in codings
        options = b",".join(value for name, value in event.headers if name == b"connection").lower()
        self.is_reusable = (
            event.http_version == b"1.1"
            and b"close" not in options
            and not is_ambiguous
            and not (is_chunked and length is not None)
        )
        self.has_body = method != "HEAD" and self.status not in (204, 304)
        if not self.has_body and method != "HEAD" and (is_chunked or int(length or 0)):
            self.is_reusable = False  # a server that announces a body may send one, in spite of the status
        self._is_chunked, self._length = is_chunked, length

    def open_body(self) -> BodyDecoder:
        """The decoder of the body that follows."""
        if not self.has_body:
            return SizedBody(0)
        if self._is_chunked:
            return ChunkedBody()
        return UnsizedBody() if self._length is None else SizedBody(int(self._length))


class HeadReader:
    """Makes a request's head, and reads the head of its response, which may come in pieces of any size.

    Attributes:
        response: The response's head, once it is here. Interim responses are left out.
        has_begun: Whether any byte of an answer has come.
    """

    def __init__(self, method: str) -> None:
        self.response: ResponseHead | None = None
        self.has_begun = False
        self._method = method
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._received = bytearray()
        self._searched = 0
        self._interim = 0

    def encode_request(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The head of the request.

        Raises:
            httpx.LocalProtocolError: A header cannot be sent.
        """
        try:
            return self._http.send(h11.Request(method=self._method, target=target, headers=headers)) or b""
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error

    def feed(self, data: bytes) -> None:
        """Take bytes from the server. Must not be called once ``response`` is set.

        Raises:
            httpx.RemoteProtocolError: They are no head of HTTP.
        """
        self.has_begun = True
        self._received += data
        if not self._received.startswith(_START[: len(self._received)]):
            raise httpx.RemoteProtocolError("the answer is not HTTP")
        while self.response is None and (end := END_OF_FIELDS.search(self._received, self._searched)):
            head = bytes(self._received[: end.end()])
            del self._received[: end.end()]
            self._searched = 0
            self._take(head)
        if self.response is None:
            self._searched = max(0, len(self._received) - 2)
            if len(self._received) > HEAD_BYTES_MAX:
                raise httpx.RemoteProtocolError(f"the head has more than {HEAD_BYTES_MAX} bytes")

    def take_rest(self) -> bytes:
        """The bytes after the head: the beginning of the body."""
        rest = bytes(self._received)
        self._received.clear()
        return rest

    def _take(self, head: bytes) -> None:
        if REFUSED.search(head):
            raise httpx.RemoteProtocolError("the head has a control character")
        is_ambiguous, head = fold_chunked(head)
        if len(head) > HEAD_BYTES_MAX:
            raise httpx.RemoteProtocolError(f"the head has more than {HEAD_BYTES_MAX} bytes")
        try:
            self._http.receive_data(head)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error)) from error
        if isinstance(event, h11.Response):
            self.response = ResponseHead(event, self._method, is_ambiguous=is_ambiguous)
            return
        self._interim += 1
        if not isinstance(event, h11.InformationalResponse) or self._interim > INTERIM_MAX:
            raise httpx.RemoteProtocolError("no final response came")


def fold_chunked(head: bytes) -> tuple[bool, bytes]:
    """The head with ``Transfer-Encoding: chunked`` once, and whether it was there more than once.

    A proxy that adds the field to a response that has it means the same. Read as two codings on top of each other, such
    a body would be none.
    """
    lines = _CHUNKED_LINE.findall(head)
    if len(lines) < 2 and not any(b"," in line for line in lines):
        return False, head
    status_line, line_end, fields = head.partition(b"\n")
    return True, status_line + line_end + b"Transfer-Encoding: chunked\r\n" + _CHUNKED_LINE.sub(b"", fields)
