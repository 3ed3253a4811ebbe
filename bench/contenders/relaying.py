"""The shared part of all contenders in Python but Lastcall: relays a reply from the model server, and stores it.

It is written in the usual way: one ``httpx.AsyncClient``, an async generator of tokens, and a ``finally`` that stores
the reply so far (synchronously, so that no cancellation can hit it).
"""

import json
import os
import sqlite3
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from pydantic import BaseModel


class Ask(BaseModel):
    """The body of ``POST /chat``, the same for every contender."""

    message: str


class NewSession(BaseModel):
    """The body of ``POST /sessions``."""

    id: str


class Session(BaseModel):
    """A session as Lastcall shows it: as many fields, of the same types."""

    id: str
    created_at: datetime
    last_accessed_at: datetime
    expires_at: datetime
    idle_timeout_s: float
    title: str | None
    model: str | None
    system_message: str | None
    metadata: dict[str, str]
    status: str
    head: str | None
    message_count: int
    usage: dict[str, int]


def _open_database() -> sqlite3.Connection:
    database = sqlite3.connect(os.environ["BENCH_STORE"], isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    return database


class Replies:
    """The stored replies, whole or partial, in SQLite."""

    def __init__(self) -> None:
        self._database = _open_database()
        self._database.execute("CREATE TABLE IF NOT EXISTS replies (message TEXT, text TEXT, state TEXT)")

    def keep(self, message: str, text: str, state: str) -> None:
        self._database.execute("INSERT INTO replies VALUES (?, ?, ?)", (message, text, state))

    def close(self) -> None:
        self._database.close()


class Sessions:
    """The stored sessions, in SQLite. They are read in the event loop: a look by the key takes some microseconds."""

    def __init__(self) -> None:
        self._database = _open_database()
        self._database.row_factory = sqlite3.Row
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, created_at TEXT, last_accessed_at TEXT, "
            "expires_at TEXT, idle_timeout_s REAL, title TEXT, model TEXT, system_message TEXT, metadata TEXT, "
            "status TEXT, head TEXT, message_count INTEGER, input_tokens INTEGER, output_tokens INTEGER)"
        )

    def create(self, session_id: str) -> dict[str, Any] | None:
        now = datetime.now(UTC)
        times = (now.isoformat(), now.isoformat(), (now + timedelta(seconds=1800)).isoformat())
        self._database.execute(
            "INSERT INTO sessions VALUES (?, ?, ?, ?, 1800, NULL, NULL, NULL, '{}', 'idle', NULL, 0, 0, 0)",
            (session_id, *times),
        )
        return self.find(session_id)

    def find(self, session_id: str) -> dict[str, Any] | None:
        row = self._database.execute("SELECT * FROM sessions WHERE id = ?", (session_id,)).fetchone()
        if row is None:
            return None
        session = dict(row)
        session["metadata"] = json.loads(session["metadata"])
        session["usage"] = {name: session.pop(name) for name in ("input_tokens", "output_tokens")}
        return session

    def close(self) -> None:
        self._database.close()


def open_model_client() -> httpx.AsyncClient:
    """A client without a limit on connections: a thousand people stream at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=os.environ["BENCH_UPSTREAM"], limits=limits, timeout=httpx.Timeout(5, read=60))


async def relay(client: httpx.AsyncClient, replies: Replies, message: str) -> AsyncGenerator[str, None]:
    """Yield the reply's tokens as they arrive. The reply is stored after every kind of end."""
    body = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": message}]}
    tokens: list[str] = []
    state = "interrupted"
    try:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {") and (token := _token(json.loads(line[6:]))):
                    tokens.append(token)
                    yield token
        state = "completed"
    finally:
        replies.keep(message, "".join(tokens), state)


def _token(chunk: dict[str, Any]) -> str:
    return str(chunk["choices"][0]["delta"].get("content", "")) if chunk["choices"] else ""


def delta(token: str) -> dict[str, str]:
    """The event of a token."""
    return {"type": "turn.delta", "text": token}


COMPLETED = {"type": "turn.completed"}
INTERRUPTED = {"type": "turn.interrupted"}
