"""Objects that live have a repr with id and state: for a debugger, a log line, a dump of tasks."""

from trio.testing import MockClock

from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.shutdown import Shutdown
from tests.sessions.puppet import open_stage


async def test_a_turn_says_its_id_its_session_and_its_state(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession(id="mine"))
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="hi", background=True))
        reply = await stage.puppet.next_reply()
        assert repr(turn) == f"<Turn {turn.id} of mine: running, seq 1>"
        assert repr(turn.log) == "<EventLog: open, seq 1>"
        reply.finish()
        watch.release()
        await turn.ended.wait()
        assert repr(turn) == f"<Turn {turn.id} of mine: completed, seq 2>"
        assert repr(turn.log) == "<EventLog: closed, seq 2>"


async def test_a_session_with_work_says_how_much(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session = await stage.sessions.create_session(NewSession(id="mine"))
        for _ in range(2):
            _, watch = await stage.sessions.start_turn(
                session.id, NewTurn(text="hi", background=True, on_conflict="queue")
            )
            watch.release()
        active = stage.sessions._active.find("mine")
        assert repr(active) == "<ActiveSession mine: 2 open turns>"


async def test_streams_say_how_many_there_are(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        slot = stage.sessions.streams.open_stream()
        most = Settings().streams_max
        assert repr(stage.sessions.streams) == f"<Streams: 1 of {most} open, 0 ended, 0 aborted>"
        assert repr(slot) == "<StreamSlot: open>"
        slot.close(ended=True)
        assert repr(slot) == "<StreamSlot: closed>"
        assert repr(stage.sessions.streams) == f"<Streams: 0 of {most} open, 1 ended, 0 aborted>"


async def test_a_shutdown_says_its_phase_and_why() -> None:
    shutdown = Shutdown(Settings())
    assert repr(shutdown) == "<Shutdown: serving>"
    shutdown.notice("SIGTERM")
    assert repr(shutdown) == "<Shutdown: draining, by SIGTERM>"
