"""The prompt of a long conversation is made in steps, between which other tasks run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from service import steps
from service.models.client import PromptItem
from service.sessions.commands import NewSession
from service.storage.records import EndState
from service.storage.sqlite import open_sqlite_store
from tests.longest_step import STEP_MAX_S, watching_steps
from tests.sessions.puppet import Stage, open_stage
from tests.sessions.turns.test_turns import start
from tests.storage.rows import T0, a_turn, ended
from tests.storage.sqlite.many_rows import fill

TURNS = 4000
"""About as many as the default of ``prompt_bytes_max`` lets into a prompt."""
TRIES = 3
"""Caches and a shared core cost processor time, too."""


async def _converse(stage: Stage, *, turns: int, state: EndState = "completed") -> None:
    """A conversation of short turns that end so."""
    stage.clock.now = T0
    await stage.sessions.create_session(NewSession(id="s"))
    for n in range(turns):
        turn = a_turn(f"t{n}", parent=f"t{n - 1}" if n else None)
        await stage.store.begin_turn(turn, now=T0)
        await stage.store.end_turn(ended(turn, state, text="R"), runs=(), now=T0)


async def _longest_step_of_a_turn(stage: Stage, session_id: str) -> tuple[float, Sequence[PromptItem]]:
    """The longest step of a turn's task up to its request, and the prompt."""
    longest: list[float] = []
    for _ in range(TRIES):
        with watching_steps() as watched:
            turn = await start(stage.sessions, session_id)
            reply = await stage.puppet.next_reply()
        longest.append(watched.seconds)
        reply.finish()
        await turn.wait_ended()
    return min(longest), stage.puppet.asked[-1]


@pytest.mark.serial
@pytest.mark.parametrize(("state", "items_min"), [("completed", 2 * TURNS * 0.9), ("failed", 1)])
async def test_a_long_conversation_does_not_hold_the_event_loop(state: EndState, items_min: int) -> None:
    async with open_stage(store_timeout_s=60) as stage:
        await _converse(stage, turns=TURNS, state=state)
        longest_s, prompt = await _longest_step_of_a_turn(stage, "s")
        assert len(prompt) >= items_min
        assert longest_s < STEP_MAX_S


@pytest.mark.serial
async def test_a_long_conversation_in_a_file_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path / "lastcall.db") as store:
        await store._writing.call(partial(fill, sessions=1, turns=TURNS))
        stored: Any = store
        async with open_stage(stored, store_timeout_s=60) as stage:
            stage.clock.now = T0
            longest_s, prompt = await _longest_step_of_a_turn(stage, "sess_000000")
        assert len(prompt) >= 2 * TURNS * 0.9
        assert longest_s < STEP_MAX_S


@pytest.mark.parametrize("too_long", [False, True])
async def test_other_tasks_run_while_a_prompt_is_made_and_a_cancelled_turn_asks_no_model(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, too_long: bool
) -> None:
    """Cancelled after any number of the steps, also of those to a shorter prompt."""
    monkeypatch.setattr(steps, "STEP_S", 0)
    async with open_stage() as stage:
        await _converse(stage, turns=10)
        asked_before = int(too_long)
        for other_steps in range(0, 120, 7):
            stage.puppet.asked.clear()
            if too_long:
                stage.puppet.takes_bytes = 20
            turn = await start(stage.sessions, "s", parent="t9")
            while len(stage.puppet.asked) < asked_before:
                await trio.lowlevel.checkpoint()
            stage.puppet.takes_bytes = None
            for _ in range(other_steps):
                await trio.lowlevel.checkpoint()
            if len(stage.puppet.asked) > asked_before:
                break
            record = await stage.sessions.cancel_turn("s", turn.id)
            assert (record.state, record.reason) == ("cancelled", "requested")
            assert len(stage.puppet.asked) == asked_before
        else:
            pytest.fail("the prompt was never complete")
        assert other_steps > 50, "one step for each turn and more"
        (await stage.puppet.next_reply()).finish()
        assert (await turn.wait_ended()).state == "completed"
