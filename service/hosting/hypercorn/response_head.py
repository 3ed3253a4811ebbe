"""The head of a response on HTTP/1.1: which framing its body has, and its bytes.

h11 decides and writes the same in three times the time. Proven against h11 by
``tests/hosting/hypercorn/test_response_head.py``.

Source: https://www.rfc-editor.org/rfc/rfc9112#section-6.3
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

Fields = list[tuple[bytes, bytes]]

_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+")
_NOT_IN_A_VALUE = re.compile(rb"[\x00\n\r\x0b\x0c]")
_LENGTH = re.compile(rb"[0-9]{1,20}")
_STATUS_MAX = 999


class Framing(Enum):
    """How a client finds the end of a response's body."""

    LENGTH = auto()
    CHUNKED = auto()
    CLOSE = auto()
    """The connection closes: for clients of HTTP/1.0."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's head as it is sent.

    Attributes:
        length: The bytes of the body, with ``Framing.LENGTH``.
        has_body: Whether the application's body is sent.
        closes: Whether the connection closes after the response.
    """

    encoded: bytes
    framing: Framing
    length: int
    has_body: bool
    closes: bool


def encode_head(
    status: int,
    fields: Iterable[tuple[bytes, bytes]],
    *,
    method: str,
    http_version: str,
    keeps_alive: bool,
    server_fields: Fields,
) -> ResponseHead:
    """Encode the head of the response to a request.

    Args:
        fields: The application's. ``Transfer-Encoding`` and ``Connection`` are added where they are needed.
        method: The request's.
        http_version: The request's.
        keeps_alive: Whether the request leaves the connection open.
        server_fields: Added after the application's.

    Raises:
        ValueError: The application's status or one of its fields cannot be sent.
    """
    if not 200 <= status <= _STATUS_MAX:
        raise ValueError(f"{status} is not the status of a final response.")
    kept, length, is_chunked = _check(fields)
    kept += server_fields
    tunnels = method == "CONNECT" and status < 300
    framing = Framing.LENGTH
    if (is_chunked or length is None) and not (status in (204, 304) or tunnels):
        kept = _without(kept, b"content-length", b"transfer-encoding")
        length = 0
        if http_version < "1.1":
            framing = Framing.CLOSE
            keeps_alive = keeps_alive and method == "HEAD"
        else:
            framing = Framing.CHUNKED
            kept.append((b"Transfer-Encoding", b"chunked"))
    tokens = {it for name, value in kept if name.lower() == b"connection" for it in _tokens(value)}
    closes = tunnels or not keeps_alive or b"close" in tokens
    if not keeps_alive:
        tokens.discard(b"keep-alive")
        kept = _without(kept, b"connection")
        kept += [(b"Connection", token) for token in sorted({*tokens, b"close"})]
    has_body = not (status in (204, 304) or tunnels or method == "HEAD")
    if not has_body:
        framing, length = Framing.LENGTH, 0
    lines = [b"HTTP/1.1 %d \r\n" % status, *[b"%b: %b\r\n" % field for field in kept], b"\r\n"]
    return ResponseHead(b"".join(lines), framing, length or 0, has_body, closes)


def _check(fields: Iterable[tuple[bytes, bytes]]) -> tuple[Fields, int | None, bool]:
    """Check an application's fields. Returns them, the body's length, and whether they say that it is chunked."""
    checked: Fields = []
    length: bytes | None = None
    is_chunked = False
    for given_name, given_value in fields:
        name, value = bytes(given_name).strip(), bytes(given_value).strip()
        if not _NAME.fullmatch(name) or _NOT_IN_A_VALUE.search(value):
            raise ValueError(f"The field {name!r} of a response cannot be sent: {value!r}.")
        lower = name.lower()
        if lower == b"content-length":
            lengths = {it.strip() for it in value.split(b",")}
            value = lengths.pop()
            if lengths or not _LENGTH.fullmatch(value) or length not in (None, value):
                raise ValueError(f"A response has no such Content-Length: {given_value!r}.")
            if length is not None:
                continue
            length = value
        elif lower == b"transfer-encoding":
            value = value.lower()
            if is_chunked or value != b"chunked":
                raise ValueError(f"A response has no such Transfer-Encoding: {given_value!r}.")
            is_chunked = True
        checked.append((name, value))
    return checked, None if length is None else int(length), is_chunked


def _without(fields: Fields, *names: bytes) -> Fields:
    return [(name, value) for name, value in fields if name.lower() not in names]


def _tokens(value: bytes) -> list[bytes]:
    return [token for it in value.lower().split(b",") if (token := it.strip())]
