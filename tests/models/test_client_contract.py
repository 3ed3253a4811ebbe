"""The contract of every model client, shipped fakes included: one suite, run against each client."""

from collections.abc import AsyncIterator

import pytest
import trio

from service.models.client import Finished, Message, ModelClient, ModelRequest, ReasoningDelta, TextDelta
from service.models.openai_compatible import open_openai_compatible
from service.models.retrying import RetryingClient
from service.models.scripted import open_scripted
from tests.models.replies import ask, asking, take
from tests.upstreams.raw_server import DONE, delta, finish, open_raw_server, replying, usage

WAIT_S = 60
REPLY = ["The", " reply", " of", " a", " raw", " server", "."]


INDEPENDENT = ("fakellm", "llmock")


@pytest.fixture(
    scope="module",  # an independent server outlives the test, so it has to be older than the test's leak checks
    params=[
        *("scripted", "retrying", "openai_compatible"),
        *(pytest.param(name, marks=pytest.mark.processes) for name in INDEPENDENT),
    ],
)
def kind_and_url(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A kind of client, and the URL of its independent server, if it needs one."""
    kind = request.param
    return kind, request.getfixturevalue(f"{kind}_url") if kind in INDEPENDENT else ""


@pytest.fixture
async def client(kind_and_url: tuple[str, str]) -> AsyncIterator[ModelClient]:
    kind, url = kind_and_url
    match kind:
        case "scripted":
            async with open_scripted("scripted:?rate=1000&first_token_s=0") as scripted:
                yield scripted
        case "retrying":
            async with open_scripted("scripted:?rate=1000&first_token_s=0") as scripted:
                yield RetryingClient(scripted, retries_max=2)
        case "openai_compatible":
            behaviour = replying(*(delta(token) for token in REPLY), finish(), usage(3, 7), DONE)
            async with open_raw_server(behaviour) as server, open_openai_compatible(server.url) as real:
                yield real
        case _:
            async with open_openai_compatible(url, api_key="secret-key") as real:
                yield real


async def test_a_reply_is_deltas_and_then_one_finished(client: ModelClient) -> None:
    with trio.fail_after(WAIT_S):
        reply = await ask(client)
    assert all(reply.batches), "an empty batch"
    assert [isinstance(event, Finished) for event in reply.events].index(True) == len(reply.events) - 1
    assert all(event.text for event in reply.events if isinstance(event, TextDelta | ReasoningDelta))
    assert reply.text
    assert reply.finished.finish_reason == "stop"


async def test_a_stream_says_what_was_counted_also_after_it_was_left(client: ModelClient) -> None:
    with trio.fail_after(WAIT_S):
        async with client.stream(asking()) as stream:
            assert stream.usage is None or stream.usage.output_tokens >= 0
            reply = await take(stream)
        assert stream.usage == reply.finished.usage


async def test_the_same_request_gets_a_whole_reply_again_and_again(client: ModelClient) -> None:
    with trio.fail_after(WAIT_S):
        texts = {(await ask(client)).text for _ in range(3)}
    assert len(texts) == 1


async def test_a_conversation_with_a_system_message_is_answered(client: ModelClient) -> None:
    messages = (
        Message("system", "Be brief."),
        Message("user", "What is a last call?"),
        Message("assistant", "The last round."),
        Message("user", "Say it in every script: Grüße, 你好, 👩‍👩‍👧, مرحبا, \u0000\u001b."),
    )
    request = ModelRequest(model="gpt-4o-mini", prompt=messages, temperature=0.5, max_output_tokens=500)
    with trio.fail_after(WAIT_S):
        reply = await ask(client, request)
    assert reply.text
    assert "\ufffd" not in reply.text


async def test_streams_run_side_by_side(client: ModelClient) -> None:
    texts: list[str] = []

    async def ask_once() -> None:
        texts.append((await ask(client)).text)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask_once)
    assert len(texts) == 20
    assert len(set(texts)) == 1


async def test_a_stream_can_be_left_before_its_first_event(client: ModelClient) -> None:
    with trio.fail_after(WAIT_S):
        async with client.stream(asking()):
            pass
        assert (await ask(client)).text


async def test_a_stream_can_be_left_after_its_first_event(client: ModelClient) -> None:
    with trio.fail_after(WAIT_S):
        async with client.stream(asking()) as stream:
            await stream.receive()
        assert (await ask(client)).text


async def test_an_error_of_the_caller_passes_through_a_stream_unchanged(client: ModelClient) -> None:
    async def fail_in_a_stream() -> None:
        async with client.stream(asking()) as stream:
            await stream.receive()
            raise ZeroDivisionError

    with trio.fail_after(WAIT_S), pytest.raises(ZeroDivisionError):
        await fail_in_a_stream()


async def test_cancelling_at_any_moment_leaves_a_client_that_works(client: ModelClient) -> None:
    """Twenty cancellations: the first one before any byte is sent, each other one later than the one before."""
    with trio.fail_after(WAIT_S):
        for step in range(20):
            with trio.move_on_after(step * 0.001):
                async with client.stream(asking()) as stream:
                    await take(stream)
        assert (await ask(client)).text


async def test_the_name_is_fit_for_a_log(client: ModelClient) -> None:  # noqa: ASYNC124  the fixture is async
    assert client.name
    assert client.name.isprintable()
    assert "secret" not in client.name
