"""Kills a loaded service at random moments and compares the answers to its clients with the store.

``python -m tests.storage.sqlite.crash 200`` kills it two hundred times, on one database.
"""

import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import apsw
import msgspec
import trio

from service.clock import wall_clock
from service.errors import LastcallError, SessionNotFoundError
from service.sessions.commands import NewSession, NewTurn
from service.sessions.sessions import Sessions
from service.sessions.turns.turn import Turn
from service.settings import Settings
from service.storage.records import SEQ_AFTER_CRASH, Checkpoint
from service.storage.sqlite import SqliteStore, forks, indexing, maintenance, open_sqlite_store
from service.supervisor import open_service
from tests.storage import rows

TOKENS = 30
REPLY = "".join(f"{n} " for n in range(TOKENS))
CLIENTS = 8
FORK = "fork-"


class Fact(msgspec.Struct, array_like=True):
    """A fact that a client was told, or a request it makes next: ``created``, ``deleting``, ``accepted``, ``seen``...

    In ``text`` a ``lives`` has the deadline of a session without use, and a ``forked`` the copied turns.
    """

    kind: str
    session: str
    turn: str = ""
    seq: int = 0
    state: str = ""
    text: str = ""


def tell(*fact: str | int) -> None:
    """Tell a fact in one write to a pipe, which outlives the process."""
    os.write(1, msgspec.json.encode(Fact(*fact)) + b"\n")  # type: ignore[arg-type]


# In the process that is killed


async def serve(path: str, seed: int) -> None:
    luck = random.Random(seed)
    settings = Settings(
        store_url=f"sqlite:{path}",
        model_url=f"scripted:?tokens={TOKENS}&rate=300",
        checkpoint_interval_s=0.1,
        expiry_interval_s=0.1,
    )
    note_checkpoint = Turn.note_checkpoint

    def tell_checkpoint(turn: Turn, checkpoint: Checkpoint) -> None:
        note_checkpoint(turn, checkpoint)
        tell("kept", turn.session_id, turn.id, turn.stored_seq)

    Turn.note_checkpoint = tell_checkpoint  # type: ignore[method-assign, assignment]
    forks.STEP_S = 0  # so that a kill hits the middle of some forks
    indexing.STEP_S = 0  # a row in each step: so that a kill hits the middle of the indexing, also if it comes late
    async with open_service(settings) as service, trio.open_nursery() as nursery:
        tell("ready", "")
        earlier = [it.id for it in (await service.sessions.list_sessions(limit=50)).data if it.idle_timeout_s > 1]
        for _ in range(CLIENTS):
            nursery.start_soon(_be_a_client, service.sessions, earlier, luck)


async def _be_a_client(sessions: Sessions, earlier: list[str], luck: random.Random) -> None:
    while True:
        if luck.random() < 0.25:
            await _let_expire(sessions, luck)
        for session in luck.sample(earlier, min(len(earlier), luck.randint(0, 3))):
            with suppress(LastcallError):
                await _fork(sessions, session, luck)
        session = (await sessions.create_session(NewSession())).id
        tell("created", session)
        await _have_turns(sessions, session, luck)
        if luck.random() < 0.5 and (copy := await _fork(sessions, session, luck)) is not None:
            if luck.random() < 0.5:
                await _have_turns(sessions, copy, luck)
            await _delete_some(sessions, copy, luck)
        await _delete_some(sessions, session, luck)


async def _have_turns(sessions: Sessions, session: str, luck: random.Random) -> None:
    with suppress(LastcallError):
        for _ in range(luck.randint(1, 4)):
            await _have_a_turn(sessions, session, luck)


async def _delete_some(sessions: Sessions, session: str, luck: random.Random) -> None:
    if luck.random() < 0.3:
        tell("deleting", session)
        await sessions.delete_session(session)
        tell("deleted", session)


async def _let_expire(sessions: Sessions, luck: random.Random) -> None:
    """Use a session that exists until its deadline, even if a turn moves the deadline, and never again afterwards."""
    record = await sessions.create_session(NewSession(idle_timeout_s=0.1))
    tell("lives", record.id, "", 0, "", record.expires_at.isoformat())
    if luck.random() < 0.7:
        with suppress(LastcallError):
            turn, watch = await sessions.start_turn(record.id, NewTurn(text="hi", background=True))
            watch.release()
            await turn.wait_ended()
            record = await sessions.get_session(record.id)
            tell("lives", record.id, "", 0, "", record.expires_at.isoformat())
    try:
        while True:
            await trio.sleep(luck.uniform(0, 0.1))
            await sessions.get_session(record.id)
    except SessionNotFoundError:
        tell("expired", record.id)


