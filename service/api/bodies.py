"""Reading a JSON body: bounded in size and time, parsed once, strictly, into its wire type."""

import re
from collections.abc import Sequence
from json import JSONDecodeError, JSONDecoder
from typing import Never, TypeVar

import msgspec
from quart import Request
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

from service.api.wire import Query, RequestBody
from service.errors import InvalidRequestError, RefusedError
from service.settings import Settings

B = TypeVar("B", bound=RequestBody)
Q = TypeVar("Q", bound=Query)

_SHOWN_MAX = 200
"""Characters of a caller's own words that are shown back."""


class MalformedBodyError(InvalidRequestError):
    """The body is not one JSON document in UTF-8 without repeated keys."""

    code = "malformed_body"


class UnsupportedMediaTypeError(RefusedError):
    """The body is said to be something else than JSON."""

    code = "unsupported_media_type"

    def __init__(self) -> None:
        super().__init__('This call takes a JSON body: send "Content-Type: application/json".')


class InputTooLargeError(InvalidRequestError):
    """The body, or a text in it, is larger than it may be."""

    code = "input_too_large"


class BodyTimeoutError(RefusedError):
    """The body did not arrive within ``body_timeout_s``."""

    code = "body_timeout"

    def __init__(self) -> None:
        super().__init__("The rest of the body did not arrive in time (body_timeout_s).")


def body_bytes_max(settings: Settings) -> int:
    """The bound on a body: any text within ``input_bytes_max`` fits, however it is escaped.

    An escape makes at most six bytes of one (``\\u0041``). All the other fields together, metadata
    with surrogate pairs first of all, fit in the constant.
    """
    return 6 * settings.input_bytes_max + 128 * 1024


async def read_body(request: Request, kind: type[B], *, text_bytes_max: int) -> B:
    """Read the body as a ``kind``. Cancelled when the client leaves.

    Raises:
        UnsupportedMediaTypeError
        InputTooLargeError: Before anything is read, where the request tells its length.
        BodyTimeoutError
        MalformedBodyError
        InvalidRequestError: It is JSON, but not a ``kind``; ``field`` says where.
    """
    if request.mimetype != "application/json":
        raise UnsupportedMediaTypeError
    try:
        raw = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    except RequestEntityTooLarge:
        raise InputTooLargeError("The body is too large for what this call takes.") from None
    except RequestTimeout:
        raise BodyTimeoutError from None
    return parse_body(raw, kind, text_bytes_max=text_bytes_max)


def parse_body(raw: bytes, kind: type[B], *, text_bytes_max: int) -> B:
    """The synchronous part of :func:`read_body`."""
    body = _convert(parse_json(raw), kind, strict=True)
    for name in kind.__struct_fields__:
        _check_texts(getattr(body, name), name, bytes_max=text_bytes_max)
    return body


def parse_json(raw: bytes) -> object:
    """One JSON document (RFC 8259), refusing what parsers differ about: repeated keys, NaN, a BOM.

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


def read_query(request: Request, kind: type[Q]) -> Q:
    """The query string as a ``kind``.

    Raises:
        InvalidRequestError
    """
    values = request.args.to_dict(flat=False)
    for name, given in values.items():
        if len(given) > 1:
            raise InvalidRequestError("This parameter may be given once.", field=_shown(name))
    return _convert({name: given[0] for name, given in values.items()}, kind, strict=False)


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedBodyError("The body has this key twice.", field=_shown(key))
            seen.add(key)
    return unique


def _refuse_constant(name: str) -> Never:
    raise MalformedBodyError(f"The body is not JSON: {name} is not a JSON number.")


_decode = JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant).decode

_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_NAMED_FIELD = re.compile(r"field `(?P<name>.*)`", re.DOTALL)

T = TypeVar("T")


def _convert(value: object, kind: type[T], *, strict: bool) -> T:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        message = str(error)
    path = _PATH.search(message)
    field = path["path"].replace("[...]", "") if path else ""
    message = message[: path.start()] if path else message
    if named := _NAMED_FIELD.search(message):
        field = f"{field}.{named['name']}" if field else named["name"]
    raise InvalidRequestError(_shown(message) + ".", field=_shown(field) or None)


def _check_texts(value: object, field: str, *, bytes_max: int) -> None:
    """Refuse texts that could not be kept, sent on or shown."""
    if isinstance(value, dict):
        for key, text in value.items():
            _check_texts(key, field, bytes_max=bytes_max)
            _check_texts(text, f"{field}.{key}", bytes_max=bytes_max)
    elif isinstance(value, str):
        if "\0" in value:
            raise InvalidRequestError("A text may not have NUL characters.", field=_shown(field))
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            raise InvalidRequestError("A text may not have half of a surrogate pair.", field=_shown(field)) from None
        if size > bytes_max:
            raise InputTooLargeError(
                f"This text has {size} bytes of UTF-8; at most {bytes_max} are taken (input_bytes_max).", field=field
            )


def _shown(text: str) -> str:
    """A caller's own words, short and safe to encode."""
    return text[:_SHOWN_MAX].encode("utf-8", "replace").decode()
