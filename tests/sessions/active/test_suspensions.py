"""Turns that a stop suspends go to the store in steps of a bounded size, one after the other."""

from collections.abc import Collection, Sequence
from datetime import datetime
from functools import partial

import msgspec
import pytest
import trio
from trio.testing import MockClock

from service.sessions.active.suspensions import Suspensions
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn, restored_log
from service.settings import Settings
from service.steps import at_once
from service.storage.memory import MemoryStore
from service.storage.pieces import STARTED, Run
from service.storage.records import Item, SuspendedTurn
from tests.longest_step import STEP_MAX_S, watching_steps
from tests.sessions.puppet import Puppet
from tests.storage.rows import T0, a_turn

PIECE_LENGTH = 16
KIB = 1024
MIB = 1024 * KIB
TRIES = 3
"""Caches and a shared core cost processor time, too."""


class NotesSizes(MemoryStore):
    """Takes any suspended turns after a while.

    Attributes:
        lengths: The code points of the texts in each call.
        kept: The ids of the turns in finished calls.
    """

    def __init__(self, *, takes_s: float = 0) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.kept: list[str] = []
        self._takes_s = takes_s

    async def suspend_turns(self, suspended: Sequence[SuspendedTurn], *, now: datetime) -> Collection[str]:
        assert now == T0
        self.lengths.append(sum(len(it.turn.text) for it in suspended))
        await trio.sleep(self._takes_s)
        self.kept += [it.turn.id for it in suspended]
        return []


def turns_with(*lengths: int, stored: bool = False) -> list[Turn]:
    """Turns with texts of these lengths, whose work a stop has ended."""
    return [_turn_with(f"t{number}", length, stored=stored) for number, length in enumerate(lengths)]


def _turn_with(turn_id: str, length: int, *, stored: bool) -> Turn:
    pieces = Run(0, bytes([PIECE_LENGTH]) * (length // PIECE_LENGTH))
    item = Item(id="out", role="assistant", text="x" * length)
    settings = Settings()
    record = msgspec.structs.replace(a_turn(turn_id), output=(item,), last_seq=1 + pieces.events)
    turn = Turn(
        record,
        client=Puppet(),
        system_message=None,
        on_disconnect="continue",
        settings=settings,
        log=at_once(restored_log(record, (Run(STARTED), pieces), bytes_max=settings.log_bytes_max)),
    )
    if not stored:
        turn.stored_seq = 1
    turn.decide(outcome.Suspended())
    turn.is_ending = True
    return turn


async def suspend(turns: Sequence[Turn], store: MemoryStore, *, within_s: float = 60) -> Suspensions:
    suspensions = Suspensions(store, clock=lambda: T0)
    async with trio.open_nursery() as nursery:
        for turn in turns:
            nursery.start_soon(partial(suspensions.suspend, turn, within_s=within_s))
    return suspensions


async def test_no_step_of_the_store_takes_more_than_its_bound_or_one_turn(autojump_clock: MockClock) -> None:
    store = NotesSizes()
    lengths = (200 * KIB, 200 * KIB, 3 * MIB, *[200 * KIB] * 30)
    turns = turns_with(*lengths)
    suspensions = await suspend(turns, store)
    assert sum(store.lengths) == sum(lengths)
    assert sorted(store.kept) == sorted(turn.id for turn in turns)
    assert [length for length in store.lengths if length > MIB] == [3 * MIB]
    assert len(store.lengths) <= 10
    assert suspensions.not_kept == 0
    assert all(turn.is_suspended and turn.log.is_moved for turn in turns)
    assert [len(turn.record().text) for turn in turns] == list(lengths)


async def test_small_turns_go_in_one_step(autojump_clock: MockClock) -> None:
    store = NotesSizes()
    await suspend(turns_with(*[KIB] * 256), store)
    assert store.lengths == [256 * KIB]


async def test_replies_whose_growth_is_small_are_bounded_by_their_whole_length(autojump_clock: MockClock) -> None:
    store = NotesSizes()
    await suspend(turns_with(*[512 * KIB] * 12, stored=True), store)
    assert store.lengths == [6 * 512 * KIB] * 2


async def test_the_turns_that_a_slow_store_has_taken_in_time_are_kept(autojump_clock: MockClock) -> None:
    store = NotesSizes(takes_s=0.3)
    turns = turns_with(*[600 * KIB] * 8)
    suspensions = await suspend(turns, store, within_s=1)
    assert len(store.kept) == 3
    assert len(store.lengths) == 4, "no step begins once the time is over"
    assert suspensions.not_kept == 5
    assert all(turn.is_suspended for turn in turns)


@pytest.mark.serial
async def test_a_stop_with_many_long_replies_does_not_hold_the_event_loop() -> None:
    longest: list[float] = []
    for _ in range(TRIES):
        turns = turns_with(*[256 * KIB] * 128)
        with watching_steps() as watched:
            await suspend(turns, NotesSizes())
        longest.append(watched.seconds)
    assert min(longest) < STEP_MAX_S
