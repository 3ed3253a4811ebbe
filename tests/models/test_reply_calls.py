"""Calls in streamed replies: each way in which servers were seen to send them gives the same calls."""

import json
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ModelError
from service.models.chat_chunks import CallDelta, FunctionDelta
from service.models.chat_completions import EVENT_BYTES_MAX, Dialect, ReplyDecoder, encode_request
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    Finished,
    FunctionCall,
    FunctionCallOutput,
    ModelEvent,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
)
from service.models.reply_calls import CALLS_MAX, ReplyCalls
from tests.upstreams.raw_server import DONE, delta, finish

PARIS, OSLO = '{"city":"Paris"}', '{"city":"Oslo"}'


def chunk(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"tool_calls": list(calls), **more}}]}


def piece(arguments: object = None, *, name: str | None = None, **members: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {**members, "function": {key: value for key, value in function.items() if value is not None}}


def event(payload: object) -> bytes:
    return b"data: %b\n\n" % (payload if isinstance(payload, bytes) else json.dumps(payload).encode())


def read(*payloads: object) -> list[ModelEvent]:
    """The events of a stream that ends after the last payload."""
    return read_bytes(*map(event, payloads))


def read_bytes(*stream: bytes) -> list[ModelEvent]:
    decoder = ReplyDecoder(redact=str)
    events: list[ModelEvent] = []
    for data in stream:
        events += decoder.feed(data)
        assert decoder.failure is None
    return events if decoder.finished else events + decoder.end()


def calls_in(events: Sequence[ModelEvent]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call; a call's opening comes before its arguments, and the numbers count up."""
    calls: list[tuple[str, str, str]] = []
    for event in events:
        if isinstance(event, CallOpened):
            assert event.number == len(calls)
            calls.append((event.call_id, event.name, ""))
        elif isinstance(event, ArgumentsDelta):
            assert event.text
            call_id, name, arguments = calls[event.number]
            calls[event.number] = call_id, name, arguments + event.text
    return calls


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(
            [
                chunk(piece("", name="f", index=0, id="a", type="function"), role="assistant", content=None),
                *(chunk(piece(char, index=0)) for char in PARIS),
                chunk(piece("", name="g", index=1, id="b", type="function")),
                *(chunk(piece(char, index=1)) for char in OSLO),
            ],
            id="OpenAI",
        ),
        pytest.param(
            [
                chunk(piece("", name="f", index=0, id="a"), piece("", name="g", index=1, id="b")),
                chunk(piece(PARIS[:5], index=0), piece(OSLO[:5], index=1)),
                chunk(piece(OSLO[5:], index=1)),
                chunk(piece(PARIS[5:], index=0)),
            ],
            id="taking turns",
        ),
        pytest.param(
            [chunk(piece(PARIS, name="f", id="a")), chunk(piece(OSLO, name="g", id="b"))],
            id="without index, in chunks of their own",
        ),
        pytest.param([chunk(piece(PARIS, name="f", id="a"), piece(OSLO, name="g", id="b"))], id="without index"),
        pytest.param(
            [
                chunk(piece(PARIS[:3], name="f", id="a"), piece(OSLO[:3], name="g", id="b")),
                chunk(piece(PARIS[3:]), piece(OSLO[3:])),
            ],
            id="without index, in pieces side by side",
        ),
        pytest.param(
            [
                chunk(piece("", name="f", id="a")),
                *(chunk(piece(char)) for char in PARIS),
                chunk(piece("", name="g", id="b")),
                *(chunk(piece(char)) for char in OSLO),
            ],
            id="without index, in pieces",
        ),
        pytest.param(
            [
                chunk(piece(PARIS[:4], name="f", id="a")),
                chunk(piece(OSLO[:4], name="g", id="b")),
                chunk(piece(PARIS[4:], id="a")),
                chunk(piece(OSLO[4:], id="b")),
            ],
            id="without index, taking turns by id",
        ),
        pytest.param(
            [chunk(piece(PARIS, name="f", index=0, id="a")), chunk(piece(OSLO, name="g", index=0, id="b"))],
            id="all under index 0",
        ),
        pytest.param(
            [
                chunk(piece(PARIS[:4], name="f", index="0", id="a")),
                chunk(piece(PARIS[4:], index="0")),
                chunk(piece(OSLO, name="g", index=1.0, id="b")),
            ],
            id="index as a text or with a fraction",
        ),
        pytest.param(
            [
                *(chunk(piece(char, name="f", index=0, id="a")) for char in PARIS),
                *(chunk(piece(char, name="g", index=1, id="b")) for char in OSLO),
            ],
            id="id and name repeated",
        ),
        pytest.param(
            [
                *(
                    chunk(piece(c, name="f" if n == 0 else "", index=0, id=f"a{n}"[: n or 1]))
                    for n, c in enumerate(PARIS)
                ),
                *(
                    chunk(piece(c, name="g" if n == 0 else "", index=1, id=f"b{n}"[: n or 1]))
                    for n, c in enumerate(OSLO)
                ),
            ],
            id="another id and an empty name with each piece",
        ),
        pytest.param(
            [
                chunk({"index": 0, "id": "a"}),
                chunk(piece(PARIS[:2], index=0)),
                chunk(piece(PARIS[2:], name="f", index=0)),
                chunk({"index": 1, "id": "b", "function": None}),
                chunk(piece(OSLO, name="g", index=1)),
            ],
            id="the name after the id",
        ),
        pytest.param(
            [
                chunk(piece("{}", name="f", index=0, id="a")),
                chunk(piece(PARIS[:6], index=0)),
                chunk(piece(PARIS[6:], index=0)),
                chunk(piece("{}", name="g", index=1, id="b")),
                chunk(piece(OSLO, name="g", index=1, id="b")),
            ],
            id="after a placeholder",
        ),
        pytest.param(
            [
                chunk(piece({"city": "Paris"}, name="f", index=0, id="a")),
                chunk(piece({"city": "Oslo"}, name="g", index=1, id="b")),
            ],
            id="as an object",
        ),
        pytest.param(
            [
                chunk(piece(PARIS[:9], name="f", index=0, id="a")),
                chunk(piece(PARIS[9:], index=0)),
                chunk(piece(OSLO, name="g", index=1, id="b")),
                {"choices": [{"index": 0, "message": chunk(piece(PARIS, name="f", id="a"))["choices"][0]["delta"]}]},
                chunk(piece(OSLO, name="g", index=1, id="b")),
            ],
            id="and once more at the end",
        ),
        pytest.param(
            [
                {
                    "choices": [
                        {"message": {"tool_calls": [piece(PARIS, name="f", id="a"), piece(OSLO, name="g", id="b")]}}
                    ]
                }
            ],
            id="as a message",
        ),
    ],
)
@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
def test_calls_are_the_same_however_a_server_sends_them(chunks: list[dict[str, Any]], reason: str) -> None:
    events = read(*chunks, finish(reason), DONE)
    assert calls_in(events) == [("a", "f", PARIS), ("b", "g", OSLO)]
    assert events[-1] == Finished(finish_reason="tool_calls")


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(piece(PARIS, name="f", index=0)), chunk(piece(OSLO, name="f", index=0))],
        [chunk(piece(PARIS, name="f"), piece(OSLO, name="f"))],
        [chunk(piece(PARIS, name="f")), chunk(piece(OSLO, name="f"))],
        [chunk(piece(PARIS, name="f", index=0, id="")), chunk(piece(OSLO, name="f", index=1, id=""))],
        [chunk(piece(PARIS, name="f", index=0, id="a b")), chunk(piece(OSLO, name="f", index=1, id="\x07"))],
        [chunk(piece(PARIS, name="f", index=0, id=7)), chunk(piece(OSLO, name="f", index=1, id=7))],
    ],
)
def test_a_call_without_an_id_of_its_own_gets_one(chunks: list[dict[str, Any]]) -> None:
    (first, *_), (second, *_) = calls = calls_in(read(*chunks, finish("tool_calls")))
    assert [call[1:] for call in calls] == [("f", PARIS), ("f", OSLO)]
    assert first != second
    assert second.startswith("call_")


