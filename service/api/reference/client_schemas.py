"""The schemas of wire types in a form that generators of clients understand.

msgspec describes the input that its types accept. A client also needs to know which fields of an answer are always
there, and which fields of a body may be left out. Generators treat a field with a ``default`` as always there.
"""

import json
from typing import Any, get_args

import msgspec

from service.api.http.wire_types import BodyPart, RequestBody

_NEVER_DEFAULT = ("seq",)
"""Fields whose default means "not known yet" and is never sent: events have seqs from 1."""
_JSON_TYPES = {str: "string", bool: "boolean", int: "integer"}


def structs_in(kind: Any) -> dict[str, type[msgspec.Struct]]:
    """Return the wire types that a type consists of, by name; the type itself is included."""
    found: dict[str, type[msgspec.Struct]] = {}
    pending = [kind]
    while pending:
        it = pending.pop()
        if isinstance(it, type) and issubclass(it, msgspec.Struct):
            if it.__name__ not in found:
                found[it.__name__] = it
                pending += [field.type for field in msgspec.structs.fields(it)]
        else:
            pending += [part for part in get_args(it) if part is not ...]
    return found


def for_clients(schema: dict[str, Any], kind: type[msgspec.Struct] | None = None) -> dict[str, Any]:
    """Return a schema without ``default`` and with the type of each enum.

    Args:
        kind: The wire type of the schema. Its fields that are always there become ``required``.
    """
    plain = {name: _node(value) for name, value in schema.items()}
    if kind is None:
        return _without_default(plain)
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    plain["properties"] = {
        name: _property(described, fields.get(name), kind) for name, described in plain["properties"].items()
    }
    if not issubclass(kind, RequestBody | BodyPart):
        plain["required"] = [
            name for name in plain["properties"] if name not in fields or _is_always_there(fields[name], kind)
        ]
    return plain


def _property(
    described: dict[str, Any], field: msgspec.structs.FieldInfo | None, kind: type[msgspec.Struct]
) -> dict[str, Any]:
    default = described.get("default")
    described = _without_default(described)
    if issubclass(kind, RequestBody | BodyPart):
        if default not in (None, {}):
            said = f"`{json.dumps(default)}` if left out."
            described["description"] = f"{described.get('description', '')} {said}".strip()
    elif field is not None and kind.__struct_config__.omit_defaults and field.default is None:
        described = _without_null(described)  # a field that is null is left out
    return described


def _is_always_there(field: msgspec.structs.FieldInfo, kind: type[msgspec.Struct]) -> bool:
    if field.required or (field.name in _NEVER_DEFAULT and field.default is not None):
        return True
    return not kind.__struct_config__.omit_defaults and field.default is not msgspec.UNSET


def _without_default(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name != "default"}


def _without_null(described: dict[str, Any]) -> dict[str, Any]:
    kinds = [it for it in described.pop("anyOf") if it != {"type": "null"}]
    return described | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _node(node: Any) -> Any:
    """Return a part of a schema with a type for each enum; an enum with one value becomes a constant."""
    if isinstance(node, list):
        return [_node(it) for it in node]
    if not isinstance(node, dict):
        return node
    plain = {name: _node(value) for name, value in node.items()}
    values = plain.get("enum")
    if isinstance(values, list):
        plain["type"] = _JSON_TYPES[type(values[0])]
        if len(values) == 1:
            plain["const"] = plain.pop("enum")[0]
    return plain
