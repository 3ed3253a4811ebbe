"""What a stream of HTTP/2 has still to send, bounded.

hypercorn lets the application go on when its sending task has taken few bytes, and not when few bytes are left: the
whole response to a client that grants no window is in memory, also an event stream. This buffer goes by what is left.
Proven by ``tests/hosting/hypercorn/test_stream_buffer.py``.
"""

from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, StreamBuffer


class BoundedStreamBuffer(StreamBuffer):
    """hypercorn's buffer of a stream; :meth:`push` returns once less than a frame is left, or nothing was waiting."""

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data
