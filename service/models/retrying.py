"""A model client that asks again when the upstream fails before its first token."""

import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import stamina
import structlog
from stamina.instrumentation import RetryDetails

from service.errors import ModelError
from service.models.client import ModelClient, ModelEvent, ModelRequest, ModelStream, Usage, total_usage

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
    """

    def __init__(self, client: ModelClient, *, retries_max: int) -> None:
        self._client = client
        self._attempts = retries_max + 1
        # stamina's hooks hold for the whole process. Its default hooks write the call's (empty) arguments to the log
        # and a metric of another shape than ours.
        stamina.instrumentation.set_on_retry_hooks((_log_retry,))

    @property
    def name(self) -> str:
        return self._client.name

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator[ModelStream]:
        """See :class:`~service.models.client.ModelClient`."""
        opened, stream = await self._open(request)
        async with opened:
            yield stream

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _open(self, request: ModelRequest) -> tuple[AsyncExitStack, ModelStream]:
        """A stream that has begun, and the exit stack that leaves it. This method leaves failed streams itself."""
        spent: Usage | None = None
        async for attempt in stamina.retry_context(
            on=_wait_before_retry,
            attempts=self._attempts,
            timeout=None,  # the caller's deadlines are the bound
            wait_initial=_WAIT_INITIAL_S,
            wait_max=_WAIT_MAX_S,
            wait_jitter=_WAIT_JITTER_S,
        ):
            with attempt:
                async with AsyncExitStack() as stack:
                    stream = await stack.enter_async_context(self._client.stream(request))
                    try:
                        first = await stream.receive()
                    except ModelError as error:
                        error.usage = spent = total_usage(spent, stream.usage)
                        raise
                    return stack.pop_all(), _BegunStream(stream, first, spent)
        raise AssertionError("unreachable: the last attempt returns or raises")


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
    logger.warning(
        "model call will be repeated",
        code=error.code if isinstance(error, ModelError) else None,
        error=str(error),
        retry=details.retry_num,
        wait_s=round(details.wait_for, 3),
    )
