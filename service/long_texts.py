"""Long texts as JSON, encoded in steps."""

from collections.abc import Iterator

import msgspec

from service.steps import Steps

LONG = 64 * 1024
"""A text of so many code points takes up to a millisecond."""


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces."""
    for start in range(0, len(text), LONG):
        yield text[start : start + LONG]


def text_encoded(text: str) -> Steps[list[bytes]]:
    """A text as JSON, in pieces: joined they are what ``msgspec.json.encode`` makes of it."""
    pieces = [b'"']
    for start in range(0, len(text), LONG):
        pieces.append(msgspec.json.encode(text[start : start + LONG])[1:-1])
        yield
    pieces.append(b'"')
    return pieces
