"""Idempotency keys in every store: each is kept in the step that makes something, and as long as this exists."""

from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import pytest
import trio

from service.errors import RepeatedError, SessionExistsError, SessionNotFoundError, StoreError
from service.storage.postgres import idempotency as postgres_idempotency
from service.storage.records import IdempotencyKey
from service.storage.rules import KEY_KEPT_S
from service.storage.sqlite import idempotency, reclaim
from service.storage.sqlite.store import SqliteStore
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, at, contents, ended, said
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_cancellation import WAITS_MAX, _called_and_cancelled

Made = tuple[str, str | None, bool]
"""The session and the turn that a call with a key has made, and whether they are gone."""


def a_key(key: str = "k", *, caller: str = "", fingerprint: bytes = b"f") -> IdempotencyKey:
    return IdempotencyKey(caller=caller, key=key, fingerprint=fingerprint)


async def _made(store: Store, key: IdempotencyKey | None = None, *, seconds: float = 0) -> Made | None:
    try:
        await store.check_key(key or a_key(), now=at(seconds))
    except RepeatedError as error:
        return error.session_id, error.turn_id, error.is_gone
    return None


async def _prepare(store: Store) -> None:
    await store.create_session(a_session("source"), now=T0)
    await store.begin_turn(a_turn("told", "source"), now=T0)
    await store.end_turn(ended(a_turn("told", "source")), runs=said("H", "i"), now=T0)


async def _create(store: Store, key: IdempotencyKey) -> None:
    await store.create_session(a_session("made"), now=T0, key=key)


async def _begin(store: Store, key: IdempotencyKey) -> None:
    await store.begin_turn(a_turn("turn", "source", parent="told"), now=T0, head="told", key=key)


async def _begin_with_session(store: Store, key: IdempotencyKey) -> None:
    await store.begin_turn(a_turn("turn", "made"), now=T0, creates=a_session("made"), key=key)


async def _fork(store: Store, key: IdempotencyKey) -> None:
    await store.fork_session("source", at=None, copy_id="made", now=T0, key=key)


async def _add(store: Store, key: IdempotencyKey) -> None:
    turns = [an_added_turn("a", parent="told"), an_added_turn("b", parent="a")]
    added = [msgspec.structs.replace(turn, session_id="source") for turn in turns]
    await store.add_turns(added, now=T0, head="told", key=key)


STEPS: dict[str, tuple[Callable[[Store, IdempotencyKey], Awaitable[None]], Made]] = {
    "create": (_create, ("made", None, False)),
    "begin": (_begin, ("source", "turn", False)),
    "begin with its session": (_begin_with_session, ("made", "turn", False)),
    "fork": (_fork, ("made", None, False)),
    "add": (_add, ("source", "b", False)),
}
each_step = pytest.mark.parametrize("step", STEPS)


