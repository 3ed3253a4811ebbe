"""A model client that asks again when the upstream fails before its first token."""

import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

import anyio
import stamina
import structlog
from stamina.instrumentation import RetryDetails

from service.errors import ModelError
from service.models.client import (
    NO_OPTIONS,
    CountsConnections,
    ListedModel,
    ListsModels,
    ModelClient,
    ModelEvent,
    ModelRequest,
    ModelStream,
    Options,
    TakeEvents,
    Usage,
    total_usage,
)
from service.telemetry.metrics import families
from service.telemetry.metrics.metrics import Metrics

_WAIT_INITIAL_S = 0.25
_WAIT_MAX_S = 4.0
_WAIT_JITTER_S = 0.5

logger = structlog.get_logger("lastcall.models")


class RetryingClient:
    """Wraps a client; entering a stream also waits for its first events, so that both can be repeated.

    Only ``retryable`` errors are retried, after a jittered wait that doubles or the wait that the
    upstream asked for. If the wait would end after the caller's deadline, the error is raised at once.
    Nothing is repeated after the first event, or after a deadline (which is a cancellation).

    An attempt that fails before its first event nearly always costs nothing, and the upstream counts nothing. What an
    upstream has counted for such attempts is a part of the reply's usage, or of the last error's.

    Args:
        client: The wrapped client. Closing the wrapper closes it.
        retries_max: How many times to ask again.
        metrics: Counts the attempts.
    """

    def __init__(self, client: ModelClient, *, retries_max: int, metrics: Metrics | None = None) -> None:
        self._client = client
        self._metrics = metrics or Metrics()
        self._attempts = retries_max + 1
        # stamina's hooks hold for the whole process. Its default hooks write the call's (empty) arguments to the log
        # and a metric of another shape than ours.
        stamina.instrumentation.set_on_retry_hooks((_log_retry,))

    @property
    def name(self) -> str:
        return self._client.name

    def stream(self, request: ModelRequest) -> AbstractAsyncContextManager[ModelStream]:
        """See :class:`~service.models.client.ModelClient`."""
        return _RetriedStream(self._client, request, attempts=self._attempts, metrics=self._metrics)

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        """See :class:`~service.models.client.ModelClient`."""
        return self._client.can_continue(text, options)

    async def list_models(self) -> Sequence[ListedModel]:
        """The models that the wrapped client's server lists; none if it cannot. Asked once."""
        return await self._client.list_models() if isinstance(self._client, ListsModels) else ()

    def count_connections(self) -> tuple[int, int]:
        """See :class:`~service.models.client.CountsConnections`; none if the wrapped client has none."""
        return self._client.count_connections() if isinstance(self._client, CountsConnections) else (0, 0)

    async def aclose(self) -> None:
        await self._client.aclose()


class _RetriedStream(AbstractAsyncContextManager[ModelStream]):
    """Entering opens a stream that has begun, and leaves all that failed before it. Leaving leaves that stream.

    A class, because a generator and an exit stack would stay in memory for the whole reply.
    """

    __slots__ = ("_attempts", "_client", "_entered", "_failed_with", "_metrics", "_request", "_spent")

    def __init__(self, client: ModelClient, request: ModelRequest, *, attempts: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._client = client
        self._request: ModelRequest | None = request
        self._attempts = attempts
        self._entered: AbstractAsyncContextManager[ModelStream] | None = None
        self._spent: Usage | None = None
        self._failed_with = ""

    async def __aenter__(self) -> ModelStream:
        request, self._request = self._request, None  # a prompt may be large, and a reply long
        assert request is not None
        try:
            return await self._attempt(request)
        except ModelError as error:
            failure: ModelError | None = error
        # Only now, because stamina's objects are circles, which live until the garbage collector finds them.
        async for attempt in stamina.retry_context(
            on=_wait_before_retry,
            attempts=self._attempts,
            timeout=None,  # the caller's deadlines are the bound
            wait_initial=_WAIT_INITIAL_S,
            wait_max=_WAIT_MAX_S,
            wait_jitter=_WAIT_JITTER_S,
        ):
            with attempt:
                if failure is not None:
                    first, failure = failure, None
                    raise first
                self._metrics.add(families.UPSTREAM_RETRIES, self._client.name, self._failed_with)
                if request.notes is not None:
                    request.notes.note_repeat(self._failed_with)
                return await self._attempt(request)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self, request: ModelRequest) -> ModelStream:
        """Begin a stream, and count how that went."""
        result = None
        try:
            stream = await self._begin(request)
            result = "ok"
            return stream
        except ModelError as error:
            result = self._failed_with = error.code
            raise
        finally:
            if result is None:  # cancelled: the upstream has failed only if it was silent up to a deadline
                find_deadline = None if request.notes is None else request.notes.find_deadline
                result = (find_deadline and find_deadline()) or "abandoned"
            self._metrics.add(families.UPSTREAM_CALLS, self._client.name, result)

    async def _begin(self, request: ModelRequest) -> ModelStream:
        entered = self._client.stream(request)
        try:
            stream = await entered.__aenter__()
        except ModelError as error:
            error.usage = self._spent = total_usage(self._spent, error.usage)
            raise
        try:
            first = await stream.receive()
        except BaseException as error:
            if isinstance(error, ModelError):
                error.usage = self._spent = total_usage(self._spent, stream.usage)
            await entered.__aexit__(type(error), error, error.__traceback__)  # noqa: ASYNC102  bounded inside
            raise
        self._entered = entered
        return _BegunStream(stream, first, self._spent)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._entered is not None
        return await self._entered.__aexit__(kind, error, traceback)  # noqa: ASYNC102  bounded inside


class _BegunStream:
    """A stream whose first events have been taken already; a call for the later ones goes to the stream itself.

    Attributes:
        receive: See :class:`~service.models.client.ModelStream`.
    """

    def __init__(self, stream: ModelStream, first: Sequence[ModelEvent], spent: Usage | None) -> None:
        self.receive: Callable[[], Coroutine[Any, Any, Sequence[ModelEvent]]] = self._receive_first
        self._stream = stream
        self._first = first
        self._spent = spent

    @property
    def usage(self) -> Usage | None:
        return total_usage(self._spent, self._stream.usage)

    async def relay(self, take: TakeEvents) -> None:
        if take(await self.receive()):
            await self._stream.relay(take)

    async def _receive_first(self) -> Sequence[ModelEvent]:
        await anyio.lowlevel.checkpoint()
        self.receive = self._stream.receive
        first, self._first = self._first, ()
        return first


def _wait_before_retry(error: Exception) -> bool | float:
    """Whether to ask again; the seconds to wait, if the upstream said how long."""
    if not isinstance(error, ModelError) or not error.retryable:
        return False
    wait_s = _WAIT_INITIAL_S if error.retry_after_s is None else error.retry_after_s
    if anyio.current_time() + wait_s >= anyio.current_effective_deadline():
        return False
    if error.retry_after_s is None:
        return True
    return wait_s + random.uniform(0, _WAIT_JITTER_S)  # noqa: S311  the chance spreads the callers; it protects no secret


def _log_retry(details: RetryDetails) -> None:
    error = details.caused_by
    assert isinstance(error, ModelError)
    logger.warning(
        "model call will be repeated",
        code=error.code,
        error=error.message,
        retry=details.retry_num,
        wait_s=round(details.wait_for, 3),
    )
