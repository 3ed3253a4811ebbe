"""Deletions of turns and items: what every store forgets with them, and when it refuses them."""

from functools import partial

import msgspec
import pytest
import trio

from service.errors import (
    ItemNotFoundError,
    OwnedElsewhereError,
    RepeatedError,
    SessionNotFoundError,
    StoreError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.models.client import NO_OPTIONS, FunctionTool, Options, Tools, Usage
from service.storage.pieces import CALL, STARTED, Run
from service.storage.records import IdempotencyKey, Item, LeftOut, SessionPatch, Siblings, TurnRecord
from service.storage.rules import revision_of
from service.storage.sqlite import deletions, tree_changes, writer
from service.storage.sqlite import turns as sqlite_turns
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import T0, Contents, a_session, a_turn, all_turns, at, contents, ended, said, told
from tests.storage.test_store_added_turns import an_added_turn


@pytest.fixture(autouse=True)
def _rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deleted is gone for readers before its rows are reclaimed."""
    monkeypatch.setattr(writer, "reclaim_some", lambda _: False)
    monkeypatch.setattr(deletions, "RECLAIM_S", 0)


async def a_tree(store: Store) -> None:
    """A session with the turns a → b → c, and b2 and b3 beside b; c follows b, d follows b2."""
    await store.create_session(a_session(), now=T0)
    parents = {"a": None, "b": "a", "b2": "a", "b3": "a", "c": "b", "d": "b2"}
    for name, parent in parents.items():
        turn = a_turn(name, parent=parent, texts=[f"question {name}"])
        await store.begin_turn(turn, now=T0)
        end = ended(turn, text=f"answer {name}", usage=Usage(input_tokens=1, output_tokens=2))
        await store.end_turn(end, runs=(Run(STARTED), *said(f"answer {name}")), now=T0)


async def names(store: Store, session_id: str = "s") -> list[str]:
    return [turn.id for turn in await all_turns(store, session_id, now=T0)]


async def places(store: Store, *turn_ids: str) -> dict[str, tuple[int, int]]:
    found = await store.find_places("s", turn_ids)
    return {name: (it.place, it.count) for name, it in found.siblings.items()}


async def found_by(store: Store, query: str) -> list[str | None]:
    """The turns that a search finds."""
    page = await store.search_sessions(query, limit=10, after=None, status=None, metadata={}, now=T0)
    return [match.turn_id for match in page.data]


# Turns


async def test_a_deletion_takes_a_turn_and_all_that_follows_it(store: Store) -> None:
    await a_tree(store)
    before = await store.get_session("s", now=T0)
    await store.delete_turns("s", "b", now=at(9))
    assert await names(store) == ["a", "b2", "b3", "d"]
    session = await store.get_session("s", now=T0)
    assert session == msgspec.structs.replace(before, message_count=8)
    assert (session.input_tokens, session.output_tokens) == (6, 12), "they were paid for"
    for name in ("b", "c"):
        with pytest.raises(TurnNotFoundError):
            await store.get_turn("s", name, now=T0)
        assert await told(store, "s", name) == []
        assert await store.find_session_of(name) is None
        assert list(await store.read_path("s", name, bytes_max=None)) == []
        assert await store.measure_path("s", name) == LeftOut()
        with pytest.raises(TurnNotFoundError):
            await store.begin_turn(a_turn("new", parent=name), now=T0)
    with pytest.raises(TurnNotFoundError):
        await store.delete_turns("s", "b", now=T0)


async def test_the_head_falls_to_the_parent_of_the_deleted_turn(store: Store) -> None:
    await a_tree(store)
    assert (await store.get_session("s", now=T0)).head == "d"
    await store.delete_turns("s", "c", now=T0)
    assert (await store.get_session("s", now=T0)).head == "d", "the head was not deleted"
    await store.delete_turns("s", "b2", now=T0)
    assert (await store.get_session("s", now=T0)).head == "a"
    await store.delete_turns("s", "a", now=T0)
    session = await store.get_session("s", now=T0)
    assert (session.head, session.message_count) == (None, 0)
    assert await names(store) == []
    begun = await store.begin_turn(a_turn("new"), now=T0, head=None, path_bytes_max=None)
    assert [turn.id for turn in begun.path or ()] == ["new"]
    assert begun.siblings == Siblings(1, 1)


async def test_the_siblings_of_a_deleted_turn_move_up(store: Store) -> None:
    await a_tree(store)
    assert await places(store, "b", "b2", "b3") == {"b": (1, 3), "b2": (2, 3), "b3": (3, 3)}
    await store.delete_turns("s", "b2", now=T0)
    assert await places(store, "b", "b2", "b3", "c") == {"b": (1, 2), "b3": (2, 2), "c": (1, 1)}
    begun = await store.begin_turn(a_turn("b4", parent="a"), now=T0)
    assert begun.siblings == Siblings(3, 3)
    await store.delete_turns("s", "b", now=T0)
    assert await places(store, "b3", "b4", "a") == {"b3": (1, 2), "b4": (2, 2), "a": (1, 1)}
    await store.delete_turns("s", "b3", now=T0)
    assert await places(store, "b4") == {"b4": (1, 1)}
    page = await store.list_turns("s", limit=5, after=None, now=T0, parent="a")
    assert [turn.id for turn in page.data] == ["b4"]


async def test_pages_go_on_when_turns_around_them_are_deleted(store: Store) -> None:
    await a_tree(store)
    first = await store.list_turns("s", limit=2, after=None, now=T0)
    tree = await store.list_tree("s", limit=2, after=None, now=T0)
    assert [turn.id for turn in first.data] == ["a", "b"]
    await store.delete_turns("s", "b", now=T0)
    rest = await store.list_turns("s", limit=9, after=first.next, now=T0)
    assert [turn.id for turn in rest.data] == ["b2", "b3", "d"]
    nodes = await store.list_tree("s", limit=9, after=tree.next, now=T0)
    assert [node.id for node in nodes.data] == ["b2", "b3", "d"]
    await store.begin_turn(a_turn("new", parent="d"), now=T0)
    assert (await store.list_turns("s", limit=9, after=rest.cursors[-1], now=T0)).data[0].id == "new"


async def test_deleted_turns_are_not_found_by_their_words(store: Store) -> None:
    await a_tree(store)
    assert await found_by(store, "answer b2") == ["b2"]
    await store.delete_turns("s", "b2", now=T0)
    assert await found_by(store, "answer b2") == []
    assert await found_by(store, "question d") == []
    assert await found_by(store, "question b3") == ["b3"]


async def test_turns_are_not_deleted_while_one_of_them_is_open(store: Store) -> None:
    await a_tree(store)
    await store.begin_turn(a_turn("open", parent="c"), now=T0)
    before = await contents(store, now=T0)
    for name in ("a", "b", "c", "open"):
        with pytest.raises(TurnInProgressError):
            await store.delete_turns("s", name, now=T0)
    assert await contents(store, now=T0) == before
    await store.delete_turns("s", "b2", now=T0)
    assert (await store.get_session("s", now=T0)).head == "open"
    assert "b2" not in await names(store)
    assert (await store.get_session("s", now=T0)).open_turns == 1


async def test_other_sessions_and_what_is_not_there_stay(store: Store) -> None:
    await a_tree(store)
    await store.create_session(a_session("other"), now=T0)
    before = await contents(store, now=T0)
    with pytest.raises(TurnNotFoundError):
        await store.delete_turns("other", "a", now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.delete_turns("none", "a", now=T0)
    with pytest.raises(ItemNotFoundError):
        await store.delete_item("other", "a-out", now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.delete_item("none", "a-out", now=T0)
    assert await contents(store, now=T0) == before


MANY = 1200


def a_chain(name: str, turns: int, *, below: str) -> list[TurnRecord]:
    """Turns that follow one another: ``name0``, ``name1`` and so on."""
    parents = [below, *(f"{name}{n}" for n in range(turns))]
    return [an_added_turn(f"{name}{n}", parent=parents[n], asked=f"{name}{n} words") for n in range(turns)]


async def a_large_tree(store: Store) -> None:
    """The turns a → b and a → b2, and very many turns below b, on two branches."""
    await store.create_session(a_session(), now=T0)
    await store.add_turns([an_added_turn("a", asked="first words")], now=T0)
    for turn in (an_added_turn("b", parent="a"), an_added_turn("b2", parent="a")):
        await store.add_turns([turn], now=T0)
    for chain in (a_chain("x", MANY // 2, below="b"), a_chain("y", MANY // 2, below="b")):
        await store.add_turns(chain, now=T0)


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.steps.STEP_S", 0)
    monkeypatch.setattr(sqlite_turns, "STEP_S", 0)
    monkeypatch.setattr(tree_changes, "STEP_S", 0)
    monkeypatch.setattr(tree_changes, "_AT_ONCE", 50)


@pytest.mark.usefixtures("in_small_steps")
async def test_very_many_turns_are_deleted_at_once_for_all_readers(store: Store) -> None:
    await a_large_tree(store)
    seen: list[tuple[object, ...]] = []
    ended = trio.Event()

    async def look() -> None:
        """Look at one thing after the other, so that the deletion may be between two of them."""
        while not ended.is_set():
            session = await store.get_session("s", now=T0)
            seen.append(("session", session.message_count, session.head))
            seen.append(("tree", len((await store.list_tree("s", limit=2 * MANY, after=None, now=T0)).data)))
            seen.append(("places", *sorted((await places(store, "b", "b2", "y0")).items())))
            seen.append(("found", *await found_by(store, "x7 words")))
            seen.append(("turns", len((await store.list_turns("s", limit=9, after=None, now=T0, parent="a")).data)))
            seen.append(("path", len(await store.list_path("s", f"y{MANY // 2 - 1}", limit=2 * MANY, first=None))))
            # One read: told() reads twice, and the deletion may be between the two.
            seen.append(("events", bool((await store.read_events("s", "x7")).text)))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            while not seen:
                await trio.lowlevel.checkpoint()
            before = len(seen)
            await store.delete_turns("s", "b", now=T0)
            during = len(seen)
            while len(seen) < during + 7:
                await trio.lowlevel.checkpoint()
            ended.set()
    # One transaction of PostgreSQL may be over too soon (postgres/test_long_changes.py).
    assert during > before or store.name.startswith("postgresql:"), "others read between the steps"
    was = [
        ("session", 2 * MANY + 6, f"y{MANY // 2 - 1}"),
        ("tree", MANY + 3),
        ("places", ("b", (1, 2)), ("b2", (2, 2)), ("y0", (2, 2))),
        ("found", "x7"),
        ("turns", 2),
        ("path", MANY // 2 + 2),
        ("events", True),
    ]
    becomes = [
        ("session", 4, "a"),
        ("tree", 2),
        ("places", ("b2", (1, 1))),
        ("found",),
        ("turns", 1),
        ("path", 0),
        ("events", False),
    ]
    changed = next(number for number, one in enumerate(seen) if one in becomes)
    assert seen == [(was if number < changed else becomes)[number % len(was)] for number in range(len(seen))]


async def test_large_turns_are_deleted_however_large_they_are_together(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    large = "x" * (3 * 1024 * 1024)
    await store.add_turns([an_added_turn("a", asked=large), an_added_turn("b", parent="a", asked=large)], now=T0)
    turn = a_turn("c", parent="b")
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, text=large), runs=said(large), now=T0)
    await store.delete_turns("s", "a", now=T0)
    session = await store.get_session("s", now=T0)
    assert (session.message_count, session.head) == (0, None)
    assert await names(store) == []


@pytest.mark.usefixtures("in_small_steps")
async def test_a_turn_that_is_begun_while_its_parent_is_being_deleted_is_deleted_or_refused(store: Store) -> None:
    await a_large_tree(store)
    outcomes: list[str] = []

    async def add() -> None:
        try:
            await store.add_turns([an_added_turn("new", parent="b")], now=T0)
        except TurnNotFoundError:
            outcomes.append("refused")
        else:
            outcomes.append("added")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: store.delete_turns("s", "b", now=T0))
        nursery.start_soon(add)
    assert outcomes in (["added"], ["refused"])
    assert await names(store) == ["a", "b2"]
    session = await store.get_session("s", now=T0)
    assert (session.message_count, session.head) == (4, "a")


async def test_deletions_of_one_tree_at_the_same_time_count_each_turn_once(store: Store) -> None:
    await a_large_tree(store)
    missing: list[str] = []

    async def delete(turn_id: str) -> None:
        try:
            await store.delete_turns("s", turn_id, now=T0)
        except TurnNotFoundError as error:
            missing.append(error.turn_id)

    async with trio.open_nursery() as nursery:
        for turn_id in ("x300", "b", "y5", "b2", "x300"):
            nursery.start_soon(delete, turn_id)
    assert "b" not in missing
    assert "b2" not in missing
    assert await names(store) == ["a"]
    session = await store.get_session("s", now=T0)
    assert (session.message_count, session.head) == (2, "a")


async def test_the_key_of_a_deleted_turn_is_that_of_something_gone(store: Store) -> None:
    await a_tree(store)
    key = IdempotencyKey(caller="", key="k", fingerprint=b"f")
    await store.add_turns([an_added_turn("e", parent="b")], now=T0, key=key)
    with pytest.raises(RepeatedError) as kept:
        await store.check_key(key, now=T0)
    assert not kept.value.is_gone
    await store.delete_turns("s", "b", now=T0)
    with pytest.raises(RepeatedError) as gone:
        await store.check_key(key, now=T0)
    assert gone.value.is_gone


# A turn alone


async def test_a_turn_that_others_follow_stays_and_says_nothing(store: Store) -> None:
    await a_tree(store)
    before, kept = await store.get_session("s", now=T0), await contents(store, now=T0)
    await store.delete_turn("s", "b2", now=at(9))
    turn = await store.get_turn("s", "b2", now=T0)
    was = next(turn for turn, _ in kept["s"][1] if turn.id == "b2")
    assert turn == msgspec.structs.replace(was, input=(), output=(), events_deleted=True)
    assert turn.is_emptied
    page = await store.read_events("s", "b2")
    assert (page.runs, page.text, page.kept, page.ended, page.events_deleted) == ((), "", 0, True, True)
    assert await store.get_session("s", now=T0) == msgspec.structs.replace(before, message_count=10)
    assert await found_by(store, "question b2") == await found_by(store, "answer b2") == []
    assert await found_by(store, "question d") == ["d"]
    assert await places(store, "b", "b2", "b3") == {"b": (1, 3), "b2": (2, 3), "b3": (3, 3)}
    assert [turn.id for turn in await store.read_path("s", "d", bytes_max=None)] == ["a", "b2", "d"]
    assert await store.measure_path("s", "b2") == LeftOut(2, 18)
    others = [(turn, texts) for turn, texts in (await contents(store, now=T0))["s"][1] if turn.id != "b2"]
    assert others == [(turn, texts) for turn, texts in kept["s"][1] if turn.id != "b2"]
    await store.delete_turn("s", "b2", now=T0)
    assert (await store.get_session("s", now=T0)).message_count == 10
    copy = await store.fork_session("s", at="d", copy_id="copy", now=T0)
    assert copy.message_count == 4
    assert [turn.is_emptied for turn in await all_turns(store, "copy", now=T0)] == [False, True, False]


async def test_what_a_turn_asked_of_its_model_and_kept_for_its_face_goes_too(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = msgspec.structs.replace(
        a_turn("a"),
        system_message="secret",
        tools=Tools(functions=(FunctionTool(name="f", description="secret", parameters=None, strict=None),)),
        options=Options(top_p=0.5),
        face={"x": msgspec.Raw(b'"secret"')},
    )
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, text="x" * 200_000), runs=said("x" * 200_000), now=T0)
    await store.add_turns([an_added_turn("b", parent="a")], now=T0)
    await store.delete_turn("s", "a", now=T0)
    found = await store.get_turn("s", "a", now=T0)
    assert (found.system_message, found.tools, found.options, found.face) == (
        *(None, msgspec.UNSET, NO_OPTIONS, msgspec.UNSET),
    )
    assert (found.state, found.model, found.usage) == ("completed", turn.model, None)
    assert (found.text_bytes, await told(store, "s", "a")) == (0, [])


async def test_a_turn_that_no_other_one_follows_goes_with_the_emptied_turns_above_it(store: Store) -> None:
    await a_tree(store)
    await store.add_turns([an_added_turn("e", parent="d")], now=T0)
    for name in ("b2", "a", "d"):
        await store.delete_turn("s", name, now=T0)
    assert await names(store) == ["a", "b", "b2", "b3", "c", "d", "e"]
    await store.delete_turn("s", "e", now=T0)
    assert await names(store) == ["a", "b", "b3", "c"], "others follow the emptied turn a"
    session = await store.get_session("s", now=T0)
    assert (session.head, session.message_count) == ("a", 6)
    assert await places(store, "b", "b3") == {"b": (1, 2), "b3": (2, 2)}
    for name in ("b3", "b"):
        await store.delete_turn("s", name, now=T0)
    assert await names(store) == ["a", "b", "c"]
    await store.delete_turn("s", "c", now=T0)
    session = await store.get_session("s", now=T0)
    assert (await names(store), session.head, session.message_count) == ([], None, 0)
    with pytest.raises(TurnNotFoundError):
        await store.delete_turn("s", "c", now=T0)


async def test_a_turn_that_never_said_anything_does_not_go_with_those_below_it(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    silent = msgspec.structs.replace(an_added_turn("a", asked="", replied=""), state="failed")
    await store.add_turns([silent, an_added_turn("b", parent="a")], now=T0)
    await store.delete_turn("s", "b", now=T0)
    assert await names(store) == ["a"]


async def test_a_session_goes_with_its_last_turn_if_it_has_the_revision(store: Store) -> None:
    await a_tree(store)
    await store.add_turns([an_added_turn("e", parent="a")], now=T0, key=(key := a_key("k")))
    revision = revision_of(await store.get_session("s", now=T0))
    for name in ("a", "b", "b2", "b3", "c", "d"):
        await store.delete_turn("s", name, now=T0, session_revisions=[revision])
    assert await names(store) == ["a", "e"], "a turn is left"
    patched = await store.update_session("s", SessionPatch(title="Mine"), now=T0)
    await store.delete_turn("s", "e", now=T0, session_revisions=[revision])
    assert (await names(store), (await store.get_session("s", now=T0)).head) == ([], None)
    turn = an_added_turn("f")
    await store.add_turns([turn], now=T0)
    await store.delete_turn("s", "f", now=T0, session_revisions=[revision, revision_of(patched)])
    with pytest.raises(SessionNotFoundError):
        await store.get_session("s", now=T0)
    assert await store.find_session_of("f") is None
    assert (await store.list_sessions(limit=5, after=None, status=None, now=T0)).data == ()
    assert await store.count_sessions(status=None, now=T0) == 0
    assert await found_by(store, "Mine") == []
    with pytest.raises(RepeatedError) as gone:
        await store.check_key(key, now=T0)
    assert gone.value.is_gone
    await a_tree(store)
    assert len(await names(store)) == 6, "the ids are free"


def a_key(name: str) -> IdempotencyKey:
    return IdempotencyKey(caller="", key=name, fingerprint=b"f")


@pytest.mark.parametrize("name", ["a", "b", "c", "open"])
async def test_a_turn_is_not_deleted_alone_while_it_or_one_below_it_is_open(store: Store, name: str) -> None:
    await a_tree(store)
    revision = revision_of(await store.get_session("s", now=T0))
    await store.begin_turn(a_turn("open", parent="c"), now=T0)
    before = await contents(store, now=T0)
    with pytest.raises(TurnInProgressError):
        await store.delete_turn("s", name, now=T0, session_revisions=[revision])
    assert await contents(store, now=T0) == before
    for other in ("b2", "d", "b3"):
        await store.delete_turn("s", other, now=T0)
    assert await names(store) == ["a", "b", "c", "open"]


@pytest.mark.usefixtures("in_small_steps")
async def test_very_many_emptied_turns_go_with_the_last_one(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.add_turns([an_added_turn("a"), *a_chain("x", 400, below="a")], now=T0)
    for name in ("a", *(f"x{n}" for n in range(399))):
        await store.delete_turn("s", name, now=T0)
    assert len(await names(store)) == 401
    session = await store.get_session("s", now=T0)
    assert (session.message_count, session.head) == (2, "x399")
    await store.delete_turn("s", "x399", now=T0, session_revisions=[revision_of(session)])
    with pytest.raises(SessionNotFoundError):
        await store.get_session("s", now=T0)


@pytest.mark.parametrize("follows", ["begins", "is added"])
async def test_a_turn_that_comes_beside_the_deletion_of_its_parent_is_kept_or_refused(
    store: Store, follows: str
) -> None:
    outcomes: list[str] = []

    async def follow() -> None:
        try:
            if follows == "begins":
                await store.begin_turn(a_turn("new", parent="a"), now=T0, branches=True)
            else:
                await store.add_turns([an_added_turn("new", parent="a")], now=T0)
            outcomes.append("followed")
        except (SessionNotFoundError, TurnNotFoundError):
            outcomes.append("refused")

    async def delete(revision: str) -> None:
        try:
            await store.delete_turn("s", "a", now=T0, session_revisions=[revision])
            outcomes.append("deleted")
        except TurnInProgressError:
            outcomes.append("not deleted")

    for first in (0, 1):
        await store.create_session(a_session(), now=T0)
        await store.add_turns([an_added_turn("a")], now=T0)
        revision = revision_of(await store.get_session("s", now=T0))
        outcomes.clear()
        async with trio.open_nursery() as nursery:
            for call in (follow, partial(delete, revision))[:: -1 if first else 1]:
                nursery.start_soon(call)
        if "refused" in outcomes:
            assert sorted(outcomes) == ["deleted", "refused"]
            assert await store.count_sessions(status=None, now=T0) == 0
            continue
        assert "followed" in outcomes
        assert await names(store) == ["a", "new"]
        assert (await store.get_turn("s", "a", now=T0)).is_emptied == ("deleted" in outcomes)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")


async def test_what_an_earlier_call_has_deleted_and_what_is_not_there_is_not_deleted_alone(store: Store) -> None:
    await a_tree(store)
    await store.create_session(a_session("other"), now=T0)
    before = await contents(store, now=T0)
    for session_id, turn_id, error in (
        ("other", "a", TurnNotFoundError),
        ("none", "a", SessionNotFoundError),
        ("s", "none", TurnNotFoundError),
    ):
        with pytest.raises(error):
            await store.delete_turn(session_id, turn_id, now=T0)
    assert await contents(store, now=T0) == before


# Items


def with_items(name: str, *items: Item, parent: str | None = None) -> TurnRecord:
    """An added turn with these items in its input and output."""
    turn = an_added_turn(name, parent=parent)
    output = tuple(item for item in items if item.role == "assistant")
    said = tuple(item for item in items if item.role != "assistant")
    return msgspec.structs.replace(turn, input=said, output=output)


def asks(text: str) -> Item:
    return Item(id=f"i_{text}", role="user", text=text)


def says(text: str) -> Item:
    return Item(id=f"o_{text}", role="assistant", text=text)


def calls(call_id: str) -> Item:
    return Item(id=f"c_{call_id}", type="function_call", role="assistant", text="{}", call_id=call_id, name="f")


def brings(call_id: str, name: str) -> Item:
    return Item(id=f"r_{name}", type="function_call_output", role="user", text="secret", call_id=call_id)


async def items_of(store: Store, *names: str) -> list[list[str]]:
    turns = [await store.get_turn("s", name, now=T0) for name in names]
    return [[item.id for item in (*turn.input, *turn.output)] for turn in turns]


async def test_an_item_of_an_input_leaves_its_turn_and_the_events_stay(store: Store) -> None:
    await a_tree(store)
    before = await store.get_session("s", now=T0)
    await store.delete_item("s", "b-in-0", now=at(9))
    turn = await store.get_turn("s", "b", now=T0)
    assert (turn.input, turn.text, turn.events_deleted) == ((), "answer b", False)
    assert await told(store, "s", "b") == ["answer b"]
    assert await store.get_session("s", now=T0) == msgspec.structs.replace(before, message_count=11)
    assert await store.measure_path("s", "b") == LeftOut(3, 10 + 8 + 8)
    assert await found_by(store, "question b") == []
    assert await found_by(store, "answer b") == ["b"]


async def test_an_item_of_a_reply_takes_the_events_with_it(store: Store) -> None:
    await a_tree(store)
    await store.delete_item("s", "c-out", now=T0)
    turn = await store.get_turn("s", "c", now=T0)
    assert (turn.output, turn.events_deleted, turn.last_seq, turn.usage) == (
        *((), True, 3, Usage(input_tokens=1, output_tokens=2)),
    )
    page = await store.read_events("s", "c")
    assert (page.runs, page.text, page.kept, page.ended, page.events_deleted) == ((), "", 0, True, True)
    assert await store.read_events("s", "c", after=2) == msgspec.structs.replace(page, after=2)
    assert (await store.get_session("s", now=T0)).message_count == 11
    assert await found_by(store, "answer c") == []
    with pytest.raises(ItemNotFoundError):
        await store.delete_item("s", "c-out", now=T0)
    copy = await store.fork_session("s", at="c", copy_id="copy", now=T0)
    assert copy.head is not None
    copied = await store.get_turn("copy", copy.head, now=T0)
    assert (copied.output, copied.events_deleted) == ((), True)
    assert (await store.read_events("copy", copy.head)).events_deleted


async def test_what_is_left_of_a_long_reply_is_read_whole(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    begun = a_turn()
    await store.begin_turn(begun, now=T0)
    long = "é" * 200_000
    end = ended(begun, text=long, reasoning="hm" * 50_000)
    runs = (Run(STARTED), *said("hm" * 50_000), *said(*[long[:1000]] * 200, item=1))
    await store.end_turn(end, runs=runs, now=T0)
    await store.delete_item("s", "t-reasoning", now=T0)
    turn = await store.get_turn("s", "t", now=T0)
    assert turn == msgspec.structs.replace(end, output=end.output[1:], events_deleted=True)
    assert (await all_turns(store, "s", now=T0))[0].text == long
    assert (await store.read_events("s", "t", after=7)).runs == ()
    assert (await store.get_session("s", now=T0)).message_count == 2
    await store.delete_item("s", "t-out", now=T0)
    assert (await store.get_turn("s", "t", now=T0)).text == ""


async def test_a_call_takes_its_outputs_along_on_every_branch(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turns = [
        with_items("a", asks("a"), calls("1"), calls("2")),
        with_items("b", brings("1", "b"), brings("2", "b2"), parent="a"),  # no reply: the next one has the output, too
        with_items("c", brings("1", "c"), says("C"), parent="b"),
        with_items("d", brings("1", "d"), parent="c"),
    ]
    await store.add_turns(turns, now=T0)
    await store.add_turns([with_items("e", brings("1", "e"), says("E"), parent="a")], now=T0)
    await store.delete_item("s", "c_1", now=T0)
    assert await items_of(store, "a", "b", "c", "d", "e") == [
        *(["i_a", "c_2"], ["r_b2"], ["o_C"], ["r_d"], ["o_E"]),
    ]
    assert (await store.get_session("s", now=T0)).message_count == 6
    flags = [(await store.get_turn("s", name, now=T0)).events_deleted for name in ("a", "b", "c", "e")]
    assert flags == [True, False, False, False]


@pytest.mark.usefixtures("in_small_steps")
async def test_a_call_takes_very_many_outputs_along_however_far_they_are(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.add_turns([with_items("a", asks("a"), calls("1"))], now=T0)
    for n in range(300):  # the same output again and again, and at the end of a long way without a reply
        answer = with_items(f"b{n}", asks(f"b{n}"), brings("1", f"b{n}"), *([says(f"B{n}")] if n else []), parent="a")
        await store.add_turns([answer], now=T0)
    far = [with_items(f"c{n}", asks(f"c{n}"), parent=f"c{n - 1}" if n else "b0") for n in range(500)]
    await store.add_turns([*far, with_items("d", brings("1", "d"), says("D"), parent="c499")], now=T0)
    before = (await store.get_session("s", now=T0)).message_count
    assert (await store.measure_path("s", "d")).items == 506
    await store.delete_item("s", "c_1", now=T0)
    assert await items_of(store, "a", "b0", "b299", "d") == [["i_a"], ["i_b0"], ["i_b299", "o_B299"], ["o_D"]]
    path = await store.read_path("s", "d", bytes_max=None)
    assert [item for turn in path for item in turn.input if item.type == "function_call_output"] == []
    assert [turn.id for turn in await store.read_path("s", "b7", bytes_max=None)] == ["a", "b7"]
    assert (await store.get_session("s", now=T0)).message_count == before - 302
    assert (await store.measure_path("s", "d")).items == 503
    copy = await store.fork_session("s", at="b9", copy_id="copy", now=T0)
    assert copy.message_count == 3
    await store.delete_item("s", "i_b299", now=T0)
    assert await items_of(store, "b299") == [["o_B299"]]
    await store.delete_turns("s", "b299", now=T0)
    assert (await store.get_session("s", now=T0)).message_count == before - 304


async def test_an_output_that_is_deleted_leaves_its_call(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.add_turns([with_items("a", asks("a"), calls("1"))], now=T0)
    await store.add_turns([with_items("b", brings("1", "b"), says("B"), parent="a")], now=T0)
    await store.delete_item("s", "r_b", now=T0)
    assert await items_of(store, "a", "b") == [["i_a", "c_1"], ["o_B"]]


async def test_an_item_is_not_deleted_while_its_turn_or_one_that_follows_is_open(store: Store) -> None:
    await a_tree(store)
    await store.begin_turn(a_turn("open", parent="c"), now=T0)
    before = await contents(store, now=T0)
    for item_id in ("a-in-0", "b-out", "open-in-0"):
        with pytest.raises(TurnInProgressError):
            await store.delete_item("s", item_id, now=T0)
    assert await contents(store, now=T0) == before
    for item_id in ("d-out", "b2-in-0"):
        await store.delete_item("s", item_id, now=T0)
    await store.end_turn(ended(a_turn("open", parent="c")), runs=said("Hi"), now=T0)
    await store.delete_item("s", "open-out", now=T0)
    assert (await store.get_turn("s", "open", now=T0)).output == ()


async def test_an_id_in_a_text_is_not_taken_for_the_item(store: Store) -> None:
    await a_tree(store)
    await store.add_turns([an_added_turn("q", parent="d", asked='"id":"a-out"', replied='"a-out"')], now=T0)
    await store.delete_item("s", "a-out", now=T0)
    assert (await store.get_turn("s", "a", now=T0)).output == ()
    assert (await store.get_turn("s", "q", now=T0)).text == '"a-out"'


# Several owners


async def test_only_the_owner_of_the_open_turns_deletes(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await a_tree(store)
        async with open_shared() as owner:
            await owner.begin_turn(a_turn("open", parent="b3"), now=T0)
            for delete in (
                store.delete_turns("s", "b", now=T0),
                store.delete_item("s", "b-out", now=T0),
                store.delete_turn("s", "a", now=T0),
                store.delete_turn("s", "c", now=T0),
            ):
                with pytest.raises(OwnedElsewhereError):
                    await delete
            await owner.delete_turns("s", "b", now=T0)
            await owner.delete_item("s", "d-out", now=T0)
        # The owner has died with its turn.
        await store.delete_item("s", "open-in-0", now=at(1))
        await store.delete_turn("s", "open", now=at(1))
        await store.delete_turns("s", "b3", now=at(1))
        assert await names(store) == ["a", "b2", "d"]
        session = await store.get_session("s", now=at(1))
        assert (session.open_turns, session.head, session.message_count) == (0, "a", 5)


async def test_a_fork_beside_a_deletion_is_whole_or_refused(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turns = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(900)]
    await store.add_turns(turns, now=T0)
    outcomes: list[str] = []

    async def fork() -> None:
        try:
            copy = await store.fork_session("s", at="t899", copy_id="copy", now=T0)
            outcomes.append(f"whole {copy.message_count}")
        except (StoreError, TurnNotFoundError) as error:
            outcomes.append(type(error).__name__)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fork)
        nursery.start_soon(lambda: store.delete_item("s", "t5-out", now=T0))
    found: Contents = await contents(store, now=T0)
    assert outcomes
    if outcomes[0].startswith("whole"):
        assert outcomes[0] in ("whole 1800", "whole 1799")
        copied = found["copy"][1]
        assert sum(turn.message_count for turn, _ in copied) == found["copy"][0].message_count
        for turn, texts in copied:
            assert turn.events_deleted or "".join(texts) == turn.text
    else:
        assert outcomes[0] in ("EditedMeanwhileError", "TurnNotFoundError")
        assert "copy" not in found


async def test_runs_of_calls_are_made_anew_for_what_is_left(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    begun = a_turn()
    await store.begin_turn(begun, now=T0)
    end = msgspec.structs.replace(ended(begun), output=(says("A"), calls("1")), last_seq=5)
    await store.end_turn(end, runs=(Run(STARTED), *said("A"), Run(CALL - 1), *said("{}", item=1)), now=T0)
    await store.delete_item("s", "o_A", now=T0)
    assert (await store.get_turn("s", "t", now=T0)).output == (calls("1"),)
    assert (await store.read_events("s", "t")).events_deleted
