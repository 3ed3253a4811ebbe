"""The peer listener: answers the service's other processes for sessions that this one runs.

**In one place** (``peer_address.this_place``) they come through a Unix socket with an abstract name (unix(7)). It has
no file, so it leaves nothing behind, also after a kill. It has no permissions either: the listener admits processes of
the same user that prove that they know the store's secret, which is kept beside the store.

**Other replicas** come through the port of this replica, with TLS and a certificate (``listeners/peer_port``). The port
is shared by all workers. A client's first message names the process that it wants (SNI); the worker that has accepted
the connection hands the socket, with that message, to the other process, through a second Unix socket of that process.
So each connection ends in the process that it is for, and bytes are passed on by none. A name that no process has is
that of a process that has gone: its request is answered with 421, and nothing of it is done.

The process that sends a request on has checked its access already. The way in which a connection ends tells whether the
client behind the peer has left (see :func:`client_returns`).
"""

import hmac
import math
import os
import select
import socket
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import structlog
import trio
from hypercorn.typing import AppWrapper, ConnectionState, Scope

from service.api.http.proxy import FENCE, INSTANCE, MISDIRECTED, PEER, TELL_ACCEPTED
from service.cluster.owner_beats import send_beats
from service.cluster.peer_address import PeerAddress, shown_host_port
from service.cluster.peer_certificates import PeerCertificates
from service.cluster.peer_proof import Purpose, check_peer
from service.cluster.peer_socket import is_of_this_user, process_of_peer, socket_name
from service.cluster.peer_tls import HELLO_BYTES_MAX, TlsStream, is_unheard, keep_alive, read_hello
from service.cluster.peer_transport import PeerStream
from service.errors import PeerUntrustedError, StartupError
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.http1_connection import Stream
from service.hosting.hypercorn.worker import Worker
from service.hosting.listeners.peer_port import BACKLOG, PeerDoor, open_peer_port
from service.sessions.upkeep.run_every import run_every
from service.setting_types import split_host_port
from service.settings import Settings
from service.watched_files import LOOK_INTERVAL_S

logger = structlog.get_logger("lastcall.cluster")

OPENING_MAX = 256
"""Bound, for each door, on the connections that were accepted and have not proved yet that they are the service's."""
OPENING_S = 5.0
"""How long that may take, from the accept to the proof."""
OPENING_KEPT_S = 1.0
"""How long it may take if the bound is reached: then the oldest connection gives way to the next one."""
ACCEPT_PAUSE_S = 0.1
WATCH_INTERVAL_S = 1.0
REFUSALS_INTERVAL_S = 60.0
"""The log says no more often that connections were refused: anybody who reaches the port can make them."""
_HANDED_KIND = socket.SOCK_SEQPACKET
_NOTE_BYTES = 32
_DESCRIPTOR_BYTES = array("i").itemsize
_FLAGS_FIELD = 6
_PF_EXITING = 0x4


def check_sharing(settings: Settings, *, workers: int) -> None:
    """Check that several workers share a store.

    Raises:
        StartupError: There are several workers, and each would have sessions of its own.
    """
    if workers > 1 and not settings.store_capabilities.shared:
        raise StartupError(
            f"store_url {settings.store_url} keeps sessions in one process, and there are {workers} workers; "
            "name a store that they share (LASTCALL_STORE_URL=sqlite:lastcall.db), or serve with one worker."
        )


