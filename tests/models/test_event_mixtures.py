"""Data between the chunks of a reply: comments, pings, foreign events, images, other choices, compression."""

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from service.errors import ModelError
from service.models import chat_completions
from service.models.chat_completions import EVENT_BYTES_MAX, SKIPPED_BYTES_MAX, ReplyDecoder
from service.models.client import Finished, ModelEvent, Progress, TextDelta
from service.models.inflate import Inflater
from service.models.openai_compatible import OpenAICompatibleStream
from tests.models.replies import Reply, take
from tests.upstreams.raw_server import DONE, delta, finish, reasoning, usage

STOP = Finished(finish_reason="stop")


def event(payload: object, *, name: str = "", end: bytes = b"\n\n") -> bytes:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return (b"event: %b\n" % name.encode() if name else b"") + b"data: " + data + end


class Read(Reply):
    """A stream that has been read to its end or to its failure."""

    def __init__(self, *chunks: bytes, encoding: str = "") -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []
        self.failure: ModelError | None = None
        decoder = ReplyDecoder(redact=str, warn=lambda sentence, start: self.told.append((sentence, start)))
        for chunk in _inflated(chunks, encoding) if encoding else chunks:
            self.batches.append(decoder.feed(chunk))
            if decoder.finished or decoder.failure is not None:
                break
        try:
            self.failure = decoder.failure
            if self.failure is None and not decoder.finished:
                self.batches.append(decoder.end())
        except ModelError as error:
            self.failure = error

    @property
    def code(self) -> str:
        return "" if self.failure is None else self.failure.code


def _inflated(chunks: tuple[bytes, ...], encoding: str) -> list[bytes]:
    inflater, pieces = Inflater(encoding), []
    for chunk in chunks:
        inflater.feed(chunk)
        while inflater.has_more:
            pieces.append(inflater.take())
    return pieces


# Events that are no chunks

NOT_OURS = [
    event(b": keepalive"),
    event(b": OPENROUTER PROCESSING"),
    event(b"ping"),
    event(b"2026-01-31 09:30:00.1"),
    event(b"1700000000.5"),
    event(b'"ping"'),
    event(b"true"),
    event(b""),
    event(b"   "),
    event(b"{broken"),
    event(b"[1, 2]"),
    event(b"\xff\xfe"),
    event(b"[" * 1500),
    event({"type": "ping"}),
    event(b"2026-01-31 09:30:00.1", name="ping"),
    event({"tool": "web", "message": "searching"}, name="tool.progress"),
    event({"status": "running", "detail": "loading"}, name="status"),
    event({"error": "of a tool"}, name="tool.failed"),
    event(delta("another's"), name="trace"),
    event(DONE, name="trace.done"),
    event({"a": 1}, end=b"\nevent: named later\n\n"),
    b"event: ping\n\n",
    b"event:\n\n",
    b": comment\n\n",
    b":\n",
    b"id: 7\n\n",
    b"retry: 1000\n\n",
    b"\n\n",
]


@pytest.mark.parametrize("between", NOT_OURS)
def test_data_that_is_no_chunk_fails_no_reply(between: bytes) -> None:
    read = Read(between, event(delta("a")), between, between, event(delta("b")), between, event(finish()), event(DONE))
    assert read.failure is None
    assert read.events == [TextDelta("a"), TextDelta("b"), STOP]
    assert len(read.told) <= 1, "once"


@pytest.mark.parametrize("between", NOT_OURS)
def test_data_that_is_no_chunk_is_no_progress(between: bytes) -> None:
    decoder = ReplyDecoder(redact=str)
    assert decoder.feed(between) == []
    assert decoder.feed(between * 20) == []


def test_data_that_is_no_json_is_logged_once_with_its_beginning() -> None:
    read = Read(event(delta("a")), *[event(b'{"id":"chatcmpl-1","choices":[{"delta":{"content":"private')] * 3)
    (told,) = read.told
    assert "no chunk" in told[0]
    assert told[1] == '{"id":"chatcmpl-'
    assert "private" not in str(read.told)
    assert read.code == "upstream_truncated"


