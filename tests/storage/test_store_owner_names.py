"""Sessions of several owners in one store: their ids, and what each owner finds in listings and counts."""

import itertools
from collections.abc import Iterable

import pytest

from service.errors import SessionExistsError, SessionNotFoundError, TurnNotFoundError
from service.ids import scoped
from service.storage.records import SessionStatus
from service.storage.store import Store
from tests.storage.rows import T0, a_session, a_turn, at, ended, said

OWNERS = ("", "ann", "bob")
STATUSES: tuple[SessionStatus | None, ...] = (None, "idle", "running")


async def add(store: Store, *session_ids: str, running: Iterable[str] = ()) -> None:
    """Add sessions, each a second younger than the one before."""
    for number, session_id in enumerate(session_ids):
        await store.create_session(a_session(session_id, created=number), now=at(number))
    for session_id in running:
        await store.begin_turn(a_turn(f"{session_id}-t", session_id), now=at(5))


async def listed(
    store: Store, owner: str | None, status: SessionStatus | None = None, *, late: float = 10
) -> list[str]:
    """The ids of a complete listing, one session a page; checks that the count is right."""
    found: list[str] = []
    after = None
    while True:
        page = await store.list_sessions(limit=1, after=after, status=status, owner=owner, now=at(late))
        found += [session.id for session in page.data]
        after = page.next
        if after is None:
            break
    assert await store.count_sessions(status=status, owner=owner, now=at(late)) == len(found)
    return found


async def test_owners_have_sessions_of_the_same_id(store: Store) -> None:
    await add(store, *(scoped(owner, "s") for owner in OWNERS))
    for owner in OWNERS:
        session_id = scoped(owner, "s")
        await store.begin_turn(a_turn(f"of-{owner}", session_id), now=T0)
        await store.end_turn(ended(a_turn(f"of-{owner}", session_id)), runs=said("Hi"), now=T0)
    for owner in OWNERS:
        session = await store.get_session(scoped(owner, "s"), now=T0)
        assert (session.owner, session.head, session.message_count) == (owner, f"of-{owner}", 1 + 1)
        with pytest.raises(SessionExistsError):
            await store.create_session(a_session(scoped(owner, "s")), now=T0)


async def test_turns_are_those_of_one_owner_s_session(store: Store) -> None:
    await add(store, "ann/s", "bob/s")
    await store.begin_turn(a_turn("t", "ann/s"), now=T0)
    with pytest.raises(TurnNotFoundError):
        await store.get_turn("bob/s", "t", now=T0)
    with pytest.raises(TurnNotFoundError):
        await store.begin_turn(a_turn("t2", "bob/s", parent="t"), now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.get_turn("s", "t", now=T0)


async def test_listings_and_counts_are_those_of_one_owner_or_of_all(store: Store) -> None:
    ids = ("s1", "ann/s1", "bob/s1", "s2", "ann/s2", "ann/s3", "bob/s2")
    await add(store, *ids, running=("s2", "ann/s1", "bob/s1", "bob/s2"))
    assert await listed(store, None) == list(ids[::-1])
    assert await listed(store, "") == ["s2", "s1"]
    assert await listed(store, "ann") == ["ann/s3", "ann/s2", "ann/s1"]
    assert await listed(store, "bob") == ["bob/s2", "bob/s1"]
    assert await listed(store, "an") == []
    assert await listed(store, "ann", "running") == ["ann/s1"]
    assert await listed(store, "ann", "idle") == ["ann/s3", "ann/s2"]
    assert await listed(store, "", "running") == ["s2"]
    assert await listed(store, "", "idle") == ["s1"]
    assert await listed(store, "bob", "idle") == []


async def test_what_expires_or_is_deleted_leaves_its_owner_s_listing(store: Store) -> None:
    await add(store, "s1", "ann/s1", "ann/s2", "bob/s1", running=("ann/s2",))
    await store.mark_deleted("bob/s1", now=T0)
    late = 61.5  # the first two have expired
    for status in STATUSES:
        assert await listed(store, "bob", status, late=late) == []
        assert await listed(store, "", status, late=late) == []
    assert await listed(store, "ann", late=late) == ["ann/s2"]
    await store.remove_deleted("bob/s1")
    await store.delete_expired(now=at(late), limit=10)
    assert await listed(store, None, late=late) == await listed(store, "ann", late=late) == ["ann/s2"]
    await store.create_session(a_session("bob/s1"), now=T0)
    assert await listed(store, "bob") == ["bob/s1"]


async def test_a_page_cursor_of_another_owner_is_a_place_in_the_order(store: Store) -> None:
    await add(store, "ann/s1", "bob/s1", "ann/s2", "bob/s2")
    for owner, other in itertools.permutations(("ann", "bob")):
        first = await store.list_sessions(limit=1, after=None, status=None, owner=owner, now=T0)
        rest = await store.list_sessions(limit=9, after=first.next, status=None, owner=other, now=T0)
        assert [session.id for session in rest.data] == (["ann/s2", "ann/s1"] if other == "ann" else ["bob/s1"])


async def test_a_fork_is_listed_for_the_owner_in_its_id(store: Store) -> None:
    await add(store, "ann/s")
    await store.begin_turn(a_turn("t", "ann/s"), now=T0)
    await store.end_turn(ended(a_turn("t", "ann/s")), runs=said("Hi"), now=T0)
    copy = await store.fork_session("ann/s", at=None, copy_id="ann/copy", now=at(1))
    assert copy.owner == "ann"
    assert await listed(store, "ann") == ["ann/copy", "ann/s"]
    assert await listed(store, "") == []
