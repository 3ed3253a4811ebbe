"""The events of a response: valid for others' types, in the order that clients need, the same for every reader."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import httpx2
import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from openai import APIError, OpenAI, omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from service import long_texts
from service.api.http.event_frames import read_frames
from service.api.http.face_frames import EndedTurn
from service.api.native.event_frames import encode_frame
from service.api.openai import response_events
from service.api.openai.echo import Echo
from service.api.openai.items import read_items
from service.api.openai.response import response_of
from service.api.openai.response_events import DONE, ResponseFace
from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    EncryptedReasoning,
    ModelEvent,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn
from service.storage.records import SEQ_AFTER_CRASH
from tests.api.openai.validation import adapter_of, check_frame, check_response
from tests.api.told_turns import (
    Follower,
    a_told_turn,
    crashed,
    end_turn,
    ends,
    first_runs,
    read_to_the_end,
    replay_of,
    replay_of_told,
    replies,
)

some = settings(max_examples=settings().max_examples // 2, phases=set(Phase) - {Phase.explain})
few = settings(some, max_examples=settings().max_examples // 4)
STOP = outcome.Completed("stop")
INCLUDING = Echo(encrypted=True, namespaces={"tools__get": ("tools", "get")}).face()
PART = {"type": "output_text", "annotations": [], "logprobs": []}


def frames_in(told: bytes) -> list[bytes]:
    frames = [block + b"\n\n" for block in told.split(b"\n\n")]
    assert frames.pop() == b"\n\n"
    return frames


def events_in(told: bytes, *, is_over: bool = True) -> list[dict[str, Any]]:
    """The events of a stream, all of which are valid."""
    frames = frames_in(told)
    if is_over:
        assert frames.pop() == DONE
    return list(map(check_frame, frames))


def tell(told: Sequence[ModelEvent], end: outcome.Outcome, *, is_queued: bool = False, **fields: Any) -> Turn:
    turn = a_told_turn(is_queued=is_queued, **fields)
    if is_queued:
        turn.start(turn.record().created_at)
    turn.take(told)
    end_turn(turn, end, usage=Usage(input_tokens=9, output_tokens=4, reasoning_tokens=1, cached_tokens=3))
    return turn


async def events_of(turn: Turn) -> list[dict[str, Any]]:
    return events_in(await read_to_the_end(turn.log, ResponseFace(turn)))


def end_in(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last event of the response. After that of a reply that was cut there is an error, which says why."""
    *_, before, last = events
    end = before if last["type"] == "error" else last
    cause = end["response"]["lastcall"]
    assert (last["type"] == "error") == (cause["state"] != "completed")
    if end is not last:
        assert last["error"]["lastcall"]["state"] == cause["state"]
        assert {name: last[name] for name in ("code", "message", "param")}.items() <= last["error"].items()
    return end


def kinds_of(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


# One sort of log after the other


async def test_a_text_is_told_from_its_opening_to_its_end() -> None:
    events = await events_of(tell([TextDelta("Hel"), TextDelta("lo")], STOP))
    assert kinds_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, progress, added, opened, first, second, text, part, item, end = events
    assert (created["response"]["status"], progress["response"]["status"]) == ("in_progress", "in_progress")
    assert created["response"]["output"] == []
    assert (added["item"]["status"], added["item"]["content"]) == ("in_progress", [])
    assert opened["part"] == PART | {"text": ""}
    assert (first["delta"], second["delta"], text["text"]) == ("Hel", "lo", "Hello")
    assert first["logprobs"] == text["logprobs"] == []
    assert part["part"] == PART | {"text": "Hello"}
    assert item["item"] == added["item"] | {"status": "completed", "content": [PART | {"text": "Hello"}]}
    assert end["response"]["output"] == [item["item"]]
    assert end["response"]["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 13,
    }
    assert {event["item_id"] for event in (opened, first, second, text, part)} == {added["item"]["id"]}


async def test_reasoning_and_a_text_that_come_in_turns_stay_open_side_by_side() -> None:
    told: list[ModelEvent] = [ReasoningDelta("a"), TextDelta("b"), ReasoningDelta("c"), TextDelta("d")]
    events = await events_of(tell(told, STOP))
    assert kinds_of(events)[2:-1] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("reasoning_text.delta", "output_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_text.done", "content_part.done", "output_item.done"),
    ]
    reasoning, message = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "ac"}]
    assert reasoning["id"].startswith("rs_")
    assert message["content"][0]["text"] == "bd"


