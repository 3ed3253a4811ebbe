"""Random faults over a cluster under load, and a comparison of what its clients were told with its store.

``python -m tests.cluster.chaos MINUTES [SEED]``, or ``just chaos``. The exit code is 1 if a promise is broken; then the
history, the logs and the model server's notes are kept, and their folder is printed.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random, SystemRandom

import trio

from bench.database import Database, binaries, open_database
from tests.cluster.checker import Broken, Stored, StoredTurn, check
from tests.cluster.clients import Client, Load
from tests.cluster.cluster import Cluster, open_cluster
from tests.cluster.faults import Faults
from tests.cluster.history import AnyFact, Fault, History, Paused, Refused, Saw, Told
from tests.cluster.stored import open_turns, read_store
from tests.cluster.upstream import reply_of

CLIENTS = 24
LEASE_S = 6
MODES = ("fail", "retry", "continue")
CALM_S = 180
"""Bound on the end of all clients once there are no faults any more."""
SHOWN_MAX = 20


class Run:
    """One run, and its outcome."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.stored = Stored({})
        self.broken: list[Broken] = []

    async def have_chaos(self, cluster: Cluster, *, lasts_s: float, seed: int, clients: int = CLIENTS) -> None:
        """Load the cluster while things go wrong, let it calm down, and check all of it."""
        load = Load(doors=lambda: cluster.doors, history=self.history, seed=seed, on_interrupt=MODES)
        faults = Faults(cluster, Random(seed))
        until = trio.current_time() + lasts_s
        with trio.fail_after(lasts_s + CALM_S):
            async with trio.open_nursery() as nursery:
                for number in range(clients):
                    nursery.start_soon(Client(load, f"c{number}").run)
                await faults.run(is_over=lambda: trio.current_time() >= until)
                load.is_over = True
        await self.check(cluster)

    async def check(self, cluster: Cluster) -> None:
        """Stop the cluster, start one replica anew, and compare."""
        await wait_no_open_turns(cluster)
        live = await live_calls(cluster)
        await cluster.stop()
        reader = cluster.replicas[0]
        reader.want()
        with trio.fail_after(60):
            await reader.wait_serving()
        self.stored = await read_store(reader.door, cluster.database, cluster.schema)
        await cluster.stop()
        for called in cluster.upstream.calls():
            self.history.add(called)
        self.broken = check(self.history.facts, self.stored, reply_of=reply_of)
        if live:
            self.broken.append(Broken("no call of the model outlives its turn", f"{live} are open"))


async def wait_no_open_turns(cluster: Cluster) -> None:
    """Wait until what dead processes left is taken over; a turn that stays open is found by the checker."""
    with trio.move_on_after(3 * LEASE_S):
        while await trio.to_thread.run_sync(open_turns, cluster.database, cluster.schema):  # noqa: ASYNC110  no event
            await trio.sleep(0.2)


async def live_calls(cluster: Cluster) -> int:
    """How many calls the model server has that do not end. One of a turn that has just ended may be there a moment."""
    with trio.move_on_after(LEASE_S):
        while await cluster.upstream.live_calls():  # noqa: ASYNC110  no event
            await trio.sleep(0.2)
    return await cluster.upstream.live_calls()


def summary(facts: Sequence[AnyFact], stored: Stored) -> str:
    """A page about a run."""
    turns = [turn for session in stored.sessions.values() for turn in session.turns]
    events = sum(isinstance(fact, Saw) for fact in facts)
    faults = Counter(fact.kind for fact in facts if isinstance(fact, Fault))
    ends = Counter(_end_of(turn) for turn in turns)
    others = Counter(type(fact).__name__.lower() for fact in facts)
    refused = Counter(f"{fact.status} {fact.code}" for fact in facts if isinstance(fact, Refused))
    pauses = sorted(fact.longest_s for fact in facts if isinstance(fact, Paused))
    recoveries = sorted(_seconds_from_kill_to_end(facts))
    return "\n".join(
        [
            f"{len(stored.sessions)} sessions and {len(turns)} turns kept, {events} events told",
            f"faults: {_counts(faults)}",
            f"ends: {_counts(ends)}",
            f"refused: {_counts(refused)}; without an answer: {others['unanswered']}; given up: {others['gaveup']}",
            f"longest pause of each view: {spread(pauses)}",
            f"from a kill to the end of its turns: {spread(recoveries)}",
        ]
    )


def _end_of(turn: StoredTurn) -> str:
    error = turn.events[-1].error if turn.events else None
    why = turn.reason or (error.code if error else "")
    return f"{turn.state} ({why})" if why else turn.state


def _seconds_from_kill_to_end(facts: Sequence[AnyFact]) -> list[float]:
    """For each turn that a crash has ended, the time from the last kill before to the first word of its end."""
    kills = [fact.at for fact in facts if isinstance(fact, Fault) and fact.kind == "kill"]
    ends: dict[str, float] = {}
    for fact in facts:
        if (isinstance(fact, Saw) and fact.event.reason == "crash") or (
            isinstance(fact, Told) and fact.reason == "crash"
        ):
            ends.setdefault(fact.turn, fact.at)
    found = ((end, max((kill for kill in kills if kill <= end), default=0.0)) for end in ends.values())
    return [end - kill for end, kill in found if end - kill < 3 * LEASE_S]


def _counts(counter: "Counter[str]") -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def spread(sorted_s: Sequence[float]) -> str:
    if not sorted_s:
        return "none"
    p50, p99 = sorted_s[len(sorted_s) // 2], sorted_s[min(len(sorted_s) - 1, len(sorted_s) * 99 // 100)]
    return f"p50 {p50:.2f} s, p99 {p99:.2f} s, max {sorted_s[-1]:.2f} s (n={len(sorted_s)})"


async def have_database(database: Database) -> None:
    await trio.to_thread.run_sync(database.make)
    await database.start()


async def main(minutes: float, seed: int, clients: int) -> int:
    programs = binaries()
    if programs is None:
        sys.stdout.write("There is no PostgreSQL server: install the package postgresql.\n")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="lastcall-chaos-"))
    sys.stdout.write(f"seed {seed}, {minutes:g} minutes, {clients} clients, {folder}\n")
    sys.stdout.flush()
    began_at = time.monotonic()
    with open_database(programs) as database, (folder / "history").open("wb") as file:
        run = Run(History(file))
        await have_database(database)
        async with open_cluster(database, folder, run.history) as cluster:
            await run.have_chaos(cluster, lasts_s=60 * minutes, seed=seed, clients=clients)
    sys.stdout.write(summary(run.history.facts, run.stored) + f"\n{time.monotonic() - began_at:.0f} s\n")
    if not run.broken:
        shutil.rmtree(folder)
        sys.stdout.write("No promise is broken.\n")
        return 0
    for rule, count in Counter(broken.rule for broken in run.broken).items():
        sys.stdout.write(f"BROKEN {count} times: {rule}\n")
    for broken in run.broken[:SHOWN_MAX]:
        sys.stdout.write(f"  {broken.rule}: {broken.words}\n")
    sys.stdout.write(f"The history and the logs are in {folder}; the seed was {seed}.\n")
    return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Random faults over a cluster under load.")
    parser.add_argument("minutes", type=float, nargs="?", default=20)
    parser.add_argument("seed", type=int, nargs="?", default=SystemRandom().randrange(1 << 32))
    parser.add_argument("--clients", type=int, default=CLIENTS)
    arguments = parser.parse_args()
    sys.exit(trio.run(main, arguments.minutes, arguments.seed, arguments.clients))
