"""Pages that are bounded in bytes: any bounds give the same listing, and no text is read that is not on the page."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from random import Random
from typing import Any

import apsw
import msgspec
import pytest

from service.storage.page_size import fitting
from service.storage.records import Page
from service.storage.sqlite import SqliteStore, database, open_sqlite_store
from service.storage.store import Store
from tests.storage.rows import T0, a_session, a_turn, ended

SIZES = (0, 3, 40, 1, 0, 90, 90, 2, 5, 7, 300, 1)
ROWS = len(SIZES)
LARGE = 600_000


@pytest.mark.parametrize(
    ("sizes", "bytes_max", "rows_min", "rows"),
    [
        ([], 10, 1, 0),
        ([5, 5, 1], 10, 1, 2),
        ([5, 5, 1], 11, 1, 3),
        ([50, 5], 10, 1, 1),
        ([50, 50, 50], 10, 2, 2),
        ([50], 10, 2, 1),
        ([50, 50], None, 1, 2),
    ],
)
def test_a_page_ends_before_the_row_that_does_not_fit(
    sizes: list[int], bytes_max: int | None, rows_min: int, rows: int
) -> None:
    assert fitting(sizes, bytes_max=bytes_max, rows_min=rows_min) == rows


def test_the_size_of_a_turn_has_all_its_large_fields() -> None:
    turn = a_turn(texts=["é"])
    (item,) = turn.input
    reasoning = msgspec.structs.replace(item, type="reasoning", text="four", encrypted="abc", upstream="12345")
    assert msgspec.structs.replace(turn, output=(reasoning,)).text_bytes == 2 + 4 + 3 + 5


async def fill(store: Store) -> list[str]:
    """Sessions with texts of these sizes, and turns of one session; the session of the turns is the oldest."""
    await store.create_session(a_session("s"), now=T0)
    parent = None
    for n, size in enumerate(SIZES):
        text = "é" * (size // 2) + "x" * (size % 2)
        turn = a_turn(f"t{n}", parent=parent, texts=[text])
        if n % 4 == 2:
            item = msgspec.structs.replace(turn.input[0], text="", upstream=text)
            turn = msgspec.structs.replace(turn, input=(item,))
        await store.begin_turn(turn, now=T0)
        await store.end_turn(ended(turn, text=text if n % 2 else ""), runs=(), now=T0)
        parent = turn.id
        session = msgspec.structs.replace(
            a_session(f"s{n:02}", created=n + 1),
            system_message=text if n % 3 == 0 else None,
            title=text if n % 3 == 1 else None,
            metadata={"k": text} if n % 3 == 2 else {},
        )
        await store.create_session(session, now=T0)
    return [f"t{n}" for n in range(ROWS)]


async def pages(
    read: Callable[..., Any], bounds: Iterator[tuple[int, int]]
) -> AsyncGenerator[tuple[Page[Any], int], None]:
    after = None
    while True:
        limit, bytes_max = next(bounds)
        page = await read(limit=limit, after=after, bytes_max=bytes_max)
        assert 1 <= len(page.data) <= limit
        assert len(page.cursors) == len(page.data)
        yield page, bytes_max
        if page.next is None:
            return
        assert page.next == page.cursors[-1]
        after = page.next


def bounds_of(seed: int) -> Iterator[tuple[int, int]]:
    random = Random(seed)
    while True:
        yield random.randint(1, ROWS + 2), random.choice([1, 2, 10, 90, 180, 181, 400, 10_000])


async def test_any_bounds_of_pages_give_the_same_listing(store: Store) -> None:
    turns = await fill(store)
    sessions = [f"s{n:02}" for n in reversed(range(ROWS))] + ["s"]
    listings: dict[str, tuple[list[str], Callable[..., Any]]] = {
        "turns": (turns, lambda **page: store.list_turns("s", now=T0, **page)),
        "sessions": (sessions, lambda **page: store.list_sessions(status=None, now=T0, **page)),
        "idle": (sessions, lambda **page: store.list_sessions(status="idle", now=T0, **page)),
    }
    for name, (expected, read) in listings.items():
        for seed in range(60):
            found: list[str] = []
            async with aclosing(pages(read, bounds_of(seed))) as listing:
                async for page, bytes_max in listing:
                    assert len(page.data) == 1 or sum(row.text_bytes for row in page.data) <= bytes_max, (name, seed)
                    found += [row.id for row in page.data]
            assert found == expected, (name, seed)


async def test_a_listing_goes_on_after_any_row_of_a_page(store: Store) -> None:
    turns = await fill(store)
    page = await store.list_turns("s", limit=ROWS, after=None, now=T0)
    for n, cursor in enumerate(page.cursors, 1):
        rest = await store.list_turns("s", limit=ROWS, after=cursor, now=T0)
        assert [turn.id for turn in rest.data] == turns[n:]
    sessions = await store.list_sessions(limit=ROWS, after=None, status=None, now=T0)
    for n, cursor in enumerate(sessions.cursors, 1):
        rest_of_them = await store.list_sessions(limit=ROWS, after=cursor, status=None, now=T0)
        assert rest_of_them.data[: ROWS - n] == sessions.data[n:]


async def test_a_path_in_parts_has_two_turns_at_least_and_then_as_many_as_fit(store: Store) -> None:
    turns = await fill(store)
    for bytes_max in (1, 10, 180, 400, 10_000):
        for limit in (2, 3, ROWS):
            found: list[str] = []
            first: str | None = None
            for _ in range(ROWS):
                if found == turns:
                    break
                part = await store.list_path("s", turns[-1], limit=limit, first=first, bytes_max=bytes_max)
                assert len(part) <= limit
                assert len(part) == 2 or sum(turn.text_bytes for turn in part) <= bytes_max
                found += [turn.id for turn in part if turn.id != first]
                first = found[-1]
            assert found == turns


@pytest.fixture
async def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> AsyncIterator[tuple[SqliteStore, dict[str, int]]]:
    """A store with rows of 600 kB, and the bytes of each column that its readers have read since."""
    async with open_sqlite_store(tmp_path / "a.db") as store:
        await store.create_session(a_session("s"), now=T0)
        parent = None
        for n in range(6):
            turn = a_turn(f"t{n}", parent=parent, texts=["x" * LARGE])
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn), runs=(), now=T0)
            parent = turn.id
            large = msgspec.structs.replace(a_session(f"s{n}", created=n + 1), system_message="x" * LARGE)
            await store.create_session(large, now=T0)
    read = {"bytes": 0}
    connect = database.connect

    def connecting(*args: Any, **kwargs: Any) -> apsw.Connection:
        db = connect(*args, **kwargs)

        def trace(_: object, row: tuple[object, ...]) -> tuple[object, ...]:
            read["bytes"] += sum(len(value) for value in row if isinstance(value, str | bytes))
            return row

        db.row_trace = trace
        return db

    monkeypatch.setattr(database, "connect", connecting)
    async with open_sqlite_store(tmp_path / "a.db") as store:
        read["bytes"] = 0
        yield store, read


async def test_sqlite_reads_no_text_that_is_not_on_the_page(counted: tuple[SqliteStore, dict[str, int]]) -> None:
    store, read = counted
    calls: list[Callable[[], Any]] = [
        lambda: store.list_turns("s", limit=100, after=None, now=T0, bytes_max=2 * LARGE + 1000),
        lambda: store.list_sessions(limit=100, after=None, status=None, now=T0, bytes_max=2 * LARGE + 1000),
        lambda: store.list_path("s", "t5", limit=100, first=None, bytes_max=1),
    ]
    for call in calls:
        read["bytes"] = 0
        await call()
        assert 2 * LARGE <= read["bytes"] < 2 * LARGE + 10_000
