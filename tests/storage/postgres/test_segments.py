"""Checkpoints in PostgreSQL: a row for each call, which is there as long as a turn that may need it is open."""

from collections.abc import Sequence

import msgspec
import pytest
import trio

from service.models.client import Usage
from service.storage.postgres import PostgresStore, recovery, segments
from service.storage.records import Checkpoint, EndResult, Item
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.postgres.conftest import Run
from tests.storage.rows import T0, a_session, a_turn, at, ended, said, told
from tests.storage.test_store_ephemeral import ephemeral
from tests.storage.test_store_owners import a_checkpoint

COUNT = "SELECT count(*) FROM {s}.segments"


async def begin(store: Store, *turns: str) -> None:
    """Begin turns, each in a session of its own with its name."""
    for name in turns:
        await store.create_session(a_session(name), now=T0)
        await store.begin_turn(a_turn(name, name), now=T0)


def growth(*turns: str, text: str = "Hel", after: int = 0) -> Sequence[Checkpoint]:
    return [a_checkpoint(name, text, session=name, after=after) for name in turns]


async def end(store: Store, name: str, text: str = "Hi") -> EndResult:
    return await store.end_turn(ended(a_turn(name, name), text=text), runs=said(text), now=T0)


async def test_a_call_with_many_turns_writes_one_row_that_is_little_larger_than_their_texts(
    store: PostgresStore, select: Run
) -> None:
    names = [f"t{n}" for n in range(40)]
    await begin(store, *names)
    texts = ["four"] * 20
    for number in range(3):
        checkpoints = [
            msgspec.structs.replace(a_checkpoint(name, *texts, session=name, after=20 * number), items=())
            for name in names
        ]
        assert await store.checkpoint_turns(checkpoints) == []
    assert select("SELECT cardinality(turns), octet_length(body) < 40 * 116 FROM {s}.segments") == [(40, True)] * 3


async def test_a_segment_is_removed_when_the_turns_have_ended_that_were_open_before_it(
    store: PostgresStore, select: Run
) -> None:
    await begin(store, "a", "b")
    await store.checkpoint_turns(growth("a", "b"))
    await end(store, "a")
    assert select(COUNT) == [(1,)], "b may need it"
    await begin(store, "c")
    await store.checkpoint_turns([*growth("b", text="lo", after=1), *growth("c")])
    await end(store, "b")
    assert select(COUNT) == [(1,)], "the older one is nobody's any more"
    assert await told(store, "c", "c") == ["Hel"]
    await end(store, "c")
    assert select(COUNT) == [(0,)]


async def test_a_checkpoint_removes_old_segments_as_well(store: PostgresStore, select: Run) -> None:
    await begin(store, "a", "b")
    await store.checkpoint_turns(growth("a"))
    await store.mark_deleted("a", now=T0)
    await store.remove_deleted("a")  # with the turn, which was open
    await begin(store, "c")
    await end(store, "b")
    await store.checkpoint_turns(growth("c"))
    assert select("SELECT turns = (SELECT array_agg(key) FROM {s}.turns WHERE id = 'c') FROM {s}.segments") == [(True,)]


async def test_nothing_of_a_removed_session_is_left_when_its_turns_have_ended(
    store: PostgresStore, select: Run
) -> None:
    await begin(store, "a")
    await store.checkpoint_turns(growth("a"))
    await store.mark_deleted("a", now=T0)
    await store.remove_deleted("a")
    assert await end(store, "a") is EndResult.LOST
    assert select(COUNT) == [(0,)]


async def test_a_turn_that_waits_keeps_no_segments_of_others_from_being_removed(
    store: PostgresStore, select: Run
) -> None:
    await begin(store, "a")
    await begin(store, "b")
    await store.begin_turn(a_turn("waits", "a", state="queued"), now=T0)
    await store.checkpoint_turns(growth("a", "b"))
    await end(store, "b")
    await begin(store, "c")
    await end(store, "a")
    await store.checkpoint_turns(growth("c"))
    assert select(COUNT) == [(1,)], "while it waits, too"
    await end(store, "c")
    assert select(COUNT) == [(0,)]
    await store.start_turn("waits", now=T0)
    await store.checkpoint_turns([a_checkpoint("waits", "Hi", session="a")])
    assert select(COUNT) == [(1,)]
    assert await told(store, "a", "waits") == ["Hi"]


async def test_another_owner_reads_what_a_turn_has_kept_page_by_page(
    store: PostgresStore, open_another: OpenStore
) -> None:
    await begin(store, "a", "b")
    pieces = [f"{number:03d}" for number in range(90)]
    for after in range(0, 90, 9):
        checkpoint = a_checkpoint("a", *pieces[after : after + 9], session="a", after=after)
        await store.checkpoint_turns([*growth("b", text=str(after), after=after), checkpoint])
    async with open_another() as another:
        for length_max in (1, 27, 40, 100_000):
            assert await told(another, "a", "a", length_max=length_max) == pieces
        page = await another.read_events("a", "a", after=30)
        assert (page.kept, page.ended, page.text[:6]) == (90, False, "030031")
        assert (await another.read_events("a", "a", after=90)).runs == ()


