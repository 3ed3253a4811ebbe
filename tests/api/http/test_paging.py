"""A page has an end in bytes, too, and nothing is lost between two of them."""

from collections.abc import Sequence
from itertools import chain

import msgspec
import pytest
from trio.testing import MockClock

from service.api.http import paging
from service.api.http.paging import PAGE_BYTES_MAX, make_page
from service.api.native.turn_wire import Turn
from service.storage.page_size import fitting
from service.storage.records import Page, TurnRecord
from tests.api.inprocess import Api, open_api
from tests.storage.rows import a_turn

QUARTER = PAGE_BYTES_MAX // 4
ENVELOPE_BYTES = 400
"""What an answer has beside its rows: the cursor, the names, and the commas."""


class Turns:
    """A listing of turns with inputs of these sizes, which notes the bounds in bytes that it was asked for."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.bounds: list[int] = []
        self._sizes = sizes

    async def __call__(self, *, limit: int, after: str | None, bytes_max: int) -> Page[TurnRecord]:
        self.bounds.append(bytes_max)
        start = int(after or 0)
        end = start + min(limit, fitting(self._sizes[start:], bytes_max=bytes_max))
        data = tuple(
            a_turn(f"turn_{n}", texts=["é" * (size // 2)]) for n, size in enumerate(self._sizes[start:end], start)
        )
        cursors = tuple(str(n + 1) for n in range(start, start + len(data)))
        return Page(data=data, next=str(end) if end < len(self._sizes) else None, cursors=cursors)


@pytest.mark.parametrize(
    ("sizes", "limit", "ends_at"),
    [
        ([10] * 5, 20, None),
        ([10] * 50, 5, "5"),
        ([10] * 100, 100, None),
        ([QUARTER] * 50, 100, "3"),  # the fourth does not fit: a turn is some bytes more than its text
        ([QUARTER - 1000] * 50, 100, "4"),
        ([10] * 20 + [QUARTER] * 50, 100, "23"),
        ([PAGE_BYTES_MAX] + [0] * 9, 100, "1"),
        ([0, PAGE_BYTES_MAX, 0], 100, "1"),
        ([], 100, None),
    ],
)
async def test_a_page_ends_at_its_rows_or_its_bytes(sizes: list[int], limit: int, ends_at: str | None) -> None:
    turns = Turns(sizes)
    page = await make_page(turns, Turn.of, limit=limit, after=None)
    assert (turns.bounds, page.next) == ([PAGE_BYTES_MAX], ends_at)
    assert [msgspec.json.decode(row)["id"] for row in page.data] == [
        f"turn_{n}" for n in range(int(ends_at or len(sizes)))
    ]


async def test_no_answer_is_larger_than_the_bound_and_a_larger_row_comes_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any bound gives the same listings. Escapes make a row six times as large as its text."""
    async with open_api(model_url="scripted:?tokens=1") as api:
        session_id = await api.new_session()
        texts = ["a", "\x01" * 3000, "b" * 9000, "é", "c" * 2000, "d" * 2000, "\x01", "e" * 6000]
        turns = [
            (await api.call("POST", f"/sessions/{session_id}/turns", {"input": text})).json["id"] for text in texts
        ]
        sessions = [session_id, *[await api.new_session(system_message=text) for text in texts]][::-1]
        calls: dict[str, list[str] | None] = {
            f"/sessions/{session_id}/turns": turns,
            f"/sessions/{session_id}/messages": None,
            "/sessions": sessions,
        }
        for path, ids in calls.items():
            (whole,) = await _pages(api, path)
            assert ids in (None, whole)
            for bytes_max in (1, 3000, 9000, 21_000, 40_000):
                monkeypatch.setattr(paging, "PAGE_BYTES_MAX", bytes_max)
                for limit in (1, 2, 3, 100):
                    pages = await _pages(api, path, limit=limit, bytes_max=bytes_max)
                    assert list(chain(*pages)) == whole, (path, bytes_max, limit)
            monkeypatch.undo()


async def test_large_turns_come_in_more_pages(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1") as api:
        session_id = await api.new_session()
        path = f"/sessions/{session_id}/turns"
        turns = [(await api.call("POST", path, {"input": "x" * QUARTER})).json["id"] for _ in range(7)]
        assert await _pages(api, path, bytes_max=PAGE_BYTES_MAX) == [turns[:3], turns[3:6], turns[6:]]


async def _pages(api: Api, path: str, *, limit: int = 100, bytes_max: int = PAGE_BYTES_MAX) -> list[list[str]]:
    pages: list[list[str]] = []
    after = ""
    while True:
        reply = await api.call("GET", f"{path}?limit={limit}{after}")
        page = reply.json
        assert len(page["data"]) == 1 or len(reply.body) <= bytes_max + ENVELOPE_BYTES
        pages.append([row["id"] for row in page["data"]])
        if page["next"] is None:
            return pages
        assert page["data"]
        after = f"&after={page['next']}"