@asynccontextmanager
async def open_peer_listener(
    worker: Worker, connections: Connections, *, serving: trio.Event, settings: Settings, door: PeerDoor
) -> AsyncIterator["PeerListener | None"]:
    """Listen until the context is left. Yields None, without a listener, if the store belongs to this process alone.

    Args:
        door: Says when this worker takes connections of other replicas.

    Raises:
        StartupError: The port for other replicas is taken, or their certificates cannot be used.
    """
    if not settings.store_capabilities.shared:
        yield None
        return
    certificates = PeerCertificates.of(settings)
    if certificates is None and settings.store_scheme == "postgresql":
        logger.info("requests are forwarded between processes of this machine only; for several machines set peer_bind")
    with ExitStack() as sockets:
        port = open_peer_port(worker.config, settings)
        tcp = None if port is None else sockets.enter_context(trio.socket.from_stdlib_socket(port))
        address = _address(settings, tcp)
        local = await _listen(address.unix_name, sockets)
        if tcp is not None:
            logger.info(
                "other replicas are answered", bind=shown_host_port(*tcp.getsockname()[:2]), address=str(address)
            )
        handed = None if tcp is None else await _listen(_name_for_handed(address.instance), sockets, _HANDED_KIND)
        async with trio.open_nursery() as nursery:
            yield PeerListener(
                address,
                Doors(local, tcp, handed),
                worker,
                connections,
                certificates=certificates,
                serving=serving,
                door=door,
                nursery=nursery,
            )
            nursery.cancel_scope.cancel()


def _address(settings: Settings, tcp: trio.socket.SocketType | None) -> PeerAddress:
    if tcp is None or settings.peer_bind is None:
        return PeerAddress.made()
    if settings.peer_url is not None:
        host, port = split_host_port(settings.peer_url.removeprefix("tls://"))
    else:
        host, _ = split_host_port(settings.peer_bind)
        port = tcp.getsockname()[1]
    return PeerAddress.made(host=host, port=int(port))


async def _listen(
    name: str, sockets: ExitStack, kind: socket.SocketKind = socket.SOCK_STREAM
) -> trio.socket.SocketType:
    listener = sockets.enter_context(trio.socket.socket(socket.AF_UNIX, kind))
    await listener.bind(socket_name(name))
    listener.listen(BACKLOG)
    return listener


def _name_for_handed(instance: str) -> str:
    """The name of the socket on which a process takes connections that others of its replica have accepted."""
    return f"@{instance}-handed"


class Doors(NamedTuple):
    """The listening sockets: for processes in this place, for other replicas, and for what other workers accepted."""

    local: trio.socket.SocketType
    tcp: trio.socket.SocketType | None
    handed: trio.socket.SocketType | None


