"""Many calls with one idempotency key through several workers: one turn, one call of a model, also if a worker dies."""

import json
import os
import signal
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import trio

from tests.process.clients import new_session, open_client, owner_of
from tests.process.lastcall import CAP_S, CONFIGURED_4, SSE, open_lastcall
from tests.upstreams.raw_server import Connection, delta, finish, open_raw_server

pytestmark = pytest.mark.parallel

CALLS = 200
ENDS = ("turn.completed", "turn.interrupted")
TABLES = ("sessions", "turns", "idempotency_keys")


class Model:
    """A model server that begins a reply, and ends it when the test says so."""

    def __init__(self) -> None:
        self.calls = 0
        self.asked = trio.Event()
        self.goes_on = trio.Event()

    async def answer(self, connection: Connection) -> None:
        """Answer one request, which has arrived."""
        self.calls += 1
        self.asked.set()
        await connection.send_head()
        await connection.send_event(delta("Hello"))
        await self.goes_on.wait()
        for event in (delta("."), finish()):
            await connection.send_event(event)
        await connection.end_body()


class Callers:
    """Clients that send one call with one key until they have a whole answer: half of them as a stream."""

    def __init__(self, client: httpx.AsyncClient, path: str, body: Mapping[str, object], *, key: str) -> None:
        self.turns: set[str] = set()
        self.ends: set[str] = set()
        self.begun = 0
        self.all_begun = trio.Event()
        self.cut = self.unended = 0
        self._client = client
        self._path = path
        self._body = body
        self._key = {"Idempotency-Key": key}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(CALLS):
                nursery.start_soon(self._call, number % 2 == 0)

    async def _call(self, streams: bool) -> None:
        has_begun = False
        while True:
            try:
                headers = self._key | (SSE if streams else {})
                async with self._client.stream("POST", self._path, json=self._body, headers=headers) as response:
                    if response.status_code == 503:
                        self.cut += 1
                        await trio.sleep(float(response.headers["retry-after"]))
                        continue
                    assert response.status_code == 200, await response.aread()
                    if streams and not has_begun:
                        has_begun = True
                        self._note_begun()
                    text = (await response.aread()).decode()
                last = json.loads(text.strip().rpartition("data: ")[2])
                if "state" in last or last["type"] in ENDS:
                    self.turns.add(response.headers["location"])
                    self.ends.add(last["state"] if "state" in last else last["type"].removeprefix("turn."))
                    return
                self.unended += 1
            except httpx.TransportError:  # the worker has died
                self.cut += 1
                await trio.sleep(0.05)

    def _note_begun(self) -> None:
        self.begun += 1
        if self.begun == CALLS // 2:
            self.all_begun.set()


def stored(folder: Path) -> list[int]:
    """How many sessions, turns and keys the store has."""
    with closing(sqlite3.connect(folder / "lastcall.db", timeout=CAP_S)) as db:
        return [db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in TABLES]


async def test_many_calls_with_one_key_make_one_turn_and_one_call_of_the_model_also_if_its_worker_dies(
    tmp_path: Path,
) -> None:
    """First no worker dies; then the one with the turn does, as soon as it has asked the model; then once all begun."""
    models: list[Model] = []

    async def reply(connection: Connection) -> None:
        while True:  # a connection is kept, and may serve the next call
            await connection.receive_request()
            await models[-1].answer(connection)

    async with (
        open_raw_server(reply) as upstream,
        open_lastcall(CONFIGURED_4, tmp_path, model_url=upstream.url, store_timeout_s=CAP_S) as server,
        open_client(server) as [client],
    ):
        calls = [
            ("/chat", {"message": "Hi"}),
            ("/sessions/a/turns", {"input": "Hi"}),
            ("/sessions/b/turns", {"input": "Hi"}),
        ]
        for number, (path, body) in enumerate(calls, 1):
            model = Model()
            models.append(model)
            if number > 1:
                await new_session(client, path.split("/")[2])
            callers = Callers(client, path, body, key=f"key-{number}")
            with trio.fail_after(2 * CAP_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(callers.run)
                    await (model.asked if number == 2 else callers.all_begun).wait()
                    if number == 1:
                        model.goes_on.set()
                    else:
                        os.kill(owner_of(tmp_path / "lastcall.db", path.removesuffix("/turns")), signal.SIGKILL)
            assert len(callers.turns) == 1
            assert callers.ends == {"completed" if number == 1 else "interrupted"}
            # An overloaded machine may silence a worker for three seconds: the others log it, and end its streams.
            is_overloaded = "another worker hangs" in server.log()
            assert callers.unended == 0 or is_overloaded
            assert callers.cut == 0 or number > 1 or is_overloaded
            assert model.calls == 1
            assert stored(tmp_path) == [number, number, number]
