"""Scripted replies for generated histories: the model's tokens for each input, and their times."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
import trio

from service.errors import ModelError
from service.models.client import (
    NO_OPTIONS,
    Finished,
    ModelEvent,
    ModelRequest,
    Options,
    PromptItem,
    TakeEvents,
    TextDelta,
    Usage,
    relay_received,
)

Last = Literal["finish", "fail", "crash", "silence"]


class Script(msgspec.Struct, frozen=True):
    """A reply: tokens, each after its delay, then ``last`` after ``last_s``.

    ``close_s`` is the time that leaving the stream takes, even if the leave is cancelled.
    """

    tokens: tuple[float, ...]
    last: Last
    last_s: float
    close_s: float = 0

    def later(self, seconds: float) -> "Script":
        """The same script, with its first event so much later."""
        if not self.tokens:
            return msgspec.structs.replace(self, last_s=self.last_s + seconds)
        return msgspec.structs.replace(self, tokens=(self.tokens[0] + seconds, *self.tokens[1:]))


class ScriptedReplies:
    """A model client that looks up its script by the last line of the user's message.

    The client knows the session of each input, and checks that no two replies of a session overlap, unless the history
    has branches.

    Attributes:
        open: The replies that are being sent: the session of each by its key.
        prompts: The prompts of all replies, by their keys.
    """

    name = "scripted replies"

    def __init__(self, *, has_branches: bool = False) -> None:
        self.scripts: dict[str, tuple[str, Script]] = {}
        self.asked: list[str] = []
        self.open: dict[str, str] = {}
        self.prompts: dict[str, Sequence[PromptItem]] = {}
        self._has_branches = has_branches

    def expect(self, key: str, session_id: str, script: Script) -> None:
        self.scripts[key] = (session_id, script)

    def can_continue(self, text: str, options: Options = NO_OPTIONS) -> bool:
        return False

    @asynccontextmanager
    async def stream(self, request: ModelRequest) -> AsyncIterator["_Reply"]:
        await trio.lowlevel.checkpoint()
        roles = [message.role for message in request.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        key = request.prompt[-1].text.rpartition("\n\n")[2]
        session_id, script = self.scripts[key]
        assert self._has_branches or session_id not in self.open.values(), "two turns of one session run at once"
        self.asked.append(key)
        self.prompts[key] = request.prompt
        self.open[key] = session_id
        try:
            yield _Reply(key, script)
        finally:
            if script.close_s:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + script.close_s):
                    await trio.sleep_forever()
            del self.open[key]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _Reply:
    def __init__(self, key: str, script: Script) -> None:
        self._key = key
        self._script = script
        self._said = 0
        self.usage: Usage | None = None

    async def relay(self, take: TakeEvents) -> None:
        await relay_received(self, take)

    async def receive(self) -> Sequence[ModelEvent]:
        if self._said < len(self._script.tokens):
            await trio.sleep(self._script.tokens[self._said])
            self._said += 1
            return [TextDelta(token(self._key, self._said))]
        await trio.sleep(self._script.last_s)
        match self._script.last:
            case "finish":
                self.usage = Usage(input_tokens=1, output_tokens=self._said)
                return [Finished(finish_reason="stop", usage=self.usage)]
            case "fail":
                raise ModelError("upstream_error", "As the script says.")
            case "crash":
                raise RuntimeError("as the script says")
            case "silence":
                await trio.sleep_forever()
                raise AssertionError


def token(key: str, number: int) -> str:
    """The ``number``-th token of a reply, from 1."""
    return f"{key}.{number} "
