"""The open turns are measured in steps: the metrics loop does it each second, with however many turns."""

from itertools import islice

import pytest
from trio.testing import wait_all_tasks_blocked

from service.sessions import sessions
from service.sessions.commands import NewSession, NewTurn
from service.sessions.statistics import TurnsMeasured
from service.steps import at_once
from tests.sessions.puppet import open_stage


async def test_a_step_measures_some_of_the_turns_and_all_steps_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MEASURED_A_STEP", 2)
    async with open_stage() as stage:
        for text in ("a", "bb", "ccc", "dd", "e"):
            session = await stage.sessions.create_session(NewSession())
            for kept in (text, "queued"):
                new = NewTurn(text=kept, background=True, on_conflict="queue")
                _, watch = await stage.sessions.start_turn(session.id, new)
                watch.release()
            reply = await stage.puppet.next_reply()
            reply.say(text)
        await wait_all_tasks_blocked()
        log_bytes = sum(turn.log.size for turn in stage.sessions.open_turns())
        assert log_bytes > 0
        assert at_once(stage.sessions.measure_turns()) == TurnsMeasured(running=5, queued=5, log_bytes=log_bytes)
        assert len(list(stage.sessions.measure_turns())) == 5
        measuring = stage.sessions.measure_turns()
        assert len(list(islice(measuring, 2))) == 2
        for turn in stage.sessions.open_turns():
            await stage.sessions.cancel_turn(turn.session_id, turn.id)
        measured = at_once(measuring)
        assert (measured.queued, measured.running) == (0, 2), (
            "those that have ended meanwhile count where they were seen"
        )
