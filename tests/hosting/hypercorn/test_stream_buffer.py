"""The buffer of a stream of HTTP/2, alone and in hypercorn."""

import pytest
import trio
import trio.testing
from hypercorn.protocol.h2 import BufferCompleteError, StreamBuffer
from hypercorn.trio.worker_context import EventWrapper

from service.hosting.hypercorn.stream_buffer import BoundedStreamBuffer

PIECE = b"x" * 65536


async def pushed_without_a_window(kind: type[StreamBuffer], *, pieces: int) -> int:
    """How many pieces a buffer takes while hypercorn asks for nothing of them, as with an empty window."""
    buffer = kind(EventWrapper)
    pushed = 0

    async def push() -> None:
        nonlocal pushed
        for _ in range(pieces):
            await buffer.push(PIECE)
            pushed += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            for _ in range(2 * pieces):
                await trio.testing.wait_all_tasks_blocked()
                assert await buffer.pop(0) == b""
            nursery.cancel_scope.cancel()
    return pushed


async def test_a_stream_without_a_window_takes_one_piece() -> None:
    assert await pushed_without_a_window(BoundedStreamBuffer, pieces=10) == 0


@pytest.mark.removal
async def test_hypercorn_still_takes_all_pieces_of_a_stream_without_a_window() -> None:
    """This test fails once hypercorn's own buffer is bounded; then BoundedStreamBuffer is not needed."""
    assert await pushed_without_a_window(StreamBuffer, pieces=10) == 10


@pytest.mark.parametrize("step", [1000, 16384, 70_000])
async def test_all_that_is_pushed_comes_out_in_order_and_little_is_held(step: int) -> None:
    buffer = BoundedStreamBuffer(EventWrapper)
    pieces = [bytes([n]) * 65536 for n in range(6)]
    taken = b""

    async def push() -> None:
        for piece in pieces:
            await buffer.push(piece)
        buffer.set_complete()
        await buffer.drain()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            while not buffer.complete:
                await trio.testing.wait_all_tasks_blocked()
                assert len(buffer.buffer) < len(PIECE) + 16384
                taken += await buffer.pop(step)
    assert taken == b"".join(pieces)


async def test_a_closed_buffer_lets_the_application_go_on_and_takes_no_more() -> None:
    buffer = BoundedStreamBuffer(EventWrapper)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buffer.push, PIECE)
            await trio.testing.wait_all_tasks_blocked()
            await buffer.close()
        await buffer.drain()
        with pytest.raises(BufferCompleteError):
            await buffer.push(PIECE)
