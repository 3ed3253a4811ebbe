"""The official SDK, with its strict validation, against the real server: chat completions, conversations, models.

The async client runs on Trio. The model server is scripted by the model's name.
"""

import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from openai import (
    APIError,
    AsyncOpenAI,
    AsyncStream,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
    RateLimitError,
)
from openai.types.chat import ChatCompletionChunk

from tests.process.lastcall import CAP_S, SERVE, open_lastcall
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server, reasoning, usage

pytestmark = [
    pytest.mark.parallel,
    # The SDK, and the HTTP client below it, leave generators of a stream to the garbage collector, also at its end.
    pytest.mark.filterwarnings(r"ignore:Async generator '(openai|httpx2?|httpcore2?)\.:ResourceWarning"),
]

HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}, "strict": True}}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
}


def call_piece(index: int, arguments: str, **opening: Any) -> dict[str, object]:
    function = {"arguments": arguments, **({"name": opening.pop("name")} if "name" in opening else {})}
    call = {"index": index, "function": function, **opening}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}


class Upstream:
    """A model server whose reply depends on the model's name; it notes the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.asked = trio.Event()
        """Set with the first request for a reply."""
        self.left = trio.Event()
        """Set once a client has left a reply that does not end."""

    async def reply(self, connection: Connection) -> None:
        while True:
            request = await connection.receive_request()
            if request.method == "GET":
                listed = [{"id": "text", "object": "model", "created": 7, "owned_by": "me"}, {"id": "org/calls"}]
                await connection.send_response(200, {"object": "list", "data": listed})
                continue
            asked: dict[str, Any] = request.json
            self.requests.append(asked)
            self.asked.set()
            if asked["model"] in ("too-long", "limited"):
                status = 400 if asked["model"] == "too-long" else 429
                code = "context_length_exceeded" if status == 400 else "rate_limit_exceeded"
                await connection.send_response(status, {"error": {"message": "No.", "type": "x", "code": code}})
                continue
            await connection.send_head()
            for event in self.events(asked):
                await connection.send_event(event)
            if asked["model"] == "endless":
                await connection.wait_closed()
                self.left.set()
            if asked["model"] in ("endless", "broken"):
                return
            await connection.send_event(DONE)
            await connection.end_body()

    def events(self, asked: dict[str, Any]) -> list[object]:
        match asked["model"]:
            case "org/calls" if asked["messages"][-1]["role"] != "tool":
                return [
                    # One after the other: the SDK's own `stream()` takes a call for whole when the next one begins.
                    call_piece(0, "", id="call_a", name="get", type="function"),
                    call_piece(0, "{}"),
                    call_piece(1, '{"city":', id="call_b", name="get", type="function"),
                    call_piece(1, '"Oslo"}'),
                    finish("tool_calls"),
                    usage(5, 6),
                ]
            case "endless" | "broken":
                return [delta("Hel"), delta("lo")]
            case _:
                return [reasoning("hm"), delta("Hel"), delta("lo\u2028"), finish(), usage(12, 34, 5)]


@asynccontextmanager
async def a_server(folder: Path) -> AsyncIterator[tuple[str, Upstream]]:
    """The base URL of a server, and the model server behind it."""
    upstream = Upstream()
    async with (
        open_raw_server(upstream.reply) as raw,
        open_lastcall(SERVE, folder, model_url=f"{raw.url}/v1", model="text", model_retries_max=0) as server,
    ):
        yield f"http://127.0.0.1:{server.port}/v1", upstream


def options(url: str) -> dict[str, Any]:
    return {"base_url": url, "api_key": "none", "timeout": CAP_S, "_strict_response_validation": True}


async def test_chat_completions_of_both_clients(tmp_path: Path) -> None:
    async with a_server(tmp_path) as (url, upstream), AsyncOpenAI(**options(url)) as client:
        completions = client.chat.completions
        whole = await completions.create(
            model="text",
            messages=[{"role": "developer", "content": "Be brief."}, *HI],
            temperature=0.5,
            top_p=0.9,
            max_completion_tokens=50,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            stop=["x"],
            seed=7,
            response_format=SCHEMA,
            user="u",
            metadata={"a": "b"},
        )
        assert whole.choices[0].message.content == "Hello\u2028"
        assert (whole.choices[0].message.model_extra or {})["reasoning_content"] == "hm"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (12, 46)
        asked = upstream.requests[0]
        assert asked["messages"] == [{"role": "system", "content": "Be brief."}, *HI]
        assert asked["response_format"] == SCHEMA
        assert (asked["temperature"], asked["top_p"], asked["seed"], asked["stop"]) == (0.5, 0.9, 7, ["x"])
        assert (asked["frequency_penalty"], asked["presence_penalty"]) == (0.5, -0.5)
        assert not {"user", "metadata"} & asked.keys()
        stream = await completions.create(
            model="text", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(it.choices[0].delta.content or "" for it in chunks if it.choices) == "Hello\u2028"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage
        sync = await trio.to_thread.run_sync(sync_chat, url)
        assert sync == ("Hello\u2028", ["Hel", "lo\u2028"])


def sync_chat(url: str) -> tuple[str | None, list[str]]:
    with OpenAI(**options(url)) as client:
        whole = client.chat.completions.create(model="text", messages=HI)
        with client.chat.completions.create(model="text", messages=HI, stream=True) as stream:
            pieces = [it.choices[0].delta.content for it in stream if it.choices]
        return whole.choices[0].message.content, [piece for piece in pieces if piece]


async def test_parallel_calls_and_their_results(tmp_path: Path) -> None:
    async with a_server(tmp_path) as (url, upstream), AsyncOpenAI(**options(url)) as client:
        async with client.chat.completions.stream(model="org/calls", messages=HI, tools=[TOOL]) as stream:
            final = await stream.get_final_completion()
        whole = await client.chat.completions.create(
            model="org/calls", messages=HI, tools=[TOOL], tool_choice="required", parallel_tool_calls=True
        )
        message = whole.choices[0].message
        calls = [
            (it.id, it.function.name, it.function.arguments) for it in message.tool_calls or () if it.type == "function"
        ]
        assert calls == [("call_a", "get", "{}"), ("call_b", "get", '{"city":"Oslo"}')]
        streamed = final.choices[0].message.tool_calls or []
        assert [(it.id, it.function.name, it.function.arguments) for it in streamed] == calls
        assert (whole.choices[0].finish_reason, final.choices[0].finish_reason) == ("tool_calls", "tool_calls")
        results: list[Any] = [{"role": "tool", "tool_call_id": it, "content": f"of {it}"} for it, *_ in calls]
        back: Any = message.model_dump(exclude_none=True)
        answer = await client.chat.completions.create(model="org/calls", messages=[*HI, back, *results], tools=[TOOL])
        assert answer.choices[0].message.content == "Hello\u2028"
    assert upstream.requests[0]["tools"] == [TOOL]
    assert upstream.requests[1]["tool_choice"] == "required"
    roles = [it["role"] for it in upstream.requests[2]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]


async def read_cut(
    stream: AsyncStream[ChatCompletionChunk], *, at_end: Callable[[], object] | None = None
) -> tuple[str, dict[str, Any]]:
    """The text of a stream that must end with an error, and the body of the error.

    Args:
        at_end: Called when the text has come.
    """
    text = ""
    try:
        async with stream, aclosing(cast("AsyncGenerator[ChatCompletionChunk]", aiter(stream))) as chunks:
            async for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                assert chunk.choices[0].finish_reason is None
                if text == "Hello" and at_end is not None:
                    at_end()
    except APIError as error:
        body: Any = error.body
        return text, body
    raise AssertionError("the stream ended without an error")


async def leave_in_mid_reply(stream: AsyncStream[ChatCompletionChunk]) -> None:
    """Leave a stream by a cancellation, which unwinds the generators within the SDK, too."""
    async with stream:
        with trio.CancelScope() as scope:
            async for chunk in stream:
                if chunk.choices[0].delta.content == "lo":
                    scope.cancel()


async def test_failures_are_the_errors_of_the_sdk_and_no_cut_reply_is_a_success(tmp_path: Path) -> None:
    async with a_server(tmp_path) as (url, upstream), AsyncOpenAI(**options(url), max_retries=0) as client:
        create = client.chat.completions.create
        for stream in (False, True):
            with pytest.raises(BadRequestError) as refused:
                await create(model="too-long", messages=HI, stream=stream)
            assert refused.value.code == "context_length_exceeded"
            with pytest.raises(RateLimitError):
                await create(model="limited", messages=HI, stream=stream)
            with pytest.raises(BadRequestError) as unsupported:
                await create(model="text", messages=HI, n=2, stream=stream)
            assert (unsupported.value.param, unsupported.value.code) == ("n", "unsupported_parameter")
        with pytest.raises(InternalServerError):
            await create(model="broken", messages=HI)
        text, body = await read_cut(await create(model="broken", messages=HI, stream=True))
        assert (text, body["code"]) == ("Hello", "upstream_truncated")
        await leave_in_mid_reply(await create(model="endless", messages=HI, stream=True))
        with trio.fail_after(CAP_S):
            await upstream.left.wait()


async def test_a_stop_in_mid_reply_is_an_error_of_the_sdk(tmp_path: Path) -> None:
    upstream = Upstream()
    async with (
        open_raw_server(upstream.reply) as raw,
        open_lastcall(SERVE, tmp_path, model_url=f"{raw.url}/v1", drain_timeout_s=0) as server,
        AsyncOpenAI(**options(f"http://127.0.0.1:{server.port}/v1"), max_retries=0) as client,
    ):
        statuses: list[int] = []

        async def ask_whole() -> None:
            with pytest.raises(InternalServerError) as interrupted:
                await client.chat.completions.create(model="endless", messages=HI)
            statuses.append(interrupted.value.status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_whole)
            with trio.fail_after(CAP_S):
                await upstream.asked.wait()
            stream = await client.chat.completions.create(model="endless", messages=HI, stream=True)
            text, body = await read_cut(stream, at_end=partial(server.signal_main, signal.SIGTERM))
        assert text == "Hello"
        assert body["lastcall"] == {"state": "interrupted", "reason": "shutdown", "code": None}
        assert statuses == [503]


# Conversations


async def test_conversations_and_items_of_both_clients(tmp_path: Path) -> None:
    async with a_server(tmp_path) as (url, _), AsyncOpenAI(**options(url)) as client:
        items: list[Any] = [{"type": "message", "role": "user", "content": str(n)} for n in range(5)]
        made = await client.conversations.create(metadata={"a": "b"}, items=items)
        assert (made.object, made.metadata) == ("conversation", {"a": "b"})
        assert await client.conversations.retrieve(made.id) == made
        updated = await client.conversations.update(made.id, metadata={"c": "d"})
        assert updated.metadata == {"c": "d"}
        more: list[Any] = [
            {"type": "function_call", "call_id": "call_1", "name": "get", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "4"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "4", "annotations": []}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"},
        ]
        added = await client.conversations.items.create(made.id, items=more, include=["reasoning.encrypted_content"])
        assert [it.type for it in added.data] == ["function_call", "function_call_output", "message", "reasoning"]
        assert added.data[3].encrypted_content == "sealed"  # type: ignore[union-attr]
        ids = [it.id async for it in client.conversations.items.list(made.id, order="asc", limit=2)]
        assert len(ids) == len(set(ids)) == 9
        newest = [it.id async for it in client.conversations.items.list(made.id, limit=4)]
        assert newest == ids[::-1]
        for item in added.data:
            assert item.id is not None
            found = await client.conversations.items.retrieve(item.id, conversation_id=made.id)
            assert found.type == item.type
        assert ids[5] is not None
        left = await client.conversations.items.delete(ids[5], conversation_id=made.id)
        assert left.id == made.id
        assert len([it async for it in client.conversations.items.list(made.id)]) == 7
        with pytest.raises(NotFoundError):
            await client.conversations.items.retrieve(ids[5], conversation_id=made.id)
        gone = await client.conversations.delete(made.id)
        assert (gone.deleted, gone.object) == (True, "conversation.deleted")
        with pytest.raises(NotFoundError) as missing:
            await client.conversations.retrieve(made.id)
        assert missing.value.code == "conversation_not_found"
        assert await trio.to_thread.run_sync(sync_conversation, url) == ["b", "a"]


def sync_conversation(url: str) -> list[str]:
    with OpenAI(**options(url)) as client:
        made = client.conversations.create()
        for text in ("a", "b"):
            client.conversations.items.create(made.id, items=[{"type": "message", "role": "user", "content": text}])
        items: list[Any] = list(client.conversations.items.list(made.id, limit=1))
        texts = [it.content[0].text for it in items]
        client.conversations.delete(made.id)
        return texts


# Models


async def test_models_of_both_clients(tmp_path: Path) -> None:
    async with a_server(tmp_path) as (url, _), AsyncOpenAI(**options(url)) as client:
        listed = [model async for model in client.models.list()]
        assert [(it.id, it.created, it.owned_by) for it in listed] == [("text", 7, "me"), ("org/calls", 0, "unknown")]
        assert (await client.models.retrieve("org/calls")).id == "org/calls"
        with pytest.raises(NotFoundError) as missing:
            await client.models.retrieve("none")
        assert missing.value.code == "model_not_found"

        def sync_models() -> list[str]:
            with OpenAI(**options(url)) as sync:
                return [it.id for it in sync.models.list()] + [sync.models.retrieve("text").id]

        assert await trio.to_thread.run_sync(sync_models) == ["text", "org/calls", "text"]
