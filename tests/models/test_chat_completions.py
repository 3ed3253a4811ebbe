"""Variants of OpenAI's format that the decoder reads. Each test names servers that send the variant."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from service.errors import ModelError
from service.models.chat_chunks import Chunk, decode_chunk, join_surrogates
from service.models.chat_completions import BODY_BYTES_MAX, Dialect, ReplyDecoder
from service.models.client import Finished, ModelEvent, ReasoningDelta, TextDelta, Usage
from service.models.upstream_errors import ErrorReply
from tests.models.replies import asking
from tests.upstreams.raw_server import DONE, delta, finish, usage

STOP = Finished(finish_reason="stop")


def new_decoder(*, described: str | None = None) -> ReplyDecoder:
    return ReplyDecoder(redact=str, described=described)


def event(payload: object) -> bytes:
    return b"data: %b\n\n" % (payload if isinstance(payload, bytes) else json.dumps(payload).encode())


def read(*payloads: object) -> list[ModelEvent]:
    """The events of a stream that ends after the last payload."""
    return read_bytes(*map(event, payloads))


def read_bytes(*chunks: bytes, described: str | None = None) -> list[ModelEvent]:
    decoder = new_decoder(described=described)
    events: list[ModelEvent] = []
    for chunk in chunks:
        events += decoder.feed(chunk)
        if decoder.failure is not None:
            raise decoder.failure
    return events if decoder.finished else events + decoder.end()


def failure(*chunks: bytes, described: str | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_bytes(*chunks, described=described)
    return caught.value


def choice(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **members}]}


def content(said: object) -> dict[str, Any]:
    return choice(delta={"content": said})


# Texts in other shapes


@pytest.mark.parametrize(
    ("payload", "events"),
    [
        (content([{"type": "text", "text": "hi"}]), [TextDelta("hi")]),
        (content(["h", "i"]), [TextDelta("hi")]),
        (content({"text": "hi"}), [TextDelta("hi")]),
        (
            content(
                [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "x"}]
            ),
            [ReasoningDelta("hm"), TextDelta("x")],
        ),
        (choice(delta={"content": 7, "reasoning_content": {"text": "hm"}}), [ReasoningDelta("hm")]),
        (choice(delta={"content": [], "reasoning": [{"text": "hm"}]}), [ReasoningDelta("hm")]),
        (choice(delta={"refusal": "No."}), [TextDelta("No.")]),
        (choice(delta="x"), []),
        (choice(message={"role": "assistant", "content": "hi"}), [TextDelta("hi")]),
        ({"choices": [None]}, []),
        ({"choices": "none"}, []),
        (b'{"choices": [{"delta": {"content": "a\xffb"}}]}', [TextDelta("a\ufffdb")]),
        (b'{"choices": [{"delta": {"content": "a\tb"}}]}', [TextDelta("a\tb")]),
        (b'{"choices": [{"delta": {"content": "a"}, "logprob": NaN}]}', [TextDelta("a")]),
        (b"null", []),
        (b"[]", []),
        (b'{"type": "ping"}', []),
    ],
)
def test_a_chunk_in_another_shape_is_read_as_far_as_possible(payload: object, events: list[ModelEvent]) -> None:
    assert read(payload, finish(), DONE) == [*events, STOP]


@pytest.mark.parametrize(
    ("payloads", "texts"),
    [
        ([rb'"\ud83d\ude00"'], ["\U0001f600"]),
        ([rb'"a\ud83d"', rb'"\ude00b"'], ["a", "\U0001f600b"]),
        ([rb'"\ud83d"', rb'"\ude00"'], ["\U0001f600"]),
        ([rb'"\ud83d"', b'"x"'], ["\ufffdx"]),
        ([rb'"\ude00x"'], ["\ufffdx"]),
        ([rb'"a\ud83db"'], ["a\ufffdb"]),
        ([rb'"a\ud83d"'], ["a"]),
    ],
)
def test_halves_of_a_character_are_put_together(payloads: list[bytes], texts: list[str]) -> None:
    chunks = [b'{"choices": [{"delta": {"content": %b}}]}' % payload for payload in payloads]
    assert read(*chunks, finish(), DONE) == [*map(TextDelta, texts), STOP]


@given(st.text())
def test_a_text_without_lone_surrogates_stays_the_same(text: str) -> None:
    whole = text.encode("utf-8", "replace").decode()
    assert join_surrogates(whole) == whole


@given(st.text(alphabet=st.characters(categories=["Cs", "Lu"])))
def test_any_text_can_be_encoded_once_its_surrogates_are_joined(text: str) -> None:
    join_surrogates(text).encode()


NAMES = [
    *("choices", "delta", "message", "content", "text", "thinking", "reasoning", "finish_reason", "usage"),
    *("prompt_tokens", "completion_tokens_details", "reasoning_tokens", "error", "code", "detail", "loc"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=16,
)


@given(st.lists(json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), max_size=4))
def test_any_data_becomes_a_reply_or_an_error_of_the_model(payloads: list[bytes]) -> None:
    try:
        events = read(*payloads)
    except ModelError as error:
        words, counts = [str(error)], []
    else:
        words = [event.text for event in events if isinstance(event, TextDelta | ReasoningDelta)]
        assert isinstance(events[-1], Finished)
        used = events[-1].usage or Usage(input_tokens=0, output_tokens=0)
        counts = [used.input_tokens, used.output_tokens, used.reasoning_tokens]
    msgspec.json.encode(words)
    assert all(words)
    assert all(0 <= count <= 10**12 for count in counts)


def test_a_usual_chunk_is_decoded_strictly() -> None:
    assert decode_chunk(json.dumps(delta("x")).encode()) == msgspec.json.decode(json.dumps(delta("x")), type=Chunk)


@pytest.mark.parametrize("payload", [b"[" * 100_000, b'{"error":' * 100_000, b'{"a":[' * 400 + b"]}" * 400])
def test_deeply_nested_data_causes_no_crash(payload: bytes) -> None:
    assert failure(event(payload)).code in ("upstream_protocol", "upstream_truncated")
    assert failure(payload).code == "upstream_protocol"


# Usage in other shapes


@pytest.mark.parametrize(
    ("told", "counted"),
    [
        ({"prompt_tokens": 3.0, "completion_tokens": 14417.92}, (3, 14417, 0)),
        ({"prompt_tokens": "3", "completion_tokens": []}, (0, 0, 0)),
        ({"prompt_tokens": -2, "completion_tokens": 2**70}, (0, 10**12, 0)),
        ({"prompt_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 2.5}}, (1, 0, 2)),
        ({"prompt_tokens": 1.0, "completion_tokens_details": "none"}, (1, 0, 0)),
        ({"prompt_tokens": float("nan"), "completion_tokens": float("inf")}, (0, 0, 0)),
    ],
)
def test_odd_counts_of_tokens_fail_no_reply(told: object, counted: tuple[int, int, int]) -> None:
    expected = Usage(input_tokens=counted[0], output_tokens=counted[1], reasoning_tokens=counted[2])
    assert read(delta("x"), finish(), {"choices": [], "usage": told}, DONE) == [
        TextDelta("x"),
        Finished(finish_reason="stop", usage=expected),
    ]


@pytest.mark.parametrize(
    ("told", "cached"),
    [
        ({}, UNSET),
        ({"prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0}}, 64),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, 0),
        ({"prompt_tokens_details": None}, UNSET),
        ({"prompt_tokens_details": {"cached_tokens": None}, "prompt_cache_hit_tokens": 7}, 7),
        ({"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36}, 64),
        ({"prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": 100}, 0),
        ({"cached_tokens": 9}, 9),
        ({"cache_read_input_tokens": 9, "cache_creation_input_tokens": 3}, 9),
        ({"prompt_tokens_details": {"cached_tokens": -5}}, 0),
        ({"prompt_tokens_details": {"cached_tokens": 2**70}}, 10**12),
        ({"prompt_tokens_details": {"cached_tokens": 2.5}}, 2),
        ({"prompt_tokens_details": [], "cached_tokens": "many"}, UNSET),
    ],
)
def test_cached_tokens_are_read_in_every_form_and_only_where_they_are_told(
    told: dict[str, object], cached: int | UnsetType
) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 2} | told
    *_, finished = read(delta("x"), finish(), {"choices": [], "usage": usage}, DONE)
    assert finished == Finished(
        finish_reason="stop", usage=Usage(input_tokens=100, output_tokens=2, cached_tokens=cached)
    )


@pytest.mark.parametrize(
    ("told", "output", "reasoning"),
    [
        ({"completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 40}, "total_tokens": 60}, 50, 40),
        ({"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 94}, "total_tokens": 113}, 103, 94),
        ({"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 19}, 9, 0),
        ({"completion_tokens": 9, "reasoning_tokens": 4, "total_tokens": 19}, 9, 4),
        ({"completion_tokens": 9, "reasoning_tokens": 4}, 9, 4),
    ],
)
def test_reasoning_is_a_part_of_the_output_also_where_a_server_counts_it_beside(
    told: dict[str, object], output: int, reasoning: int
) -> None:
    *_, finished = read(delta("x"), finish(), {"choices": [], "usage": {"prompt_tokens": 10} | told}, DONE)
    assert isinstance(finished, Finished)
    assert finished.usage == Usage(input_tokens=10, output_tokens=output, reasoning_tokens=reasoning)


def test_what_a_server_counts_in_each_piece_is_known_before_the_end() -> None:
    decoder = new_decoder()
    assert decoder.usage is None
    for written in (1, 2):
        counted = {"usage": {"prompt_tokens": 7, "completion_tokens": written}}
        decoder.feed(event(delta("x") | counted))
        assert decoder.usage == Usage(input_tokens=7, output_tokens=written)
    decoder.feed(event({"choices": [], "usage": {}}))
    assert decoder.usage == Usage(input_tokens=7, output_tokens=2), "an empty count says nothing"


def test_usage_in_another_type_is_none() -> None:
    assert read(delta("x"), finish(), {"choices": [], "usage": [1]}, DONE)[-1] == STOP


# Ends


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("model_length", "length"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("content_filter: RECITATION", "content_filter"),
        ("STOP", "stop"),
    ],
)
def test_other_finish_reasons(reason: str, told: str) -> None:
    (_, finished) = read(delta("x"), finish(reason), DONE)
    assert isinstance(finished, Finished)
    assert finished.finish_reason == told


@pytest.mark.parametrize(
    "payloads",
    [
        [choice(delta={"content": "a"}, finish_reason="stop"), choice(delta={"content": "b"}, finish_reason="stop")],
        [finish(), delta("a"), delta("b"), finish()],
        [choice(delta={"content": "a"}, finish_reason="null"), delta("b"), finish()],
        [delta("a"), delta("b"), DONE],
        [delta("a"), delta("b"), {"choices": [{"finishReason": "STOP"}]}, DONE],
        [delta("a"), delta("b"), b"[DONE] "],
    ],
)
def test_a_text_is_read_to_its_end_for_each_sign_of_an_end(payloads: Sequence[object]) -> None:
    assert read(*payloads) == [TextDelta("a"), TextDelta("b"), STOP]


def test_a_stop_before_any_text_is_not_the_end_yet() -> None:
    decoder = new_decoder()
    decoder.feed(event(finish()))
    assert (decoder.has_finish_reason, decoder.is_whole) == (True, False)
    decoder.feed(event(delta("late")))
    assert decoder.is_whole
    assert decoder.feed(event(DONE)) == [STOP]
    called = new_decoder()
    called.feed(event(finish("tool_calls")))
    assert called.is_whole, "the decoder waits for no text"


@pytest.mark.parametrize("last", [[DONE], [], [usage(1, 2), DONE]])
def test_done_without_a_text_is_no_reply(last: list[object]) -> None:
    assert failure(*map(event, last)).code == "upstream_truncated"


def test_an_end_without_done_and_without_a_reason_is_truncated() -> None:
    assert failure(event(delta("half"))).code == "upstream_truncated"


def test_a_last_event_without_its_blank_line_counts_if_it_is_whole() -> None:
    assert read_bytes(event(delta("a")), event(finish()).rstrip()) == [TextDelta("a"), STOP]
    assert read_bytes(event(delta("a")), b"data: [DONE]") == [TextDelta("a"), STOP]
    assert failure(event(delta("a")), event(finish()).rstrip()[:-3]).code == "upstream_truncated"


def test_data_after_a_whole_reply_does_not_fail_it() -> None:
    assert read(delta("a"), finish(), b"garbage", usage(1, 2), DONE) == [
        TextDelta("a"),
        Finished(finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=2)),
    ]
    assert read(delta("a"), finish(), {"error": "late"}) == [TextDelta("a"), STOP]
    assert failure(event(delta("a")), event({"error": "early"})).code == "upstream_error"


def test_a_repeated_text_at_the_end_is_not_part_of_the_reply() -> None:
    """MiniMax repeats the whole text in its last chunk."""
    whole = choice(message={"content": "ab"}, finish_reason="stop")
    assert read(delta("a"), delta("b"), whole, DONE) == [TextDelta("a"), TextDelta("b"), STOP]


# Errors in the stream


@pytest.mark.parametrize(
    ("stream", "code", "words"),
    [
        (
            b'error: {"code":400,"message":"exceeds the available context size"}\n\ndata: [DONE]\n\n',
            "context_too_long",
            "ex",
        ),
        (event({"object": "error", "message": "no memory", "code": 500}), "upstream_error", "no memory"),
        (event({"message": "out of memory"}), "upstream_error", "out of memory"),
        (event([{"error": {"code": 503, "message": "overloaded"}}]), "upstream_error", "overloaded"),
        (event(choice(delta={"content": ""}, error={"code": 502, "message": "gone"})), "upstream_error", "gone"),
        (event({"error": {"message": "unfinished"}}).rstrip(), "upstream_error", "unfinished"),
    ],
)
def test_an_error_in_another_shape_is_reported(stream: bytes, code: str, words: str) -> None:
    for before in ([], [event(delta("so far"))]):
        error = failure(*before, stream)
        assert error.code == code
        assert words in str(error)


# Bodies that are no event stream


@pytest.mark.parametrize("described", [None, "application/json", "text/plain"])
def test_a_whole_completion_is_a_reply(described: str | None) -> None:
    body = {
        **choice(message={"role": "assistant", "content": "hi", "reasoning_content": "hm"}, finish_reason="length"),
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    encoded = json.dumps(body, indent=2).encode()
    for cuts in ([encoded], [b"\r\n", encoded], [encoded[i : i + 1] for i in range(len(encoded))]):
        assert read_bytes(*cuts, described=described) == [
            ReasoningDelta("hm"),
            TextDelta("hi"),
            Finished(finish_reason="length", usage=Usage(input_tokens=1, output_tokens=2)),
        ]
    assert read_bytes(json.dumps(choice(message={"content": "hi"})).encode()) == [TextDelta("hi"), STOP]


@pytest.mark.parametrize("described", [None, "application/json", "text/plain"])
def test_an_event_stream_is_read_under_any_content_type(described: str | None) -> None:
    for start in (b": comment\n\n", b"\n\n", b"\xef\xbb\xbf", b"event: message\n", b""):
        stream = [start, event(delta("hi")), event(finish())]
        assert read_bytes(*stream, described=described) == [TextDelta("hi"), STOP]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>Sign in</html>", "text/html"),
        (b"Hello", "text/html"),
        (b"", "text/html"),
        (b'{"hello": 1}', "text/html"),
        (b'{"choices": []}', "text/html"),
        (b'{"half": ', "text/html"),
        (b'{"message": "unknown path"}', "It says: unknown path"),
        (b'{"message": {"content": "a"}}\n{"message": {"content": "b"}}\n', "text/html"),
    ],
)
def test_the_error_for_another_body_names_its_content_type(body: bytes, words: str) -> None:
    error = failure(body, described="text/html")
    assert (error.code, error.retryable) == ("upstream_protocol", False)
    assert words in error.upstream_words
    assert words not in error.message


def test_a_whole_body_has_a_bound() -> None:
    decoder = new_decoder()
    decoder.feed(b"{")
    for _ in range(BODY_BYTES_MAX // 65536):
        assert decoder.failure is None
        decoder.feed(b" " * 65536)
    assert decoder.failure is not None
    assert decoder.failure.code == "upstream_protocol"


# Dialects


@pytest.mark.parametrize(
    ("status", "words", "learned"),
    [
        (422, "body.stream_options.include_usage: Extra inputs are not permitted", Dialect(stream_options=False)),
        (400, "Unrecognized request argument supplied: stream_options", Dialect(stream_options=False)),
        (400, "Use 'max_completion_tokens' instead.", Dialect(limit_field="max_completion_tokens")),
        (400, "maximum context length is 4096; 'max_tokens' or 'max_completion_tokens' is too large", Dialect()),
        (429, "max_completion_tokens", Dialect()),
        (500, "stream_options", Dialect()),
        (400, "something else", Dialect()),
    ],
)
def test_a_dialect_is_learnt_from_a_refusal_that_names_it(status: int, words: str, learned: Dialect) -> None:
    reply = ErrorReply(words=words)
    assert Dialect().learn(asking(max_output_tokens=5), status, reply) == learned
    assert learned.learn(asking(max_output_tokens=5), status, reply) == learned, "that did not help"


def test_without_a_bound_there_is_nothing_to_rename() -> None:
    assert Dialect().learn(asking(), 400, ErrorReply(words="max_completion_tokens")) == Dialect()
