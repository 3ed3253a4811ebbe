"""Three replicas on one database, from which processes, links and the database are taken: no promise is broken.

``just chaos`` runs much longer, with faults by chance.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from bench.database import open_database
from bench.replicas import makes_namespaces
from tests.cluster.chaos import MODES, Run, have_database, summary
from tests.cluster.clients import Client, Load, View
from tests.cluster.cluster import Cluster, open_cluster
from tests.cluster.faults import DATABASE, Faults
from tests.cluster.history import Fault, History
from tests.postgres_server import needed_binaries

CAP_S = 300
"""Bound of the whole test; not a promise of the service."""
CLIENTS = 8
SEED = 17


@pytest.mark.long
@pytest.mark.processes
async def test_replicas_that_die_and_stop_and_lose_their_database_break_no_promise(tmp_path: Path) -> None:
    run = Run(History())
    with open_database(needed_binaries()) as database, trio.fail_after(CAP_S):
        await have_database(database)
        async with open_cluster(database, tmp_path, run.history) as cluster:
            load = Load(doors=lambda: cluster.doors, history=run.history, seed=SEED, tokens=(5, 40), on_interrupt=MODES)
            faults = Faults(cluster)
            async with trio.open_nursery() as nursery:
                for number in range(CLIENTS):
                    nursery.start_soon(Client(load, f"c{number}").run)
                hit = await start_a_long_turn(cluster, load, nursery)
                await faults.have("kill", "replica-0", 0)
                await faults.have("link refused", "replica-1", 1)
                await faults.have("peers silent", "replica-1", 1)
                await faults.have("connections cut", DATABASE, 0.5)
                await faults.have("database killed", DATABASE, 1)
                await faults.have("stop", "replica-2", 0)
                load.is_over = True
            await run.check(cluster)
            forwarded = sum(replica.peers_link.connections for replica in cluster.replicas)
    assert run.broken == [], summary(run.history.facts, run.stored)
    assert {fact.kind for fact in run.history.facts if isinstance(fact, Fault)} == {
        "kill",
        "link refused",
        "peers silent",
        "connections cut",
        "database killed",
        "stop",
    }
    ends = {turn.id: turn.reason for session in run.stored.sessions.values() for turn in session.turns}
    assert ends[hit] == "crash"
    assert (forwarded > 0) == makes_namespaces(), "requests go from replica to replica, over TLS where that can be"


async def start_a_long_turn(cluster: Cluster, load: Load, nursery: trio.Nursery) -> str:
    """Start a turn in the first replica, which does not end by itself, and return once a client reads its text."""
    there = replace(load, doors=lambda: cluster.doors[:1], tokens=(10_000, 10_000), on_interrupt=("fail",))
    client = Client(there, "long")
    session = await client.create()
    turn = await client.start(session)
    view = View(load.history, turn)
    nursery.start_soon(Client(load, "reader").follow, session, turn, view)
    while view.seen < 3:  # noqa: ASYNC110  a view has no event
        await trio.sleep(0.02)
    return turn
