"""The end of a turn with very many events holds the event loop no longer than any other step does."""

from pathlib import Path

import pytest
import trio

from service.models.client import TextDelta
from service.sessions.active.suspensions import Suspensions
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_task import end_turn
from service.settings import Settings
from service.stop_state import StopState
from service.storage.sqlite import open_sqlite_store
from tests.longest_step import STEP_MAX_S, watching_steps
from tests.sessions.puppet import Puppet
from tests.storage.rows import T0, a_session, a_turn

REPLY_BYTES = Settings.model_fields["reply_bytes_max"].default
TRIES = 3
"""Caches and a shared core cost processor time, too."""


@pytest.mark.serial
async def test_the_end_of_a_reply_in_pieces_of_one_byte_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    longest: list[float] = []
    async with open_sqlite_store(tmp_path / "lastcall.db") as store:
        await store.create_session(a_session(), now=T0)
        for attempt in range(TRIES):
            record = a_turn(f"t{attempt}")
            turn = Turn(record, client=Puppet(), system_message=None, on_disconnect="continue", settings=Settings())
            await store.begin_turn(record, now=T0)
            turn.start(T0)
            for _ in range(REPLY_BYTES // 1024):
                turn.take([TextDelta("x")] * 1024)
            turn.decide(outcome.Completed("stop"))

            async def end(turn: Turn = turn) -> None:
                assert await end_turn(
                    turn,
                    suspend=Suspensions(store, clock=lambda: T0).suspend,
                    store=store,
                    stop=StopState(),
                    clock=lambda: T0,
                    within_s=60,
                )

            with watching_steps() as watched:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(end)
                    await turn.wait_ended()
            longest.append(watched.seconds)
            assert turn.stored
            assert turn.record().text == "x" * REPLY_BYTES
    assert min(longest) < STEP_MAX_S
