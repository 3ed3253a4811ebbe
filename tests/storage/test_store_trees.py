"""The tree of a session's turns in every store: siblings, the head that moves, branches, pages of the tree."""

import msgspec
import pytest

from service.errors import (
    HeadMovedError,
    InvalidRequestError,
    OwnedElsewhereError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.storage.records import Places, SessionPatch, SessionRecord, Siblings, TreeNode
from service.storage.rules import NEVER_STARTED_MAX
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import T0, a_session, a_turn, all_turns, at, contents, ended
from tests.storage.test_store_added_turns import an_added_turn


async def _add(
    store: Store, name: str, parent: str | None = None, *, session: str = "s", is_open: bool = False
) -> None:
    turn = a_turn(name, session, parent=parent)
    await store.begin_turn(turn, now=T0)
    if not is_open:
        await store.end_turn(ended(turn), runs=(), now=T0)


async def _add_unstarted(store: Store, name: str, parent: str) -> None:
    """A turn that is cancelled while it is queued."""
    turn = a_turn(name, parent=parent, state="queued")
    await store.begin_turn(turn, now=T0)
    await store.end_turn(ended(turn, "cancelled", text=""), runs=(), now=T0)


async def _move(
    store: Store, head: str | None, *, seen: str | None | msgspec.UnsetType = msgspec.UNSET
) -> SessionRecord:
    return await store.update_session("s", SessionPatch(head=head, seen_head=seen), now=at(1))


async def _a_small_tree(store: Store) -> None:
    """Two roots; three turns follow the first root, and one turn follows the second of these."""
    await store.create_session(a_session(), now=T0)
    for name, parent in (("r1", None), ("a", "r1"), ("r2", None), ("b", "r1"), ("c", "b"), ("d", "r1")):
        await _add(store, name, parent)


# Turns on a path


async def test_turns_are_found_on_the_path_to_a_turn_and_on_no_other(store: Store) -> None:
    await _a_small_tree(store)
    await store.create_session(a_session("other"), now=T0)
    await _add(store, "theirs", session="other")
    everything = ["r1", "r2", "a", "b", "c", "d", "gone", "theirs"]
    for last, found in (
        ("c", {"r1", "b", "c"}),
        ("d", {"r1", "d"}),
        ("r2", {"r2"}),
        ("theirs", set()),
        ("gone", set()),
    ):
        assert await store.find_on_path("s", last, among=everything) == found
    assert await store.find_on_path("s", "c", among=["b", "a"]) == {"b"}
    assert await store.find_on_path("s", "c", among=[]) == set()
    assert await store.find_on_path("none", "c", among=everything) == set()
    await store.delete_turns("s", "b", now=T0)
    assert await store.find_on_path("s", "d", among=everything) == {"r1", "d"}
    assert await store.find_on_path("s", "c", among=everything) == set()


# Siblings


async def test_a_turn_knows_its_place_among_the_turns_with_its_parent(store: Store) -> None:
    await _a_small_tree(store)
    await store.create_session(a_session("other"), now=T0)
    await _add(store, "theirs", session="other")
    places = await store.find_places("s", ["r1", "r2", "a", "b", "c", "d", "gone", "theirs"])
    assert places == Places(
        "d",
        {
            "r1": Siblings(1, 2),
            "r2": Siblings(2, 2),
            "a": Siblings(1, 3),
            "b": Siblings(2, 3),
            "c": Siblings(1, 1),
            "d": Siblings(3, 3),
        },
    )
    assert await store.find_places("other", ["theirs", "r1"]) == Places("theirs", {"theirs": Siblings()})
    assert await store.find_places("nowhere", ["r1"]) == Places()


async def test_the_acceptance_of_a_turn_tells_its_place(store: Store) -> None:
    begun = await store.begin_turn(a_turn("r"), now=T0, creates=a_session())
    assert begun.siblings == Siblings()
    places = [
        (await store.begin_turn(a_turn(name, parent=parent), now=T0)).siblings
        for name, parent in (("a", "r"), ("b", "r"), ("c", "a"), ("d", "r"), ("r2", None))
    ]
    assert places == [Siblings(), Siblings(2, 2), Siblings(), Siblings(3, 3), Siblings(2, 2)]


async def test_places_are_those_of_a_session_that_is_marked_as_deleted_too(store: Store) -> None:
    await _a_small_tree(store)
    await store.mark_deleted("s", now=T0)
    assert (await store.find_places("s", ["d"])).siblings == {"d": Siblings(3, 3)}
    await store.remove_deleted("s")
    assert await store.find_places("s", ["d"]) == Places()
    await store.create_session(a_session(), now=T0)
    await _add(store, "r1")
    assert (await store.find_places("s", ["r1"])).siblings == {"r1": Siblings()}, "no sibling of the session before"


async def test_the_copies_of_a_fork_have_no_siblings_until_turns_are_added(store: Store) -> None:
    await _a_small_tree(store)
    copy = await store.fork_session("s", at="c", copy_id="copy", now=T0)
    path = await all_turns(store, "copy", now=T0)
    assert (await store.find_places("copy", [turn.id for turn in path])).siblings == {
        turn.id: Siblings() for turn in path
    }
    begun = await store.begin_turn(a_turn("x", "copy", parent=path[0].id), now=T0)
    assert (begun.siblings, begun.session.head) == (Siblings(2, 2), "x")
    assert (await store.find_places("copy", [path[1].id])).siblings == {path[1].id: Siblings(1, 2)}
    assert copy.head == path[-1].id


async def test_the_siblings_of_a_parent_are_listed_in_pages_that_stay_as_they_are(store: Store) -> None:
    await _a_small_tree(store)
    page = await store.list_turns("s", limit=2, after=None, now=T0, parent="r1")
    assert [turn.id for turn in page.data] == ["a", "b"]
    await _add(store, "e", "r1")
    rest = await store.list_turns("s", limit=2, after=page.next, now=T0, parent="r1")
    assert ([turn.id for turn in rest.data], rest.next) == (["d", "e"], None)
    assert page.cursors[-1] == page.next
    roots = await store.list_turns("s", limit=9, after=None, now=T0, parent=None)
    assert [turn.id for turn in roots.data] == ["r1", "r2"]
    assert (await store.list_turns("s", limit=9, after=None, now=T0, parent="e")).data == ()
    small = await store.list_turns("s", limit=9, after=None, now=T0, parent="r1", bytes_max=1)
    assert ([turn.id for turn in small.data], small.next) == (["a"], small.cursors[0])
    assert small.data[0] == await store.get_turn("s", "a", now=T0)


async def test_a_listing_of_siblings_refuses_a_parent_that_is_no_turn_of_the_session(store: Store) -> None:
    await _a_small_tree(store)
    await store.create_session(a_session("other"), now=T0)
    await _add(store, "theirs", session="other")
    for parent in ("gone", "theirs", ""):
        with pytest.raises(TurnNotFoundError):
            await store.list_turns("s", limit=9, after=None, now=T0, parent=parent)
    with pytest.raises(SessionNotFoundError):
        await store.list_turns("nowhere", limit=9, after=None, now=T0, parent=None)


# The tree


async def test_a_tree_is_listed_in_pages_with_parents_states_and_times(store: Store) -> None:
    await _a_small_tree(store)
    await _add(store, "open", "d", is_open=True)
    turns = await all_turns(store, "s", now=T0)
    nodes: list[TreeNode] = []
    after = None
    for _ in range(9):
        page = await store.list_tree("s", limit=3, after=after, now=T0)
        nodes += page.data
        assert page.cursors[-1] == (page.next or page.cursors[-1])
        if (after := page.next) is None:
            break
    assert nodes == [TreeNode.of(turn) for turn in turns]
    assert [(node.state, node.ended_at) for node in nodes[-2:]] == [("completed", T0), ("running", None)]


async def test_the_tree_of_an_empty_session_is_empty_and_of_no_session_there_is_none(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    page = await store.list_tree("s", limit=1, after=None, now=T0)
    assert (page.data, page.next) == ((), None)
    with pytest.raises(InvalidRequestError):
        await store.list_tree("s", limit=1, after="!", now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.list_tree("nowhere", limit=1, after=None, now=T0)


# Branches


async def test_a_branch_begins_beside_open_turns_of_other_paths(store: Store) -> None:
    await _a_small_tree(store)
    await _add(store, "open", "d", is_open=True)
    begun = await store.begin_turn(a_turn("branch", parent="r1"), now=T0, branches=True)
    assert (begun.session.open_turns, begun.session.head) == (2, "branch")
    root = await store.begin_turn(a_turn("root"), now=T0, branches=True, path_bytes_max=None)
    assert root.path == [a_turn("root")]
    await store.end_turn(ended(a_turn("branch", parent="r1")), runs=(), now=T0)
    assert (await store.get_session("s", now=T0)).open_turns == 2


async def test_no_branch_begins_on_a_path_with_an_open_turn(store: Store) -> None:
    await _a_small_tree(store)
    await _add(store, "open", "d", is_open=True)
    await _add_unstarted(store, "q1", "open")
    await _add_unstarted(store, "q2", "q1")
    before = await contents(store, now=T0)
    for parent in ("open", "q1", "q2"):
        with pytest.raises(TurnInProgressError) as refused:
            await store.begin_turn(a_turn("branch", parent=parent), now=T0, branches=True)
        assert refused.value.turn_id == "open"
    with pytest.raises(TurnNotFoundError):
        await store.begin_turn(a_turn("branch", parent="gone"), now=T0, branches=True)
    assert await contents(store, now=T0) == before
    await store.end_turn(ended(a_turn("open", parent="d")), runs=(), now=T0)
    await store.begin_turn(a_turn("branch", parent="q2"), now=T0, branches=True)


async def test_turns_are_added_to_no_path_with_an_open_turn_but_beside_it(store: Store) -> None:
    await _a_small_tree(store)
    await _add(store, "open", "d", is_open=True)
    await _add_unstarted(store, "q", "open")
    before = await contents(store, now=T0)
    for parent in ("open", "q"):
        with pytest.raises(TurnInProgressError) as refused:
            await store.add_turns([an_added_turn("x", parent=parent)], now=T0)
        assert refused.value.turn_id == "open"
    assert await contents(store, now=T0) == before
    await store.add_turns([an_added_turn("x", parent="r1"), an_added_turn("y", parent="x")], now=T0)
    assert await store.find_places("s", ["x", "y"]) == Places("y", {"x": Siblings(4, 4), "y": Siblings()})


async def test_the_search_for_an_open_turn_on_a_path_has_a_bound(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await _add(store, "open", is_open=True)
    parent = "open"
    for number in range(NEVER_STARTED_MAX + 1):
        await _add_unstarted(store, f"q{number}", parent)
        parent = f"q{number}"
    for last, found in ((NEVER_STARTED_MAX - 1, "open"), (NEVER_STARTED_MAX, "q0")):
        with pytest.raises(TurnInProgressError) as refused:
            await store.begin_turn(a_turn("branch", parent=f"q{last}"), now=T0, branches=True)
        assert refused.value.turn_id == found


# The head


async def test_the_head_moves_to_any_turn_and_to_none(store: Store) -> None:
    await _a_small_tree(store)
    before = await store.get_session("s", now=T0)
    for head in ("a", None, "c"):
        moved = await _move(store, head)
        assert moved == await store.get_session("s", now=at(1))
        assert (moved.head, moved.last_accessed_at, moved.message_count) == (head, at(1), before.message_count)
    both = await store.update_session("s", SessionPatch(head="a", title="x"), now=at(2))
    assert (both.head, both.title) == ("a", "x")
    assert (await store.update_session("s", SessionPatch(title="y"), now=at(3))).head == "a"
    assert (await store.find_places("s", [])).head == "a"


async def test_a_head_that_the_caller_has_not_seen_stays_and_so_do_the_other_fields(store: Store) -> None:
    await _a_small_tree(store)
    before = await contents(store, now=T0)
    for seen in ("a", None, "gone"):
        with pytest.raises(HeadMovedError) as refused:
            await store.update_session("s", SessionPatch(head="b", title="x", seen_head=seen), now=at(1))
        assert refused.value.turn_id == "d"
        with pytest.raises(HeadMovedError):
            await store.update_session("s", SessionPatch(title="x", seen_head=seen), now=at(1))
    assert await contents(store, now=T0) == before
    assert (await _move(store, None, seen="d")).head is None
    assert (await _move(store, "b", seen=None)).head == "b"
    assert (await store.update_session("s", SessionPatch(title="x", seen_head="b"), now=at(1))).title == "x"


async def test_the_head_moves_to_no_turn_of_another_session(store: Store) -> None:
    await _a_small_tree(store)
    await store.create_session(a_session("other"), now=T0)
    await _add(store, "theirs", session="other")
    before = await contents(store, now=T0)
    for head in ("gone", "theirs", ""):
        with pytest.raises(TurnNotFoundError):
            await _move(store, head)
    assert await contents(store, now=T0) == before
    with pytest.raises(SessionNotFoundError):
        await store.update_session("nowhere", SessionPatch(head=None), now=T0)


async def test_the_head_moves_beside_a_path_with_an_open_turn_but_not_to_or_from_it(store: Store) -> None:
    await _a_small_tree(store)
    await _add(store, "open", "d", is_open=True)
    await _add_unstarted(store, "q", "open")
    before = await contents(store, now=T0)
    for head in ("a", "open", None):  # the head, ``q``, is on the path
        with pytest.raises(TurnInProgressError) as refused:
            await _move(store, head)
        assert refused.value.turn_id == "open"
    assert await contents(store, now=T0) == before
    await _add(store, "e", "r1")
    assert (await _move(store, "d")).head == "d", "the parent of an open turn has ended"
    with pytest.raises(TurnInProgressError):
        await _move(store, "q")
    await store.end_turn(ended(a_turn("open", parent="d")), runs=(), now=T0)
    assert (await _move(store, "q")).head == "q"


async def test_the_head_does_not_move_where_another_owner_runs_a_turn_on_the_path(open_shared: OpenStore) -> None:
    async with open_shared() as here:
        await _a_small_tree(here)
        async with open_shared() as there:
            await _add(there, "open", "d", is_open=True)
            for head in ("a", "open", None):
                with pytest.raises(OwnedElsewhereError):
                    await _move(here, head)
            with pytest.raises(HeadMovedError):
                await _move(here, "a", seen="d")
            with pytest.raises(OwnedElsewhereError):
                await here.begin_turn(a_turn("branch", parent="a"), now=T0, branches=True)
            branch = await there.begin_turn(a_turn("branch", parent="a"), now=T0, branches=True)
            await there.end_turn(ended(a_turn("branch", parent="a")), runs=(), now=T0)
            assert (branch.session.head, (await _move(here, "b")).head) == ("branch", "b"), "beside the open turn"
            assert (await _move(here, "branch")).head == "branch"


async def test_a_crash_ends_all_branches_and_the_head_moves_then(open_shared: OpenStore) -> None:
    async with open_shared() as here:
        await _a_small_tree(here)
        async with open_shared() as there:
            await _add(there, "open", "d", is_open=True)
            await there.begin_turn(a_turn("branch", parent="r1"), now=T0, branches=True)
            await there.begin_turn(a_turn("queued", parent="branch", state="queued"), now=T0)
        with pytest.raises(HeadMovedError):
            await _move(here, "a", seen="d")
        assert (await here.get_session("s", now=T0)).open_turns == 3, "a refusal ends no turn"
        moved = await _move(here, "a")
        assert (moved.head, moved.open_turns) == ("a", 0)
        states = {turn.id: (turn.state, turn.reason) for turn in await all_turns(here, "s", now=at(1))}
        assert [states[name] for name in ("open", "branch", "queued")] == 3 * [("interrupted", "crash")]
        assert (await here.find_places("s", ["branch", "queued"])).siblings == {
            "branch": Siblings(4, 4),
            "queued": Siblings(),
        }
        begun = await here.begin_turn(a_turn("next", parent="queued"), now=at(1), branches=True)
        assert begun.session.open_turns == 1


async def test_a_branch_begins_where_the_owner_of_its_path_is_gone(open_shared: OpenStore) -> None:
    async with open_shared() as here:
        async with open_shared() as there:
            await there.create_session(a_session(), now=T0)
            await _add(there, "open", is_open=True)
        begun = await here.begin_turn(a_turn("branch", parent="open"), now=T0, branches=True, path_bytes_max=None)
        assert begun.path is not None
        assert [turn.state for turn in begun.path] == ["interrupted", "running"]
