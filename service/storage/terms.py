"""Cuts texts and queries into the terms by which a text is found: the same ones in every store.

A term is a word of UAX #29 in lower case (case folding) and in one normal form (NFKC), cut further where a character
like ``.``, ``'`` or ``_`` joins two words: so ``example`` finds ``example.com``. Scripts that are written without
spaces give each pair of neighbours, and each character alone; a query gives the pairs only, or its single character.

Terms consist of letters, digits and combining marks. So a store may add marks of its own that no text contains.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from unicodedata import combining, normalize

from apsw import unicode

from service.steps import Steps

TERM_LENGTH_MAX = 64
"""The characters of a longer word that count."""

TERMS_MAX = 32 * 1024
"""The different terms of a document that count, the first ones of it: a store adds a document in one step."""

_CHUNK_LENGTH = 4096
"""The characters of an ASCII text that are cut in one step, which takes less than a millisecond."""
_WIDE_CHUNK_LENGTH = 512
"""The same for other texts. One character may become 18 in the normal form, so a step takes up to some milliseconds."""
_OVERLAP = 8
"""The characters that two chunks share where no break was found between them: a pair and the marks on it."""

_SPACELESS = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"  # Kana
    "\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_RUN = re.compile(f"[{_SPACELESS}][{_SPACELESS}\u200b]*")
_ASCII_WORDS = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
"""Makes small letters of an ASCII text, and spaces of all that is in no word: the words of UAX #29, cut at joiners."""
_JOINER = re.compile("[\x00-/:-@[-`{-\x7f\u2018\u2019]+")
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]+"
)
_MARKS = re.compile("[\\W\uff9e\uff9f]{33,}")
"""Longer runs of marks than the words of any language have. The marks are among these characters, which are more."""
# Words end at these characters whatever stands beside them.
_BREAK = re.compile("[\x00-/:-@[-`{-\x7f\\s\u3000-\u3002\uff01\uff0c\uff1f]")


def document_terms(texts: Iterable[str]) -> Steps[set[str]]:
    """The first :data:`TERMS_MAX` terms of a document, from its texts: the same ones for the same texts."""
    found: set[str] = set()
    for text in texts:
        for _, chunk in chunks(text):
            terms = terms_of(chunk)
            if len(found) + len(terms) > TERMS_MAX:
                terms = set(sorted(terms - found)[: TERMS_MAX - len(found)])
            found |= terms
            if len(found) == TERMS_MAX:
                return found
            yield
    return found


def has_terms(texts: Sequence[str], terms: Collection[str]) -> Steps[bool]:
    """Whether a document has all of these terms. Costs a fraction of cutting the document if it lacks one of them."""
    left = set(terms)
    for text in texts:
        for _, chunk in chunks(text):
            folded = _folded(chunk)
            left = {term for term in left if term not in folded}
            yield
            if not left:
                return (yield from document_terms(texts)).issuperset(terms)
    return not left


def query_terms(query: str) -> Steps[tuple[str, ...]]:
    """The terms that a document must have all of, the longest first, because long terms are usually rare."""
    found: set[str] = set()
    for _, chunk in chunks(query):
        words, runs = _cut(chunk)
        found |= _shortened(words)
        for run in runs:
            found.update(map("".join, pairwise(run)) if len(run) > 1 else run)
        yield
    return tuple(sorted(found, key=lambda term: (-len(term), term)))


def terms_of(chunk: str) -> set[str]:
    """The terms of a short text."""
    words, runs = _cut(chunk)
    found = _shortened(words)
    for run in runs:
        found.update(run, map("".join, pairwise(run)))
    return found


def chunks(text: str) -> Iterator[tuple[int, str]]:
    """A text in parts that can be cut into terms one by one, each with the place where it begins."""
    start = 0
    length = _CHUNK_LENGTH if text.isascii() else _WIDE_CHUNK_LENGTH
    while len(text) - start > length:
        end = start + length
        found = _BREAK.search(text, end, end + length)
        if found is not None:
            yield start, text[start : found.end()]
            start = found.end()
        else:
            yield start, text[start : end + length]
            start = end + length - _OVERLAP
    yield start, text[start:]


def _cut(chunk: str) -> tuple[list[str], list[str]]:
    """The words of a short text, and its runs of characters that are written without spaces."""
    if chunk.isascii():
        return chunk.translate(_ASCII_WORDS).split(), []
    text = _without_case(chunk)
    words: list[str] = []
    runs: list[str] = []
    end = 0
    for found in _RUN.finditer(text):
        words += _words(text[end : found.start()])
        runs.append(found[0].replace("\u200b", ""))
        end = found.end()
    words += _words(text[end:])
    return words, runs


def _folded(chunk: str) -> str:
    """A text of which all terms of a short text are parts."""
    if chunk.isascii():
        return chunk.lower()
    return _without_case(chunk).replace("\u200b", "")


def _without_case(chunk: str) -> str:
    return _normalized(_INVISIBLE.sub("", _normalized(chunk).casefold()))


def _normalized(text: str) -> str:
    """The text in its normal form.

    CPython puts the marks on a letter in order by insertion, which takes the square of their number, and holds the GIL
    meanwhile. So long runs of marks are put in order before: the normal form is the same.
    """
    return normalize("NFKC", _MARKS.sub(_in_order, text))


def _in_order(found: re.Match[str]) -> str:
    """Decomposed characters, with the marks between two others in the order of the normal form."""
    decomposed = "".join(normalize("NFKD", character) for character in found[0])
    parts = (sorted(part, key=combining) for _, part in groupby(decomposed, lambda it: combining(it) == 0))
    return "".join(map("".join, parts))


def _words(text: str) -> Iterator[str]:
    for word in unicode.word_iter(text):
        if word.isalnum():
            yield word
        else:
            yield from filter(None, _JOINER.split(word))


def _shortened(words: Iterable[str]) -> set[str]:
    found = set(words)
    if max(map(len, found), default=0) > TERM_LENGTH_MAX:
        return {word[:TERM_LENGTH_MAX] for word in found}
    return found
