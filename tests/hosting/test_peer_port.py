"""The port for other replicas, of real servers on this machine that take each other for replicas on other machines."""

import json
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from bench.server_process import ServerFailedError, ServerProcess
from service.cluster.peer_address import PeerAddress
from service.cluster.peer_proof import Purpose, prove_to_owner
from service.cluster.peer_tls import TlsStream
from service.cluster.peer_transport import PeerTransport
from service.errors import LastcallError
from tests.cluster.certificates import peer_certificates, peer_files
from tests.hosting.hosts import SERVE, open_host
from tests.kept_log import said_in
from tests.process.clients import Stream, new_session, open_client, start, wait_until
from tests.process.lastcall import SSE

CAP_S = 30
ELSEWHERE = 16 * "f"
SLOW = "scripted:?tokens=2000&rate=20&first_token_s=0"


def owners(folder: Path) -> dict[int, PeerAddress]:
    """The owners in the store: the address of each fence, as one that is reached through its port."""
    with closing(sqlite3.connect(folder / "lastcall.db")) as db:
        rows = db.execute("SELECT fence, address FROM owners ORDER BY fence").fetchall()
    return {fence: PeerAddress.parse(address.partition("?")[0] + f"?place={ELSEWHERE}") for fence, address in rows}


def move_apart(folder: Path) -> None:
    """Have the processes take each other for processes in other places."""
    with closing(sqlite3.connect(folder / "lastcall.db")) as db:
        db.execute("UPDATE owners SET address = substr(address, 1, instr(address, '?')) || 'place=' || ?", (ELSEWHERE,))
        db.commit()


def secret_of(folder: Path) -> bytes:
    return (folder / "lastcall.db-owners").read_bytes()


class Replica:
    """What a replica does to reach another one."""

    def __init__(self, folder: Path) -> None:
        self._secret = secret_of(folder)
        self._transport = PeerTransport(peer_certificates(folder / "replica"))

    async def connect(self, address: PeerAddress, purpose: Purpose = "a request") -> TlsStream:
        stream = await self._transport.connect(str(address))
        assert isinstance(stream, TlsStream)
        assert await prove_to_owner(stream, self._secret, address=str(address), purpose=purpose)
        return stream

    async def ask(self, address: PeerAddress, *headers: str) -> tuple[int, bytes]:
        """Ask for the sessions. Returns the status, and all that came back."""
        lines = ["GET /sessions HTTP/1.1", "host: x", "connection: close", *headers, "", ""]
        async with await self.connect(address) as stream:
            await stream.send_all("\r\n".join(lines).encode())
            got = b""
            while more := await stream.receive_some():
                got += more
        return int(got.split()[1]), got


async def test_a_connection_ends_in_the_worker_that_it_is_for(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "certificates")
    async with open_host(tmp_path, "configured-2", peer_bind="127.0.0.1:0", **files) as server:
        with trio.fail_after(CAP_S):
            replica, found = Replica(tmp_path), owners(tmp_path)
            assert len(found) == 2
            assert len({it.port for it in found.values()}) == 1
            for _ in range(4):  # each worker accepts some of them
                for fence, address in found.items():
                    meant = f"lastcall-instance: {address.instance}"
                    assert (await replica.ask(address, meant, f"lastcall-fence: {fence}"))[0] == 200
                    async with await replica.connect(address, "beats") as beats:
                        assert await beats.receive_some() == b"."
            await refuses_what_is_for_another(replica, found)
            await gives_strangers_nothing(found, tmp_path)
            await is_not_held_up_by_a_worker_that_hangs(server, replica, found)
        log = server.log()
    assert "Traceback" not in log
    assert secret_of(tmp_path).hex() not in log


async def test_workers_that_a_reload_has_replaced_leave_the_port_to_the_new_ones(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "certificates")
    async with (
        open_host(
            tmp_path, "configured-2", peer_bind="127.0.0.1:0", model_url=SLOW, drain_timeout_s=CAP_S, **files
        ) as server,
        open_client(server) as (client,),
    ):
        with trio.fail_after(2 * CAP_S):
            await server.wait_logged('"serving"', times=2)
            old = server.workers()
            turn = await start(client, await new_session(client, "s"))
            with closing(sqlite3.connect(tmp_path / "lastcall.db")) as db:
                (fence,) = db.execute("SELECT owner FROM sessions").fetchone()
            address = owners(tmp_path)[fence]
            server.signal_main(signal.SIGHUP)
            await server.wait_logged("reloaded: 2 new workers serve")
            (drains,) = [pid for pid in await server.wait_workers(3) if pid in old]
            await wait_until(lambda: leaves_port(drains, server, address))
            # A new worker takes each of these connections, and hands it over to the one that drains.
            meant = (f"lastcall-instance: {address.instance}", f"lastcall-fence: {fence}")
            assert [(await Replica(tmp_path).ask(address, *meant))[0] for _ in range(4)] == 4 * [200]
            assert (await client.post(f"{turn}/cancel")).status_code == 200
    assert "Traceback" not in server.log()


