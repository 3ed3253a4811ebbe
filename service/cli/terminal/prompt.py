"""A line to type in, in a terminal: read without threads, so that leaving it is a cancellation like any other."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from service.cli.terminal.keys import PASTES_OFF, PASTES_ON, Key, KeyDecoder
from service.cli.terminal.line_editor import LineEditor, Outcome
from service.cli.terminal.output import Output
from service.cli.terminal.raw_mode import TerminalMode, raw_mode, read_keys, set_mode, set_raw


class Prompt:
    """Reads messages from the terminal on standard input, and shows them on an output while they are typed.

    Between two messages keys are kept, and not echoed into a reply; Ctrl+C is a signal then. While a message is typed
    it is a key.
    """

    def __init__(self, output: Output, *, first: str, first_styled: str, fd: int = 0) -> None:
        self.editor = LineEditor()
        self._output = output
        self._first, self._first_styled = first, first_styled
        self._fd = fd
        self._row: int | None = None
        self._decoder = KeyDecoder(output.encoding)
        self._before: TerminalMode = []
        self._pending: list[Key | str] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take the terminal over, and give it back as it was."""
        with raw_mode(self._fd) as self._before:
            yield

    async def ask(self) -> str | Outcome:
        """Read one message. Returns it, or ``LEFT`` or ``INTERRUPTED``. Raises: OutputClosedError"""
        self.editor.begin()
        self._row = 0
        self.set_mode()
        self._output.write_now(PASTES_ON)
        self.redraw()
        try:
            while (outcome := await self._next()) is None:
                pass
            self.editor.at = len(self.editor.text)
            self.redraw(whole=True)
            self._output.write_now("\r\n")
        finally:
            self._row = None
            self.set_mode()
            self._output.write_now(PASTES_OFF)
        return self.editor.text if outcome is Outcome.SENT else outcome

    async def _next(self) -> Outcome | None:
        """Take what was typed until a key ends the message."""
        if not self._pending:
            data = await read_keys(self._fd)
            if not data:
                return Outcome.LEFT
            self._pending += self._decoder.feed(data)
        while self._pending:
            key = self._pending.pop(0)
            outcome = self.editor.press(key)
            if outcome is Outcome.SUSPENDED:
                self._suspend()
            elif outcome is Outcome.SCREEN_CLEARED:
                self._output.write_now("\x1b[H\x1b[2J")
                self._row = 0
            elif outcome is not None:
                return outcome
        self.redraw()
        return None

    def redraw(self, *, whole: bool = False) -> None:
        """Draw the message anew, where one is being typed; the part around the cursor if it does not fit."""
        if self._row is None:
            return
        columns, height = self._output.size()
        layout = self.editor.layout(first=self._first, width=max(8, columns - 1))
        layout = layout if whole else layout.window(max(1, height - 1))
        up = f"\x1b[{self._row}A" if self._row else ""
        rows = list(layout.rows)
        if rows[0].startswith(self._first):
            rows[0] = self._first_styled + rows[0].removeprefix(self._first)
        below = len(rows) - 1 - layout.row
        back = (f"\x1b[{below}A" if below else "") + "\r" + (f"\x1b[{layout.column}C" if layout.column else "")
        self._output.write_now("\r" + up + "\x1b[J" + "\r\n".join(rows) + back)
        self._row = layout.row

    # The terminal's mode

    def set_mode(self) -> None:
        """Set the mode that is due now: after a stop of the process by its shell, too."""
        set_raw(self._fd, signals=self._row is None)

    def continued(self) -> None:
        """The process runs again after a stop."""
        self.set_mode()
        if self._row is not None:
            self._row = 0
            self._output.write_now(PASTES_ON)
            self.redraw()

    def _suspend(self) -> None:
        """Stop the process, with those that the shell has started for the same command."""
        self._output.write_now(PASTES_OFF + "\r\n")
        set_mode(self._fd, self._before)
        os.killpg(0, signal.SIGTSTP)  # and on from here after SIGCONT, whose handler draws the message again
        self._row = 0
