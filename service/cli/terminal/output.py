"""Writing to standard output and standard error: styled on a terminal, plain elsewhere.

Texts of models and of other users are hostile: they may hold escape sequences that write to the clipboard, rename the
window, move the cursor or change the reading order. Each text passes :func:`harmless` before it is written.
"""

import os
import stat
import sys
from typing import Literal

import trio

from service.client_settings import is_dumb_terminal, wants_no_colour
from service.telemetry.escaping import escape, escape_block

Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: dict[Style, str] = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_PLAIN = str.maketrans(
    {"·": "-", "…": "...", "→": "->", "─": "-", "│": "|", "├": "|", "└": "`", "“": '"', "”": '"', "‘": "'", "’": "'"}  # noqa: RUF001
)
"""In place of characters that the terminal does not have."""
_PIECE = 4096
"""``PIPE_BUF``: a pipe that can be written to takes so many bytes without a wait."""


class OutputClosedError(Exception):
    """The reader of standard output has gone."""


class Output:
    """Standard output.

    Attributes:
        is_terminal: It is a terminal that can move its cursor.
        encoding: What the terminal, or the locale, speaks; other characters are written as ``\\u2026``.
    """

    def __init__(self, *, encoding: str, fd: int = 1) -> None:
        self.encoding = encoding
        self._fd = fd
        self.is_terminal = os.isatty(fd) and not is_dumb_terminal()
        self._is_coloured = self.is_terminal and not wants_no_colour()
        mode = os.fstat(fd).st_mode
        self._lock = trio.Lock()
        # epoll, and so Trio, takes no regular files, and a device such as /dev/null never waits.
        self._can_wait = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal: as they are now."""
        try:
            columns, rows = os.get_terminal_size(self._fd)
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def styled(self, text: str, *styles: Style) -> str:
        """The text in this style, if this is a terminal with colours."""
        if not (self._is_coloured and text and styles):
            return text
        return f"\x1b[{';'.join(_CODES[it] for it in styles)}m{text}\x1b[0m"

    async def write(self, text: str) -> None:
        """Write a text. A cancelled write may have written a part of it. Raises: OutputClosedError"""
        data = self._encoded(text)
        async with self._lock:
            for begin in range(0, len(data), _PIECE):
                piece = data[begin : begin + _PIECE]
                while piece:
                    if self._can_wait:
                        await trio.lowlevel.wait_writable(self._fd)
                    piece = piece[self._write(piece) :]

    def write_now(self, text: str) -> None:
        """Write a short text at once: it may block for as long as the terminal is stopped. Raises: OutputClosedError"""
        data = self._encoded(text)
        while data:
            data = data[self._write(data) :]

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode(self.encoding)
        except UnicodeEncodeError:
            return text.translate(_PLAIN).encode(self.encoding, "backslashreplace")

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except OSError as error:  # EPIPE, and EIO of a terminal that has gone
            raise OutputClosedError from error


def harmless(text: str) -> str:
    """A text of others as a terminal may have it: line feeds and tabs stay, all that acts on a terminal is escaped."""
    return escape_block(text.replace("\r\n", "\n"))


def harmless_line(text: str) -> str:
    """The same on one line."""
    return escape(" ".join(text.split()))


def complain(text: str) -> None:
    """Write a line to standard error."""
    try:
        sys.stderr.write(f"lastcall: {harmless_line(text)}\n")
        sys.stderr.flush()
    except OSError:
        pass  # it is closed, and there is no other place to say so