class PeerListener:
    """The listener for other processes. Made by :func:`open_peer_listener`.

    Args:
        nursery: Runs the loops that accept connections and opens those, until the listener closes. Hypercorn's
            nursery runs the connections with a proof.

    Attributes:
        address: The address that the store tells the other processes.
        certificates: Those of this replica; None if it answers no other one.
    """

    def __init__(
        self,
        address: PeerAddress,
        doors: Doors,
        worker: Worker,
        connections: Connections,
        *,
        certificates: PeerCertificates | None,
        serving: trio.Event,
        door: PeerDoor,
        nursery: trio.Nursery,
    ) -> None:
        self.address = str(address)
        self.certificates = certificates
        self._peer = address
        self._doors = doors
        self._worker = worker
        self._connections = connections
        self._serving = serving
        self._door = door
        self._nursery = nursery
        self._far: set[TlsStream] = set()
        self._refused, self._told_at = 0, -math.inf
        self._secret = b""
        self._fence = 0

    def take_peers(self, secret: bytes, *, fence: int) -> None:
        """Accept connections of processes that know the store's secret, once hypercorn serves.

        They close together with hypercorn's other connections.

        Args:
            fence: The fence with which this process owns turns.
        """
        self._secret, self._fence = secret, fence
        self._nursery.start_soon(self._run, name="peer listener")

    async def _run(self) -> None:
        await self._serving.wait()
        doors, certificates = self._doors, self.certificates
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept, doors.local, self._open_local)
            if doors.tcp is not None and doors.handed is not None and certificates is not None:
                open_far = partial(self._open_far, certificates=certificates)
                nursery.start_soon(self._door.run, partial(self._accept, doors.tcp, open_far))
                nursery.start_soon(self._accept, doors.handed, partial(self._open_handed, certificates=certificates))
                nursery.start_soon(self._watch_far)
                nursery.start_soon(partial(run_every, LOOK_INTERVAL_S, certificates.look, name="certificate loop"))

    async def _accept(self, door: trio.socket.SocketType, open_stream: "OpenStream") -> None:
        """Accept connections, of which a bounded number may be without a proof. Each is opened by a task of its own."""
        openings = Openings()
        while True:
            await openings.wait_room()
            try:
                accepted, _ = await door.accept()
            except OSError as error:  # no descriptor is left, or the client has gone already
                logger.warning("a connection of another process could not be accepted", error=error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            # Not in hypercorn's nursery: its stop would wait for clients that say nothing.
            self._nursery.start_soon(self._open, accepted, open_stream, openings.begin(), name="peer that opens")

    async def _open(self, accepted: trio.socket.SocketType, open_stream: "OpenStream", opening: "Opening") -> None:
        """Open one connection that was accepted, and have it served by another task."""
        opened = None
        try:
            with opening:
                opened = await open_stream(accepted)
        except (PeerUntrustedError, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self._note_refused(error, is_local=open_stream == self._open_local)
        finally:
            if opened is None or opened.stream.socket is not accepted:
                accepted.close()
        if opened is None:
            return
        if opened.purpose == "beats":  # in a task of this listener: hypercorn's nursery would wait for the beats
            self._nursery.start_soon(self._send_beats, opened.stream, name="beats")
            return
        try:
            self._worker.server_nursery.start_soon(self._serve, opened.stream, name="peer")
        except RuntimeError:  # hypercorn has stopped
            opened.stream.socket.close()

    async def _send_beats(self, stream: PeerStream) -> None:
        with self._watched(stream):
            await send_beats(stream)

    async def _serve(self, stream: PeerStream) -> None:
        """Serve one connection of the service, up to its end."""
        with stream.socket:
            await self._serve_requests(stream)

    async def _serve_requests(self, stream: PeerStream) -> None:
        worker = self._worker
        app = cast("AppWrapper", PeerApp(worker.app, stream, instance=self._peer.instance, fence=self._fence))
        connection = self._connections.open(
            app, worker.config, worker.context, ConnectionState({}), cast("Stream", stream)
        )
        with self._watched(stream):
            await connection.run()

    # How a connection becomes a stream with a proof

    async def _open_local(self, accepted: trio.socket.SocketType) -> "Opened | None":
        stream = trio.SocketStream(accepted)
        if not is_of_this_user(accepted):
            return None
        purpose = await check_peer(stream, self._secret, address=self.address)
        return None if purpose is None else Opened(stream, purpose)

    async def _open_far(self, accepted: trio.socket.SocketType, *, certificates: PeerCertificates) -> "Opened | None":
        """Open a connection of another replica, or hand it to the process of this replica that it is for."""
        keep_alive(accepted)
        hello, name = await read_hello(accepted, certificates.server)
        if name not in (None, self._peer.instance) and await self._hand_over(accepted, hello, name or ""):
            return None
        return await self._open_tls(accepted, hello, name, certificates)

    async def _open_tls(
        self, tcp: trio.socket.SocketType, hello: bytes, name: str | None, certificates: PeerCertificates
    ) -> "Opened | None":
        stream = TlsStream(tcp, certificates.server, received=hello)
        purpose = await check_peer(stream, self._secret, address=self.address)
        if purpose is None:
            raise PeerUntrustedError("no proof that it knows the secret of the store")
        if purpose == "beats" and name != self._peer.instance:  # of a process that has gone
            return None
        return Opened(stream, purpose)

    async def _hand_over(self, tcp: trio.socket.SocketType, hello: bytes, name: str) -> bool:
        """Hand a connection to the process of this replica that has this name. Returns False if there is none.

        The other process need not do anything for that: if it hangs, the connection waits there.
        """
        if not PeerAddress.is_instance(name):
            return False
        with trio.socket.socket(socket.AF_UNIX, _HANDED_KIND) as way:
            try:
                await way.connect(socket_name(_name_for_handed(name)))
            except ConnectionRefusedError:
                return False
            if is_of_this_user(way):
                descriptor = array("i", [tcp.fileno()]).tobytes()
                note = self._note_of(name, hello) + hello
                await way.sendmsg([note], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)])
        return True

    async def _open_handed(
        self, accepted: trio.socket.SocketType, *, certificates: PeerCertificates
    ) -> "Opened | None":
        """Open a connection that another worker has accepted. Its user is looked at before anything is received."""
        if not is_of_this_user(accepted):
            return None
        size = socket.CMSG_SPACE(_DESCRIPTOR_BYTES)
        note, more, *_ = await accepted.recvmsg(_NOTE_BYTES + HELLO_BYTES_MAX, size, socket.MSG_CMSG_CLOEXEC)
        descriptors = array("i")
        for level, kind, data in more:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % _DESCRIPTOR_BYTES])
        hello = note[_NOTE_BYTES:]
        is_ours = hmac.compare_digest(note[:_NOTE_BYTES], self._note_of(self._peer.instance, hello))
        # Two fit into the room for one. Those of a process without the secret need not be sockets.
        for descriptor in descriptors[1:] if is_ours else descriptors:
            os.close(descriptor)
        if not descriptors or not is_ours:
            return None
        tcp = trio.socket.from_stdlib_socket(socket.socket(fileno=descriptors[0]))
        opened = None
        try:
            opened = await self._open_tls(tcp, hello, self._peer.instance, certificates)
        finally:
            if opened is None:
                tcp.close()
        return opened

    def _note_of(self, instance: str, hello: bytes) -> bytes:
        """Shows that a connection comes from a process that knows the store's secret."""
        return hmac.digest(self._secret, b"\0".join((b"handed", instance.encode(), hello)), "sha256")

    # Other replicas

    @contextmanager
    def _watched(self, stream: PeerStream) -> Iterator[None]:
        """End the connection of a replica that vanishes in the context."""
        if isinstance(stream, TlsStream):
            self._far.add(stream)
            try:
                yield
            finally:
                self._far.discard(stream)
        else:
            yield

    async def _watch_far(self) -> None:
        """End the connections of replicas that have vanished while something was on its way to them."""
        while True:
            await trio.sleep(WATCH_INTERVAL_S)
            for stream in tuple(self._far):
                if is_unheard(stream.socket):
                    logger.warning("a connection of another replica ends: the replica has vanished")
                    self._far.discard(stream)
                    stream.cut()

    def _note_refused(self, error: Exception, *, is_local: bool) -> None:
        """Say in the log, once in a while, that connections were not accepted."""
        if is_local:  # only processes of this machine reach that door
            logger.debug("a connection of another process of this machine was not accepted", reason=_reason_of(error))
            return
        self._refused += 1
        now = trio.current_time()
        if now < self._told_at + REFUSALS_INTERVAL_S:
            return
        logger.warning("connections to peer_bind were not accepted", count=self._refused, reason=_reason_of(error))
        self._refused, self._told_at = 0, now


