"""Responses and completions that are not stored, by the official SDK against the real server.

Their clients keep the history, and what model servers want back with it. A crash leaves nothing of them.
"""

import gc
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import apsw
import httpx2
import openai
import pytest
import trio
from openai import AsyncOpenAI, AsyncStream
from openai.types.responses import Response, ResponseStreamEvent

from bench.server_process import ServerProcess
from tests.process.lastcall import CAP_S, HYPERCORN_2, SERVE, assert_clean, open_lastcall, wait_gone
from tests.process.test_openai_sdk import final, numbers, open_async, read
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


KEPT: tuple[tuple[Callable[[Mapping[str, Any]], Mapping[str, Any]], list[Any]], ...] = (
    (as_it_was, []),
    (as_it_was, ["reasoning.encrypted_content"]),
    (only_what_is_known, ["reasoning.encrypted_content"]),
)
"""How clients keep items, and what they ask to be included."""


async def test_a_client_that_keeps_the_history_brings_back_what_the_server_of_a_call_needs(tmp_path: Path) -> None:
    output: Any = {"type": "function_call_output", "call_id": "c1", "output": "4"}
    async with a_client(tmp_path) as client:
        for kept, include in KEPT:
            ask: dict[str, Any] = {"model": "m", "tools": [WEATHER], "store": False, "include": include}
            first = await client.responses.create(input=[ASKED], **ask)
            told = await read(await client.responses.create(input=[ASKED], **ask, stream=True))
            done: list[Any] = [it.item for it in told if it.type == "response.output_item.done"]
            for answered in (first.output, done):
                history: Any = [ASKED, *(kept(item.to_dict()) for item in answered), output]
                assert (await client.responses.create(input=history, **ask)).output_text == "4 °C"
        stored = await client.responses.create(model="m", input=[ASKED], tools=[WEATHER])
        follow = await client.responses.create(model="m", input=[output], previous_response_id=stored.id)
        assert follow.output_text == "4 °C"
        bare: Any = [ASKED, only_what_is_known(stored.output[-1].to_dict()), output]
        with pytest.raises(openai.BadRequestError, match="thought_signature"):
            await client.responses.create(model="m", input=bare, store=False)


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


# Unstored responses, while they live and after a crash


