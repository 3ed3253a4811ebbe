"""hypercorn's access log, where it is configured, names the caller."""

import signal
from pathlib import Path

import trio

from bench.server_process import ServerProcess
from tests.hosting.hosts import KEYED, open_host

CAP_S = 60


async def call(server: ServerProcess, path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close", *headers]
    received = b""
    with trio.fail_after(CAP_S):
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            await stream.send_all("\r\n".join([*lines, "", ""]).encode())
            while chunk := await stream.receive_some():
                received += chunk
    return received


async def test_the_access_log_names_the_caller_behind_a_trusted_proxy(tmp_path: Path) -> None:
    settings = KEYED | {"trusted_proxies": "127.0.0.1,10.0.0.0/8"}
    async with open_host(tmp_path, "hypercorn-0", "--access-logfile", "-", **settings) as server:
        named = await call(
            server, "/healthz?named", "X-Forwarded-For: 1.1.1.1, 203.0.113.9", "X-Forwarded-For: 10.0.0.7"
        )
        hidden = await call(server, "/readyz?hidden", "Forwarded: for=_hidden")
        refused = await call(server, "/sessions", "X-Forwarded-For: 127.0.0.1")
        server.signal_main(signal.SIGINT)
        with trio.fail_after(CAP_S):
            await server.wait_gone()
    assert [answer[9:12] for answer in (named, hidden, refused)] == [b"200", b"200", b"401"]
    [of_named] = [line for line in server.log().splitlines() if "/healthz" in line]
    [of_hidden] = [line for line in server.log().splitlines() if "/readyz" in line]
    assert "203.0.113.9:0" in of_named
    assert "1.1.1.1" not in of_named
    assert "127.0.0.1:" in of_hidden


async def test_without_keys_a_request_with_a_proxy_s_header_is_refused_on_every_connection(tmp_path: Path) -> None:
    async with open_host(tmp_path, "serve") as server:
        for header in ("Via: 1.1 proxy", "x-forwarded-for:", "FORWARDED: for=127.0.0.1", "Fly-Client-IP: ::1"):
            answer = await call(server, "/sessions", header)
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b'"proxied_without_keys"' in answer
            assert (await call(server, "/readyz", header)).startswith(b"HTTP/1.1 200 ")
        assert (await call(server, "/sessions")).startswith(b"HTTP/1.1 200 ")
        server.signal_main(signal.SIGTERM)
        with trio.fail_after(CAP_S):
            await server.wait_gone()
