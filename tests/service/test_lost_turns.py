"""A process that another one has taken for dead ends its service, and tells no end of its turns."""

from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio

from service.clock import SteadyClock
from service.errors import StoreLostError, TurnMovedError
from service.sessions.commands import NewSession
from service.sessions.sessions import open_sessions
from service.settings import Settings
from service.stop_state import StopState
from service.storage.postgres import PostgresStore, beats, open_postgres_store
from service.storage.postgres.owners import LEASE_S
from service.supervisor import _run_until_lost, open_service
from tests.postgres_server import PostgresServer
from tests.sessions.puppet import Puppet
from tests.sessions.turns.test_turns import start

WAIT_S = 120


async def test_the_service_ends_when_its_store_has_lost_its_turns() -> None:
    with trio.fail_after(WAIT_S):
        with pytest.RaisesGroup(
            pytest.RaisesExc(StoreLostError, match="goes on with its turns"), flatten_subgroups=True
        ):
            async with open_service(Settings(store_url="memory:")) as service:
                service.store.standing.lose()
                await trio.sleep_forever()


@pytest.fixture
async def stores(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[PostgresStore]]:
    """Two owners of a store, which beat when the test says so, by its time."""
    monkeypatch.setattr(beats, "BEAT_S", 3600)
    with postgres.empty_schema() as schema:
        opened = partial(open_postgres_store, postgres.url, schema_name=schema, monotonic=lambda: Now.s)
        async with opened() as here, opened() as there:
            yield [here, there]


class Now:
    s = 0.0


async def test_turns_whose_owner_was_taken_for_dead_lose_their_calls_at_its_next_beat(
    stores: list[PostgresStore],
) -> None:
    here, there = stores
    puppet, clock = Puppet(), SteadyClock()
    with trio.fail_after(WAIT_S):
        async with open_sessions(
            store=there, client_for=lambda _: puppet, clock=clock, settings=Settings(), stop=StopState()
        ) as sessions:
            turn = await start(sessions, (await sessions.create_session(NewSession())).id)
            reply = await puppet.next_reply()
            reply.say("Hi")
            for _ in range(LEASE_S + 1):
                await here.beat()
                Now.s += 1
            assert await here.beat() + await here.recover(now=clock()) > 0
            kept = await here.get_turn(turn.session_id, turn.id, now=clock())
            assert kept.state == "interrupted"
            assert not reply.closed.is_set()
            with pytest.RaisesGroup(StoreLostError):
                async with trio.open_nursery() as nursery:
                    await nursery.start(_run_until_lost, there, sessions)
                    await there.beat()
            with pytest.raises(TurnMovedError):
                await turn.wait_ended()
            assert reply.closed.is_set()
            assert turn.log.is_moved, "it has no end here: the other process told it"
            assert sessions.statistics().ends_not_stored == 0
            assert await here.get_turn(turn.session_id, turn.id, now=clock()) == kept
