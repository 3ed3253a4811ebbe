"""The end of a response with megabytes of reasoning is sent in steps, the same to all streams."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from service.api.http.app_state import held_bytes_of
from service.api.http.event_stream import PIECE_WRITER, EventStream
from service.api.http.face_frames import encoder_of
from service.api.openai.response_events import ResponseFace
from service.models.client import CallOpened, ReasoningDelta, TextDelta
from service.sessions.events.streams import Streams
from service.settings import Settings
from service.stop_state import StopState
from tests.api.inprocess import Api, open_api
from tests.api.told_turns import a_told_turn
from tests.longest_step import watching_steps
from tests.service.serving import serving
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

PIECE = 'thinking, "hard" é\u2028\n' * 700
ASCII_PIECE = 'thinking, "hard"\n' * 960
PATH = "/v1/responses"
STEP_MAX_S = 0.015
TRIES = 3
"""Caches and a shared core cost processor time, too."""


def chunk(**fields: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


CALL = chunk(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{}"}}])


@asynccontextmanager
async def open_reasoner(pieces: int, goes_on: trio.Event, *, piece: str = PIECE) -> AsyncIterator[str]:
    """A model server that sends reasoning, and then waits before a text, a call and the end."""

    async def behave(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for _ in range(pieces):
            await connection.send_event(chunk(reasoning_content=piece))
        await goes_on.wait()
        for payload in (delta("Hello"), CALL, finish("tool_calls"), DONE):
            await connection.send_event(payload)
        await connection.end_body()

    async with open_raw_server(behave) as server:
        yield server.url


def events_in(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for data in re.findall(rb"^data: (\{.*\})$", body, re.MULTILINE)]


def without_heartbeats(body: bytes) -> bytes:
    return body.replace(b": heartbeat\n\n", b"")


async def stream(api: Api, name: str, told: list[bytes], query: str = "") -> None:
    reply = await api.call("GET", f"{PATH}/{name}?stream=true{query}")
    assert reply.status == 200
    told.append(without_heartbeats(reply.body))


async def test_every_stream_of_a_long_response_is_the_same_live_and_replayed() -> None:
    goes_on = trio.Event()
    async with open_reasoner(12, goes_on) as url, open_api(model_url=url, model="m") as api:
        told: list[bytes] = []
        name = (await api.call("POST", PATH, {"input": "?", "background": True})).json["id"]
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stream, api, name, told)
            nursery.start_soon(stream, api, name, told, "&include=reasoning.encrypted_content")
            await trio.testing.wait_all_tasks_blocked(0.05)
            goes_on.set()
        events = events_in(told[0])
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == PIECE * 12
        kinds = [event["type"] for event in events]
        assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.done")
        await stream(api, name, told)
        assert set(told) == {told[0]}
        frames = told[0].split(b"\n\n")
        for seen in (kinds.index("response.reasoning_text.done"), len(events) - 3, len(events) - 2):
            await stream(api, name, told, f"&starting_after={seen}")
            assert told[-1] == b"\n\n".join(frames[seen + 1 :])
        assert held_bytes_of(api.app).bytes == 0


@pytest.mark.serial
async def test_the_end_of_a_response_with_8_mib_of_reasoning_does_not_hold_the_event_loop() -> None:
    pieces = 8 * 1024 * 1024 // len(ASCII_PIECE)
    live: list[float] = []
    replayed: list[float] = []

    async def read(port: int, target: str) -> int:
        watched.leave_out()
        received = 0
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            while part := await client.receive_some():
                received += len(part)
        return received

    async def read_many(port: int, name: str) -> None:
        sizes: list[int] = []

        async def one() -> None:
            sizes.append(await read(port, f"{PATH}/{name}?stream=true"))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert min(sizes) > 4 * 8 * 1024 * 1024

    with watching_steps() as watched:
        for _ in range(TRIES):
            goes_on = trio.Event()
            async with (
                open_reasoner(pieces, goes_on, piece=ASCII_PIECE) as url,
                serving(Settings(store_url="memory:", model_url=url, model="m")) as server,
            ):
                watched.leave_out()
                api_port = server.port
                body = json.dumps({"input": "?", "background": True}).encode()
                head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                async with await trio.open_tcp_stream("127.0.0.1", api_port) as client:
                    await client.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    answer = b""
                    while (found := re.search(rb"resp_[0-9a-f]{32}", answer)) is None:
                        answer += await client.receive_some()
                name = found[0].decode()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read_many, api_port, name)
                    turn = next(turn for _, turn in server.service.sessions._active.open_turns_by_session())
                    await turn.log.wait_beyond(pieces)
                    watched.reset()
                    goes_on.set()
                live.append(watched.seconds)
                watched.reset()
                await read_many(api_port, name)
                replayed.append(watched.seconds)
    assert min(replayed) < STEP_MAX_S, replayed
    assert min(live) < STEP_MAX_S, live


class _Writer:
    """A host that writes a piece of any size without a wait."""

    has_rest = False

    def write_now(self, piece: bytes) -> bool:
        return bool(piece)


async def test_a_stream_that_waits_is_woken_for_long_frames_by_the_task_that_appends_their_event() -> None:
    turn = a_told_turn()
    face = ResponseFace(turn)
    encoder = encoder_of(turn.log, face)
    streams = Streams(streams_max=1, heartbeat_interval_s=15, stop=StopState())
    slot = streams.open_stream()
    stream = EventStream(
        turn.log,
        slot,
        after=0,
        encode=encoder.encode,
        encoder=encoder,
        scope={PIECE_WRITER: _Writer()},
    )
    await stream.__anext__()
    turn.take([ReasoningDelta("x" * 40_000)])
    told = await stream.__anext__()
    turn.take([TextDelta("a")])
    assert stream.take_appended(trio.current_time()), "a short frame is written at once"
    turn.take([CallOpened(0, "call_a", "f")])
    assert not stream.take_appended(trio.current_time()), "the stream's own task reads long frames"
    while b"response.function_call" not in told and b'"type":"function_call"' not in told:
        told = (await stream.__anext__())[-2000:]
    slot.close()
