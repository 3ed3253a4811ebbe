"""Stores that outlive their owner and have several: the owner of each turn, and the owner that ends it."""

import msgspec
import pytest
import trio

from service.errors import HeadMovedError, OwnedElsewhereError, PreconditionFailedError, TurnInProgressError
from service.models.client import Usage
from service.storage import rules
from service.storage.records import SEQ_AFTER_CRASH, Checkpoint, EndResult, Item, LeftOut, SessionPatch
from service.storage.sqlite import SqliteStore
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, at, contents, ended, said, told


def a_checkpoint(turn: str, *texts: str, after: int = 0, session: str = "s", item: int = 0) -> Checkpoint:
    """Pieces of the message, which begins with them if they are the first events."""
    message = Item(id=f"{turn}-out", role="assistant", text="")
    return Checkpoint(
        session_id=session,
        turn_id=turn,
        after=after,
        runs=said(*texts, item=item),
        text="".join(texts),
        items=() if after else (message,),
    )


async def _begin(store: Store, *turns: str, session: str = "s") -> None:
    await store.create_session(a_session(session), now=T0)
    for turn in turns:
        await store.begin_turn(a_turn(turn, session), now=T0)


async def test_everything_is_there_for_the_next_owner(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await _begin(store, "t", "t2")
        await store.end_turn(ended(a_turn()), runs=said("H", "i"), now=T0)
        await store.end_turn(ended(a_turn("t2")), runs=said("Hi"), now=T0)
        await store.create_session(a_session("other"), now=T0)
        before = await contents(store, now=T0)
    async with open_shared() as store:
        assert await store.recover(now=at(1)) == 0
        assert await contents(store, now=T0) == before


async def test_all_owners_know_the_secret_of_their_store_and_no_other_store_has_it(
    open_shared: OpenStore, open_store: OpenStore
) -> None:
    async with open_shared() as store, open_shared() as beside, open_store() as other:
        secret = store.peer_secret
        assert len(secret) == 32
        assert beside.peer_secret == secret != other.peer_secret
    async with open_shared() as store:
        assert store.peer_secret == secret


async def test_a_crashed_turn_is_interrupted_with_the_output_and_events_of_its_last_checkpoint(
    open_shared: OpenStore,
) -> None:
    async with open_shared() as store:
        await _begin(store, "t")
        reasoning = Item(id="r", type="reasoning", role="assistant", text="hm")
        first = msgspec.structs.replace(
            a_checkpoint("t", "h", "m"), items=(msgspec.structs.replace(reasoning, text=""),)
        )
        await store.checkpoint_turns([first])
        second = a_checkpoint("t", "Hel", after=2, item=1)
        message = Item(id="t-out", role="assistant", text="")
        await store.checkpoint_turns([msgspec.structs.replace(second, items=(message,))])
        await store.checkpoint_turns([a_checkpoint("t", "l", "o", after=3, item=1)])
    async with open_shared() as store:
        assert (await store.get_turn("s", "t", now=T0)).state == "running"
        assert await store.recover(now=at(7)) == 1
        turn = await store.get_turn("s", "t", now=at(7))
        assert turn == msgspec.structs.replace(
            a_turn(),
            state="interrupted",
            reason="crash",
            ended_at=at(7),
            last_seq=SEQ_AFTER_CRASH,
            output=(reasoning, Item(id="t-out", role="assistant", text="Hello")),
        )
        assert await told(store, "s", "t") == ["h", "m", "Hel", "l", "o"]
        session = await store.get_session("s", now=at(7))
        assert session == msgspec.structs.replace(
            a_session(),
            head="t",
            message_count=2,
            last_accessed_at=at(7),
            expires_at=at(7 + IDLE_TIMEOUT_S),
        )
        assert await store.recover(now=at(8)) == 0
        assert await store.delete_expired(now=at(6 + IDLE_TIMEOUT_S), limit=10) == 0
        # The session goes on.
        assert (await store.begin_turn(a_turn("next", parent="t"), now=at(9))).session.open_turns == 1


async def test_usage_of_a_crashed_turn_is_that_of_its_last_checkpoint_and_counts_once(open_shared: OpenStore) -> None:
    usages = [
        None,
        Usage(input_tokens=9, output_tokens=1),
        Usage(input_tokens=9, output_tokens=2, cached_tokens=5),
        None,
    ]
    async with open_shared() as store:
        await _begin(store, "t", "t2")
        for usage in usages:
            await store.checkpoint_turns([msgspec.structs.replace(a_checkpoint("t", "Hel"), usage=usage)])
        assert (await store.get_session("s", now=T0)).input_tokens == 0, "an open turn counts at its end"
    async with open_shared() as store:
        assert await store.recover(now=at(1)) == 2
        assert (await store.get_turn("s", "t", now=at(1))).usage == usages[2]
        assert (await store.get_turn("s", "t2", now=at(1))).usage is None
        session = await store.get_session("s", now=at(1))
        counted = (session.input_tokens, session.output_tokens, session.reasoning_tokens, session.cached_tokens)
        assert counted == (9, 2, 0, 5)


async def test_left_out_of_a_crashed_turn_is_that_of_its_last_checkpoint(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await _begin(store, "t")
        for left_out in (None, LeftOut(1, 2), LeftOut(3, 4)):
            checkpoint = msgspec.structs.replace(a_checkpoint("t", "Hel"), left_out=left_out)
            await store.checkpoint_turns([checkpoint])
    async with open_shared() as store:
        await store.recover(now=at(1))
        assert (await store.get_turn("s", "t", now=at(1))).left_out == LeftOut(3, 4)
        assert await store.measure_path("s", "t") == LeftOut(2, 8)


async def test_a_crashed_turn_without_a_checkpoint_is_interrupted_and_empty(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await _begin(store, "t")
        await store.begin_turn(a_turn("t2", state="queued"), now=T0)
    async with open_shared() as store:
        assert await store.recover(now=at(1)) == 2
        for name in ("t", "t2"):
            turn = await store.get_turn("s", name, now=at(1))
            assert (turn.state, turn.text, turn.last_seq) == ("interrupted", "", SEQ_AFTER_CRASH)
            assert await told(store, "s", name) == []
        assert (await store.get_session("s", now=at(1))).message_count == 2


async def test_recovery_leaves_the_turns_of_owners_that_live(open_shared: OpenStore) -> None:
    async with open_shared() as first, open_shared() as second:
        async with open_shared() as third:
            for n, store in enumerate((first, second, third)):
                await _begin(store, f"t{n}", session=f"s{n}")
        for store in (first, second):
            await store.recover(now=at(1))
            assert [(await store.get_turn(f"s{n}", f"t{n}", now=at(1))).state for n in range(3)] == [
                "running",
                "running",
                "interrupted",
            ]
        assert await second.end_turn(ended(a_turn("t1", "s1")), runs=(), now=at(1)) is EndResult.KEPT


async def test_of_many_that_recover_at_once_each_turn_is_ended_by_one(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        for n in range(30):
            await _begin(store, f"t{n}", session=f"s{n}")
    recovered: list[int] = []

    async def recover() -> None:
        async with open_shared() as store:
            recovered.append(await store.recover(now=at(1)))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(recover)
    assert sum(recovered) == 30
    async with open_shared() as store:
        for n in range(30):
            assert (await store.get_session(f"s{n}", now=at(1))).open_turns == 0


async def test_recovery_finishes_the_deletions_of_owners_that_are_gone(open_shared: OpenStore) -> None:
    async with open_shared() as living:
        await _begin(living, "t")
        await living.mark_deleted("s", now=T0)
        async with open_shared() as dying:
            await _begin(dying, "t2", session="s2")
            await dying.mark_deleted("s2", now=T0)
        assert await living.recover(now=at(1)) == 1
        assert [turn.id for turn in await living.read_path("s", "t", bytes_max=None)] == ["t"]
        assert list(await living.read_path("s2", "t2", bytes_max=None)) == []
        await living.create_session(a_session("s2"), now=at(1))


async def test_a_change_by_another_owner_makes_a_revision_old(open_shared: OpenStore) -> None:
    async with open_shared() as there, open_shared() as here:
        await there.create_session(a_session(), now=T0)
        seen = [rules.revision_of(await here.get_session("s", now=T0))]
        patched = await there.update_session("s", SessionPatch(title="new"), now=T0, revisions=seen)
        with pytest.raises(PreconditionFailedError) as refused:
            await here.update_session("s", SessionPatch(title="newer"), now=T0, revisions=seen)
        assert refused.value.revision == rules.revision_of(patched)
        with pytest.raises(PreconditionFailedError):
            await here.mark_deleted("s", now=T0, revisions=seen)
        assert await here.get_session("s", now=T0) == patched


async def test_a_deletion_is_its_owners_alone(open_shared: OpenStore) -> None:
    async with open_shared() as there, open_shared() as here:
        await there.create_session(a_session(), now=T0)
        await there.mark_deleted("s", now=T0)
        assert (await there.is_marked("s"), await here.is_marked("s")) == (True, False)


async def test_a_session_whose_turns_run_elsewhere_takes_no_turn_here(open_shared: OpenStore) -> None:
    async with open_shared() as there, open_shared() as here:
        await _begin(there, "t")
        before = await contents(here, now=T0)
        with pytest.raises(OwnedElsewhereError) as refused:
            await here.begin_turn(a_turn("t2"), now=at(1))
        owner = await here.find_owner("s")
        assert owner is not None
        assert (owner.fence, owner.address) == (refused.value.fence, refused.value.address)
        assert await there.find_owner("s") is None
        assert await contents(here, now=T0) == before
        # Once the turns have ended, any owner may go on.
        await there.end_turn(ended(a_turn()), runs=(), now=at(1))
        assert await here.find_owner("s") is None
        await here.begin_turn(a_turn("t2"), now=at(1))
        with pytest.raises(OwnedElsewhereError):
            await there.begin_turn(a_turn("t3"), now=at(1))


async def test_a_turn_begins_in_a_session_whose_owner_died_and_ends_the_turns_it_left(open_shared: OpenStore) -> None:
    async with open_shared() as here:
        async with open_shared() as dying:
            await _begin(dying, "t")
            await dying.checkpoint_turns([a_checkpoint("t", "Hel")])
            await _begin(dying, "t2", session="s2")
        begun = await here.begin_turn(a_turn("next", parent="t"), now=at(1), path_bytes_max=None)
        assert (begun.session.open_turns, begun.session.message_count) == (1, 3)
        assert [(turn.id, turn.state, turn.text) for turn in begun.path or ()] == [
            ("t", "interrupted", "Hel"),
            ("next", "running", ""),
        ], "the path is the one after the recovery"
        turn = await here.get_turn("s", "t", now=at(1))
        assert (turn.state, turn.reason, turn.text) == ("interrupted", "crash", "Hel")
        assert await here.recover(now=at(2)) == 1, "that of the other session"


async def test_a_stale_head_ends_no_turn_of_an_owner_that_is_gone(open_shared: OpenStore) -> None:
    new = a_turn("new", parent="t")
    async with open_shared() as here:
        async with open_shared() as there:
            await _begin(there, "t")
            with pytest.raises(OwnedElsewhereError):
                await here.begin_turn(new, now=at(1), head="stale")
        before = await contents(here, now=at(1))
        with pytest.raises(HeadMovedError):
            await here.begin_turn(new, now=at(1), head="stale")
        assert await contents(here, now=at(1)) == before
        assert (await here.begin_turn(new, now=at(1), head="t")).session.open_turns == 1
        assert (await here.get_turn("s", "t", now=at(1))).state == "interrupted"


async def test_only_the_owner_starts_checkpoints_and_ends_its_turns(open_shared: OpenStore) -> None:
    async with open_shared() as here, open_shared() as there:
        await _begin(there, "t")
        await there.begin_turn(a_turn("queued", state="queued"), now=T0)
        before = await contents(there, now=T0)
        assert not await here.start_turn("queued", now=at(1))
        lost = await here.checkpoint_turns([a_checkpoint("t", "Hel"), a_checkpoint("queued", "x")])
        assert set(lost) == {"t", "queued"}
        assert await here.end_turn(ended(a_turn()), runs=said("Hi"), now=at(1)) is EndResult.LOST
        assert await contents(here, now=T0) == before


async def test_an_owner_that_was_taken_for_dead_cannot_end_its_turn_again(open_shared: OpenStore) -> None:
    async with open_shared() as zombie:
        await _begin(zombie, "t")
        await take_for_dead(zombie)
        async with open_shared() as store:
            assert await store.recover(now=at(1)) == 1
            before = await contents(store, now=at(1))
            assert await zombie.end_turn(ended(a_turn()), runs=said("Hi"), now=at(2)) is EndResult.LOST
            assert set(await zombie.checkpoint_turns([a_checkpoint("t", "Hel")])) == {"t"}
            assert not await zombie.start_turn("t", now=at(2))
            assert await contents(store, now=at(1)) == before


async def take_for_dead(store: Store) -> None:
    """Do to a store, without its knowledge, what makes other owners take it for dead."""
    if isinstance(store, SqliteStore):
        store._ownership.close()  # only the lock counts for other owners
    else:
        await store._write(store.ownership.leave)  # type: ignore[attr-defined]


async def test_of_several_owners_that_sweep_at_once_each_expired_session_is_removed_by_one(
    open_shared: OpenStore,
) -> None:
    late = at(IDLE_TIMEOUT_S)
    removed: list[int] = []

    async def sweep(store: Store) -> None:
        while batch := await store.delete_expired(now=late, limit=3):
            removed.append(batch)

    async with open_shared() as store:
        async with open_shared() as oldest:
            for n in range(20):
                await oldest.create_session(a_session(f"s{n}"), now=T0)
            async with trio.open_nursery() as nursery:
                for owner in (oldest, store):
                    nursery.start_soon(sweep, owner)
            assert sum(removed) == 20
            assert await contents(store, now=T0) == {}
            await oldest.create_session(a_session("left"), now=T0)
        assert await store.delete_expired(now=late, limit=10) == 1, "the others are gone"


# Checkpoints, on every store


@pytest.mark.parametrize("after", [0, 2, 3])
async def test_an_end_follows_on_the_checkpoints_that_were_acknowledged(store: Store, after: int) -> None:
    await _begin(store, "t")
    await store.checkpoint_turns([a_checkpoint("t", "He", "l")])
    await store.checkpoint_turns([a_checkpoint("t", "lo", after=2)])
    assert (await store.get_turn("s", "t", now=T0)).output == (), "before the end it shows nothing"
    texts = ["He", "l", "lo", ", ", "you"]
    end = ended(a_turn(), text="".join(texts))
    assert await store.end_turn(end, runs=said(*texts), now=T0, after=after) is EndResult.KEPT
    assert await told(store, "s", "t") == texts
    assert (await store.get_turn("s", "t", now=T0)).text == "Hello, you"


async def test_a_checkpoint_that_is_given_again_replaces_what_is_beyond_it(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await _begin(store, "t")
        await store.checkpoint_turns([a_checkpoint("t", "He")])
        await store.checkpoint_turns([a_checkpoint("t", "l", after=1)])  # the answer to this call is lost
        await store.checkpoint_turns([a_checkpoint("t", "ll", "o", after=1)])
    async with open_shared() as store:
        await store.recover(now=T0)
        assert (await store.get_turn("s", "t", now=T0)).text == "Hello"
        assert await told(store, "s", "t") == ["He", "ll", "o"]


async def test_checkpoints_pass_over_turns_that_are_not_open(store: Store) -> None:
    await _begin(store, "t", "t2")
    await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0)
    before = await contents(store, now=T0)
    lost = await store.checkpoint_turns([a_checkpoint("t", "x", after=1), a_checkpoint("never", "x")])
    assert set(lost) == {"t", "never"}
    assert await contents(store, now=T0) == before
    lost = await store.checkpoint_turns([a_checkpoint("never", "x"), a_checkpoint("t2", "x")])
    assert set(lost) == {"never"}
    await store.end_turn(ended(a_turn("t2")), runs=said("H", "i"), now=T0, after=1)
    assert await told(store, "s", "t2") == ["H", "i"]


async def test_a_checkpoint_is_no_use_of_the_session(store: Store) -> None:
    await _begin(store, "t")
    before = await store.get_session("s", now=T0)
    await store.checkpoint_turns([a_checkpoint("t", "x")])
    assert await store.get_session("s", now=T0) == before


async def test_a_marked_session_s_turns_are_checkpointed_until_it_is_removed(store: Store) -> None:
    await _begin(store, "t")
    await store.mark_deleted("s", now=T0)
    await store.checkpoint_turns([a_checkpoint("t", "x")])
    assert await store.end_turn(ended(a_turn()), runs=said("H", "i"), now=T0, after=1) is EndResult.KEPT
    assert await told(store, "s", "t") == ["H", "i"]
    await store.remove_deleted("s")
    await store.checkpoint_turns([a_checkpoint("t", "x")])
    assert await told(store, "s", "t") == []


async def test_without_other_owners_there_is_none_to_find(store: Store) -> None:
    assert await store.find_owner("never") is None
    await _begin(store, "t")
    assert await store.find_owner("s") is None


async def test_any_owner_forks_ended_turns_and_learns_the_owner_of_the_others(open_shared: OpenStore) -> None:
    async with open_shared() as first, open_shared() as second:
        await _begin(first, "t")
        assert await first.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.KEPT
        await first.begin_turn(a_turn("open", parent="t"), now=T0)
        assert (await second.fork_session("s", at="t", copy_id="copy", now=T0)).message_count == 2
        with pytest.raises(OwnedElsewhereError):
            await second.fork_session("s", at=None, copy_id="other", now=T0)
        with pytest.raises(TurnInProgressError):
            await first.fork_session("s", at=None, copy_id="other", now=T0)
        assert await second.find_owner("copy") is None
        await second.begin_turn(a_turn("next", "copy"), now=T0)
    async with open_shared() as store:
        assert await store.recover(now=T0) == 2
        assert (await store.fork_session("s", at=None, copy_id="other", now=T0)).message_count == 3
