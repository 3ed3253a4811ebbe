"""A cluster: replicas of the service as processes of their own, a model server, and links to one database."""

import re
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import trio

from bench.database import Database
from bench.replicas import apart, makes_namespaces
from bench.server_process import Launch, ServerFailedError, ServerProcess, open_server, python_command
from tests.cluster.calls import NoAnswerError, call
from tests.cluster.certificates import peer_files
from tests.cluster.checker import forbidden_lines
from tests.cluster.history import Asked, Exited, History, Logged
from tests.cluster.network import Link, open_link

KEY = "a-key-for-the-chaos"
START_S = 60
STOP_S = 60
RESTART_S = 0.3
"""The pause of the supervisor before it starts a process anew."""
SETTINGS = {
    "API_KEYS": KEY,
    "MODEL": "chaos",
    "MODEL_CONTINUATION": "trailing",
    "LOG_FORMAT": "json",
    "HEARTBEAT_INTERVAL_S": "1",
    "DRAIN_TIMEOUT_S": "2",
    "CLEANUP_TIMEOUT_S": "2",
    "RELEASE_TIMEOUT_S": "2",
}


@dataclass(frozen=True)
class Door:
    """An address that answers calls: a replica's, or that of a proxy in front of all."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Links:
    """The network around a replica."""

    door: Door
    database: Link
    peers: Link
    peer_bind: Door

    @property
    def settings(self) -> dict[str, str]:
        return {"PEER_BIND": str(self.peer_bind), "PEER_URL": f"tls://127.0.0.1:{self.peers.port}"}


@asynccontextmanager
async def _open_links(database: Database) -> AsyncIterator[Links]:
    # An address of its own: no connection of another program takes a port while no process listens.
    host = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}.{secrets.randbelow(250) + 1}"
    with socket.create_server((host, 0)) as first, socket.create_server((host, 0)) as second:
        door, peer_bind = (Door(host, it.getsockname()[1]) for it in (first, second))
    async with open_link(database.socket) as to_database, open_link((peer_bind.host, peer_bind.port)) as from_peers:
        yield Links(door, to_database, from_peers, peer_bind)


def command() -> list[str]:
    """The command of a replica: with TLS between replicas, where that can be."""
    serve = python_command("-m", "service", "serve")
    return apart(serve) if makes_namespaces() else serve


class Replica:
    """One place of the service, in which one process follows the other. ``supervise`` starts them.

    Attributes:
        door: Stays the same across starts, as the links do.
        link: To the database.
        peers_link: From the other replicas.
        is_wanted: Whether the supervisor starts a process.
        at_rest: Set once no process runs any more, and none is wanted.
    """

    def __init__(self, name: str, folder: Path, env: Mapping[str, str], links: "Links", history: History) -> None:
        self.name = name
        self.link = links.database
        self.peers_link = links.peers
        self.door = links.door
        self.is_wanted = True
        self.process: ServerProcess | None = None
        self.serving = trio.Event()
        self.at_rest = trio.Event()
        self._folder = folder
        self._env = env
        self._history = history
        self._starts = 0
        self._cause: Literal["killed", "stopped", "itself"] = "itself"
        self._wanted = trio.Event()

    async def supervise(self) -> None:
        while True:
            if self.is_wanted:
                await self._run_once()
                await trio.sleep(RESTART_S)
            else:
                self.at_rest.set()
                await self._wanted.wait()

    def want(self) -> None:
        """Let the supervisor start a process, if none runs."""
        self.is_wanted = True
        self.at_rest = trio.Event()
        self._wanted.set()

    def rest(self) -> None:
        """Let the supervisor start no further process."""
        self.is_wanted = False
        self._wanted = trio.Event()

    def kill(self) -> None:
        self._signal(signal.SIGKILL, "killed")

    def stop(self) -> None:
        self._signal(signal.SIGTERM, "stopped")

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    async def wait_serving(self) -> None:
        """Wait for a process that serves: this one, or one that follows."""
        while not self.serving.is_set():  # noqa: ASYNC110  each process has an event of its own
            await trio.sleep(0.02)

    async def wait_gone(self) -> None:
        if self.process is not None:
            await self.process.wait_gone()

    @property
    def log(self) -> str:
        """The output of all its processes."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob(f"{self.name}.*.log")))

    def _signal(self, number: int, cause: Literal["killed", "stopped"] | None = None) -> None:
        if self.process is None or self.process.gone is not None:
            return
        if cause is not None:
            self._cause = "killed" if self._cause == "killed" else cause
            self.serving = trio.Event()  # a caller that waits from here on waits for the next process
        try:
            self.process.signal_group(number)
        except ServerFailedError:
            pass  # it has just ended

    async def _run_once(self) -> None:
        self._starts += 1
        self._cause = "itself"
        env = {f"LASTCALL_{name}": value for name, value in (SETTINGS | dict(self._env)).items()}
        env |= {"LASTCALL_BIND": str(self.door), "PYTHONDONTWRITEBYTECODE": ""}
        log_path = self._folder / f"{self.name}.{self._starts:03}.log"
        process = self.process = ServerProcess(Launch(command(), env=env), log_path)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._note_serving, process)
                gone = await process.wait_gone()
                nursery.cancel_scope.cancel()
        finally:
            self.serving = trio.Event()
            if process.gone is None:
                process.signal_group(signal.SIGKILL)
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    await process.wait_gone()
        log = process.log()
        self._history.add(Exited(process=self.name, code=gone.exit_code, cause=self._cause, has_begun=bool(log)))
        for line in forbidden_lines(log):
            self._history.add(Logged(process=log_path.name, line=line))

    async def _note_serving(self, process: ServerProcess) -> None:
        try:
            await process.wait_listening()
        except ServerFailedError:
            return
        self.serving.set()


