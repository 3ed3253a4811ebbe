"""The official Python SDK of OpenAI against the real server: with its strict validation it checks each body and event.

The asynchronous client runs on Trio.
"""

import gc
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import openai
import pytest
import trio
from openai import AsyncOpenAI, AsyncStream, OpenAI
from openai.types.responses import Response, ResponseStreamEvent

from bench.server_process import ServerProcess
from tests.process.clients import wait_stored
from tests.process.lastcall import CAP_S, HYPERCORN_2, SERVE, Host, assert_clean, open_lastcall, wait_gone
from tests.upstreams.raw_server import DONE, Connection, delta, finish, open_raw_server

pytestmark = [
    pytest.mark.parallel,
    # The SDK, and the HTTP client below it, leave generators of a stream to the garbage collector, also at its end.
    pytest.mark.filterwarnings(r"ignore:Async generator '(openai|httpx2?|httpcore2?)\.:ResourceWarning"),
]

T = TypeVar("T")
FOLLOWERS = 6
QUICK = "scripted:?tokens=8&rate=0&first_token_s=0"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


def url_of(server: ServerProcess) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@asynccontextmanager
async def open_async(server: ServerProcess, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    given: dict[str, Any] = {"api_key": "no key is needed", "max_retries": 0, "timeout": CAP_S} | options
    async with AsyncOpenAI(base_url=url_of(server), _strict_response_validation=True, **given) as client:
        yield client


@contextmanager
def open_sync(server: ServerProcess, **options: Any) -> Iterator[OpenAI]:
    given: dict[str, Any] = {"api_key": "no key is needed", "max_retries": 0, "timeout": CAP_S} | options
    with OpenAI(base_url=url_of(server), _strict_response_validation=True, **given) as client:
        yield client


async def in_thread(work: Callable[[], T]) -> T:
    """The result of work that waits for the server without letting this thread run."""
    return await trio.to_thread.run_sync(work)


async def read(
    stream: AsyncStream[ResponseStreamEvent], *, until: int | None = None, is_cut: bool = False
) -> list[ResponseStreamEvent]:
    """The events of a stream, up to one with this number; the connection is dropped then.

    Args:
        is_cut: Whether the stream is of a reply that was cut, which the SDK raises at its end.
    """
    events: list[ResponseStreamEvent] = []
    raised = False
    try:
        async for event in stream:
            events.append(event)
            if event.sequence_number == until:
                break
    except openai.APIError:
        raised = True
    assert raised == is_cut
    await stream.close()
    del stream
    gc.collect()  # see the filter above: otherwise its generators are collected after the test
    return events


def numbers(events: list[ResponseStreamEvent]) -> list[int]:
    return [event.sequence_number for event in events]


def final(events: list[ResponseStreamEvent]) -> Response:
    assert events[-1].type in ("response.completed", "response.incomplete", "response.failed")
    return events[-1].response


def truth(response: Response) -> dict[str, Any]:
    assert response.model_extra is not None
    told: dict[str, Any] = response.model_extra["lastcall"]
    return told


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_2], ids=str)
async def test_the_asynchronous_client_makes_every_call(tmp_path: Path, host: Host) -> None:
    async with open_lastcall(host, tmp_path, model_url=QUICK) as server, open_async(server) as client:
        first = await client.responses.create(model="scripted", input="Hi", instructions="Be brief.")
        assert (first.status, first.output_text) == ("completed", "0 1 2 3 4 5 6 7 ")
        assert await client.responses.retrieve(first.id) == first
        events = await read(
            await client.responses.create(
                model="scripted", input="And?", previous_response_id=first.id, stream=True, metadata={"a": "b"}
            )
        )
        second = final(events)
        assert numbers(events) == list(range(len(events)))
        assert (second.previous_response_id, second.metadata) == (first.id, {"a": "b"})
        async with client.responses.stream(model="scripted", input="Hi") as managed:
            kinds = [event.type async for event in managed]
            assert (await managed.get_final_response()).output_text == first.output_text
        assert kinds[-1] == "response.completed"
        texts = [f"text {number}" for number in range(5)]
        items: Any = [{"role": "user", "content": text} for text in texts]
        many = await client.responses.create(model="scripted", input=items, store=True)
        listed: list[Any] = [item async for item in client.responses.input_items.list(many.id, limit=2, order="asc")]
        assert [item.content[0].text for item in listed] == texts
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        assert (await client.responses.retrieve(second.id)).output_text == second.output_text
        message: Any = {"type": "message", "role": "user", "content": "Of items"}
        conversation = await client.conversations.create(items=[message])
        answer = await client.responses.create(model="scripted", conversation=conversation.id)
        assert (answer.status, answer.output_text) == ("completed", first.output_text)
        with pytest.raises(openai.BadRequestError) as nothing_asked:
            await client.responses.create(model="scripted", conversation=conversation.id)
        assert nothing_asked.value.param == "input"
        gone = await client.responses.create(model="scripted", input="Hi", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(gone.id)


async def test_the_synchronous_client_makes_every_call(tmp_path: Path) -> None:
    def use(server: ServerProcess) -> None:
        with open_sync(server) as client:
            first = client.responses.create(model="scripted", input="Hi")
            assert first.output_text == "0 1 2 3 4 5 6 7 "
            with client.responses.create(model="scripted", input="Hi", stream=True) as stream:
                assert final(list(stream)).output_text == first.output_text
            slow = client.responses.create(model="scripted", input="Hi", background=True)
            assert client.responses.cancel(slow.id).status in ("completed", "cancelled")
            with client.responses.retrieve(slow.id, stream=True, starting_after=0) as stream:
                assert next(iter(stream)).sequence_number == 1
            assert len(client.responses.input_items.list(first.id).data) == 1
            client.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError) as refused:
                client.responses.retrieve(first.id)
            assert (refused.value.code, refused.value.type) == ("response_not_found", "invalid_request_error")
            assert refused.value.request_id

    async with open_lastcall(SERVE, tmp_path, model_url=QUICK) as server:
        await in_thread(lambda: use(server))