class Copied(msgspec.Struct, array_like=True):
    """The expected content of a copied turn."""

    input: str
    state: str
    text: str
    last_seq: int


async def _fork(sessions: Sessions, session: str, luck: random.Random) -> str | None:
    """Fork at the last ended turn, or at an earlier one. Returns the copy's id; None without a turn to copy."""
    turns = [turn for turn in (await sessions.list_turns(session, limit=100)).data if not turn.is_open]
    if not turns:
        return None
    path = turns[: luck.randint(1, len(turns))]
    copy = await sessions.fork_session(session, at=path[-1].id, copy_id=f"{FORK}{luck.getrandbits(64):x}")
    copied = [Copied(turn.input[0].text, turn.state, turn.text, turn.last_seq) for turn in path]
    tell("forked", copy.id, "", 0, "", msgspec.json.encode(copied).decode())
    return copy.id


async def _have_a_turn(sessions: Sessions, session: str, luck: random.Random) -> None:
    text = f"input {luck.random()}"
    turn, watch = await sessions.start_turn(session, NewTurn(text=text, background=True, on_conflict="queue"))
    watch.release()
    tell("accepted", session, turn.id, 0, "", text)
    leave_at = luck.randint(1, 2 * TOKENS)
    cursor = 0
    while not turn.log.closed and cursor < leave_at:
        await turn.log.wait_beyond(cursor)
        cursor = turn.log.last_seq
        tell("seen", session, turn.id, cursor)
    if cursor >= leave_at and luck.random() < 0.5:
        await sessions.cancel_turn(session, turn.id)
    if luck.random() < 0.8:
        record = await turn.wait_ended()
        tell("ended", session, turn.id, record.last_seq, record.state, record.text)


# In the process that kills it


@dataclass
class Told:
    """All facts of a turn, the latest of each kind."""

    input: str = ""
    seen: int = 0
    kept: int = 0
    end: Fact | None = None


@dataclass
class Facts:
    created: set[str] = field(default_factory=set)
    deleting: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    turns: dict[tuple[str, str], Told] = field(default_factory=dict)
    order: dict[str, list[str]] = field(default_factory=dict)
    forked: dict[str, list[Copied]] = field(default_factory=dict)
    lives: dict[str, datetime] = field(default_factory=dict)
    killed_at: datetime = field(default_factory=wall_clock)

    def add(self, fact: Fact) -> None:
        told = self.turns.setdefault((fact.session, fact.turn), Told())
        match fact.kind:
            case "created" | "deleting" | "deleted":
                getattr(self, fact.kind).add(fact.session)
            case "forked":
                self.created.add(fact.session)
                self.forked[fact.session] = msgspec.json.decode(fact.text, type=list[Copied])
            case "lives":
                self.lives[fact.session] = datetime.fromisoformat(fact.text)
            case "expired":
                self.deleted.add(fact.session)
            case "accepted":
                told.input = fact.text
                self.order.setdefault(fact.session, []).append(fact.turn)
            case "seen":
                told.seen = fact.seq
            case "kept":
                told.kept = fact.seq
            case "ended":
                told.end = fact


def run_and_kill(path: Path, seed: int, facts: Facts) -> None:
    """Start the service on a database, kill it at a random moment, and note the answers to its clients."""
    moment = random.Random(seed).uniform(0.02, 0.7)
    command = [sys.executable, "-m", "tests.storage.sqlite.crash", "--serve", str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 60)[0], "it does not start"
            first = process.stdout.readline()
            assert first, "it did not start"
            time.sleep(moment)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            facts.killed_at = wall_clock()
        for line in (first, *process.stdout.read().splitlines(keepends=True)):
            if line.startswith(b"[") and line.endswith(b"\n"):  # the service's log lines are in between
                facts.add(msgspec.json.decode(line, type=Fact))


