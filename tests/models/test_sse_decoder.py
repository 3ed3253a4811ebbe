"""The SSE decoder: the standard's rules, any cut, and its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.models.sse_decoder import EventTooLargeError, SseDecoder


def decode(*chunks: bytes, event_bytes_max: int = 1000) -> list[bytes]:
    decoder = SseDecoder(event_bytes_max=event_bytes_max)
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\ndata: b\n\r\n", [b"a\nb"]),
        (b"data: a\n\r\n\rdata: b\n\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data:  two spaces\n\n", [b" two spaces"]),
        (b"data\n\n", [b""]),
        (b"data\ndata\n\n", [b"\n"]),
        (b"data:\n\n", [b""]),
        (b": a comment\n\n:\n\n: another\ndata: a\n\n", [b"a"]),
        (b"event: message\nid: 3\nretry: 10\ndata: a\nunknown: field\nwithout a colon\n\n", [b"a"]),
        (b"event: ping\n\n", []),
        (b"\n\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
        (b"data: a\n\ndata: not ended\n", [b"a"]),
        (b"data: a\n\ndata: not end", [b"a"]),
        (b" data: a\n\n", []),
        (b"Data: a\n\n", []),
        (b"database: a\n\n", []),
        ("data: Grüße 👩‍👩‍👧\n\n".encode(), ["Grüße 👩‍👩‍👧".encode()]),
        ("data: \u2028\u0085\n\n".encode(), ["\u2028\u0085".encode()]),
    ],
)
def test_the_standards_rules_hold_for_a_whole_stream_and_byte_by_byte(stream: bytes, events: list[bytes]) -> None:
    assert decode(stream) == events
    assert decode(*(bytes([byte]) for byte in stream)) == events


def test_an_event_is_there_as_soon_as_its_last_byte_is() -> None:
    for blank_line in (b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r", b"\r\n\r"):
        decoder = SseDecoder(event_bytes_max=1000)
        assert decoder.feed(b"data: a" + blank_line[:-1]) in ([], [b"a"])
        decoder = SseDecoder(event_bytes_max=1000)
        assert decoder.feed(b"data: a" + blank_line) == [b"a"]


line_ends = st.sampled_from([b"\n", b"\r", b"\r\n"])
line_texts = st.one_of(
    st.sampled_from([b"", b"data", b"data:", b"data: ", b":", b"event: x", b"\xef\xbb\xbfdata: x"]),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12).map(
        lambda text: b"data: " + text.encode()
    ),
    st.binary(max_size=8).map(lambda line: line.replace(b"\r", b"").replace(b"\n", b"")),
)
streams = st.lists(st.tuples(line_texts, line_ends), max_size=16).map(
    lambda lines: b"".join(text + end for text, end in lines)
)


@given(stream=streams, data=st.data())
def test_any_split_of_any_stream_decodes_the_same(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(*chunks) == decode(stream)
    assert decode(*(bytes([byte]) for byte in stream)) == decode(stream)


@given(payloads=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8), end=line_ends)
def test_events_that_are_encoded_by_the_standard_are_decoded_unchanged(payloads: list[str], end: bytes) -> None:
    lines = [payload.replace("\r\n", "\n").replace("\r", "\n").encode().split(b"\n") for payload in payloads]
    stream = b"".join(b"".join(b"data: " + line + end for line in event) + b": comment" + end + end for event in lines)
    assert decode(stream) == [b"\n".join(event) for event in lines]


@pytest.mark.parametrize("line", [b"x", b"xxxxxxx", b"x" * 64, b"x" * 100_000])
def test_a_line_without_end_is_an_error_and_takes_no_memory(line: bytes) -> None:
    with pytest.raises(EventTooLargeError):
        decode(b"data: ", *[line] * 10_000)


@pytest.mark.parametrize("line", [b"data: x\n", b"data\n", b"data: x\ndata\n" * 100])
def test_an_event_of_endless_lines_is_an_error_and_takes_no_memory(line: bytes) -> None:
    with pytest.raises(EventTooLargeError):
        decode(*[line] * 10_000)


def test_the_bound_is_on_one_event_and_not_on_the_stream() -> None:
    largest = b"data: " + b"x" * 994 + b"\n\n"
    assert len(decode(*[largest] * 50)) == 50
    assert len(decode(*(b": " + b"x" * 500 + b"\n" for _ in range(50)))) == 0
    for too_large in (b"data: " + b"x" * 995 + b"\n\n", b"data: a\n\n" + b"x" * 1001):
        with pytest.raises(EventTooLargeError):
            decode(too_large)
