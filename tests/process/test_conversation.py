"""The main job on real input: a conversation over the real server with an independent model server."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.process.lastcall import CAP_S, HYPERCORN_1, SERVE, Host, assert_clean, open_lastcall
from tests.upstreams.independent import running_fakellm

pytestmark = pytest.mark.parallel

RULES = """
version: 1
rules:
  - name: second turn
    when: {messages_contain: "shorter"}
    respond: {content: "A nursery owns its tasks."}
  - name: first turn
    when: {messages_contain: "nursery"}
    respond: {content: "In Trio a nursery is a block that owns tasks: it ends when all of them have ended. 🌱"}
"""


@pytest.fixture
def model_url(tmp_path: Path) -> Iterator[str]:
    with running_fakellm(tmp_path, RULES) as url:
        yield url


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_conversation_of_several_turns(tmp_path: Path, host: Host, model_url: str) -> None:
    async with open_lastcall(host, tmp_path, model_url=f"{model_url}/v1", model="gpt-4o") as server:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=CAP_S) as client:
            created = await client.post("/sessions", json={"id": "tour", "system_message": "Be brief."})
            assert created.status_code == 201
            first = await stream(client, "What is a nursery?")
            assert first == "In Trio a nursery is a block that owns tasks: it ends when all of them have ended. 🌱"
            second = await client.post("/sessions/tour/turns", json={"input": "And shorter?"})
            assert (second.status_code, second.json()["text"]) == (200, "A nursery owns its tasks.")
            background = await client.post(
                "/sessions/tour/turns", json={"input": "Thanks, shorter!", "background": True}
            )
            assert background.status_code == 202
            path = background.headers["location"]
            replayed = await client.get(f"{path}/events", headers={"Last-Event-ID": "1"})
            assert json.loads(replayed.text.split("data: ")[-1])["type"] == "turn.completed"
            messages = (await client.get("/sessions/tour/messages")).json()["data"]
            assert [(message["role"], message["text"]) for message in messages] == [
                ("user", "What is a nursery?"),
                ("assistant", first),
                ("user", "And shorter?"),
                ("assistant", "A nursery owns its tasks."),
                ("user", "Thanks, shorter!"),
                ("assistant", "A nursery owns its tasks."),
            ]
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
    assert_clean(host, server, gone)


async def stream(client: httpx.AsyncClient, text: str) -> str:
    """Run a turn as a stream, check that its last event completes it, and return the reply from its deltas."""
    async with client.stream(
        "POST", "/sessions/tour/turns", json={"input": text}, headers={"Accept": "text/event-stream"}
    ) as response:
        assert response.status_code == 200
        body = (await response.aread()).decode()
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "turn.completed"
    assert len(events) > 4, "it did not stream"
    return "".join(event["text"] for event in events if event["type"] == "turn.delta")
