"""Function calls over the real server: a call, its output and the answer, through a stop in mid-call."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.process.lastcall import CAP_S, SERVE, open_lastcall, wait_gone
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

pytestmark = pytest.mark.parallel

TOOL = {"type": "function", "name": "get", "parameters": {"type": "object"}}


def piece(index: int, arguments: str, **opening: Any) -> dict[str, object]:
    function = {"arguments": arguments, **({"name": opening.pop("name")} if "name" in opening else {})}
    call = {"index": index, "type": "function", "function": function, **opening}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}


def events_in(stream: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]


async def test_a_call_outlives_a_stop_in_mid_call_and_its_output_reaches_the_model(tmp_path: Path) -> None:
    requests: list[dict[str, Any]] = []
    live: list[dict[str, Any]] = []

    async def reply(connection: Connection) -> None:
        """First two calls, the second without an end; then an answer."""
        requests.append((await connection.receive_request()).json)
        await connection.send_head()
        if len(requests) == 1:
            for event in (
                *(delta("Let me look."), piece(0, '{"city":', id="call_a", name="get"), piece(0, '"Oslo"}')),
                piece(1, '{"ci', id="call_b", name="get"),
            ):
                await connection.send_event(event)
            await connection.wait_closed()
            return
        await connection.send_event(delta("4 °C"))
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()

    async with open_raw_server(reply) as upstream:
        options: dict[str, Any] = {
            "store_url": f"sqlite:{tmp_path}/lastcall.db",
            "model_url": upstream.url,
            "drain_timeout_s": 0,
        }
        for name in "first", "second":
            (tmp_path / name).mkdir()
        async with open_lastcall(SERVE, tmp_path / "first", **options) as server:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client:
                await client.post("/sessions", json={"id": "s"})
                body = {"input": "The weather?", "tools": [TOOL], "background": True}
                path = (await client.post("/sessions/s/turns", json=body)).headers["location"]
                async with client.stream("GET", f"{path}/events") as stream:
                    async for line in stream.aiter_lines():
                        live += events_in(line)
                        if live and live[-1].get("item") == 2 and live[-1]["type"] == "turn.arguments":
                            server.signal_main(signal.SIGTERM)
            await wait_gone(server)
        async with (
            open_lastcall(SERVE, tmp_path / "second", **options) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client,
        ):
            turn = (await client.get(path)).json()
            replayed = events_in((await client.get(f"{path}/events")).text)
            output = {"type": "function_call_output", "call_id": "call_a", "output": "4"}
            answer = (await client.post("/sessions/s/turns", json={"input": [output]})).json()
    assert (turn["state"], turn["reason"]) == ("interrupted", "shutdown")
    assert [(it["type"], it.get("arguments"), it.get("complete")) for it in turn["items"][2:]] == [
        ("function_call", '{"city":"Oslo"}', True),
        ("function_call", '{"ci', False),
    ]
    assert replayed == live
    assert [event["id"] for event in live if event["type"] == "turn.call"] == [it["id"] for it in turn["items"][2:]]
    assert answer["text"] == "4 °C"
    assert requests[0]["tools"] == [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
    function = {"name": "get", "arguments": '{"city":"Oslo"}'}
    assert requests[1]["messages"] == [
        {"role": "user", "content": "The weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [{"id": "call_a", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "4"},
    ]
