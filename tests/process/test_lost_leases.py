"""Processes on a shared database that lose their lease, and a database that is away for longer than one."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from bench.database import open_database
from bench.server_process import ServerProcess, python_command
from tests.postgres_server import PostgresServer, needed_binaries
from tests.process.clients import Stream, all_begun, new_session, start, wait_until
from tests.process.lastcall import CAP_S, SERVE, open_lastcall, wait_gone

BEAT_S, LEASE_S = 0.3, 4.0
"""A pause of the machine holds up no beat for so long."""
CRASHED = 71


def command(lease_s: float) -> list[str]:
    """The command of a server that takes others for dead after so many seconds without a beat."""
    return python_command(
        "-c",
        "import sys\n"
        "from service.storage.postgres import beats, owners\n"
        f"beats.BEAT_S, owners.LEASE_S, owners.GAP_S = {BEAT_S}, {lease_s}, 1.0\n"
        "from service.__main__ import main\n"
        "sys.argv = ['lastcall', 'serve']\n"
        "sys.exit(main())",
    )


class Model:
    """A model server that sends a token every 20 ms for as long as a call is open.

    Attributes:
        live: How many calls are open.
    """

    def __init__(self) -> None:
        self.live = 0
        self.url = ""
        self.is_over = False
        """Whether the replies end with the next token."""

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            while not (await stream.receive_some()).endswith(b"}"):
                pass
            self.live += 1
            try:
                await stream.send_all(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
                )
                while not self.is_over:
                    await trio.sleep(0.02)
                    await stream.send_all(b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n')
                end = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
                await stream.send_all(end)
            except trio.BrokenResourceError:
                pass  # the service has closed the call
            finally:
                self.live -= 1


@asynccontextmanager
async def open_model() -> AsyncIterator[Model]:
    async with trio.open_nursery() as nursery:
        model = Model()
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        model.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1"
        await nursery.start(trio.serve_listeners, model.serve, [listener])
        yield model
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_short_leased(
    folder: Path, model: Model, url: str, *, lease_s: float = LEASE_S, **settings: Any
) -> AsyncIterator[tuple[ServerProcess, httpx.AsyncClient]]:
    await trio.Path(folder).mkdir()
    settings = {"LASTCALL_STORE_URL": url, "model_url": model.url, **settings}
    async with (
        open_lastcall(SERVE, folder, argv=command(lease_s), **settings) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=4 * CAP_S) as client,
    ):
        yield server, client


async def test_a_process_that_was_frozen_past_its_lease_changes_nothing_and_tells_no_second_end(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    with postgres.empty_schema() as schema:
        opened = partial(open_short_leased, url=postgres.url, store_schema=schema)
        async with (
            open_model() as model,
            opened(tmp_path / "zombie", model, lease_s=60) as (zombie, at_zombie),
            opened(tmp_path / "other", model) as (_, at_other),
            trio.open_nursery() as nursery,
        ):
            streams = [Stream(), Stream()]
            paths = [await new_session(at_zombie, f"s{number}") for number in range(2)]
            for stream, path in zip(streams, paths, strict=True):
                nursery.start_soon(stream.run, at_zombie, "POST", f"{path}/turns", {"input": "hi"})
            await all_begun(streams)
            queued = await start(at_zombie, paths[0], input="next", on_conflict="queue")

            zombie.signal_group(signal.SIGSTOP)

            async def are_taken_over() -> bool:
                turns = [(await at_other.get(f"{path}/turns")).json() for path in paths]
                return all(
                    turn["state"] == "interrupted" for page in turns for turn in page.get("data", [{"state": ""}])
                )

            await wait_until(are_taken_over)
            rows = f"SELECT t::text FROM {schema}.turns AS t ORDER BY key"
            kept = postgres.run(rows)
            assert len(kept) == 3
            model_calls = model.live
            zombie.signal_group(signal.SIGCONT)
            woken_at = trio.current_time()
            gone_at: list[float] = []

            async def note_dropped() -> None:
                while model.live:  # noqa: ASYNC110  it is told by other connections
                    await trio.sleep(0.005)
                gone_at.append(trio.current_time())

            nursery.start_soon(note_dropped)
            gone = await wait_gone(zombie)
            left_at = trio.current_time()
            assert gone.exit_code == CRASHED
            assert model_calls == 2
            assert postgres.run(rows) == kept
            for stream in streams:
                assert stream.end[0] == "turn.delta", "the stream ends in order, and without an end of the turn"
            back = Stream()
            await back.run(at_other, "GET", f"{queued}/events")
            assert back.end == ("turn.interrupted", "crash")
        print(f"calls dropped after {gone_at[0] - woken_at:.3f} s, gone after {left_at - woken_at:.3f}")  # noqa: T201


async def test_a_database_that_is_away_for_two_leases_ends_no_turn_and_all_ends_are_kept(tmp_path: Path) -> None:
    with open_database(needed_binaries()) as database:
        await trio.to_thread.run_sync(database.make)
        await database.start()
        async with (
            open_model() as model,
            open_short_leased(tmp_path / "one", model, database.url) as (_, client),
            open_short_leased(tmp_path / "two", model, database.url) as (_, at_other),
            trio.open_nursery() as nursery,
        ):
            streams = [Stream(), Stream()]
            paths = [await new_session(client, f"s{number}") for number in range(2)]
            for stream, path in zip(streams, paths, strict=True):
                nursery.start_soon(stream.run, client, "POST", f"{path}/turns", {"input": "hi"})
            await all_begun(streams)
            await database.stop("immediate")
            seen = [len(stream.events) for stream in streams]
            await trio.sleep(2 * LEASE_S)  # the time for which the database is away
            for stream, before in zip(streams, seen, strict=True):
                assert len(stream.events) > before + 10, "streams go on"
                assert stream.end[0] == "turn.delta"
            refused = await client.post(f"{paths[0]}/turns", json={"input": "more", "on_conflict": "queue"})
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            model.is_over = True

            async def has_no_call() -> bool:
                return not model.live

            await wait_until(has_no_call)
            await trio.sleep(0.5)
            assert all(stream.end[0] == "turn.delta" for stream in streams), "the ends wait"
            await database.start()

            async def have_ended() -> bool:
                return all(stream.end[0] == "turn.completed" for stream in streams)

            await wait_until(have_ended)
            for stream, path in zip(streams, paths, strict=True):
                assert stream.events[-1].get("stored", True)
                [turn] = (await at_other.get(f"{path}/turns")).json()["data"]
                assert turn["state"] == "completed"
                assert turn["text"] == "".join(it.get("text", "") for it in stream.events)