async def test_a_background_stream_is_resumed_after_a_cut_and_after_a_restart(tmp_path: Path) -> None:
    """The numbers of the events are the same live, after a cut, and from the store of the next process."""
    goes_on = trio.Event()

    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for number in range(20):
            if number == 10:
                await goes_on.wait()
            await connection.send_event(delta(f"{number} "))
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()

    text = "".join(f"{number} " for number in range(20))
    async with open_raw_server(reply) as upstream:
        options: dict[str, Any] = {"store_url": f"sqlite:{tmp_path}/lastcall.db", "model_url": upstream.url}
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        async with open_lastcall(SERVE, tmp_path / "first", **options) as server, open_async(server) as client:
            begun = await read(
                await client.responses.create(model="m", input="Hi", background=True, stream=True), until=8
            )
            assert begun[0].type == "response.created"
            name = begun[0].response.id
            goes_on.set()
            rest = await read(await client.responses.retrieve(name, stream=True, starting_after=8))
            assert numbers(begun + rest) == list(range(len(begun + rest)))
            assert final(rest).output_text == text
            server.signal_main(signal.SIGTERM)
            assert_clean(SERVE, server, await wait_gone(server))
        async with open_lastcall(SERVE, tmp_path / "second", **options) as server, open_async(server) as client:
            assert await read(await client.responses.retrieve(name, stream=True)) == begun + rest
            assert await read(await client.responses.retrieve(name, stream=True, starting_after=8)) == rest
            assert (await client.responses.retrieve(name)).output_text == text
            async with client.responses.stream(response_id=name, starting_after=8) as managed:
                assert [event.sequence_number async for event in managed] == numbers(rest)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_a_reply_that_was_cut_off_is_never_taken_for_a_whole_one(tmp_path: Path, number: int) -> None:
    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for word in ("The answer ", "is not "):
            await connection.send_event(delta(word))
        await connection.wait_closed()

    async with open_raw_server(reply) as upstream:
        options: dict[str, Any] = {
            "store_url": f"sqlite:{tmp_path}/lastcall.db",
            "model_url": upstream.url,
            "drain_timeout_s": 0,
            "checkpoint_interval_s": 0.1,
        }
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        seen: list[ResponseStreamEvent] = []
        async with open_lastcall(SERVE, tmp_path / "first", **options) as server, open_async(server) as client:
            stream = await client.responses.create(model="m", input="Hi", background=True, stream=True)

            async def see() -> None:
                async for event in stream:
                    seen.append(event)
                    if event.type == "response.output_text.delta" and event.delta.endswith("is not "):
                        assert seen[0].type == "response.created"
                        turn_id = seen[0].response.id.replace("resp_", "turn_")
                        await wait_stored(tmp_path / "lastcall.db", turn_id, "The answer is not ")
                        server.signal_main(number)

            with pytest.raises(openai.APIError):
                await see()
            await stream.close()
            await wait_gone(server)
        assert seen[0].type == "response.created"
        name = seen[0].response.id
        async with open_lastcall(SERVE, tmp_path / "second", **options) as server, open_async(server) as client:
            response = await client.responses.retrieve(name)
            last_seen = seen[-1].sequence_number
            resumed = await client.responses.retrieve(name, stream=True, starting_after=last_seen)
            rest = await read(resumed, is_cut=True)
            whole = await read(await client.responses.retrieve(name, stream=True), is_cut=True)
            assert (response.status, response.output_text) == ("incomplete", "The answer is not ")
            told = truth(response)
            assert told["state"] == "interrupted"
            assert told["reason"] == ("shutdown" if number == signal.SIGTERM else "crash")
            if number == signal.SIGTERM:
                assert final(seen) == response
                assert rest == []
            else:
                assert final(rest) == response
            assert final(whole) == response
            follow = await client.responses.create(model="m", input="Go on", previous_response_id=name, background=True)
            assert (await client.responses.cancel(follow.id)).status == "cancelled"


