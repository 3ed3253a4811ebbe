"""``serve --reload`` starts anew on a change, and stops at once and cleanly on any signal."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.kept_log import said_in

REPOSITORY = Path(__file__).parent.parent.parent
CAP_S = 300
"""Bounds each test, which starts up to three servers; not a promise."""


class Reloading:
    """A ``serve --reload`` over a copy of the package, and its output so far."""

    def __init__(self, folder: Path, process: trio.Process) -> None:
        self.folder = folder
        self.process = process
        self.said = ""
        self._news = trio.Event()

    async def listen(self) -> None:
        assert self.process.stderr is not None
        async for chunk in self.process.stderr:
            self.said += chunk.decode()
            self._news.set()
            self._news = trio.Event()

    async def serving(self, times: int) -> str:
        """Wait until this many servers have begun to serve; return the address of the last of them."""
        found = await self.lines('"message": "serving"', times)
        url: str = json.loads(found)["urls"][0]
        return url.removeprefix("http://")

    async def lines(self, text: str, times: int = 1) -> str:
        while len(found := [line for line in self.said.splitlines(keepends=True) if text in line]) < times:
            await self._news.wait()
        while not found[times - 1].endswith("\n"):
            await self._news.wait()
            found = [line for line in self.said.splitlines(keepends=True) if text in line]
        return found[times - 1]

    async def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return await self.process.wait()

    def touch(self, name: str, text: str = "\n") -> None:
        with (self.folder / name).open("a") as file:
            file.write(text)

    @property
    def noise(self) -> list[str]:
        """The lines of the output that are worse than ``info``."""
        return [
            line for line in self.said.splitlines() if '"level": "info"' not in line and "starting anew" not in line
        ]


@asynccontextmanager
async def reloading(folder: Path, *, bind: str = "127.0.0.1:0", **environ: str) -> AsyncIterator[Reloading]:
    shutil.copytree(REPOSITORY / "service", folder / "service", ignore=shutil.ignore_patterns("__pycache__"))
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "service", "serve", "--reload", "--bind", bind],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(folder), "LASTCALL_LOG_FORMAT": "json", "LASTCALL_RELEASE_TIMEOUT_S": "20"}
        | environ,
        stderr=subprocess.PIPE,
    )
    with trio.fail_after(CAP_S):
        try:
            async with trio.open_nursery() as nursery:
                reloader = Reloading(folder, process)
                nursery.start_soon(reloader.listen)
                yield reloader
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def test_change_of_the_code_or_the_settings_starts_a_new_server(tmp_path: Path) -> None:
    async with reloading(tmp_path) as reloader:
        first = await reloader.serving(1)
        reloader.touch("service/ids.py")
        await reloader.lines("service/ids.py changed, starting anew")
        second = await reloader.serving(2)
        reloader.touch("lastcall.toml", "streams_max = 5")
        await reloader.lines("lastcall.toml changed, starting anew")
        third = await reloader.serving(3)
        for address in (first, second):
            with pytest.raises(OSError, match="connect"):
                await connect(address)
        assert await answers(third)
        assert await reloader.stop(signal.SIGTERM) == 0
    assert reloader.noise == []
    assert reloader.said.count("shutdown report") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_stops_both_at_once_without_complaints(tmp_path: Path, number: signal.Signals) -> None:
    async with reloading(tmp_path) as reloader:
        address = await reloader.serving(1)
        assert await reloader.stop(number) == 0
        with pytest.raises(OSError, match="connect"):
            await connect(address)
    assert reloader.noise == []


async def test_signal_while_the_server_starts_stops_it(tmp_path: Path) -> None:
    async with reloading(tmp_path) as reloader:
        while not has_server(reloader.process.pid):  # noqa: ASYNC110  a new child of another process is no event
            await trio.sleep(0.01)
        assert await reloader.stop(signal.SIGTERM) == 0
    assert reloader.noise == []


async def test_stream_of_the_old_server_ends_with_its_terminal_event(tmp_path: Path) -> None:
    settings = {"LASTCALL_DRAIN_TIMEOUT_S": "0.2", "LASTCALL_MODEL_URL": "scripted:?tokens=1000&rate=20"}
    async with reloading(tmp_path, **settings) as reloader:
        address = await reloader.serving(1)
        body = json.dumps({"message": "Count."})
        async with await connect(address) as stream:
            await stream.send_all(
                f"POST /chat HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            received = b""
            while b"turn.delta" not in received:
                received += await stream.receive_some()
            reloader.touch("service/ids.py")
            while chunk := await stream.receive_some():
                received += chunk
        assert b'"turn.interrupted"' in received
        assert received.endswith(b"0\r\n\r\n")
        await reloader.serving(2)
        assert await reloader.stop(signal.SIGTERM) == 0
    assert reloader.noise == []


async def test_port_that_is_taken_at_the_start_ends_the_reloader(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        async with reloading(tmp_path, bind=bind) as reloader:
            assert await reloader.process.wait() == 78
    assert said_in(reloader.said) == [f"Cannot listen on {bind}: Address already in use"]
    assert len(reloader.said.splitlines()) == 1


async def test_with_broken_code_the_reloader_waits_for_the_fix(tmp_path: Path) -> None:
    async with reloading(tmp_path) as reloader:
        await reloader.serving(1)
        sound = (tmp_path / "service/ids.py").read_text()
        reloader.touch("service/ids.py", "raise RuntimeError('broken')\n")
        await reloader.lines("the server ended with code 1; it starts again when a file changes")
        (tmp_path / "service/ids.py").write_text(sound)
        await reloader.serving(2)
        assert await reloader.stop(signal.SIGINT) == 0


async def test_server_does_not_outlive_a_killed_reloader(tmp_path: Path) -> None:
    async with reloading(tmp_path) as reloader:
        address = await reloader.serving(1)
        (server,) = children_of(reloader.process.pid)
        try:
            assert await reloader.stop(signal.SIGKILL) == -signal.SIGKILL
            await reloader.lines("shutdown report")
            with pytest.raises(OSError, match="connect"):
                await knock_for_ever(address)
        finally:
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5), suppress(ChildProcessError):
                # The server is a child of this process only if this process takes in orphans.
                await trio.to_thread.run_sync(os.waitpid, server, 0)


async def connect(address: str) -> trio.SocketStream:
    host, _, port = address.rpartition(":")
    return await trio.open_tcp_stream(host, int(port))


async def knock_for_ever(address: str) -> None:
    while True:
        await (await connect(address)).aclose()
        await trio.sleep(0.01)


async def answers(address: str) -> bool:
    async with await connect(address) as stream:
        await stream.send_all(f"GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        return (await stream.receive_some()).startswith(b"HTTP/1.1 200")


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def has_server(pid: int) -> bool:
    """Whether the reloader has started a server. (An import may run another program before.)"""
    with suppress(FileNotFoundError, ProcessLookupError):
        return any(b"--bind=" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children_of(pid))
    return False
