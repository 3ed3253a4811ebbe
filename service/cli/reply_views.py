"""How a reply is shown while it comes: on a terminal, in a pipe, or as JSON."""

import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

from lastcall_client import Event, Waiting

from service.cli.terminal.cells import Column, cut
from service.cli.terminal.markdown import MarkdownColours
from service.cli.terminal.output import Output, complain, harmless, harmless_line
from service.telemetry.escaping import escape_json

_KEPT_SHOWN_MAX = 160
"""How much of a text that counts is shown again, in characters, where a part that was shown does not count."""


class ReplyView(Protocol):
    """Shows one reply.

    Attributes:
        is_exact: What was printed is the reply. Lines that a crash has taken back cannot be unprinted in a pipe.
    """

    is_exact: bool

    async def show(self, event: Event, text: str) -> None:
        """Show what an event says. ``text`` is the reply that counts, after ``turn.resumed`` and an end; else empty."""

    def wait(self, waiting: Waiting) -> None:
        """Say that the connection is lost, and when it is tried again."""

    async def cut_off(self) -> None:
        """Show what is held back, because the reply is not followed any further."""


def why(event: Event) -> str:
    """What an end says beside its type, on one line."""
    error = event.data.get("error")
    if isinstance(error, dict):
        return harmless_line(f"{error.get('code')}: {error.get('message')}")
    if event.data.get("reason") == "shutdown":
        return "the server was stopped; what came so far is kept"
    if event.data.get("reason") == "crash":
        return "the server crashed; what it had kept is shown"
    return harmless_line(str(event.data.get("reason") or ""))


class JsonView:
    """Prints each event as a line of JSON."""

    def __init__(self, output: Output) -> None:
        self.is_exact = True
        self._output = output

    async def cut_off(self) -> None:
        """Nothing is held back."""

    async def show(self, event: Event, text: str) -> None:  # noqa: ARG002  as the others
        await self._output.write(json_line(event.data))

    def wait(self, waiting: Waiting) -> None:
        if waiting.attempt == 1:
            complain(f"connection lost ({waiting.error.detail}); trying again")


def json_line(data: Mapping[str, Any]) -> str:
    """A value as one line of JSON, which is harmless in a terminal and the same in all encodings."""
    return escape_json(json.dumps(dict(data))) + "\n"


class PlainView:
    """Prints the text of a reply, whole lines as they come, and says all else on standard error."""

    def __init__(self, output: Output) -> None:
        self.is_exact = True
        self._output = output
        self._text = ""
        self._printed = 0
        self._is_away = False

    async def show(self, event: Event, text: str) -> None:
        if self._is_away:
            self._is_away = False
            complain("the server is back, and the reply goes on")
        if event.type == "turn.delta":
            self._text += event.text
        elif event.type == "turn.resumed" or (event.is_end and event.seq is None):
            self.is_exact &= text.startswith(self._text[: self._printed])
            self._text = text
            self._printed = min(self._printed, len(text))
        await self._print(len(self._text) if event.is_end else self._text.rfind("\n") + 1)
        if event.is_end:
            await self._end(event)

    async def _print(self, end: int) -> None:
        """Print the text up to there."""
        if end > self._printed:
            piece, self._printed = self._text[self._printed : end], end
            await self._output.write(harmless(piece))

    async def cut_off(self) -> None:
        """Print the line that has begun."""
        await self._print(len(self._text))
        await self._end_line()

    async def _end_line(self) -> None:
        if self._text and not self._text.endswith("\n"):
            await self._output.write("\n")

    async def _end(self, event: Event) -> None:
        await self._end_line()
        if event.type != "turn.completed":
            complain(f"{event.type.removeprefix('turn.')}: {why(event)}")
        elif not self.is_exact:
            complain("a crash of the server took back lines that are printed already: read the reply again")

    def wait(self, waiting: Waiting) -> None:
        if not self._is_away:
            self._is_away = True
            complain(f"connection lost ({waiting.error.detail}); trying again")


