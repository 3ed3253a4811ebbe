"""The shared part of all contenders in Python but Lastcall: relays a reply from the model server, and stores it.

It is written in the usual way: one ``httpx.AsyncClient``, an async generator of tokens, and a ``finally`` that stores
the reply so far (synchronously, so that no cancellation can hit it).
"""

import json
import os
import sqlite3
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from pydantic import BaseModel


class Ask(BaseModel):
    """The body of ``POST /chat``, the same for every contender."""

    message: str


class Replies:
    """The stored replies, whole or partial, in SQLite."""

    def __init__(self) -> None:
        self._database = sqlite3.connect(os.environ["BENCH_STORE"], isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute("CREATE TABLE IF NOT EXISTS replies (message TEXT, text TEXT, state TEXT)")

    def keep(self, message: str, text: str, state: str) -> None:
        self._database.execute("INSERT INTO replies VALUES (?, ?, ?)", (message, text, state))

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
