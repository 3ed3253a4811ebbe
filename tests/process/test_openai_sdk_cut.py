"""The official SDK, with its strict validation, at replies that are cut: it never takes one for a whole reply.

Both clients, the asynchronous one on Trio, read a stream, use the SDK's helper for streams, and wait for a whole reply,
through responses and through chat completions, in mid-text and in mid-call: all at once, so that one end cuts them all.
"""

import gc
import signal
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import trio
from openai import APIError, AsyncOpenAI, NotFoundError, OpenAI

from bench.server_process import ServerProcess
from tests.process.cut_replies import CutModel, delete_responses, is_last_piece, open_cut_server, wait_begun
from tests.process.lastcall import CAP_S, wait_gone

pytestmark = [
    pytest.mark.parallel,
    # The SDK, and the HTTP client below it, leave generators of a stream to the garbage collector, also at its end.
    pytest.mark.filterwarnings(r"ignore:Async generator '(openai|httpx2?|httpcore2?)\.:ResourceWarning"),
]

ENDS = ("response.completed", "response.incomplete", "response.failed")
Face = Literal["responses", "chat"]
Way = Literal["whole", "stream", "helper"]
CITY: Mapping[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS: tuple[Any, ...] = tuple(
    {"name": name, "description": "A tool.", "parameters": CITY} for name in ("get_weather", "get_time")
)


@dataclass(frozen=True)
class Ask:
    """A request for a reply that will be cut."""

    face: Face
    way: Way
    model: str

    def body(self) -> dict[str, Any]:
        if self.face == "chat":
            tools = [{"type": "function", "function": function} for function in FUNCTIONS]
            return {"model": self.model, "messages": [{"role": "user", "content": "Hi"}], "tools": tools}
        return {"model": self.model, "input": "Hi", "tools": [{"type": "function", **it} for it in FUNCTIONS]}

    def calls_of(self, client: AsyncOpenAI | OpenAI) -> Any:
        return client.responses if self.face == "responses" else client.chat.completions


class Begun:
    """Which streams have seen the beginning of their reply."""

    def __init__(self, streams: int) -> None:
        self._left = streams
        self._all = trio.Event()

    def note(self, part: Any) -> None:
        part = getattr(part, "chunk", part)  # the helper of chat completions has each chunk in an event
        choices = getattr(part, "choices", None)
        piece = getattr(part, "delta", None)
        if choices:
            calls = choices[0].delta.tool_calls
            piece = calls[0].function.arguments if calls else choices[0].delta.content
        if is_last_piece(piece):
            self._left -= 1
            if self._left == 0:
                self._all.set()

    async def wait_all(self) -> None:
        with trio.fail_after(CAP_S):
            await self._all.wait()


def cause_of(told: Any) -> str:
    return f"{told['state']} {told.get('code') or told.get('reason')}"


def seen_end(end: Any) -> str:
    """What a client has in hand if no exception was raised: a response, or the last part of a stream."""
    response = getattr(end, "response", end)
    if not hasattr(response, "status"):
        return f"taken for a success: {end!r}"
    calls = [it.status for it in response.output if it.type == "function_call"]
    assert "completed" not in calls[1:], "the call that was cut looks whole"
    return f"{getattr(end, 'type', response.status)} {cause_of(response.model_extra['lastcall'])}"


def seen_error(error: Exception, end: Any) -> str:
    """What a client has in hand after an exception: the end of the response before it, if it has seen that."""
    before = [seen_end(end)] if getattr(end, "type", "") in ENDS else []
    name, status = type(error).__name__, getattr(error, "status_code", None)
    body: Any = getattr(error, "body", None)
    told = body.get("lastcall") if isinstance(body, dict) else None
    words = [name, *([str(status)] if status else []), *([cause_of(told)] if told else [])]
    return ", ".join([*before, " ".join(words)])


async def use_async(client: AsyncOpenAI, ask: Ask, begun: Begun) -> str:
    calls, end = ask.calls_of(client), None
    try:
        if ask.way == "whole":
            return seen_end(await calls.create(**ask.body()))
        opened = calls.stream(**ask.body()) if ask.way == "helper" else await calls.create(**ask.body(), stream=True)
        async with opened as stream, aclosing(cast("AsyncGenerator[Any]", aiter(stream))) as parts:
            async for part in parts:
                begun.note(part)
                end = part
            if ask.way == "helper":
                final = stream.get_final_response if ask.face == "responses" else stream.get_final_completion
                return seen_end(await final())
    except APIError as error:
        return seen_error(error, end)
    return seen_end(end)


def use_sync(client: OpenAI, ask: Ask, note: Callable[[Any], None]) -> str:
    calls, end = ask.calls_of(client), None
    try:
        if ask.way == "whole":
            return seen_end(calls.create(**ask.body()))
        opened = calls.stream(**ask.body()) if ask.way == "helper" else calls.create(**ask.body(), stream=True)
        with opened as stream:
            for part in stream:
                note(part)
                end = part
            if ask.way == "helper":
                return seen_end(
                    stream.get_final_response() if ask.face == "responses" else stream.get_final_completion()
                )
    except APIError as error:
        return seen_error(error, end)
    return seen_end(end)


async def cut(
    server: ServerProcess, model: CutModel, asks: list[Ask], end: Callable[[Begun], Any]
) -> dict[tuple[str, Ask], str]:
    """Ask for all replies with both clients, end them, and return what each client saw."""
    begun = Begun(2 * sum(ask.way != "whole" and ask.model != "silent" for ask in asks))
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": CAP_S}
    options |= {"base_url": f"http://127.0.0.1:{server.port}/v1", "_strict_response_validation": True}
    seen: dict[tuple[str, Ask], str] = {}
    limiter = trio.CapacityLimiter(len(asks))

    async def in_task(ask: Ask) -> None:
        seen["async", ask] = await use_async(client, ask, begun)

    async def in_thread(ask: Ask) -> None:
        def use() -> str:
            return use_sync(sync, ask, lambda part: trio.from_thread.run_sync(begun.note, part))

        seen["sync", ask] = await trio.to_thread.run_sync(use, limiter=limiter)

    with OpenAI(**options) as sync:
        async with AsyncOpenAI(**options) as client, trio.open_nursery() as nursery:
            for ask in asks:
                nursery.start_soon(in_task, ask)
                nursery.start_soon(in_thread, ask)
            await model.wait_asked(2 * len(asks))
            await end(begun)
    gc.collect()  # see the filter above: otherwise generators of the SDK are collected after the test
    return seen


def asks_for(models: tuple[str, ...]) -> list[Ask]:
    faces: tuple[Face, ...] = ("responses", "chat")
    ways: tuple[Way, ...] = ("whole", "stream", "helper")
    return [Ask(face, way, model) for face, way, model in product(faces, ways, models)]


Table = Mapping[Face, Mapping[Way, str]]


def assert_seen(seen: Mapping[tuple[str, Ask], str], table: Table) -> None:
    expected = {(client, ask): table[ask.face][ask.way] for client, ask in seen}
    assert seen == expected


def by_way(*, whole: str, stream: str, before: str | None = None) -> Table:
    """What is seen: of chat completions ``whole`` and ``stream``, and of responses an event before the error, too."""
    chat: dict[Way, str] = {"whole": whole, "stream": stream, "helper": stream}
    streams = stream if before is None else f"{before}, APIError {stream.partition(' ')[2]}"
    return {"chat": chat, "responses": chat | {"stream": streams, "helper": streams}}


STOPPED = by_way(
    whole="InternalServerError 503 interrupted shutdown",
    stream="APIError interrupted shutdown",
    before="response.incomplete interrupted shutdown",
)
KILLED = by_way(whole="APIConnectionError", stream="APIConnectionError")
LATE = by_way(
    whole="InternalServerError 504 failed turn_timeout",
    stream="APIError failed turn_timeout",
    before="response.failed failed turn_timeout",
)
_AT_ONCE = "InternalServerError 504 failed first_token_timeout"
TOO_LATE: Table = {
    "chat": {"whole": _AT_ONCE, "stream": _AT_ONCE, "helper": _AT_ONCE},  # there was no chunk yet
    "responses": by_way(
        whole=_AT_ONCE,
        stream="APIError failed first_token_timeout",
        before="response.failed failed first_token_timeout",
    )["responses"],
}
DELETED = by_way(
    whole="InternalServerError 500 cancelled requested",
    stream="APIError cancelled requested",
    before="response.incomplete cancelled requested",
)


async def test_a_stop_cuts_no_reply_that_the_sdk_takes_for_a_whole_one(tmp_path: Path) -> None:
    async def stop(begun: Begun) -> None:
        await begun.wait_all()
        assert len(await wait_begun(server, tmp_path)) == 2 * len(asks)
        server.signal_main(signal.SIGTERM)

    asks = asks_for(("text", "call"))
    async with open_cut_server(tmp_path, "stop") as (model, server):
        assert_seen(await cut(server, model, asks, stop), STOPPED)
        await wait_gone(server)


async def test_a_crash_cuts_no_reply_that_the_sdk_takes_for_a_whole_one(tmp_path: Path) -> None:
    """Neither the clients of then, nor those that come back after the restart."""
    names: list[str] = []

    async def kill(begun: Begun) -> None:
        await begun.wait_all()
        names.extend(await wait_begun(server, tmp_path))
        server.signal_main(signal.SIGKILL)

    asks = asks_for(("text", "call"))
    async with open_cut_server(tmp_path, "kill") as (model, server):
        assert_seen(await cut(server, model, asks, kill), KILLED)
        await wait_gone(server)
    kept, gone = [], 0
    async with (
        open_cut_server(tmp_path, "kill") as (_, server),
        AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=CAP_S) as client,
    ):
        for name in names:
            try:
                kept.append(seen_end(await client.responses.retrieve(name)))
            except NotFoundError:
                gone += 1
    assert set(kept) <= {"incomplete interrupted crash", "failed interrupted crash"}
    assert (len(kept), gone) == (len(asks), len(asks)), "of the asks of both clients one half is chat completions"


@pytest.mark.parametrize(
    ("ending", "models", "table"),
    [("deadline", ("text", "call"), LATE), ("no-token", ("silent",), TOO_LATE)],
)
async def test_a_deadline_cuts_no_reply_that_the_sdk_takes_for_a_whole_one(
    tmp_path: Path, ending: str, models: tuple[str, ...], table: Table
) -> None:
    async def wait(_: Begun) -> None:
        """Leave the end to the server."""

    async with open_cut_server(tmp_path, ending) as (model, server):
        assert_seen(await cut(server, model, asks_for(models), wait), table)


async def test_a_deletion_cuts_no_reply_that_the_sdk_takes_for_a_whole_one(tmp_path: Path) -> None:
    names: list[str] = []

    async def delete(begun: Begun) -> None:
        await begun.wait_all()
        names.extend(await wait_begun(server, tmp_path))
        await delete_responses(server, names)

    async with open_cut_server(tmp_path, "deletion") as (model, server):
        assert_seen(await cut(server, model, asks_for(("text", "call")), delete), DELETED)
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            for name in names:
                with pytest.raises(NotFoundError):
                    await client.responses.retrieve(name)
