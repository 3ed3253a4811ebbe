"""A long JSON document, parsed in steps, between which other tasks run: as strictly as :mod:`strict_json` does.

Most values are short, and the parser of the standard library reads each of them in one step. A value of more than
:data:`_LONG` characters is read part by part here: an array by its elements, an object by its members, a text by its
pieces.
"""

import codecs
import re
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]  # there it is
from typing import Never, cast

from service.api.http.strict_json import (
    InputTooLargeError,
    MalformedBodyError,
    RepeatedKeyError,
    place_of_repeated_key,
    scan,
    shown,
    structure_of,
    structure_outside_of_texts,
    without_escapes,
)
from service.steps import Steps

_SHORT = 2 * 1024
"""The characters in which most values end."""
_LONG = 8 * 1024
"""A value that does not end within so many characters is read part by part."""
_STEP = 512
"""The characters of short values after which a step ends: some hundred values, if they are numbers."""
_PIECE = 16 * 1024
"""The characters of a long text that are read in one step: 12 at least, so that a pair of escapes fits."""
_NUMBER = 64 * 1024
"""A number has fewer characters."""
_DEPTH_MAX = 64
"""Bound on the depth of long values, one in the other."""
_MANY = 32
"""A value with fewer signs of structure counts as having them all, also those in its texts."""
_space = re.compile(r"[ \t\n\r]*").match
_piece_of_text = re.compile(r'[^"\\\x00-\x1f]*(?:\\(?:u.{4}|[^u])[^"\\\x00-\x1f]*)*', re.DOTALL).match


def parse_in_steps(raw: bytes, *, structure_max: int) -> Steps[object]:
    """Parse one JSON document, as :func:`~service.api.http.strict_json.parse_json` does.

    Args:
        structure_max: Bound on the document's brackets, commas and colons outside of texts, and so on its values.

    Raises:
        MalformedBodyError
        InputTooLargeError: The document has more values.
    """
    text = yield from _decoded(raw)
    return (yield from _Document(text, structure_max).read())


def _decoded(raw: bytes) -> Steps[str]:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pieces: list[str] = []
    try:
        for start in range(0, len(raw), 32 * _LONG):
            pieces.append(decode(raw[start : start + 32 * _LONG]))
            yield
        pieces.append(decode(b"", True))
    except UnicodeDecodeError:
        raise MalformedBodyError("The body is not UTF-8.") from None
    return "".join(pieces)


