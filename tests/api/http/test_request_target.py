"""Invalid targets are refused with a problem document, and nothing crashes."""

from typing import Any

import pytest
import trio

from service.api.app import create_app
from service.settings import Settings
from tests.api.inprocess import LOOPBACK
from tests.service.serving import read_to_end, serving

CAP_S = 60


async def test_invalid_targets_are_refused_and_valid_ones_are_not() -> None:
    expected = dict.fromkeys(("?", "?x", "?limit=1", "http://[", "http://[::1/"), b"400")
    expected |= dict.fromkeys(("[", "//[", ":", "*", "http://", "/[", "%", "x"), b"404")
    expected |= dict.fromkeys(("//healthz", "///healthz", "/%2Fhealthz", "//h/healthz", "http://h//healthz"), b"404")
    expected |= dict.fromkeys(("healthz", "http:healthz", "http://h"), b"404")
    expected |= dict.fromkeys(("/healthz", "http://h/healthz?a=b"), b"200")
    got = {}
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:")) as server:
            for target in expected:
                async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                    head = f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
                    await stream.send_all(head.encode())
                    reply = await read_to_end(stream)
                got[target] = reply.split()[1]
                assert (b"application/problem+json" in reply) is (got[target] != b"200")
    assert got == expected


async def get(port: int, target: str, host: str) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        return await read_to_end(stream)


async def test_an_invalid_host_is_refused() -> None:
    expected = dict.fromkeys(("a..b", "a" * 64, "a." * 151, ".", "xn--" + "a" * 60), b"400")
    expected |= dict.fromkeys(("a", "a" * 63, "a.b:80", "[::", "é", ""), b"403")
    expected |= dict.fromkeys(("localhost", "LOCALHOST:1", "127.0.0.1:", "[::1]:80"), b"200")
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:")) as server:
            got = {host: (await get(server.port, "/sessions", host)).split()[1] for host in expected}
    assert got == expected


async def test_a_long_query_string_is_refused_before_it_is_parsed() -> None:
    expected = {f"{path}?{'a' * length}": b"422" for path in ("/sessions", "/sessions/a") for length in (4096, 4097)}
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:")) as server:
            for target in expected:
                reply = await get(server.port, target, "localhost")
                assert reply.split()[1] == b"422"
                assert (b"at most 4096 are taken" in reply) is target.endswith("a" * 4097)


HTTP: dict[str, Any] = {
    "type": "http", "method": "GET", "scheme": "http", "http_version": "2", "path": "/healthz",
    "raw_path": b"/healthz", "query_string": b"", "root_path": "", "headers": [(b"host", b"localhost")],
    "extensions": {}, **LOOPBACK,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"path": ""},
        {"path": "http://["},
        {"raw_path": b"/\xff"},
        {"query_string": b"a=\xff"},
        {"query_string": "é".encode()},
    ],
)
@pytest.mark.parametrize(
    ("kind", "answer"),
    [("http", {"type": "http.response.start", "status": 400}), ("websocket", {"type": "websocket.close"})],
)
async def test_bytes_that_only_http_2_allows_are_refused_too(
    changes: dict[str, Any], kind: str, answer: dict[str, Any]
) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    with trio.fail_after(CAP_S):
        await create_app()({**HTTP, **changes, "type": kind}, trio.sleep_forever, send)  # type: ignore[arg-type]
    assert sent[0].items() >= answer.items()
    assert kind == "websocket" or b'"bad_request"' in sent[1]["body"]
