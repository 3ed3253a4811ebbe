"""Chunks are joined, and otherwise read as h11 reads them."""

import re
from itertools import pairwise

import h11
import h11._readers
import pytest
from h11._readers import READERS, ChunkedReader
from h11._state import SEND_BODY
from hypothesis import given
from hypothesis import strategies as st

from service.hosting.hypercorn.chunked_request import JoiningChunkedReader

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def read(reader: type[ChunkedReader], pieces: list[bytes]) -> tuple[bytes, str, int]:
    """Read a body that arrives in these pieces: its bytes, its end, and the number of its events."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS[SEND_BODY], "chunked", reader)  # type: ignore[arg-type]
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=100)
        connection.receive_data(HEAD)
        assert isinstance(connection.next_event(), h11.Request)
        body, events = b"", 0
        for piece in pieces:
            connection.receive_data(piece)
            try:
                while (event := connection.next_event()) is not h11.NEED_DATA:
                    if not isinstance(event, h11.Data):
                        return body, f"{event!r} {connection.trailing_data[0]!r}", events
                    body += bytes(event.data)
                    events += 1
            except h11.RemoteProtocolError as error:
                # The bytes before the error do not count: a refused body reaches no handler.
                return b"", f"refused with {error.error_status_hint}", 0
        return body, "goes on", events


FRAMES = st.one_of(
    st.binary(max_size=20).map(lambda data: b"%x\r\n%b\r\n" % (len(data), data)),
    st.sampled_from([
        b"1;a=b\r\nx\r\n", b"1; \r\nx\r\n", b"1 \t\r\nx\r\n", b"001\r\nx\r\n", b"A\r\n0123456789\r\n", b"0\r\n\r\n",
        b"0\r\na: b\r\n\r\n", b"0;a\r\n\r\n", b"\r\n", b"1\nx\n", b"1\r\nxx\r\n", b"1\r\nx\n", b"g\r\n", b"-1\r\n",
        b"1;\n\r\nx\r\n",
        b"f" * 20 + b"\r\n", b"f" * 21 + b"\r\n", b"1;" + b"a" * 120 + b"\r\nx\r\n", b" 1\r\nx\r\n", b"0x1\r\nx\r\n",
        b"1\r\n\r\n\r\n", b"0\r\n\n\x0b\r\n\r\n", b"0\r\na:\x0b\r\n\r\n", b"0\r\na: b\r\n\r\n\x0b",
        b"0\r\na: b\n\n", b"0\r\na: b\r\n\n", b"GET / HTTP/1.1\r\n\r\n",
    ]),
)  # fmt: skip


@given(st.lists(FRAMES, max_size=12).map(b"".join), st.lists(st.integers(0, 200), max_size=6))
def test_a_chunked_body_is_read_as_h11_reads_it_in_any_pieces(framed: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(framed), *(cut for cut in cuts if cut < len(framed))})
    pieces = [framed[start:end] for start, end in pairwise(places)]
    body, end, _ = read(JoiningChunkedReader, pieces)
    expected = read(ChunkedReader, pieces)[:2]
    refuses_line_feed = end == "refused with 400" and re.search(rb"(?<!\r)\n", framed) is not None
    assert (body, end) == expected or (refuses_line_feed and expected[1].startswith("EndOfMessage"))


@pytest.mark.parametrize("trailers", [b"\n", b"a: b\n\r\n", b"a: b\n\n", b"a: b\r\n\n", b"a: b\nc: d\r\n\r\n"])
def test_trailers_with_a_line_feed_alone_are_refused(trailers: bytes) -> None:
    framed = b"1\r\nx\r\n0\r\n" + trailers
    assert read(ChunkedReader, [framed])[1].startswith("EndOfMessage")
    for pieces in ([framed], [bytes([byte]) for byte in framed]):
        assert read(JoiningChunkedReader, pieces)[1] == "refused with 400"


def test_the_chunks_of_a_piece_are_one_event() -> None:
    framed = b"1\r\nx\r\n" * 1000
    for start in range(7):
        body, end, events = read(JoiningChunkedReader, [framed[:start], framed[start:]][not start :])
        assert (body, end) == (b"x" * 1000, "goes on")
        assert events <= 3


@pytest.mark.usefixtures("connections")
def test_connections_read_with_the_joining_reader() -> None:
    assert READERS[SEND_BODY]["chunked"] is JoiningChunkedReader  # type: ignore[index]


@pytest.mark.removal
def test_the_joining_reader_is_still_needed() -> None:
    """This test fails once h11 joins chunks by itself; then JoiningChunkedReader is no longer needed."""
    assert read(h11._readers.ChunkedReader, [b"1\r\nx\r\n" * 1000])[2] == 1000
