"""Listeners, in the place of hypercorn's own."""

import errno
import pickle
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import hypercorn.trio.run
import pytest
import trio
import trio.testing
import trustme
from hypercorn.config import Config, Sockets
from quart_trio import QuartTrio

from service.hosting.hypercorn import patches
from service.hosting.hypercorn.http1_connection import Stream
from service.hosting.hypercorn.patches import install_listeners
from service.hosting.listeners.bind import given_sockets, note_given_sockets
from service.hosting.listeners.listeners import Listeners
from tests.hosting.conftest import Serve

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    """Listeners that hypercorn serves until the test is over."""
    listeners = Listeners([False])
    with install_listeners(listeners.serve_listeners):
        yield listeners


def an_app() -> QuartTrio:
    app = QuartTrio("test")

    @app.get("/")
    async def index() -> str:
        return "here"

    return app


def test_hypercorn_still_takes_trio_from_this_name() -> None:
    assert {"trio", "serve_listeners"} <= set(hypercorn.trio.run.worker_serve.__code__.co_names)
    assert hypercorn.trio.run.trio is trio  # type: ignore[attr-defined]


def clients(port: int, count: int) -> list[socket.socket]:
    made = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for client in made:
        client.settimeout(5)
        client.sendall(GET)
    return made


BACKLOG = 100


class Rounds(trio.abc.Instrument):
    """Counts the rounds of the event loop."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@asynccontextmanager
async def accepting(listeners: Listeners, rounds_of: list[int]) -> AsyncIterator[int]:
    """Serve a listener; yields its port. The round of each client's handler is added to ``rounds_of``."""

    async def note(stream: Stream) -> None:
        rounds_of.append(rounds.count)
        await trio.aclose_forcefully(stream)

    rounds = Rounds()
    trio.lowlevel.add_instrument(rounds)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(listeners.serve_listeners, note, [listener], handler_nursery=nursery))
        await listeners.open.wait()
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()
    trio.lowlevel.remove_instrument(rounds)


async def wait(rounds_of: list[int], count: int) -> None:
    with trio.fail_after(10):
        while len(rounds_of) < count:  # noqa: ASYNC110
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("accepted_max", [1, 8, 64, 1000])
async def test_many_clients_are_accepted_in_one_round_and_no_more_than_the_bound(accepted_max: int) -> None:
    rounds_of: list[int] = []
    async with accepting(Listeners([False], accepted_max=accepted_max), rounds_of) as port:
        made = [socket.create_connection(("127.0.0.1", port)) for _ in range(BACKLOG)]  # one step: none is accepted yet
        await wait(rounds_of, BACKLOG)
        for client in made:
            client.close()
    in_round = Counter(rounds_of)
    assert max(in_round.values()) == min(accepted_max, BACKLOG)
    assert len(in_round) == ceil(BACKLOG / accepted_max), "between two of them the event loop runs other tasks"


async def test_a_stop_of_accepting_leaves_none_of_the_clients_that_were_accepted_together() -> None:
    listeners = Listeners([False], accepted_max=64)
    rounds_of: list[int] = []
    async with accepting(listeners, rounds_of) as port:
        made = [socket.create_connection(("127.0.0.1", port)) for _ in range(BACKLOG)]
        await wait(rounds_of, 1)
        listeners.stop_accepting(refuse_waiting=True)
        await wait(rounds_of, BACKLOG)
        for client in made:
            client.close()


async def test_sockets_that_another_worker_has_shut_are_not_adopted(
    listeners: Listeners, nursery: trio.Nursery
) -> None:
    """Two workers give up their starts at the same time: the first one answers the clients that wait."""

    async def serve(_: object) -> None:
        raise AssertionError("no client waits")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        sockets = Sockets(secure_sockets=[], insecure_sockets=[listening], quic_sockets=[])
        listening.setblocking(False)
        listening.shutdown(socket.SHUT_RD)
        assert not listeners.adopt(sockets, Config(), serve, nursery)
        assert repr(listeners) == "<Listeners: not open yet>"


async def test_clients_that_wait_are_served_and_later_ones_are_refused(serve: Serve, listeners: Listeners) -> None:
    async with serve(an_app()) as server:
        with trio.fail_after(10):
            await listeners.open.wait()
            assert repr(listeners) == f"<Listeners 127.0.0.1:{server.port}: open>"
            waiting = clients(server.port, 3)  # without a checkpoint: the server has not accepted them yet
            assert listeners.has_served
            listeners.stop_accepting(refuse_waiting=True)
            assert not listeners.has_served
            assert repr(listeners) == "<Listeners: closed>"
            with pytest.raises(ConnectionRefusedError):
                clients(server.port, 1)
            for client in waiting:
                assert (await trio.to_thread.run_sync(client.recv, 100)).startswith(b"HTTP/1.1 200")
                assert not listeners.has_served
                client.close()
            await listeners.wait_served()
            listeners.stop_accepting(refuse_waiting=True)  # a second call changes nothing
            assert listeners.has_served


async def test_clients_that_wait_are_left_to_other_processes_if_there_are_some(
    serve: Serve, listeners: Listeners
) -> None:
    async with serve(an_app()) as server:
        with trio.fail_after(10):
            await listeners.open.wait()
            another = listeners.sockets[0].dup()
            listeners.stop_accepting(refuse_waiting=False)
            assert listeners.has_served
            await trio.testing.wait_all_tasks_blocked(0.01)
            [client] = clients(server.port, 1)
            taken, _ = await another.accept()
            assert await taken.recv(100) == GET
            for each in (client, taken, another):
                each.close()


