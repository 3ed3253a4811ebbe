"""Items from the JSON of a row, for every store that has rows."""

import msgspec

from service.storage.records import Item

_LONG = 256 * 1024
"""Longer JSON takes a millisecond to decode."""

_items: msgspec.json.Decoder[tuple[Item, ...]] = msgspec.json.Decoder(tuple[Item, ...])
_item: msgspec.json.Decoder[Item] = msgspec.json.Decoder(Item)
_parts: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])


def items_of(json: bytes | str) -> tuple[Item, ...]:
    if len(json) > _LONG:  # one by one: no other thread runs while one of these calls does
        return tuple([_item.decode(part) for part in _parts.decode(json)])
    return _items.decode(json)