@pytest.mark.parametrize("garbage", [event(b"garbage"), event(b"[1]"), event({"a": 1}, name="response.created")])
def test_a_body_without_any_chunk_fails_with_a_sentence_about_that(garbage: bytes) -> None:
    for end in (b"", event(DONE)):
        read = Read(garbage, garbage, end)
        assert read.code == "upstream_protocol"
        assert str(read.failure) == "The model server sent something that is not a chat completion."


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (event({"message": "it burns"}, name="error"), "it burns"),
        (event({"error": {"message": "it burns"}}, name="error"), "it burns"),
        (event({"code": "InvalidParameter", "message": "it burns"}, name="error"), "it burns"),
        (event([{"error": {"message": "it burns"}}], name="error"), "it burns"),
        (event(b"it burns", name="error"), "it burns"),
        (event({}, name="error"), "reported an error"),
        (event(b"{broken", name="error"), "{broken"),
        (event({"error": "it burns"}, name="message"), "it burns"),
        (b'{"error": {"message": "it burns"}}\n', "it burns"),
        (b'{"error":"it burns"}', "it burns"),
        (event({"error": {"code": "INTERNAL", "status": 503, "message": "it burns"}}), "HTTP 503"),
        (event(b'data: {"error": "it burns"}'), "it burns"),
        (event({"base_resp": {"status_code": 1004, "status_msg": "login fail"}}), "login fail"),
        (event({"choices": [], "usage": {}, "base_resp": {"status_code": 1027, "status_msg": "sensitive"}}), "sensit"),
        (event({"Response": {"Error": {"Code": "AuthFailure", "Message": "it burns"}}}), "it burns"),
    ],
)
def test_an_error_is_recognized_under_any_name_of_its_event(stream: bytes, words: str) -> None:
    for before in (b"", event(delta("so far"))):
        read = Read(before, stream)
        assert read.failure is not None
        assert words in str(read.failure)
    assert Read(event(delta("whole")), event(finish()), stream).failure is None, (
        "data after a whole reply does not fail it"
    )


def test_a_status_that_says_success_is_no_error() -> None:
    status = {"base_resp": {"status_code": 0, "status_msg": "success"}}
    assert Read(event({**delta("a"), **status}), event({**usage(1, 2), **status}), event(finish())).text == "a"