@pytest.fixture
def _in_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite builds a fork, and cuts keys off, in as many steps as it can."""
    monkeypatch.setattr("service.storage.sqlite.forks.STEP_S", 0)
    monkeypatch.setattr(idempotency, "_CUT_OFF_AT_ONCE", 1)


@each_step
async def test_a_key_is_kept_with_what_its_step_makes(store: Store, step: str) -> None:
    await _prepare(store)
    call, made = STEPS[step]
    assert await _made(store) is None
    await call(store, a_key())
    assert await _made(store) == made


async def test_the_key_of_several_turns_knows_the_first_and_the_last(store: Store) -> None:
    await _prepare(store)
    await _add(store, a_key())
    with pytest.raises(RepeatedError) as raised:
        await store.check_key(a_key(), now=T0)
    assert (raised.value.first_turn_id, raised.value.turn_id) == ("a", "b")


@each_step
async def test_a_repeated_step_says_what_the_first_one_made_and_changes_nothing(store: Store, step: str) -> None:
    await _prepare(store)
    call, made = STEPS[step]
    await call(store, a_key(fingerprint=b"first"))
    before = await contents(store, now=T0)
    with pytest.raises(RepeatedError) as raised:
        await call(store, a_key(fingerprint=b"second"))
    error = raised.value
    assert (error.session_id, error.turn_id, error.is_gone) == made
    assert error.fingerprint == b"first"
    assert await contents(store, now=T0) == before


@each_step
async def test_a_key_comes_before_every_other_refusal_of_its_step(store: Store, step: str) -> None:
    await _prepare(store)
    await store.create_session(a_session("other"), now=T0, key=a_key())
    await store.mark_deleted("source", now=T0)
    await store.create_session(a_session("made"), now=T0)
    with pytest.raises(RepeatedError) as raised:
        await STEPS[step][0](store, a_key())
    assert raised.value.session_id == "other"


async def test_a_step_that_is_refused_keeps_no_key(store: Store) -> None:
    await store.create_session(a_session("made"), now=T0)
    with pytest.raises(SessionExistsError):
        await _create(store, a_key())
    with pytest.raises(SessionExistsError):
        await _begin_with_session(store, a_key())
    with pytest.raises(SessionNotFoundError):
        await _begin(store, a_key())
    with pytest.raises(SessionNotFoundError):
        await _add(store, a_key())
    with pytest.raises(SessionNotFoundError):
        await _fork(store, a_key())
    assert await _made(store) is None


async def test_the_keys_of_two_callers_never_meet(store: Store) -> None:
    await store.create_session(a_session("one"), now=T0, key=a_key(caller="a"))
    await store.create_session(a_session("two"), now=T0, key=a_key(caller="b"))
    assert await _made(store, a_key(caller="a")) == ("one", None, False)
    assert await _made(store, a_key(caller="b")) == ("two", None, False)
    assert await _made(store, a_key(caller="")) is None


async def test_two_keys_of_one_session_are_two_keys(store: Store) -> None:
    await _prepare(store)
    await _begin(store, a_key("one"))
    await store.begin_turn(a_turn("next", "source", parent="turn"), now=T0, key=a_key("two"))
    assert await _made(store, a_key("one")) == ("source", "turn", False)
    assert await _made(store, a_key("two")) == ("source", "next", False)


@pytest.mark.usefixtures("_in_many_steps", "callers_wait")
@each_step
async def test_a_cancelled_step_leaves_its_key_and_what_it_makes_or_none_of_them(
    open_store: OpenStore, step: str
) -> None:
    call, made = STEPS[step]
    for nth in range(WAITS_MAX):
        async with open_store() as store:
            await _prepare(store)
            before = await contents(store, now=T0)
            with trio.fail_after(60):
                hit = await _called_and_cancelled(partial(call, store, a_key()), nth)
            left = await _made(store)
            assert left in (None, made)
            assert (left is None) == (await contents(store, now=T0) == before), f"cancelled at wait {nth}"
        if not hit:
            assert left == made
            return
    pytest.fail(f"the step waits more than {WAITS_MAX} times")


# What is gone


async def _delete(store: Store, session_id: str) -> None:
    await store.mark_deleted(session_id, now=at(1))
    await store.remove_deleted(session_id)


async def _expire(store: Store, _session_id: str) -> None:
    await store.delete_expired(now=at(IDLE_TIMEOUT_S), limit=100)


async def _replace(store: Store, session_id: str) -> None:
    await store.create_session(a_session(session_id, created=IDLE_TIMEOUT_S), now=at(IDLE_TIMEOUT_S))


ENDS: dict[str, Callable[[Store, str], Awaitable[None]]] = {
    "deletion": _delete,
    "expiry": _expire,
    "another session of this id": _replace,
}


async def _forget(store: Store, *, seconds: float) -> None:
    """What housekeeping does until there is nothing left to do."""
    if isinstance(store, SqliteStore):
        while await store._writing.call(reclaim.reclaim_some):
            pass
    for _ in range(100):
        if not await store.forget_keys(now=at(seconds), limit=1):
            return
    pytest.fail("there is always more to do")


@pytest.mark.usefixtures("_in_many_steps")
@pytest.mark.parametrize("end", ENDS)
async def test_the_key_of_a_thing_that_is_gone_says_so_and_is_kept_for_a_day_from_when_that_is_noted(
    store: Store, end: str
) -> None:
    await _create(store, a_key())
    await store.create_session(a_session("stays", idle_timeout_s=10 * KEY_KEPT_S), now=T0, key=a_key("kept"))
    await ENDS[end](store, "made")
    assert await _made(store, seconds=IDLE_TIMEOUT_S) == ("made", None, True)
    await _forget(store, seconds=100)
    await _forget(store, seconds=100 + KEY_KEPT_S - 1)
    assert await _made(store, seconds=IDLE_TIMEOUT_S) == ("made", None, True)
    await _forget(store, seconds=100 + KEY_KEPT_S)
    assert await _made(store, seconds=IDLE_TIMEOUT_S) is None
    assert await _made(store, a_key("kept")) == ("stays", None, False)


async def test_the_key_of_an_expired_session_says_that_it_is_gone_before_the_session_is_removed(store: Store) -> None:
    await _create(store, a_key())
    assert await _made(store, seconds=IDLE_TIMEOUT_S - 1) == ("made", None, False)
    assert await _made(store, seconds=IDLE_TIMEOUT_S) == ("made", None, True)


async def test_the_key_of_a_session_that_is_being_deleted_says_that_it_is_gone(store: Store) -> None:
    await _begin_with_session(store, a_key())
    await store.mark_deleted("made", now=T0)
    assert await _made(store) == ("made", "turn", True)


@pytest.mark.usefixtures("_in_many_steps")
async def test_the_keys_of_deleted_turns_are_spent_and_forgotten_a_day_later_while_the_session_lives(
    store: Store,
) -> None:
    await store.create_session(a_session("s", idle_timeout_s=10 * KEY_KEPT_S), now=T0, key=a_key("session"))
    for name, parent in (("a", None), ("b", "a"), ("c", "b")):
        await store.begin_turn(a_turn(name, parent=parent), now=T0, key=a_key(name))
        await store.end_turn(ended(a_turn(name, parent=parent)), runs=said("Hi"), now=T0)
    added = [
        msgspec.structs.replace(an_added_turn(name, parent=parent), session_id="s")
        for name, parent in (("d", "c"), ("e", "d"))
    ]
    await store.add_turns(added, now=T0, key=a_key("added"))
    await store.delete_turns("s", "e", now=at(1))
    assert await _made(store, a_key("added")) == ("s", "e", True)
    await store.delete_turns("s", "b", now=at(1))
    for seconds in (10, 10 + KEY_KEPT_S - 1):
        await _forget(store, seconds=seconds)
        assert [await _made(store, a_key(name)) for name in ("b", "c")] == [("s", "b", True), ("s", "c", True)]
    await _forget(store, seconds=10 + KEY_KEPT_S)
    assert [await _made(store, a_key(name)) for name in ("b", "c", "added")] == [None] * 3
    assert await _made(store, a_key("a")) == ("s", "a", False)
    assert await _made(store, a_key("session")) == ("s", None, False)


async def test_a_forgotten_key_makes_something_anew(store: Store) -> None:
    await _begin_with_session(store, a_key())
    await _delete(store, "made")
    await _forget(store, seconds=1)
    await _forget(store, seconds=1 + KEY_KEPT_S)
    await _begin_with_session(store, a_key())
    assert await _made(store) == ("made", "turn", False)


@pytest.mark.usefixtures("_in_many_steps")
async def test_keys_are_forgotten_in_steps_of_a_bounded_size(store: Store) -> None:
    await store.create_session(a_session("s", idle_timeout_s=10 * KEY_KEPT_S), now=T0, key=a_key("0"))
    for n in range(1, 6):
        await store.begin_turn(a_turn(f"t{n}", parent=f"t{n - 1}" if n > 1 else None), now=T0, key=a_key(f"{n}"))
    await _delete(store, "s")
    if isinstance(store, SqliteStore):
        while await store._writing.call(reclaim.reclaim_some):
            pass
    noted = [await store.forget_keys(now=at(10), limit=2) for _ in range(4)]
    assert noted == [True, True, True, False]
    forgotten = [await store.forget_keys(now=at(10 + KEY_KEPT_S), limit=4) for _ in range(2)]
    assert forgotten == [True, False]
    assert [await _made(store, a_key(f"{n}")) for n in range(6)] == [None] * 6


# Several owners


async def test_a_key_outlives_its_owner_and_counts_for_every_owner(open_shared: OpenStore) -> None:
    async with open_shared() as first, open_shared() as second:
        await _prepare(first)
        await _begin(first, a_key())
        with pytest.raises(RepeatedError):
            await _begin(second, a_key())  # the key comes before the owner of the session's open turns
        assert await _made(second) == ("source", "turn", False)
    async with open_shared() as third:
        assert await _made(third) == ("source", "turn", False)
        await third.recover(now=at(1))
        assert await _made(third) == ("source", "turn", False)


async def test_of_several_steps_with_one_key_one_is_done(open_shared: OpenStore) -> None:
    async with open_shared() as first, open_shared() as second:
        refused: list[str] = []

        async def begin(store: Store, name: str) -> None:
            try:
                await store.begin_turn(a_turn(f"turn-{name}", name), now=T0, creates=a_session(name), key=a_key())
            except RepeatedError:
                refused.append(name)

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(begin, first, f"a{n}")
                nursery.start_soon(begin, second, f"b{n}")
        assert len(refused) == 39
        assert await first.count_sessions(status=None, now=T0) == 1


@each_step
async def test_of_equal_steps_at_once_one_is_done_and_the_others_are_told_of_it(
    open_shared: OpenStore, step: str
) -> None:
    call, made = STEPS[step]
    async with open_shared() as first, open_shared() as second:
        await _prepare(first)
        refused: list[RepeatedError] = []

        async def run(store: Store) -> None:
            try:
                await call(store, a_key())
            except RepeatedError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(run, first)
                nursery.start_soon(run, second)
        assert [(it.session_id, it.turn_id, it.is_gone) for it in refused] == [made] * 19


async def test_several_owners_may_forget_keys_at_once(open_shared: OpenStore) -> None:
    async with open_shared() as first, open_shared() as second:
        await _create(first, a_key())
        await _delete(first, "made")
        for seconds in (0, KEY_KEPT_S - 1, KEY_KEPT_S):
            assert await _made(second) == ("made", None, True)
            async with trio.open_nursery() as nursery:
                for owner in (first, second):
                    nursery.start_soon(partial(_forget, owner, seconds=seconds))
        assert await _made(first) is None


# A fault


@pytest.fixture
def _broken_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_KEEP", "INSERT INTO no_such_table VALUES (?, ?, ?, ?, ?, ?, ?)")
    values = ", ".join(["%s"] * 7)
    monkeypatch.setattr(postgres_idempotency, "_KEEP", f"INSERT INTO {{s}}.no_such_table VALUES ({values})")


@pytest.mark.usefixtures("_broken_keep")
@each_step
async def test_a_key_that_cannot_be_kept_takes_what_was_made_with_it(open_shared: OpenStore, step: str) -> None:
    async with open_shared() as store:
        await _prepare(store)
        before = await contents(store, now=T0)
        with pytest.raises(StoreError):
            await STEPS[step][0](store, a_key())
        assert await contents(store, now=T0) == before
        assert await _made(store) is None


async def test_the_key_of_a_turn_that_was_deleted_says_that_it_is_gone(store: Store) -> None:
    await _prepare(store)
    await _begin(store, a_key())
    await store.end_turn(ended(a_turn("turn", "source", parent="told")), runs=said("H", "i"), now=T0)
    assert await _made(store) == ("source", "turn", False)
    await store.delete_turns("source", "told", now=T0)
    assert await _made(store) == ("source", "turn", True)
