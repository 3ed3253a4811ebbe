"""Reading a query string into its wire type, strictly; a wire type may allow unknown names, which are ignored."""

from functools import cache
from typing import TypeVar

import msgspec
from quart import Request

from service.api.http.strict_json import convert, shown
from service.api.native.wire import Query
from service.errors import InvalidRequestError

Q = TypeVar("Q", bound=Query)

_QUERY_BYTES_MAX = 4096
"""Bound on a query string: a parameter needs a few hundred characters, and reading many would hold the event loop."""


def read_query(request: Request, kind: type[Q]) -> Q:
    """Read the query string as a ``kind``.

    Raises:
        InvalidRequestError
    """
    check_query_length(request)
    values = request.args.to_dict(flat=False)
    if not kind.__struct_config__.forbid_unknown_fields:
        values = {name: given for name, given in values.items() if name in kind.__struct_encode_fields__}
    for name, given in values.items():
        if len(given) > 1:
            raise InvalidRequestError("This parameter may be given once.", field=shown(name))
        if name in _whole_numbers(kind) and not (given[0].isascii() and given[0].isdigit()):
            raise InvalidRequestError("This parameter takes a whole number, in digits only.", field=name)
    return convert({name: given[0] for name, given in values.items()}, kind, strict=False)


def check_query_length(request: Request) -> None:
    """Check the bound on the query string, before it is parsed. Raises: InvalidRequestError."""
    if len(request.query_string) > _QUERY_BYTES_MAX:
        raise InvalidRequestError(
            f"The query string has {len(request.query_string)} bytes; at most {_QUERY_BYTES_MAX} are taken."
        )


@cache
def _whole_numbers(kind: type[Query]) -> frozenset[str]:
    """Return the parameters that are whole numbers: msgspec alone would accept ``2.0`` and ``2e0`` for them too."""
    described = msgspec.inspect.type_info(kind)
    assert isinstance(described, msgspec.inspect.StructType)
    return frozenset(
        field.encode_name for field in described.fields if isinstance(_plain(field.type), msgspec.inspect.IntType)
    )


def _plain(described: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """Return a type without the metadata of its schema."""
    return described.type if isinstance(described, msgspec.inspect.Metadata) else described