@pytest.mark.parametrize("name", ["", "message"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_that_one_line_end_separates_are_read_as_several(name: str, end: bytes) -> None:
    payloads: list[object] = [delta("a"), delta("b"), b": keepalive", delta("c"), finish(), DONE]
    stream = b"".join(event(payload, name=name, end=b"\n").replace(b"\n", end) for payload in payloads)
    for tail in (b"", end):
        assert Read(stream + tail).events == [*map(TextDelta, "abc"), STOP]
        assert Read(*(bytes([byte]) for byte in stream + tail)).events == [*map(TextDelta, "abc"), STOP]


def test_events_that_one_line_end_separates_have_names_of_their_own() -> None:
    ping = event({"message": "still here"}, name="ping", end=b"\n")
    texts = [event(delta(text), name="message", end=b"\n") for text in "abc"]
    stream = [texts[0], ping, ping, texts[1], ping, texts[2], event(finish(), name="message", end=b"\n")]
    for chunks in (stream, [b"".join(stream)]):
        assert Read(*chunks).events == [*map(TextDelta, "abc"), STOP]


def test_joined_data_that_is_no_json_is_tried_line_by_line() -> None:
    for joined in (
        b"%b\ndata: : keepalive",
        b"waiting for [\ndata: %b",
        b"\ndata: %b\ndata: ",
        b"x\ndata: x\ndata: %b",
    ):
        stream = [event(joined % json.dumps(delta(text)).encode()) for text in "ab"]
        assert Read(*stream, event(finish())).text == "ab"
    assert Read(event(b"x\ndata: " * 500_000)).code == "upstream_protocol"


def test_events_that_one_line_end_separates_come_one_by_one() -> None:
    """If all events came at the end, they would be late and could be too large."""
    decoder = ReplyDecoder(redact=str)
    assert decoder.feed(event(delta("a"), end=b"\n")) == []
    assert decoder.feed(event(delta("b"), end=b"\n")) == [TextDelta("a"), TextDelta("b")]
    assert decoder.feed(event(delta("c"), end=b"\n")) == [TextDelta("c")]
    assert decoder.feed(event(finish(), end=b"\n")) == []
    assert decoder.feed(event(DONE, end=b"\n")) == [STOP]


@pytest.mark.parametrize("tail", [b"\n\n", b"\r\ndata: \r\n\r\n", b"\ndata: \ndata: \n\n"])
def test_a_repeated_name_of_a_field_is_ignored(tail: bytes) -> None:
    """sse-starlette sends such names if an application gives it lines that are framed already."""
    payloads = (delta("a"), delta("b"), finish(), DONE)
    assert Read(*(b"data: " + event(payload, end=tail) for payload in payloads)).events == [*map(TextDelta, "ab"), STOP]
    assert Read(event(b"data:" * 20_000 + b"x")).code == "upstream_protocol"


def test_json_over_several_lines_stays_one_event() -> None:
    for indent in (0, 1, "\t"):
        pretty = json.dumps(delta("a") | {"x": [{}, {}, [{"y": {}}]]}, indent=indent).encode()
        for stray in (b"", b"data: : keepalive\n"):
            stream = stray + b"".join(b"data: %b\n" % line for line in pretty.split(b"\n")) + b"\n"
            if not stray:
                assert Read(stream, event(finish())).events == [TextDelta("a"), STOP]
    assert Read(b"data: : keepalive\n" + event(delta("a")), event(finish())).text == "a"


# Events that are too large


def image(size: int) -> dict[str, Any]:
    """A chunk with an image of ``size`` bytes, as OpenRouter sends it."""
    url = "data:image/png;base64," + "A" * size
    return {"choices": [{"index": 0, "delta": {"images": [{"image_url": {"url": url}}]}}]}


@pytest.mark.parametrize("end", [b"\n\n", b"\n", b"\r\n\r\n"])
@pytest.mark.parametrize("cut", [1000, 65536, 10**9])
def test_an_image_between_texts_is_skipped_and_logged(end: bytes, cut: int) -> None:
    payloads = (delta("a"), image(2_000_000), delta("b"), image(1_500_000), delta("c"), finish(), DONE)
    stream = b"".join(event(payload, end=end) for payload in payloads) + end
    read = Read(*(stream[at : at + cut] for at in range(0, len(stream), cut)))
    assert (read.text, read.events[-1]) == ("abc", STOP)
    assert [sentence for sentence, _ in read.told] == [
        f"The model server sent an event of more than {EVENT_BYTES_MAX} bytes; the event is skipped."
    ]


def test_a_large_image_is_progress_at_its_end_and_a_large_comment_is_none() -> None:
    decoder = ReplyDecoder(redact=str)
    large = event(image(2_000_000))
    assert decoder.feed(large[:-2]) == []
    assert decoder.feed(large[-2:]) == [Progress()]
    assert decoder.feed(b": " + b"x" * 2_000_000) == []
    assert decoder.feed(b"\n\nevent: " + b"x" * 2_000_000) == []
    assert decoder.feed(b"\ndata: x\n\nevent: image\n" + large) == []
    assert decoder.feed(event(delta("a"))) == [TextDelta("a")]


def test_a_large_event_is_not_collected() -> None:
    decoder = ReplyDecoder(redact=str)
    decoder.feed(b"data: ")
    piece = b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(SKIPPED_BYTES_MAX // len(piece) - 1):
            assert decoder.feed(piece) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * EVENT_BYTES_MAX
    assert decoder.failure is None
    decoder.feed(piece * 2)
    assert decoder.failure is not None
    assert str(decoder.failure) == f"The model server sent an event of more than {SKIPPED_BYTES_MAX} bytes."


def test_a_reply_fails_if_the_skipped_event_may_have_been_the_reply() -> None:
    whole = event(delta("x" * 2_000_000))
    for end in ([event(finish()), event(DONE)], [event(DONE)], []):
        read = Read(whole, *end)
        assert read.code == "upstream_protocol"
        assert f"more than {EVENT_BYTES_MAX} bytes" in str(read.failure)


def test_a_chunk_with_too_many_parts_is_no_chunk_and_a_long_text_is_one() -> None:
    """Decoding a megabyte of "{}" would block the event loop for 50 ms."""
    parts = [b'{"choices":[%b{}]}' % (b"{}," * 300_000), b'{"error":[%b1]}' % (b"1," * 500_000)]
    for payload in (*parts, b'{"error":[%b1]}' % (b'"",' * 300_000)):
        assert Read(event(delta("a")), event(payload), event(finish())).events == [TextDelta("a"), STOP]
    for text in ("a, b, {c}, [d]; " * 30_000, '"{\\,' * 20_000, "你好" * 60_000):
        assert Read(event(delta(text)), event(finish())).text == text


# Work that is no text


def working(**members: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": members}]})


@pytest.mark.parametrize(
    "chunk",
    [
        working(tool_calls=[{"index": 0, "function": {"arguments": "abc"}}]),
        working(role="assistant", content=None, tool_calls=[{"id": "1", "function": {"name": "", "arguments": ""}}]),
        working(function_call={"arguments": "a"}),
        working(content="", reasoning_details=[{"type": "reasoning.text", "pieces": "x" * 20}]),
        working(reasoning_opaque="gAAA"),
        working(encrypted_content="gAAA"),
        working(thinking_blocks=[{"type": "thinking", "thinking": "x"}]),
        working(extra_content={"google": {"thought_signature": "x"}}),
        working(audio={"data": "UklGR"}),
        working(images=[{"image_url": {"url": "data:"}}]),
        working(content=[{"type": "image_url", "image_url": {"url": "data:"}}]),
        event({"choices": [{"message": {"tool_calls": [{"id": "1"}]}}]}),
    ],
)
def test_work_that_is_no_text_is_progress(chunk: bytes) -> None:
    decoder = ReplyDecoder(redact=str)
    assert decoder.feed(chunk) == [Progress()]
    assert decoder.feed(chunk * 3) == [Progress()]
    assert decoder.feed(event(delta("a"))) == [TextDelta("a")]
    assert decoder.feed(event(finish())) + decoder.end() == [STOP]


@pytest.mark.parametrize(
    "chunk",
    [
        working(),
        working(role="assistant", content=""),
        working(role="assistant", name="bot", id="1", type="text", content=None, refusal=None),
        working(content="", tool_calls=[], function_call=None, reasoning_details=[], audio={}, reasoning_content=""),
        working(tool_calls=[{}], extra_content={"google": None}, thinking_blocks=[None, ""]),
        event({"choices": [{"index": 0}]}),
        event({"choices": []}),
        event(usage(1, 1)),
    ],
)
def test_data_that_only_keeps_a_connection_open_is_no_progress(chunk: bytes) -> None:
    decoder = ReplyDecoder(redact=str)
    assert decoder.feed(chunk * 5) == []


# Choices


def piece(index: int | None, text: str = "", reason: str | None = None, **more: object) -> dict[str, Any]:
    members: dict[str, Any] = {"delta": {"content": text} if text else {}, "finish_reason": reason, **more}
    return {"choices": [members | ({} if index is None else {"index": index})]}


def read_pieces(*pieces: dict[str, Any]) -> Read:
    return Read(*map(event, pieces), event(DONE))


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        # Several choices: the first one with a text is kept.
        ([(0, "a"), (1, "x"), (0, "b"), (1, "y"), (0, "", "stop"), (1, "", "stop")], "ab"),
        ([(0, ""), (1, ""), (0, "a"), (1, "x"), (0, "b", "stop"), (1, "y", "stop")], "ab"),
        ([(0, ""), (1, ""), (1, "x"), (0, "a"), (1, "y", "stop"), (0, "b", "stop")], "ab"),
        ([(1, "a"), (0, "x"), (1, "b"), (0, "y"), (1, "", "stop"), (0, "", "stop")], "ab"),
        ([(0, "a"), (1, "x"), (2, "p"), (0, "b"), (2, "q"), (1, "y"), (0, "", "stop")], "ab"),
        ([(0, "a"), (0, "b"), (1, "x"), (1, "y"), (0, "c"), (1, "z"), (0, "", "stop")], "abc"),
        ([(0, "a"), (0, "b", "stop"), (1, "x"), (1, "y", "stop")], "ab"),
        ([(0, "a", "stop"), (1, "x", "stop")], "a"),
        ([(0, "a", "stop"), *[(1, "x")] * 9, (1, "", "stop")], "a"),
        ([(1, "a"), *[(0, "x")] * 9, (0, "", "stop"), (1, "b"), (1, "", "stop")], "ab"),
        ([(0, "a"), (1, "x"), (0, "", "stop"), (1, "", "stop")], "a"),
        # One choice, whose index is counted up: all its pieces are read.
        ([(number, letter) for number, letter in enumerate("abcdefghijklm")] + [(13, "", "stop")], "abcdefghijklm"),
        ([(number, letter) for number, letter in enumerate("abcdefghijklm", 1)] + [(14, "", "stop")], "abcdefghijklm"),
        ([(number, letter) for number, letter in enumerate("abcdefghijklm")] + [(0, "", "stop")], "abcdefghijklm"),
        ([(0, "a"), (1, "b", "stop")], "ab"),
        ([(0, "a"), (1, "b"), (2, "c", "stop")], "abc"),
        ([(0, "a"), (1, "b"), (0, "", "stop")], "ab"),
        ([(0, ""), (1, "a"), (1, "b"), (1, "c"), (1, "", "stop")], "abc"),
        ([(0, ""), (1, "a"), (2, "b")], "ab"),
        # One choice in the right form, or almost.
        ([(3, "a"), (3, "b"), (3, "", "stop")], "ab"),
        ([(None, "a"), (0, "b"), (None, "c"), (0, "", "stop")], "abc"),
        ([(0, "a"), (None, "b"), (0, "c"), (None, "", "stop")], "abc"),
        ([("0", "a"), ("0", "b"), ("0", "", "stop")], "ab"),
    ],
)
def test_one_choice_is_kept_and_one_that_is_counted_up_is_whole(pieces: list[Any], text: str) -> None:
    read = read_pieces(*(piece(*said) for said in pieces))
    assert read.failure is None
    assert read.text == text
    assert read.events[-1] == STOP


def test_reasoning_and_text_may_have_indexes_of_their_own() -> None:
    thought = {"choices": [{"index": 0, "delta": {"reasoning": "hm"}}]}
    read = read_pieces(thought, thought, *(piece(1, letter) for letter in "abcdefghijkl"), piece(1, "", "stop"))
    assert (read.reasoning, read.text) == ("hmhm", "abcdefghijkl")


@pytest.mark.parametrize("index", [{}, [], "0", None])
def test_a_held_choice_whose_index_is_no_number_counts_as_the_first(index: object) -> None:
    pieces = ((0, "a", None), (1, "b", None), (0, "", None), (index, "c", "stop"))
    chunks = ({"choices": [{"index": n, "delta": {"content": said}, "finish_reason": end}]} for n, said, end in pieces)
    read = Read(*map(event, chunks))
    assert (read.text, read.events[-1]) == ("abc", STOP)


def test_two_choices_in_a_chunk_are_one_and_two_pieces_of_one_are_two() -> None:
    both = {"choices": [*piece(0, "a")["choices"], *piece(1, "x")["choices"]]}
    assert read_pieces(both, both, piece(0, "", "stop")).text == "aa"
    assert read_pieces({"choices": both["choices"][::-1]}, both, piece(0, "", "stop")).text == "xx"
    unnumbered = {"choices": [*piece(None, "a")["choices"], *piece(None, "x")["choices"]]}
    assert read_pieces(unnumbered, unnumbered, piece(None, "", "stop")).text == "aa"
    twice = {"choices": [*piece(0, "a")["choices"], *piece(0, "b")["choices"]]}
    assert read_pieces(twice, twice, piece(0, "", "stop")).text == "abab"
    whole = {"choices": [{"index": index, "message": {"content": str(index)}} for index in range(3)]}
    assert Read(json.dumps(whole).encode()).text == "0"


def test_a_piece_that_is_held_back_is_progress_and_comes_after_a_few_pieces() -> None:
    decoder = ReplyDecoder(redact=str)
    assert decoder.feed(event(piece(1, "a"))) == [TextDelta("a")]
    for number in range(2, 9):
        assert decoder.feed(event(piece(number, "b"))) == [Progress()]
    assert decoder.feed(event(piece(9, "c"))) == [*[TextDelta("b")] * 7, TextDelta("c")]
    assert decoder.feed(event(piece(10, "d"))) == [TextDelta("d")]
    other = ReplyDecoder(redact=str)
    other.feed(event(piece(0, "a")) + event(piece(1, "x")) + event(piece(0, "b")))
    assert other.feed(event(piece(1, "y"))) == [], "another choice's work is no progress of this one"


@given(
    count=st.integers(2, 5),
    texts=st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=3), min_size=2, max_size=12),
    burst=st.integers(1, 3),
    roles=st.booleans(),
)
def test_any_choices_that_come_in_turns_give_the_first(count: int, texts: list[str], burst: int, roles: bool) -> None:
    pieces = [piece(index) for index in range(count)] if roles else []
    for start in range(0, len(texts), burst):
        for index in range(count):
            pieces += [piece(index, text if index == 0 else "X") for text in texts[start : start + burst]]
    if len(texts) > burst and burst * (count - 1) < 8:
        assert read_pieces(*pieces, *(piece(index, "", "stop") for index in range(count))).text == "".join(texts)


