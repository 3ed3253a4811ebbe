"""The models in a server's own list, as ``GET /models`` answers it. Pure.

Source: https://platform.openai.com/docs/api-reference/models/list
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from service.models.client import ListedModel

T = TypeVar("T")

LIST_BYTES_MAX = 4 * 1024 * 1024
"""Bound on a list. Those of large providers, with prices and descriptions, have about 1 MiB."""
MODELS_MAX = 5000
"""Bound on the models of a list that are taken: the first ones."""
NAME_LENGTH_MAX = 256
"""A model with a longer name cannot be asked for."""
_CREATED_MAX = 1 << 53


class _List(msgspec.Struct):
    data: list[msgspec.Raw] | None = None


_decode_list = msgspec.json.Decoder(_List | list[msgspec.Raw]).decode
_decode_model = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_models(body: bytes) -> Sequence[ListedModel]:
    """The models in the body of an answer, each once. Entries that are no usable model are left out.

    A list without the object around it is read as well: Together sends it.

    Raises:
        ValueError: The body is no such list.
    """
    try:
        said = _decode_list(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    entries = said.data if isinstance(said, _List) else said
    if entries is None:
        raise ValueError("it has no data")
    found: dict[str, ListedModel] = {}
    for entry in entries:
        model = _read_model(entry)
        if model is not None:
            found.setdefault(model.id, model)
        if len(found) == MODELS_MAX:
            break
    return tuple(found.values())


def _read_model(entry: msgspec.Raw) -> ListedModel | None:
    try:
        fields = _decode_model(entry)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    name = _value(fields, "id", str)
    if name is None or not 0 < len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        return None
    created, owner = _value(fields, "created", int), _value(fields, "owned_by", str)
    return ListedModel(
        id=name,
        created=created if created is not None and 0 <= created <= _CREATED_MAX else None,
        owned_by=owner if owner and len(owner) <= NAME_LENGTH_MAX and owner.isprintable() else None,
    )


def _value(fields: dict[str, msgspec.Raw], name: str, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(fields[name], type=kind) if name in fields else None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
