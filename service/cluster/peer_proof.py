"""The proof that both ends of a connection between processes of the service know the secret of their store.

That a process runs as the same user says little: containers may have one user and one network, and no store in
common. The secret itself is never sent: an abstract socket's name is free once its process has died, and another one
that takes it must learn nothing, neither a secret nor a request. So each end sends a random number, and then a digest
of both numbers, of the listener's address and of the secret: the owner first. The address keeps a process in between
from passing the proof of one owner off as another's.
"""

import hmac
from secrets import token_bytes

import trio

_BYTES = 32
"""Of a random number, and of a digest (SHA-256)."""
_TIMEOUT_S = 2.0


class PeerGoneError(Exception):
    """The other end closed the connection before the proof was complete."""


async def prove_to_owner(stream: trio.SocketStream, secret: bytes, *, address: str) -> bool:
    """The side that connects. False, and nothing was told, where the listener does not know the secret.

    Waiting is the caller's to bound.

    Raises:
        PeerGoneError: It has closed: it ends, or does not take this end for one of the service.
        OSError, trio.BrokenResourceError
    """
    ours = token_bytes(_BYTES)
    await stream.send_all(ours)
    theirs = await _receive(stream)
    if not hmac.compare_digest(await _receive(stream), _digest(secret, b"owner", address, ours, theirs)):
        return False
    await stream.send_all(_digest(secret, b"peer", address, ours, theirs))
    return True


async def check_peer(stream: trio.SocketStream, secret: bytes, *, address: str) -> bool:
    """The side that listens: whether what has connected knows the secret. It has a moment for it."""
    with trio.move_on_after(_TIMEOUT_S):
        try:
            theirs = await _receive(stream)
            ours = token_bytes(_BYTES)
            await stream.send_all(ours + _digest(secret, b"owner", address, theirs, ours))
            return hmac.compare_digest(await _receive(stream), _digest(secret, b"peer", address, theirs, ours))
        except (PeerGoneError, OSError, trio.BrokenResourceError):
            return False
    return False


async def _receive(stream: trio.SocketStream) -> bytes:
    """So many bytes, and none of what follows."""
    received = b""
    while len(received) < _BYTES:
        more = await stream.receive_some(_BYTES - len(received))
        if not more:
            raise PeerGoneError
        received += more
    return received


def _digest(secret: bytes, role: bytes, address: str, of_peer: bytes, of_owner: bytes) -> bytes:
    return hmac.digest(secret, b"\0".join((role, address.encode(), of_peer + of_owner)), "sha256")
