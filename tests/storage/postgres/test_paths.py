"""Paths in PostgreSQL: chains of turns, and what is read of them."""

from random import Random
from typing import Any

import msgspec
import pytest

from service.storage import rules
from service.storage.postgres import PostgresStore, paths
from service.storage.postgres.connections import Db
from service.storage.records import LeftOut, TurnRecord
from service.storage.rules import TURN_BYTES
from tests.postgres_server import PostgresServer
from tests.storage.postgres.conftest import Run
from tests.storage.rows import T0, a_session, a_turn, ended, said
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_ephemeral import ephemeral

CHAINS = (
    "SELECT id, (SELECT id FROM {s}.turns AS first WHERE first.key = t.chain), depth FROM {s}.turns AS t ORDER BY key"
)


async def add(store: PostgresStore, *tree: tuple[str, str | None]) -> None:
    for name, parent in tree:
        await store.add_turns([an_added_turn(name, parent=parent)], now=T0)


async def test_a_conversation_is_one_chain_and_each_branch_another(store: PostgresStore, select: Run) -> None:
    await store.create_session(a_session(), now=T0)
    await add(store, ("a", None), ("b", "a"), ("c", "b"), ("b2", "a"), ("c2", "b2"), ("c3", "b2"), ("root", None))
    assert select(CHAINS) == [
        ("a", "a", 0),
        ("b", "a", 1),
        ("c", "a", 2),
        ("b2", "b2", 1),
        ("c2", "b2", 2),
        ("c3", "c3", 2),
        ("root", "root", 0),
    ]


async def test_a_deletion_frees_the_place_in_a_chain_for_the_turn_that_follows_next(
    store: PostgresStore, select: Run
) -> None:
    await store.create_session(a_session(), now=T0)
    await add(store, ("a", None), ("b", "a"), ("c", "b"), ("b2", "a"))
    await store.delete_turns("s", "b", now=T0)
    await store.begin_turn(a_turn("b3", parent="a"), now=T0)
    await store.begin_turn(a_turn("b4", parent="a"), now=T0)
    await store.begin_turn(a_turn("c3", parent="b3"), now=T0)
    assert select(CHAINS) == [("a", "a", 0), ("b2", "b2", 1), ("b3", "a", 1), ("b4", "b4", 1), ("c3", "a", 2)]
    assert [turn.id for turn in await store.read_path("s", "c3", bytes_max=None)] == ["a", "b3", "c3"]
    assert [turn.id for turn in await store.read_path("s", "b4", bytes_max=None)] == ["a", "b4"]


async def test_an_ephemeral_turn_takes_no_place_in_the_chain_of_its_parent(store: PostgresStore, select: Run) -> None:
    await store.create_session(a_session(), now=T0)
    await add(store, ("a", None))
    begun = await store.begin_turn(ephemeral(parent="a"), now=T0, path_bytes_max=None)
    assert [turn.id for turn in begun.path or ()] == ["a", "e"]
    await add(store, ("b", "a"))
    assert select(CHAINS) == [("a", "a", 0), ("e", "e", 1), ("b", "a", 1)]


@pytest.mark.parametrize("seed", range(3))
async def test_paths_of_any_tree_are_those_of_its_parents(store: PostgresStore, seed: int) -> None:
    """Deep trees with branches, of which parts are deleted while they grow."""
    random = Random(seed)
    await store.create_session(a_session(), now=T0)
    tree: dict[str, TurnRecord] = {}

    def path_to(name: str | None) -> list[TurnRecord]:
        return [] if name is None else [*path_to(tree[name].parent), tree[name]]

    for number in range(60):
        newest = list(tree)[-3:]
        parent = random.choice([None, *newest, *newest, *newest, *tree]) if tree else None
        turn = an_added_turn(f"t{number}", parent=parent, asked="x" * random.randint(1, 9))
        await store.add_turns([turn], now=T0)
        tree[turn.id] = turn
        if random.random() < 0.07:
            gone = random.choice(list(tree))
            await store.delete_turns("s", gone, now=T0)
            tree = {name: it for name, it in tree.items() if all(above.id != gone for above in path_to(name))}
    for name in tree:
        path = path_to(name)
        assert await store.read_path("s", name, bytes_max=None) == path
        assert await store.measure_path("s", name) == sum((it.in_prompts for it in path), LeftOut())
        size = random.randint(1, len(path))
        bound = sum(it.message_bytes + TURN_BYTES for it in path[-size:])
        assert await store.read_path("s", name, bytes_max=bound) == path[-size:]
        first = random.choice(path)
        rest = path[path.index(first) :][:size]
        assert await store.list_path("s", name, limit=size, first=first.id) == rest
        aside = [it.id for it in tree.values() if it not in path]
        if aside:
            assert list(await store.list_path("s", name, limit=9, first=random.choice(aside))) == []


