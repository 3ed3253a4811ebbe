"""The items of a conversation, reasoning included, in pages that begin after an item: oldest or newest first."""

from collections.abc import Sequence

import msgspec

from service.errors import InvalidRequestError
from service.storage.records import Item, SessionRecord, TurnRecord
from service.storage.store import Store

_BYTES_PER_ITEM = 1024
"""How many bytes of turns one step reads for each item of a page, newest first: about twice what most items have."""


class PlacedItem(msgspec.Struct, frozen=True):
    """An item of a conversation, and its turn."""

    item: Item
    turn: TurnRecord


class ItemsPage(msgspec.Struct, frozen=True):
    """Some items, and whether there are more after the last one."""

    data: tuple[PlacedItem, ...]
    has_more: bool


def placed_items(turn: TurnRecord) -> list[PlacedItem]:
    """The items of a turn, oldest first, without empty replies."""
    items = (*turn.input, *turn.output)
    return [PlacedItem(item, turn) for item in items if item.is_message or item.text or item.encrypted]


async def items_down(
    store: Store, session: SessionRecord, *, at: str | None, after: str | None, limit: int, bytes_max: int
) -> ItemsPage | None:
    """The items from the head, or from the item before ``after``, to the root. None if the head is gone.

    Args:
        at: The turn of the item ``after``.

    Raises:
        InvalidRequestError: That turn is gone.
    """
    found: list[PlacedItem] = []
    size = 0
    start = turn_id = at or session.head
    while turn_id is not None and len(found) <= limit and (size <= bytes_max or not found):
        path = await store.read_path(session.id, turn_id, bytes_max=limit * _BYTES_PER_ITEM)
        if not path and turn_id == start:
            _refuse_gone(at)
            return None
        for turn in reversed(path):
            found += _after(placed_items(turn)[::-1], after if turn.id == at else None)
            size += turn.text_bytes
        turn_id = path[0].parent if path else None
    return ItemsPage(tuple(found[:limit]), has_more=len(found) > limit or turn_id is not None)


async def items_up(
    store: Store, session: SessionRecord, *, at: str | None, after: str | None, limit: int, bytes_max: int
) -> ItemsPage | None:
    """The items from the root, or from the item after ``after``, to the head. None if the head is gone.

    Raises:
        InvalidRequestError: The turn of ``after`` is not on this path.
    """
    found: list[PlacedItem] = []
    size = 0
    first, is_last = at, session.head is None
    while not is_last and len(found) <= limit and (size <= bytes_max or not found):
        path = await store.list_path(session.id, session.head or "", limit=limit + 2, first=first, bytes_max=bytes_max)
        if not path:
            _refuse_gone(first)
            return None
        # The first turn was in the step before, or has the item ``after``.
        for turn in path if first == at else path[1:]:
            found += _after(placed_items(turn), after if turn.id == at else None)
            size += turn.text_bytes
        is_last = path[-1].id == session.head
        first = path[-1].id
    return ItemsPage(tuple(found[:limit]), has_more=len(found) > limit or not is_last)


def _refuse_gone(turn_id: str | None) -> None:
    """Refuse a page that begins at a turn which is gone. Without a turn it begins at an end of the path."""
    if turn_id is not None:
        raise InvalidRequestError("This item is not on the path to the conversation's newest item.", field="after")


def _after(items: Sequence[PlacedItem], item_id: str | None) -> Sequence[PlacedItem]:
    """The items after one of them; all of them without an id."""
    for index, placed in enumerate(items, 1):
        if placed.item.id == item_id:
            return items[index:]
    return items
