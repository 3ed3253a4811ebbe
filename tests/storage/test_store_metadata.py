"""Listings by metadata, in every store."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.storage import search
from service.storage.page_cursor import decode_session_cursor
from service.storage.postgres import metadata as postgres_metadata
from service.storage.records import SessionPatch, SessionStatus
from service.storage.sqlite import metadata
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, at

PAGES_MAX = 50


async def add(store: Store, session_id: str, *, created: float = 0, **metadata: str) -> None:
    session = msgspec.structs.replace(a_session(session_id, created=created), metadata=metadata)
    await store.create_session(session, now=T0)


async def listed(
    store: Store,
    metadata: dict[str, str],
    *,
    limit: int = 100,
    now: float = 0,
    status: SessionStatus | None = None,
    owner: str | None = None,
) -> list[str]:
    found: list[str] = []
    after = None
    for _ in range(PAGES_MAX):
        page = await store.list_sessions(
            limit=limit, after=after, status=status, now=at(now), owner=owner, metadata=metadata
        )
        assert not page.partial
        found += [session.id for session in page.data]
        after = page.next
        if after is None:
            return found
    raise AssertionError("a listing has no end")


async def test_a_session_is_listed_by_each_of_its_pairs_and_by_all_of_them(store: Store) -> None:
    await add(store, "a", created=1, team="blue", vip="yes")
    await add(store, "b", created=2, team="blue")
    await add(store, "c", created=3, team="yes", vip="blue")
    for limit in (1, 2, 100):
        assert await listed(store, {"team": "blue"}, limit=limit) == ["b", "a"]
        assert await listed(store, {"team": "blue", "vip": "yes"}, limit=limit) == ["a"]
        assert await listed(store, {"team": "blue", "vip": "blue"}, limit=limit) == []
        assert await listed(store, {}, limit=limit) == ["c", "b", "a"]


async def test_a_listing_by_metadata_follows_changes_deletions_and_expiry(store: Store) -> None:
    for name in ("a", "b", "c"):
        await add(store, name, team="blue")
    await store.update_session("a", SessionPatch(metadata={"team": "red"}), now=T0)
    await store.update_session("b", SessionPatch(title="x"), now=T0)
    assert await listed(store, {"team": "blue"}) == ["c", "b"]
    assert await listed(store, {"team": "red"}) == ["a"]
    await store.mark_deleted("b", now=T0)
    assert await listed(store, {"team": "blue"}) == ["c"]
    await store.remove_deleted("b")
    await add(store, "b", team="green")
    assert await listed(store, {"team": "blue"}) == ["c"]
    await store.begin_turn(a_turn("t", "a"), now=T0)
    assert await listed(store, {"team": "red"}, status="running") == ["a"]
    assert await listed(store, {"team": "red"}, status="idle") == []
    assert await listed(store, {"team": "blue"}, now=IDLE_TIMEOUT_S) == []
    assert await listed(store, {"team": "red"}, now=IDLE_TIMEOUT_S) == ["a"]
    await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=10)
    await add(store, "c", team="blue")
    assert await listed(store, {"team": "blue"}) == ["c"]


async def test_a_fork_has_the_pairs_of_its_source_under_its_own_id(store: Store) -> None:
    await add(store, "ann/a", team="blue")
    await add(store, "bob/a", team="blue")
    await store.fork_session("ann/a", at=None, copy_id="ann/copy", now=at(1))
    assert await listed(store, {"team": "blue"}, limit=1) == ["ann/copy", "bob/a", "ann/a"]
    assert await listed(store, {"team": "blue"}, owner="ann") == ["ann/copy", "ann/a"]
    assert await listed(store, {"team": "blue"}, owner="bob") == ["bob/a"]
    assert await listed(store, {"team": "blue"}, owner="") == []
    await add(store, "plain", team="blue")
    assert await listed(store, {"team": "blue"}, owner="") == ["plain"]


async def test_a_listing_by_metadata_goes_on_after_any_row_and_ends_where_its_bytes_end(store: Store) -> None:
    for n in range(6):
        await add(store, f"s{n}", created=n // 2, k="v" * 100)
    page = await store.list_sessions(limit=6, after=None, status=None, now=T0, metadata={"k": "v" * 100})
    assert [session.id for session in page.data] == ["s5", "s4", "s3", "s2", "s1", "s0"]
    for n, cursor in enumerate(page.cursors, 1):
        rest = await store.list_sessions(limit=6, after=cursor, status=None, now=T0, metadata={"k": "v" * 100})
        assert rest.data == page.data[n:]
    short = await store.list_sessions(
        limit=6, after=None, status=None, now=T0, metadata={"k": "v" * 100}, bytes_max=250
    )
    assert (short.data, short.next) == (page.data[:2], page.cursors[1])


async def test_a_listing_by_metadata_whose_time_is_over_tells_nothing_of_other_owners(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (search, metadata, postgres_metadata):
        monkeypatch.setattr(module, "SEARCH_S", 0)
    monkeypatch.setattr("service.storage.memory.store._LISTED_AT_ONCE", 1)
    monkeypatch.setattr(postgres_metadata, "ROWS_MAX", 1)

    async def pages(owner: str | None) -> list[tuple[list[str], bool, str | None]]:
        found: list[tuple[list[str], bool, str | None]] = []
        after = None
        while not found or after is not None:
            page = await store.list_sessions(
                limit=9, after=after, status=None, now=T0, owner=owner, metadata={"team": "blue"}
            )
            after = page.next
            place = None if after is None else decode_session_cursor(after).id
            found.append(([session.id for session in page.data], page.partial, place))
            assert len(found) < PAGES_MAX
        return found

    for name in ("alice/divorce-lawyer", "alice/s", "bob/s"):
        await add(store, name, team="blue")
    assert await pages("") == await pages("eve") == [([], False, None)]
    assert await pages("bob") == [(["bob/s"], True, "bob/s"), ([], False, None)]
    await add(store, "s", team="blue")
    assert await pages("") == [(["s"], True, "s"), ([], False, None)]
    names = ["s", "bob/s", "alice/s", "alice/divorce-lawyer"]
    assert await pages(None) == [*(([name], True, name) for name in names), ([], False, None)]


texts = st.text(max_size=5) | st.sampled_from(["", "a", "\x00", "'; --", "é", "e\u0301", "%", "\U0001f642"])
pairs = st.dictionaries(texts, texts, max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(pairs, max_size=6), st.lists(pairs, min_size=1, max_size=4))
async def test_any_key_and_any_value_is_found_as_it_is(
    open_store: OpenStore, given_pairs: Sequence[dict[str, str]], filters: Sequence[dict[str, str]]
) -> None:
    async with open_store() as store:
        for n, metadata in enumerate(given_pairs):
            await store.create_session(msgspec.structs.replace(a_session(f"s{n}"), metadata=metadata), now=T0)
        for wanted in (*filters, *given_pairs):
            expected = [f"s{n}" for n, it in enumerate(given_pairs) if wanted.items() <= it.items()]
            assert await listed(store, wanted, limit=2) == expected[::-1]
