"""A whole store is copied into a new one of any kind: the copy has the same for every reader."""

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from itertools import count, product
from pathlib import Path

import msgspec
import pytest
import trio

from service.cli.main import main
from service.cli.store_copy import copy_store
from service.errors import RefusedError, RepeatedError, StartupError
from service.models.client import Usage
from service.storage import whole_store
from service.storage.pieces import STARTED, Resumed, Run, resumed_run
from service.storage.records import SEQ_AFTER_CRASH, IdempotencyKey, Item, Match, SessionPatch
from service.storage.sqlite import open_sqlite_store
from service.storage.store import Store
from service.storage.whole_store import Contents
from tests.postgres_server import running
from tests.storage.rows import T0, a_session, a_turn, adopt, at, contents, ended, said, suspended_in
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_owners import a_checkpoint
from tests.storage.test_store_suspended import a_lasting_turn, so_far

KINDS = ["sqlite", "postgres"]
KEY, GONE = (IdempotencyKey(caller="ann", key=key, fingerprint=b"\x00f") for key in ("a", "b"))
QUERIES = ["word", "title", "answer c", "Ähre", "日本", "gone"]


class Place:
    """Where a store is, and a function that opens it."""

    def __init__(self, url: str, schema: str, open_store: Callable[[], AbstractAsyncContextManager[Store]]) -> None:
        self.url = url
        self.schema = schema
        self.open = open_store


@pytest.fixture
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Place]]:
    numbers = count()
    with ExitStack() as schemas:

        def make(kind: str) -> Place:
            if kind == "sqlite":
                path = tmp_path / f"{next(numbers)}.db"
                return Place(f"sqlite:{path}", "unused", partial(open_sqlite_store, path))
            from service.storage.postgres import open_postgres_store

            server = running(request.config)
            schema = schemas.enter_context(server.new_schema())
            return Place(server.url, schema, partial(open_postgres_store, server.url, schema_name=schema))

        yield make


async def fill(store: Store) -> None:
    """Sessions with all that a store keeps in a way of its own."""
    await store.create_session(msgspec.structs.replace(a_session("s"), title="A title", metadata={"a": "\x00"}), now=T0)
    parents = {"a": None, "b": "a", "b2": "a", "b3": "a", "c": "b", "d": "b2", "r": None}
    for name, parent in parents.items():
        turn = a_turn(name, parent=parent, texts=[f"word {name}", "Ähre \x00 日本"])
        await store.begin_turn(turn, now=T0)
        end = ended(turn, text=f"answer {name}", reasoning="hm", usage=Usage(input_tokens=1, output_tokens=2))
        runs = (Run(STARTED), *said("hm"), *said("answer", f" {name}", item=1))
        await store.end_turn(end, runs=runs, now=T0)
    await store.delete_turns("s", "b3", now=T0)
    await store.delete_item("s", "d-out", now=T0)
    call = Item(id="call", type="function_call", role="assistant", text="{}", call_id="1", name="f")
    await store.add_turns([msgspec.structs.replace(an_added_turn("e", parent="c"), output=(call,))], now=T0, key=KEY)
    await store.create_session(a_session("ann/s"), now=T0)
    long = msgspec.structs.replace(an_added_turn("long", replied="word é " * 30_000), session_id="ann/s")
    await store.add_turns([long], now=T0)
    gone = msgspec.structs.replace(an_added_turn("gone", parent="long", asked="gone"), session_id="ann/s")
    await store.add_turns([gone], now=T0, key=GONE)
    await store.delete_turns("ann/s", "gone", now=T0)
    await store.update_session("s", SessionPatch(title="Another title"), now=at(1))
    await store.create_session(msgspec.structs.replace(a_session("z"), title="title"), now=T0)
    await store.mark_deleted("z", now=T0)
    await store.create_session(msgspec.structs.replace(a_session("x"), title="title word"), now=T0)
    await store.begin_turn(a_turn("open", "x", texts=["word"]), now=T0)  # its process is gone after this
    await fill_with_lasting_turns(store)


async def fill_with_lasting_turns(store: Store) -> None:
    """Turns that outlive their process: one that has ended, one that is suspended, and those of the process."""
    await store.create_session(a_session("lasts"), now=T0)
    await store.create_session(a_session("waits"), now=T0)
    for name, session in (("resumed", "lasts"), ("suspended", "lasts"), ("dying", "waits"), ("queued", "waits")):
        turn = a_lasting_turn(name, session, state="queued" if name == "queued" else "running")
        await store.begin_turn(turn, now=T0)
        if session == "waits":
            continue
        await store.suspend_turns([so_far(turn, "Hel", "lo \x00" * 20_000)], now=T0)
        if name == "resumed":
            (adopted,) = await adopt(store, session, now=T0)
            end = msgspec.structs.replace(ended(adopted.turn, text=adopted.turn.text + "!"), last_seq=6)
            await store.end_turn(end, runs=(*adopted.runs, *said("!")), now=T0, after=4)
    kept = a_checkpoint("dying", "Hel", session="waits")
    await store.checkpoint_turns([msgspec.structs.replace(kept, runs=(Run(STARTED), *kept.runs))])


async def found(store: Store, query: str) -> list[Match]:
    page = await store.search_sessions(query, limit=100, after=None, status=None, now=T0)
    assert page.next is None
    return list(page.data)


