"""Responses that outlive their process: what a client of ``/v1`` gets that comes back to the next process."""

import json
from typing import Any

import trio
from trio.testing import MockClock

from service.api.http.face_frames import NUMBERS_PER_ATTEMPT
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from tests.api.inprocess import Reply, open_api
from tests.api.openai.validation import check_frame

MODEL = "scripted:?tokens=30&rate=10&first_token_s=0"
"""A reply of 30 tokens, which takes three seconds."""
BEGINS_ANEW = f"{MODEL}&continues=false"
WHOLE = "".join(f"{number} " for number in range(30))
ASKED = {"model": "scripted", "input": "Hi", "background": True}


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """The numbered events, each of them valid for OpenAI's types."""
    blocks = [block for block in reply.body.split(b"\n\n") if block.startswith(b"event: ")]
    for block in blocks:
        check_frame(block + b"\n\n")
    return [json.loads(block.partition(b"data: ")[2]) for block in blocks]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def cut(model: str, **asked: object) -> Reply:
    """The answer of a response whose process stops, without a drain, after a second."""
    replies: list[Reply] = []

    async def ask() -> None:
        replies.append(await api.call("POST", "/v1/responses", ASKED | asked))

    async with (
        open_api(model_url=model, drain_timeout_s=0, on_interrupt="continue") as api,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(ask)
        await trio.sleep(1)
        api.service.shutdown.notice("test")
        await api.service.shutdown.reached(Phase.RELEASING)
    [reply] = replies
    return reply


async def come_back(model: str, path: str) -> Reply:
    async with open_api(model_url=model) as api:
        return await api.call("GET", path)


async def test_a_streamed_background_response_goes_on_with_the_next_number(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    reply = await cut(MODEL, stream=True)
    assert reply.body.endswith(b"\n\n: moved\n\ndata: " + reply.body.rpartition(b"data: ")[2])
    assert json.loads(reply.body.rpartition(b"data: ")[2])["error"]["code"] == "stream_cut"
    assert b"[DONE]" not in reply.body
    seen = events_of(reply)
    path = f"/v1/responses/{seen[0]['response']['id']}?stream=true"
    rest = await come_back(MODEL, f"{path}&starting_after={seen[-1]['sequence_number']}")
    assert rest.body.endswith(b"data: [DONE]\n\n")
    events = [*seen, *events_of(rest)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"
    assert text_of(events) == WHOLE == events[-1]["response"]["output"][0]["content"][0]["text"]
    assert [event["type"] for event in events].count("response.output_item.added") == 1
    assert events_of(await come_back(MODEL, path)) == events, "a replay is the same"


async def test_a_response_that_begins_anew_is_read_from_the_beginning(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    seen = events_of(await cut(BEGINS_ANEW, stream=True))
    path = f"/v1/responses/{seen[0]['response']['id']}?stream=true"
    async with open_api(model_url=BEGINS_ANEW) as api:
        for event in seen[2:]:
            refused = await api.call("GET", f"{path}&starting_after={event['sequence_number']}")
            assert (refused.status, refused.json["error"]["code"]) == (400, "response_restarted")
            assert refused.json["error"]["param"] == "starting_after"
        whole = await api.call("GET", path)
        assert whole.body.count(b": resumed\n\n") == 1
        events = events_of(whole)
        assert events[:2] == seen[:2], "the response was created, and is in progress"
        assert text_of(events) == WHOLE
        assert events[2]["sequence_number"] == NUMBERS_PER_ATTEMPT
        for at in (1, 2, 5, len(events) - 1):  # the last that was seen
            rest = await api.call("GET", f"{path}&starting_after={events[at]['sequence_number']}")
            assert events_of(rest) == events[at + 1 :]


async def test_a_client_that_polls_sees_a_response_in_progress_until_it_is_whole(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    accepted = await cut(MODEL)
    path = f"/v1/responses/{accepted.json['id']}"
    async with open_api(model_url=MODEL) as api:
        statuses = []
        while (response := (await api.call("GET", path)).json)["status"] != "completed":
            statuses.append(response["status"])
            await trio.sleep(1)
    assert set(statuses) == {"in_progress"}
    assert response["output"][0]["content"][0]["text"] == WHOLE


async def test_a_client_that_waits_gets_the_end_of_its_response_with_its_process(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    waited = await cut(MODEL, background=False)
    assert (waited.status, waited.json["error"]["code"]) == (503, "interrupted")
    streamed = events_of(await cut(MODEL, background=False, stream=True))
    assert [event["type"] for event in streamed[-2:]] == ["response.incomplete", "error"]


async def test_a_native_turn_that_goes_on_is_a_response_that_does(
    autojump_clock: MockClock, shared: MemoryStore
) -> None:
    async with open_api(model_url=MODEL, drain_timeout_s=0) as api:
        await api.new_session(id="s")
        turn = (
            await api.call("POST", "/sessions/s/turns", {"input": "Hi", "on_interrupt": "continue", "background": True})
        ).json
        await trio.sleep(1)
    events = events_of(await come_back(MODEL, f"/v1/responses/resp_{turn['id'].removeprefix('turn_')}?stream=true"))
    assert text_of(events) == WHOLE
    assert events[-1]["type"] == "response.completed"