class _Document:
    def __init__(self, text: str, structure_max: int) -> None:
        self._text = text
        self._structure = 0
        self._structure_max = structure_max
        self._yielded_at = 0
        self._in_vain = 0  # the characters of arrays and objects that were scanned and did not end

    def read(self) -> Steps[object]:
        start = yield from self._after_space(0)
        value, end = yield from self._read_long(start, "", 0)
        end = yield from self._after_space(end)
        if end < len(self._text):
            self._refuse("Extra data", end)
        return value

    def _scan(self, start: int, field: str) -> tuple[object, int] | None:
        """A short value and its end; None if it has to be read part by part. ``field`` is its place in the document.

        A value that is not short is scanned in vain, and so may be each value at its beginning. So no more of a
        document is scanned in vain than was read already, and a little.
        """
        has_parts = self._text.startswith(("[", "{"), start)
        for length in (_SHORT, _LONG):
            if has_parts and self._in_vain > start + _LONG:
                return None
            piece = self._text[start : start + length]
            is_rest = start + length >= len(self._text)
            try:
                value, size = scan(piece, 0)
            except RepeatedKeyError:
                place = place_of_repeated_key(piece)
                if place is not None:
                    raise _repeated(f"{field}{place}".removeprefix(".")) from None
            except (StopIteration, JSONDecodeError):
                pass  # it is longer; or it is wrong, which is found where it is read part by part
            except RecursionError:
                raise MalformedBodyError("The body is nested too deeply.") from None
            except ValueError:
                raise MalformedBodyError("The body has a number that is too long.") from None
            else:
                if is_rest or piece[size : size + 1] not in ("", ".", "e", "E"):  # otherwise a number may go on
                    self._count(piece[:size])
                    return value, start + size
            self._in_vain += len(piece) if has_parts else 0
        return None

    def _must_yield(self, at: int) -> bool:
        if at - self._yielded_at < _STEP:
            return False
        self._yielded_at = at
        return True

    def _read_long(self, start: int, field: str, depth: int) -> Steps[tuple[object, int]]:
        yield
        if depth > _DEPTH_MAX:
            raise MalformedBodyError("The body is nested too deeply.")
        match self._text[start : start + 1]:
            case "{":
                return (yield from self._read_object(start, field, depth))
            case "[":
                return (yield from self._read_array(start, field, depth))
            case '"':
                return (yield from self._read_text(start))
            case _:
                return self._read_other(start)

    def _read_other(self, start: int) -> tuple[object, int]:
        """A number or a word; or what is no value."""
        piece = self._text[start : start + _NUMBER]
        try:
            value, size = scan(piece, 0)
        except (StopIteration, JSONDecodeError):
            self._refuse("Expecting value", start)
        except ValueError:
            value, size = None, _NUMBER
        if size == _NUMBER:
            raise MalformedBodyError("The body has a number that is too long.")
        return value, start + size

    def _read_object(self, start: int, field: str, depth: int) -> Steps[tuple[object, int]]:
        members: dict[str, object] = {}
        at = yield from self._after_space(start + 1)
        if self._text.startswith("}", at):
            return members, at + 1
        while True:
            if self._must_yield(at):
                yield
            if not self._text.startswith('"', at):
                self._refuse("Expecting property name enclosed in double quotes", at)
            key, at = cast(
                "tuple[str, int]", self._scan(at, field) or (yield from self._read_long(at, field, depth + 1))
            )
            at = yield from self._after_space(at)
            if not self._text.startswith(":", at):
                self._refuse("Expecting ':' delimiter", at)
            at = yield from self._after_space(at + 1)
            place = _below(field, key)
            if key in members:
                raise _repeated(place)
            members[key], at = self._scan(at, place) or (yield from self._read_long(at, place, depth + 1))
            self._add(2)
            at = yield from self._after_space(at)
            if self._text.startswith("}", at):
                return members, at + 1
            if not self._text.startswith(",", at):
                self._refuse("Expecting ',' delimiter", at)
            at = yield from self._after_space(at + 1)

    def _read_array(self, start: int, field: str, depth: int) -> Steps[tuple[object, int]]:
        elements: list[object] = []
        at = yield from self._after_space(start + 1)
        if self._text.startswith("]", at):
            return elements, at + 1
        while True:
            if self._must_yield(at):
                yield
            place = f"{field}[{len(elements)}]"
            element, at = self._scan(at, place) or (yield from self._read_long(at, place, depth + 1))
            elements.append(element)
            self._add(1)
            at = yield from self._after_space(at)
            if self._text.startswith("]", at):
                return elements, at + 1
            if not self._text.startswith(",", at):
                self._refuse("Expecting ',' delimiter", at)
            at = yield from self._after_space(at + 1)

    def _read_text(self, start: int) -> Steps[tuple[object, int]]:
        pieces: list[str] = []
        at = start + 1
        while True:
            yield
            found = _piece_of_text(self._text, at, at + _PIECE)
            assert found is not None, "a piece may be empty"
            end = found.end()
            if end > at:
                piece = self._piece(at, end)
                if "\ud800" <= piece[-1] <= "\udbff" and end - at > 6:
                    end -= 6  # an escape of half a pair: the other half may follow, so that both are one character
                    piece = piece[:-1]
                pieces.append(piece)
            elif self._text.startswith('"', at):
                return "".join(pieces), at + 1
            elif at + 6 > len(self._text):
                self._refuse("Unterminated string starting at", start)
            else:
                self._piece(at, at + 6)  # refused: a control character, or a wrong escape
                self._refuse("Invalid \\escape", at)
            at = end

    def _piece(self, start: int, end: int) -> str:
        try:
            piece: str = scanstring(f'{self._text[start:end]}"', 0)[0]
        except JSONDecodeError as error:
            self._refuse(error.msg.removesuffix(" at"), start + error.pos)
        return piece

    def _after_space(self, start: int) -> Steps[int]:
        """The place of the next character that is no white space."""
        while (end := _end_of_space(self._text, start)) == start + _LONG:
            yield
            start = end
        return end

    def _count(self, piece: str) -> None:
        """Count the values of a short value, so that a document takes no more memory than its bound allows."""
        raw = piece.encode()
        signs = structure_of(raw)
        if signs >= _MANY:
            signs = structure_outside_of_texts(without_escapes(raw))
        self._add(signs)

    def _add(self, signs: int) -> None:
        self._structure += signs
        if self._structure > self._structure_max:
            raise InputTooLargeError(
                f"The body has more values than this call takes: the bound is {self._structure_max}."
            )

    def _refuse(self, words: str, at: int) -> Never:
        raise MalformedBodyError(f"The body is not JSON: {words} at character {at}.")


def _end_of_space(text: str, start: int) -> int:
    found = _space(text, start, start + _LONG)
    assert found is not None
    return found.end()


def _below(field: str, key: str) -> str:
    return f"{field}.{shown(key)}" if field else shown(key)


def _repeated(field: str) -> MalformedBodyError:
    return MalformedBodyError("The body has this key twice.", field=shown(field))
