"""Responses and completions that are not stored, by the official SDK against the real server.

Their clients keep the history, and what model servers want back with it.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.process.lastcall import SERVE, open_lastcall
from tests.process.test_openai_sdk import open_async, read
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

pytestmark = [
    pytest.mark.parallel,
    # The SDK, and the HTTP client below it, leave generators of a stream to the garbage collector, also at its end.
    pytest.mark.filterwarnings(r"ignore:Async generator '(openai|httpx2?|httpcore2?)\.:ResourceWarning"),
]

SIGNED = {"google": {"thought_signature": "EjQKMgG4Ug+/=="}}
PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
CHAT_WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True},
}
ASKED: Any = {"role": "user", "content": "The weather?"}


# What a model server wants back with its calls


async def gemini(connection: Connection) -> None:
    """A model server that calls a function, and takes no prompt with a call without what it sent with the call."""
    while True:
        request: dict[str, Any] = (await connection.receive_request()).json
        called = [call for message in request["messages"] for call in message.get("tool_calls") or ()]
        if any(call.get("extra_content") != SIGNED for call in called):
            words = "Function call is missing a thought_signature in functionCall parts."
            await connection.send_response(400, {"error": {"message": words, "code": 400}})
            continue
        await connection.send_head()
        if called:
            await connection.send_event(delta("4 °C"))
        else:
            function = {"name": "get_weather", "arguments": "{}"}
            call = {"index": 0, "id": "c1", "type": "function", "function": function, "extra_content": SIGNED}
            await connection.send_event({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
        await connection.send_event(finish("tool_calls" if not called else "stop"))
        await connection.send_event(DONE)
        await connection.end_body()


@asynccontextmanager
async def a_client(folder: Path) -> AsyncIterator[AsyncOpenAI]:
    async with (
        open_raw_server(gemini) as upstream,
        open_lastcall(SERVE, folder, model_url=upstream.url, model_retries_max=0) as server,
        open_async(server) as client,
    ):
        yield client


def as_it_was(item: Mapping[str, Any]) -> Mapping[str, Any]:
    return item


def only_what_is_known(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """An item as a client keeps it that has types of its own: Codex, and the AI SDK."""
    names = {
        "reasoning": ("type", "summary", "encrypted_content"),
        "function_call": ("type", "call_id", "name", "arguments"),
    }
    return {name: item[name] for name in names[item["type"]]}


@pytest.mark.parametrize(
    ("kept", "include"),
    [
        (as_it_was, []),
        (as_it_was, ["reasoning.encrypted_content"]),
        (only_what_is_known, ["reasoning.encrypted_content"]),
    ],
    ids=["whole items", "whole items, encrypted", "known fields"],
)
async def test_a_client_that_keeps_the_history_brings_back_what_the_server_of_a_call_needs(
    tmp_path: Path, kept: Callable[[Mapping[str, Any]], Mapping[str, Any]], include: Any
) -> None:
    async with a_client(tmp_path) as client:
        ask: dict[str, Any] = {"model": "m", "tools": [WEATHER], "store": False, "include": include}
        first = await client.responses.create(input=[ASKED], **ask)
        told = await read(await client.responses.create(input=[ASKED], **ask, stream=True))
        done: list[Any] = [it.item for it in told if it.type == "response.output_item.done"]
        output: Any = {"type": "function_call_output", "call_id": "c1", "output": "4"}
        for answered in (first.output, done):
            history: Any = [ASKED, *(kept(item.to_dict()) for item in answered), output]
            assert (await client.responses.create(input=history, **ask)).output_text == "4 °C"
        stored = await client.responses.create(input=[ASKED], **ask | {"store": True})
        follow = await client.responses.create(model="m", input=[output], previous_response_id=stored.id)
        assert follow.output_text == "4 °C"


async def test_a_history_of_chat_completions_brings_back_what_the_server_of_a_call_needs(tmp_path: Path) -> None:
    async with a_client(tmp_path) as client:
        ask: dict[str, Any] = {"model": "m", "tools": [CHAT_WEATHER]}
        whole = await client.chat.completions.create(messages=[ASKED], **ask)
        async with client.chat.completions.stream(messages=[ASKED], **ask) as stream:
            async for _ in stream:
                pass
            streamed = await stream.get_final_completion()
        result: Any = {"role": "tool", "tool_call_id": "c1", "content": "4"}
        for completion in (whole, streamed):
            answered: Any = completion.choices[0].message.to_dict()
            for call in answered["tool_calls"]:
                call.get("function", {}).pop("parsed_arguments", None)  # the SDK's own, of `stream()` alone
            answered.pop("parsed", None)
            answer = await client.chat.completions.create(messages=[ASKED, answered, result], **ask)
            assert answer.choices[0].message.content == "4 °C"
