"""Forks in every store: the copy is whole, independent, and there at once or not at all."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
import pytest
import trio

from service.errors import (
    InvalidRequestError,
    SessionExistsError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.models.client import Usage
from service.storage import fork_path
from service.storage.records import SEQ_AFTER_CRASH, EndResult, EndState, Item, SessionPatch, SessionRecord, TurnRecord
from service.storage.store import Store
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, all_turns, at, contents, ended, said, told

NOW = at(5)


async def _fork(store: Store, **changes: object) -> SessionRecord:
    call = {"at": None, "copy_id": "copy", "now": NOW} | changes
    return await store.fork_session("s", **call)  # type: ignore[arg-type]


def _texts(turn: str) -> list[str]:
    """The pieces of the events of a turn; ``d`` has no reply."""
    return [f"{turn}?"] if turn == "d" else [f"{turn}?", f"{turn} 0", f"{turn} 1"]


async def _add(store: Store, turn: TurnRecord, state: EndState = "completed", **end: object) -> TurnRecord:
    """A turn that has ended, with events of its own."""
    await store.begin_turn(turn, now=T0)
    thought, *texts = _texts(turn.id)
    last = ended(turn, state, text="".join(texts), reasoning=thought, **end)  # type: ignore[arg-type]
    runs = (*said(thought), *said(*texts, item=1))
    assert await store.end_turn(last, runs=runs, now=T0) is EndResult.KEPT
    return last


async def _tree(store: Store) -> None:
    """Store ``a`` with ``b`` and ``c`` after it, each with ``usage``; then the head ``d``, after ``b``."""
    settings = {"title": "T", "model": "m", "system_message": "Be brief.", "metadata": {"a": "b"}}
    await store.create_session(msgspec.structs.replace(a_session(), **settings), now=T0)
    usage = Usage(input_tokens=1, output_tokens=2)
    await _add(store, a_turn("a", texts=["1", "2"]), usage=usage)
    await _add(store, a_turn("b", parent="a"), "interrupted", usage=usage)
    await _add(store, a_turn("c", parent="a"), usage=usage)
    await _add(store, a_turn("d", parent="b"), "failed", usage=usage)


def _without_ids(turns: Sequence[TurnRecord]) -> list[TurnRecord]:
    """The turns without ids, as in any copy. Checks that their ids are distinct and their parents make a path."""
    parents = [None, *(turn.id for turn in turns)]
    assert [turn.parent for turn in turns] == parents[: len(turns)]
    assert len({turn.id for turn in turns}) == len(turns)

    def bare(items: Sequence[Item]) -> tuple[Item, ...]:
        return tuple(msgspec.structs.replace(item, id="") for item in items)

    return [
        msgspec.structs.replace(
            turn, id="", parent=None, session_id="", input=bare(turn.input), output=bare(turn.output)
        )
        for turn in turns
    ]


@pytest.mark.parametrize(("last", "path"), [(None, "abd"), ("d", "abd"), ("b", "ab"), ("c", "ac"), ("a", "a")])
async def test_a_copy_has_the_settings_and_the_turns_of_the_path_under_ids_of_its_own(
    store: Store, last: str | None, path: str
) -> None:
    await _tree(store)
    before = await contents(store, now=NOW)
    copy = await _fork(store, at=last)
    turns = await all_turns(store, "copy", now=NOW)
    originals = [await store.get_turn("s", name, now=NOW) for name in path]
    assert _without_ids(turns) == _without_ids(originals)
    items = [item.id for turn in (*turns, *originals) for item in (*turn.input, *turn.output)]
    assert len(set(items)) == len(items)
    assert {turn.session_id for turn in turns} == {"copy"}
    assert {turn.id for turn in turns}.isdisjoint("abcd")
    for turn, name in zip(turns, path, strict=True):
        assert await told(store, "copy", turn.id) == _texts(name)
        assert await store.get_turn("copy", turn.id, now=NOW) == turn
    assert list(await store.read_path("copy", turns[-1].id, bytes_max=None)) == turns
    assert copy == msgspec.structs.replace(
        before["s"][0],
        id="copy",
        created_at=NOW,
        last_accessed_at=NOW,
        expires_at=at(5 + IDLE_TIMEOUT_S),
        head=turns[-1].id,
        message_count={"abd": 6, "ab": 5, "ac": 5, "a": 3}[path],
        input_tokens=len(path),
        output_tokens=2 * len(path),
    )
    after = await contents(store, now=NOW)
    assert after.pop("copy")[0] == copy
    assert after == before, "it is no use of the source"


async def test_a_copy_of_a_session_without_turns_has_none(store: Store) -> None:
    await store.create_session(msgspec.structs.replace(a_session(), title="T"), now=T0)
    copy = await _fork(store)
    assert (copy.head, copy.message_count, copy.title) == (None, 0, "T")
    assert (await contents(store, now=NOW))["copy"] == (copy, [])
    assert (await store.begin_turn(a_turn("t", "copy"), now=NOW)).session.head == "t"


async def test_a_copy_takes_turns_expires_and_is_forked_as_any_session(store: Store) -> None:
    await _tree(store)
    copy = await _fork(store)
    second = await store.fork_session("copy", at=None, copy_id="second", now=NOW)
    assert _without_ids(await all_turns(store, "second", now=NOW)) == _without_ids(
        await all_turns(store, "copy", now=NOW)
    )
    assert copy.head is not None
    assert (await store.begin_turn(a_turn("next", "copy", parent=copy.head), now=NOW)).session.open_turns == 1
    assert [turn.id for turn in await all_turns(store, "copy", now=NOW)][-1] == "next"
    assert await store.end_turn(ended(a_turn("next", "copy", parent=copy.head)), runs=(), now=NOW) is EndResult.KEPT
    assert await store.count_sessions(status="idle", now=NOW) == 3
    assert await store.delete_expired(now=second.expires_at, limit=10) == 3
    assert await contents(store, now=T0) == {}


@pytest.mark.parametrize("gone", ["s", "copy"])
async def test_neither_knows_of_the_other(store: Store, gone: str) -> None:
    await _tree(store)
    copy = await _fork(store)
    kept = "copy" if gone == "s" else "s"
    before = (await contents(store, now=NOW))[kept]
    await store.update_session(gone, SessionPatch(title="other"), now=NOW)
    head = "d" if gone == "s" else copy.head
    await _add(store, a_turn("later", gone, parent=head))
    assert (await contents(store, now=NOW))[kept] == before
    await store.mark_deleted(gone, now=NOW)
    await store.remove_deleted(gone)
    assert await contents(store, now=NOW) == {kept: before}


async def test_a_turn_of_another_session_or_none_is_not_found_and_nothing_changes(store: Store) -> None:
    await _tree(store)
    await store.create_session(a_session("other"), now=T0)
    await _add(store, a_turn("elsewhere", "other"))
    before = await contents(store, now=NOW)
    for name in ("elsewhere", "nothing", ""):
        with pytest.raises(TurnNotFoundError):
            await _fork(store, at=name)
    assert await contents(store, now=NOW) == before


@pytest.mark.parametrize("state", ["queued", "running"])
async def test_an_open_turn_on_the_path_is_refused_and_one_beside_it_is_not(store: Store, state: str) -> None:
    await _tree(store)
    await store.begin_turn(a_turn("open", parent="d", state=state), now=T0)  # type: ignore[arg-type]
    await store.begin_turn(a_turn("after", parent="open", state="queued"), now=T0)
    await store.end_turn(ended(a_turn("after", parent="open"), "cancelled"), runs=(), now=T0)
    before = await contents(store, now=NOW)
    for last in (None, "open", "after"):
        with pytest.raises(TurnInProgressError) as refused:
            await _fork(store, at=last)
        assert refused.value.turn_id == "open"
    assert await contents(store, now=NOW) == before
    assert (await _fork(store, at="d")).open_turns == 0
    assert (await store.get_session("copy", now=NOW)).status == "idle"


async def test_a_taken_id_is_refused_and_nothing_changes(store: Store) -> None:
    await _tree(store)
    await store.create_session(a_session("copy"), now=T0)
    await store.create_session(a_session("marked"), now=T0)
    await store.mark_deleted("marked", now=T0)
    before = await contents(store, now=NOW)
    for taken in ("copy", "marked", "s"):
        with pytest.raises(SessionExistsError):
            await _fork(store, copy_id=taken)
    assert await contents(store, now=NOW) == before


async def test_an_expired_session_of_the_new_id_is_replaced(store: Store) -> None:
    await _tree(store)
    await store.create_session(a_session("copy", idle_timeout_s=1), now=T0)
    await store.begin_turn(a_turn("old", "copy"), now=T0)
    await store.end_turn(ended(a_turn("old", "copy")), runs=said("Hi"), now=T0)
    copy = await _fork(store)
    assert await store.get_session("copy", now=NOW) == copy
    assert await told(store, "copy", "old") == []
    assert len(await all_turns(store, "copy", now=NOW)) == 3


async def test_the_rest_of_a_turn_after_a_crash_is_copied_unchanged(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    crashed = msgspec.structs.replace(ended(a_turn(), "interrupted"), reason="crash", last_seq=SEQ_AFTER_CRASH)
    await store.end_turn(crashed, runs=said("H", "i"), now=T0)
    copy = await _fork(store)
    assert copy.head is not None
    assert (await store.get_turn("copy", copy.head, now=NOW)).last_seq == SEQ_AFTER_CRASH
    assert await told(store, "copy", copy.head) == ["H", "i"]


async def test_a_path_of_a_thousand_turns_is_copied_whole(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    for n in range(1000):
        await _add(store, a_turn(f"t{n}", parent=f"t{n - 1}" if n else None))
    copy = await _fork(store)
    turns = await all_turns(store, "copy", now=NOW)
    assert (len(turns), copy.message_count, copy.head) == (1000, 2000, turns[-1].id)
    assert _without_ids(turns) == _without_ids(await all_turns(store, "s", now=NOW))
    for n in (0, 500, 999):
        assert await told(store, "copy", turns[n].id) == _texts(f"t{n}")


async def test_many_events_are_copied_whole(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    texts = [f"{n}" * 100 for n in range(20_000)]
    await store.end_turn(ended(a_turn(), text="".join(texts)), runs=said(*texts), now=T0)
    copy = await _fork(store)
    assert copy.head is not None
    assert await told(store, "copy", copy.head) == texts


@pytest.mark.parametrize(("bound", "value"), [("BYTES_MAX", 2500), ("TURNS_MAX", 2)])
async def test_more_than_a_fork_may_copy_is_refused_and_nothing_changes(
    store: Store, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    await store.create_session(a_session(), now=T0)
    for n in range(3):
        await store.begin_turn(a_turn(f"t{n}", parent=f"t{n - 1}" if n else None), now=T0)
        end = ended(a_turn(f"t{n}", parent=f"t{n - 1}" if n else None), reasoning="x" * 1000)
        await store.end_turn(end, runs=(*said("x" * 1000), *said("Hi", item=1)), now=T0)
    before = await contents(store, now=NOW)
    monkeypatch.setattr(fork_path, bound, value)
    with pytest.raises(InvalidRequestError) as refused:
        await _fork(store)
    assert refused.value.field == "at"
    assert await contents(store, now=NOW) == before
    assert (await _fork(store, at="t1")).message_count == 4


# Concurrency

ROUNDS = 12


async def _at_once(*calls: Callable[[], Awaitable[object]]) -> list[object]:
    """Run the calls at once; the result of each, or the type of its error."""
    results: list[object] = [None] * len(calls)

    async def run(n: int, call: Callable[[], Awaitable[object]]) -> None:
        try:
            results[n] = await call()
        except (SessionNotFoundError, SessionExistsError, TurnInProgressError) as error:
            results[n] = type(error)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for n, call in enumerate(calls):
                nursery.start_soon(run, n, call)
    return results


async def test_of_many_forks_to_one_id_one_wins(store: Store) -> None:
    await _tree(store)
    results = await _at_once(*(partial(_fork, store) for _ in range(20)))
    assert sorted(map(type, results), key=str).count(SessionRecord) == 1
    assert results.count(SessionExistsError) == 19
    assert len(await all_turns(store, "copy", now=NOW)) == 3


async def test_a_session_is_forked_or_deleted_first(store: Store) -> None:
    for n in range(ROUNDS):
        await store.create_session(a_session(), now=T0)
        await _add(store, a_turn(f"t{n}"))

        async def delete() -> None:
            await store.mark_deleted("s", now=NOW)
            await store.remove_deleted("s")

        copied, _ = await _at_once(partial(_fork, store, copy_id=f"copy{n}"), delete)
        found = await contents(store, now=NOW)
        assert "s" not in found
        if copied is SessionNotFoundError:
            assert f"copy{n}" not in found
        else:
            assert found[f"copy{n}"][0] == copied
            assert [events for _, events in found[f"copy{n}"][1]] == [_texts(f"t{n}")]


async def test_turns_that_begin_and_end_meanwhile_are_in_the_copy_whole_or_not_at_all(store: Store) -> None:
    await _tree(store)

    async def have_a_turn(n: int) -> None:
        await _add(store, a_turn(f"t{n}", parent="d"))

    results = await _at_once(
        *(partial(have_a_turn, n) for n in range(ROUNDS)),
        *(partial(_fork, store, copy_id=f"copy{n}") for n in range(ROUNDS)),
    )
    found = await contents(store, now=NOW)
    for copy in results[ROUNDS:]:
        assert copy is TurnInProgressError or isinstance(copy, SessionRecord)
        if isinstance(copy, SessionRecord):
            session, turns = found[copy.id]
            assert session == copy
            assert len(turns) in (3, 4)
            assert all(len(events) in (1, 3) and not turn.is_open for turn, events in turns)
