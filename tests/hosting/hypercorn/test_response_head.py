"""The heads of responses are those that h11 would send."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.hosting.hypercorn.response_head import Framing, encode_head

SERVER_FIELDS = [(b"date", b"now"), (b"server", b"hypercorn-h11")]
NAMES = ["content-type", "Content-Length", "content-length", "transfer-encoding", "connection", "Connection", "x-a"]
VALUES = ["text/plain", "0", "17", "17, 17", "1,2", "-1", "chunked", "Chunked", "gzip", "close", "keep-alive",
          "a, Close", "", " spaced ", "a\tb", "a\nb", "a\x00", "\xe9", "9" * 20, "9" * 21]  # fmt: skip


def head_of_h11(status: int, fields: list[tuple[bytes, bytes]], request: bytes) -> tuple[bytes, str, int, bool]:
    """The head, the framing, the length, and whether the connection closes, as h11 has it."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request)
    assert isinstance(connection.next_event(), h11.Request)
    head = connection.send(h11.Response(status_code=status, headers=[*fields, *SERVER_FIELDS]))
    writer = connection._writer
    name = type(writer).__name__
    keeps = connection._cstate.keep_alive and name != "Http10Writer"
    return head, name, getattr(writer, "_length", 0), not keeps


WRITERS = {"ContentLengthWriter": Framing.LENGTH, "ChunkedWriter": Framing.CHUNKED, "Http10Writer": Framing.CLOSE}


@given(
    status=st.sampled_from([199, 200, 201, 204, 304, 404, 500, 999, 1000]),
    fields=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=5),
    method=st.sampled_from(["GET", "HEAD", "POST", "OPTIONS"]),
    version=st.sampled_from(["1.0", "1.1"]),
    connection=st.sampled_from(["", "Connection: close\r\n", "Connection: keep-alive\r\n"]),
)
def test_a_head_is_the_one_of_h11(
    status: int, fields: list[tuple[str, str]], method: str, version: str, connection: str
) -> None:
    encoded = [(name.encode(), value.encode("latin1").strip()) for name, value in fields]
    request = f"{method} / HTTP/{version}\r\nHost: a\r\n{connection}\r\n".encode()
    keeps_alive = version == "1.1" and "close" not in connection
    try:
        expected = head_of_h11(status, encoded, request)
    except h11.LocalProtocolError:
        with pytest.raises(ValueError, match="response"):
            encode_head(
                status, encoded, method=method, http_version=version, keeps_alive=keeps_alive,
                server_fields=SERVER_FIELDS,
            )  # fmt: skip
        return
    head = encode_head(
        status, encoded, method=method, http_version=version, keeps_alive=keeps_alive, server_fields=SERVER_FIELDS
    )
    assert (head.encoded, head.framing, head.length, head.closes) == (
        expected[0], WRITERS[expected[1]], expected[2], expected[3],
    )  # fmt: skip


@pytest.mark.parametrize("name", [b"", b":path", b"a b", b"a:", b"\xe9", b"a\r\nb"])
def test_a_name_that_is_no_name_is_not_sent(name: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        encode_head(200, [(name, b"")], method="GET", http_version="1.1", keeps_alive=True, server_fields=[])


def test_spaces_around_a_field_are_no_part_of_it() -> None:
    head = encode_head(
        204, [(b" a ", b"\tb\r\n")], method="GET", http_version="1.1", keeps_alive=True, server_fields=[]
    )
    assert head.encoded == b"HTTP/1.1 204 \r\na: b\r\n\r\n"


def test_a_connection_closes_after_a_tunnel_was_promised() -> None:
    head = encode_head(200, [], method="CONNECT", http_version="1.1", keeps_alive=True, server_fields=[])
    assert (head.framing, head.length, head.closes) == (Framing.LENGTH, 0, True)