async def leaves_port(pid: int, server: ServerProcess, address: PeerAddress) -> bool:
    """Whether a worker takes none of many connections. Each stays with the worker that takes it: nothing is said."""
    before = {worker: sockets_of(worker) for worker in server.workers()}
    silent = [await trio.open_tcp_stream(address.host, address.port) for _ in range(60)]
    while sum(map(sockets_of, before)) < sum(before.values()) + len(silent):  # noqa: ASYNC110  of other processes
        await trio.sleep(0.02)
    taken = sockets_of(pid) - before[pid]
    for client in silent:
        await client.aclose()
    while sum(map(sockets_of, before)) > sum(before.values()):  # noqa: ASYNC110
        await trio.sleep(0.02)
    return taken == 0


def sockets_of(pid: int) -> int:
    sockets = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since the folder was read
            sockets += str(entry.readlink()).startswith("socket:")
    return sockets


async def test_clients_that_say_nothing_do_not_make_a_stop_unclean(tmp_path: Path) -> None:
    files = peer_files(tmp_path / "certificates")
    store = f"sqlite:{tmp_path}/lastcall.db"
    async with open_host(tmp_path, SERVE, store_url=store, peer_bind="127.0.0.1:0", **files) as server:
        with trio.fail_after(CAP_S):
            (address,) = owners(tmp_path).values()
            silent = [await trio.open_tcp_stream(address.host, address.port) for _ in range(20)]
            await silent[0].send_all(b"\x16\x03\x01\x02")  # the begin of a ClientHello
            async with await Replica(tmp_path).connect(address, "beats") as beats:  # accepted after the silent ones
                assert await beats.receive_some() == b"."
            server.signal_main(signal.SIGTERM)
            gone = await server.wait_gone()
            for client in silent:
                await client.aclose()
        assert gone.exit_code == 0
        (report,) = [json.loads(it) for it in server.log().splitlines() if '"tasks_left"' in it]
    assert (report["tasks_left"], report["faults"]) == (0, [])


async def refuses_what_is_for_another(replica: Replica, found: dict[int, PeerAddress]) -> None:
    (fence, address), (other_fence, other) = found.items()
    gone = PeerAddress(instance=f"lastcall-{32 * '0'}", host=address.host, port=address.port, place=ELSEWHERE)
    wrong: Sequence[tuple[PeerAddress, Sequence[str]]] = [
        (address, [f"lastcall-instance: {other.instance}"]),
        (address, [f"lastcall-instance: {address.instance}", f"lastcall-fence: {other_fence}"]),
        (address, [f"lastcall-fence: {fence}"]),
        (gone, [f"lastcall-instance: {gone.instance}"]),
    ]
    for at, headers in wrong:
        status, got = await replica.ask(at, *headers)
        assert status == 421
        assert b"lastcall-instance: lastcall-" in got.lower()
    async with await replica.connect(gone, "beats") as beats:
        with suppress(trio.BrokenResourceError):
            assert await beats.receive_some() == b"", "another process beats for none"


async def gives_strangers_nothing(found: dict[int, PeerAddress], folder: Path) -> None:
    address = next(iter(found.values()))
    async with await trio.open_tcp_stream(address.host, address.port) as plain:
        await plain.send_all(b"GET /sessions HTTP/1.1\r\nhost: x\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            assert await plain.receive_some() == b""
    for name, certificates in (
        ("stranger", peer_certificates(folder / "stranger", signed_by="another", trusts=["another", "ours"])),
        ("no proof", peer_certificates(folder / "no proof")),
    ):
        stream = await PeerTransport(certificates).connect(str(address))
        assert isinstance(stream, TlsStream), name
        got = b""
        with suppress(trio.BrokenResourceError, OSError, LastcallError):
            await stream.send_all(32 * b"x" + b"GET /sessions HTTP/1.1\r\nhost: x\r\n\r\n")
            while more := await stream.receive_some():
                got += more
        stream.leave()
        assert b"HTTP" not in got
        assert len(got) == (64 if name == "no proof" else 0), "a random number and a digest, or nothing"


async def is_not_held_up_by_a_worker_that_hangs(
    server: ServerProcess, replica: Replica, found: dict[int, PeerAddress]
) -> None:
    hangs, serves = server.workers()
    os.kill(hangs, signal.SIGSTOP)
    answered: list[int] = []
    try:
        async with trio.open_nursery() as nursery:

            async def ask(fence: int, address: PeerAddress) -> None:
                status, _ = await replica.ask(address, f"lastcall-instance: {address.instance}")
                assert status == 200
                answered.append(fence)
                if len(answered) == 6:
                    os.kill(hangs, signal.SIGCONT)

            for fence, address in [*found.items()] * 6:
                nursery.start_soon(ask, fence, address)
    finally:
        os.kill(hangs, signal.SIGCONT)
    assert len(set(answered[:6])) == 1, "those of the other worker"
    assert len(answered) == 12
    assert serves in server.workers()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"peer_cafile": "missing.pem"}, "peer_cafile 'missing.pem' cannot be read: No such file or directory"),
        ({}, "Cannot listen on peer_bind 127.0.0.1:{port}: Address already in use"),
    ],
    ids=["a file is missing", "the port is taken"],
)
async def test_a_start_that_cannot_answer_replicas_is_refused(wrong: dict[str, str], why: str, tmp_path: Path) -> None:
    files = peer_files(tmp_path / "certificates") | wrong
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailedError) as refused:
            async with open_host(
                tmp_path, SERVE, store_url=f"sqlite:{tmp_path}/lastcall.db", peer_bind=f"127.0.0.1:{port}", **files
            ):
                pytest.fail("it serves")
    assert refused.value.exit_code == 78
    assert any(why.format(port=port) in line for line in said_in(refused.value.log))
    assert "Traceback" not in refused.value.log


