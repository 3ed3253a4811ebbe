"""The listener for other replicas in the test's own process: what it bounds, and whom it refuses."""

import socket
import ssl
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from structlog.testing import capture_logs

from service.api.http.end_of_input import LEAVES_AT_END
from service.api.http.proxy import PEER, TELL_ACCEPTED
from service.cluster.peer_address import PeerAddress
from service.cluster.peer_certificates import PeerCertificates
from service.cluster.peer_proof import prove_to_owner
from service.cluster.peer_socket import socket_name
from service.cluster.peer_tls import TlsStream
from service.cluster.peer_transport import PeerStream, PeerTransport
from service.hosting import peer_listener
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.worker import Worker
from service.hosting.listeners.peer_port import PeerDoor
from service.hosting.peer_listener import PeerListener, open_peer_listener
from service.settings import Settings
from service.stop_state import StopState
from tests.cluster.certificates import peer_certificates, peer_files

SECRET = b"s" * 32
FENCE = 7
CAP_S = 10
ACCEPTED = b"HTTP/1.1 103 \r\nlocation: /sessions/s/turns/t\r\n\r\nHTTP/1.1 200 \r\n"


class Scene:
    """A listener, and a replica that connects to it."""

    def __init__(
        self, listener: PeerListener, certificates: PeerCertificates, hypercorn: trio.Nursery, door: PeerDoor
    ) -> None:
        self.listener = listener
        self.door = door
        self.hypercorn = hypercorn
        address = PeerAddress.parse(listener.address)
        self.port = address.port
        self.instance = address.instance
        self.address = listener.address.replace(address.place, 16 * "f")
        self.returns: list[bool] = []
        self._transport = PeerTransport(certificates)

    async def connect(self) -> PeerStream:
        stream = await self._transport.connect(self.address)
        assert stream is not None
        return stream

    async def ask(self, stream: PeerStream) -> bytes:
        """Prove the secret, and send a request. Returns all up to the first bytes of the body."""
        assert await prove_to_owner(stream, SECRET, address=self.address)
        head = f"GET / HTTP/1.1\r\nhost: x\r\nlastcall-instance: {self.instance}\r\nlastcall-fence: {FENCE}\r\n\r\n"
        await stream.send_all(head.encode())
        got = b""
        while b"begun" not in got:
            received = await stream.receive_some()
            assert received, got
            got += received
        return got


@asynccontextmanager
async def open_scene(folder: Path) -> AsyncIterator[Scene]:
    settings = Settings.model_validate(
        {"store_url": "sqlite:unused", "peer_bind": "127.0.0.1:0", **peer_files(folder / "files")}
    )
    serving = trio.Event()
    serving.set()
    door = PeerDoor()
    scenes: list[Scene] = []

    async def app(scope: Any, receive: Any, send: Any, *_: object) -> None:
        """Answer with a head, and stream until the client has left."""
        scope[LEAVES_AT_END]()
        scope[TELL_ACCEPTED]("/sessions/s/turns/t")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        scenes[0].returns.append(scope[PEER]())

    with trio.fail_after(CAP_S):
        async with trio.open_nursery() as nursery:
            fake = SimpleNamespace(config=Config(), context=WorkerContext(None), app=app, server_nursery=nursery)
            async with open_peer_listener(
                cast("Worker", fake), Connections(StopState()), serving=serving, settings=settings, door=door
            ) as listener:
                assert listener is not None
                listener.take_peers(SECRET, fence=FENCE)
                scenes.append(Scene(listener, peer_certificates(folder / "replica"), nursery, door))
                yield scenes[0]
            nursery.cancel_scope.cancel()


