"""A chat completion's JSON and chunks: pure functions of a turn and its events."""

import json
from typing import Any

import msgspec
import openai.types.chat
import pytest
import trio
import trio.testing
from pydantic import TypeAdapter

from service.api.http.event_stream import PIECE_WRITER, EventStream
from service.api.http.face_frames import EndedTurn
from service.api.openai.chat_frames import CUT, ENDS, ChatCompletion, ChunkEncoder
from service.models.client import Usage
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import (
    Event,
    TurnArguments,
    TurnCall,
    TurnCancelled,
    TurnCompleted,
    TurnDelta,
    TurnFailed,
    TurnInterrupted,
    TurnQueued,
    TurnReasoning,
    TurnStarted,
)
from service.sessions.events.streams import Streams
from service.stop_state import StopState
from service.storage.records import Failure, Item, TurnRecord
from tests.storage.rows import T0

CHUNK = TypeAdapter(openai.types.chat.ChatCompletionChunk)
"""The SDK's own type, in which nothing is converted: ``"1"`` is no number."""
HEX = "0a6c1b9e2f3d4c5a8b7e6f5d4c3b2a19"
TURN = TurnRecord(
    id=f"turn_{HEX}", session_id="s", parent=None, state="running", model="m-1", created_at=T0, started_at=T0, input=()
)
CALL_ITEM = Item(id="fc_" + "1" * 32, type="function_call", role="assistant", text="", call_id="c", name="f")
SOURCE = EndedTurn(msgspec.structs.replace(TURN, output=(CALL_ITEM,) * 9))
"""What the events of these tests do not say: no call has more than they tell."""
STARTED = TurnStarted(seq=1, session_id="s", turn_id=TURN.id, model="m-1")
USAGE = Usage(input_tokens=12, output_tokens=34, reasoning_tokens=5, cached_tokens=8)
TOLD_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 34,
    "total_tokens": 46,
    "prompt_tokens_details": {"cached_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 5},
}


def frames(*events: Event, includes_usage: bool = False) -> list[Any]:
    """The JSON of each frame, or the text of a frame without JSON."""
    encoder = ChunkEncoder(SOURCE, includes_usage=includes_usage)
    stream = b"".join(map(encoder, events)).decode()
    assert stream.endswith("\n\n")
    told = [frame.removeprefix("data: ") for frame in stream.removesuffix("\n\n").split("\n\n")]
    for frame in told:
        if frame.startswith('{"id"'):
            CHUNK.validate_json(frame, strict=True)
    return [json.loads(frame) if frame.startswith("{") else frame for frame in told]


def deltas(told: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in told if isinstance(chunk, dict) and chunk.get("choices")]


def completed(reason: Any = "stop", usage: Usage | None = USAGE) -> TurnCompleted:
    return TurnCompleted(seq=9, finish_reason=reason, usage=usage, text_length=2)


def test_the_head_of_chunks_takes_no_record_of_the_reply_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    told = frames(STARTED)
    monkeypatch.setattr(EndedTurn, "record", None)
    assert frames(STARTED) == told
    assert told[0]["id"] == f"chatcmpl-{HEX}"


def test_a_stream_has_the_role_first_then_the_texts_then_the_reason_and_done() -> None:
    told = frames(STARTED, TurnDelta(seq=2, text="He"), TurnDelta(seq=3, text="y"), completed())
    assert deltas(told) == [{"role": "assistant", "content": ""}, {"content": "He"}, {"content": "y"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in told[:-1]] == [None, None, None, "stop"]
    assert told[-1] == "[DONE]"
    assert told[1] == {
        "id": f"chatcmpl-{HEX}",
        "object": "chat.completion.chunk",
        "created": int(T0.timestamp()),
        "model": "m-1",
        "choices": [{"index": 0, "delta": {"content": "He"}, "logprobs": None, "finish_reason": None}],
    }


def test_usage_comes_last_with_no_choice_and_is_null_before_if_it_is_asked_for() -> None:
    told = frames(STARTED, TurnDelta(seq=2, text="Hey"), completed("length"), includes_usage=True)
    assert [chunk["usage"] for chunk in told[:-1]] == [None, None, None, TOLD_USAGE]
    assert (told[-2]["choices"], told[-1]) == ([], "[DONE]")
    assert told[-3]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in frames(STARTED, completed())[:-1])


