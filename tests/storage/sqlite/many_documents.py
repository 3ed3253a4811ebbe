"""What search costs; ``python -m tests.storage.sqlite.many_documents 1000000`` measures with so many messages.

Each turn has two messages, with words that are as common as those of a language are; a turn of even number has the word
``even``, the others ``odd``, all ``every``. The cost of the index is that of the ends with it less those without: until
the turns have ended, and until the housekeeping has indexed them.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from unittest import mock

import apsw
import msgspec
import trio

from service.storage.moments import moment
from service.storage.records import Page, TurnRecord
from service.storage.sqlite import SqliteStore, documents, open_sqlite_store
from service.storage.sqlite import store as sqlite_store
from service.storage.sqlite.rows import as_json
from tests.storage.rows import T0, a_session, a_turn, ended, said
from tests.storage.sqlite.many_rows import say

TURNS = 5
WORDS = [f"w{n:x}" for n in range(100_000)]
WORDS_A_TURN = 60
TIMES = 20
FILLED_AT_ONCE = 1000
_CUMULATIVE = list(accumulate(1 / (n + 3) for n in range(len(WORDS))))
"""The n-th word is as common as in a language (Zipf)."""


def fill(db: apsw.Connection, first: int, sessions: int) -> None:
    """Sessions with the keys ``first`` and on, each with ended turns that are indexed."""
    chosen = random.Random(first)
    for session in range(first, first + sessions):
        now = moment(T0) + session
        db.execute(
            "INSERT INTO sessions (key, id, created_at, last_accessed_at, expires_at, idle_timeout_s, head, "
            "turns_begun) VALUES (?, ?, ?, ?, ?, 1e9, ?, ?)",
            (session, f"s{session}", now, now, now + 10**15, f"t{session}-{TURNS - 1}", TURNS),
        )
        db.execute("INSERT INTO session_settings (session, metadata) VALUES (?, '{}')", (session,))
        for n in range(TURNS):
            words = chosen.choices(WORDS, cum_weights=_CUMULATIVE, k=WORDS_A_TURN)
            words += ["even" if n % 2 == 0 else "odd", "every"]
            half = len(words) // 2
            db.execute(
                "INSERT INTO turns (session, ordinal, id, parent, state, model, created_at, background, last_seq, "
                "message_bytes, message_items, input, output) "
                "VALUES (?, ?, ?, ?, 'completed', 'm', ?, 0, 2, 2, 2, ?, ?)",
                (
                    *(session, n, f"t{session}-{n}", f"t{session}-{n - 1}" if n else None, now),
                    as_json([{"id": "i", "type": "message", "role": "user", "text": " ".join(words[:half])}]),
                    as_json([{"id": "o", "type": "message", "role": "assistant", "text": " ".join(words[half:])}]),
                ),
            )
            documents.add_turn(db, db.last_insert_rowid(), session, set(words))


QUERIES: dict[str, str] = {
    "a word of all turns": "every",
    "a common word": WORDS[0],
    "two common words": f"{WORDS[0]} {WORDS[1]}",
    "a rare word": WORDS[70_000],
    "a rare and a common one": f"{WORDS[70_000]} every",
    "an unknown word": "nothing",
    "an unknown and a common one": "nothing every",
    "no turn has both": "even odd",
    "all of the common ones": f"every even {' '.join(WORDS[:8])}",
    "32 common words": " ".join(WORDS[:32]),
    "1000 words": " ".join(WORDS[:1000]),
    "1000 unknown words": " ".join(f"z{n}" for n in range(1000)),
}


async def _search(store: SqliteStore, query: str, **more: object) -> Page[object]:
    return await store.search_sessions(query, limit=20, after=None, status=None, now=T0, **more)  # type: ignore[arg-type,return-value]


async def _second_page(store: SqliteStore) -> Page[object]:
    first = await store.search_sessions("every", limit=20, after=None, status=None, now=T0)
    return await store.search_sessions("every", limit=20, after=first.next, status=None, now=T0)  # type: ignore[return-value]


def _calls() -> Iterator[tuple[str, Callable[[SqliteStore], Awaitable[Page[object]]]]]:
    for name, query in QUERIES.items():
        yield name, lambda store, query=query: _search(store, query)  # type: ignore[misc]
    yield "two pages of every", _second_page
    yield "every, of another owner", lambda store: _search(store, "every", owner="ann")
    yield "every, with a pair of none", lambda store: _search(store, "every", metadata={"k": "v"})


async def measure_queries(store: SqliteStore) -> None:
    medians = []
    for name, call in _calls():
        times = []
        page: Page[object] = Page((), None)
        for _ in range(TIMES):
            started = time.perf_counter()
            page = await call(store)
            times.append((time.perf_counter() - started) * 1e3)
        times.sort()
        medians.append(statistics.median(times))
        more = f"{len(page.data)} rows{', partial' if page.partial else ''}"
        say(f"{name:28} p50 {medians[-1]:7.1f} ms  max {times[-1]:7.1f} ms  {more}")
    say(f"{'median of these':28} p50 {statistics.median(medians):7.1f} ms")


# What the index adds to the end of a turn


@contextmanager
def _without_index() -> Iterator[None]:
    no_document = mock.patch.object(documents, "add_turn", return_value=None)
    with no_document, mock.patch.object(sqlite_store, "terms_of", _no_terms):
        yield


async def _no_terms(_: object) -> Sequence[str]:
    return ()


def _text(length: int, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choices(WORDS, cum_weights=_CUMULATIVE, k=length // 4))[:length]


async def _end_turns(store: SqliteStore, names: list[str], *, reply: int) -> tuple[float, float]:
    """End turns that are begun before. Returns the CPU time of the process for each until it has ended, and until it is
    in the index, in microseconds."""
    begun: list[TurnRecord] = []
    for n, name in enumerate(names):
        turn = a_turn(name, "ending", texts=[_text(1024, n)])
        await store.begin_turn(turn, now=T0)
        text = _text(reply, n + 1)
        begun.append(msgspec.structs.replace(ended(turn, text=text)))
    started = time.process_time()
    for turn in begun:
        await store.end_turn(turn, runs=said(turn.text), now=T0)
    until_ended = time.process_time() - started
    while store.writer._indexing is not None:  # noqa: ASYNC110  no event tells the end
        await trio.sleep(0.01)
    return until_ended / len(names) * 1e6, (time.process_time() - started) / len(names) * 1e6


async def measure_ends(store: SqliteStore) -> None:
    await store.create_session(a_session("ending", idle_timeout_s=1e6), now=T0)
    for name, reply, count in (("2 KB", 2048, 200), ("1 MiB", 1024 * 1024, 5)):
        costs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        for turn in range(5):
            for kind, measured in costs.items():
                names = [f"{name}-{turn}-{kind}-{n}" for n in range(count)]
                if kind == "without":
                    with _without_index():
                        measured.append(await _end_turns(store, names, reply=reply))
                else:
                    measured.append(await _end_turns(store, names, reply=reply))
        without, _ = map(statistics.median, zip(*costs["without"], strict=True))
        until_ended, until_indexed = map(statistics.median, zip(*costs["with"], strict=True))
        say(
            f"the end of a turn of 1 KB + {name}: {without:.0f} us without the index; with it {until_ended:.0f} us "
            f"until it has ended, {until_indexed:.0f} us until it is indexed (CPU, n = 5 x {count})"
        )


async def measure(path: Path, messages: int) -> None:
    sessions = messages // (2 * TURNS)
    async with open_sqlite_store(path) as store:
        started = time.perf_counter()
        for first in range(1, sessions + 1, FILLED_AT_ONCE):
            count = min(FILLED_AT_ONCE, sessions + 1 - first)
            await store._writing.call(lambda db, first=first, count=count: fill(db, first, count))  # type: ignore[misc]
        say(f"filled in {time.perf_counter() - started:.0f} s")
        await measure_queries(store)
        await measure_ends(store)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as directory:  # on a disk, not in memory
        trio.run(measure, Path(directory, "lastcall.db"), int(sys.argv[1]))
