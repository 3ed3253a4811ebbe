"""Clients that read the content of answers; the load client only judges how a stream ends."""

import json
import socket
import sqlite3
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import trio

from bench.server_process import ServerProcess
from tests.process.lastcall import CAP_S, SSE


@asynccontextmanager
async def open_client(*servers: ServerProcess) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client of each server, with a new connection for each request."""
    async with AsyncExitStack() as clients:
        yield [
            await clients.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{server.port}",
                    timeout=CAP_S,
                    limits=httpx.Limits(max_keepalive_connections=0),
                )
            )
            for server in servers
        ]


async def new_session(client: httpx.AsyncClient, session_id: str) -> str:
    assert (await client.post("/sessions", json={"id": session_id})).status_code == 201
    return f"/sessions/{session_id}"


async def start(client: httpx.AsyncClient, session: str, **fields: Any) -> str:
    """Start a turn in the background, and return its path."""
    started = await client.post(f"{session}/turns", json={"input": "go", "background": True, **fields})
    assert started.status_code == 202, started.text
    return started.headers["location"]


class Stream:
    """The events of a turn that one client sees."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.begun = trio.Event()
        self.scope = trio.CancelScope()

    async def run(self, client: httpx.AsyncClient, method: str, path: str, body: object = None) -> None:
        """Read the stream to its end, or until ``scope`` is cancelled: then the client leaves."""
        with self.scope:
            async with client.stream(method, path, json=body, headers=SSE) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        self.events.append(json.loads(line.removeprefix("data: ")))
                        if self.events[-1]["type"] == "turn.delta":
                            self.begun.set()

    @property
    def end(self) -> tuple[str, str | None]:
        return self.events[-1]["type"], self.events[-1].get("reason")

    @property
    def seqs(self) -> list[int]:
        return [event["seq"] for event in self.events]


async def all_begun(streams: list[Stream]) -> None:
    for stream in streams:
        await stream.begun.wait()


def owner_of(path: Path, session: str) -> int:
    """The process that runs a session's turns: it listens at the address that the store has for the session's owner."""
    with closing(sqlite3.connect(path)) as db:
        query = "SELECT address FROM sessions JOIN owners ON fence = owner WHERE id = ?"
        (address,) = db.execute(query, (session.rpartition("/")[2],)).fetchone()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"\0{address[1:]}")
        return int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


async def wait_stored(path: Path, turn_id: str, text: str) -> None:
    """Wait until the checkpoints of a turn that runs have the text: then a crash leaves it."""
    query = "SELECT text FROM event_pages JOIN turns ON turns.key = event_pages.turn WHERE id = ? ORDER BY after"

    async def is_stored() -> bool:
        with closing(sqlite3.connect(path, timeout=CAP_S)) as db:
            return text in b"".join(piece for (piece,) in db.execute(query, (turn_id,))).decode()

    await wait_until(is_stored)


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(CAP_S):
        while not await condition():  # noqa: ASYNC110  the condition is about another process
            await trio.sleep(0.02)
