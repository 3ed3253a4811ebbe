"""Colours for Markdown while it streams. No character is changed, left out or held back."""

import re
from collections.abc import Callable

_HEADING = re.compile(r" {0,3}#{1,6} ")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_PARTS = re.compile(r"\n|`+|[^\n`]+")


class MarkdownColours:
    """Styles what it is fed, piece by piece: headings, code between backticks, and fenced code.

    What a line is can be told by its beginning alone, so a marker that arrives in two pieces colours from the second
    piece on.

    Args:
        styled: Gives a text a style.
    """

    def __init__(self, styled: Callable[..., str]) -> None:
        self._styled = styled
        self._line = ""
        self._is_in_block = False
        self._open = ""

    def feed(self, text: str) -> str:
        """The next piece of the text, with its styles."""
        return "".join(self._part(it[0]) for it in _PARTS.finditer(text))

    def _part(self, part: str) -> str:
        if part == "\n":
            if _FENCE.match(self._line):
                self._is_in_block = not self._is_in_block
            self._line = self._open = ""
            return part
        self._line = (self._line + part)[:256]
        if self._is_in_block or _FENCE.match(self._line):
            return self._styled(part, "cyan")
        if _HEADING.match(self._line):
            return self._styled(part, "bold")
        if part[0] == "`":
            was_open, self._open = self._open, "" if self._open == part else self._open or part
            return self._styled(part, "cyan") if was_open or self._open else part
        return self._styled(part, "cyan") if self._open else part