@given(
    texts=st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=3), min_size=1, max_size=20),
    first=st.integers(0, 2),
    last=st.sampled_from(["with the text", "counted", "first", "none"]),
)
def test_any_reply_that_is_counted_up_is_whole(texts: list[str], first: int, last: str) -> None:
    pieces = [piece(number, text) for number, text in enumerate(texts, first)]
    if last == "with the text":
        pieces[-1]["choices"][0]["finish_reason"] = "stop"
    elif last != "none":
        pieces.append(piece(first + len(texts) if last == "counted" else first, "", "stop"))
    read = read_pieces(*pieces)
    assert (read.text, read.events[-1]) == ("".join(texts), STOP)


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [{"index": 0, "text": "hi", "finish_reason": None}]},
        {"choices": [{"text": "hi", "delta": None}]},
        {"choices": [{"text": "hi", "delta": {}}]},
        {"choices": [{"text": "hi", "delta": {"content": "hi"}}]},
        {"choices": [{"text": ["h", {"text": "i"}]}]},
    ],
)
def test_the_text_of_a_server_that_completes_prompts_is_read(chunk: dict[str, Any]) -> None:
    assert Read(event(chunk), event(finish())).events == [TextDelta("hi"), STOP]
    assert Read(json.dumps(chunk).encode()).events == [TextDelta("hi"), STOP]


