"""The search for an item by its id, in every store."""

import pytest

from service.errors import ItemNotFoundError, SessionNotFoundError
from service.storage.store import Store
from tests.storage.rows import T0, a_session, a_turn, at
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_deletions import a_tree


async def test_an_item_is_found_with_its_turn_on_every_branch(store: Store) -> None:
    await a_tree(store)
    for item_id, name in {"a-in-0": "a", "b2-out": "b2", "b3-in-0": "b3", "d-out": "d"}.items():
        assert await store.find_item("s", item_id, now=T0) == await store.get_turn("s", name, now=T0)


async def test_the_input_of_an_open_turn_is_found(store: Store) -> None:
    await a_tree(store)
    await store.begin_turn(a_turn("open", parent="d"), now=T0)
    assert (await store.find_item("s", "open-in-0", now=T0)).id == "open"


async def test_an_id_in_a_text_is_not_taken_for_the_item(store: Store) -> None:
    await a_tree(store)
    await store.add_turns([an_added_turn("q", parent="d", asked='"id":"a-out"', replied='"a-out"')], now=T0)
    assert (await store.find_item("s", "a-out", now=T0)).id == "a"


async def test_an_item_that_is_not_there_or_is_in_another_session_is_not_found(store: Store) -> None:
    await a_tree(store)
    await store.create_session(a_session("other"), now=T0)
    for session_id, item_id in (("s", "none"), ("other", "a-out"), ("s", "a-ou"), ("s", "%")):
        with pytest.raises(ItemNotFoundError):
            await store.find_item(session_id, item_id, now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.find_item("none", "a-out", now=T0)
    await store.delete_item("s", "a-out", now=T0)
    with pytest.raises(ItemNotFoundError):
        await store.find_item("s", "a-out", now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.find_item("s", "b-out", now=at(600))