def test_the_form_before_tool_calls_is_a_call_as_well() -> None:
    pieces = ({"name": "f", "arguments": ""}, {"arguments": PARIS[:7]}, {"arguments": PARIS[7:]})
    chunks = ({"choices": [{"index": 0, "delta": {"function_call": function}}]} for function in pieces)
    ((_, name, arguments),) = calls_in(read(*chunks, finish("function_call")))
    assert (name, arguments) == ("f", PARIS)


@pytest.mark.parametrize("arguments", ["", "{}", "not JSON", '{"a": 1} ', '["a"]', "{}{}x"])
def test_arguments_are_kept_as_they_came(arguments: str) -> None:
    events = read(chunk(piece(arguments, name="f", index=0, id="a")), finish("tool_calls"))
    assert calls_in(events) == [("a", "f", arguments)]


def test_a_call_without_a_name_is_left_out() -> None:
    events = read(chunk(piece(PARIS, index=0, id="a")), delta("x"), finish())
    assert calls_in(events) == []
    assert events[-1] == Finished(finish_reason="stop")


def test_a_reply_of_calls_needs_no_finish_reason_before_done() -> None:
    assert read(chunk(piece(PARIS, name="f", id="a")), DONE)[-1] == Finished(finish_reason="tool_calls")


def test_a_reply_that_was_cut_off_in_a_call_is_no_reply_of_calls() -> None:
    assert read(chunk(piece(PARIS[:5], name="f", id="a")), finish("length"))[-1] == Finished(finish_reason="length")


