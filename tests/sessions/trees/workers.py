"""The service of a history: one or several workers, each with its own sessions and its own store on the same file."""

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import apsw
import trio

from service.clock import Clock
from service.errors import OwnedElsewhereError
from service.sessions.sessions import Sessions, open_sessions
from service.settings import Settings
from service.stop_state import StopState
from service.storage.memory import MemoryStore
from service.storage.records import Page, TurnRecord
from service.storage.sqlite import SqliteStore, open_sqlite_store
from service.storage.store import Store
from tests.sessions.puppet import Puppet
from tests.sessions.trees.model import QUEUED_TURNS_MAX

T = TypeVar("T")

LONG_S = 10_000
"""No deadline of a turn passes in a history."""
STEP_S = 60
"""How long a step may take, on a machine that is busy with other tests."""
SETTINGS = Settings(
    branches_max=100,  # in test_stateful.py
    queued_turns_max=QUEUED_TURNS_MAX,
    first_token_timeout_s=LONG_S,
    next_token_timeout_s=LONG_S,
    turn_timeout_s=LONG_S,
    store_timeout_s=STEP_S,
    cleanup_timeout_s=STEP_S,
)


class Ground:
    """Where the workers keep everything: one memory store, or one file."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory = MemoryStore()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Store]:
        if self.folder is None:
            yield self._memory
        else:
            async with open_sqlite_store(self.folder / "lastcall.db", close_timeout_s=STEP_S) as store:
                yield store

    async def leave_as_killed(self, store: SqliteStore) -> None:
        """Go on with the files as a kill of the only process would leave them now, in the middle of a transaction."""
        assert self.folder is not None
        old, new = self.folder, self.folder / "next"
        self.folder = new

        def copy(_db: apsw.Connection) -> None:
            new.mkdir()
            for ending in ("-wal", "", "-owners"):
                shutil.copy(old / f"lastcall.db{ending}", new)

        await store._writing.call(copy)


@dataclass(eq=False)
class Worker:
    """A process of the service, as far as its sessions go."""

    store: Store
    sessions: Sessions
    client: Puppet
    recovered: int
    stopping: trio.Event = field(default_factory=trio.Event)
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def fence(self) -> int:
        return self.store.fence if isinstance(self.store, SqliteStore) else 0

    async def stop(self) -> None:
        self.stopping.set()
        await self.stopped.wait()

    async def kill(self) -> None:
        """Let the worker write nothing more, and no longer be alive for the others."""
        await self.store.aclose()
        await self.stop()


class Workers:
    """The workers that serve now."""

    def __init__(self, nursery: trio.Nursery, ground: Ground, *, clock: Clock) -> None:
        self.ground = ground
        self.serving: list[Worker] = []
        self._nursery = nursery
        self._clock = clock
        self._calls = 0

    async def open(self) -> Worker:
        worker: Worker = await self._nursery.start(self.run)
        self.serving.append(worker)
        return worker

    async def run(self, *, task_status: trio.TaskStatus[Worker]) -> None:
        """Run a worker until it is stopped."""
        client = Puppet()
        async with (
            self.ground.open() as store,
            open_sessions(
                store=store, client_for=lambda _: client, clock=self._clock, settings=SETTINGS, stop=StopState()
            ) as sessions,
        ):
            worker = Worker(store, sessions, client, recovered=await sessions.recover())
            task_status.started(worker)
            await worker.stopping.wait()
        worker.stopped.set()

    def call_next(self, number: int) -> None:
        """Let the next call reach this worker, and the calls after it the workers after it."""
        self._calls = number

    async def ask(self, call: Callable[[Worker], Awaitable[T]]) -> T:
        """Send a call to one worker after the other.

        As in the API the call goes on to the worker that runs the session's turns, and a worker first ends the turns of
        one that is gone.
        """
        worker = self.serving[self._calls % len(self.serving)]
        self._calls += 1
        for _ in range(3):
            try:
                return await call(worker)
            except OwnedElsewhereError as error:
                owner = next((it for it in self.serving if it.fence == error.fence), None)
                if owner is None:
                    await worker.sessions.recover()
                else:
                    worker = owner
        raise AssertionError("no worker takes the call")

    def turns(self, session_id: str, **named: Any) -> Callable[[str | None], Awaitable[Page[TurnRecord]]]:
        """Reads a page of the turns of a session."""
        return lambda after: self.ask(
            lambda worker: worker.sessions.list_turns(session_id, limit=4, after=after, **named)
        )


async def pages(read: Callable[[str | None], Awaitable[Page[T]]]) -> list[T]:
    found: list[T] = []
    after: str | None = None
    for _ in range(1000):
        page = await read(after)
        assert not page.partial
        found += page.data
        if (after := page.next) is None:
            return found
    raise AssertionError("a listing has no end")