class Upstream:
    """The place of the model server, in which one process follows the other."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "calls"
        self.port = 0
        self.is_wanted = True
        self.process: ServerProcess | None = None
        self.serving = trio.Event()
        self._folder = folder

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def supervise(self) -> None:
        while True:
            argv = python_command("-m", "tests.cluster.upstream", str(self.notes), str(self.port))
            try:
                async with open_server(Launch(argv), log_path=self._folder / "upstream.log") as process:
                    self.process, self.port = process, process.port
                    self.serving.set()
                    await process.wait_gone()
            except ServerFailedError:
                await trio.sleep(0.1)  # its port may be taken by the end of a connection for a moment

    def kill(self) -> None:
        if self.process is not None and self.process.gone is None:
            self.process.signal_group(signal.SIGKILL)

    async def live_calls(self) -> int:
        return int(msgspec.json.decode(await self._ask("/calls"))["live"])

    async def set_pace(self, pace: float) -> None:
        await self._ask(f"/pace/{pace}")

    async def _ask(self, path: str) -> bytes:
        """The answer of this process, or of the next one if this one was killed a moment ago."""
        with trio.fail_after(START_S):
            while True:
                try:
                    return (await call(Door("127.0.0.1", self.port), "GET", path)).body
                except NoAnswerError:
                    await trio.sleep(0.1)

    def calls(self) -> list[Asked]:
        """The calls that have ended, as it noted them. A call of a process that was killed is not among them."""
        if not self.notes.exists():
            return []
        lines = self.notes.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Asked) for line in lines]


@dataclass
class Cluster:
    """All that runs. Made by :func:`open_cluster`."""

    replicas: list[Replica]
    upstream: Upstream
    database: Database
    schema: str
    history: History

    @property
    def doors(self) -> list[Door]:
        return [replica.door for replica in self.replicas]

    async def stop(self) -> None:
        """Stop all replicas in order, for good."""
        for replica in self.replicas:
            replica.rest()
            replica.thaw()
            replica.stop()
        with trio.fail_after(STOP_S):
            for replica in self.replicas:
                await replica.at_rest.wait()


@asynccontextmanager
async def open_cluster(
    database: Database,
    folder: Path,
    history: History,
    *,
    replicas: int = 3,
    schema: str = "lastcall",
    is_direct: bool = False,
    **settings: str,
) -> AsyncIterator[Cluster]:
    """Replicas that serve, each with a link of its own to the database.

    Args:
        is_direct: Connect to the database without links. They run in this process, so its load would be in what is
            measured.
    """
    upstream = Upstream(folder)
    async with AsyncExitStack() as stack:
        of_all = {"STORE_SCHEMA": schema}
        of_all |= {name.upper(): path for name, path in peer_files(folder / "certificates").items()}
        links = [await stack.enter_async_context(_open_links(database)) for _ in range(replicas)]
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(upstream.supervise)
                with trio.fail_after(START_S):
                    await upstream.serving.wait()
                made: list[Replica] = []
                for number, around in enumerate(links):
                    store_url = database.url if is_direct else around.database.store_url
                    env = of_all | {"STORE_URL": store_url, "MODEL_URL": upstream.url} | around.settings | settings
                    made.append(Replica(f"replica-{number}", folder, env, around, history))
                    nursery.start_soon(made[-1].supervise)
                with trio.move_on_after(START_S) as starting:
                    for replica in made:
                        await replica.wait_serving()
                assert not starting.cancelled_caught, made[0].log[-3000:]
                yield Cluster(made, upstream, database, schema, history)
            finally:
                nursery.cancel_scope.cancel()


def turns_interrupted(log: str) -> int:
    """How many turns all shutdowns in a log have interrupted."""
    return sum(int(count) for count in re.findall(r'"turns_interrupted": (\d+)', log))
