"""Many sessions, made quickly by SQL; ``python -m tests.storage.sqlite.many_rows 1000000`` measures with so many."""

import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import apsw
import trio

from service.storage.moments import moment
from service.storage.records import SessionPatch
from service.storage.sqlite import SqliteStore, open_sqlite_store
from tests.storage.rows import T0, a_session, a_turn, at, ended, said

TURNS = 10


def fill(db: apsw.Connection, sessions: int, *, turns: int = 2) -> None:
    """Sessions ``sess_000000`` and on, a second apart up to T0, each with completed turns ``turn_000000_0`` and on."""
    db.execute(
        """
        WITH RECURSIVE n (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < :sessions)
        INSERT INTO sessions (id, created_at, last_accessed_at, expires_at, idle_timeout_s, head, turns_begun)
        SELECT printf('sess_%06d', n), :now - (:sessions - n) * 1000000, :now, :now + 3600000000 + n * 1000, 3600,
        printf('turn_%06d_%d', n, :turns - 1), :turns FROM n
        """,
        {"sessions": sessions, "now": moment(T0), "turns": turns},
    )
    db.execute("INSERT INTO session_settings (session, metadata) SELECT key, '{}' FROM sessions WHERE id LIKE 'sess_%'")
    db.execute(
        """
        WITH RECURSIVE n (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < :turns)
        INSERT INTO turns (session, ordinal, id, parent, state, model, created_at, background, last_seq, message_bytes,
        input, output)
        SELECT key, n, printf('turn_%s_%d', substr(sessions.id, 6), n),
        iif(n, printf('turn_%s_%d', substr(sessions.id, 6), n - 1), NULL), 'completed', 'm', created_at, 0, 2, 2,
        '[{"id":"i","type":"message","role":"user","text":"1"}]',
        '[{"id":"o","type":"message","role":"assistant","text":"2"}]'
        FROM sessions CROSS JOIN n WHERE sessions.id LIKE 'sess_%'
        """,
        {"turns": turns},
    )
    # A key of each session, and one of a session that is gone for long.
    db.execute(
        """
        INSERT INTO idempotency_keys (caller, key, fingerprint, session, session_id, turn, gone_at)
        SELECT '', id, x'00', key, id, head, NULL FROM sessions WHERE id LIKE 'sess_%' UNION ALL
        SELECT '', 'gone ' || id, x'00', NULL, id, NULL, key FROM sessions WHERE id LIKE 'sess_%'
        """
    )


TREE = "tree"
"""The session of :func:`fill_tree`."""


def fill_tree(db: apsw.Connection, turns: int) -> None:
    """A session of an even number of turns ``turn_0`` and on; the last one is ``turn_newest``.

    Turns of odd ordinals follow the first one, and the others the turn two before them.
    """
    db.execute(
        "INSERT INTO sessions (id, created_at, last_accessed_at, expires_at, idle_timeout_s, head, turns_begun) "
        "VALUES (?, ?, ?, ?, 3600, 'turn_newest', ?)",
        (TREE, *3 * [moment(T0)], turns),
    )
    db.execute("UPDATE sessions SET expires_at = expires_at + 3600000000 WHERE id = ?", (TREE,))
    db.execute("INSERT INTO session_settings (session, metadata) SELECT key, '{}' FROM sessions WHERE id = ?", (TREE,))
    db.execute(
        """
        WITH RECURSIVE n (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < :turns)
        INSERT INTO turns (session, ordinal, id, parent, state, model, created_at, started_at, background, last_seq,
        message_bytes, input, output)
        SELECT key, n, iif(n = :turns - 1, 'turn_newest', printf('turn_%d', n)),
        iif(n = 0, NULL, printf('turn_%d', iif(n % 2, 0, n - 2))), 'completed', 'm', created_at, created_at, 0, 2, 2,
        '[{"id":"i","type":"message","role":"user","text":"1"}]',
        '[{"id":"o","type":"message","role":"assistant","text":"2"}]'
        FROM sessions CROSS JOIN n WHERE sessions.id = :tree
        """,
        {"turns": turns, "tree": TREE},
    )
    db.execute(
        "INSERT INTO siblings (session, parent, ordinal, place) SELECT session, parent, ordinal, row_number() OVER "
        "(ORDER BY ordinal) FROM turns WHERE parent = 'turn_0'"
    )


MEASURED: dict[str, Callable[[SqliteStore, str], Awaitable[object]]] = {
    "create": lambda store, n: store.create_session(a_session(f"new-{n}", idle_timeout_s=1e6), now=T0),
    "get": lambda store, n: store.get_session(f"sess_{n}", now=T0),
    "update": lambda store, n: store.update_session(f"sess_{n}", SessionPatch(title="x"), now=T0),
    "begin turn": lambda store, n: store.begin_turn(a_turn(f"new-{n}", f"sess_{n}"), now=T0),
    "end turn": lambda store, n: store.end_turn(ended(a_turn(f"new-{n}", f"sess_{n}")), runs=said("Hi"), now=T0),
    "fork 10 turns": lambda store, n: store.fork_session(
        f"sess_{n}", at=f"turn_{n}_{TURNS - 1}", copy_id=f"fork-{n}", now=T0
    ),
    "path": lambda store, n: store.read_path(f"sess_{n}", f"turn_{n}_1", bytes_max=None),
    "measure a path": lambda store, n: store.measure_path(f"sess_{n}", f"turn_{n}_1"),
    "page of 50": lambda store, _: store.list_sessions(limit=50, after=None, status=None, now=T0),
    "page of running": lambda store, _: store.list_sessions(limit=50, after=None, status="running", now=T0),
    "expire 100": lambda store, _: store.delete_expired(now=at(3600 + 100), limit=100),
    "count": lambda store, _: store.count_sessions(status=None, now=T0),
}


async def measure(path: Path, sessions: int) -> None:
    async with open_sqlite_store(path) as store:
        started = time.perf_counter()
        await store._writing.call(lambda db: fill(db, sessions, turns=TURNS))
        say(f"filled in {time.perf_counter() - started:.0f} s")
    started = time.perf_counter()
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        say(f"opened in {(time.perf_counter() - started) * 1e3:.0f} ms")
        step = sessions // 101
        for name, call in MEASURED.items():
            times = []
            for n in range(1, 101):
                started = time.perf_counter()
                await call(store, f"{n * step:06d}")
                times.append((time.perf_counter() - started) * 1e3)
            times.sort()
            say(f"{name:16} p50 {statistics.median(times):8.2f} ms  p99 {times[98]:8.2f} ms")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as directory:  # on a disk, not in memory
        trio.run(measure, Path(directory, "lastcall.db"), int(sys.argv[1]))
