"""Reading a request's body: bounded in size and time, and parsed strictly."""

import re
import sys
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

import msgspec
import trio
from quart import Request
from quart_trio.wrappers.request import TrioBody, TrioRequest

from service.api.http.held_bytes import HeldBytesLimitError, RequestBytes, bytes_of
from service.api.http.long_body import parse_in_steps
from service.api.http.strict_json import (
    STRUCTURE_MAX,
    InputTooLargeError,
    check_structure,
    convert,
    parse_json,
    texts_checked,
)
from service.api.http.wire_types import RequestBody
from service.errors import InvalidRequestError, RefusedError
from service.freezes import move_on_after
from service.sessions.commands import HISTORY_ITEMS_MAX
from service.steps import Steps, at_once, in_steps
from service.supervisor import Service

B = TypeVar("B", bound=RequestBody)

_LONG_BYTES = 64 * 1024
"""A longer body is parsed in steps; another one in one step of the event loop, but for a history's items."""
_HISTORY_STRUCTURE_MAX = 200_000
"""Bound on the brackets, commas and colons of a body with a history, outside of its texts: fifty for each item, and so
on its memory."""
_ITEMS_IN_STEP = 8
"""The items of a history that are converted in one step, which takes some microseconds if they have few parts."""

BODY_BYTES_MAX = "lastcall.body_bytes_max"
"""Key in the ASGI scope of a request whose body may have more bytes than those of other calls."""

_KEPT = "lastcall.body"
"""Key of a request's body in its ASGI scope, kept for a request that may be sent on to another process."""


class UnsupportedMediaTypeError(RefusedError):
    """The request's ``Content-Type`` is not JSON."""

    code = "unsupported_media_type"

    def __init__(self, message: str = 'This call takes a JSON body: send "Content-Type: application/json".') -> None:
        super().__init__(message)


class UnsupportedEncodingError(UnsupportedMediaTypeError):
    """The request has a ``Content-Encoding``."""

    field = "Content-Encoding"

    def __init__(self) -> None:
        super().__init__("This call takes a body that is not compressed: send it without Content-Encoding.")


class BodyTimeoutError(RefusedError):
    """The body did not arrive within ``body_timeout_s``."""

    code = "body_timeout"

    def __init__(self) -> None:
        super().__init__("The rest of the body did not arrive in time (body_timeout_s).")


class BoundedBody(TrioBody):
    """A body that is arriving. Data beyond the bound is dropped, also if no handler reads the body.

    The body of Quart 0.22 would do, but for :meth:`refuse`. That of Quart 0.23 keeps all that arrives, without a bound,
    until the body is complete. Quart 0.22 calls ``append``; Quart 0.23 calls ``put`` and ``disconnect``.
    Cause and removal test: the last of ``FAULTS`` in ``service/hosting/hypercorn/patches.py``.

    Attributes:
        began_at: When the head of the request had arrived, in seconds of Trio's clock.
    """

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        self.began_at = trio.current_time()
        self._arrived = bytearray()
        self._bytes_max = max_content_length or 0
        self._error: Exception | None = None
        self._readable = trio.Event()
        self._is_dropped = False
        self._counted: RequestBytes | None = None
        if (expected_content_length or 0) > self._bytes_max:
            self._refuse_as_too_large()

    def count_in(self, counted: RequestBytes, *, expected: int) -> None:
        """Count the data that arrives. A body that finds no room is refused, before it arrives if its size is known."""
        self._counted = counted
        try:
            counted.check(expected)
        except HeldBytesLimitError as error:
            self.refuse(error)

    async def read(self) -> bytes:
        """Return the whole body, once. It counts until the request is over, or :func:`read_body` has parsed it.

        Raises:
            InputTooLargeError: The body is too large; raised as soon as that is known.
            HeldBytesLimitError: There is no room for the body.
            Exception: The error that :meth:`refuse` was given.
        """
        await self._readable.wait()
        if self._error is not None:
            raise self._error
        body = bytes(self._arrived)
        self._arrived.clear()
        return body

    def refuse(self, error: Exception) -> None:
        """Take no more data, and raise ``error`` in :meth:`read`. A body that is complete does not change."""
        if not self._readable.is_set():
            self._error = error
            self._give_back()
            self._readable.set()

    def drop(self) -> None:
        """Hold no data and take no more: an answer has begun, so no handler reads the body any more. Idempotent."""
        self._is_dropped = True
        self._give_back()

    def _give_back(self) -> None:
        if self._counted is not None:
            self._counted.add(-len(self._arrived))
        self._arrived.clear()

    def append(self, data: bytes) -> None:
        if self._error is not None or self._is_dropped:
            return
        if len(self._arrived) + len(data) > self._bytes_max:
            self._refuse_as_too_large()
            return
        try:
            if self._counted is not None:
                self._counted.take(len(data))
        except HeldBytesLimitError as error:
            self.refuse(error)
        else:
            self._arrived += data

    def _refuse_as_too_large(self) -> None:
        self.refuse(InputTooLargeError(f"The body is larger than {self._bytes_max} bytes, more than this call takes."))

    async def put(self, data: bytes) -> None:
        self.append(data)

    def set_complete(self) -> None:
        self._readable.set()

    def disconnect(self) -> None:
        """Do nothing: when the client leaves, the request is cancelled, and :meth:`read` with it."""


class BoundedRequest(TrioRequest):
    """A request with a :class:`BoundedBody`, whose bytes count from its head on."""

    body_class = BoundedBody

    def __init__(self, *args: Any, **options: Any) -> None:
        if (bytes_max := options.get("scope", {}).get(BODY_BYTES_MAX)) is not None:
            options["max_content_length"] = bytes_max
        super().__init__(*args, **options)
        assert isinstance(self.body, BoundedBody)
        self.body.count_in(bytes_of(self.scope), expected=self.content_length or 0)


