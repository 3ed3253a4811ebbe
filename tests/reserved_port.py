"""A pytest plugin: a port for the servers of a test that come one after the other."""

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 that no other program is given during the test, also while no server listens on it.

    It is bound here, without a listener. Linux lets a server bind it too, because both have SO_REUSEADDR.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