# All of it at once

names = st.sampled_from(["", "", "message"])
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
chunks_of_text = st.tuples(words, names, st.sampled_from(["content", "text", "pretty", "plain"]))
others = st.sampled_from([*NOT_OURS, working(tool_calls=[{"id": "1"}]), event(image(3000)), b":" + b"x" * 3000 + b"\n"])


def encode_text(text: str, name: str, shape: str) -> bytes:
    if shape == "text":
        return event({"choices": [{"index": 0, "text": text}]}, name=name)
    if shape == "pretty":
        lines = json.dumps(delta(text), indent=1).encode().split(b"\n")
        return event(b"\ndata: ".join(lines), name=name)
    return event(delta(text) if shape == "content" else json.dumps(delta(text), ensure_ascii=False).encode(), name=name)


@given(
    mixture=st.lists(others | chunks_of_text, max_size=14),
    end=st.sampled_from(["stop", "done", "cut", "error"]),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    encoding=st.sampled_from(["", "", "gzip", "zlib", "raw"]),
    data=st.data(),
)
def test_any_mixture_gives_the_text_and_the_right_end(
    mixture: list[Any], end: str, line_end: bytes, encoding: str, data: st.DataObject
) -> None:
    text = "".join(part[0] for part in mixture if isinstance(part, tuple))
    last = {
        "stop": event(finish()) + data.draw(others) + event(DONE),
        "done": event(DONE),
        "cut": b"",
        "error": event({"error": {"message": "it burns"}}),
    }[end]
    parts = [part if isinstance(part, bytes) else encode_text(*part) for part in [*mixture, last]]
    stream = b"".join(parts).replace(b"\n", line_end)
    if encoding:
        compressor = zlib.compressobj(wbits={"gzip": 31, "zlib": 15, "raw": -15}[encoding])
        stream = compressor.compress(stream) + compressor.flush()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_completions, "EVENT_BYTES_MAX", 2000)
        read = Read(
            *(stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)),
            encoding={"gzip": "gzip", "zlib": "deflate", "raw": "deflate"}.get(encoding, ""),
        )
    has_image = event(image(3000)) in b"".join(parts)
    assert read.text == text
    assert len(read.told) <= 2
    if end == "error":
        assert (read.code, "it burns" in str(read.failure)) == ("upstream_error", True)
    elif has_image and not text:
        assert read.code == "upstream_protocol"
    elif end == "stop" or (end == "done" and text):
        assert read.events[-1] == STOP
    else:
        assert read.code in ("upstream_truncated", "upstream_protocol")


