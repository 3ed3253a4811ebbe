"""A service on a SQLite store: the next service finds the stored sessions."""

from pathlib import Path

import pytest
import trio

from service.errors import StartupError
from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.supervisor import open_service
from tests.sessions.puppet import frames_in, frames_of


def _settings(path: Path, script: str = "tokens=50&rate=0&first_token_s=0") -> Settings:
    return Settings(store_url=f"sqlite:{path}", model_url=f"scripted:?{script}", checkpoint_interval_s=0.1)


async def test_a_replay_outlives_the_service_delta_by_delta(path: Path) -> None:
    with trio.fail_after(60):
        async with open_service(_settings(path)) as service:
            session = (await service.sessions.create_session(NewSession())).id
            turn, watch = await service.sessions.start_turn(session, NewTurn(text="hi", background=True))
            watch.release()
            ended = await turn.wait_ended()
            frames = frames_of(turn.log)
        async with open_service(_settings(path)) as service:
            assert await service.sessions.get_turn(session, turn.id) == ended
            log, _ = await service.sessions.open_events(session, turn.id)
            assert (await frames_in(log), log.closed) == (frames, True)
            messages = await service.sessions.list_messages(session, limit=10)
            assert [message.item.text for message in messages.data] == ["hi", ended.text]


async def test_a_turn_that_the_shutdown_ends_is_kept_with_what_checkpoints_brought_and_the_rest(path: Path) -> None:
    with trio.fail_after(60):
        async with open_service(_settings(path, "tokens=100000&rate=500&first_token_s=0")) as service:
            session = (await service.sessions.create_session(NewSession())).id
            turn, watch = await service.sessions.start_turn(session, NewTurn(text="hi", background=True))
            watch.release()
            while turn.stored_seq < 20:
                await turn.log.wait_beyond(turn.log.last_seq)
            service.sessions.drain.interrupt_all()
            ended = await turn.wait_ended()
            assert turn.stored_seq >= 20
            frames = frames_of(turn.log)
        async with open_service(_settings(path)) as service:
            assert (ended.state, ended.reason) == ("interrupted", "shutdown")
            assert await service.sessions.get_turn(session, turn.id) == ended
            log, _ = await service.sessions.open_events(session, turn.id)
            assert await frames_in(log) == frames


async def test_a_store_that_cannot_be_opened_refuses_the_start_in_one_sentence(path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be opened"):
        async with open_service(_settings(path / "nowhere" / "lastcall.db")):
            pytest.fail("it was opened")