async def test_a_client_that_waits_gets_an_error_for_what_has_no_text(tmp_path: Path) -> None:
    """In a stop a response without a text fails: a program that does not stream gets an exception."""
    begun = trio.Event()

    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        begun.set()
        await connection.wait_closed()

    async with (
        open_raw_server(reply) as upstream,
        open_lastcall(SERVE, tmp_path, model_url=upstream.url, drain_timeout_s=0) as server,
        open_async(server) as client,
    ):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(openai.InternalServerError) as failed:
                    await client.responses.create(model="m", input="Hi")
                assert failed.value.status_code == 503

            nursery.start_soon(ask)
            await begun.wait()
            server.signal_main(signal.SIGTERM)
        await wait_gone(server)


async def test_a_call_its_output_and_the_answer_through_a_restart(tmp_path: Path) -> None:
    url = "scripted:?first_token_s=0&rate=0&call=" + quote('get_weather:{"city":"Oslo"}')
    options: dict[str, Any] = {"store_url": f"sqlite:{tmp_path}/lastcall.db", "model_url": url}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    async with open_lastcall(SERVE, tmp_path / "first", **options) as server, open_async(server) as client:
        events = await read(
            await client.responses.create(model="m", input="The weather?", tools=[WEATHER], stream=True)
        )
        asked = final(events)
        (call,) = asked.output
        assert call.type == "function_call"
        assert (call.name, call.arguments, call.status) == ("get_weather", '{"city":"Oslo"}', "completed")
        pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(pieces) == call.arguments
        server.signal_main(signal.SIGTERM)
        await wait_gone(server)
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "4 °C"}]
    async with open_lastcall(SERVE, tmp_path / "second", **options) as server, open_async(server) as client:
        answer = await client.responses.create(model="m", input=output, previous_response_id=asked.id, tools=[WEATHER])
        assert "4 °C" in answer.output_text
        history: Any = [{"role": "user", "content": "The weather?"}, call.to_dict(), *output]
        again = await client.responses.create(model="m", input=history, tools=[WEATHER], store=False)
        assert "4 °C" in again.output_text
        references: Any = [{"role": "user", "content": "The weather?"}, {"type": "item_reference", "id": call.id}]
        again = await client.responses.create(model="m", input=[*references, *output], tools=[WEATHER])
        assert "4 °C" in again.output_text
        references[1]["id"] = f"fc_{'a' * 32}"
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.responses.create(model="m", input=[*references, *output])
        assert unknown.value.param == "input[1].id"