def test_fields_that_only_the_server_knows_come_with_the_call() -> None:
    signature = {"google": {"thought_signature": "EjQKMg==", "n": 1.5}}
    opened = read(chunk(piece(PARIS, name="f", id="a", extra_content=signature)), finish("tool_calls"))[0]
    assert isinstance(opened, CallOpened)
    assert json.loads(opened.upstream) == {"extra_content": signature}


@pytest.mark.parametrize(
    ("sent", "goes_back"),
    [
        ("1e400", "1.7976931348623157e+308"),
        ("NaN", "null"),
        ("[-Infinity,1e400,-1e400]", "[null,1.7976931348623157e+308,-1.7976931348623157e+308]"),
    ],
)
def test_numbers_that_json_cannot_say_go_back_to_the_server_as_json(sent: str, goes_back: str) -> None:
    """Servers in Python send such numbers."""
    signature = chunk(piece(PARIS, name="f", id="a", extra_content={"n": "HERE"}))
    data = json.dumps(signature).replace('"HERE"', sent)
    opened = read(data.encode(), finish("tool_calls"))[0]
    assert isinstance(opened, CallOpened)
    calls = (FunctionCall("a", "f", PARIS, opened.upstream), FunctionCallOutput("a", ""))
    request = ModelRequest(model="m", prompt=calls)
    body = encode_request(request, Dialect()).decode()
    assert f'"extra_content":{{"n":{goes_back}}}' in body.replace(" ", "")


def test_encrypted_reasoning_is_kept_with_the_fields_beside_it() -> None:
    detail = {"type": "reasoning.encrypted", "id": "rs_1", "format": "openai-responses-v1", "index": 0, "data": "gAAA"}
    text = {"type": "reasoning.text", "text": "hm", "signature": None}
    said = {"choices": [{"index": 0, "delta": {"reasoning": "hm", "reasoning_details": [text, detail]}}]}
    thought, encrypted, *_ = read(said, delta("x"), finish())
    assert thought == ReasoningDelta("hm")
    assert isinstance(encrypted, EncryptedReasoning)
    assert encrypted.text == "gAAA"
    assert json.loads(encrypted.upstream) == {key: value for key, value in detail.items() if key != "data"}


def test_half_a_surrogate_pair_waits_for_the_other_half() -> None:
    pieces = ('"\ud83d', "\ude00", "x\ud800", '"')
    chunks = (chunk(piece(text, index=0, name="f" if text == pieces[0] else None)) for text in pieces)
    ((_, _, arguments),) = calls_in(read(*chunks, finish("tool_calls")))
    assert arguments == '"😀x\ufffd"'


def test_a_server_that_repeats_names_in_a_long_call_costs_time_that_grows_with_its_length_only() -> None:
    """Each piece could be the end of the object; looking at the whole text each time would take minutes."""
    pieces = [chunk(piece("}" if n else '{"a":"', index=0, name="f")) for n in range(5000)]
    ((_, _, arguments),) = calls_in(read(*pieces, chunk(piece('"}', index=0)), finish("tool_calls")))
    assert len(arguments) == 6 + 4999 + 2


# Calls without end


def failure(chunks: Iterable[object]) -> tuple[str, int]:
    """The error that ends a stream, and how many chunks came before it."""
    decoder = ReplyDecoder(redact=str)
    for number, payload in enumerate(chunks):
        decoder.feed(event(payload))
        if decoder.failure is not None:
            assert decoder.failure.code == "upstream_protocol"
            return str(decoder.failure), number
    return "", 0


def take_each(calls: ReplyCalls, deltas: Iterable[CallDelta]) -> list[ModelEvent]:
    events: list[ModelEvent] = []
    for said in deltas:
        calls.take([said], events)
    return events