async def test_a_listener_that_leaves_its_port_to_others_takes_connections_when_they_are_wanted_again(
    tmp_path: Path,
) -> None:
    async with open_scene(tmp_path) as scene:
        scene.door.accept(False)
        scene.door.accept(False)
        await trio.testing.wait_all_tasks_blocked()
        answers: list[bytes] = []

        async def ask() -> None:
            async with await scene.connect() as stream:
                answers.append(await scene.ask(stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            async with await trio.open_tcp_stream("127.0.0.1", scene.port):  # the kernel has taken the one before
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not answers
            scene.door.accept(True)
        assert answers[0].startswith(ACCEPTED)


async def test_what_a_stranger_does_at_the_door_for_this_machine_is_not_told_of_peer_bind(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        with capture_logs() as logs:
            unix = PeerAddress.parse(scene.listener.address).unix_name
            async with await trio.open_unix_socket(socket_name(unix)) as stranger:
                await stranger.send_all(b"x")
                await stranger.send_eof()
                with suppress(trio.BrokenResourceError):
                    while await stranger.receive_some():
                        pass
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert not [it for it in logs if it["log_level"] == "warning"], logs


async def test_clients_that_say_nothing_hold_up_a_replica_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener, "OPENING_MAX", 3)
    monkeypatch.setattr(peer_listener, "OPENING_S", 0.5)
    async with open_scene(tmp_path) as scene:
        silent = [await trio.open_tcp_stream("127.0.0.1", scene.port) for _ in range(6)]
        async with await scene.connect() as stream:
            assert (await scene.ask(stream)).startswith(ACCEPTED)
        for client in silent:
            with suppress(trio.BrokenResourceError):
                assert await client.receive_some() == b"", "its time is over"
            await client.aclose()


async def test_clients_that_say_nothing_give_way_to_a_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_listener, "OPENING_MAX", 3)
    monkeypatch.setattr(peer_listener, "OPENING_S", 10 * CAP_S)
    monkeypatch.setattr(peer_listener, "OPENING_KEPT_S", 0.1)
    async with open_scene(tmp_path) as scene:
        silent = [await trio.open_tcp_stream("127.0.0.1", scene.port) for _ in range(8)]
        async with await scene.connect() as stream:
            assert (await scene.ask(stream)).startswith(ACCEPTED)
        for client in silent[:5]:
            with suppress(trio.BrokenResourceError):
                assert await client.receive_some() == b"", "it gave way"
        for client in silent:
            await client.aclose()


async def test_replicas_that_connect_at_the_same_time_do_not_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener, "OPENING_MAX", 2)
    monkeypatch.setattr(peer_listener, "OPENING_KEPT_S", 10 * CAP_S)
    answers: list[bytes] = []

    async def ask(scene: Scene) -> None:
        async with await scene.connect() as stream:
            answers.append(await scene.ask(stream))

    async with open_scene(tmp_path) as scene, trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(ask, scene)
    assert [it.startswith(ACCEPTED) for it in answers] == [True] * 9