class TerminalView:
    """Shows a reply on a terminal: the text as it comes, reasoning dimmed, and a line of figures at the end."""

    def __init__(self, output: Output) -> None:
        self.is_exact = True
        self._output = output
        self._column = Column()
        self._colours = MarkdownColours(output.styled)
        self._shown = ""
        self._section = ""
        self._began_at = time.monotonic()
        self._lost = 0
        self._has_status = False
        self._model = ""

    async def show(self, event: Event, text: str) -> None:
        self._clear_status()
        kind = event.type
        if kind == "turn.started":
            self._model = str(event.data.get("model") or "")
        elif kind == "turn.queued":
            await self._note("queued behind another turn of this session")
        elif kind == "turn.delta":
            await self._begin("text")
            self._shown += event.text
            await self._write(event.text, self._colours.feed)
        elif kind == "turn.reasoning":
            await self._begin("reasoning")
            await self._write(event.text, lambda piece: self._output.styled(piece, "dim"))
        elif kind == "turn.call":
            await self._note(f"calls {harmless_line(str(event.data.get('name')))}")
        elif kind == "turn.resumed" or (event.is_end and event.seq is None):
            await self._go_on_from(text)
        if event.is_end:
            await self._end(event)

    def wait(self, waiting: Waiting) -> None:
        """Say it on the line below the text, which is removed when the reply goes on."""
        columns, _ = self._output.size()
        if not self._has_status:
            self._lost += 1
        line = f"connection lost: {harmless_line(waiting.error.detail)} Trying again in {waiting.delay_s:.1f} s"
        begin = "\r\x1b[K" if self._has_status or not self._column.at else "\r\n"
        self._has_status = True
        self._output.write_now(begin + self._output.styled(cut(line, columns - 1), "yellow"))

    async def cut_off(self) -> None:
        """End the line that has begun."""
        self._clear_status()
        if self._column.at:
            await self._write("\n", str)

    def _clear_status(self) -> None:
        if not self._has_status:
            return
        self._has_status = False
        columns, _ = self._output.size()
        at = self._column.at
        if at >= columns:  # the next character would have begun a line: this one
            self._column.at = at = 0
            self._output.write_now("\r\x1b[K")
        else:
            self._output.write_now("\r\x1b[K" + (f"\x1b[A\x1b[{at}C" if at else ""))

    async def _write(self, text: str, style: Any) -> None:
        text = harmless(text)
        columns, _ = self._output.size()
        self._column.pass_over(text, width=columns)
        await self._output.write(style(text))

    async def _begin(self, section: str) -> None:
        """Begin a part of the reply on a line of its own."""
        if section != self._section:
            if self._section and self._column.at:
                await self._write("\n", str)
            self._section = section

    async def _note(self, line: str, *styles: Any) -> None:
        await self._begin("note")
        if self._column.at:
            await self._write("\n", str)
        await self._output.write(self._output.styled(line, *(styles or ("dim",))) + "\n")
        self._section = ""

    async def _go_on_from(self, kept: str) -> None:
        """Another process goes on with the reply: after this text, which may be shorter than what is shown."""
        if kept.startswith(self._shown):
            rest, self._shown = kept[len(self._shown) :], kept
            if rest:
                await self._begin("text")
                await self._write(rest, self._colours.feed)
            return
        self._shown = kept
        self._colours = MarkdownColours(self._output.styled)
        if not kept:
            await self._note("the server has lost this reply: it begins anew", "yellow")
            return
        await self._note("the server has lost the end of this reply: it goes on after", "yellow")
        await self._begin("text")
        tail = kept.rpartition("\n")[2][-_KEPT_SHOWN_MAX:] or kept[-_KEPT_SHOWN_MAX:]
        await self._write(tail, self._colours.feed)

    async def _end(self, event: Event) -> None:
        if self._column.at:
            await self._write("\n", str)
        state = event.type.removeprefix("turn.")
        reason = why(event)
        parts = [f"{state}: {reason}" if reason and state != "cancelled" else state]
        usage = event.data.get("usage")
        if isinstance(usage, dict) and usage.get("output_tokens"):
            parts.append(f"{usage['output_tokens']} tokens")
        parts.append(f"{time.monotonic() - self._began_at:.1f} s")
        parts += [harmless_line(self._model)] if self._model else []
        parts += ["cut at the longest length"] if event.data.get("finish_reason") == "length" else []
        parts += [f"connection lost, and resumed ({self._lost})"] if self._lost else []
        styles = ("red",) if state in ("failed", "interrupted") else ("dim",)
        await self._note(" · ".join(parts), *styles)