def _reason_of(refused: Exception) -> str:
    return refused.reason if isinstance(refused, PeerUntrustedError) else "the client has gone"


class Openings:
    """The connections of one door that have no proof yet: a bounded number.

    Each door has its own, because anybody in the network reaches the door for other replicas. If that one is full of
    clients that say nothing, the oldest of them give way: a replica needs a small part of ``OPENING_KEPT_S``.
    """

    def __init__(self) -> None:
        self._begun: dict[trio.CancelScope, float] = {}
        self._ended = trio.lowlevel.ParkingLot()

    async def wait_room(self) -> None:
        """Wait until one more may begin. Only one task may call this, and :meth:`begin`."""
        while len(self._begun) >= OPENING_MAX:
            oldest, begun_at = next(iter(self._begun.items()))
            with trio.move_on_at(begun_at + OPENING_KEPT_S) as patience:
                await self._ended.park()
            if patience.cancelled_caught and oldest in self._begun:
                oldest.cancel()
                del self._begun[oldest]

    def begin(self) -> "Opening":
        scope = trio.CancelScope(deadline=trio.current_time() + OPENING_S)
        self._begun[scope] = trio.current_time()
        return self._until_ended(scope)

    @contextmanager
    def _until_ended(self, scope: trio.CancelScope) -> Iterator[None]:
        try:
            with scope:
                yield
            if scope.cancelled_caught:
                raise PeerUntrustedError("no proof in time")
        finally:
            self._begun.pop(scope, None)
            self._ended.unpark()


