"""What a store has, as a replica tells it that was started afterwards, and whether its rows agree with each other."""

from collections.abc import Sequence
from typing import Any

import msgspec
import trio

from bench.database import Database
from tests.cluster.calls import call, open_call
from tests.cluster.checker import Stored, StoredSession, StoredTurn
from tests.cluster.clients import AUTH
from tests.cluster.cluster import Door
from tests.cluster.history import Event

READERS = 8
_VISIBLE = "SELECT key FROM {s}.sessions WHERE deletion IS NULL"
WRONG = {
    "a turn is open": "SELECT id FROM {s}.turns WHERE owner IS NOT NULL OR state IN ('queued', 'running')",
    "a session has open turns": "SELECT id FROM {s}.sessions WHERE open_turns <> 0 OR owner IS NOT NULL",
    "a session counts other turns than it has": (
        f"SELECT id FROM {{s}}.sessions s WHERE key IN ({_VISIBLE}) AND turns <> "
        "(SELECT count(*) FROM {s}.turns t WHERE t.session = s.key)"
    ),
    "a session counts other messages than its turns have": (
        f"SELECT id FROM {{s}}.sessions s WHERE key IN ({_VISIBLE}) AND message_count <> "
        "(SELECT coalesce(sum(messages), 0) FROM {s}.turns t WHERE t.session = s.key)"
    ),
    "a turn has no session": "SELECT id FROM {s}.turns WHERE session NOT IN (SELECT key FROM {s}.sessions)",
    "events have no turn": "SELECT turn FROM {s}.event_pages WHERE turn NOT IN (SELECT key FROM {s}.turns)",
    "a found turn is not there": (
        "SELECT turn FROM {s}.documents WHERE turn IS NOT NULL AND turn NOT IN (SELECT key FROM {s}.turns)"
    ),
    "an ended turn is not found": (
        f"SELECT id FROM {{s}}.turns WHERE session IN ({_VISIBLE}) AND owner IS NULL "
        "AND key NOT IN (SELECT turn FROM {s}.documents WHERE turn IS NOT NULL)"
    ),
    "the head is not there": (
        f"SELECT id FROM {{s}}.sessions s WHERE key IN ({_VISIBLE}) AND head IS NOT NULL "
        "AND NOT EXISTS (SELECT FROM {s}.turns t WHERE t.session = s.key AND t.id = s.head)"
    ),
}
"""Queries that return no row in a sound store without open turns."""


def open_turns(database: Database, schema: str) -> int:
    [(number,)] = database.run(f"SELECT count(*) FROM {schema}.turns WHERE owner IS NOT NULL")
    return int(number)


def wrong_rows(database: Database, schema: str) -> list[str]:
    found = ((what, database.run(query.replace("{s}", schema))) for what, query in WRONG.items())
    return [f"{what}: {rows[:5]}" for what, rows in found if rows]


async def read_store(door: Door, database: Database, schema: str) -> Stored:
    """All sessions with their turns and events. No turn is open."""
    listed = [it async for it in _pages(door, "/sessions?limit=100")]
    sessions: dict[str, StoredSession] = {}
    send, receive = trio.open_memory_channel[dict[str, Any]](len(listed))
    for session in listed:
        send.send_nowait(session)
    send.close()
    async with trio.open_nursery() as nursery:
        for _ in range(READERS):
            nursery.start_soon(_read_sessions, door, receive.clone(), sessions)
        receive.close()
    return Stored(sessions, await trio.to_thread.run_sync(wrong_rows, database, schema))


async def _read_sessions(
    door: Door, receive: "trio.MemoryReceiveChannel[dict[str, Any]]", sessions: dict[str, StoredSession]
) -> None:
    async with receive:
        async for session in receive:
            name = session["id"]
            turns = [await _read_turn(door, it) async for it in _pages(door, f"/sessions/{name}/turns?limit=100")]
            sessions[name] = StoredSession(name, session["title"] or "", tuple(turns))


async def _read_turn(door: Door, turn: dict[str, Any]) -> StoredTurn:
    events: Sequence[Event] = ()
    async with open_call(door, "GET", f"/sessions/{turn['session_id']}/turns/{turn['id']}/events", AUTH) as stream:
        if stream.status == 200:
            events = [event async for event in stream.events(silence_s=10)]
    return StoredTurn(turn["id"], turn["input"], turn["state"], turn["text"], tuple(events), turn["reason"] or "")


async def _pages(door: Door, path: str) -> Any:
    after = ""
    while after is not None:
        answer = await call(door, "GET", path + (f"&after={after}" if after else ""), AUTH)
        assert answer.status == 200, answer
        page = msgspec.json.decode(answer.body)
        for it in page["data"]:
            yield it
        after = page["next"]
