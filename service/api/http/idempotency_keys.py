"""The header ``Idempotency-Key``: the request may be repeated, and is done once.

Source: draft-ietf-httpapi-idempotency-key-header. It writes a key as a string of structured fields, in quotes
(RFC 9651, 3.3.3). Most clients write it bare; both are the same key.
"""

import re
from functools import lru_cache
from hashlib import sha256
from typing import Any

import msgspec
from quart import request

from service.api.http.callers import current_owner
from service.api.http.repeats import allow_repeat
from service.api.http.wire_types import RequestBody
from service.errors import InvalidRequestError
from service.storage.records import IdempotencyKey

HEADER = "Idempotency-Key"
KEY_LENGTH_MAX = 255
_QUOTED = re.compile(r'"(?P<key>(?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE = re.compile(r"[ -~]*")


class InvalidKeyError(InvalidRequestError):
    """The header ``Idempotency-Key`` is not one key."""

    code = "invalid_idempotency_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, field=HEADER)


def read_key(body: RequestBody) -> IdempotencyKey | None:
    """Read the key of the current request, which has this body; None if the request has none.

    With a key the request may be repeated, also by this process.

    Raises:
        InvalidKeyError
    """
    told = request.headers.getlist(HEADER)
    if not told:
        return None
    if len(told) > 1:
        raise InvalidKeyError(f"The request has {len(told)} headers {HEADER}; send one.")
    key = parse_key(told[0])
    allow_repeat()
    return IdempotencyKey(caller=current_owner(), key=key, fingerprint=_fingerprint(body))


def parse_key(told: str) -> str:
    """Return the key in a header's value. Raises: InvalidKeyError."""
    told = told.strip(" \t")
    key = told
    if told.startswith('"'):
        quoted = _QUOTED.fullmatch(told)
        if quoted is None:
            raise InvalidKeyError(
                "A key that begins with a quote is one text of printable ASCII in quotes, as in RFC 9651."
            )
        key = re.sub(r'\\(["\\])', r"\1", quoted["key"])
    elif _BARE.fullmatch(told) is None:
        raise InvalidKeyError("A key has printable ASCII characters only.")
    elif "," in told:  # as which a proxy passes on several headers
        raise InvalidKeyError("A comma parts several keys, and a request has one; write a key with a comma in quotes.")
    if not key:
        raise InvalidKeyError("The key is empty; send 1 to 255 characters, such as a random UUID.")
    if len(key) > KEY_LENGTH_MAX:
        raise InvalidKeyError(f"The key has {len(key)} characters; at most {KEY_LENGTH_MAX} are taken.")
    return key


def _fingerprint(body: RequestBody) -> bytes:
    assert request.url_rule is not None
    return fingerprint_of(request.method, request.url_rule.rule, request.view_args or {}, body)


def fingerprint_of(method: str, route: str, names: dict[str, str], body: RequestBody) -> bytes:
    """Return the fingerprint of a request: equal for requests that ask for the same.

    The body counts as it was parsed: neither blanks, escapes and the order of its fields matter, nor whether a field
    with its default was sent. So a later version with more fields still knows the requests of this one.

    Args:
        names: The variable parts of the path.
    """
    return sha256(msgspec.json.encode((method, route, names, canonical(body)), order="deterministic")).digest()


def canonical(value: Any) -> Any:
    """Return a parsed value as plain data, without fields that have their defaults.

    Values without a type are plain data already, and their numbers are normal: see ``strict_json.py``.
    """
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        told = {} if tag is None else {value.__struct_config__.tag_field: tag}
        for name, encoded, default in _fields(type(value)):
            field = getattr(value, name)
            if field is not msgspec.UNSET and (default is msgspec.NODEFAULT or field != default):
                told[encoded] = canonical(field)
        return told
    if isinstance(value, tuple):
        return [canonical(item) for item in value]
    return value


@lru_cache(maxsize=256)
def _fields(kind: type[msgspec.Struct]) -> list[tuple[str, str, Any]]:
    """Return the names, the names in JSON and the defaults of a type's fields."""
    fields = []
    for field in msgspec.structs.fields(kind):
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        fields.append((field.name, field.encode_name, default))
    return fields
