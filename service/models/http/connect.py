"""Connecting to a model server: its name, its addresses one after the other (RFC 8305), and TLS."""

import socket
import ssl

import httpx  # noqa: ASYNC127  the project's choice
import trio

from service.freezes import extended_when_late
from service.models.http.connection import Connection, TlsConnection


class TlsError(httpx.ConnectError):
    """TLS could not be agreed on; the cause says why."""


async def connect(host: str, port: int, *, ssl_context: ssl.SSLContext | None, connect_timeout_s: float) -> Connection:
    """Open a connection.

    Args:
        ssl_context: For TLS: which certificates are trusted.
        connect_timeout_s: Bound on the set-up of the connection and, again, on the TLS handshake.

    Raises:
        httpx.ConnectTimeout: One of the two took too long.
        TlsError: The server is not trusted, or does not speak TLS.
        httpx.ConnectError: No address of the server could be reached.
    """
    sock = await _connect_socket(host, port, connect_timeout_s=connect_timeout_s)
    if ssl_context is None:
        return Connection(sock)
    connection = TlsConnection(sock, ssl_context, server_hostname=host)
    try:
        with trio.move_on_after(connect_timeout_s) as scope, extended_when_late(scope, timeout_s=connect_timeout_s):
            await connection.do_handshake()
    except OSError as error:
        connection.close()
        raise TlsError(str(error)) from error
    except BaseException:
        connection.close()
        raise
    if scope.cancelled_caught:
        connection.close()
        raise httpx.ConnectTimeout("the TLS handshake took too long")
    return connection


async def _connect_socket(host: str, port: int, *, connect_timeout_s: float) -> socket.socket:
    try:
        with trio.move_on_after(connect_timeout_s) as scope, extended_when_late(scope, timeout_s=connect_timeout_s):
            stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise httpx.ConnectError(str(error)) from error
    if scope.cancelled_caught:
        raise httpx.ConnectTimeout("the connection was not taken in time")
    # Trio's own socket tries to read before it waits. No checkpoint may be between these lines.
    family, kind = stream.socket.family, stream.socket.type
    sock = socket.socket(family, kind, fileno=stream.socket.detach())
    sock.setblocking(False)
    return sock
