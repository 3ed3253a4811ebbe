"""Reading a query string into its wire type, strictly; a wire type may allow unknown names, which are ignored."""

from functools import cache
from typing import TypeVar

import msgspec
from msgspec.inspect import DictType, IntType, VarTupleType
from quart import Request

from service.api.http.strict_json import check_texts, convert, shown
from service.api.http.wire_types import Query
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
    maps = {name: _take_map(values, name) for name in _parameters_of(kind, DictType)}
    lists = {name: given for name in _parameters_of(kind, VarTupleType) if (given := _take_list(values, name))}
    if not kind.__struct_config__.forbid_unknown_fields:
        values = {name: given for name, given in values.items() if name in kind.__struct_encode_fields__}
    for name, given in values.items():
        if len(given) > 1:
            raise InvalidRequestError("This parameter may be given once.", field=shown(name))
        # msgspec alone would accept ``2.0`` and ``2e0`` for whole numbers, too.
        if name in _parameters_of(kind, IntType) and not (given[0].isascii() and given[0].isdigit()):
            raise InvalidRequestError("This parameter takes a whole number, in digits only.", field=name)
    query = convert({name: given[0] for name, given in values.items()} | maps | lists, kind, strict=False)
    for name, pairs in maps.items():
        check_texts(pairs, name, bytes_max=_QUERY_BYTES_MAX)
    return query


def _take_map(values: dict[str, list[str]], name: str) -> dict[str, str]:
    """Take the parameters of a map out of ``values``: ``name.key=value``, or ``name[key]=value`` as OpenAPI has it.

    Raises:
        InvalidRequestError: The map has no key, one key twice, or brackets within brackets.
    """
    taken: dict[str, str] = {}
    for parameter in [it for it in values if it.startswith((f"{name}.", f"{name}["))] + [name] * (name in values):
        given = values.pop(parameter)
        rest = parameter.removeprefix(name)
        key = rest[1:]
        if not rest:
            raise InvalidRequestError(f"This parameter needs a key: {name}.key=value.", field=name)
        if rest.startswith("["):
            key = rest[1:-1]
            if not rest.endswith("]") or "[" in key or "]" in key:
                raise InvalidRequestError(
                    f"This is no {name}[key]=value. A key with brackets is written as {name}.key=value.",
                    field=shown(parameter),
                )
        if len(given) > 1 or key in taken:
            raise InvalidRequestError("This parameter may be given once for each key.", field=shown(parameter))
        taken[key] = given[0]
    return taken


def _take_list(values: dict[str, list[str]], name: str) -> list[str]:
    """Take the parameters of a list out of ``values``, in the forms that clients send: ``name=…``, ``name[]=…`` and
    ``name[0]=…``, each several times."""
    named = [it for it in values if it == name or (it.startswith(f"{name}[") and it.endswith("]"))]
    return [given for parameter in named for given in values.pop(parameter)]


def check_query_length(request: Request) -> None:
    """Check the bound on the query string, before it is parsed. Raises: InvalidRequestError."""
    if len(request.query_string) > _QUERY_BYTES_MAX:
        raise InvalidRequestError(
            f"The query string has {len(request.query_string)} bytes; at most {_QUERY_BYTES_MAX} are taken."
        )


@cache
def _parameters_of(kind: type[Query], type_of: type[msgspec.inspect.Type]) -> frozenset[str]:
    """Return the parameters that have this type."""
    described = msgspec.inspect.type_info(kind)
    assert isinstance(described, msgspec.inspect.StructType)
    return frozenset(field.encode_name for field in described.fields if isinstance(_plain(field.type), type_of))


def _plain(described: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """Return a type without the metadata of its schema."""
    return described.type if isinstance(described, msgspec.inspect.Metadata) else described