async def test_what_a_later_checkpoint_replaces_is_never_read(store: PostgresStore, open_another: OpenStore) -> None:
    await begin(store, "a")
    for after, texts in [(0, "abc"), (3, "de"), (3, "fgh"), (6, "i"), (6, ""), (6, "jk")]:
        await store.checkpoint_turns([a_checkpoint("a", *texts, session="a", after=after)])
    for after in range(9):
        page = await store.read_events("a", "a", after=after)
        assert (page.text, page.kept) == ("abcfghjk"[after:], 8)
    await store.aclose()
    async with open_another() as another:
        assert await another.recover(now=at(1)) == 1
        assert (await another.get_turn("a", "a", now=at(1))).text == "abcfghjk"
        assert await told(another, "a", "a") == list("abcfghjk")


async def test_growth_that_is_too_much_for_one_row_is_in_several(
    store: PostgresStore, open_another: OpenStore, select: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "BODY_BYTES_MAX", 1000)
    await begin(store, "a", "b", "c")
    lost = await store.checkpoint_turns(
        [
            *growth("a", "b", text="x" * 700),
            *growth("never", "c", text="é" * 3000),
            *growth("a", text="y", after=1),
        ]
    )
    assert list(lost) == ["never"]
    assert select("SELECT cardinality(turns) FROM {s}.segments ORDER BY seq") == [(1,), (1,), (1,), (1,)]
    await store.aclose()
    async with open_another() as another:
        assert await another.recover(now=at(1)) == 3
        texts = [(await another.get_turn(name, name, now=at(1))).text for name in "abc"]
        assert texts == ["x" * 700 + "y", "x" * 700, "é" * 3000]
        assert select(COUNT) == [(0,)]


async def test_a_turn_that_comes_twice_in_a_call_is_in_two_rows(
    store: PostgresStore, open_another: OpenStore, select: Run
) -> None:
    await begin(store, "a", "b")
    await store.checkpoint_turns([*growth("a", "b"), *growth("a", text="lo", after=1)])
    assert select("SELECT cardinality(turns) FROM {s}.segments ORDER BY seq") == [(2,), (1,)]
    async with open_another() as another:
        assert await told(another, "a", "a") == ["Hel", "lo"]


async def test_many_turns_of_a_dead_owner_are_ended_once_by_several_in_steps_and_nothing_of_it_is_left(
    store: PostgresStore, open_another: OpenStore, select: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_TURNS_MAX", 7)
    names = [f"t{n}" for n in range(40)]
    await begin(store, *names)
    for name in names[:20]:
        await store.begin_turn(ephemeral(f"e-{name}", name, parent=name), now=T0)
    usage = Usage(input_tokens=3, output_tokens=1)
    for after in (0, 1):
        checkpoints = growth(*names, text="Hel" if not after else "lo", after=after)
        await store.checkpoint_turns([msgspec.structs.replace(it, usage=usage) for it in checkpoints])
    await store.mark_deleted("t39", now=T0)
    await store.aclose()
    recovered: list[int] = []

    async def recover() -> None:
        async with open_another() as another:
            recovered.append(await another.recover(now=at(1)))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(recover)
    assert sum(recovered) == 60
    assert select("SELECT count(*), count(*) FILTER (WHERE state = 'interrupted') FROM {s}.turns") == [(39, 39)]
    assert select("SELECT count(*) FROM {s}.sessions WHERE open_turns > 0 OR input_tokens <> 3") == [(0,)]
    assert select(COUNT) == [(0,)]
    async with open_another() as another:
        assert await another.recover(now=at(2)) == 0
        assert (await another.get_turn("t7", "t7", now=at(2))).text == "Hello"
        assert await told(another, "t7", "t7") == ["Hel", "lo"]
        assert select("SELECT count(*) FROM {s}.owners") == [(1,)]


async def test_a_step_of_a_recovery_ends_few_turns_with_long_texts(
    store: PostgresStore, open_another: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_BYTES_MAX", 2500)
    await begin(store, *"abcde")
    await store.checkpoint_turns(growth(*"abcde", text="x" * 1000))
    await store.aclose()
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    async with open_another() as another:
        assert await another.recover(now=at(1), after_step=count) == 5
    assert steps == 3 + 2, "two, two and one; then the owner's rows; then nothing"


async def test_a_recovered_turn_that_is_too_long_for_its_row_has_pages(
    store: PostgresStore, open_another: OpenStore, select: Run
) -> None:
    await begin(store, "a")
    pieces = [f"{number:06d}" for number in range(30_000)]
    reasoning = Item(id="r", type="reasoning", role="assistant", text="", encrypted="gAAA")
    for after in (0, 10_000, 20_000):
        checkpoint = a_checkpoint("a", *pieces[after : after + 10_000], session="a", after=after)
        if not after:
            checkpoint = msgspec.structs.replace(checkpoint, items=(*checkpoint.items, reasoning))
        await store.checkpoint_turns([checkpoint])
    await store.aclose()
    async with open_another() as another:
        await another.recover(now=at(1))
        turn = await another.get_turn("a", "a", now=at(1))
        assert turn.output == (
            Item(id="a-out", role="assistant", text="".join(pieces)),
            msgspec.structs.replace(reasoning),
        )
        assert await told(another, "a", "a") == pieces
        page = await another.read_events("a", "a", after=29_999)
        assert (page.kept, page.ended, page.text_length) == (30_000, True, 180_000)
    assert select("SELECT runs IS NULL, (SELECT count(*) >= 3 FROM {s}.event_pages) FROM {s}.turns") == [(True, True)]
