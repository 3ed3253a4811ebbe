"""Texts of others in a log: nothing in them ends a line, moves a terminal's cursor or turns the order of what is read.

A request's target has line feeds and escape sequences where it was sent with ``%0A`` and ``%1B``. What is not to be
seen as it is: control characters (C0, DEL, C1), the other line ends of Unicode (U+0085, U+2028, U+2029), what changes
the direction of a text or hides in it, and halves of surrogates.

Source: https://www.unicode.org/reports/tr9/ (bidirectional formatting), https://cwe.mitre.org/data/definitions/117.html
"""

import re

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_INDENT = "    "
_NEEDS_QUOTES = re.compile(r"[\s=\"'\\]|^$")


def escape(text: str) -> str:
    r"""The text on one line, as it is but for what is unsafe: a line feed becomes ``\n``."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escape_value(value: object) -> str:
    """A value beside others on a line: quoted where it could be taken for something else than one value."""
    text = value if isinstance(value, str) else repr(value)
    if isinstance(value, str) and (_NEEDS_QUOTES.search(text) or _UNSAFE.search(text)):
        text = repr(text)
    return escape(text)


def escape_lines(text: str) -> str:
    """A text of several lines, such as a traceback: each is indented, so that none begins as a line of the log does."""
    return "\n".join(_INDENT + escape(line) for line in text.split("\n"))


def escape_json(line: str) -> str:
    """A line of JSON, in which only texts can have what is unsafe, and JSON has escapes of its own."""
    return _UNSAFE.sub(lambda match: _utf_16(match[0]), line)


def _utf_16(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