async def compare(path: Path, facts: Facts) -> None:
    """Open the store as the next service would, and check every fact."""
    async with open_sqlite_store(path) as store:
        await store.recover(now=wall_clock())
        for session in facts.created - facts.deleting:
            record = await store.get_session(session, now=wall_clock())
            assert record.open_turns == 0, f"{session} is stuck"
            turns = [
                turn.id for turn in (await store.list_turns(session, limit=100, after=None, now=wall_clock())).data
            ]
            copied = facts.forked.get(session, [])
            accepted = facts.order.get(session, [])
            begun = turns[len(copied) :]
            assert len(turns) >= len(copied), "a copied turn is gone"
            assert begun[: len(accepted)] == accepted, "an accepted turn is gone, or out of order"
            assert len(begun) <= len(accepted) + 1, "more than the one turn that was accepted just before the crash"
            assert record.head == (turns[-1] if turns else None)
        for session in facts.deleted:
            try:
                await store.get_session(session, now=wall_clock())
            except SessionNotFoundError:
                continue
            raise AssertionError(f"{session} came back")
        for (session, turn), told in facts.turns.items():
            if told.input and session not in facts.deleting:
                await _compare_turn(store, session, turn, told)
        for session, expires_at in facts.lives.items():
            if expires_at > facts.killed_at:
                await store.get_session(session, now=facts.killed_at)
        for session in forks_in(path):
            await _compare_copies(store, session, facts.forked.get(session))
        assert maintenance.check(path) == [], "each ended turn is in the search index, and no other"
    _check_file(path)


async def _compare_copies(store: SqliteStore, session: str, copied: list[Copied] | None) -> None:
    """Check that every fork in the store is whole, even if the process died before it told a client."""
    turns = (await store.list_turns(session, limit=100, after=None, now=wall_clock())).data
    if copied is not None:
        turns = turns[: len(copied)]
        found = [Copied(turn.input[0].text, turn.state, turn.text, turn.last_seq) for turn in turns]
        assert found == copied, "a copy is not what was copied"
    assert turns, "a copy lacks its turns"
    for turn in turns:
        kept = (await store.read_events(session, turn.id)).kept
        assert kept == turn.last_seq - 1 or turn.reason == "crash"


async def _compare_turn(store: SqliteStore, session: str, turn: str, told: Told) -> None:
    record = await store.get_turn(session, turn, now=wall_clock())
    assert record.input[0].text == told.input
    assert REPLY.startswith(record.text)
    texts = await rows.told(store, session, turn)
    kept = (await store.read_events(session, turn)).kept
    assert record.text == "".join(texts), "text and events are of different moments"
    if told.end is not None:
        assert (record.state, record.text, record.last_seq) == (told.end.state, told.end.text, told.end.seq)
    if record.reason == "crash":
        assert kept >= told.kept, "a checkpoint is gone"
        assert record.last_seq == SEQ_AFTER_CRASH > told.seen
    else:
        assert kept + 1 == record.last_seq >= told.seen


WRONG = (
    "SELECT id FROM turns WHERE owner IS NOT NULL AND session IN (SELECT key FROM sessions WHERE deletion = 0)",
    """SELECT id FROM sessions WHERE deletion = 0
    AND turns_begun <> (SELECT count(*) FROM turns WHERE session = sessions.key)""",
    """SELECT id FROM sessions WHERE deletion = 0
    AND message_count <> (SELECT total(1 + (output LIKE '%assistant%')) FROM turns WHERE session = sessions.key)""",
    "SELECT key FROM sessions WHERE key NOT IN (SELECT session FROM session_settings)",
    "SELECT turn FROM outputs WHERE turn IN (SELECT key FROM turns WHERE owner IS NULL)",
    "SELECT id FROM sessions WHERE deletion = 1",
)
"""Queries that return no row in a sound database."""


def forks_in(path: Path) -> list[str]:
    db = apsw.Connection(str(path))
    try:
        return [row[0] for row in db.execute("SELECT id FROM sessions WHERE deletion = 0 AND id LIKE ?", (f"{FORK}%",))]
    finally:
        db.close()


def _check_file(path: Path) -> None:
    db = apsw.Connection(str(path))
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        for wrong in WRONG:
            assert db.execute(wrong).fetchall() == [], wrong
    finally:
        db.close()


def main(times: int) -> None:
    facts = Facts()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "lastcall.db")
        for seed in range(times):
            run_and_kill(path, seed, facts)
            trio.run(compare, path, facts)
            ended = sum(told.end is not None for told in facts.turns.values())
            sys.stdout.write(
                f"{seed + 1} kills: {len(facts.turns)} turns, {ended} of them ended; {len(facts.forked)} forks, "
                f"{len(facts.lives)} sessions with a short life; nothing lost\n"
            )


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        trio.run(serve, sys.argv[2], int(sys.argv[3]))
    else:
        main(int(sys.argv[1]))
