"""Replays of turns that have ended: all readers of one turn share a log, and it is exact in every situation."""

import gc
from collections.abc import Sequence
from datetime import datetime

import msgspec
import pytest
import trio
import trio.testing

from service.errors import EventsLostError, OwnedElsewhereError, SessionNotFoundError
from service.sessions.events.event_log import EventLog
from service.sessions.events.events import TurnCompleted, TurnDelta
from service.sessions.events.frames import encode_frame
from service.storage.memory import MemoryStore
from service.storage.records import Owner, TurnRecord
from tests.sessions.puppet import frames_of, open_stage
from tests.storage.rows import a_turn, ended

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
        self.frames: Sequence[bytes] = FRAMES
        self.owner: Owner | None = None

    async def read_events(self, session_id: str, turn_id: str) -> Sequence[bytes]:
        self.reads += 1
        frames = self.frames
        await trio.lowlevel.checkpoint()
        return frames

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
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
        self.turn, self.frames, self.owner = RUNNING, FRAMES[:2], Owner(fence=2, address="there")

    async def get_turn(self, session_id: str, turn_id: str, *, now: datetime) -> TurnRecord:
        self._end_before("turn")
        return await super().get_turn(session_id, turn_id, now=now)

    async def find_owner(self, session_id: str) -> Owner | None:
        self._end_before("owner")
        return await super().find_owner(session_id)

    def _end_before(self, step: str) -> None:
        if step == self._at:
            self.turn, self.frames, self.owner = ENDED, FRAMES, None


async def test_who_reads_the_same_turn_at_the_same_time_shares_one_log() -> None:
    store = Kept()
    logs: list[EventLog] = []
    async with open_stage(store) as stage:

        async def read() -> None:
            logs.append((await stage.sessions.open_events("s", "t"))[0])

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(read)
        await read()
        assert len(logs) == 101
        assert len(set(map(id, logs))) == 1
        assert store.reads == 1
        assert frames_of(logs[0]) == FRAMES


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
        assert frames_of(log) == FRAMES


async def test_of_a_session_that_went_away_no_more_is_read_though_others_read_on() -> None:
    store = Kept()
    async with open_stage(store) as stage:
        log, _ = await stage.sessions.open_events("s", "t")
        store.turn, store.frames = None, []
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.open_events("s", "t")
        assert frames_of(log) == FRAMES


@pytest.mark.parametrize("at", ["turn", "owner"])
async def test_a_turn_that_ends_elsewhere_while_it_is_looked_for_is_replayed_whole(at: str) -> None:
    async with open_stage(EndsMeanwhile(at)) as stage:
        log, _ = await stage.sessions.open_events("s", "t", after=1)
        assert frames_of(log) == FRAMES
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
    store.frames = FRAMES[:2]
    async with open_stage(store) as stage:
        for _ in range(2):
            with pytest.raises(EventsLostError) as lost:
                await stage.sessions.open_events("s", "t")
            assert (lost.value.after, lost.value.state, lost.value.text) == (2, "completed", "123")