@pytest.mark.parametrize("way", ["through the Unix socket", "handed over"])
async def test_clients_that_say_nothing_hold_up_no_worker_of_the_same_replica(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener, "OPENING_MAX", 3)
    monkeypatch.setattr(peer_listener, "OPENING_S", 10 * CAP_S)
    monkeypatch.setattr(peer_listener, "OPENING_KEPT_S", 10 * CAP_S)
    (tmp_path / "other").mkdir()
    async with open_scene(tmp_path) as scene, open_scene(tmp_path / "other") as other:
        silent = [await trio.open_tcp_stream("127.0.0.1", scene.port) for _ in range(6)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        if way == "handed over":
            scene.address = scene.address.replace(f":{scene.port}/", f":{other.port}/")
        else:
            scene.address = scene.listener.address
        for _ in range(3):
            async with await scene.connect() as stream:
                assert await prove_to_owner(stream, SECRET, address=scene.address)
        for client in silent:
            await client.aclose()


async def test_a_stop_of_hypercorn_waits_for_no_client_without_a_proof(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        silent = [await trio.open_tcp_stream("127.0.0.1", scene.port) for _ in range(4)]
        await silent[0].send_all(b"\x16\x03\x01\x02")  # the begin of a ClientHello
        async with await scene.connect() as stream:
            assert (await scene.ask(stream)).startswith(ACCEPTED)  # accepted after all of the silent ones
            assert [it.name for it in scene.hypercorn.child_tasks] == ["peer"]
        for client in silent:
            await client.aclose()


async def test_refused_connections_are_told_in_one_line(tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        with capture_logs() as told:
            for _ in range(5):
                async with await trio.open_tcp_stream("127.0.0.1", scene.port) as client:
                    await client.send_all(b"GET / HTTP/1.1\r\n\r\n")
                    with suppress(trio.BrokenResourceError):
                        assert await client.receive_some() == b""
        lines = [it for it in told if it["log_level"] == "warning"]
        assert len(lines) == 1
        assert lines[0]["reason"] == "http request"


@pytest.mark.parametrize(
    ("client", "reason"),
    [("says nothing", "no proof in time"), ("knows another secret", "no proof that it knows the secret of the store")],
)
async def test_a_client_without_a_proof_counts_as_refused(
    client: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if client == "says nothing":
        monkeypatch.setattr(peer_listener, "OPENING_S", 0.1)
    async with open_scene(tmp_path) as scene:
        with capture_logs() as told:
            if client == "says nothing":
                async with await trio.open_tcp_stream("127.0.0.1", scene.port) as silent:
                    with suppress(trio.BrokenResourceError):
                        assert await silent.receive_some() == b""
            else:
                async with await scene.connect() as stream:
                    assert not await prove_to_owner(stream, b"x" * 32, address=scene.address)
            while not (lines := [it for it in told if it["log_level"] == "warning"]):  # noqa: ASYNC110  its own time
                await trio.sleep(0.01)
    assert [it["reason"] for it in lines] == [reason]


async def test_a_name_that_is_not_ascii_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    async with open_scene(tmp_path) as scene:
        with capture_logs() as told:
            for name in (b"\xff\nLOGIN\xfe", b"lastcall-\xc3\xa9!"):
                async with await trio.open_tcp_stream("127.0.0.1", scene.port) as client:
                    await client.send_all(client_hello(name))
                    with suppress(trio.BrokenResourceError):
                        assert await client.receive_some() == b""
    assert not reported
    (line,) = [it for it in told if it["log_level"] == "warning"]
    assert line["reason"] == "the name is not ASCII"
    assert "LOGIN" not in str(line)


def test_ssl_still_reports_a_name_that_is_not_ascii_past_all_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, ``PeerObject.do_handshake`` in ``service/cluster/peer_tls.py`` can go."""
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: reported.append(error.exc_type))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda *_: None
    incoming = ssl.MemoryBIO()
    incoming.write(client_hello(b"\xff"))
    with pytest.raises(ssl.SSLError):
        context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
    assert reported == [UnicodeDecodeError]


def client_hello(name: bytes) -> bytes:
    """The first message of a client that asks for this name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing, stand_in = ssl.MemoryBIO(), "n" * len(name)
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=stand_in).do_handshake()
    return outgoing.read().replace(stand_in.encode(), name)


@pytest.mark.parametrize(
    ("leaves", "returns"), [("says goodbye", False), ("stops", True), ("dies", True), ("vanishes", True)]
)
async def test_how_a_replica_ends_a_request_says_whether_its_client_has_left(
    leaves: str, returns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener, "WATCH_INTERVAL_S", 0.05)
    async with open_scene(tmp_path) as scene, await scene.connect() as stream:
        assert isinstance(stream, TlsStream)
        assert (await scene.ask(stream)).startswith(ACCEPTED)
        if leaves == "says goodbye":
            stream.leave()
        elif leaves == "stops":
            stream.send_eof()
        elif leaves == "dies":
            stream.socket.close()
        else:
            monkeypatch.setattr(peer_listener, "is_unheard", lambda _: True)
        while not scene.returns:  # noqa: ASYNC110  the application's own time
            await trio.sleep(0.01)
        assert scene.returns == [returns]


async def test_beats_to_a_replica_that_vanishes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_listener, "WATCH_INTERVAL_S", 0.05)
    async with open_scene(tmp_path) as scene, await scene.connect() as stream:
        assert await prove_to_owner(stream, SECRET, address=scene.address, purpose="beats")
        assert await stream.receive_some() == b"."
        monkeypatch.setattr(peer_listener, "is_unheard", lambda _: True)
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass


async def hand_over(scene: Scene, note: bytes, *, descriptors: int) -> None:
    """Hand sockets over as a worker of the same replica does, and return once the listener is done with them."""
    ours, theirs = socket.socketpair()
    with ours, theirs, trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as way:
        await way.connect(socket_name(f"@{scene.instance}-handed"))
        more = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [theirs.fileno()] * descriptors).tobytes())]
        await way.sendmsg([note], more if descriptors else [])
        theirs.close()
        with suppress(ConnectionResetError):
            assert await way.recv(1) == b""
        if descriptors:
            waiting = trio.socket.from_stdlib_socket(ours)
            assert await waiting.recv(1) == b"", "it was closed"


@pytest.mark.parametrize("descriptors", [0, 1, 2])
async def test_a_socket_is_taken_only_from_a_process_that_knows_the_secret(descriptors: int, tmp_path: Path) -> None:
    async with open_scene(tmp_path) as scene:
        for note in (b"", b"x" * 31, b"x" * 32, b"x" * 4000):
            if note or descriptors:
                await hand_over(scene, note or b"x", descriptors=descriptors)
        async with await scene.connect() as stream:
            assert (await scene.ask(stream)).startswith(ACCEPTED), "the listener serves on"
