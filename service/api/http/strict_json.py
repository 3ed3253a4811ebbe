"""Strict JSON parsing, and conversion into a type with errors that name the field."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from json import JSONDecodeError, JSONDecoder
from math import isinf
from typing import Any, Never, TypeVar

import msgspec

from service.api.http.wire_types import FORMS, KINDS, Metadata
from service.errors import InvalidRequestError
from service.json_words import in_json_words
from service.steps import Steps, at_once

T = TypeVar("T")

_SHOWN_MAX = 200
"""Characters of a caller's text that an error shows."""
STRUCTURE_MAX = 20_000
"""Bound on a body's brackets, commas and colons outside of texts, and so on the time that it holds the event loop.

Texts are read at a nanosecond a byte, but each value, key and object takes up to half a microsecond. A body that may
bring a whole conversation is read in steps: it has a bound of its own.
"""
_DIGITS_MAX = 400
"""Bound on the digits of a whole number: the time grows faster than the digits, and no field takes so many."""
_WHOLE_MAX = 2**53
"""Beyond it a float stays a float: as a whole number ``1e308`` would take 309 digits, fifty times what was sent."""
_VISITED_IN_STEP = 1000
"""The parts of a value that are looked at in one step, which takes some hundred microseconds."""
_OBJECTS_IN_STEP = 16
"""The objects of a list that are looked at in one step, if they have few parts."""
_MESSAGE_MAX = 2000
"""Bound on a message that quotes a caller, before patterns are searched for in it."""


class MalformedBodyError(InvalidRequestError):
    """The body is not one JSON document in UTF-8 without repeated keys."""

    code = "malformed_body"


class InputTooLargeError(InvalidRequestError):
    """The body, or a text in it, is larger than its bound."""

    code = "input_too_large"


def check_structure(raw: bytes) -> None:
    """Refuse a body with so many values that reading it would hold the event loop.

    Raises:
        InputTooLargeError: It has more than :data:`STRUCTURE_MAX` brackets, commas and colons outside of texts.
    """
    if structure_of(raw) <= STRUCTURE_MAX:
        return
    quoting = without_escapes(raw)  # most of these characters may be in texts
    if quoting.count(b'"') > 2 * STRUCTURE_MAX or structure_outside_of_texts(quoting) > STRUCTURE_MAX:
        raise InputTooLargeError(f"The body has more values than any call takes: the bound is {STRUCTURE_MAX}.")


def structure_of(raw: bytes) -> int:
    """Count the opening brackets, commas and colons: each value but the first follows one of them."""
    return sum(map(raw.count, (b"[", b"{", b",", b":")))


def without_escapes(raw: bytes) -> bytes:
    """Remove escaped quotes and backslashes: then each quote begins or ends a text.

    A backslash outside of texts is an error, so miscounts after it are fine.
    """
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"")


def structure_outside_of_texts(quoting: bytes) -> int:
    """Do :func:`structure_of` for JSON :func:`without_escapes`, but not in its texts: those are every other part."""
    return structure_of(b"".join(quoting.split(b'"')[::2]))


