"""Requests to a model client, and replies that are read to their end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.models.client import (
    Finished,
    Message,
    ModelClient,
    ModelEvent,
    ModelRequest,
    ModelStream,
    ReasoningDelta,
    TextDelta,
)


class Reading:
    """How :func:`take` reads: it asks for the next events, or has them relayed."""

    relays = False


@dataclass
class Reply:
    """The events of one stream."""

    batches: list[Sequence[ModelEvent]] = field(default_factory=list)

    @property
    def events(self) -> list[ModelEvent]:
        return [event for batch in self.batches for event in batch]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def reasoning(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, ReasoningDelta))

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last


def asking(text: str = "hello", *, max_output_tokens: int | None = None) -> ModelRequest:
    """A request with one message."""
    return ModelRequest(model="test", prompt=(Message("user", text),), max_output_tokens=max_output_tokens)


async def take(stream: ModelStream, reply: Reply | None = None) -> Reply:
    """Receive to the end. If an error comes, ``reply`` has the events from before it."""
    reply = reply or Reply()

    def append(events: Sequence[ModelEvent]) -> bool:
        reply.batches.append(events)
        return not isinstance(events[-1], Finished)

    if Reading.relays:
        await stream.relay(append)
        return reply
    while True:
        reply.batches.append(await stream.receive())
        if isinstance(reply.batches[-1][-1], Finished):
            return reply


async def ask(client: ModelClient, request: ModelRequest | None = None) -> Reply:
    """Ask, and return the whole reply."""
    async with client.stream(request or asking()) as stream:
        return await take(stream)
