"""Ended turns in PostgreSQL that are too long for one row."""

from typing import Any

import msgspec
import pytest

from service.storage.event_rows import ROW_LENGTH_MAX
from service.storage.postgres import PostgresStore
from service.storage.postgres.connections import Db
from service.storage.records import EndResult
from tests.storage.postgres.conftest import Run
from tests.storage.rows import T0, a_session, a_turn, ended, said, told

PIECE = 4096
PIECES = 4 * 1024  # 16 MiB of text


async def _keep_long_turn(store: PostgresStore, pieces: int) -> list[str]:
    texts = [f"{number:06d}{'x' * (PIECE - 6)}" for number in range(pieces)]
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    turn = msgspec.structs.replace(ended(a_turn(), text="".join(texts)), last_seq=pieces + 1)
    assert await store.end_turn(turn, runs=said(*texts), now=T0) is EndResult.KEPT
    return texts


async def test_a_page_of_a_very_long_reply_reads_the_rows_that_it_is_on(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = await _keep_long_turn(store, PIECES)
    read: list[int] = []
    really = Db.execute

    def execute(self: Db, statement: str, parameters: Any = None) -> Any:
        cursor = really(self, statement, parameters)
        rows = cursor.fetchall()
        read.append(sum(len(value) for row in rows for value in row if isinstance(value, bytes | str)))
        cursor.scroll(0, mode="absolute")
        return cursor

    monkeypatch.setattr(Db, "execute", execute)
    for after in (0, 1, 2000, PIECES - 1):
        read.clear()
        page = await store.read_events("s", "t", after=after)
        assert page.text.startswith(texts[after])
        assert (page.kept, page.ended, page.text_length) == (PIECES, True, PIECES * PIECE)
        assert sum(read) < 2 * ROW_LENGTH_MAX + 1000
    read.clear()
    turn = await store.get_turn("s", "t", now=T0, with_texts=False)
    assert (turn.text, sum(read) < 2000) == ("", True)
    assert (await store.read_events("s", "t", after=PIECES)).runs == ()


async def test_a_long_turn_is_read_whole_beside_short_ones_with_few_statements(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch, select: Run
) -> None:
    texts = await _keep_long_turn(store, 40)
    above = "t"
    for number in range(1, 4):
        turn = a_turn(f"t{number}", parent=above)
        await store.begin_turn(turn, now=T0)
        await store.end_turn(
            ended(turn, text="y" * (ROW_LENGTH_MAX + number)), runs=said("y" * (ROW_LENGTH_MAX + number)), now=T0
        )
        above = turn.id
    assert await told(store, "s", "t") == texts
    assert select("SELECT count(*) FROM {s}.turns WHERE runs IS NULL AND octet_length(output) < 200") == [(4,)]
    executed: list[str] = []
    really = Db.execute

    def execute(self: Db, statement: str, parameters: Any = None) -> Any:
        executed.append(statement)
        return really(self, statement, parameters)

    monkeypatch.setattr(Db, "execute", execute)
    path = await store.read_path("s", above, bytes_max=None)
    assert [len(turn.text) for turn in path] == [40 * PIECE, *(ROW_LENGTH_MAX + number for number in range(1, 4))]
    assert path[0].text == "".join(texts)
    assert len(executed) == 2
    page = await store.list_turns("s", limit=10, after=None, now=T0)
    assert list(page.data) == list(path)


async def test_the_pages_of_a_turn_go_with_its_session(store: PostgresStore, select: Run) -> None:
    await _keep_long_turn(store, 40)
    assert select("SELECT count(*) > 2 FROM {s}.event_pages") == [(True,)]
    await store.mark_deleted("s", now=T0)
    await store.remove_deleted("s")
    assert select("SELECT count(*) FROM {s}.event_pages") == [(0,)]