async def test_a_call_ends_the_texts_before_it_and_parallel_calls_end_with_the_response() -> None:
    told: list[ModelEvent] = [
        TextDelta("Looking."),
        CallOpened(0, "call_a", "get"),
        ArgumentsDelta(0, "{"),
        CallOpened(1, "call_b", "get"),
        ArgumentsDelta(1, "{}"),
        ArgumentsDelta(0, "}"),
    ]
    events = await events_of(tell(told, outcome.Completed("tool_calls")))
    assert kinds_of(events)[5:-1] == [
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("function_call_arguments.done", "output_item.done"),
    ]
    assert [event["output_index"] for event in events[8:-1]] == [1, 1, 2, 2, 1, 1, 1, 2, 2]
    assert events[8]["item"] | {"id": ""} == {
        "type": "function_call",
        "id": "",
        "status": "in_progress",
        "call_id": "call_a",
        "name": "get",
        "arguments": "",
    }
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], event["arguments"]) for event in done] == [("get", "{}"), ("get", "{}")]
    assert events[-1]["response"]["status"] == "completed"


async def test_encrypted_reasoning_opens_with_the_next_item_and_ends_with_its_content_if_it_is_asked_for() -> None:
    told: list[ModelEvent] = [
        EncryptedReasoning("sealed"),
        CallOpened(0, "call_a", "tools__get"),
        EncryptedReasoning("late", '{"a":1}'),
    ]
    events = await events_of(tell(told, outcome.Completed("tool_calls"), face=INCLUDING))
    assert kinds_of(events)[2:-1] == [
        *("output_item.added", "output_item.done", "output_item.added"),
        *("output_item.added", "function_call_arguments.done", "output_item.done", "output_item.done"),
    ]
    sealed, call, late = events[-1]["response"]["output"]
    assert (sealed["encrypted_content"], sealed["status"]) == ("sealed", "completed")
    assert events[3]["item"] == sealed
    assert (call["name"], call["namespace"]) == ("get", "tools")
    assert late["encrypted_content"].startswith("lc1.")
    (without, *_) = (await events_of(tell(told, STOP)))[-1]["response"]["output"]
    assert "encrypted_content" not in without


async def test_a_call_whose_server_wants_more_back_has_reasoning_before_it_if_encrypted_content_is_asked_for() -> None:
    told: list[ModelEvent] = [
        TextDelta("Looking."),
        CallOpened(0, "call_a", "get", '{"extra_content": {"google": {"thought_signature": "A\u2028"}}}'),
        CallOpened(1, "call_b", "get"),
        ArgumentsDelta(1, "{}"),
        ArgumentsDelta(0, "{}"),
        CallOpened(2, "call_c", "get", '{"extra_content":{"google":{"thought_signature":"C"}}}'),
    ]
    events = await events_of(tell(told, outcome.Completed("tool_calls"), face=INCLUDING))
    assert kinds_of(events)[5:-1] == [
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "output_item.done", "output_item.added"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("output_item.added", "output_item.done", "output_item.added"),
        *("function_call_arguments.done", "output_item.done") * 3,
    ]
    assert [event["output_index"] for event in events[8:-1]] == [1, 1, 2, 3, 3, 2, 4, 4, 5, 2, 2, 3, 3, 5, 5]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        *("message", "reasoning", "function_call", "function_call", "reasoning", "function_call"),
    ]
    assert events[9]["item"] == output[1]
    assert events[8]["item"] == {"type": "reasoning", "id": output[1]["id"], "status": "in_progress", "summary": []} | {
        "content": []
    }
    _, _, a, b, _, c = output
    assert "extra_content" not in b
    assert (a["extra_content"], c["extra_content"]) == (
        {"google": {"thought_signature": "A\u2028"}},
        {"google": {"thought_signature": "C"}},
    )
    for call in (a, b, c):
        call.pop("extra_content", None)  # as clients do that keep only what they know
    back = [item for item in read_items(output, field="input") if item.type == "function_call"]
    assert [(item.call_id, item.upstream) for item in back] == [
        ("call_a", '{"extra_content":{"google":{"thought_signature": "A\u2028"}}}'),
        ("call_b", ""),
        ("call_c", '{"extra_content":{"google":{"thought_signature":"C"}}}'),
    ]
    plain = await events_of(tell(told, outcome.Completed("tool_calls")))
    assert [item["type"] for item in plain[-1]["response"]["output"]] == ["message", *["function_call"] * 3]


async def test_an_empty_reply_is_a_response_without_items() -> None:
    events = await events_of(tell([], STOP))
    assert kinds_of(events) == ["created", "in_progress", "completed"]
    assert events[-1]["response"]["output"] == []