async def seen(store: Store) -> object:
    """All that readers see."""
    everything = await contents(store, now=T0)
    searches = [await found(store, query) for query in QUERIES]
    trees = [(await store.list_tree(name, limit=99, after=None, now=T0)).data for name in everything]
    places = [
        await store.find_places(name, [node.id for node in tree]) for name, tree in zip(everything, trees, strict=True)
    ]
    paths = [
        list(await store.read_path(name, node.id, bytes_max=None))
        for name, tree in zip(everything, trees, strict=True)
        for node in tree
    ]
    listed = await store.list_sessions(limit=9, after=None, status=None, now=T0, metadata={"a": "\x00"})
    keys = []
    for key in (KEY, GONE):
        with pytest.raises(RepeatedError) as kept:
            await store.check_key(key, now=T0)
        keys.append((kept.value.session_id, kept.value.turn_id, kept.value.is_gone, kept.value.fingerprint))
    return everything, searches, trees, places, paths, listed.data, keys


async def copied(source: Place, target: Place) -> Contents:
    call = partial(copy_store, source.url, target.url, source_schema=source.schema, target_schema=target.schema, now=T0)
    return (await trio.to_thread.run_sync(call))[1]


@pytest.mark.parametrize(("source_kind", "target_kind"), [*product(KINDS, KINDS)])
async def test_a_copy_has_all_of_its_source_for_every_reader(
    new_place: Callable[[str], Place], source_kind: str, target_kind: str
) -> None:
    source, target = new_place(source_kind), new_place(target_kind)
    async with source.open() as store:
        await fill(store)
    copy = await copied(source, target)
    assert (copy.sessions, copy.turns, copy.keys) == (5, 13, 2)
    async with source.open() as store:
        expected = await seen(store)
    async with target.open() as store:
        assert await seen(store) == expected
        assert await suspended_in(store, limit=9) == ["lasts", "waits"]
        (suspended,) = await adopt(store, "lasts", now=T0)
        assert suspended.runs[-1] == resumed_run(Resumed(4, 2, "continue", 80_003))
        dying, queued = await adopt(store, "waits", now=T0)
        assert (dying.turn.text, dying.turn.last_seq) == ("Hel", 2 * SEQ_AFTER_CRASH + 1)
        assert (queued.turn.state, queued.runs) == ("queued", ())
        newest = a_turn("new", "ann/s", parent="long", texts=["word"])
        await store.begin_turn(newest, now=T0)
        await store.end_turn(ended(newest), runs=said("Hi"), now=T0)
        assert (await found(store, "word"))[0].turn_id == "new", "it is newer than what was copied"
        copy_of = await store.fork_session("s", at="e", copy_id="copy", now=T0)
        assert copy_of.message_count == 11
        assert (await store.begin_turn(a_turn("b4", parent="a"), now=T0)).siblings.place == 3
        await store.delete_turns("s", "b", now=T0)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_with_something_in_it_or_in_use_is_not_copied_into(
    new_place: Callable[[str], Place], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "postgres":
        monkeypatch.setattr("service.storage.postgres.whole_store.LEASE_S", 0)
        monkeypatch.setattr("service.storage.postgres.whole_store.BEAT_S", 0)
    source, target = new_place("sqlite"), new_place(kind)
    async with source.open() as store:
        await fill(store)
    with pytest.raises(RefusedError, match="itself"):
        await copied(source, source)
    async with target.open() as store:
        with pytest.raises(StartupError, match="stop the service"):
            await copied(source, target)
        with pytest.raises(StartupError, match="stop the service"):
            await copied(target, new_place("sqlite"))
        await store.create_session(a_session(), now=T0)
        before = await contents(store, now=T0)
    with pytest.raises(RefusedError, match="not empty"):
        await copied(source, target)
    async with target.open() as store:
        assert await contents(store, now=T0) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_source_that_is_not_there_is_refused_and_not_made(new_place: Callable[[str], Place], kind: str) -> None:
    missing, target = new_place(kind), new_place("sqlite")
    for _ in range(2):
        with pytest.raises(StartupError, match=r"no store|is not there"):
            await copied(missing, target)


async def test_a_copy_that_differs_is_told(new_place: Callable[[str], Place], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = new_place("sqlite"), new_place("sqlite")
    async with source.open() as store:
        await fill(store)
    kept_runs = whole_store.kept_runs
    monkeypatch.setattr(
        "service.storage.sqlite.whole_store.kept_runs",
        lambda turn: () if turn.record.id == "c" else kept_runs(turn),
    )
    with pytest.raises(RefusedError, match="differs"):
        await copied(source, target)


def test_the_command_copies_and_says_what_it_has_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = f"sqlite:{tmp_path}/a.db", f"sqlite:{tmp_path}/b.db"

    async def make() -> None:
        async with open_sqlite_store(tmp_path / "a.db") as store:
            await store.create_session(a_session(), now=T0)

    trio.run(make)
    assert main(["copy", source, target]) == 0
    assert f"{target} has 1 sessions, 0 turns" in capsys.readouterr().out
    assert main(["copy", source, target]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["copy", "memory:", target]) == 78
    with pytest.raises(SystemExit):
        main(["copy", "mysql://x", target])
    assert "names a store that this version does not have" in capsys.readouterr().err
