"""The door between the processes of a service, and that they need a store which they can share."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import trio

from bench.server_process import ServerFailedError
from service.api.forwarding import socket_name
from tests.hosting.hosts import SERVE, open_host

GET = b"GET /sessions HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n"
CAP_S = 20
AS_NOBODY = """
import os, socket, sys
os.setuid(65534)
door = socket.socket(socket.AF_UNIX)
door.settimeout(10)
door.connect("\\0" + sys.argv[1])
try:
    door.sendall(b"GET /sessions HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    sys.stdout.buffer.write(door.recv(100))
except (ConnectionResetError, BrokenPipeError):
    pass
"""


async def test_only_processes_of_the_same_user_are_let_in(tmp_path: Path) -> None:
    """And they were admitted before: no key is asked for, and no loopback address."""
    path = tmp_path / "lastcall.db"
    async with open_host(tmp_path, SERVE, store_url=f"sqlite:{path}", api_keys="open-sesame") as server:
        with closing(sqlite3.connect(path)) as db:
            (address,) = db.execute("SELECT address FROM owners").fetchone()
        with trio.fail_after(CAP_S):
            async with await trio.open_unix_socket(socket_name(address)) as door:
                await door.send_all(GET)
                assert (await door.receive_some()).startswith(b"HTTP/1.1 200")
            if os.getuid() == 0:
                command = [sys.executable, "-c", AS_NOBODY, address.removeprefix("@")]
                stranger = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
                assert stranger.stdout == b""
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("host", ["hypercorn-2", "configured-2"])
async def test_workers_that_would_share_nothing_refuse_to_start(tmp_path: Path, host: str) -> None:
    with pytest.raises(ServerFailedError) as refused:
        async with open_host(tmp_path, host, store_url="memory:"):
            pytest.fail("it serves")
    assert refused.value.exit_code == (0 if host == "hypercorn-2" else 78)  # hypercorn's own master loses it
    said = [line for line in refused.value.log.splitlines() if line.startswith("lastcall: ")]
    assert said
    assert all("there are 2 workers" in line and "LASTCALL_STORE_URL=sqlite:" in line for line in said)
    assert "Traceback" not in refused.value.log
