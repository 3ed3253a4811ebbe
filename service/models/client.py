"""The protocol that every model client meets.

A client is opened once in the service's tree and shared by all turns. A turn opens one stream,
takes events until the stream has finished, and leaves the stream. Every way of leaving (the end,
an error, cancellation) closes the upstream connection before control returns, so that no tokens are
paid for that no client will read.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import msgspec

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class Message(msgspec.Struct, frozen=True):
    """One message of a prompt."""

    role: Role
    text: str


class FunctionCall(msgspec.Struct, frozen=True):
    """A call that the model made earlier. ``text`` is its arguments, as JSON.

    ``upstream`` is JSON of fields that only the call's server knows, and wants back: see :class:`CallOpened`.
    """

    role: ClassVar[Role] = "assistant"

    call_id: str
    name: str
    text: str
    upstream: str = ""


class FunctionCallOutput(msgspec.Struct, frozen=True):
    """The result of a call that the model made earlier."""

    role: ClassVar[Literal["tool"]] = "tool"

    call_id: str
    text: str


class EncryptedReasoning(msgspec.Struct, frozen=True):
    """Reasoning of the model that only its server can read, or its server's signature of reasoning in words.

    In a reply or in a prompt; shown to no client. ``text`` is what the server sent, unchanged. ``upstream`` is JSON of
    the fields that the server sent beside it and wants back. In a prompt ``signed`` are the words that go back with
    their signature.
    """

    role: ClassVar[Role] = "assistant"

    text: str
    upstream: str = ""
    signed: str = ""


SIGNED = ("reasoning.text", "thinking")
"""The types of ``upstream`` of reasoning whose ``text`` is a signature of words: OpenRouter's, and Anthropic's own."""
_SIGNED = tuple(f'"type":"{kind}"' for kind in SIGNED)


def is_signature(upstream: str) -> bool:
    """Whether these fields of encrypted reasoning say that its text is a signature of the words before it."""
    return any(kind in upstream for kind in _SIGNED)


class Reasoning(msgspec.Struct, frozen=True):
    """Reasoning of the model in words, in a prompt: before the calls of the same reply. Few servers want it back."""

    role: ClassVar[Role] = "assistant"

    text: str


PromptItem = Message | FunctionCall | FunctionCallOutput | EncryptedReasoning | Reasoning


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function that the model may call, as its caller described it; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(msgspec.Struct, frozen=True):
    """The choice of one function, which the model must call."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedFunction


class Tools(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the model may and must call; fields that are left out are not sent. This service does not interpret them."""

    functions: tuple[FunctionTool, ...] = ()
    choice: ToolChoice | None = None
    parallel: bool | None = None


NO_TOOLS = Tools()


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form that the text of the reply must have: a JSON object, or JSON that fits ``schema``.

    ``name``, ``schema``, ``description`` and ``strict`` belong to ``json_schema``. This service does not check the
    reply against the schema.
    """

    type: Literal["json_schema", "json_object"]
    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a caller asks of the model beside the prompt, the temperature, the length and the tools.

    Options that are None, or empty, are not sent: the model's server decides.
    """

    top_p: float | None = None
    text_format: TextFormat | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def given(self) -> dict[str, Any]:
        """The options that are sent, by their names."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None and value != ()}


NO_OPTIONS = Options()


class CallNotes:
    """What a client notes of one call for logs and traces, and which fields it adds to the request that it sends.

    Args:
        fields: Fields of HTTP for the upstream beside the client's own: the context of a trace.

    Attributes:
        repeats: How often the upstream was asked again after a failure.
        find_deadline: Names the deadline that has ended the call, as the failure's code; None if none has, such as
            where a caller has left.
    """

    __slots__ = ("fields", "find_deadline", "repeats")

    def __init__(self, fields: Mapping[str, str] = MappingProxyType({})) -> None:
        self.fields = fields
        self.repeats = 0
        self.find_deadline: Callable[[], str | None] | None = None

    def note_server(self, host: str, port: int, *, provider: str | None) -> None:
        """Note where the model's server is, and what OpenTelemetry's conventions call its provider, if they know it."""

    def note_repeat(self, failure: str) -> None:  # noqa: ARG002  for traces, which show the failures
        """Note that the upstream is asked again, because it failed with this code."""
        self.repeats += 1


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The request of a turn to a model.

    ``prompt`` holds at most one system message, first; then the user and the assistant alternate. The assistant's side
    is one text, or calls, or a text and then calls. The outputs of all these calls follow at once, in the order of the
    calls and before a text of the user. The last item is the user's text or an output. In a conversation to which a
    caller has added notes, a system message may also come before a text of the user, after the outputs of calls; it is
    the last item if no text follows, or if a caller's input ends with it. Reasoning comes first in its reply.

    ``prefix`` is the text of the reply so far, if an earlier request for the same turn was cut off: the model goes on
    after it, and only what is new comes. Empty for a reply that begins; not empty only where
    :meth:`ModelClient.can_continue` says so.

    ``notes`` takes what a client has to say of the call beside the reply.
    """

    model: str
    prompt: tuple[PromptItem, ...]
    temperature: float | None = None
    max_output_tokens: int | None = None
    tools: Tools = NO_TOOLS
    options: Options = NO_OPTIONS
    prefix: str = ""
    notes: CallNotes | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the upstream counted them.

    ``reasoning_tokens`` are part of ``output_tokens``. ``cached_tokens`` are those of ``input_tokens`` that were in a
    cache of the upstream, which sells them for less; UNSET if the upstream does not say.
    """

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int | msgspec.UnsetType = msgspec.UNSET

    def __add__(self, other: "Usage") -> "Usage":
        cached = [it.cached_tokens for it in (self, other) if it.cached_tokens is not msgspec.UNSET]
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cached_tokens=sum(cached) if cached else msgspec.UNSET,
        )


