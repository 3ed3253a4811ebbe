"""The harness's handles of the processes beside a server under test: the load client and the model server."""

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from bench.plan import LoadResult, Plan
from bench.server_process import KILLED_S, ROOT, python_command
from bench.upstream import ReplyBook


class _Lines:
    """A child process that reads and writes lines. Killed when its context is left."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin = process.stdin
        self.stdout = process.stdout
        self._buffer = bytearray()

    async def write_line(self, line: bytes) -> None:
        await self.stdin.send_all(line + b"\n")

    async def read_line(self) -> bytes:
        """Return the next line. Raises EOFError if the process has ended."""
        while (end := self._buffer.find(b"\n")) < 0:
            data = await self.stdout.receive_some(1 << 20)
            if not data:
                raise EOFError("the process has ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


@asynccontextmanager
async def _open_lines(module: str, cpus: str | None) -> AsyncIterator[_Lines]:
    pin: Sequence[str] = () if cpus is None else ("taskset", "--cpu-list", cpus)
    process = await trio.lowlevel.open_process(
        [*pin, *python_command("-m", module)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    lines = _Lines(process)
    try:
        yield lines
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + KILLED_S):
            await process.wait()
            await lines.stdin.aclose()
            await lines.stdout.aclose()


class LoadClient:
    """A running load client. Made by :func:`open_load` and :func:`open_load_without_plan`."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    async def begin(self, plan: Plan) -> None:
        """Send the plan to a load client that was started without one."""
        await self._lines.write_line(msgspec.json.encode(plan))

    async def wait_ready(self) -> None:
        """Return once every client of the plan is ready or has failed."""
        assert await self._lines.read_line() == b"ready"

    async def wait_probes(self, count: int) -> None:
        """Return once so many more probes have been answered."""
        wanted = await self._probes_answered() + count
        while await self._probes_answered() < wanted:  # noqa: ASYNC110  another process counts
            await trio.sleep(0.02)

    async def _probes_answered(self) -> int:
        await self._lines.write_line(b"probes")
        while (line := await self._lines.read_line()) == b"ready":
            pass
        return int(line)

    async def stop(self) -> LoadResult:
        """Stop the load client and return its result."""
        await self._lines.write_line(b"stop")
        while (line := await self._lines.read_line()) == b"ready":
            pass
        return msgspec.json.decode(line, type=LoadResult)


class UpstreamProcess:
    """A running model server. Made by :func:`open_upstream`."""

    def __init__(self, lines: _Lines, port: int) -> None:
        self._lines = lines
        self.port = port

    @property
    def url(self) -> str:
        """The model server's URL for a service; it ends in ``/v1``."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def books(self) -> list[ReplyBook]:
        """Return the records of all requests so far."""
        await self._lines.write_line(b"books")
        return msgspec.json.decode(await self._lines.read_line(), type=list[ReplyBook])


@asynccontextmanager
async def open_load(plan: Plan, *, cpus: str | None = None) -> AsyncIterator[LoadClient]:
    """Start a load client on a plan."""
    async with open_load_without_plan(cpus=cpus) as load:
        await load.begin(plan)
        yield load


@asynccontextmanager
async def open_load_without_plan(*, cpus: str | None = None) -> AsyncIterator[LoadClient]:
    """Start a load client that gets its plan later, so that its imports and other starts run at the same time."""
    async with _open_lines("bench.load", cpus) as lines:
        yield LoadClient(lines)


@asynccontextmanager
async def open_upstream(*, cpus: str | None = None) -> AsyncIterator[UpstreamProcess]:
    """Start a model server."""
    async with _open_lines("bench.upstream", cpus) as lines:
        yield UpstreamProcess(lines, int((await lines.read_line()).rpartition(b":")[2]))
