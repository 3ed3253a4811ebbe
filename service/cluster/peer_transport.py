"""How processes of the service reach each other: a Unix socket in one place, TLS over TCP between places.

This is the one file that knows both ways. Other code takes an address as the store has it (``peer_address``) and gets a
connected stream.
"""

import errno
from collections.abc import Iterator

import structlog
import trio

from service.cluster.peer_address import PeerAddress
from service.cluster.peer_certificates import PeerCertificates
from service.cluster.peer_socket import is_of_this_user, open_unix_stream
from service.cluster.peer_tls import TlsStream, keep_alive
from service.errors import ResourcesExhaustedError, StoreError, is_exhaustion
from service.freezes import move_on_after

logger = structlog.get_logger("lastcall.cluster")

PeerStream = trio.SocketStream | TlsStream
"""A connection to another process of the service, or from it."""
CONNECT_TIMEOUT_S = 2.0
_RETRY_S = 0.5


class PeerTransport:
    """Connects to other processes of the service.

    Args:
        certificates: Those of this replica; None if it reaches no process in another place.
    """

    def __init__(self, certificates: PeerCertificates | None = None) -> None:
        self._certificates = certificates

    async def connect(self, address: str) -> PeerStream | None:
        """Connect to a process; the caller closes the connection. None if none answers at this address.

        Cancellation leaves no socket behind. The keys of TLS are agreed on by the proof, or the first byte.

        Raises:
            ResourcesExhaustedError: This process may open no more sockets.
            StoreError: This process has no certificate for processes in other places.
        """
        with move_on_after(CONNECT_TIMEOUT_S):
            return await self.wait(address)
        return None

    async def wait(self, address: str) -> PeerStream | None:
        """Connect as :meth:`connect` does, but wait as long as the process takes no connection or is out of reach.

        None only if the system of the process says that nothing listens there.
        """
        peer = PeerAddress.parse(address)
        if not peer.is_far:
            return await open_unix_stream(peer.unix_name)
        certificates = self._certificates
        if certificates is None:
            logger.warning("another replica cannot be asked: the settings peer_* are missing here", replica=peer.host)
            raise StoreError("The replica that runs the turns of this session cannot be reached from this one.")
        while True:
            try:
                stream = await trio.open_tcp_stream(peer.host, peer.port)
            except (OSError, UnicodeError) as error:  # UnicodeError: the host cannot be the name of one
                codes = set(_codes_of(error))
                if any(map(is_exhaustion, codes)):
                    raise ResourcesExhaustedError from error
                if codes == {errno.ECONNREFUSED}:
                    return None
                await trio.sleep(_RETRY_S)  # cut off, or the name of the host is not known now
                continue
            return _on(stream, certificates, peer.instance)


def _on(stream: trio.SocketStream, certificates: PeerCertificates, instance: str) -> TlsStream:
    try:
        keep_alive(stream.socket)
        return TlsStream(stream.socket, certificates.client, server_name=instance)
    except BaseException:
        stream.socket.close()
        raise


def _codes_of(error: OSError | UnicodeError) -> Iterator[int | None]:
    """The ``errno`` of each attempt to connect: Trio tries all addresses of a name."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        yield from (getattr(it, "errno", None) for it in cause.exceptions)
    else:
        yield getattr(cause or error, "errno", None)


def may_be_asked(stream: PeerStream) -> bool:
    """Whether the process at the other end of a Unix socket has this user. On TLS the certificate stands for that."""
    return isinstance(stream, TlsStream) or is_of_this_user(stream.socket)


async def bound_to(stream: PeerStream, address: str) -> bytes:
    """What a proof over a connection covers, so that it is worth nothing on another connection.

    On a Unix socket this is its name. On TLS it is the connection itself (:attr:`TlsStream.binding`): which process
    of the replica is at the other end is said by each request.

    Raises:
        PeerUntrustedError: A certificate is not accepted.
        trio.BrokenResourceError: The peer has gone.
    """
    if isinstance(stream, TlsStream):
        await stream.do_handshake()
        return b"tls:" + stream.binding
    return PeerAddress.parse(address).unix_name.encode()


def leave(stream: PeerStream) -> None:
    """Close at once: the peer sees that the client has left."""
    if isinstance(stream, TlsStream):
        stream.leave()
    else:
        stream.socket.close()


async def end_sending(stream: PeerStream) -> None:
    """Close the sending side: the peer sees that the client may come back."""
    if isinstance(stream, TlsStream):
        stream.send_eof()
    else:
        await stream.send_eof()
