"""Replies that are cut while clients read them or wait for them: no client may take one for a success.

A model server says the beginning of each reply and then nothing more, so that a test ends it as it likes: by a signal
to the server, a deadline, or a deletion.
"""

import json
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import trio

from bench.server_process import ServerProcess
from tests.process.lastcall import CAP_S, SERVE, open_lastcall
from tests.upstreams.raw_server import Connection, delta, open_raw_server

ENDINGS: Mapping[str, Mapping[str, Any]] = {
    "stop": {"drain_timeout_s": 0},
    "kill": {},
    "deadline": {"turn_timeout_s": 12},  # enough for a first chunk to all clients of a test, also on a busy machine
    "no-token": {"first_token_timeout_s": 2},  # enough for the model server's head
    "deletion": {},
}
"""The ways a reply is cut here, with the settings of the server for them."""


def _piece(index: int, arguments: str, **opening: str) -> dict[str, object]:
    function = {"arguments": arguments, **({"name": opening.pop("name")} if opening else {})}
    call = {"index": index, "type": "function", "function": function, **opening}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}


BEGUN: Mapping[str, tuple[object, ...]] = {
    "text": (delta("The answer "), delta("is not ")),
    "call": (
        *(_piece(0, "", id="call_a", name="get_time"), _piece(0, '{"city":"Oslo"}')),
        *(_piece(1, "", id="call_b", name="get_weather"), _piece(1, '{"city":')),
    ),
    "silent": (),
}
"""The beginnings of replies by the model: in mid-text; in the second of two calls, the first is whole; without one."""
_LAST_PIECES = ("is not ", '{"city":')


def is_last_piece(piece: object) -> bool:
    """Whether a piece is the last one of a beginning. Pieces that a client was late for come as one."""
    return isinstance(piece, str) and piece.endswith(_LAST_PIECES)


class CutModel:
    """A model server whose replies stop in their midst."""

    def __init__(self) -> None:
        self._asked = 0
        self._more = trio.Event()

    async def wait_asked(self, times: int) -> None:
        """Return once it has been asked so many times."""
        with trio.fail_after(CAP_S):
            while self._asked < times:
                await self._more.wait()

    async def reply(self, connection: Connection) -> None:
        model = (await connection.receive_request()).json["model"]
        self._asked += 1
        self._more.set()
        self._more = trio.Event()
        await connection.send_head()
        for event in BEGUN[str(model)]:
            await connection.send_event(event)
        await connection.wait_closed()


@asynccontextmanager
async def open_cut_server(folder: Path, ending: str, **settings: Any) -> AsyncIterator[tuple[CutModel, ServerProcess]]:
    """A server whose replies stop in their midst, with the settings for an ending and a store in the folder."""
    model = CutModel()
    logs = Path(tempfile.mkdtemp(dir=folder))
    options = {"store_url": f"sqlite:{folder}/lastcall.db", "model_retries_max": 0, **ENDINGS[ending], **settings}
    async with (
        open_raw_server(model.reply) as upstream,
        open_lastcall(SERVE, logs, model_url=upstream.url, **options) as server,
    ):
        yield model, server


async def wait_begun(server: ServerProcess, folder: Path) -> list[str]:
    """Wait until each reply that is in progress has said its beginning.

    Return the names under which the replies can be had and deleted as responses, which chat completions are, too.
    """
    base_url = f"http://127.0.0.1:{server.port}"
    live = _live_turns(folder)
    async with httpx.AsyncClient(base_url=base_url, timeout=CAP_S) as client, trio.open_nursery() as nursery:
        for session, turn in live:
            nursery.start_soon(_wait_last_piece, client, f"/sessions/{session}/turns/{turn}/events")
    return [turn.replace("turn_", "resp_") for _, turn in live]


def _live_turns(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(folder / "lastcall.db")) as store:
        query = "SELECT s.id, t.id FROM turns t JOIN sessions s ON t.session = s.key WHERE t.owner IS NOT NULL"
        return store.execute(query).fetchall()


async def _wait_last_piece(client: httpx.AsyncClient, path: str) -> None:
    async with client.stream("GET", path) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: ") and is_last_piece(json.loads(line.removeprefix("data: ")).get("text")):
                return
    raise AssertionError(f"{path} has ended without its last piece")


async def delete_responses(server: ServerProcess, names: list[str]) -> None:
    """Delete responses, live ones too, side by side."""
    statuses: list[int] = []

    async def delete(name: str) -> None:
        statuses.append((await client.delete(f"/v1/responses/{name}")).status_code)

    base_url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=base_url, timeout=CAP_S) as client, trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(delete, name)
    assert set(statuses) == {200}, statuses
