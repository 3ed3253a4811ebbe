"""Retries: the failures that are retried, when and how often, and the failures that never are."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import structlog
import trio
from trio.testing import MockClock

from service.errors import ModelError
from service.models.client import (
    NO_OPTIONS,
    Finished,
    ModelEvent,
    ModelRequest,
    Options,
    TakeEvents,
    TextDelta,
    Usage,
    relay_received,
)
from service.models.openai_compatible import open_openai_compatible
from service.models.retrying import RetryingClient
from tests.models.replies import ask, asking, take
from tests.models.upstream import WAIT_S
from tests.upstreams.independent import script_llmock

REPLY: Sequence[ModelEvent] = [TextDelta("at last"), Finished(finish_reason="stop")]


class FailingClient:
    """A client that fails the given number of times, at entering or at the first receive, and then replies.

    ``begun`` has the moment of each attempt, ``open`` the number of streams that were entered and not left.
    """

    name = "failing"

    def __init__(self, *failures: ModelError, in_receive: bool = False, late: ModelError | None = None) -> None:
        self._failures = list(failures)
        self._in_receive = in_receive
        self._late = late
        self.begun: list[float] = []
        self.open = 0
        self.closed = False
        self.usage: Usage | None = None

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        return False

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator["FailingClient"]:
        self.begun.append(trio.current_time())
        if self._failures and not self._in_receive:
            raise self._failures.pop(0)
        self.open += 1
        try:
            yield self
        finally:
            self.open -= 1

    async def relay(self, take: TakeEvents) -> None:
        await relay_received(self, take)

    async def receive(self) -> Sequence[ModelEvent]:
        await trio.lowlevel.checkpoint()
        if self._failures:
            raise self._failures.pop(0)
        if self._late is not None:
            late, self._failures = self._late, [self._late]
            return [TextDelta(str(late))]
        return REPLY

    async def aclose(self) -> None:
        self.closed = True


def unreachable(retry_after_s: float | None = None) -> ModelError:
    return ModelError("upstream_unreachable", "refused", retryable=True, retry_after_s=retry_after_s)


def final() -> ModelError:
    return ModelError("upstream_auth", "no key")


@pytest.mark.parametrize("in_receive", [False, True])
async def test_a_failure_before_the_first_token_is_repeated(autojump_clock: MockClock, in_receive: bool) -> None:
    client = FailingClient(unreachable(), unreachable(), in_receive=in_receive)
    async with RetryingClient(client, retries_max=2).stream(asking()) as stream:
        assert client.open == 1, "the streams that failed were left"
        assert await stream.receive() == REPLY
    assert client.open == 0
    waits = [later - earlier for earlier, later in zip(client.begun, client.begun[1:], strict=False)]
    assert len(waits) == 2
    assert 0.25 <= waits[0] <= 0.75
    assert 0.5 <= waits[1] <= 1.0


async def test_waits_are_jittered(autojump_clock: MockClock) -> None:
    clients = [FailingClient(unreachable()) for _ in range(10)]
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(ask, RetryingClient(client, retries_max=1))
    assert len({round(client.begun[1] - client.begun[0], 3) for client in clients}) > 5


@pytest.mark.parametrize("retries_max", [0, 1, 2, 5])
async def test_the_last_error_comes_out_when_all_retries_failed(autojump_clock: MockClock, retries_max: int) -> None:
    errors = [unreachable() for _ in range(20)]
    client = FailingClient(*errors)
    with pytest.raises(ModelError) as caught:
        await ask(RetryingClient(client, retries_max=retries_max))
    assert caught.value is errors[retries_max]
    assert len(client.begun) == retries_max + 1


@pytest.mark.parametrize("in_receive", [False, True])
async def test_an_error_that_is_not_retryable_is_not_repeated(autojump_clock: MockClock, in_receive: bool) -> None:
    client = FailingClient(final(), in_receive=in_receive)
    with pytest.raises(ModelError, match="no key"):
        await ask(RetryingClient(client, retries_max=2))
    assert len(client.begun) == 1
    assert client.open == 0


async def test_nothing_is_repeated_after_the_first_token(autojump_clock: MockClock) -> None:
    client = FailingClient(late=unreachable())
    events: list[ModelEvent] = []

    async def take_all() -> None:
        async with RetryingClient(client, retries_max=2).stream(asking()) as stream:
            while True:
                events.extend(await stream.receive())

    with pytest.raises(ModelError, match="refused"):
        await take_all()
    assert events == [TextDelta("refused")]
    assert len(client.begun) == 1
    assert client.open == 0


async def test_a_crash_is_not_repeated(autojump_clock: MockClock) -> None:
    class CrashingClient(FailingClient):
        @asynccontextmanager
        async def stream(self, request: ModelRequest) -> AsyncIterator[FailingClient]:
            self.begun.append(trio.current_time())
            raise ZeroDivisionError
            yield

    client = CrashingClient()
    with pytest.raises(ZeroDivisionError):
        await ask(RetryingClient(client, retries_max=2))
    assert len(client.begun) == 1


async def test_a_first_token_timeout_is_not_repeated(autojump_clock: MockClock) -> None:
    class SilentClient(FailingClient):
        async def receive(self) -> Sequence[ModelEvent]:
            await trio.sleep_forever()
            raise AssertionError

    client = SilentClient()
    with trio.move_on_after(10) as scope:
        await ask(RetryingClient(client, retries_max=2))
    assert scope.cancelled_caught
    assert len(client.begun) == 1
    assert client.open == 0


async def test_a_wait_can_be_cancelled(autojump_clock: MockClock) -> None:
    client = FailingClient(unreachable(retry_after_s=30))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, RetryingClient(client, retries_max=2))
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert len(client.begun) == 1


async def test_the_upstreams_own_wait_is_respected(autojump_clock: MockClock) -> None:
    client = FailingClient(unreachable(retry_after_s=30))
    with trio.fail_after(60):
        await ask(RetryingClient(client, retries_max=1))
    assert 30 <= client.begun[1] - client.begun[0] <= 30.5


async def test_an_upstreams_wait_of_nothing_is_still_spread(autojump_clock: MockClock) -> None:
    clients = [FailingClient(unreachable(retry_after_s=0)) for _ in range(10)]
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(ask, RetryingClient(client, retries_max=1))
    assert len({round(client.begun[1] - client.begun[0], 3) for client in clients}) > 5


async def test_a_wait_beyond_the_deadline_is_not_begun(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    client = FailingClient(unreachable(retry_after_s=61))
    with trio.fail_after(60), pytest.raises(ModelError, match="refused"):
        await ask(RetryingClient(client, retries_max=2))
    assert trio.current_time() == start


async def test_it_has_the_name_of_its_client_and_closes_it(autojump_clock: MockClock) -> None:
    client = FailingClient()
    retrying = RetryingClient(client, retries_max=2)
    assert retrying.name == "failing"
    async with retrying.stream(asking()) as stream:
        assert (await take(stream)).text == "at last"
    await retrying.aclose()
    assert client.closed


async def test_the_log_has_one_line_for_each_retry_and_nothing_of_the_request(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    client = FailingClient(unreachable(), unreachable(), unreachable())
    with structlog.testing.capture_logs() as logs, caplog.at_level(logging.DEBUG), pytest.raises(ModelError):
        await ask(RetryingClient(client, retries_max=2), asking("a private matter"))
    assert [{**log, "wait_s": None} for log in logs] == [
        {
            "event": "model call will be repeated",
            "log_level": "warning",
            "code": "upstream_unreachable",
            "error": "refused",
            "retry": retry,
            "wait_s": None,
        }
        for retry in (1, 2)
    ]
    assert caplog.records == []


@pytest.mark.processes
async def test_an_independent_servers_passing_faults_are_repeated(llmock_url: str) -> None:
    script_llmock(llmock_url, {"type": "fail", "status": 503, "times": 1, "retry_after": 0})
    with trio.fail_after(WAIT_S):
        async with open_openai_compatible(llmock_url) as client:
            assert (await ask(RetryingClient(client, retries_max=2))).text


async def test_what_an_upstream_counted_for_failed_attempts_is_a_part_of_the_usage(autojump_clock: MockClock) -> None:
    """Nearly always this is nothing: an upstream that fails before its first token has counted nothing."""
    client = FailingClient(unreachable(), in_receive=True)
    async with RetryingClient(client, retries_max=1).stream(asking()) as stream:
        assert stream.usage is None
    counted = Usage(input_tokens=10, output_tokens=0, cached_tokens=4)
    client = FailingClient(unreachable(), unreachable(), in_receive=True)
    client.usage = counted
    async with RetryingClient(client, retries_max=2).stream(asking()) as stream:
        client.usage = None
        assert stream.usage == Usage(input_tokens=20, output_tokens=0, cached_tokens=8)
        client.usage = Usage(input_tokens=10, output_tokens=5, reasoning_tokens=3)
        assert stream.usage == Usage(input_tokens=30, output_tokens=5, reasoning_tokens=3, cached_tokens=8)
    client = FailingClient(unreachable(), final(), in_receive=True)
    client.usage = counted
    with pytest.raises(ModelError) as failed:
        await ask(RetryingClient(client, retries_max=2))
    assert failed.value.usage == counted + counted


async def test_what_was_counted_before_an_upstream_could_not_be_reached_any_more_is_kept(
    autojump_clock: MockClock,
) -> None:
    counting, gone = FailingClient(unreachable(), in_receive=True), FailingClient(final())
    counting.usage = Usage(input_tokens=10, output_tokens=0)
    attempts = iter((counting, gone))

    class Changing(FailingClient):
        def stream(self, request: ModelRequest) -> AbstractAsyncContextManager[FailingClient]:  # type: ignore[override]
            return next(attempts).stream(request)

    with pytest.raises(ModelError) as failed:
        await ask(RetryingClient(Changing(), retries_max=1))
    assert failed.value.usage == counting.usage
