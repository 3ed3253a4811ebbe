"""What only the memory store promises."""

from collections.abc import Awaitable, Callable

import pytest
from trio.testing import assert_checkpoints

from service.storage.memory import MemoryStore, open_memory_store
from service.storage.records import SessionPatch
from tests.storage.rows import T0, a_session, a_turn, ended

METHODS: list[Callable[[MemoryStore], Awaitable[object]]] = [
    lambda store: store.create_session(a_session("new"), now=T0),
    lambda store: store.get_session("s", now=T0),
    lambda store: store.list_sessions(limit=1, after=None, status=None, now=T0),
    lambda store: store.count_sessions(status=None, now=T0),
    lambda store: store.update_session("s", SessionPatch(), now=T0),
    lambda store: store.mark_deleted("s", now=T0),
    lambda store: store.remove_deleted("s"),
    lambda store: store.delete_expired(now=T0, limit=1),
    lambda store: store.begin_turn(a_turn("new"), now=T0),
    lambda store: store.start_turn("t", now=T0),
    lambda store: store.end_turn(ended(a_turn()), events=[], now=T0),
    lambda store: store.get_turn("s", "t", now=T0),
    lambda store: store.list_turns("s", limit=1, after=None, now=T0),
    lambda store: store.read_path("s", "t", bytes_max=None),
    lambda store: store.list_path("s", "t", limit=1, first=None),
    lambda store: store.read_events("s", "t"),
    lambda store: store.recover(now=T0),
    lambda store: store.aclose(),
]


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_is_a_checkpoint(method: Callable[[MemoryStore], Awaitable[object]]) -> None:
    async with open_memory_store() as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        with assert_checkpoints():
            await method(store)


async def test_it_does_not_outlive_the_process() -> None:
    async with open_memory_store() as store:
        assert (store.name, store.durable) == ("memory", False)
        await store.create_session(a_session(), now=T0)
    async with open_memory_store() as another:
        assert await another.count_sessions(status=None, now=T0) == 0
