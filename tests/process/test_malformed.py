"""Bytes that make hypercorn's parsers fail end their own connection, and nothing else."""

import signal
import socket
from pathlib import Path

import pytest
import trio

from bench.peers import open_load
from bench.plan import Plan
from tests.process.lastcall import (
    CAP_S,
    HYPERCORN_1,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    chat,
    open_lastcall,
)

pytestmark = pytest.mark.parallel

_H2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def _upgrade(settings: bytes) -> bytes:
    return (
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: " + settings + b"\r\n\r\n"
    )


def _h2_headers(path: bytes) -> bytes:
    """A HEADERS frame of a GET; the path is a literal, so that it may hold any bytes."""
    block = b"\x82\x86\x41\x09localhost\x04" + bytes([len(path)]) + path
    return len(block).to_bytes(3, "big") + b"\x01\x05\x00\x00\x00\x01" + block


POISON = {
    "settings of the wrong length": _upgrade(b"AAM"),
    "a setting out of range": _upgrade(b"AAX_____"),
    "a subprotocol that is not ASCII": (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: \xff\r\n\r\n"
    ),
    "an HTTP/2 path that is not ASCII": _H2 + _h2_headers(b"/\xff"),
    "too many priorities": _H2
    + b"".join(
        b"\x00\x00\x05\x02\x00" + (2 * n + 1).to_bytes(4, "big") + b"\x00\x00\x00\x00\x10" for n in range(1, 1200)
    ),
}


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_bytes_that_cannot_be_parsed_end_only_their_connection(tmp_path: Path, host: Host) -> None:
    model_url = "scripted:?tokens=100000&rate=20"
    async with (
        open_lastcall(host, tmp_path, model_url=model_url, drain_timeout_s=0) as server,
        open_load(Plan(port=server.port, groups=(chat(count=3, message="x"),))) as load,
    ):
        await load.wait_ready()
        for poison in POISON.values():
            await trio.to_thread.run_sync(_send, server.port, poison)
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            gone = await server.wait_gone()
        result = await load.stop()
    assert_all_ended_properly(result)
    assert_clean(host, server, gone)
    assert server.log().count("a connection was dropped") >= 3, "none of these requests breaks hypercorn any more"


def _send(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=CAP_S) as connection:
        connection.sendall(data)
        try:
            while connection.recv(65536):
                pass
        except (ConnectionError, TimeoutError):
            pass
