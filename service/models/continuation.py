"""The rest of a reply whose beginning is known: what of an upstream's text is new. Pure, but for the stream around it.

A request that continues a reply ends with the text so far. Servers differ in what they make of it:

- **White space.** Some servers refuse a text that ends with white space, the chat templates of others strip it, and in
  the tokens of most models a space belongs to the word after it. So the text is sent without the white space at its
  end. A server then begins with this white space, which the reply has already: as much of it as is equal, from its
  beginning on, is taken off the head of what comes. White space that differs stays.
- **Echoes.** Mistral sends the text so far once more, and then the rest; so do vLLM and llama.cpp with ``echo``, which
  is not asked for, and which some of their versions did unasked. If what comes begins with the whole text that was
  sent, it is an echo and is taken off. A text so far that is shorter than :data:`ECHO_LENGTH_MIN` could be repeated by
  chance: such a reply is not continued.

Both are decided character by character, so it makes no difference how the text is cut into pieces.

Sources: https://github.com/SillyTavern/SillyTavern/issues/2557, https://github.com/vercel/ai/pull/3256,
https://github.com/ggml-org/llama.cpp/pull/23089, https://github.com/vllm-project/vllm/issues/10111
"""

from collections.abc import Sequence
from typing import Literal

from service.models.client import (
    ArgumentsDelta,
    CallOpened,
    Finished,
    ModelEvent,
    ModelStream,
    Progress,
    TakeEvents,
    TextDelta,
    Usage,
)

ECHO_LENGTH_MIN = 16
"""The fewest code points of a text so far that is told from a repetition by chance: some four words."""

Form = Literal["none", "trailing", "prefix", "final_message"]
CONTINUATION_PARAMETERS = frozenset({"continue_final_message", "add_generation_prompt", "prefix"})
"""What a request has only because it asks to go on with a reply."""
"""How a server is told to go on with its last message, which is the text so far: by its place at the end alone
(``trailing``), by a field of the message (``prefix``) or by fields of the request (``final_message``); ``none`` if the
server cannot."""


def split(text: str) -> tuple[str, str]:
    """The text so far, as it is sent, and the white space at its end."""
    sent = text.rstrip()
    return sent, text[len(sent) :]


def is_long_enough(text: str) -> bool:
    """Whether a reply with this text so far can be continued."""
    return len(split(text)[0]) >= ECHO_LENGTH_MIN


class Continuation:
    """Takes off the head of what comes what a reply has already. Holds back at most as much as the text so far.

    Args:
        text: The text of the reply so far.
    """

    def __init__(self, text: str) -> None:
        self._sent, self._white = split(text)
        self._echoed = 0 if self._sent else -1  # how much of an echo has come; -1 if there is none, or no more
        self._stripped = 0

    @property
    def is_over(self) -> bool:
        """Whether all that comes is new from now on."""
        return self._echoed < 0 and self._stripped == len(self._white)

    def feed(self, piece: str) -> str:
        """The new part of a piece of text; empty if there is none yet."""
        if self._echoed >= 0:
            piece = self._after_echo(piece)
        return self._after_white(piece) if piece else ""

    def end(self) -> str:
        """The new part of what was held back, because no more text comes: it was no whole echo."""
        held, self._echoed = self._sent[: max(self._echoed, 0)], -1
        return self._after_white(held) if held else ""

    def _after_echo(self, piece: str) -> str:
        """The part of a piece that is no echo, with what was held back if it turns out to be none."""
        rest = self._sent[self._echoed :]
        if len(piece) < len(rest) and rest.startswith(piece):
            self._echoed += len(piece)
            return ""
        if piece.startswith(rest):
            self._echoed = -1
            return piece[len(rest) :]
        held, self._echoed = self._sent[: self._echoed], -1
        return held + piece

    def _after_white(self, piece: str) -> str:
        """The piece without the white space that the reply has already."""
        left = self._white[self._stripped :]
        equal = 0
        while equal < min(len(left), len(piece)) and left[equal] == piece[equal]:
            equal += 1
        self._stripped = self._stripped + equal if equal == len(piece) else len(self._white)
        return piece[equal:]


class ContinuedStream:
    """A reply on its way, without what the reply has already; see :class:`~service.models.client.ModelStream`.

    Text that is taken off or held back is progress of the model.
    """

    def __init__(self, stream: ModelStream, text: str) -> None:
        self._stream = stream
        self._continuation = Continuation(text)

    @property
    def usage(self) -> Usage | None:
        return self._stream.usage

    async def receive(self) -> Sequence[ModelEvent]:
        return self._new(await self._stream.receive())

    async def relay(self, take: TakeEvents) -> None:
        await self._stream.relay(lambda events: take(self._new(events)))

    def _new(self, events: Sequence[ModelEvent]) -> Sequence[ModelEvent]:
        continuation = self._continuation
        if continuation.is_over:
            return events
        new: list[ModelEvent] = []
        for event in events:
            if isinstance(event, TextDelta):
                if text := continuation.feed(event.text):
                    new.append(TextDelta(text))
                continue
            if isinstance(event, CallOpened | ArgumentsDelta | Finished) and (text := continuation.end()):
                new.append(TextDelta(text))
            new.append(event)
        return new or [Progress()]
