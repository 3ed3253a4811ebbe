"""A page has an end in bytes, too, and nothing is lost between two of them."""

from collections.abc import Sequence
from itertools import chain

import msgspec
import pytest
from trio.testing import MockClock

from service.api.http.paging import PAGE_BYTES_MAX, read_page
from service.api.native.wire import Turn
from service.storage.records import Page, TurnRecord
from tests.api.inprocess import Api, open_api
from tests.storage.rows import a_turn

MIB = 1024 * 1024


class Turns:
    """A listing of turns with inputs of these sizes, which notes what it was asked for."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.limits: list[int] = []
        self._sizes = sizes

    async def __call__(self, *, limit: int, after: str | None) -> Page[TurnRecord]:
        self.limits.append(limit)
        start = int(after or 0)
        end = start + limit
        data = tuple(
            a_turn(f"turn_{n}", texts=["é" * (size // 2)]) for n, size in enumerate(self._sizes[start:end], start)
        )
        return Page(data=data, next=str(end) if end < len(self._sizes) else None)


@pytest.mark.parametrize(
    ("sizes", "limit", "limits", "ends_at"),
    [
        ([10] * 5, 20, [10], None),
        ([10] * 50, 5, [5], "5"),
        ([10] * 50, 25, [10, 10, 5], "25"),
        ([10] * 100, 100, [10] * 10, None),
        ([MIB] * 50, 100, [10], "10"),
        ([10] * 20 + [MIB] * 50, 100, [10] * 3, "30"),
        ([PAGE_BYTES_MAX] + [0] * 9, 100, [10], None),
        ([], 100, [10], None),
    ],
)
async def test_a_page_ends_at_its_rows_or_its_bytes(
    sizes: list[int], limit: int, limits: list[int], ends_at: str | None
) -> None:
    turns = Turns(sizes)
    page = await read_page(turns, Turn.of, limit=limit, after=None)
    assert (turns.limits, page.next) == (limits, ends_at)
    assert [msgspec.json.decode(row)["id"] for row in page.data] == [
        f"turn_{n}" for n in range(int(ends_at or len(sizes)))
    ]


async def test_large_turns_and_sessions_come_in_more_pages(autojump_clock: MockClock) -> None:
    async with open_api(model_url="scripted:?tokens=1") as api:
        session_id = await api.new_session()
        large = "x" * (256 * 1024)
        turns = [
            (await api.call("POST", f"/sessions/{session_id}/turns", {"input": large})).json["id"] for _ in range(23)
        ]
        assert await _pages(api, f"/sessions/{session_id}/turns") == [turns[:20], turns[20:]]
        messages = await _pages(api, f"/sessions/{session_id}/messages")
        assert list(map(len, messages)) == [40, 6]
        assert len(set(chain(*messages))) == 46
        sessions = [session_id, *[await api.new_session(system_message=large) for _ in range(22)]][::-1]
        assert await _pages(api, "/sessions") == [sessions[:20], sessions[20:]]


async def _pages(api: Api, path: str) -> list[list[str]]:
    pages: list[list[str]] = []
    after = ""
    while True:
        page = (await api.call("GET", f"{path}?limit=100{after}")).json
        pages.append([row["id"] for row in page["data"]])
        if page["next"] is None:
            return pages
        after = f"&after={page['next']}"