def test_arguments_that_wait_for_a_name_are_bounded() -> None:
    message, held = failure(chunk(piece("x" * 8192, index=0)) for _ in range(200))
    assert message == (
        "The model server sent more than 1048576 bytes of calls without the names of their functions, "
        "or of ids that cannot be used."
    )
    assert held == EVENT_BYTES_MAX // (8192 + 32)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda n: {"index": n, "id": f"{n:020000}"}, id="ids without a name"),
        pytest.param(lambda n: piece("", name="f", index=n, id=f"{n:020000}"), id="ids that are too long"),
        pytest.param(lambda n: piece("", name="f", index=n, id=f"{0:016000}"), id="one id for all calls"),
        pytest.param(lambda n: {"index": n, "extra_content": "x" * 20_000}, id="fields that only the server knows"),
        pytest.param(lambda n: piece("x" * 20_000, index=n), id="arguments of many calls"),
        pytest.param(lambda n: piece({"a": f"{n:020000}"}), id="objects"),
    ],
)
def test_what_is_in_no_event_is_bounded_for_all_calls_together(call: Callable[[int], dict[str, Any]]) -> None:
    message, chunks = failure(chunk(call(n)) for n in range(100))
    assert message.startswith("The model server sent more than 1048576 bytes of calls")
    assert chunks >= EVENT_BYTES_MAX // 20_100


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda n: piece("", name="f", index=0, id=f"a{n}"), id="with names"),
        pytest.param(lambda n: {"index": n, "id": f"a{n}"}, id="without names"),
        pytest.param(lambda n: piece("{}", name="f" if n % 2 else "g"), id="without ids"),
    ],
)
def test_the_calls_of_one_reply_are_bounded(call: Callable[[int], dict[str, Any]]) -> None:
    calls = list(map(call, range(CALLS_MAX + 1)))
    for chunks in (map(chunk, calls), [chunk(*calls)]) if "index" in calls[0] else (map(chunk, calls),):
        message, _ = failure(chunks)
        assert message == "The model server sent more than 1024 calls in one reply."
    assert failure(map(chunk, calls[:-1])) == ("", 0)


def test_the_places_of_one_call_are_bounded() -> None:
    message, _ = failure([chunk(piece("", name="f", id="a")), chunk(*[{"id": "a"}] * (CALLS_MAX + 1))])
    assert message == "The model server sent more than 1024 calls in one reply."


def test_events_from_before_a_bound_was_reached_count() -> None:
    decoder = ReplyDecoder(redact=str)
    events = decoder.feed(event(delta("a")) + event(chunk(*(piece("", name="f", index=n) for n in range(2000)))))
    assert events[0] == TextDelta("a")
    assert len(calls_in(events[1:])) == CALLS_MAX + 1
    assert decoder.failure is not None


def test_a_whole_body_has_the_same_bounds() -> None:
    calls = [piece("{}", name="f", id=f"a{n}") for n in range(CALLS_MAX + 1)]
    body = {"choices": [{"index": 0, "message": {"tool_calls": calls}, "finish_reason": "tool_calls"}]}
    with pytest.raises(ModelError, match="more than 1024 calls"):
        read_bytes(json.dumps(body).encode())


def test_what_an_event_has_told_is_not_held_any_more() -> None:
    """Each part of these calls is larger than the bound, over all calls."""
    signature, arguments = "s" * 30_000, "x" * 20_000
    chunks: list[dict[str, Any]] = []
    for n in range(100):
        early, late = ({"extra_content": signature}, {}) if n % 2 else ({}, {"extra_content": signature})
        chunks.append(chunk({"index": n, "id": f"{n:016000}", **early}))
        chunks.append(chunk(piece(arguments, index=n)))
        chunks.append(chunk(piece("", name="f", index=n)))
        chunks.append(chunk({"index": n, **late}))
    events = read(*chunks, finish("tool_calls"))
    assert calls_in(events) == [(f"{n:016000}", "f", arguments) for n in range(100)]


def test_a_piece_without_a_name_does_not_copy_the_pieces_before_it() -> None:
    """Each copy would have the old and the new text in memory at once."""
    calls = ReplyCalls(held_bytes_max=10**9)
    calls.take([CallDelta(0, "a", FunctionDelta(arguments="x" * 1_000_000))], [])
    copies = 0
    tracemalloc.start()
    try:
        for _ in range(100):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            calls.take([CallDelta(0, None, FunctionDelta(arguments="y"))], [])
            _, peak = tracemalloc.get_traced_memory()
            copies += peak - before > 500_000
    finally:
        tracemalloc.stop()
    assert copies < 5
    events: list[ModelEvent] = []
    calls.take([CallDelta(0, None, FunctionDelta(name="f"))], events)
    assert calls_in(events) == [("a", "f", "x" * 1_000_000 + "y" * 100)]


