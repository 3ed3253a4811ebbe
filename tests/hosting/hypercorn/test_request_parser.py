"""Empty lines before a request are skipped, however they are cut, up to a bound."""

import re
import time

import h11
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from quart_trio import QuartTrio

from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.request_parser import EMPTY_LINES_MAX, RequestParser
from service.http1_lines import END_OF_FIELDS
from tests.hosting.conftest import Serve

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
HEAD_BYTES_MAX = 16 * 1024


def parser() -> RequestParser:
    return RequestParser(head_bytes_max=HEAD_BYTES_MAX)


def events(connection: h11.Connection) -> list[object]:
    found: list[object] = []
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        found.append(event)
        if isinstance(event, h11.ConnectionClosed):
            break
    return found


@pytest.mark.removal
def test_h11_still_refuses_an_empty_line_before_a_request() -> None:
    """This test fails once h11 skips the empty line; then RequestParser is no longer needed."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"\r\n" + GET)
    with pytest.raises(h11.RemoteProtocolError):
        connection.next_event()


@given(st.lists(st.sampled_from([b"\r\n", b"\n"]), max_size=EMPTY_LINES_MAX), st.data())
def test_empty_lines_before_a_request_are_skipped_wherever_they_are_cut(
    lines: list[bytes], data: st.DataObject
) -> None:
    text = b"".join(lines) + GET
    connection = parser()
    found: list[object] = []
    while text:
        size = data.draw(st.integers(1, len(text)))
        connection.receive_data(text[:size])
        text = text[size:]
        found += events(connection)
    request, end = found
    assert isinstance(request, h11.Request)
    assert isinstance(end, h11.EndOfMessage)


@pytest.mark.parametrize("begin", [b"\r\n" * (EMPTY_LINES_MAX + 1), b"\r\n \r\n", b"\r\r\n", b" \r\n", b"\r\nx\r\n"])
def test_too_many_empty_lines_and_other_bytes_are_refused(begin: bytes) -> None:
    connection = parser()
    connection.receive_data(begin + GET)
    with pytest.raises(h11.RemoteProtocolError):
        events(connection)


@pytest.mark.removal
def test_h11_still_takes_long_for_blanks_before_a_byte_that_it_refuses() -> None:
    """This test fails once h11 takes no longer than the length; then has_refused_bytes is no longer needed."""

    def thread_s(connection: h11.Connection) -> float:
        connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\nb:" + b" " * 6000 + b"\0\r\n\r\n")
        began_at = time.thread_time()
        with pytest.raises(h11.RemoteProtocolError):
            connection.next_event()
        return time.thread_time() - began_at

    assert thread_s(h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)) > 20 * thread_s(parser())


@given(
    st.lists(
        st.sampled_from([b"a", b":", b" ", b"\t", b"\0", b"\v", b"\f", b"\r", b"\n", b"\r\n", b"\x01"]), max_size=12
    ),
    st.binary(max_size=5),
)
def test_bad_bytes_of_a_head_are_refused_as_h11_refuses_them(parts: list[bytes], after: bytes) -> None:
    received = b"GET / HTTP/1.1\r\nHost: a\r\nb: c" + b"".join(parts) + b"\r\n\r\n" + after
    end = END_OF_FIELDS.search(received)
    assert end is not None
    has_line_feed_alone = re.search(rb"(?<!\r)\n", received[: end.end()]) is not None
    ours, theirs = parser(), h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    verdicts: list[object] = []
    for connection in (ours, theirs):
        connection.receive_data(received)
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            verdicts.append((error.error_status_hint, connection.their_state))
        else:
            assert isinstance(event, h11.Request)
            verdicts.append(event.headers)
    assert verdicts[0] == ((400, h11.ERROR) if has_line_feed_alone else verdicts[1])


@pytest.mark.parametrize("place", range(GET.count(b"\r\n")))
def test_a_head_with_a_line_feed_alone_is_refused(place: int) -> None:
    """RFC 9112, 2.2: a server may accept it. A proxy that passes it on as a part of a field would be misunderstood."""
    lines = GET.split(b"\r\n")
    received = b"\r\n".join(lines[: place + 1]) + b"\n" + b"\r\n".join(lines[place + 1 :])
    ours = parser()
    ours.receive_data(received)
    with pytest.raises(h11.RemoteProtocolError) as caught:
        events(ours)
    assert caught.value.error_status_hint == 400
    theirs = h11.Connection(h11.SERVER)
    theirs.receive_data(received)
    assert isinstance(theirs.next_event(), h11.Request)


def test_line_feeds_alone_in_a_body_are_nothing_to_a_head() -> None:
    ours = parser()
    ours.receive_data(POST.replace(b"{}", b"\n\n"))
    assert isinstance(events(ours)[0], h11.Request)


def test_half_a_line_end_at_the_end_of_the_input_is_not_waited_for() -> None:
    connection = parser()
    connection.receive_data(b"\r")
    assert events(connection) == []
    connection.receive_data(b"")
    with pytest.raises(h11.RemoteProtocolError):
        events(connection)


@pytest.mark.parametrize("together", [True, False])
async def test_a_connection_goes_on_after_bodies_that_end_with_a_line_end_too_many(
    together: bool, serve: Serve, connections: Connections
) -> None:
    app = QuartTrio("test")
    app.asgi_http_class = AsgiRequest

    @app.route("/", methods=["GET", "POST"])
    async def index() -> str:
        return "here"

    async with serve(app) as server, await server.connect() as client:
        with trio.fail_after(10):
            for request in (b"\r\n" + POST + b"\r\n", POST + b"\r\n\r\n", GET):
                parts = [request] if together else [request[:1], request[1:-1], request[-1:]]
                for part in parts:
                    await client.send_all(part)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                answer = b""
                while not answer.endswith(b"here"):
                    answer += await client.receive_some()
                assert answer.startswith(b"HTTP/1.1 200")
            await client.send_all(b"\r\n" * (2 * EMPTY_LINES_MAX))
            answer = b"".join([part async for part in client])
            assert answer.startswith(b"HTTP/1.1 400")