# The cost for the event loop


class Body:
    """A response's body that has arrived already: a read waits for one round of the event loop, as from a socket."""

    def __init__(self, *chunks: bytes) -> None:
        self._rest = list(chunks)

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._rest.pop(0) if self._rest else b""


@pytest.mark.parametrize(
    "chunks",
    [
        [event(b"{") * 20_000, event(finish())],
        [event(b": x")] * 1000 + [event(finish())],
        [bytes([byte]) for byte in event(delta("a" * 1000)) + event(finish())],
        [event(delta("a"))] * 1000 + [event(finish())],
    ],
)
async def test_other_tasks_run_while_much_data_is_read(chunks: list[bytes]) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    fed: list[int] = []

    class Noting(ReplyDecoder):
        def feed(self, chunk: bytes) -> list[ModelEvent]:
            fed.append(len(chunk))
            return super().feed(chunk)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            await take(OpenAICompatibleStream(Body(*chunks), Noting(redact=str)))
            nursery.cancel_scope.cancel()
    assert max(fed) <= 8 * 1024
    assert turns > max(len(chunks) // 128, sum(map(len, chunks)) // (16 * 1024))


async def test_a_reply_in_gzip_is_a_reply(autojump_clock: MockClock) -> None:
    body = gzip.compress(b"".join(map(event, (reasoning("hm"), delta("a"), finish(), DONE))))
    stream = OpenAICompatibleStream(Body(*_inflated((body,), "gzip")), ReplyDecoder(redact=str))
    assert (await take(stream)).text == "a"