async def test_a_response_that_waits_is_created_as_queued() -> None:
    events = await events_of(tell([TextDelta("a")], STOP, is_queued=True))
    assert kinds_of(events)[:3] == ["created", "queued", "in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]


async def test_a_response_that_ends_in_the_queue_was_never_in_progress() -> None:
    turn = a_told_turn(is_queued=True, background=True)
    end_turn(turn, outcome.Cancelled("requested"))
    events = await events_of(turn)
    assert kinds_of(events) == ["created", "queued", "incomplete", "error"]
    assert end_in(events)["response"]["status"] == "cancelled"


@pytest.mark.parametrize(
    ("end", "kind", "code"),
    [
        (outcome.Completed("length"), "incomplete", None),
        (outcome.Completed("content_filter"), "incomplete", None),
        (outcome.failed("upstream_error", "Broken."), "failed", "upstream_error"),
        (outcome.Cancelled("requested"), "incomplete", "cancelled"),
        (outcome.Interrupted("shutdown"), "incomplete", "interrupted"),
    ],
)
async def test_a_reply_that_was_cut_off_ends_as_such_with_its_item(
    end: outcome.Outcome, kind: str, code: str | None
) -> None:
    events = await events_of(tell([ReasoningDelta("Hm."), TextDelta("Hel")], end))
    assert end_in(events)["type"] == f"response.{kind}"
    assert events[-1].get("code") == code
    reasoning, message = end_in(events)["response"]["output"]
    assert (reasoning["status"], message["status"]) == ("completed", "incomplete")
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == [reasoning, message]


# Every way of reading


@contextmanager
def long_from(length: int) -> Iterator[None]:
    """Let frames that repeat texts of more code points be long, and their pieces short."""
    with patch.object(response_events, "LONG", length), patch.object(long_texts, "LONG", 2):
        yield


@some
@given(replies(), ends, st.tuples(st.booleans(), st.booleans(), st.booleans()), st.sampled_from([-1, 6, 10**9]))
async def test_every_way_of_reading_tells_the_same_valid_events(
    told: list[ModelEvent], end: outcome.Outcome, options: tuple[bool, bool, bool], long: int
) -> None:
    is_queued, background, is_including = options
    with long_from(long):
        turn, whole = await _every_way(
            told, is_queued=is_queued, end=end, background=background, including=is_including
        )
    ended, replay = await replay_of_told(turn)
    assert await read_to_the_end(replay, ResponseFace(ended)) == whole, "long frames are as others are"


async def _every_way(
    told: list[ModelEvent], *, is_queued: bool, end: outcome.Outcome, background: bool, including: bool
) -> tuple[Turn, bytes]:
    fields: dict[str, Any] = {"background": background} | ({"face": INCLUDING} if including else {})
    turn = a_told_turn(is_queued=is_queued, **fields)
    face = ResponseFace(turn)
    live = Follower(turn.log, face)
    live.read()
    if is_queued:
        turn.start(turn.record().created_at)
    for event in told:
        turn.take([event])
        live.read()
    end_turn(turn, end)
    live.read()
    events = events_in(live.told)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert end_in(events)["response"] == check_response(msgspec.json.encode(response_of(turn.record())))
    _check_items(events)
    assert await read_to_the_end(turn.log, ResponseFace(turn), bytes_max=300) == live.told
    ended, replay = await replay_of_told(turn)
    assert await read_to_the_end(replay, ResponseFace(ended)) == live.told
    frames = frames_in(live.told)
    for seen in {1, 2, 3, len(frames) // 2, len(frames) - 2, len(frames) - 1}:
        rest = b"".join(frames[seen:])
        assert await read_to_the_end(turn.log, ResponseFace(turn), seen=seen) == rest
        ended, replay = await replay_of_told(turn)
        assert await read_to_the_end(replay, ResponseFace(ended), seen=seen) == rest
    return turn, live.told


async def test_streams_of_several_faces_on_one_log_each_get_their_own_frames() -> None:
    turn = a_told_turn(face=INCLUDING)
    faces = [ResponseFace(turn), ResponseFace(turn)]
    streams = [Follower(turn.log, face) for face in faces]
    native = b""
    for event in (ReasoningDelta("a"), TextDelta("b"), CallOpened(0, "call_a", "get"), ArgumentsDelta(0, "{}")):
        turn.take([event])
        streams[0].read()
        frames, _ = read_frames(turn.log, turn.log.last_seq - 1, encode=encode_frame, bytes_max=1 << 20)
        native += frames
    end_turn(turn, outcome.Completed("tool_calls"))
    for stream in streams:
        stream.read(to_the_end=True)
    assert streams[0].told == streams[1].told
    assert native == b"".join(map(encode_frame, list(turn.log.events())[1:-1]))
    assert len(turn.log.beside) == 3, "an encoder, its newest frames and those of the native face: streams share them"


def _check_items(events: Sequence[dict[str, Any]]) -> None:
    """Each item is opened once, in its place, grows only while it is open, and ends as the response has it."""
    opened: list[str] = []
    texts: dict[str, str] = {}
    ended: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(opened)
            opened.append(event["item"]["id"])
            texts[event["item"]["id"]] = ""
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == opened[event["output_index"]]
            assert event["output_index"] not in ended
            ended[event["output_index"]] = event["item"]
        elif kind.endswith(".delta"):
            assert event["output_index"] not in ended
            assert event["item_id"] == opened[event["output_index"]]
            texts[event["item_id"]] += event["delta"]
        elif kind.endswith("_text.done"):
            assert event["text"] == texts[event["item_id"]]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == texts[event["item_id"]]
    assert [ended[index] for index in range(len(opened))] == end_in(events)["response"]["output"]


@some
@given(replies(), st.data(), st.booleans(), st.sampled_from([-1, 10**9]))
async def test_after_a_crash_the_events_that_are_left_are_valid_and_end_the_response(
    told: list[ModelEvent], data: st.DataObject, is_including: bool, long: int
) -> None:
    with long_from(long):
        await _check_after_crash(told, data, is_including=is_including)


async def _check_after_crash(told: list[ModelEvent], data: st.DataObject, *, is_including: bool) -> None:
    fields: dict[str, Any] = {"face": INCLUDING} if is_including else {}
    turn = a_told_turn(**fields)
    turn.take(told)
    live = frames_in(await read_to_the_end(turn.log, ResponseFace(turn)))
    kept = data.draw(st.integers(0, turn.log.last_seq))
    record = crashed(turn, events=kept)
    runs = first_runs(turn.log.runs(), kept)

    async def read(seen: int = 0) -> bytes:
        return await read_to_the_end(await replay_of(record, runs), ResponseFace(EndedTurn(record)), seen=seen)

    after = await read()
    events = events_in(after)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    common = sum(number < SEQ_AFTER_CRASH - 1 for number in numbers)
    if kept:
        assert frames_in(after)[:common] == live[:common]
    has_text = any(item.text for item in record.output if item.type != "reasoning")
    end = end_in(events)
    assert end["type"] == ("response.incomplete" if has_text else "response.failed")
    assert end["response"]["lastcall"]["reason"] == "crash"
    resumed = events_in(await read(len(live) + 3))
    assert [event["sequence_number"] for event in resumed] == numbers[common:]


async def test_a_client_that_has_seen_all_gets_the_end_of_the_stream_alone() -> None:
    turn = tell([TextDelta("a")], STOP)
    frames = frames_in(await read_to_the_end(turn.log, ResponseFace(turn)))
    for seen in (len(frames) - 1, len(frames), len(frames) + 5):
        assert await read_to_the_end(turn.log, ResponseFace(turn), seen=seen) == DONE


# Others' clients


@few
@given(replies(), ends)
async def test_the_sdks_own_state_follows_every_stream(told: list[ModelEvent], end: outcome.Outcome) -> None:
    turn = tell(told, end)
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in await events_of(turn):
        state.handle_event(adapter_of(ResponseStreamEvent).validate_python(event))


@pytest.mark.processes  # the client asks the system for its name
@pytest.mark.parametrize("end", [STOP, outcome.Cancelled("requested"), outcome.failed("upstream_error", "Broken.")])
async def test_the_official_client_reads_a_stream_and_a_response_in_strict_validation(end: outcome.Outcome) -> None:
    turn = tell([ReasoningDelta("Hm."), TextDelta("Hel"), TextDelta("lo\u2028")], end)
    told = b": heartbeat\n\n" + await read_to_the_end(turn.log, ResponseFace(turn))
    whole = msgspec.json.encode(response_of(turn.record()))

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            return httpx2.Response(200, content=told, headers={"content-type": "text/event-stream"})
        return httpx2.Response(200, content=whole, headers={"content-type": "application/json"})

    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as http,
        OpenAI(api_key="x", base_url="http://test/v1", http_client=http, _strict_response_validation=True) as client,
    ):
        events: list[ResponseStreamEvent] = []
        with pytest.raises(APIError) if end != STOP else nullcontext():
            events += client.responses.create(model="m", input="Hi", stream=True)
        response = client.responses.retrieve("resp_1")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type in ("response.completed", "response.incomplete", "response.failed")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello\u2028"
    assert response.output_text == "Hello\u2028"
    assert (response.status == "completed") == (end == STOP)