class Held:
    """A model server whose reply stops in the middle until the test lets it go on."""

    def __init__(self) -> None:
        self.goes_on = trio.Event()
        self.word = "Hello"

    async def reply(self, connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(delta(self.word))
        await self.goes_on.wait()
        await connection.send_event(delta(" there"))
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()


async def test_any_worker_shows_an_unstored_response_while_it_lives_and_none_afterwards(tmp_path: Path) -> None:
    """Its stream goes on for a client that comes back. Each client here has a connection of its own."""
    held = Held()
    async with (
        open_raw_server(held.reply) as upstream,
        open_lastcall(HYPERCORN_2, tmp_path, model_url=upstream.url) as server,
        open_async(server) as client,
    ):
        stream = await client.responses.create(model="m", input="Hi", store=False, stream=True)
        begun: list[ResponseStreamEvent] = []
        async for event in stream:
            begun.append(event)
            if event.type == "response.output_text.delta":
                break
        assert begun[0].type == "response.created"
        name = begun[0].response.id
        rest: list[list[ResponseStreamEvent]] = []
        returned = 0

        async def come_back() -> None:
            nonlocal returned
            async with open_async(server) as other:
                live = await other.responses.retrieve(name)
                assert (live.status, live.output_text) == ("in_progress", "Hello")
                again = await other.responses.retrieve(name, stream=True, starting_after=begun[-1].sequence_number)
                returned += 1
                if returned == 6:
                    held.goes_on.set()
                rest.append(await read(again))

        with trio.fail_after(CAP_S):
            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(come_back)
        mine = [event async for event in stream]
        await stream.close()
        del stream
        gc.collect()  # see the filter above
        assert [str(events) for events in rest] == [str(mine)] * 6
        assert numbers(begun + mine) == list(range(len(begun + mine)))
        assert (final(mine).status, final(mine).output_text) == ("completed", "Hello there")
        for _ in range(4):
            async with open_async(server) as other:
                with pytest.raises(openai.NotFoundError):
                    await other.responses.retrieve(name)
                with pytest.raises(openai.NotFoundError):
                    await other.responses.retrieve(name, stream=True)


async def test_an_unstored_response_whose_client_comes_back_in_time_is_not_cancelled(tmp_path: Path) -> None:
    held = Held()
    async with (
        open_raw_server(held.reply) as upstream,
        open_lastcall(SERVE, tmp_path, model_url=upstream.url, disconnect_grace_s=CAP_S) as server,
        open_async(server) as client,
    ):
        begun = await read(await client.responses.create(model="m", input="Hi", store=False, stream=True), until=4)
        assert begun[0].type == "response.created"
        name = begun[0].response.id
        again = await client.responses.retrieve(name, stream=True, starting_after=4)
        held.goes_on.set()
        rest = await read(again)
        assert numbers(begun + rest) == list(range(len(begun + rest)))
        assert final(rest).output_text == "Hello there"


def rows_with(path: Path, *words: str) -> list[str]:
    """The tables of a store that nobody has open in which one of these words is left."""
    found = []
    with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
            rows = repr(db.execute(f'SELECT * FROM "{table}"').fetchall())
            found += [f"{table}: {word}" for word in words if word in rows]
    return found


async def read_until_killed(
    server: ServerProcess, stream: AsyncStream[ResponseStreamEvent], is_stored: Callable[[], bool]
) -> str:
    """Kill the server in the middle of a response, once a checkpoint of its first word is stored. Returns its id.

    The client gets an exception, and no end of the response.
    """
    seen: list[ResponseStreamEvent] = []
    with pytest.raises((openai.APIError, httpx2.TransportError)):  # noqa: PT012  the loop is what raises
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                while not is_stored():  # noqa: ASYNC110  another process writes the checkpoint
                    await trio.sleep(0.02)
                server.signal_main(signal.SIGKILL)
    await stream.close()
    await wait_gone(server)
    assert seen[0].type == "response.created"
    assert seen[-1].type == "response.output_text.delta"
    return seen[0].response.id


@pytest.mark.parametrize("followed", [False, True], ids=["alone", "after a stored one"])
async def test_after_a_crash_nothing_is_left_of_an_unstored_response(tmp_path: Path, followed: bool) -> None:
    held = Held()
    store = tmp_path / "lastcall.db"
    words = ("What nobody may find", "Hello from nobody")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    async with open_raw_server(held.reply) as upstream:
        options: dict[str, Any] = {"store_url": f"sqlite:{store}", "model_url": upstream.url}
        options |= {"checkpoint_interval_s": 0.1}
        ask: dict[str, Any] = {"model": "m", "input": words[0], "store": False, "stream": True}
        ask |= {"extra_headers": {"Idempotency-Key": "a key of its own"}}
        before: Response | None = None
        async with open_lastcall(SERVE, tmp_path / "first", **options) as server, open_async(server) as client:
            if followed:
                held.goes_on.set()
                before = await client.responses.create(model="m", input="kept")
                ask["previous_response_id"] = before.id
                held.goes_on = trio.Event()
            held.word = words[1]
            stream = await client.responses.create(**ask)
            name = await read_until_killed(server, stream, lambda: rows_with(store, words[1]) != [])
        async with open_lastcall(SERVE, tmp_path / "second", **options) as server, open_async(server) as client:
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(name)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(name, stream=True)
            with pytest.raises(openai.BadRequestError) as gone:
                await client.responses.create(model="m", input="?", previous_response_id=name)
            assert gone.value.code == "previous_response_not_found"
            with pytest.raises(openai.APIStatusError) as spent:
                await client.responses.create(**ask)
            assert (spent.value.status_code, spent.value.code) == (410, "idempotency_key_spent")
            listed: Any = (await client.get("../sessions", cast_to=httpx2.Response)).json()["data"]
            if before is None:
                assert listed == []
            else:
                assert [session["head"] for session in listed] == [before.id.replace("resp_", "turn_")]
                assert await client.responses.retrieve(before.id) == before
            server.signal_main(signal.SIGTERM)
            assert_clean(SERVE, server, await wait_gone(server))
        assert rows_with(store, *words) == []