def test_small_pieces_that_wait_for_a_name_count_with_their_overhead() -> None:
    """A text of one character takes 80 bytes."""
    calls = ReplyCalls(held_bytes_max=100_000)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="more than 100000 bytes of calls"):
            take_each(calls, (CallDelta(0, "a", FunctionDelta(arguments=chr(0x4E00 + n))) for n in range(10_000)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 5 * 100_000


def test_another_id_with_each_piece_takes_no_memory() -> None:
    """Older vLLM sends a new id with each piece of the arguments, of which a long call has thousands."""
    calls = ReplyCalls(held_bytes_max=EVENT_BYTES_MAX)
    deltas = (CallDelta(0, f"{n:01000}", FunctionDelta(name="" if n else "f", arguments="x")) for n in range(3000))
    tracemalloc.start()
    try:
        events = take_each(calls, deltas)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert calls_in(events) == [("0" * 1000, "f", "x" * 3000)]
    assert held < 1_000_000


# Any reply, in any pieces

names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
objects = st.dictionaries(texts, texts | st.integers() | st.none(), max_size=3)
OUTPUT = st.one_of(
    st.tuples(st.just("text"), texts),
    st.tuples(st.just("reasoning"), texts),
    st.tuples(st.just("call"), names, objects),
)


def _parsed(said: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with the arguments of a call parsed, because a server that sends an object may escape more in it."""
    return (*said[:-1], json.loads(said[-1])) if said[0] == "call" else said


def _say(said: list[tuple[Any, ...]], kind: str, text: str) -> None:
    if said and said[-1][0] == kind:
        text = said.pop()[1] + text
    said.append((kind, text))


@st.composite
def replies(draw: st.DrawFn) -> tuple[list[tuple[Any, ...]], bytes]:
    """What a model says, and a stream of it in some server's way, all calls in the same."""
    output = draw(st.lists(OUTPUT, max_size=6))
    with_index, with_id, repeats, as_object, whole = (draw(st.booleans()) for _ in range(5))
    chunks: list[bytes] = []
    expected: list[tuple[Any, ...]] = []
    for number, said in enumerate(output):
        if len(said) == 3:
            _, name, value = said
            arguments = msgspec.json.encode(value).decode()
            expected.append(("call", name, arguments))
            members: dict[str, Any] = {"index": number} if with_index else {}
            own = {"name": name, **({"id": f"call_{number}"} if with_id or not with_index else {})}
            cuts = [] if whole or as_object else draw(st.lists(st.integers(0, len(arguments)), max_size=3).map(sorted))
            parts = [arguments[a:b] for a, b in zip([0, *cuts], [*cuts, len(arguments)], strict=True)]
            for index, part in enumerate(parts):
                opening = own if index == 0 or (repeats and with_id) else {}
                chunks.append(event(chunk(piece(value if as_object else part, **members, **opening))))
        else:
            kind, text = said
            _say(expected, kind, text)
            field = "content" if kind == "text" else "reasoning"
            chunks.append(event({"choices": [{"index": 0, "delta": {field: text}}]}))
    return expected, b"".join(chunks) + event(finish(draw(st.sampled_from(["stop", "tool_calls"]))))


@given(replies(), st.data())
def test_any_reply_in_any_pieces_is_the_same(reply: tuple[list[tuple[Any, ...]], bytes], data: st.DataObject) -> None:
    expected, stream = reply
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    events = read_bytes(*(stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b))
    said: list[tuple[Any, ...]] = []
    numbers: dict[int, int] = {}
    for told in events:
        match told:
            case TextDelta(text) | ReasoningDelta(text):
                _say(said, "text" if isinstance(told, TextDelta) else "reasoning", text)
            case CallOpened(number, _, name):
                numbers[number] = len(said)
                said.append(("call", name, ""))
            case ArgumentsDelta(number, text):
                _, name, arguments = said[numbers[number]]
                said[numbers[number]] = "call", name, arguments + text
    assert list(map(_parsed, said)) == list(map(_parsed, expected))
    assert isinstance(events[-1], Finished)
