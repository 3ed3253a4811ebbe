"""How the connection of one request to another process ends, whatever the other end does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import h11
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from service.cluster.peer_client import PEER_GONE, PeerConnection
from service.cluster.peer_proof import PeerGoneError
from service.cluster.peer_tls import TlsStream
from service.cluster.peer_transport import PeerTransport
from service.cluster.proxied_requests import ProxiedRequests
from service.errors import PeerUntrustedError
from service.stop_state import StopState
from tests.cluster.certificates import peer_certificates

SECRET = b"s" * 32
CAP_S = 60


@asynccontextmanager
async def open_connection(folder: Path) -> AsyncIterator[tuple[PeerConnection, TlsStream, trio.SocketStream]]:
    """A connection, its stream, and the other end, which says nothing by itself."""
    with trio.fail_after(CAP_S), trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"tls://127.0.0.1:{listener.getsockname()[1]}/lastcall-{32 * '0'}?place={16 * 'f'}"
        stream = await PeerTransport(peer_certificates(folder)).connect(address)
        assert isinstance(stream, TlsStream)
        accepted, _ = await listener.accept()
        async with trio.SocketStream(accepted) as other:
            yield PeerConnection(stream, address=address, secret=SECRET), stream, other


async def test_a_peer_that_got_no_request_is_left_at_once(tmp_path: Path) -> None:
    async with open_connection(tmp_path) as (peer, _, other):
        await peer.half_close()
        assert peer.is_closed
        assert await other.receive_some() == b""


@pytest.mark.parametrize(
    "says", [b"HTTP/1.1 400\r\n", b"\x15\x03\x03\x00\x02\x02\x30", b""], ids=["HTTP", "alert", "end"]
)
async def test_a_half_closed_connection_ends_with_whatever_the_peer_says(says: bytes, tmp_path: Path) -> None:
    async with open_connection(tmp_path) as (peer, stream, other), trio.open_nursery() as nursery:
        async with trio.open_nursery() as handshake:
            handshake.start_soon(stream.do_handshake)
            assert await other.receive_some(), "the client has said hello"
            handshake.cancel_scope.cancel()
        peer.has_asked = True
        nursery.start_soon(peer.half_close)
        while await other.receive_some():
            pass
        assert not peer.is_closed, "it waits for the peer"
        with suppress(trio.BrokenResourceError):  # it may close in between
            await other.send_all(says)
            await other.send_eof()
        while not peer.is_closed:  # noqa: ASYNC110  the task's own time
            await trio.sleep(0.005)


@pytest.mark.parametrize(
    "error",
    [
        PeerUntrustedError("unknown ca"),
        PeerGoneError(),
        OSError(),
        trio.BrokenResourceError(),
        trio.ClosedResourceError(),
        h11.RemoteProtocolError("x"),
    ],
    ids=lambda it: type(it).__name__,
)
async def test_a_half_closed_connection_that_breaks_is_closed(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(error, (*PEER_GONE, trio.ClosedResourceError))

    async def broken(_: int) -> bytes:
        await trio.lowlevel.checkpoint()
        raise error

    async with open_connection(tmp_path) as (peer, stream, _):
        peer.has_asked = True
        monkeypatch.setattr(stream, "receive_some", broken)
        await peer.half_close()
        assert peer.is_closed


async def fail() -> None:
    await trio.lowlevel.checkpoint()
    raise ValueError("a fault")


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_close_that_fails_ends_its_request_and_nothing_else(hangs: bool) -> None:
    with trio.fail_after(CAP_S):
        async with trio.open_nursery() as nursery:
            requests = ProxiedRequests(
                nursery, cleanup_timeout_s=1, secret=lambda: SECRET, stop=StopState(), transport=PeerTransport()
            )
            proxied = requests.open_request("@nowhere")
            if hangs:
                proxied.end_for_silence()
            with capture_logs() as told:
                assert proxied.close_after(fail)
                await wait_all_tasks_blocked()
            assert requests.is_idle
            assert [it["event"] for it in told] == ["closing the connection to another worker failed"]
            assert not nursery.cancel_scope.cancel_called
            nursery.cancel_scope.cancel()


async def test_a_host_that_cannot_be_the_name_of_one_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cluster.peer_transport.CONNECT_TIMEOUT_S", 0.05)
    peers = PeerTransport(peer_certificates(tmp_path))
    assert await peers.connect(f"tls://{64 * 'a'}..b:1/lastcall-{32 * '0'}?place={16 * 'f'}") is None