async def test_a_path_of_many_chains_is_whole_and_its_end_is_read_alone(store: PostgresStore) -> None:
    await store.create_session(a_session(), now=T0)
    names = [f"t{n}" for n in range(40)]
    for above, name in zip([None, *names], names, strict=False):
        await add(store, (f"before {name}", above), (name, above))
    assert [turn.id for turn in await store.read_path("s", "t39", bytes_max=None)] == names
    assert [turn.id for turn in await store.read_path("s", "t39", bytes_max=3 * (TURN_BYTES + 7))] == names[-3:]
    assert [turn.id for turn in await store.list_path("s", "t39", limit=3, first="t20")] == names[20:23]


async def test_an_open_turn_is_found_as_far_up_as_turns_have_not_started(store: PostgresStore) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn("open"), now=T0)
    above = "open"
    for number in range(3):
        turn = a_turn(f"t{number}", parent=above, state="queued")
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn, "cancelled"), runs=(), now=T0)
        above = turn.id
    [key] = await store._look(lambda db: db.execute("SELECT key FROM {s}.sessions").fetchall())

    async def found(turn: str) -> str | None:
        return await store._look(lambda db: paths.find_open(db, key[0], turn))

    assert await found("t2") == "open"
    await store.end_turn(ended(a_turn("open")), runs=(), now=T0)
    assert await found("t2") is None


async def test_a_path_costs_its_own_turns_and_no_others(
    store: PostgresStore, postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create_session(a_session(), now=T0)
    await add(store, ("a", None), ("b", "a"), ("b2", "a"), ("b3", "a"))
    turns_of_others = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(800)]
    for number in range(3):
        await store.create_session(a_session(f"s{number}"), now=T0)
        await store.add_turns(
            [
                msgspec.structs.replace(
                    it,
                    id=f"{number}-{it.id}",
                    parent=it.parent and f"{number}-{it.parent}",
                    session_id=f"s{number}",
                )
                for it in turns_of_others
            ],
            now=T0,
        )
    postgres.run(f"ANALYZE {schema}.turns, {schema}.sessions")
    executed: list[tuple[str, Any]] = []
    really = Db.execute

    def execute(self: Db, statement: str, parameters: Any = None) -> Any:
        executed.append((statement, parameters))
        return really(self, statement, parameters)

    monkeypatch.setattr(Db, "execute", execute)
    await store.read_path("s", "b3", bytes_max=None)
    await store.read_path("s", "b3", bytes_max=1000)
    await store.measure_path("s", "b3")
    await store.list_path("s", "b3", limit=5, first="a")
    await store.begin_turn(a_turn("c", parent="b3"), now=T0, path_bytes_max=None, branches=True)
    await store.start_turn("c", now=T0)
    await store.end_turn(ended(a_turn("c", parent="b3")), runs=said("Hi"), now=T0)
    await store.get_turn("s", "b3", now=T0)
    await store.list_turns("s", limit=3, after=None, now=T0, parent="a")
    await store.read_events("s", "b3")
    monkeypatch.undo()
    read = [(statement, parameters) for statement, parameters in executed if "{s}.turns" in statement]
    assert len(read) >= 12

    def visited(node: dict[str, Any]) -> int:
        rows = sum(map(visited, node.get("Plans", ())))
        if node.get("Relation Name") == "turns" and "Scan" in node["Node Type"]:
            rows += node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
            assert node["Node Type"] != "Seq Scan", node
        return rows

    async def explain(statement: str, parameters: Any) -> int:
        def run(db: Db) -> int:
            [(plan,)] = really(db, f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).fetchall()
            return visited(plan[0]["Plan"])

        return await store._looking.call(run, shares=True)

    for statement, parameters in read:
        if "UPDATE" not in statement and "INSERT" not in statement and "DELETE" not in statement:
            assert await explain(statement, parameters) <= 12, statement


async def test_a_bound_on_a_short_path_is_that_of_a_read(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.create_session(a_session(), now=T0)
    above = None
    for number in range(6):
        await add(store, (f"t{number}", above))
        above = f"t{number}"
    for bytes_max in (0, 150, 400, 550, 100_000):
        turn = a_turn(f"at {bytes_max}", parent=above)
        begun = await store.begin_turn(turn, now=T0, path_bytes_max=bytes_max)
        assert begun.path == await store.read_path("s", turn.id, bytes_max=bytes_max)
    monkeypatch.setattr(rules, "SHORT_PATH_BYTES", 20)
    assert (await store.begin_turn(a_turn("long", parent=above), now=T0, path_bytes_max=None)).path is None
