"""Bodies of responses, in any pieces: what is read, what ends the connection, and what is bounded."""

import time

import pytest

from service.models.http.body import LINE_BYTES_MAX, BodyDecoder, ChunkedBody, SizedBody, UnsizedBody
from tests.models.http.chunked_fuzz import Read, fuzz, read

CHUNKED = b'5\r\nhello\r\n1;a="b";c\r\n \r\n00000005 \t\r\nworld\r\n0;last\r\nx-trailer: y\r\n\r\n'


@pytest.mark.parametrize("size", [*range(1, 12), 1000])
def test_a_chunked_body_is_read_in_pieces_of_any_size(size: int) -> None:
    decoder = ChunkedBody()
    body = b"".join(decoder.feed(CHUNKED[at : at + size]) for at in range(0, len(CHUNKED), size))
    assert (body, decoder.is_over, decoder.is_clean, decoder.failure) == (b"hello world", True, True, None)


def test_a_chunk_is_not_held_until_it_is_whole() -> None:
    decoder = ChunkedBody()
    assert decoder.feed(b"ffffff\r\nab") == b"ab"
    assert decoder.feed(b"c") == b"c"


@pytest.mark.parametrize(
    "body",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nno field\r\n\r\n",
        b"5\r\nhello\r\n0\r\n: no name\r\n\r\n",
        b"5\r\nhello\r\n0\r\nx: y\n\r\n",
        b"5\r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"5\r\nhello\r\n0\r\n\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_body_that_others_may_read_in_another_way_is_read_and_not_clean(body: bytes, size: int) -> None:
    got = read([body[at : at + size] for at in range(0, len(body), size)])
    assert (got.body, got.is_over, got.is_clean, got.failed) == (b"hello", True, False, False)


@pytest.mark.parametrize(
    ("body", "before"),
    [
        (b"data: x\n\n", b""),
        (b"\r\n5\r\nhello", b""),
        (b"-5\r\nhello", b""),
        (b"+5\r\nhello", b""),
        (b"0x5\r\nhello", b""),
        (b"5 5\r\nhello", b""),
        (b"1_0\r\nhello", b""),
        (b"fffffffffffffffffffff\r\n", b""),
        ("\u0665\r\nhello".encode(), b""),
        (b"5\r\nhello0\r\n\r\n", b"hello"),
        (b"5\r\nhello\r0\r\n\r\n", b"hello"),
        (b"5\r\nhello\r\r\n0\r\n\r\n", b"hello"),
        (b"5\r\nhello\r\n\r\n", b"hello"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_body_without_its_framing_is_an_error_after_the_bytes_before_it(
    body: bytes, before: bytes, size: int
) -> None:
    got = read([body[at : at + size] for at in range(0, len(body), size)])
    assert (got.body, got.is_over, got.failed) == (before, False, True)


@pytest.mark.parametrize(
    ("start", "endless"),
    [
        (b"", b"0"),
        (b"5;", b"a"),
        (b"5\r\nhello\r\n1;", b"a\r"),
        (b"0\r\n", b"x: y\r\n"),
        (b"0\r\n", b"\rx"),
        (b"0\r\nx:", b"y"),
    ],
)
@pytest.mark.parametrize("size", [1, 700, 64 * 1024])
def test_an_endless_line_or_trailer_is_bounded(start: bytes, endless: bytes, size: int) -> None:
    decoder = ChunkedBody()
    decoder.feed(start)
    piece = (endless * size)[:size]
    fed = 0
    while decoder.failure is None:
        assert decoder.feed(piece) == b""
        fed += len(piece)
        assert fed < LINE_BYTES_MAX + 2 * len(piece) + 2
    assert len(decoder._line) <= LINE_BYTES_MAX + len(piece)


@pytest.mark.parametrize(("length", "failed"), [(15_000, False), (16_300, False), (20_000, True)])
@pytest.mark.parametrize("size", [1, 700, 64 * 1024])
def test_the_bound_of_a_line_is_the_same_in_pieces_and_in_one_piece(length: int, failed: bool, size: int) -> None:
    body = b"5\r\nhello\r\n1;" + b"x" * length + b"\r\n!\r\n0\r\n\r\n"
    got = read([body[at : at + size] for at in range(0, len(body), size)])
    assert got == Read(b"hello" if failed else b"hello!", is_over=not failed, is_clean=True, failed=failed)


@pytest.mark.parametrize(
    "line", [b"5;" + b" " * 65_000 + b"\rX", b"5" + b"\t" * 65_000 + b"X\n", b"5;" + b" ;" * 32_000]
)
@pytest.mark.parametrize("piece_bytes", [10_000, 65_536])
def test_a_line_of_blanks_takes_no_longer_than_its_length(line: bytes, piece_bytes: int) -> None:
    """A pattern that tries each blank as two of its parts takes fourteen seconds for such a line."""
    decoder = ChunkedBody()
    began_at = time.thread_time()
    for at in range(0, len(line), piece_bytes):
        if decoder.failure is None:
            decoder.feed(line[at : at + piece_bytes])
    assert decoder.failure is not None
    assert time.thread_time() - began_at < 1


def test_the_end_of_the_connection_after_a_whole_body_is_none_of_it() -> None:
    whole: list[tuple[BodyDecoder, bytes]] = [(ChunkedBody(), CHUNKED), (SizedBody(5), b"hello"), (SizedBody(0), b"")]
    for decoder, data in whole:
        if data:
            decoder.feed(data)
        decoder.end()
        assert (decoder.is_over, decoder.failure) == (True, None)


def test_the_end_of_the_connection_within_a_body_is_an_error() -> None:
    unfinished: list[tuple[BodyDecoder, bytes]] = [
        (ChunkedBody(), b"5\r\nhello\r\n"),
        (ChunkedBody(), b"5\r\nhel"),
        (ChunkedBody(), b"5\r\nhello\r\n0\r\n"),
        (ChunkedBody(), b""),
        (SizedBody(6), b"hello"),
    ]
    for decoder, data in unfinished:
        decoder.feed(data)
        decoder.end()
        assert decoder.failure is not None
        assert not decoder.is_over


def test_a_body_with_a_length_ends_there_and_what_follows_is_not_of_it() -> None:
    decoder = SizedBody(5)
    assert decoder.feed(b"hel") == b"hel"
    assert not decoder.is_over
    assert decoder.feed(b"lo") == b"lo"
    assert (decoder.is_over, decoder.is_clean) == (True, True)
    longer = SizedBody(5)
    assert longer.feed(b"hello you") == b"hello"
    assert (longer.is_over, longer.is_clean) == (True, False)
    assert SizedBody(0).is_over


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    decoder = UnsizedBody()
    assert decoder.feed(b"0\r\n\r\n") == b"0\r\n\r\n"
    assert not decoder.is_over
    decoder.end()
    assert (decoder.is_over, decoder.is_clean, decoder.failure) == (True, False, None)


def test_random_chunks_are_read_as_a_strict_reference_reads_them_or_are_not_clean() -> None:
    assert fuzz(100_000, seed=14, h11_every=100) > 10_000