async def test_new_clients_are_left_to_other_processes_until_clients_are_accepted_again(
    serve: Serve, listeners: Listeners
) -> None:
    async with serve(an_app()) as server:
        with trio.fail_after(10):
            await listeners.open.wait()
            for _ in range(2):
                listeners.accept_clients(False)
                listeners.accept_clients(False)
                await trio.testing.wait_all_tasks_blocked(0.01)
                [client] = clients(server.port, 1)
                await trio.testing.wait_all_tasks_blocked(0.05)
                client.setblocking(False)
                with pytest.raises(BlockingIOError):
                    client.recv(1)
                client.settimeout(5)
                listeners.accept_clients(True)
                assert (await trio.to_thread.run_sync(client.recv, 100)).startswith(b"HTTP/1.1 200")
                client.close()


async def test_new_clients_that_were_not_accepted_are_served_when_the_listeners_close(
    serve: Serve, listeners: Listeners
) -> None:
    async with serve(an_app()) as server:
        with trio.fail_after(10):
            await listeners.open.wait()
            listeners.accept_clients(False)
            await trio.testing.wait_all_tasks_blocked(0.01)
            [client] = clients(server.port, 1)
            listeners.stop_accepting(refuse_waiting=True)
            assert (await trio.to_thread.run_sync(client.recv, 100)).startswith(b"HTTP/1.1 200")
            client.close()


async def log_of_a_listener_without_descriptors(
    serve: Serve, caplog: pytest.LogCaptureFixture, *, tries: int
) -> list[Any]:
    """The log after so many tries to accept a client."""
    tried = 0

    async def fail(_listener: trio.SocketListener) -> trio.SocketStream:
        nonlocal tried
        tried += 1
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.SocketListener, "accept", fail)
        async with serve(an_app()):
            with trio.fail_after(20):
                while tried <= tries:  # noqa: ASYNC110  Trio waits between two of them
                    await trio.sleep(0.01)
    return [record for record in caplog.records if record.name == "trio.serve_listeners"]


async def test_without_descriptors_one_line_says_so(
    serve: Serve, listeners: Listeners, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "LOG_INTERVAL_S", 3600)
    [line] = await log_of_a_listener_without_descriptors(serve, caplog, tries=3)
    assert "EMFILE" in line.message
    assert line.exc_info is None


@pytest.mark.removal
async def test_trio_still_reports_it_more_than_once(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """This test fails once Trio reports EMFILE less often; then _RateLimit of the patches is no longer needed."""
    lines = await log_of_a_listener_without_descriptors(serve, caplog, tries=3)
    assert len(lines) > 2
    assert all(line.exc_info for line in lines)


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"bind": ["127.0.0.1:0", "fd://3"]}, [False, True]),
        ({"bind": ["fd://3"], "insecure_bind": ["unix:a"]}, [True]),
        ({"bind": ["fd://3"], "insecure_bind": ["unix:a"], "certfile": "c", "keyfile": "k"}, [True, False]),
    ],
)
def test_a_bind_that_is_a_descriptor_is_a_given_socket(config: dict[str, Any], given: list[bool]) -> None:
    configured = Config.from_mapping(config)
    assert given_sockets(configured) == given
    note_given_sockets(configured)
    configured.bind, configured.insecure_bind = ["fd://7"] * len(given), []
    assert given_sockets(pickle.loads(pickle.dumps(configured))) == given  # as workers get the socket


async def test_a_given_socket_is_not_shut_down(serve: Serve) -> None:
    listeners = Listeners([True])
    with install_listeners(listeners.serve_listeners):
        async with serve(an_app()) as server:
            with trio.fail_after(10):
                await listeners.open.wait()
                another = listeners.sockets[0].dup()
                listeners.stop_accepting(refuse_waiting=True)
                await trio.testing.wait_all_tasks_blocked(0.01)
                [client] = clients(server.port, 1)
                taken, _ = await another.accept()
                for each in (client, taken, another):
                    each.close()


async def test_the_addresses_are_known_also_after_the_sockets_are_closed(serve: Serve, listeners: Listeners) -> None:
    assert not listeners.addresses
    async with serve(an_app()) as server:
        with trio.fail_after(10):
            await listeners.open.wait()
            [listening] = listeners.sockets
            listeners.stop_accepting(refuse_waiting=True)
            while listening.fileno() >= 0:
                await trio.lowlevel.checkpoint()
    assert (listeners.addresses, listeners.secure_addresses) == ([f"127.0.0.1:{server.port}"], [])


async def test_clients_that_wait_are_served_with_tls_too(serve: Serve, listeners: Listeners, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with serve(an_app(), certfile=str(certificate), keyfile=str(key)) as server:
        with trio.fail_after(10):
            await listeners.open.wait()
            client = socket.create_connection(("127.0.0.1", server.port))
            listeners.stop_accepting(refuse_waiting=True)
            client.setblocking(False)
            stream = trio.SSLStream(
                trio.SocketStream(trio.socket.from_stdlib_socket(client)), context, server_hostname="localhost"
            )
            await stream.send_all(GET)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            await trio.aclose_forcefully(stream)