def test_an_upstream_that_has_not_counted_gives_no_usage() -> None:
    told = frames(STARTED, completed(usage=None), includes_usage=True)
    assert [chunk["usage"] for chunk in told[:-1]] == [None, None]
    assert deltas(told)[-1] == {}


def test_reasoning_in_words_is_beside_the_content() -> None:
    told = frames(STARTED, TurnReasoning(seq=2, item=0, text="hm"), TurnDelta(seq=3, item=1, text="Hey"), completed())
    assert deltas(told)[1:3] == [{"reasoning_content": "hm"}, {"content": "Hey"}]


def call(seq: int, item: int, call_id: str, name: str = "get") -> TurnCall:
    return TurnCall(seq=seq, item=item, id=f"fc_{item}", call_id=call_id, name=name)


def opened(number: int, call_id: str, name: str = "get") -> dict[str, Any]:
    return {"index": number, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def argued(number: int, text: str) -> dict[str, Any]:
    return {"index": number, "function": {"arguments": text}}


def test_calls_that_follow_each_other_are_told_as_they_arrive() -> None:
    events = (
        STARTED,
        TurnDelta(seq=2, item=0, text="Look."),
        call(3, 1, "a"),
        TurnArguments(seq=4, item=1, text="{"),
        TurnArguments(seq=5, item=1, text="}"),
        call(6, 3, "b", "put"),
        TurnArguments(seq=7, item=3, text='{"a":1}'),
    )
    told = [opened(0, "a"), argued(0, "{"), argued(0, "}"), opened(1, "b", "put"), argued(1, '{"a":1}')]
    assert [delta["tool_calls"] for delta in deltas(frames(*events))[2:]] == [[it] for it in told]
    whole = frames(*events, TurnCompleted(seq=8, finish_reason="tool_calls", usage=USAGE, text_length=0))
    assert len(whole) == len(events) + 2
    assert whole[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_begins_within_another_is_told_when_that_one_is_whole() -> None:
    events = (
        STARTED,
        call(2, 0, "a"),
        call(3, 1, "b"),
        TurnArguments(seq=4, item=1, text='{"b":'),
        TurnArguments(seq=5, item=0, text="{"),
        call(6, 2, "c"),
        TurnArguments(seq=7, item=1, text="1}"),
        TurnArguments(seq=8, item=0, text="}"),
        completed("tool_calls"),
    )
    told = deltas(frames(*events))
    in_order = [opened(0, "a"), argued(0, "{"), argued(0, "}"), opened(1, "b"), argued(1, '{"b":1}'), opened(2, "c")]
    assert [delta["tool_calls"] for delta in told[1:-1]] == [[it] for it in (*in_order, argued(2, ""))]


def test_a_whole_call_may_still_grow() -> None:
    events = (
        STARTED,
        call(2, 0, "a"),
        TurnArguments(seq=3, item=0, text="{}"),
        call(4, 1, "b"),
        TurnArguments(seq=5, item=0, text=" "),
        TurnArguments(seq=6, item=1, text="{}"),
    )
    told = [opened(0, "a"), argued(0, "{}"), opened(1, "b"), argued(0, " "), argued(1, "{}")]
    assert [delta["tool_calls"] for delta in deltas(frames(*events))[1:]] == [[it] for it in told]


def test_events_may_be_asked_for_again_from_any_on() -> None:
    events: list[Event] = [
        STARTED,
        TurnDelta(seq=2, item=0, text="Look."),
        call(3, 1, "a"),
        call(4, 2, "b"),
        TurnArguments(seq=5, item=2, text="{"),
        TurnArguments(seq=6, item=1, text="{"),
        TurnArguments(seq=7, item=2, text="}"),
        TurnArguments(seq=8, item=1, text="}"),
        call(9, 3, "c"),
        completed("tool_calls"),
    ]
    once = ChunkEncoder(SOURCE, includes_usage=True)
    told = [once(event) for event in events]
    again = ChunkEncoder(SOURCE, includes_usage=True)
    for end in range(1, len(events) + 1):
        for start in range(end):
            assert [again(event) for event in events[start:end]] == told[start:end]


class Written:
    """The host's writer of a stream. Takes everything."""

    has_rest = False

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write_now(self, piece: bytes) -> bool:
        self.pieces.append(piece)
        return True


async def test_whole_calls_that_come_in_one_read_and_are_long_keep_their_numbers() -> None:
    log = EventLog(bytes_max=1 << 20)
    slot = Streams(streams_max=1, heartbeat_interval_s=15, stop=StopState()).open_stream()
    written = Written()
    encoder = ChunkEncoder(SOURCE, includes_usage=False)
    stream = EventStream(log, slot, after=0, encode=encoder, scope={PIECE_WRITER: written})
    arguments = json.dumps({"content": "x" * 5000})

    async def read() -> None:
        async for piece in stream:
            written.write_now(piece)

    log.append(STARTED)
    log.append(TurnDelta(seq=2, item=0, text="Look."))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        for seq, item, call_id in ((3, 1, "a"), (5, 2, "b")):
            log.append(call(seq, item, call_id), tells=False)
            log.append(TurnArguments(seq=seq + 1, item=item, text=arguments), tells=False)
        log.tell_readers()
        await trio.testing.wait_all_tasks_blocked()
        log.close(TurnCompleted(seq=7, finish_reason="tool_calls", usage=None, text_length=5))
    told = [frame.removeprefix("data: ") for frame in b"".join(written.pieces).decode().split("\n\n")]
    chunks = [json.loads(frame) for frame in told if frame.startswith("{")]
    calls = [delta["tool_calls"] for delta in deltas(chunks) if "tool_calls" in delta]
    in_order = (opened(0, "a"), argued(0, arguments), opened(1, "b"), argued(1, arguments))
    assert calls == [[it] for it in in_order]


def test_no_character_of_a_text_ends_a_line() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\ni\U0001f600"
    encoder = ChunkEncoder(SOURCE, includes_usage=False)
    for event, name in (
        (TurnDelta(seq=2, text=text), "content"),
        (TurnReasoning(seq=3, text=text), "reasoning_content"),
    ):
        frame = encoder(event).decode()
        assert frame.splitlines() == [frame.removesuffix("\n\n"), ""]
        assert json.loads(frame.removeprefix("data: "))["choices"][0]["delta"] == {name: text}


ENDINGS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (
        TurnFailed(seq=2, error=Failure("context_too_long", "Too long."), text_length=0),
        {"type": "invalid_request_error", "code": "context_length_exceeded", "message": "Too long."},
        {"state": "failed", "reason": None, "code": "context_too_long"},
    ),
    (
        TurnFailed(seq=2, error=Failure("rate_limited", "Slow down."), text_length=0),
        {"type": "rate_limit_error", "code": "rate_limit_exceeded", "message": "Slow down."},
        {"state": "failed", "reason": None, "code": "rate_limited"},
    ),
    (
        TurnFailed(seq=2, error=Failure("next_token_timeout", "Silent."), text_length=3),
        {"type": "server_error", "code": "next_token_timeout", "message": "Silent."},
        {"state": "failed", "reason": None, "code": "next_token_timeout"},
    ),
    (
        TurnInterrupted(seq=2, reason="shutdown", text_length=3),
        {"type": "server_error", "code": "interrupted"},
        {"state": "interrupted", "reason": "shutdown", "code": None},
    ),
    (
        TurnCancelled(seq=2, reason="requested", text_length=3),
        {"type": "server_error", "code": "cancelled"},
        {"state": "cancelled", "reason": "requested", "code": None},
    ),
]


@pytest.mark.parametrize(("end", "error", "cause"), ENDINGS)
def test_a_reply_that_is_cut_off_ends_with_an_error_and_neither_a_reason_nor_done(
    end: Event, error: dict[str, Any], cause: dict[str, Any]
) -> None:
    told = frames(STARTED, TurnDelta(seq=2, text="Hey"), end, includes_usage=True)
    assert told[-1].keys() == {"error"}
    assert told[-1]["error"].items() >= error.items()
    assert (told[-1]["error"]["param"], told[-1]["error"]["lastcall"]) == (None, cause)
    assert [chunk["choices"][0]["finish_reason"] for chunk in told[:-1]] == [None, None]


def test_a_proxy_knows_a_stream_that_has_ended_by_its_last_frame() -> None:
    encoder = ChunkEncoder(SOURCE, includes_usage=True)
    events: list[Event] = [STARTED, TurnDelta(seq=2, text="Hey}}}")]
    assert not any(encoder(event).endswith(ENDS) for event in events)
    assert encoder(completed()).endswith(ENDS)
    for end, _, _ in ENDINGS:
        assert ChunkEncoder(SOURCE, includes_usage=False)(end).endswith(ENDS)
    assert CUT.endswith(ENDS)


def test_a_queued_turn_is_a_comment() -> None:
    assert frames(TurnQueued(seq=1, session_id="s", turn_id=TURN.id)) == [":"]


# Whole


def whole(*output: Item, reason: Any = "stop", usage: Usage | None = USAGE) -> dict[str, Any]:
    ended = msgspec.structs.replace(TURN, state="completed", output=output, finish_reason=reason, usage=usage)
    encoded = msgspec.json.encode(ChatCompletion.of(ended))
    TypeAdapter(openai.types.chat.ChatCompletion).validate_json(encoded, strict=True)
    told: dict[str, Any] = json.loads(encoded)
    return told


def test_a_whole_reply_has_its_text_its_reason_and_its_usage() -> None:
    assert whole(Item(id="msg_1", role="assistant", text="Hey")) == {
        "id": f"chatcmpl-{HEX}",
        "object": "chat.completion",
        "created": int(T0.timestamp()),
        "model": "m-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hey", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": TOLD_USAGE,
    }


def test_a_reply_of_calls_alone_has_no_content() -> None:
    called = Item(id="fc_1", type="function_call", role="assistant", text='{"a":1}', call_id="a", name="get")
    message = whole(called, reason="tool_calls")["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}}
    ]
    text = Item(id="msg_1", role="assistant", text="Look.")
    assert whole(text, called, reason="tool_calls")["choices"][0]["message"]["content"] == "Look."


def test_what_the_server_of_a_call_wants_back_is_shown_with_the_call() -> None:
    upstream = '{"extra_content": {"google": {"thought_signature": "Ej\u2028"}}}'
    signed = msgspec.structs.replace(CALL_ITEM, upstream=upstream)
    extra = {"google": {"thought_signature": "Ej\u2028"}}
    (told,) = whole(signed, reason="tool_calls")["choices"][0]["message"]["tool_calls"]
    assert told == {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}, "extra_content": extra}
    encoder = ChunkEncoder(EndedTurn(msgspec.structs.replace(TURN, output=(signed, CALL_ITEM))), includes_usage=False)
    opening = [encoder(call(2, 0, "a")), encoder(TurnArguments(seq=3, item=0, text="{}")), encoder(call(4, 1, "b"))]
    assert all(len(frame.decode().splitlines()) == 2 for frame in opening)
    (first, more, second) = [json.loads(frame.removeprefix(b"data: "))["choices"][0]["delta"] for frame in opening]
    assert first["tool_calls"][0]["extra_content"] == extra
    assert "extra_content" not in more["tool_calls"][0]
    assert "extra_content" not in second["tool_calls"][0]


def test_an_empty_reply_is_an_empty_text_and_reasoning_has_a_field_of_its_own() -> None:
    assert whole(usage=None)["choices"][0]["message"]["content"] == ""
    assert whole(usage=None)["usage"] is None
    reasoning = Item(id="msg_1", type="reasoning", role="assistant", text="hm")
    message = whole(reasoning, Item(id="msg_2", role="assistant", text="Hey"))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Hey")