async def test_refusals_become_the_classes_of_the_sdk(tmp_path: Path) -> None:
    async def busy(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_response(429, {"error": {"message": "slow down"}})

    key = "the-key-of-the-sdk-0123456789"
    async with (
        open_raw_server(busy) as upstream,
        open_lastcall(
            SERVE, tmp_path, model_url=upstream.url, api_keys=key, model_retries_max=0, history_bytes_max=2048
        ) as server,
        open_async(server, api_key=key) as client,
    ):
        with pytest.raises(openai.RateLimitError) as limited:
            await client.responses.create(model="m", input="Hi")
        assert limited.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.responses.create(model="m", input="Hi", top_logprobs=3)
        assert (wrong.value.param, wrong.value.code) == ("top_logprobs", "unsupported_parameter")
        with pytest.raises(openai.BadRequestError) as missing:
            await client.responses.create(model="m", input="Hi", previous_response_id="resp_" + 32 * "0")
        assert missing.value.code == "previous_response_not_found"
        with pytest.raises(openai.APIStatusError) as large:
            await client.responses.create(model="m", input="x" * 3000)
        assert large.value.status_code == 413
        with pytest.raises(openai.NotFoundError):
            await client.responses.compact(model="m")
        async with open_async(server, api_key="another-key-of-some-length") as stranger:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await stranger.responses.retrieve("resp_" + 32 * "0")
            assert unknown.value.code == "invalid_api_key"


async def test_any_worker_answers_about_a_live_response_of_another_one(tmp_path: Path) -> None:
    """Each client here has a connection of its own, which some worker has accepted."""
    goes_on = trio.Event()

    async def reply(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(delta("Hello"))
        await goes_on.wait()
        await connection.send_event(delta(" there"))
        await connection.send_event(finish())
        await connection.send_event(DONE)
        await connection.end_body()

    whole: list[list[ResponseStreamEvent]] = []
    async with (
        open_raw_server(reply) as upstream,
        open_lastcall(HYPERCORN_2, tmp_path, model_url=upstream.url) as server,
    ):
        async with open_async(server) as client:
            name = (await client.responses.create(model="m", input="Hi", background=True)).id

        async def follow(starting_after: int) -> None:
            async with open_async(server) as client:
                live = await client.responses.retrieve(name)
                assert live.status == "in_progress"
                with pytest.raises(openai.BadRequestError) as refused:
                    await client.responses.create(model="m", input="Hi", previous_response_id=name)
                assert refused.value.code == "previous_response_in_progress"
                stream = await client.responses.retrieve(name, stream=True, starting_after=starting_after)
                followers.append(starting_after)
                if len(followers) == FOLLOWERS:
                    goes_on.set()
                events = await read(stream)
                assert numbers(events)[0] == starting_after + 1
                whole.append(events)

        followers: list[int] = []
        async with trio.open_nursery() as nursery:
            for _ in range(FOLLOWERS):
                nursery.start_soon(follow, 2)
        assert len({str(events) for events in whole}) == 1
        assert final(whole[0]).output_text == "Hello there"
