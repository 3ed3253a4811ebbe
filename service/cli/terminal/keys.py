"""What the keys of a terminal send, as keys and texts."""

import codecs
import re
from collections.abc import Iterator
from enum import Enum, auto


class Key(Enum):
    """A key that is no text."""

    ENTER = auto()
    NEW_LINE = auto()
    """Ctrl+J, or Alt and Enter."""
    BACKSPACE = auto()
    DELETE = auto()
    LEFT = auto()
    RIGHT = auto()
    UP = auto()
    DOWN = auto()
    HOME = auto()
    END = auto()
    WORD_LEFT = auto()
    WORD_RIGHT = auto()
    DELETE_WORD = auto()
    DELETE_TO_BEGIN = auto()
    DELETE_TO_END = auto()
    CLEAR_SCREEN = auto()
    INTERRUPT = auto()
    END_OF_INPUT = auto()
    SUSPEND = auto()


_CONTROLS = {
    "\r": Key.ENTER,
    "\n": Key.NEW_LINE,
    "\x7f": Key.BACKSPACE,
    "\x08": Key.BACKSPACE,
    "\x01": Key.HOME,
    "\x02": Key.LEFT,
    "\x03": Key.INTERRUPT,
    "\x04": Key.END_OF_INPUT,
    "\x05": Key.END,
    "\x06": Key.RIGHT,
    "\x0b": Key.DELETE_TO_END,
    "\x0c": Key.CLEAR_SCREEN,
    "\x0e": Key.DOWN,
    "\x10": Key.UP,
    "\x15": Key.DELETE_TO_BEGIN,
    "\x17": Key.DELETE_WORD,
    "\x1a": Key.SUSPEND,
}
_BY_LETTER = {"A": Key.UP, "B": Key.DOWN, "C": Key.RIGHT, "D": Key.LEFT, "H": Key.HOME, "F": Key.END}
_SEQUENCES = {
    **{f"\x1b{kind}{letter}": key for kind in "[O" for letter, key in _BY_LETTER.items()},
    "\x1b[1~": Key.HOME,
    "\x1b[7~": Key.HOME,
    "\x1b[4~": Key.END,
    "\x1b[8~": Key.END,
    "\x1b[3~": Key.DELETE,
    "\x1b[1;5D": Key.WORD_LEFT,
    "\x1b[1;3D": Key.WORD_LEFT,
    "\x1bb": Key.WORD_LEFT,
    "\x1b[1;5C": Key.WORD_RIGHT,
    "\x1b[1;3C": Key.WORD_RIGHT,
    "\x1bf": Key.WORD_RIGHT,
    "\x1b\r": Key.NEW_LINE,
    "\x1b\x7f": Key.DELETE_WORD,
}
_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|[^\[O])", re.DOTALL)
_SEQUENCE_LENGTH_MAX = 32
_TEXT = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]+")
_PASTE, _END_OF_PASTE = "\x1b[200~", "\x1b[201~"
PASTES_ON, PASTES_OFF = "\x1b[?2004h", "\x1b[?2004l"
"""These ask the terminal to mark what is pasted, so that a line end in it is no Enter."""


class KeyDecoder:
    """Decodes what a terminal sends: keys and texts that may be cut anywhere. What is unknown is dropped."""

    def __init__(self, encoding: str) -> None:
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._rest = ""
        self._pasted: list[str] | None = None

    def feed(self, data: bytes) -> Iterator[Key | str]:
        """The keys and texts that are whole now."""
        text = self._rest + self._decoder.decode(data)
        self._rest = ""
        while text:
            if self._pasted is not None:
                text, *pasted = self._read_paste(text)
                yield from pasted
            elif text[0] == "\x1b":
                found = _SEQUENCE.match(text)
                if found is None:
                    self._rest = text if len(text) < _SEQUENCE_LENGTH_MAX else ""
                    return
                text = text[found.end() :]
                if found[0] == _PASTE:
                    self._pasted = []
                elif found[0] in _SEQUENCES:
                    yield _SEQUENCES[found[0]]
            elif (plain := _TEXT.match(text)) is not None:
                text = text[plain.end() :]
                yield plain[0]
            else:
                if text[0] in _CONTROLS:
                    yield _CONTROLS[text[0]]
                text = text[1:]

    def _read_paste(self, text: str) -> list[str]:
        """Return what is after the paste; and the whole paste, if it has ended."""
        assert self._pasted is not None
        at = text.find(_END_OF_PASTE)
        if at < 0:
            kept = max(0, len(text) - len(_END_OF_PASTE) + 1)
            self._pasted.append(text[:kept])
            self._rest = text[kept:]
            return [""]
        pasted = "".join([*self._pasted, text[:at]])
        self._pasted = None
        rest = text[at + len(_END_OF_PASTE) :]
        return [rest, pasted.replace("\r\n", "\n").replace("\r", "\n")] if pasted else [rest]
