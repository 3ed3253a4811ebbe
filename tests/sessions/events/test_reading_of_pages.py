"""A replay reads a page some events at a time: exact from any seq, and in time that the events determine."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.sessions.events.events import Piece
from service.sessions.events.kept_events import Place, events_of, place_after
from service.sessions.events.replay import Replay, Replays
from service.storage.memory import MemoryStore
from service.storage.pieces import CALL, STARTED, Run, count, run_of
from service.storage.records import EventsPage, Item, TurnRecord
from tests.storage.rows import a_turn, ended

ITEMS = (
    Item(id="m", role="assistant", text=""),
    Item(id="c", type="function_call", role="assistant", text="", call_id="1", name="f"),
)
TURN = msgspec.structs.replace(ended(a_turn()), output=ITEMS)

lengths = st.lists(st.sampled_from([0, 1, 7, 254, 255, 256, 510, 700]), min_size=1, max_size=6)
runs = st.lists(
    st.builds(run_of, st.integers(0, 1), lengths) | st.builds(Run, st.sampled_from([STARTED, CALL - 1])), max_size=8
)


def a_page(runs: Iterable[Run], *, after: int = 0) -> EventsPage:
    runs = tuple(runs)
    text = "".join(chr(256 + number % 50_000) for number in range(sum(run.length for run in runs)))
    return EventsPage(after=after, runs=runs, text=text, kept=after + count(runs), ended=True)


@given(runs=runs, first=st.integers(0, 50), second=st.integers(0, 50), events_max=st.integers(1, 60))
def test_a_page_is_read_the_same_from_any_place(runs: list[Run], first: int, second: int, events_max: int) -> None:
    page = a_page(runs, after=9)
    kept = count(runs)
    whole, end = events_of(TURN, page, Place(9), events_max=kept + 1)
    assert [event.seq for event in whole] == [*range(10, 10 + kept)]
    assert "".join(event.text for event in whole if isinstance(event, Piece)) == page.text
    first, second = sorted((min(first, kept), min(second, kept)))
    place = place_after(page, 9 + second, place=place_after(page, 9 + first, place=Place(9)))
    assert place == place_after(page, 9 + second, place=Place(9))
    events, after = events_of(TURN, page, place, events_max=events_max)
    assert events == whole[second : second + events_max]
    assert after == place_after(page, 9 + second + len(events), place=Place(9))
    assert end == place_after(page, 9 + kept, place=Place(9))


@given(lengths=lengths, events=st.integers(0, 7), start=st.integers(0, 6))
def test_a_run_ends_after_so_many_events(lengths: list[int], events: int, start: int) -> None:
    start = min(start, len(lengths))
    run, before = run_of(0, lengths), run_of(0, lengths[:start])
    end = run.end_of(events, len(before.lengths))
    assert run.lengths[len(before.lengths) : end] == run_of(0, lengths[start : start + events]).lengths


class Work:
    """How many runs and bytes of lengths a reader has visited."""

    def __init__(self) -> None:
        self.visited = 0


WORK = Work()


class CountedBytes(bytes):
    def count(self, value: Any, start: Any = 0, end: Any = None, /) -> int:
        WORK.visited += len(range(*slice(start, end).indices(len(self))))
        return super().count(value, start, len(self) if end is None else end)

    def __iter__(self) -> Iterator[int]:
        WORK.visited += len(self)
        return super().__iter__()

    def __contains__(self, value: object) -> bool:
        WORK.visited += len(self)
        return super().__contains__(value)  # type: ignore[operator]

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        WORK.visited += len(part) if isinstance(part, bytes) else 1
        return part


class CountedRuns(tuple[Run, ...]):
    __slots__ = ()

    def __iter__(self) -> Iterator[Run]:
        for run in super().__iter__():
            WORK.visited += 1
            yield run

    def __getitem__(self, key: Any) -> Any:
        WORK.visited += 1
        return super().__getitem__(key)


class OnePage(MemoryStore):
    def __init__(self, page: EventsPage) -> None:
        super().__init__()
        self._page = page

    async def read_events(self, *_: object, **__: object) -> EventsPage:
        return self._page


MANY = 40_000


@pytest.mark.parametrize("taken", [512, 100], ids=["whole reads", "parts of reads"])
@pytest.mark.parametrize(
    "runs",
    [[run_of(0, [1] * MANY)], [run_of(0, [256, *[1] * 7] * (MANY // 8))], [run_of(n % 2, [1]) for n in range(MANY)]],
    ids=["one run", "one run of long pieces", "many runs"],
)
async def test_the_work_of_a_replay_grows_with_its_events_only(runs: Sequence[Run], taken: int) -> None:
    counted = CountedRuns(Run(run.item, CountedBytes(run.lengths)) for run in runs)
    page = msgspec.structs.replace(a_page(runs), runs=counted)
    turn = msgspec.structs.replace(TURN, last_seq=MANY + 1)

    async def read_turn(_with_texts: bool) -> TurnRecord:
        return turn

    replay: Replay = await Replays(OnePage(page), store_timeout_s=5).open("s", "t", after=0, read_turn=read_turn)
    WORK.visited = 0
    seq = reads = 0
    while seq < MANY:
        await replay.load_after(seq)
        events = replay.read_after(seq)
        assert events[0].seq == seq + 1
        seq = events[:taken][-1].seq
        reads += 1
    assert WORK.visited < 10 * 512 * reads
