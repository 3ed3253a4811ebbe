"""Escaping of foreign texts in a log: they cannot end a line, move a terminal's cursor or change the reading order.

A request's target can have line feeds and escape sequences, sent as ``%0A`` and ``%1B``. These characters are escaped:
control characters (C0, DEL, C1), the other line ends of Unicode (U+0085, U+2028, U+2029), characters that are invisible
or change the direction of a text, and halves of surrogates.

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
    r"""Return the text on one line. Only unsafe characters change: a line feed becomes ``\n``."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escape_block(text: str) -> str:
    r"""Return a text of several lines for a terminal: as :func:`escape`, but line feeds and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in "\n\t" else escape(match[0]), text)


def escape_value(value: object) -> str:
    """Return a value for a line with other values: quoted if it could be read as more or less than one value."""
    text = value if isinstance(value, str) else repr(value)
    if isinstance(value, str) and (_NEEDS_QUOTES.search(text) or _UNSAFE.search(text)):
        text = repr(text)
    return escape(text)


def escape_lines(text: str) -> str:
    """Return a text of several lines, such as a traceback, indented: no line looks like the start of a log line."""
    return "\n".join(_INDENT + escape(line) for line in text.split("\n"))


def escape_json(line: str) -> str:
    """Return a line of JSON with the unsafe characters of its texts in JSON's own escapes."""
    return _UNSAFE.sub(lambda match: _utf_16(match[0]), line)


def _utf_16(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
