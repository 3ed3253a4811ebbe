"""A service on a disk whose commits take longer than ``store_timeout_s``: it finds out their outcomes later.

The time stands still, but for the waits that are to end: so no call is late by itself, however slow the machine is.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import SessionExistsError, SessionNotFoundError, StoreError
from service.sessions.commands import NewSession, NewTurn
from service.sessions.upkeep.recovery import recover_once
from service.settings import Settings
from service.supervisor import Service, open_service
from tests.storage.sqlite.faulty_disk import FaultyDisk

TIMEOUT_S = 0.2
CAP_S = 60


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    disk = FaultyDisk()
    yield disk
    disk.running.set()
    disk.unregister()


@asynccontextmanager
async def open_slow(path: Path) -> AsyncIterator[Service]:
    """A service with a session ``s``, whose turns never end by themselves."""
    settings = Settings(
        store_url=f"sqlite:{path}",
        model_url="scripted:?tokens=100000&rate=1&first_token_s=0",
        store_timeout_s=TIMEOUT_S,
        checkpoint_interval_s=60,
    )
    async with open_service(settings) as service:
        await service.sessions.create_session(NewSession(id="s"))
        yield service


async def not_in_time(disk: FaultyDisk, clock: MockClock, call: Callable[[], Awaitable[object]]) -> None:
    """Make a call whose commit hangs on the disk until after the answer."""
    disk.hanging.clear()
    disk.running.clear()
    await _times_out(clock, call, after=disk.hanging)


async def _times_out(clock: MockClock, call: Callable[[], Awaitable[object]], *, after: threading.Event) -> None:
    """Make a call, and let time pass from a moment on until it is answered."""
    answered = trio.Event()

    async def make_call() -> None:
        with pytest.raises(StoreError, match="did not answer in time"):
            await call()
        answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_call)
        assert await trio.to_thread.run_sync(after.wait, CAP_S), "it did not come to the commit"
        while not answered.is_set():
            await wait_all_tasks_blocked()
            clock.jump(TIMEOUT_S)


async def test_a_delete_whose_commit_is_slow_ends_its_turn_and_frees_the_id(
    disk: FaultyDisk, path: Path, mock_clock: MockClock
) -> None:
    async with open_slow(path) as service:
        sessions = service.sessions
        turn, watch = await sessions.start_turn("s", NewTurn(text="hi", background=True))
        watch.release()
        await turn.log.wait_beyond(1)
        await not_in_time(disk, mock_clock, lambda: sessions.delete_session("s"))
        assert (await sessions.get_session("s")).status == "running", "it is not deleted yet"
        disk.running.set()
        await recover_once(sessions, shared=True)
        record = await turn.wait_ended()
        assert (record.state, record.reason) == ("cancelled", "session_deleted")
        await sessions.drain.wait_idle()
        with pytest.raises(SessionNotFoundError):
            await sessions.get_session("s")
        await sessions.create_session(NewSession(id="s"))


async def test_a_second_delete_in_a_slow_commit_has_the_outcome_of_the_first(
    disk: FaultyDisk, path: Path, mock_clock: MockClock
) -> None:
    async with open_slow(path) as service:
        await not_in_time(disk, mock_clock, lambda: service.sessions.delete_session("s"))
        await _times_out(mock_clock, lambda: service.sessions.delete_session("s"), after=disk.hanging)
        disk.running.set()
        await service.sessions.delete_session("s")
        await service.sessions.create_session(NewSession(id="s"))


async def test_a_turn_whose_acceptance_is_in_a_slow_commit_does_not_stay_open(
    disk: FaultyDisk, path: Path, mock_clock: MockClock
) -> None:
    async with open_slow(path) as service:
        sessions = service.sessions
        await not_in_time(disk, mock_clock, lambda: sessions.start_turn("s", NewTurn(text="hi")))
        disk.running.set()
        await recover_once(sessions, shared=True)
        (turn,) = (await sessions.list_turns("s", limit=10)).data
        assert (turn.state, turn.error and turn.error.code) == ("failed", "store_unavailable")
        assert (await sessions.get_session("s")).status == "idle"


async def test_a_session_whose_creation_is_in_a_slow_commit_exists_for_the_next_one(
    disk: FaultyDisk, path: Path, mock_clock: MockClock
) -> None:
    async with open_slow(path) as service:
        await not_in_time(disk, mock_clock, lambda: service.sessions.create_session(NewSession(id="new")))
        disk.running.set()
        with pytest.raises(SessionExistsError):
            await service.sessions.create_session(NewSession(id="new"))
        await service.sessions.get_session("new")