async def read_body(request: Request, kind: type[B], service: Service) -> B:
    """Read the body as a ``kind``. Cancelled when the client leaves.

    If other processes may share the store, and so may have to answer, the raw body is kept until :func:`drop_body`.
    A body that may be left out has its defaults then, whether the request gives a type of its body or not.

    Raises:
        UnsupportedMediaTypeError, UnsupportedEncodingError
        InputTooLargeError: Raised before the body is read if the request gives its length.
        HeldBytesLimitError: As above, or when the body grows.
        BodyTimeoutError
        MalformedBodyError
        InvalidRequestError: The body is JSON, but not a ``kind``; ``field`` names the wrong part.
    """
    has_type = request.mimetype == "application/json"
    if not has_type and not (kind.may_be_left_out and "Content-Type" not in request.headers):
        raise UnsupportedMediaTypeError
    if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedEncodingError
    raw = kept_body(request)
    if not raw:
        assert isinstance(request.body, BoundedBody)
        with move_on_after(service.settings.body_timeout_s) as arrival:
            raw = await request.body.read()
        if arrival.cancelled_caught:
            raise BodyTimeoutError
        if service.store.capabilities.shared:
            cast("dict[str, object]", request.scope)[_KEPT] = raw
    try:
        if not raw and kind.may_be_left_out:
            return kind()
        if not has_type:
            raise UnsupportedMediaTypeError
        return await _parse(raw, kind, service)
    finally:
        if not kept_body(request):
            bytes_of(request.scope).add(-len(raw))


async def _parse(raw: bytes, kind: type[B], service: Service) -> B:
    text_bytes_max = service.settings.input_bytes_max
    if kind.history or len(raw) > _LONG_BYTES:
        return await in_steps(parsed_in_steps(raw, kind, text_bytes_max=text_bytes_max))
    check_structure(raw)
    return parse_body(raw, kind, text_bytes_max=text_bytes_max)


def kept_body(request: Request) -> bytes:
    """Return the raw body while it is kept; empty before and after."""
    body: bytes = cast("dict[str, object]", request.scope).get(_KEPT, b"")  # type: ignore[assignment]
    return body


def drop_body(request: Request) -> None:
    """Keep the body no longer, because the answering process is known. Idempotent."""
    bytes_of(request.scope).add(-len(kept_body(request)))
    cast("dict[str, object]", request.scope).pop(_KEPT, None)


def parse_body(raw: bytes, kind: type[B], *, text_bytes_max: int) -> B:
    """Parse and check a short body, as the last part of :func:`read_body`, in one step of the event loop."""
    return at_once(_checked(parse_json(raw), kind, text_bytes_max=text_bytes_max))


def parsed_in_steps(raw: bytes, kind: type[B], *, text_bytes_max: int) -> Steps[B]:
    """Parse and check a body that is long, or that may bring a whole conversation, in steps.

    Args:
        text_bytes_max: Bound on all texts but those of the conversation, which only the size of the body bounds.
    """
    if len(raw) > _LONG_BYTES:
        structure_max = _HISTORY_STRUCTURE_MAX if kind.history else STRUCTURE_MAX
        told = yield from parse_in_steps(raw, structure_max=structure_max)
    else:
        check_structure(raw)
        told = parse_json(raw)
        yield
    return (yield from _checked(told, kind, text_bytes_max=text_bytes_max))


def _checked(told: object, kind: type[B], *, text_bytes_max: int) -> Steps[B]:
    """A body that is parsed, as a ``kind``. Raises: InvalidRequestError."""
    yield from kind.check_given(told)
    body = yield from _converted(told, kind)
    for name in kind.__struct_fields__:
        bytes_max = sys.maxsize if name == kind.history else text_bytes_max
        yield from texts_checked(getattr(body, name), name, bytes_max=bytes_max, bounds_each=kind.bounds_each)
    return body


def _converted(told: object, kind: type[B]) -> Steps[B]:
    """The body as a ``kind``. A history is converted some items at a time, after the rest of the body."""
    name = kind.history
    items = told.get(name) if name and isinstance(told, dict) else None
    if not isinstance(items, list) or len(items) <= _ITEMS_IN_STEP:
        return convert(told, kind)
    if len(items) > HISTORY_ITEMS_MAX:
        raise InvalidRequestError(f"These are {len(items)} items; at most {HISTORY_ITEMS_MAX} are taken.", field=name)
    assert isinstance(told, dict)
    body = convert(told | {name: items[:_ITEMS_IN_STEP]}, kind)
    converted = list(getattr(body, name))
    part = _history_part(kind)
    for start in range(_ITEMS_IN_STEP, len(items), _ITEMS_IN_STEP):
        yield
        some = items[start : start + _ITEMS_IN_STEP]
        try:
            converted += getattr(convert({name: some}, part), name)
        except InvalidRequestError as error:
            error.field = _moved(error.field, name, by=start)
            raise
    return msgspec.structs.replace(body, **{name: tuple(converted)})


@cache
def _history_part(kind: type[RequestBody]) -> type[msgspec.Struct]:
    """The type of a body that has a history only, as ``kind`` has it."""
    return msgspec.defstruct(kind.__name__, [(kind.history, get_type_hints(kind, include_extras=True)[kind.history])])


def _moved(field: str | None, name: str, *, by: int) -> str | None:
    """The place of an item of a list, whose first items are not counted in it."""
    found = re.match(rf"{name}\[(\d+)\]", field or "")
    return field if field is None or found is None else f"{name}[{int(found[1]) + by}]{field[found.end() :]}"
