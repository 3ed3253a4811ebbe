"""Deletions of a session for one of its revisions, beside other callers of the session."""

from collections.abc import Collection
from datetime import datetime
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import PreconditionFailedError, SessionNotFoundError
from service.sessions.commands import NewSession
from service.storage.memory import MemoryStore
from service.storage.records import SessionPatch
from service.storage.rules import revision_of
from tests.sessions.puppet import Stage, open_stage
from tests.sessions.turns.test_turns import start


class SlowMarks(MemoryStore):
    """Marks a session when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = trio.Event()

    async def mark_deleted(self, session_id: str, *, now: datetime, revisions: Collection[str] | None = None) -> None:
        await self.goes_on.wait()
        await super().mark_deleted(session_id, now=now, revisions=revisions)


async def _refused(stage: Stage, revisions: Collection[str]) -> None:
    with pytest.raises(PreconditionFailedError):
        await stage.sessions.delete_session("s", revisions=revisions)


async def test_a_deletion_that_is_refused_hides_the_session_from_no_caller(autojump_clock: MockClock) -> None:
    store = SlowMarks()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s")
        reply = await stage.puppet.next_reply()
        nursery.start_soon(_refused, stage, ["old"])
        await wait_all_tasks_blocked()
        await stage.sessions.get_session("s")
        await stage.sessions.update_session("s", SessionPatch(title="kept"))
        assert (await stage.sessions.get_turn("s", turn.id)).is_open
        store.goes_on.set()
        await wait_all_tasks_blocked()
        reply.finish()
        assert (await turn.wait_ended()).state == "completed"
        assert (await stage.sessions.get_session("s")).title == "kept"
        next_turn = await start(stage.sessions, "s")
        (await stage.puppet.next_reply()).finish()
        assert (await next_turn.wait_ended()).state == "completed"


async def test_a_deletion_for_the_right_revision_ends_the_turns(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, "s")
        await stage.puppet.next_reply()
        now = revision_of(await stage.sessions.get_session("s"))
        await stage.sessions.delete_session("s", revisions=[now])
        assert (await turn.wait_ended()).reason == "session_deleted"
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_session("s")


@pytest.mark.parametrize("has_revision", [False, True])
async def test_a_second_deletion_is_not_refused_for_the_revision_of_the_first(
    autojump_clock: MockClock, has_revision: bool
) -> None:
    store = SlowMarks()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        session = await stage.sessions.create_session(NewSession(id="s"))
        nursery.start_soon(_refused, stage, ["old"])
        await wait_all_tasks_blocked()
        revisions = [revision_of(session)] if has_revision else None
        nursery.start_soon(partial(stage.sessions.delete_session, "s", revisions=revisions))
        await wait_all_tasks_blocked()
        store.goes_on.set()
    async with open_stage(store) as stage:
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_session("s")


async def test_a_deletion_that_is_refused_twice_tells_each_caller(autojump_clock: MockClock) -> None:
    store = SlowMarks()
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        for _ in range(2):
            nursery.start_soon(_refused, stage, ["old"])
        await wait_all_tasks_blocked()
        store.goes_on.set()
    async with open_stage(store) as stage:
        await stage.sessions.get_session("s")


async def test_a_second_deletion_after_the_mark_waits_whatever_its_revision(autojump_clock: MockClock) -> None:
    async with open_stage() as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        await start(stage.sessions, "s")
        await stage.puppet.next_reply()
        stage.puppet.close_s = 1
        now = revision_of(await stage.sessions.get_session("s"))
        nursery.start_soon(partial(stage.sessions.delete_session, "s", revisions=[now]))
        await wait_all_tasks_blocked()
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_session("s")
        await stage.sessions.delete_session("s", revisions=["old"])