# Two replicas


class Between:
    """A TCP proxy in front of a replica's port, which a test cuts: bytes are then passed on in no direction."""

    def __init__(self, listener: trio.socket.SocketType) -> None:
        self.listener = listener
        self.port: int = listener.getsockname()[1]
        self.to = 0
        self.passes = trio.Event()
        self.passes.set()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(self._serve, [trio.SocketListener(self.listener)], handler_nursery=nursery)

    async def _serve(self, one: trio.SocketStream) -> None:
        with suppress(OSError):
            async with await trio.open_tcp_stream("127.0.0.1", self.to) as other, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, one, other)
                nursery.start_soon(self._pass_on, other, one)

    async def _pass_on(self, source: trio.SocketStream, to: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some():
                await self.passes.wait()
                await to.send_all(data)
            await self.passes.wait()
            await to.send_eof()


@asynccontextmanager
async def open_replicas(folder: Path) -> AsyncIterator[tuple[ServerProcess, ServerProcess, Between]]:
    """Two replicas on one store. The second one reaches the first one through a proxy."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(trio.socket.socket())
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        between = Between(listener)
        common: dict[str, Any] = {
            "store_url": f"sqlite:{folder}/lastcall.db",
            "peer_bind": "127.0.0.1:0",
            "model_url": SLOW,
            "disconnect_grace_s": "0",
            "log_level": "debug",
            **peer_files(folder / "certificates"),
        }
        servers = []
        for name, more in (("first", {"peer_url": f"tls://127.0.0.1:{between.port}"}), ("second", {})):
            (folder / name).mkdir()
            servers.append(await stack.enter_async_context(open_host(folder / name, SERVE, **common, **more)))
        bind = next(json.loads(it)["bind"] for it in servers[0].log().splitlines() if "are answered" in it)
        between.to = int(bind.rpartition(":")[2])
        move_apart(folder)
        async with trio.open_nursery() as nursery:
            await nursery.start(between.serve)
            yield servers[0], servers[1], between
            nursery.cancel_scope.cancel()


async def test_two_replicas_are_one_service_over_tls(tmp_path: Path) -> None:
    async with (
        open_replicas(tmp_path) as (first, second, between),
        open_client(first, second) as (here, there),
        trio.open_nursery() as nursery,
    ):
        with trio.fail_after(CAP_S):
            session = await new_session(here, "s")
            await start(here, session)

            leaving = Stream()
            nursery.start_soon(leaving.run, there, "POST", f"{session}/turns", SUPERSEDE)
            await leaving.begun.wait()
            leaving.scope.cancel()
            left = f"{session}/turns/{leaving.events[0]['turn_id']}"
            await wait_until(lambda: is_cancelled(here, left))

            await start(here, session)
            cut = Stream()
            async with trio.open_nursery() as streaming:
                streaming.start_soon(cut.run, there, "POST", f"{session}/turns", SUPERSEDE)
                await cut.begun.wait()
                between.passes = trio.Event()
            assert cut.events[-1]["type"] == "turn.delta", "an end without a terminal event"
            turn = f"{session}/turns/{cut.events[0]['turn_id']}"
            refused = await there.get(f"{turn}/events", headers=SSE)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert (await here.get(turn)).json()["state"] == "running"
            between.passes.set()

            await wait_until(lambda: answers(there, turn))
            resumed = Stream()
            nursery.start_soon(read_until_cut, resumed, there, f"{turn}/events?after={cut.events[-1]['seq']}")
            await resumed.begun.wait()
            assert resumed.events[0]["seq"] == cut.events[-1]["seq"] + 1

            second.signal_main(signal.SIGKILL)
            await second.wait_gone()
            back = Stream()
            nursery.start_soon(back.run, here, "GET", f"{turn}/events")
            await back.begun.wait()
            assert (await here.get(turn)).json()["state"] == "running", "its client came back"
            nursery.cancel_scope.cancel()
    assert "Traceback" not in first.log() + second.log()


SUPERSEDE = {"input": "more", "on_conflict": "supersede"}


async def read_until_cut(stream: Stream, client: httpx.AsyncClient, path: str) -> None:
    with suppress(httpx.RemoteProtocolError):
        await stream.run(client, "GET", path)


async def is_cancelled(client: httpx.AsyncClient, turn: str) -> bool:
    return bool((await client.get(turn)).json()["state"] == "cancelled")


async def answers(client: httpx.AsyncClient, path: str) -> bool:
    return (await client.get(path)).status_code != 503