def total_usage(*parts: Usage | None) -> Usage | None:
    """The sum of what upstreams counted; None if none of them has counted."""
    counted = [part for part in parts if part is not None]
    return sum(counted[1:], counted[0]) if counted else None


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the reply, never empty."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the model's reasoning, never empty; not part of the reply."""

    text: str


class CallOpened(msgspec.Struct, frozen=True, gc=False):
    """The model calls a function; the arguments follow.

    ``number`` counts the calls of one reply from 0. ``call_id`` is the server's own id, or one that the client made if
    the server's is missing, unusable or used by another call of this reply. ``upstream`` is JSON of the fields that
    only this server knows and wants back with the call; empty if there are none.
    """

    number: int
    call_id: str
    name: str
    upstream: str = ""


class ArgumentsDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the arguments of the call with this number, never empty. The calls of one reply may take turns."""

    number: int
    text: str


class Progress(msgspec.Struct, frozen=True, gc=False):
    """The model works on content that is none of the others, like an image. Shown to no client."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The reply is whole. Always the last event of a stream, exactly once."""

    finish_reason: FinishReason
    usage: Usage | None = None


ModelEvent = TextDelta | ReasoningDelta | EncryptedReasoning | CallOpened | ArgumentsDelta | Progress | Finished


TakeEvents = Callable[[Sequence[ModelEvent]], bool]
"""Takes events, and returns whether more are wanted."""


class ModelStream(Protocol):
    """One reply on its way."""

    @property
    def usage(self) -> Usage | None:
        """What the upstream has counted for this reply so far, failed attempts included; None if it has not counted.

        Most upstreams count at the end of a reply, some in each piece. Valid after the stream was left, too.
        """
        ...

    async def receive(self) -> Sequence[ModelEvent]:
        """Wait for at least one event, then return all events that have arrived, in order.

        Never returns an empty sequence, and does not return for data that is no progress (an upstream's
        keep-alive comments), so a caller may set its deadline anew on each return. Must not be called
        again after :class:`Finished`. After a cancellation the caller must leave the stream.

        Raises:
            ModelError: The upstream failed; no event will follow.
        """
        ...

    async def relay(self, take: TakeEvents) -> None:
        """Give the events to ``take`` as :meth:`receive` would return them, until it returns False.

        A client may call ``take`` in a step of another task, with the context variables of this one: so a token needs
        no task of its own. After a cancellation ``take`` is not called again.

        Raises:
            ModelError: As :meth:`receive`.
            Exception: What ``take`` has raised.
        """
        ...


async def relay_received(stream: ModelStream, take: TakeEvents) -> None:
    """:meth:`ModelStream.relay` for streams whose caller waits for the events."""
    while take(await stream.receive()):
        pass


class ListedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model, as its server lists it. ``created`` is a Unix time."""

    id: str
    created: int | None = None
    owned_by: str | None = None


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

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        """Whether the model can go on after this text of a reply that was cut off: :attr:`ModelRequest.prefix`.

        Args:
            text: The text so far.
            options: The options of the request. The rest of a JSON text is none itself, so a server that keeps the
                model to a form cannot continue it.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection. Called once, after the last stream was left.

        May be cancelled: the connections are then dropped.
        """
        ...


@runtime_checkable
class CountsConnections(Protocol):
    """A model client that has connections."""

    @property
    def name(self) -> str: ...

    def count_connections(self) -> tuple[int, int]:
        """How many connections are open: those with a request, and those without one."""
        ...


@runtime_checkable
class ListsModels(Protocol):
    """A model client whose server can tell which models it has."""

    async def list_models(self) -> Sequence[ListedModel]:
        """Ask the server for its models. The caller bounds the wait.

        Raises:
            ModelError: The server cannot be reached, or its answer is no list of models.
        """
        ...
