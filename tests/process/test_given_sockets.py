"""A listening socket that another program opened and keeps, as systemd and circus do: it outlives every server."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import trio

from bench.server_process import ROOT, python_command
from tests.process.lastcall import APPLICATION, CAP_S, PATIENT

pytestmark = pytest.mark.parallel

CONFIG = ("--config", "python:service.hosting.hypercorn_config")
WAYS = [("bare", 0), ("bare", 2), ("configured", 1), ("configured", 2)]


def said(log: Path) -> str:
    return log.read_text()


@asynccontextmanager
async def serving(listener: socket.socket, log: Path, way: str, workers: int) -> AsyncIterator[trio.Process]:
    """Start a server on this socket, and wait until it serves."""
    config = CONFIG if way == "configured" else ("--worker-class", "trio")
    command = python_command(
        *("-m", "hypercorn", *config, "--workers", str(workers), "--bind", f"fd://{listener.fileno()}", APPLICATION)
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
    env |= {"LASTCALL_STORE_URL": f"sqlite:{log.parent}/lastcall.db", "LASTCALL_LOG_FORMAT": "json"}
    env |= {"LASTCALL_DRAIN_TIMEOUT_S": "0", **PATIENT}
    with trio.fail_after(4 * CAP_S), log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            command,
            env=env,
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while said(log).count('"serving"') < max(workers, 1):  # noqa: ASYNC110  another process logs
                assert process.poll() is None, said(log)
                await trio.sleep(0.02)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CAP_S):
                await process.wait()
                with suppress(ChildProcessError):  # orphans become our children if a test has asked for that
                    while True:
                        await trio.to_thread.run_sync(os.waitpid, -process.pid, 0)


async def stop(process: trio.Process) -> int:
    process.send_signal(signal.SIGTERM)
    with trio.fail_after(CAP_S):
        return await process.wait()


async def health(port: int) -> int:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=3 * CAP_S) as client:
        return (await client.get("/healthz")).status_code


@pytest.mark.parametrize(("way", "workers"), WAYS)
async def test_a_client_that_connects_after_a_stop_waits_for_the_next_start(
    tmp_path: Path, way: str, workers: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with serving(listener, tmp_path / "first.log", way, workers) as first:
            assert await health(port) == 200
            assert await stop(first) == 0
        answers: list[int] = []

        async def ask() -> None:
            answers.append(await health(port))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            async with serving(listener, tmp_path / "second.log", way, workers) as second:
                with trio.fail_after(CAP_S):
                    while not answers:  # noqa: ASYNC110
                        await trio.sleep(0.02)
                assert await stop(second) == 0
        assert answers == [200]


@pytest.mark.parametrize(("way", "workers"), WAYS)
async def test_a_stop_does_not_disturb_the_next_server_that_is_up_already(
    tmp_path: Path, way: str, workers: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with (
            serving(listener, tmp_path / "old.log", way, workers) as old,
            serving(listener, tmp_path / "new.log", way, workers) as new,
        ):
            assert await stop(old) == 0
            assert [await health(listener.getsockname()[1]) for _ in range(10)] == [200] * 10
            assert new.poll() is None
            assert await stop(new) == 0
        for line in said(tmp_path / "new.log").splitlines():
            assert json.loads(line)["level"] == "info"
