"""The head of a response, without a connection: what is refused before h11 sees it, and how long it takes."""

import random
import time

import h11
import httpx
import pytest

from service.models.http.head import HEAD_BYTES_MAX, HeadReader

OK = b"HTTP/1.1 200 OK\r\n"
BLANKS = 99_000
FOLDED = b"\r\n" + b" " * 97
"""100 bytes of a folded line of blanks: three of them are the line end and what h11 leaves of the line."""
REFUSED = [b"\0", b"\v", b"\f", b"\r", b"\r\r", b"x\0", b"\v \f"]


def read(head: bytes) -> bool:
    """Whether the head is a response's. Other errors than the one of a bad head are raised."""
    reader = HeadReader("POST")
    reader.encode_request(b"/", [(b"Host", b"x")])
    try:
        reader.feed(head)
    except httpx.RemoteProtocolError:
        return False
    return reader.response is not None


def h11_reads(head: bytes) -> bool:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
    connection.send(h11.Request(method="POST", target="/", headers=[(b"Host", b"x")]))
    connection.receive_data(head)
    try:
        return isinstance(connection.next_event(), h11.Response)
    except h11.RemoteProtocolError:
        return False


@pytest.mark.parametrize("refused", [*REFUSED, b""])
@pytest.mark.parametrize(
    "line",
    [
        b"a:" + b" " * BLANKS,
        b"a:" + b"\t" * BLANKS,
        b"a: b" + b" " * BLANKS,
        b"a: b" + b" c" * (BLANKS // 2),
        b"a:" + FOLDED * (BLANKS // 100),
        b"a: b" + FOLDED * (BLANKS // 100),
        b"a:" + b"\r\n " * (BLANKS // 3),
        b"a:" + b"\n\t" * (BLANKS // 2),
        b"a" * BLANKS,
        b"a" + b" " * BLANKS,
        b"transfer-encoding:" + b" " * BLANKS,
        b"transfer-encoding: chunked" + b" " * BLANKS,
        b"transfer-encoding: chunked" + b" ,chunked" * (BLANKS // 9),
        b"a:\r\n" * (BLANKS // 4) + b"b:",
    ],
    ids=lambda line: repr(line[:24]),
)
def test_a_head_takes_no_longer_than_its_length(line: bytes, refused: bytes) -> None:
    """A pattern that tries each blank as the last of its first part takes minutes for such a line."""
    began_at = time.thread_time()
    is_read = read(OK + line + refused + b"\r\n\r\n")
    assert time.thread_time() - began_at < 1
    assert not (is_read and refused)


@pytest.mark.parametrize("refused", [*REFUSED, b""])
@pytest.mark.parametrize("reason", [b" " * BLANKS, b"\t" * BLANKS, b"x" * BLANKS, b" x" * (BLANKS // 2)])
def test_a_status_line_takes_no_longer_than_its_length(reason: bytes, refused: bytes) -> None:
    began_at = time.thread_time()
    assert read(b"HTTP/1.1 200 " + reason + refused + b"\r\n\r\n") == (not refused)
    assert time.thread_time() - began_at < 1


def test_random_heads_are_refused_if_h11_refuses_them() -> None:
    """Here no head has an ambiguity that is resolved before h11."""
    rng = random.Random(11)
    parts = [b"a", b":", b" ", b"\t", b"\r\n", b"\r\n ", b"\n", b"\r", b"\0", b"\v", b"\f", b"\x01", b"\x85", b"b: c"]
    verdicts = []
    for _ in range(5000):
        start = OK if rng.random() < 0.8 else b"HTTP/1.1 200"
        head = start + b"".join(rng.choices(parts, k=rng.randrange(8)))
        head = head.partition(b"\n\n")[0].partition(b"\n\r\n")[0] + b"\r\n\r\n"
        verdicts.append(h11_reads(head))
        assert read(head) == verdicts[-1], head
    assert 500 < sum(verdicts) < 4500
