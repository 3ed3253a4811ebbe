"""Snippets: the part of a text that a search shows."""

import re
from collections.abc import Callable, Iterable

from service.steps import Steps
from service.storage.terms import chunks, terms_of

SNIPPET_LENGTH_MAX = 200
"""The characters of a snippet, without the signs that it is cut off."""
_BEFORE = 60
"""The characters before the term, if there are so many."""
_WORD_LENGTH_MAX = 20
"""How far a cut moves, so that it is not within a word."""
_PART = re.compile(r"\S{1,64}")
_CUT_OFF = "…"


def snippet(texts: Iterable[str], term: str, *, is_over: Callable[[], bool] = lambda: False) -> Steps[str]:
    """The part of the first text with this term, around the term; else the beginning of the first text.

    Once the time of the search is over, the term is looked for no further.
    """
    beginning: str | None = None
    for text in texts:
        if beginning is None:
            beginning = text
        for start, chunk in chunks(text):
            if _has(chunk, term):
                return _around(text, start + _place(chunk, term))
            yield
            if is_over():
                return _around(beginning, 0)
    return _around(beginning or "", 0)


def _has(chunk: str, term: str) -> bool:
    if chunk.isascii() and term not in chunk.lower():  # the terms of such a chunk are parts of it
        return False
    return term in terms_of(chunk)


def _place(chunk: str, term: str) -> int:
    parts = _PART.finditer(chunk)
    return next((part.start() for part in parts if term in terms_of(part[0])), 0)


def _around(text: str, place: int) -> str:
    start = max(place - _BEFORE, 0)
    if start > 0:
        start = _word_before(text, start, place)
    end = start + SNIPPET_LENGTH_MAX
    if end < len(text):
        end = max(_last_space(text, end), place + 1)
    words = " ".join(text[start:end].split())
    return f"{_CUT_OFF if start else ''}{words}{_CUT_OFF if end < len(text) else ''}"


def _word_before(text: str, start: int, place: int) -> int:
    """The beginning of the next word, if it is near and not after ``place``."""
    space = re.search(r"\s", text[start : min(start + _WORD_LENGTH_MAX, place)])
    return start if space is None else start + space.end()


def _last_space(text: str, end: int) -> int:
    """The end of the last word before ``end``, if it is near."""
    spaces = [found.start() for found in re.finditer(r"\s", text[end - _WORD_LENGTH_MAX : end + 1])]
    return end - _WORD_LENGTH_MAX + spaces[-1] if spaces else end
