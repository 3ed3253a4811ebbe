"""Single kinds of faults over a loaded cluster, with their bounds: ``python -m tests.cluster.shows NAME...``.

Each show prints what it has measured, and ends with the same comparison as :mod:`tests.cluster.chaos`. The exit code is
1 if a bound or a promise is broken. They measure time, and take some minutes, so they are no tests.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random, SystemRandom

import msgspec
import trio

from bench.database import binaries, open_database
from tests.cluster.calls import NoAnswerError, call, open_call
from tests.cluster.chaos import LEASE_S, Run, have_database, spread, summary
from tests.cluster.clients import AUTH, Client, Load, View
from tests.cluster.cluster import Cluster, Door, Replica, open_cluster
from tests.cluster.faults import DATABASE, Faults
from tests.cluster.front import open_front
from tests.cluster.history import Accepted, Fault, History, Lost, Saw
from tests.cluster.upstream import reply_of

STREAMS = 100
TOLD_S = LEASE_S + 2
"""Bound from a kill to the end on each resumed stream."""
PAUSE_S = 2.0
"""Bound of the longest pause of 99 of 100 clients in a rolling restart."""


class Show:
    """One show: its cluster, its clients, and the bounds that it has broken."""

    def __init__(self, folder: Path, seed: int, history: History) -> None:
        self.folder = folder
        self.luck = Random(seed)
        self.run = Run(history)
        self.broken: list[str] = []
        self._seed = seed
        self._numbers = iter(range(10**9))

    def expect(self, holds: bool, words: str) -> None:
        sys.stdout.write(f"  {'ok' if holds else 'BROKEN'}: {words}\n")
        sys.stdout.flush()
        if not holds:
            self.broken.append(words)

    def load(self, doors: Sequence[Door], *, tokens: int, rate: float, on_interrupt: str = "fail") -> Load:
        return Load(lambda: doors, self.run.history, self._seed, (tokens, tokens), rate, (on_interrupt,))

    async def start(self, cluster: Cluster, owner: int, load: Load, readers: trio.Nursery) -> str:
        """Start a turn in one replica, and let a client read it through all. Returns the turn."""
        name = f"s{next(self._numbers)}"
        starter = Client(replace(load, doors=lambda: [cluster.replicas[owner].door]), name)
        session = await starter.create()
        turn = await starter.start(session)
        readers.start_soon(Client(load, f"{name}r").follow, session, turn, View(self.run.history, turn))
        return turn

    async def start_many(
        self, cluster: Cluster, load: Load, readers: trio.Nursery, *, count: int = STREAMS
    ) -> list[list[str]]:
        """Start turns in all replicas, and return once each has been told an event. Returns the turns of each."""
        turns: list[list[str]] = [[] for _ in cluster.replicas]

        async def start(owner: int) -> None:
            turns[owner].append(await self.start(cluster, owner, load, readers))

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(start, number % len(cluster.replicas))
        wanted = {turn for owned in turns for turn in owned}
        while wanted - {fact.turn for fact in self.run.history.of(Saw)}:  # noqa: ASYNC110  a history has no event
            await trio.sleep(0.1)
        return turns

    def told_at(self, turn: str) -> float:
        """When a client was told the end of a turn, or that it has lost events."""
        for fact in self.run.history.facts:
            if (
                isinstance(fact, Lost | Saw)
                and fact.turn == turn
                and (isinstance(fact, Lost) or fact.event.is_terminal)
            ):
                return fact.at
        return float("inf")

    def ends(self) -> Counter[str]:
        turns = [turn for session in self.run.stored.sessions.values() for turn in session.turns]
        return Counter(f"{turn.state} {turn.reason}".strip() for turn in turns)

    def state_of(self, turns: Sequence[str]) -> Counter[str]:
        kept = {it.id: it for session in self.run.stored.sessions.values() for it in session.turns}
        return Counter(f"{kept[turn].state} {kept[turn].reason}".strip() for turn in turns)


@asynccontextmanager
async def _open_cluster(show: Show, *, drain_timeout_s: float = 2, is_direct: bool = False) -> AsyncIterator[Cluster]:
    programs = binaries()
    assert programs is not None, "there is no PostgreSQL server"
    with open_database(programs) as database:
        await have_database(database)
        async with open_cluster(
            database, show.folder, show.run.history, is_direct=is_direct, DRAIN_TIMEOUT_S=str(drain_timeout_s)
        ) as cluster:
            yield cluster


async def show_kill(show: Show, *, times: int = 20) -> None:
    """kill -9 of one of three replicas under 100 streams."""
    spans: list[float] = []
    killed: list[str] = []
    others: list[str] = []
    async with _open_cluster(show, is_direct=True) as cluster:
        for number in range(times):
            async with trio.open_nursery() as readers:
                load = show.load(cluster.doors, tokens=60, rate=5)
                turns = await show.start_many(cluster, load, readers)
                await trio.sleep(show.luck.uniform(0, 2))
                victim = show.luck.randrange(len(cluster.replicas))
                at = time.monotonic()
                await Faults(cluster).have("kill", cluster.replicas[victim].name, 0)
            hit = [show.told_at(turn) - at for turn in turns[victim]]
            spans += hit
            killed += turns[victim]
            others += [turn for owner, owned in enumerate(turns) if owner != victim for turn in owned]
            sys.stdout.write(f"  kill {number + 1}: {len(hit)} turns, the last end after {max(hit):.2f} s\n")
            sys.stdout.flush()
        await show.run.check(cluster)
    show.expect(max(spans) <= TOLD_S, f"each end is told within {TOLD_S} s: {spread(sorted(spans))}")
    show.expect(set(show.state_of(killed)) == {"interrupted crash"}, f"turns of the killed: {show.state_of(killed)}")
    show.expect(set(show.state_of(others)) == {"completed"}, f"turns of the others: {show.state_of(others)}")


async def show_freeze(show: Show, *, holds_beats: bool = False) -> None:
    """SIGSTOP past the lease, then CONT.

    Args:
        holds_beats: Keep the beats of the zombie from the database for the first seconds. So it is not by its beats
            that it learns of its death, and only the check of the owner in each write stands between it and the rows.
    """
    async with _open_cluster(show) as cluster:
        async with trio.open_nursery() as readers:
            load = show.load(cluster.doors, tokens=150, rate=5)
            turns = await show.start_many(cluster, load, readers, count=30)
            zombie = cluster.replicas[0]
            [(fence,)] = cluster.database.run(
                f"SELECT DISTINCT owner FROM {cluster.schema}.turns WHERE {_among(turns[0])}"
            )
            calls = _inputs(show, turns[0])
            session = await Client(load, "anew").create()
            zombie.freeze()
            began_at = time.monotonic()
            await trio.sleep(2.5 * LEASE_S)
            before = _rows(cluster, turns[0], fence)
            if holds_beats:
                zombie.link.hold(_BEAT)
            thawed_at = time.monotonic()
            zombie.thaw()
            new_work = await _try_at_zombie(zombie, session) if holds_beats else Counter[str]()
            zombie.link.release()
            assert zombie.process is not None
            with trio.move_on_after(10):
                await zombie.process.wait_gone()
            gone = zombie.process.gone
            after = _rows(cluster, turns[0], fence)
            show.run.history.add(Fault(at=began_at, kind="freeze", target=zombie.name, until=time.monotonic()))
        await show.run.check(cluster)
        dropped = sorted(it.closed_at - thawed_at for it in cluster.upstream.calls() if it.input in calls)
    show.expect(before == after, "the zombie changes no row of its turns, and adds none")
    show.expect(not new_work["accepted"], f"it accepts no new work: {dict(new_work)}")
    show.expect(gone is not None and gone.exit_code == 71, f"the zombie ends with 71: {gone and gone.exit_code}")
    show.expect(
        len(dropped) == len(turns[0]) and dropped[-1] <= 1,
        f"its model calls are dropped within 1 s: {spread(dropped)}",
    )
    show.expect(set(show.state_of(turns[0])) == {"interrupted crash"}, f"its turns: {show.state_of(turns[0])}")
    others = [*turns[1], *turns[2]]
    show.expect(set(show.state_of(others)) == {"completed"}, f"turns of the others: {show.state_of(others)}")


_BEAT = b"WITH beat AS"
"""What is in the statement with which an owner beats."""


def _among(turns: Sequence[str]) -> str:
    return "id IN ({})".format(", ".join(f"'{turn}'" for turn in turns))


def _rows(cluster: Cluster, turns: Sequence[str], fence: int) -> list[tuple[object, ...]]:
    """These turns, and all that belongs to an owner."""
    of_schema = f"{cluster.schema}."
    return cluster.database.run(
        f"SELECT t.*::text FROM {of_schema}turns t WHERE {_among(turns)} OR owner = {fence} "
        f"UNION ALL SELECT s.*::text FROM {of_schema}segments s WHERE owner = {fence} "
        f"UNION ALL SELECT s.*::text FROM {of_schema}sessions s WHERE owner = {fence} ORDER BY 1"
    )


def _inputs(show: Show, turns: Sequence[str]) -> set[str]:
    """The inputs of turns, by which their calls of the model are found."""
    accepted = {it.turn: it.input for it in show.run.history.of(Accepted)}
    return {accepted[turn] for turn in turns}


async def _try_at_zombie(zombie: Replica, session: str) -> Counter[str]:
    """Ask a process that was taken for dead for new work, until it is gone or 3 s are over."""
    answers: Counter[str] = Counter()
    body = {"input": "anew tokens=5", "background": True, "on_conflict": "queue"}
    until = time.monotonic() + 3
    while time.monotonic() < until:
        try:
            answer = await call(zombie.door, "POST", f"/sessions/{session}/turns", AUTH, body)
        except NoAnswerError:
            break
        answers["accepted" if answer.status < 300 else str(answer.status)] += 1
        await trio.sleep(0.05)
    return answers


async def show_database(show: Show) -> None:
    """pg_ctl stop -m immediate for twice the lease."""
    lasts_s = 2 * LEASE_S
    answers: Counter[str] = Counter()
    async with _open_cluster(show) as cluster:
        async with trio.open_nursery() as readers:
            short = await show.start_many(cluster, show.load(cluster.doors, tokens=30, rate=5), readers, count=30)
            long = await show.start_many(cluster, show.load(cluster.doors, tokens=150, rate=5), readers, count=60)
            began_at = time.monotonic()
            async with trio.open_nursery() as during:
                during.start_soon(Faults(cluster).have, "database killed", DATABASE, lasts_s)
                await trio.sleep(1.5)
                while time.monotonic() < began_at + lasts_s - 5:
                    answers[await _try_new_work(show.luck.choice(cluster.doors))] += 1
                    await trio.sleep(0.3)
            until = time.monotonic()
        await show.run.check(cluster)
    turns = [turn for owned in (*short, *long) for turn in owned]
    told = Counter(
        int(fact.at - began_at)
        for fact in show.run.history.of(Saw)
        if began_at < fact.at < until and not fact.event.is_terminal
    )
    show.expect(
        min(told[second] for second in range(lasts_s - 1)) > 100,
        f"streams go on; events by second: {sorted(told.items())}",
    )
    show.expect(set(show.state_of(turns)) == {"completed"}, f"no turn is lost or interrupted: {show.state_of(turns)}")
    show.expect(set(answers) == {"503 with Retry-After"}, f"new work: {dict(answers)}")


async def _try_new_work(door: Door) -> str:
    try:
        answer = await call(door, "POST", "/sessions", AUTH, {})
    except NoAnswerError as error:
        return str(error)
    return f"{answer.status}{' with Retry-After' if 'retry-after' in answer.headers else ''}"


async def show_peers(show: Show) -> None:
    """The network between the replicas is away for twice the lease, and each of them has its database."""
    async with _open_cluster(show, is_direct=True) as cluster:
        async with trio.open_nursery() as readers:
            turns = await show.start_many(cluster, show.load(cluster.doors, tokens=100, rate=5), readers, count=30)
            async with trio.open_nursery() as during:
                for replica in cluster.replicas:
                    during.start_soon(Faults(cluster).have, "peers silent", replica.name, 2 * LEASE_S)
        await show.run.check(cluster)
    ends = show.state_of([turn for owned in turns for turn in owned])
    show.expect(set(ends) == {"completed"}, f"nobody is taken over: {dict(ends)}")


async def show_failover(show: Show) -> None:
    """The primary dies under load, and its synchronous standby takes its place."""
    programs = binaries()
    assert programs is not None
    with open_database(programs) as primary, open_database(programs) as standby:
        await trio.to_thread.run_sync(primary.make)
        await primary.start()
        await trio.to_thread.run_sync(partial(standby.make_standby_of, primary, "second"))
        await standby.start()
        await trio.to_thread.run_sync(primary.name_standbys, "second")
        async with open_cluster(primary, show.folder, show.run.history) as cluster:
            load = replace(show.load(cluster.doors, tokens=40, rate=20), tokens=(5, 60))
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(Client(load, f"c{number}").run)
                await trio.sleep(10)
                began_at = time.monotonic()
                await primary.stop("immediate")
                await trio.sleep(1)
                await trio.to_thread.run_sync(standby.promote)
                for replica in cluster.replicas:
                    replica.link.server = standby.socket
                    await replica.link.cut()
                cluster.database = standby
                show.run.history.add(Fault(at=began_at, kind="failover", target=DATABASE, until=time.monotonic()))
                await trio.sleep(10)
                load.is_over = True
            await show.run.check(cluster)
    ends = show.ends()
    show.expect(not ends["interrupted crash"], f"nobody was taken over: {dict(ends)}")


async def show_fences(show: Show, *, turns: int = 20) -> None:
    """A failover to a standby that lacks the last commits: the numbers of owners, sessions and turns are given twice.

    A process with such a number is frozen meanwhile, with running turns. When it goes on, another one has its number,
    and turns with the numbers of its turns.
    """
    programs = binaries()
    assert programs is not None
    with open_database(programs) as primary, open_database(programs) as standby:
        await have_database(primary)
        async with open_cluster(primary, show.folder, show.run.history) as cluster:
            zombie, heir, _ = cluster.replicas
            await trio.to_thread.run_sync(partial(standby.make_standby_of, primary, "late"))
            await Faults(cluster).have("kill", zombie.name, 0)
            lost = [await _start_raw(zombie.door, f"lost{number} tokens=400 rate=5") for number in range(turns)]
            await trio.sleep(3)
            numbers = _numbers_of(cluster, [turn for _, turn in lost])
            async with trio.open_nursery() as readers:
                ends: list[str] = []
                for session, turn in lost:
                    readers.start_soon(_read_raw, zombie.door, session, turn, ends)
                await trio.sleep(1)
                frozen_at = time.monotonic()
                zombie.freeze()
                await primary.stop("immediate")
                await standby.start()
                await trio.to_thread.run_sync(standby.promote)
                # As if the copy had been made just before the process got its numbers.
                for table, (column, number) in numbers.items():
                    sequence = f"pg_get_serial_sequence('{cluster.schema}.{table}', '{column}')"
                    standby.run(f"SELECT setval({sequence}, {number}, false)")
                for replica in cluster.replicas:
                    replica.link.server = standby.socket
                    await replica.link.cut()
                cluster.database = standby
                show.run.history.add(Fault(at=frozen_at, kind="failover", target=DATABASE, until=time.monotonic()))
                await Faults(cluster).have("kill", heir.name, 0)
                kept = [await _start_raw(heir.door, f"kept{number} tokens=60 rate=5") for number in range(turns)]
                again = _numbers_of(cluster, [turn for _, turn in kept])
                show.expect(
                    again["owners"] == numbers["owners"]
                    and all(abs(again[table][1] - numbers[table][1]) < turns // 2 for table in numbers),
                    f"the numbers of the owner, of sessions and of turns are given twice: from {numbers}, {again} on",
                )
                zombie.link.hold(_BEAT)
                thawed_at = time.monotonic()
                zombie.thaw()
                answers = await _try_at_zombie(zombie, kept[0][0])
                zombie.link.release()
                assert zombie.process is not None
                with trio.move_on_after(10):
                    await zombie.process.wait_gone()
                gone = zombie.process.gone
                show.run.history.add(Fault(at=frozen_at, kind="freeze", target=zombie.name, until=time.monotonic()))
            await show.run.check(cluster)
            dropped = sorted(it.closed_at - thawed_at for it in cluster.upstream.calls() if it.input.startswith("lost"))
    stored = {turn.id: turn for session in show.run.stored.sessions.values() for turn in session.turns}
    wrong = [turn for _, turn in kept if turn not in stored or stored[turn].text != reply_of(stored[turn].input)]
    show.expect(not wrong, f"each turn of the other owner has its whole text: {wrong[:3]}")
    show.expect(not ends, f"the process tells no end: {ends[:3]}")
    show.expect(not answers["accepted"], f"it accepts no new work: {dict(answers)}")
    show.expect(gone is not None and gone.exit_code == 71, f"it ends with 71: {gone and gone.exit_code}")
    show.expect(
        len(dropped) == turns and dropped[-1] <= 1, f"its model calls are dropped within 1 s: {spread(dropped)}"
    )
    show.expect(show.state_of([turn for _, turn in kept]) == {"completed": turns}, f"ends: {dict(show.ends())}")


def _numbers_of(cluster: Cluster, turns: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The lowest number of these turns, of their sessions, and of their owner; and the columns that have them."""
    query = f"SELECT min(key), min(session), min(owner) FROM {cluster.schema}.turns WHERE {_among(turns)}"
    [(key, session, fence)] = cluster.database.run(query)
    return {"turns": ("key", key), "sessions": ("key", session), "owners": ("fence", fence)}