def parse_json(raw: bytes) -> object:
    """Parse one JSON document (RFC 8259). Refuses input that parsers read differently: repeated keys, NaN, a BOM.

    Call :func:`check_structure` first.

    Raises:
        MalformedBodyError
    """
    try:
        return _decode(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise MalformedBodyError("The body is not UTF-8.") from None
    except JSONDecodeError as error:
        raise MalformedBodyError(f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except ValueError:
        raise MalformedBodyError("The body has a number that is too long.") from None
    except RecursionError:
        raise MalformedBodyError("The body is nested too deeply.") from None


class _Pairs(list[tuple[str, object]]):
    """A JSON object as its list of pairs, repeated keys included."""


class RepeatedKeyError(Exception):
    """An object has a key twice."""


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise RepeatedKeyError
    return unique


def _repeated_key(node: object) -> list[str]:
    """Return the path to the first repeated key, last step first; empty if no key is repeated."""
    if isinstance(node, _Pairs):
        seen: set[str] = set()
        for key, value in node:
            if key in seen:
                return [f".{key}"]
            seen.add(key)
            if steps := _repeated_key(value):
                return [*steps, f".{key}"]
    elif isinstance(node, list):
        for index, value in enumerate(node):
            if steps := _repeated_key(value):
                return [*steps, f"[{index}]"]
    return []


def _refuse_constant(name: str) -> Never:
    raise MalformedBodyError(f"The body is not JSON: {name} is not a JSON number.")


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS_MAX:
        raise ValueError
    return int(text)


def _number(text: str) -> float | int:
    """Read ``1.0`` and ``1e0`` as the whole number 1, because JSON has one type of number."""
    number = float(text)
    return int(number) if abs(number) < _WHOLE_MAX and number.is_integer() else number


_NUMBERS: dict[str, Any] = {
    "parse_int": _whole_number,
    "parse_float": _number,
    "parse_constant": _refuse_constant,
}
_unique_decoder = JSONDecoder(object_pairs_hook=_unique, **_NUMBERS)
_pairs_decoder = JSONDecoder(object_pairs_hook=_Pairs, **_NUMBERS)
scan: Callable[[str, int], tuple[object, int]] = _unique_decoder.scan_once  # type: ignore[attr-defined]  # there it is
"""Read the value that begins at a place of a text, and tell where it ends, as :func:`parse_json` does.

Raises: StopIteration, JSONDecodeError, RepeatedKeyError, RecursionError; ValueError for a number that is too long.
"""


def _decode(text: str) -> object:
    try:
        return _unique_decoder.decode(text)
    except RepeatedKeyError:
        field = "".join(reversed(_repeated_key(_pairs_decoder.decode(text)))).removeprefix(".")
        raise MalformedBodyError("The body has this key twice.", field=shown(field)) from None


def place_of_repeated_key(text: str) -> str | None:
    """The place of the first repeated key in the value with which a text begins; None if the value does not end."""
    try:
        pairs, _ = _pairs_decoder.raw_decode(text)
    except JSONDecodeError:
        return None
    return "".join(reversed(_repeated_key(pairs)))


_PATH = re.compile(r" - at `(?P<key>key` in `)?\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_INDICES = re.compile(r"(\[\d+\])+$")
_NAMED_FIELD = re.compile(r"field `(?P<name>.*)`", re.DOTALL)


def convert(value: object, kind: type[T], *, strict: bool = True) -> T:
    """Convert a value into a ``kind``. If not strict, texts may stand for numbers and booleans.

    Raises:
        InvalidRequestError: The value is not a ``kind``; ``field`` names the wrong part.
    """
    try:
        converted = msgspec.convert(value, kind, strict=strict)
        _check_types(value)
        return converted
    except UnicodeEncodeError as error:
        raise InvalidRequestError("A name may not have half of a surrogate pair.", field=shown(error.object)) from None
    except msgspec.ValidationError as error:
        message = _without_middle(str(error))
    path = _PATH.search(message)
    field = path["path"] if path else ""
    message = in_json_words(message[: path.start()] if path else message, of_text=not strict)
    if path and path["key"]:
        message = f"A key is not valid: {message}"
    if named := _NAMED_FIELD.search(message):
        field = f"{field}.{named['name']}" if field else named["name"]
    if field.endswith("[...]") and isinstance(value, dict):
        field = field.removesuffix("[...]")
        field = f"{field}.{_pair_at_fault(value[field])}"
    message = _in_words(message, kind, field)
    raise InvalidRequestError(shown(message) + ".", field=shown(field) or None)


def _check_types(value: object) -> None:
    """Refuse an object without its ``type`` where it can be of one kind only, because msgspec needs it of several only.

    Raises:
        InvalidRequestError
    """
    for name, kinds in KINDS.items():
        given = value.get(name) if isinstance(value, dict) and len(kinds) == 1 else None
        for index, part in enumerate(given if isinstance(given, list) else [given]):
            if isinstance(part, dict) and "type" not in part:
                place = f"[{index}]" if isinstance(given, list) else ""
                raise InvalidRequestError("Object missing required field `type`.", field=f"{name}{place}.type")


def _without_middle(message: str) -> str:
    """Cut the middle of a long message: the caller's text is in the middle, msgspec's words at both ends."""
    if len(message) <= _MESSAGE_MAX:
        return message
    return f"{message[: _MESSAGE_MAX // 2]}…{message[-_MESSAGE_MAX // 2 :]}"


def _in_words(message: str, kind: type, field: str) -> str:
    """Replace a pattern or an enum in msgspec's message by words for the allowed values."""
    for pattern, form in FORMS.items():
        if repr(pattern) in message:
            return f"Expected {form}"
    allowed: Sequence[object] = ()
    if message.startswith("Invalid enum value"):
        parts = msgspec.json.schema(kind)["$defs"]
        name = _INDICES.sub("", field.rpartition(".")[2])
        described = [part["properties"].get(name, {}) for part in (parts[kind.__name__], *parts.values())]
        allowed = next((enum for of in described for enum in _enums_in(of)), ())
    elif message.startswith("Invalid value") and field.endswith(".type"):
        allowed = KINDS.get(re.split(r"[.\[]", field, maxsplit=1)[0], ())
    return f"Expected one of {', '.join(map(json.dumps, allowed))}" if allowed else message


def _enums_in(described: dict[str, Any]) -> Iterator[list[object]]:
    """The enums in the schema of a field: its own, those of its kinds and those of its items."""
    if "enum" in described:
        yield described["enum"]
    for part in (*described.get("anyOf", ()), *([described["items"]] if "items" in described else ())):
        yield from _enums_in(part)


def _pair_at_fault(pairs: dict[str, object]) -> str:
    for key, value in pairs.items():
        try:
            msgspec.convert({key: value}, Metadata)
        except msgspec.ValidationError:
            return key
    return ""


def check_texts(value: object, field: str, *, bytes_max: int, bounds_each: bool = False) -> None:
    """Do :func:`texts_checked` at once."""
    at_once(texts_checked(value, field, bytes_max=bytes_max, bounds_each=bounds_each))


def texts_checked(value: object, field: str, *, bytes_max: int, bounds_each: bool = False) -> Steps[None]:
    """Refuse texts that cannot be stored, sent on or shown, and texts that are too long; metadata has own bounds.

    The texts of a list are too long if they are so together; with ``bounds_each`` if those of one object are.
    """
    yield
    if isinstance(value, tuple):
        if bounds_each:
            for index, item in enumerate(value):
                yield from _objects_checked([item], field, bytes_max=bytes_max, places=(f"{field}[{index}]",))
        else:
            yield from _objects_checked(value, field, bytes_max=bytes_max)
    elif isinstance(value, msgspec.Struct) or (isinstance(value, dict) and not _has_texts_only(value)):
        yield from _objects_checked([value], field, bytes_max=bytes_max, places=(field,))
    elif isinstance(value, dict):
        for key, text in value.items():
            _utf8_length(key, field, what="A key")
            _utf8_length(text, f"{field}.{key}")
    elif isinstance(value, str) and (size := _utf8_length(value, field)) > bytes_max:
        raise InputTooLargeError(
            f"This text has {size} bytes of UTF-8; at most {bytes_max} are taken (input_bytes_max).", field=field
        )


def _has_texts_only(value: dict[str, object]) -> bool:
    return all(isinstance(text, str) for text in value.values())


def _objects_checked(
    objects: Sequence[object], field: str, *, bytes_max: int, places: Sequence[str] = ()
) -> Steps[None]:
    """Check objects: those of the list ``field``, or with ``places`` in the body. Values without a type of ours count
    as a whole.
    """
    size = 0
    for index, item in enumerate(objects):
        if index % _OBJECTS_IN_STEP == 0:
            yield
        place = places[index] if places else f"{field}[{index}]"
        if not isinstance(item, msgspec.Struct):
            size += yield from _size_of(item, place)
            continue
        for name in (name for name in item.__struct_fields__ if name != "role"):  # a role is no text
            size += yield from _size_of(getattr(item, name), f"{place}.{name}")
    if size > bytes_max:
        raise InputTooLargeError(
            f"These texts have {size} bytes of UTF-8 together; at most {bytes_max} are taken (input_bytes_max).",
            field=field,
        )


def _size_of(value: object, field: str) -> Steps[int]:
    """The size of all texts and names in a value of JSON, and one for each other value.

    Texts within a value may have NUL characters: the value is only passed on, as JSON, which escapes them. A number
    that is too large for 64 bits is read as infinite, which JSON cannot say.
    """
    size = 0
    pending: list[tuple[object, bool]] = [(value, False)]
    visited = 0
    while pending:
        visited += 1
        if visited % _VISITED_IN_STEP == 0:
            yield
        part, is_within = pending.pop()
        if isinstance(part, dict):
            for key in part:
                size += _utf8_length(key, field, what="A key", takes_nul=True)
                visited += 1
                if visited % _VISITED_IN_STEP == 0:
                    yield
            pending += [(it, True) for it in part.values()]
        elif isinstance(part, list | tuple):
            pending += [(it, is_within) for it in part]
        elif isinstance(part, msgspec.Struct):
            pending += [(getattr(part, name), False) for name in part.__struct_fields__]
        elif isinstance(part, float) and isinf(part):
            raise InvalidRequestError("A number may not be larger than a float of 64 bits can be.", field=shown(field))
        else:
            size += _utf8_length(part, field, takes_nul=is_within) if isinstance(part, str) else 1
    return size


def _utf8_length(text: str, field: str, *, what: str = "A text", takes_nul: bool = False) -> int:
    if not takes_nul and "\0" in text:
        raise InvalidRequestError(f"{what} may not have NUL characters.", field=shown(field))
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{what} may not have half of a surrogate pair.", field=shown(field)) from None


def shown(text: str) -> str:
    """Return a caller's text in a form that is short and can be encoded."""
    return text[:_SHOWN_MAX].encode("utf-8", "backslashreplace").decode()
