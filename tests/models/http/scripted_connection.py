"""A connection without a socket: it takes every request, and what it receives is set beforehand."""

import trio

from service.models.http.connection import Connection


class ScriptedConnection(Connection):
    """Receives these pieces, and then the end."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.sent = bytearray()
        self.is_closed = False
        self.is_fine = True

    def __repr__(self) -> str:
        return "<ScriptedConnection>"

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.pieces.pop(0) if self.pieces else b""

    def receive_nowait(self) -> bytes | None:
        return None

    def send_nowait(self, data: memoryview) -> int:
        self.sent += data
        return len(data)

    def is_usable(self) -> bool:
        return self.is_fine

    def close(self) -> None:
        self.is_closed = True