async def _start_raw(door: Door, text: str) -> tuple[str, str]:
    """Start a turn in a new session, which is not noted in the history. Returns the ids of both."""
    session = msgspec.json.decode((await call(door, "POST", "/sessions", AUTH, {})).body)["id"]
    started = await call(door, "POST", f"/sessions/{session}/turns", AUTH, {"input": text, "background": True})
    assert started.status == 202, started
    return session, msgspec.json.decode(started.body)["id"]


async def _read_raw(door: Door, session: str, turn: str, ends: list[str]) -> None:
    """Read a stream up to its end, and note a terminal event."""
    try:
        async with open_call(door, "GET", f"/sessions/{session}/turns/{turn}/events", AUTH) as stream:
            ends += [f"{turn} {event}" async for event in stream.events(silence_s=60) if event.is_terminal]
    except NoAnswerError:
        pass


async def show_no_standby(show: Show) -> None:
    """synchronous_standby_names names a server that is not there: nothing is acknowledged."""
    async with _open_cluster(show) as cluster:
        load = replace(show.load(cluster.doors, tokens=40, rate=20), tokens=(5, 60))
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(Client(load, f"c{number}").run)
            await trio.sleep(3)
            began_at = time.monotonic()
            await trio.to_thread.run_sync(cluster.database.name_standbys, "nobody")
            await trio.sleep(1)
            since = time.monotonic()
            await trio.sleep(2 * LEASE_S)
            until = time.monotonic()
            await trio.to_thread.run_sync(cluster.database.name_standbys, "")
            show.run.history.add(Fault(at=began_at, kind="no standby", target=DATABASE, until=time.monotonic()))
            await trio.sleep(5)
            load.is_over = True
        await show.run.check(cluster)
    acknowledged = [fact for fact in show.run.history.facts if since < fact.at < until and fact.is_acknowledgement]
    show.expect(not acknowledged, f"nothing is acknowledged meanwhile: {acknowledged[:3]}")


