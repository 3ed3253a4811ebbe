"""Replays of turns that have ended: all readers of one turn share a log, and it is exact in every situation."""

import gc
from datetime import datetime

import msgspec
import pytest
import trio
import trio.testing

from service.api.native.event_frames import encode_frame
from service.errors import EventsLostError, OwnedElsewhereError, SessionNotFoundError
from service.sessions.events.event_log import Events
from service.sessions.events.events import TurnCompleted, TurnDelta
from service.storage.memory import MemoryStore
from service.storage.records import EventsPage, Owner, TurnRecord
from tests.sessions.puppet import frames_in, open_stage
from tests.storage.rows import a_turn, ended, said

TERMINAL = encode_frame(TurnCompleted(seq=4, finish_reason="stop", usage=None, text_length=3))
FRAMES = [*(encode_frame(TurnDelta(seq=seq, text=f"{seq}")) for seq in (1, 2, 3)), TERMINAL]
RUNNING = a_turn()
ENDED = msgspec.structs.replace(ended(RUNNING, text="123"), last_seq=4)


class Kept(MemoryStore):
    """A store with one turn, which has ended; counts how often its events are read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.turn: TurnRecord | None = ENDED
        self.kept = 3
        self.owner: Owner | None = None

    async def read_events(self, session_id: str, turn_id: str, *, after: int = 0, length_max: int = 0) -> EventsPage:
        """Two events at a time."""
        self.reads += 1
        texts = "123"[: self.kept][after : after + 2]
        ended = self.turn is not None and not self.turn.is_open
        page = EventsPage(after=after, runs=said(*texts), text=texts, kept=self.kept, ended=ended, text_length=3)
        await trio.lowlevel.checkpoint()
        return page

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime, with_texts: bool = True) -> TurnRecord:
        await trio.lowlevel.checkpoint()
        if self.turn is None:
            raise SessionNotFoundError(session_id)
        return self.turn

    async def find_owner(self, session_id: str) -> Owner | None:
        await trio.lowlevel.checkpoint()
        return self.owner


class EndsMeanwhile(Kept):
    """At first another process runs the turn; the turn ends just before the read that ``at`` names."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at
        self.turn, self.kept, self.owner = RUNNING, 2, Owner(fence=2, address="there")

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime, with_texts: bool = True) -> TurnRecord:
        self._end_before("turn")
        return await super().get_turn(session_id, turn_id, now=now)

    async def find_owner(self, session_id: str) -> Owner | None:
        self._end_before("owner")
        return await super().find_owner(session_id)

    def _end_before(self, step: str) -> None:
        if step == self._at:
            self.turn, self.kept, self.owner = ENDED, 3, None


async def test_replays_of_a_turn_at_the_same_time_share_the_pages_that_they_hold() -> None:
    store = Kept()
    logs: list[Events] = []
    async with open_stage(store) as stage:

        async def read() -> None:
            logs.append((await stage.sessions.open_events("s", "t"))[0])

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(read)
        await read()
        assert store.reads == 1
        assert [await frames_in(log) for log in logs] == [FRAMES] * 101
        assert store.reads == 2, "the second page stays in memory with its first reader"


async def test_a_log_without_readers_is_not_kept() -> None:
    store = Kept()
    async with open_stage(store) as stage:
        for times in (1, 2):
            await stage.sessions.open_events("s", "t")
            gc.collect()
            assert store.reads == times


async def test_a_cancelled_reader_leaves_the_others_theirs() -> None:
    store = Kept()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            await stage.sessions.open_events("s", "t")
        for _ in range(2):
            nursery.start_soon(stage.sessions.open_events, "s", "t")
        log, _ = await stage.sessions.open_events("s", "t")
        assert await frames_in(log) == FRAMES


async def test_a_replay_of_a_session_that_went_away_ends_after_the_page_that_it_holds() -> None:
    store = Kept()
    async with open_stage(store) as stage:
        log, _ = await stage.sessions.open_events("s", "t")
        store.turn, store.kept = None, 0
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.open_events("s", "t")
        assert [encode_frame(event) for event in log.read_after(0)] == FRAMES[:2]
        with pytest.raises(SessionNotFoundError):
            await log.load_after(2)


@pytest.mark.parametrize("at", ["turn", "owner"])
async def test_a_turn_that_ends_elsewhere_while_it_is_looked_for_is_replayed_whole(at: str) -> None:
    async with open_stage(EndsMeanwhile(at)) as stage:
        log, _ = await stage.sessions.open_events("s", "t", after=1)
        assert await frames_in(log) == FRAMES
        assert (log.closed, log.last_seq, log.unbroken_seq) == (True, 4, 4)


async def test_a_turn_that_ends_elsewhere_during_the_search_is_replayed_with_its_end() -> None:
    async with open_stage(EndsMeanwhile("owner")) as stage:
        assert await stage.sessions.get_turn("s", "t") == ENDED


async def test_a_turn_that_runs_elsewhere_is_read_there() -> None:
    store = EndsMeanwhile("never")
    async with open_stage(store) as stage:
        for _ in range(2):
            with pytest.raises(OwnedElsewhereError):
                await stage.sessions.open_events("s", "t")


async def test_a_turn_whose_events_are_missing_says_so_again_and_again() -> None:
    store = Kept()
    store.kept = 2
    async with open_stage(store) as stage:
        for _ in range(2):
            with pytest.raises(EventsLostError) as lost:
                await stage.sessions.open_events("s", "t")
            assert (lost.value.after, lost.value.state, lost.value.text) == (2, "completed", "123")
