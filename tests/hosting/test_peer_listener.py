"""The listener for the other processes of a service, and the check that several workers share a store."""

import os
import secrets
import select
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio

from bench.server_process import ServerFailedError
from service.cluster.peer_proof import prove_to_owner
from service.cluster.peer_socket import socket_name
from service.hosting.peer_listener import client_returns
from tests.hosting.hosts import KEYED, SERVE, open_host
from tests.kept_log import said_in

GET = b"GET /sessions HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n"
CAP_S = 20
AS_NOBODY = """
import os, socket, sys
os.setuid(65534)
peer = socket.socket(socket.AF_UNIX)
peer.settimeout(10)
peer.connect("\\0" + sys.argv[1])
try:
    peer.sendall(b"GET /sessions HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    sys.stdout.buffer.write(peer.recv(100))
except (ConnectionResetError, BrokenPipeError):
    pass
"""

CONNECT = """
import socket, sys, time
peer = socket.socket(socket.AF_UNIX)
peer.connect("\\0" + sys.argv[1])
time.sleep(60)
"""


async def test_only_processes_that_know_the_stores_secret_are_let_in(tmp_path: Path) -> None:
    """The client was admitted before, by the process that forwards: the listener asks for no key and no loopback."""
    path = tmp_path / "lastcall.db"
    async with open_host(tmp_path, SERVE, store_url=f"sqlite:{path}", **KEYED) as server:
        with closing(sqlite3.connect(path)) as db:
            (address,) = db.execute("SELECT address FROM owners").fetchone()
        with trio.fail_after(CAP_S):
            secret = path.with_name("lastcall.db-owners").read_bytes()  # noqa: ASYNC240
            async with await trio.open_unix_socket(socket_name(address)) as peer:
                assert await prove_to_owner(peer, secret, address=address)
                await peer.send_all(GET)
                assert (await peer.receive_some()).startswith(b"HTTP/1.1 200")
            async with await trio.open_unix_socket(socket_name(address)) as peer:
                assert not await prove_to_owner(peer, b"another" * 5, address=address)
            async with await trio.open_unix_socket(socket_name(address)) as peer:  # another service of this user
                await peer.send_all(GET)
                said = b""
                with suppress(trio.BrokenResourceError):
                    while more := await peer.receive_some():
                        said += more
                assert b"HTTP" not in said
            if os.getuid() == 0:
                command = [sys.executable, "-c", AS_NOBODY, address.removeprefix("@")]
                stranger = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
                assert stranger.stdout == b""
        assert "Traceback" not in server.log()


async def test_how_a_peer_closes_says_whether_its_client_has_left() -> None:
    ours, peer = trio.socket.socketpair()
    with ours, peer:
        assert not client_returns(ours), "the connection is open"
        peer.shutdown(socket.SHUT_WR)
        assert client_returns(ours), "the peer has half-closed the connection"
        peer.close()
        assert not client_returns(ours), "the peer lives, and has closed the connection"
    assert not client_returns(ours), "this process has closed the connection"


@pytest.mark.parametrize("reaped", [False, True])
def test_a_peer_that_has_died_has_not_said_that_its_client_left(reaped: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_name(f"@test-{secrets.token_hex(8)}"))
        listener.listen()
        command = [sys.executable, "-c", CONNECT, listener.getsockname()[1:].decode()]
        with subprocess.Popen(command) as peer:
            accepted, _ = listener.accept()
            ours = trio.socket.from_stdlib_socket(accepted)
            with ours:
                assert not client_returns(ours)
                peer.kill()
                if reaped:
                    peer.wait()
                assert select.select([ours.fileno()], [], [], CAP_S)[0]
                assert client_returns(ours)


@pytest.mark.parametrize("host", ["hypercorn-2", "configured-2"])
async def test_workers_that_would_share_nothing_refuse_to_start(tmp_path: Path, host: str) -> None:
    with pytest.raises(ServerFailedError) as refused:
        async with open_host(tmp_path, host, store_url="memory:"):
            pytest.fail("it serves")
    assert refused.value.exit_code == (0 if host == "hypercorn-2" else 78)  # hypercorn's own master loses the code
    said = said_in(refused.value.log)
    assert said
    assert all("there are 2 workers" in line and "LASTCALL_STORE_URL=sqlite:" in line for line in said)
    assert "Traceback" not in refused.value.log
