"""The protocol that every model client meets.

A client is opened once in the service's tree and shared by all turns. A turn opens one stream,
takes events until the stream has finished, and leaves the stream. Every way of leaving (the end,
an error, cancellation) closes the upstream connection before control returns, so that no tokens are
paid for that no client will read.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class Message(msgspec.Struct, frozen=True):
    """One message of a prompt."""

    role: Role
    text: str


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The request of a turn to a model.

    ``messages`` holds at most one system message, first; then user and assistant alternate, and the
    last is the user's.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    max_output_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the upstream counted them; ``reasoning_tokens`` are part of ``output_tokens``."""

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int = 0


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the reply, never empty."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the model's reasoning, never empty; not part of the reply."""

    text: str


class Progress(msgspec.Struct, frozen=True, gc=False):
    """The model works on content that is no text: a tool call, encrypted reasoning, an image. Shown to no client."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The reply is whole. Always the last event of a stream, exactly once."""

    finish_reason: FinishReason
    usage: Usage | None = None


ModelEvent = TextDelta | ReasoningDelta | Progress | Finished


class ModelStream(Protocol):
    """One reply on its way."""

    async def receive(self) -> Sequence[ModelEvent]:
        """Wait for at least one event, then return all events that have arrived, in order.

        Never returns an empty sequence, and does not return for data that is no progress (an upstream's
        keep-alive comments), so a caller may set its deadline anew on each return. Must not be called
        again after :class:`Finished`. After a cancellation the caller must leave the stream.

        Raises:
            ModelError: The upstream failed; no event will follow.
        """
        ...


class ModelClient(Protocol):
    """A way to one upstream."""

    @property
    def name(self) -> str:
        """The upstream's name for logs and metrics, without secrets."""
        ...

    def stream(self, request: ModelRequest) -> AbstractAsyncContextManager[ModelStream]:
        """Open one reply. Entering sends the request and waits for the response's head.

        Exiting closes the upstream connection, within a bound, also under cancellation.

        Raises:
            ModelError: On entry, where the upstream refuses or cannot be reached.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection. Called once, after the last stream was left.

        May be cancelled: the connections are then dropped.
        """
        ...