Opening = AbstractContextManager[None]
"""The time that a connection has for its proof. Raises PeerUntrustedError when it is over."""


class Opened(NamedTuple):
    """A connection whose other end has proved itself."""

    stream: PeerStream
    purpose: Purpose


OpenStream = Callable[[trio.socket.SocketType], Awaitable[Opened | None]]


class PeerApp:
    """The application, with a mark on each request that it comes from another process of the service.

    A request for another process is refused, and nothing of it is done: the address of its owner was given to this
    process, or this one owns turns under another fence.

    Args:
        stream: The connection of the peer.
        instance: The name of this process.
        fence: The fence with which it owns turns.
    """

    def __init__(self, app: AppWrapper, stream: PeerStream, *, instance: str, fence: int) -> None:
        self._app = app
        self._stream = stream
        self._instance = instance.encode()
        self._fence = b"%d" % fence

    async def __call__(self, scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        if not self._is_meant(dict(scope["headers"])):
            headers = [(b"content-length", b"0"), (INSTANCE.encode(), self._instance)]
            await send({"type": "http.response.start", "status": MISDIRECTED, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        stream = self._stream
        returns = stream.client_returns if isinstance(stream, TlsStream) else partial(client_returns, stream.socket)
        marks = {PEER: returns, TELL_ACCEPTED: partial(tell_accepted, stream)}
        await self._app(cast("Scope", {**scope, **marks}), receive, send, *rest)

    def _is_meant(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request is for this process. One of an earlier version, through a Unix socket, does not say so."""
        instance, fence = headers.get(INSTANCE.encode()), headers.get(FENCE.encode())
        if instance is None:
            return not isinstance(self._stream, TlsStream)
        return instance == self._instance and fence in (None, self._fence)


def tell_accepted(peer: PeerStream, path: str) -> None:
    """Tell a peer, before the answer to its request, the path of the turn as which the request was accepted.

    The message is an interim response (RFC 9110, 15.2). hypercorn sends none on HTTP/1.1, so this one goes past
    hypercorn, which has not sent anything on this connection yet.
    """
    message = b"HTTP/1.1 103 \r\nlocation: " + path.encode("ascii") + b"\r\n\r\n"
    if isinstance(peer, TlsStream):
        peer.write_now(message)
        return
    with suppress(OSError):  # the peer has gone
        os.write(peer.socket.fileno(), message)


def client_returns(peer: trio.socket.SocketType) -> bool:
    """Whether the client of a closed connection may come back, because the peer ended the connection.

    Over TLS a peer says goodbye if its client has left (:meth:`TlsStream.client_returns`); this is about Unix sockets.
    A peer that stops closes its sending side and waits for the other side's close. After a peer's death the kernel
    closes both sides.
    """
    if peer.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(peer.fileno(), select.POLLRDHUP)
    seen = sum(events for _, events in poll.poll(0))
    if seen & select.POLLHUP:
        return _is_dying(process_of_peer(peer))
    return bool(seen & select.POLLRDHUP)


def _is_dying(process: int) -> bool:
    """Whether a process is dying: it has ``PF_EXITING`` before the kernel closes its files.

    Source: proc_pid_stat(5), ``flags``.
    """
    if process == 0:  # the process is in another PID namespace
        return False
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return True
    return bool(int(stat.rpartition(b")")[2].split()[_FLAGS_FIELD]) & _PF_EXITING)