async def show_rolling(show: Show, *, fits: bool, proxy: str, on_interrupt: str = "fail") -> None:
    """A rolling restart of three replicas behind a proxy, under 200 clients that resume."""
    async with (
        _open_cluster(show, drain_timeout_s=12 if fits else 2, is_direct=True) as cluster,
        open_front(proxy, cluster.doors, show.folder) as front,
    ):
        load = replace(
            show.load([front], tokens=0, rate=2, on_interrupt=on_interrupt), tokens=(10, 16) if fits else (30, 60)
        )
        clients = [Client(load, f"c{number}") for number in range(2 * STREAMS)]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.have_streams)
                await trio.sleep(0.03)
            await trio.sleep(3)
            for client in clients:
                client.forget_pauses()
            for replica in cluster.replicas:
                await Faults(cluster).have("stop", replica.name, 0)
                await trio.sleep(1)
            load.is_over = True
        await show.run.check(cluster)
    ends = show.ends()
    pauses = sorted(client.longest_s for client in clients)
    if fits or on_interrupt != "fail":
        show.expect(set(ends) == {"completed"}, f"nothing is interrupted: {dict(ends)}")
    else:
        show.expect(set(ends) <= {"completed", "interrupted shutdown"}, f"ends: {dict(ends)}")
    p99 = pauses[len(pauses) * 99 // 100]
    show.expect(p99 < PAUSE_S, f"longest pause of each client: {spread(pauses)}")


SHOWS: dict[str, Callable[[Show], Awaitable[None]]] = {
    "kill": show_kill,
    "kill-twice": partial(show_kill, times=2),
    "freeze": show_freeze,
    "freeze-beats": partial(show_freeze, holds_beats=True),
    "database": show_database,
    "peers": show_peers,
    "failover": show_failover,
    "no-standby": show_no_standby,
    "fences": show_fences,
    "rolling": partial(show_rolling, fits=False, proxy="nginx"),
    "rolling-retry": partial(show_rolling, fits=False, proxy="nginx", on_interrupt="retry"),
    "rolling-continue": partial(show_rolling, fits=False, proxy="nginx", on_interrupt="continue"),
    "rolling-drain": partial(show_rolling, fits=True, proxy="nginx"),
    "rolling-haproxy": partial(show_rolling, fits=False, proxy="haproxy"),
    "rolling-drain-haproxy": partial(show_rolling, fits=True, proxy="haproxy"),
}


async def main(names: Sequence[str], seed: int) -> int:
    failed = 0
    for name in names:
        sys.stdout.write(f"{name} (seed {seed})\n")
        folder = Path(tempfile.mkdtemp(prefix=f"lastcall-{name}-"))
        with (folder / "history").open("wb") as file:
            show = Show(folder, seed, History(file))
            await SHOWS[name](show)
        sys.stdout.write(summary(show.run.history.facts, show.run.stored).replace("\n", "\n  ") + "\n")
        for broken in show.run.broken[:20]:
            sys.stdout.write(f"  BROKEN {broken.rule}: {broken.words[:500]}\n")
        if show.broken or show.run.broken:
            failed += 1
            sys.stdout.write(f"  the history is in {folder}\n")
        else:
            shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Single kinds of faults over a loaded cluster.")
    parser.add_argument("names", nargs="*", choices=SHOWS, default=list(SHOWS))
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    sys.exit(trio.run(main, arguments.names, arguments.seed))
