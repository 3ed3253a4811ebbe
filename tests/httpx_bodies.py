"""A pytest plugin: the body of an httpx request in tests, which leaves no generator when the request breaks off.

httpx sends a body from an async generator. A connection that breaks within the body, as when a test ends the server,
or a cancelled call leaves it to the garbage collector, and Trio warns: https://github.com/encode/httpx/issues/3686.
``tests/test_httpx_bodies.py`` fails once httpx no longer does.
"""

from collections.abc import AsyncIterator, Iterator

import httpx

HTTPX_OWN = httpx.ByteStream.__aiter__


class _Pieces:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration


def _pieces(body: httpx.ByteStream) -> AsyncIterator[bytes]:
    return _Pieces(iter(body))


httpx.ByteStream.__aiter__ = _pieces  # type: ignore[method-assign, assignment]
