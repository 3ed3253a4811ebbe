"""Connections that could delay a stop below the level of HTTP/1: in TLS's handshake, in HTTP/2's windows."""

import signal
import ssl
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx
import pytest
import trio
import trustme

from bench.server_process import ServerProcess
from tests.machine import Machine
from tests.process.clients import Stream
from tests.process.lastcall import (
    CAP_S,
    CONFIGURED_2,
    HYPERCORN_1,
    SERVE,
    Host,
    assert_all_ended_properly,
    assert_clean,
    chat,
    open_lastcall,
    open_under_load,
    reports,
    wait_gone,
)


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


async def connect(server: ServerProcess, first: bytes) -> trio.SocketStream:
    """A client that has sent ``first`` and then does nothing."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    await stream.send_all(first)
    return stream


@pytest.mark.parametrize("host", [SERVE, CONFIGURED_2], ids=str)
async def test_clients_in_mid_handshake_delay_no_stop(tmp_path: Path, machine: Machine, host: Host) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    settings: dict[str, Any] = {
        "tls_certfile": certificate,
        "tls_keyfile": key,
        "model_url": "scripted:?tokens=1000&rate=20",
    }
    streams = [Stream() for _ in range(6)]
    hello = client_hello()
    async with open_lastcall(host, tmp_path, drain_timeout_s=0, **settings) as server:
        url = f"https://localhost:{server.port}"
        async with (
            httpx.AsyncClient(base_url=url, verify=context, timeout=CAP_S) as client,
            trio.open_nursery() as nursery,
        ):
            for stream in streams:
                nursery.start_soon(stream.run, client, "POST", "/chat", {"message": "go"})
                await stream.begun.wait()
            rude = [await connect(server, part) for part in (b"", hello[:3], hello[:100], hello) * 3]
            signalled = server.signal_main(signal.SIGTERM)
            gone = await wait_gone(server)
        for connection in rude:
            await connection.aclose()
    assert_clean(host, server, gone)
    assert {stream.end for stream in streams} == {("turn.interrupted", "shutdown")}
    assert machine.free_s(signalled, gone.at) < 1


def ask_for_a_stream(client: h2.connection.H2Connection) -> None:
    head = [(":method", "POST"), (":path", "/chat"), (":scheme", "http"), (":authority", "localhost")]
    client.send_headers(1, [*head, ("accept", "text/event-stream"), ("content-type", "application/json")])
    client.send_data(1, b'{"message": "rude rate=20"}', end_stream=True)


async def open_http2_without_a_window(server: ServerProcess) -> trio.SocketStream:
    """A client with a stream whose window is empty: the server may send it the head only."""
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.local_settings = h2.settings.Settings(
        initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0, h2.settings.SettingCodes.ENABLE_PUSH: 0}
    )
    client.initiate_connection()
    ask_for_a_stream(client)
    stream = await connect(server, client.data_to_send())
    async for data in stream:
        events = client.receive_data(data)
        assert not any(isinstance(event, h2.events.DataReceived) for event in events)
        if any(isinstance(event, h2.events.ResponseReceived) for event in events):
            break
    return stream


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_http2_clients_that_give_no_window_are_cut_after_half_of_the_release(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    bounds: dict[str, Any] = {"drain_timeout_s": 0, "release_timeout_s": 1}
    async with open_under_load(host, tmp_path, chat(count=5), **bounds) as (server, load):
        rude = [await open_http2_without_a_window(server) for _ in range(3)]
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
        for connection in rude:
            await connection.aclose()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    assert machine.free_s(signalled, max(stream.ended_at or 0 for stream in result.streams)) < 0.5
    assert machine.free_s(signalled, gone.at) < 1
    [report] = reports(server)
    assert report["turns_interrupted"] == 8
    assert (report["streams_ended"], report["streams_aborted"], report["connections_aborted"]) == (5, 3, 3)


async def open_http2_that_does_nothing(server: ServerProcess, *, asks_first: bool) -> trio.SocketStream:
    """A client that has sent its preface and nothing else, or has reset its only stream."""
    client = h2.connection.H2Connection(h2.config.H2Configuration())
    client.initiate_connection()
    stream = await connect(server, client.data_to_send())
    if asks_first:
        ask_for_a_stream(client)
        await stream.send_all(client.data_to_send())
        async for data in stream:
            if any(isinstance(event, h2.events.DataReceived) for event in client.receive_data(data)):
                break
        client.reset_stream(1)
        await stream.send_all(client.data_to_send())
    return stream


@pytest.mark.parametrize("host", [SERVE, HYPERCORN_1], ids=str)
async def test_http2_clients_without_a_stream_delay_no_stop(tmp_path: Path, machine: Machine, host: Host) -> None:
    async with open_under_load(host, tmp_path, chat(count=5), drain_timeout_s=0) as (server, load):
        rude = [await open_http2_that_does_nothing(server, asks_first=number % 2 == 0) for number in range(4)]
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
        result = await load.stop()
        for connection in rude:
            await connection.aclose()
    assert_clean(host, server, gone)
    assert_all_ended_properly(result)
    assert machine.free_s(signalled, gone.at) < 0.5
    [report] = reports(server)
    assert report["connections_aborted"] == 0


UPGRADE_WITHOUT_KEY = b"GET /chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


@pytest.mark.parametrize("host", [SERVE, CONFIGURED_2], ids=str)
async def test_websockets_that_hypercorn_refuses_are_gone_with_the_answer(
    tmp_path: Path, machine: Machine, host: Host
) -> None:
    async with open_lastcall(host, tmp_path, drain_timeout_s=0) as server:
        for _ in range(3):
            async with await connect(server, UPGRADE_WITHOUT_KEY) as client:
                with trio.fail_after(CAP_S):
                    answer = b"".join([part async for part in client])
            assert answer.startswith(b"HTTP/1.1 400")
        signalled = server.signal_main(signal.SIGTERM)
        gone = await wait_gone(server)
    assert_clean(host, server, gone)
    assert machine.free_s(signalled, gone.at) < 5
    assert {report["connections_aborted"] for report in reports(server)} == {0}
