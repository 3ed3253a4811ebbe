"""The proof that both ends of a connection between processes of the service know the secret of their store.

The same user is no proof: containers may share a user and a network, but no store. The secret itself is never sent.
When a process dies, the name of its abstract socket is free, and another process that takes this name must learn
neither the secret nor a request. So each end sends a random number, and then a digest of both numbers, the secret and
what the connection is bound to (``bound_to``: the name of the socket, or the TLS connection); the owner sends its
digest first. Because of the binding, a process in between cannot use the proof of one owner as the proof of another.
The peer's digest also says what the connection is for.
"""

import hmac
from secrets import token_bytes
from typing import Literal

import trio

from service.cluster.peer_transport import PeerStream, bound_to

_BYTES = 32
"""The size of a random number, and of a digest (SHA-256)."""
_TIMEOUT_S = 2.0

Purpose = Literal["a request", "beats"]
"""What a connection is for: one HTTP request, or the owner's beats (:mod:`service.cluster.owner_beats`)."""
_ROLES: dict[Purpose, bytes] = {"a request": b"peer", "beats": b"beats"}


class PeerGoneError(Exception):
    """The other end closed the connection before the proof was complete."""


async def prove_to_owner(stream: PeerStream, secret: bytes, *, address: str, purpose: Purpose = "a request") -> bool:
    """Run the proof on the side that connects. False if the listener does not know the secret; it learns nothing then.

    The caller bounds the wait. A listener of an earlier version takes a connection for beats for one without proof.

    Raises:
        PeerGoneError: The listener has closed: its process ends, or this end did not prove itself.
        PeerUntrustedError: A certificate is not accepted on the other side.
        OSError, trio.BrokenResourceError
    """
    bound = await bound_to(stream, address)
    ours = token_bytes(_BYTES)
    await stream.send_all(ours)
    theirs = await _receive(stream)
    if not hmac.compare_digest(await _receive(stream), _digest(secret, b"owner", bound, ours, theirs)):
        return False
    await stream.send_all(_digest(secret, _ROLES[purpose], bound, ours, theirs))
    return True


async def check_peer(stream: PeerStream, secret: bytes, *, address: str) -> Purpose | None:
    """Run the proof on the side that listens.

    Returns what the connection is for; None if the peer does not prove within two seconds that it knows the secret.

    Raises:
        PeerUntrustedError: A certificate is not accepted.
    """
    with trio.move_on_after(_TIMEOUT_S):
        try:
            bound = await bound_to(stream, address)
            theirs = await _receive(stream)
            ours = token_bytes(_BYTES)
            await stream.send_all(ours + _digest(secret, b"owner", bound, theirs, ours))
            proof = await _receive(stream)
            for purpose, role in _ROLES.items():
                if hmac.compare_digest(proof, _digest(secret, role, bound, theirs, ours)):
                    return purpose
        except (PeerGoneError, OSError, trio.BrokenResourceError):
            return None
    return None


async def _receive(stream: PeerStream) -> bytes:
    """Receive one number or digest, and no byte after it."""
    received = b""
    while len(received) < _BYTES:
        more = await stream.receive_some(_BYTES - len(received))
        if not more:
            raise PeerGoneError
        received += more
    return received


def _digest(secret: bytes, role: bytes, bound: bytes, of_peer: bytes, of_owner: bytes) -> bytes:
    return hmac.digest(secret, b"\0".join((role, bound, of_peer + of_owner)), "sha256")
