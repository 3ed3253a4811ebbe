"""A message while it is typed: keys change it, and it is laid out in rows of cells."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from service.cli.terminal.cells import cells
from service.cli.terminal.keys import Key
from service.telemetry.escaping import escape


class Outcome(Enum):
    """What a key asks for beside a change of the text."""

    SENT = auto()
    LEFT = auto()
    """Ctrl+D without a text."""
    INTERRUPTED = auto()
    """Ctrl+C without a text."""
    SUSPENDED = auto()
    SCREEN_CLEARED = auto()


@dataclass(frozen=True)
class Layout:
    """The rows of a message, and where the cursor is: a row, and cells from the left edge."""

    rows: Sequence[str]
    row: int
    column: int

    def window(self, height: int) -> "Layout":
        """The rows around the cursor, at most ``height`` of them."""
        if len(self.rows) <= height:
            return self
        first = min(max(0, self.row - height // 2), len(self.rows) - height)
        return Layout(self.rows[first : first + height], self.row - first, self.column)


class LineEditor:
    """The message, and the earlier ones. ``at`` is the cursor's place in ``text``, in code points."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self._earlier: list[str] = []
        self._drafts: list[str] = [""]
        self._place = 0

    def remember(self, message: str) -> None:
        """Keep a message that was sent, for the arrow keys."""
        if message and self._earlier[-1:] != [message]:
            self._earlier.append(message)

    def begin(self, text: str = "") -> None:
        """Begin a message with this text."""
        self._drafts = [*self._earlier, text]
        self._show(len(self._earlier))

    def press(self, key: Key | str) -> Outcome | None:
        """Take a key, or a text that was typed or pasted."""
        if isinstance(key, str):
            self._replace(self.at, self.at, key)
        elif key is Key.NEW_LINE:
            self._replace(self.at, self.at, "\n")
        elif key in (Key.UP, Key.DOWN):
            self._move_vertically(up=key is Key.UP)
        elif (place := self._place_after(key)) is not None:
            self.at = place
        elif (part := self._deleted_by(key)) is not None:
            self._replace(*part, "")
        else:
            return self._asked(key)
        return None

    def _asked(self, key: Key) -> Outcome | None:
        if key is Key.ENTER and self.text.strip():
            return Outcome.SENT
        if key is Key.INTERRUPT and self.text:
            self._replace(0, len(self.text), "")
            return None
        if key is Key.END_OF_INPUT and not self.text:
            return Outcome.LEFT
        outcomes = {
            Key.INTERRUPT: Outcome.INTERRUPTED,
            Key.SUSPEND: Outcome.SUSPENDED,
            Key.CLEAR_SCREEN: Outcome.SCREEN_CLEARED,
        }
        return outcomes.get(key)

    def _place_after(self, key: Key) -> int | None:
        """Where the cursor is after a key that moves it; None for other keys."""
        match key:
            case Key.LEFT:
                return self._beside(self.at, -1)
            case Key.RIGHT:
                return self._beside(self.at, 1)
            case Key.HOME:
                return self.text.rfind("\n", 0, self.at) + 1
            case Key.END:
                return self._end_of_line()
            case Key.WORD_LEFT:
                return self._begin_of_word()
            case Key.WORD_RIGHT:
                found = re.compile(r"\W*\w+").match(self.text, self.at)
                return found.end() if found else len(self.text)
            case _:
                return None

    def _deleted_by(self, key: Key) -> tuple[int, int] | None:
        """The part of the text that a key deletes; None for other keys."""
        match key:
            case Key.BACKSPACE:
                return self._beside(self.at, -1), self.at
            case Key.DELETE:
                return self.at, self._beside(self.at, 1)
            case Key.END_OF_INPUT if self.text:
                return self.at, self._beside(self.at, 1)
            case Key.DELETE_WORD:
                return self._begin_of_word(), self.at
            case Key.DELETE_TO_BEGIN:
                return self.text.rfind("\n", 0, self.at) + 1, self.at
            case Key.DELETE_TO_END:
                return self.at, self._end_of_line()
            case _:
                return None

    def _beside(self, at: int, step: int) -> int:
        """The next place, past marks that are drawn onto the character before them."""
        at = min(max(0, at + step), len(self.text))
        while 0 < at < len(self.text) and self.text[at] not in "\n\t" and not cells(_shown(self.text[at])):
            at += step
        return at

    def _begin_of_word(self) -> int:
        found = re.search(r"\w+\W*$", self.text[: self.at])
        return found.start() if found else 0

    def _end_of_line(self) -> int:
        end = self.text.find("\n", self.at)
        return len(self.text) if end < 0 else end

    def _move_vertically(self, *, up: bool) -> None:
        begin, end = self.text.rfind("\n", 0, self.at) + 1, self._end_of_line()
        if up and begin:
            above = self.text.rfind("\n", 0, begin - 1) + 1
            self.at = min(above + self.at - begin, begin - 1)
        elif not up and end < len(self.text):
            below_end = self.text.find("\n", end + 1)
            self.at = min(end + 1 + self.at - begin, len(self.text) if below_end < 0 else below_end)
        else:
            self._drafts[self._place] = self.text
            self._show(self._place + (-1 if up else 1))

    def _show(self, place: int) -> None:
        self._place = min(max(0, place), len(self._drafts) - 1)
        self.text = self._drafts[self._place]
        self.at = len(self.text)

    def _replace(self, begin: int, end: int, text: str) -> None:
        self.text = self.text[:begin] + text + self.text[end:]
        self.at = begin + len(text)

    def layout(self, *, first: str, width: int) -> Layout:
        """The rows of the message in lines of ``width`` cells.

        Args:
            first: Stands before the message; further lines of it are indented as far.
        """
        indent = cells(first)
        rows: list[str] = []
        parts, column = [first], indent
        cursor = (0, indent)
        for place, character in enumerate(self.text):
            if character == "\n":
                cursor = (len(rows), column) if place == self.at else cursor
                rows.append("".join(parts))
                parts, column = [" " * indent], indent
                continue
            shown = _shown(character)
            taken = cells(shown)
            if column + taken > width:
                rows.append("".join(parts))
                parts, column = [], 0
            cursor = (len(rows), column) if place == self.at else cursor
            parts.append(shown)
            column += taken
        cursor = (len(rows), column) if self.at == len(self.text) else cursor
        rows.append("".join(parts))
        return Layout(rows, *cursor)


def _shown(character: str) -> str:
    return "    " if character == "\t" else escape(character)
