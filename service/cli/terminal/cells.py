"""How many cells of a terminal a text takes.

A terminal and this module may disagree about rare characters, such as families of emoji. So nothing relies on it for
more than looks: what is redrawn in place is drawn without the terminal's own line breaks.

Source: https://www.unicode.org/reports/tr11/ (East Asian Width)
"""

import unicodedata
from functools import lru_cache


@lru_cache(maxsize=4096)
def _cells_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc") or "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def cells(text: str) -> int:
    """The cells that a text takes; control characters take none."""
    return len(text) if text.isascii() and text.isprintable() else sum(map(_cells_of, text))


def cut(text: str, width: int) -> str:
    """The text in at most ``width`` cells: a longer one ends in ``…``."""
    if cells(text) <= width:
        return text
    kept, room = [], width - 1
    for character in text:
        room -= _cells_of(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + ("…" if width > 0 else "")


def padded(text: str, width: int) -> str:
    """The text in exactly ``width`` cells: cut, or followed by spaces."""
    text = cut(text, width)
    return text + " " * (width - cells(text))


class Column:
    """Where the cursor is after what was written: ``at`` cells from the left edge, as the terminal breaks lines."""

    def __init__(self) -> None:
        self.at = 0

    def pass_over(self, text: str, *, width: int) -> None:
        """Count a text that was written to a terminal with this many cells a line."""
        _, line_feed, last_line = text.rpartition("\n")
        self.at = 0 if line_feed else self.at
        for character in last_line:
            taken = 8 - self.at % 8 if character == "\t" else _cells_of(character)
            if self.at + taken <= width:
                self.at += taken
            else:  # the terminal breaks the line, but not for a tab
                self.at = width if character == "\t" else taken
